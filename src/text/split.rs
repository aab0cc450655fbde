//! Splits text into words by the passes of a pre-tokenizer.

use std::ops::Range;

use tokenizers::utils::SysRegex;

use super::pre::{Pass, Pre};

enum Cut {
    Regex(SysRegex),
    Thousands,
}

/// The compiled passes of a pre-tokenizer.
pub(super) struct Splitter(Vec<Cut>);

impl Splitter {
    /// Compiles the passes of a row.
    ///
    /// # Errors
    /// A regular expression that doesn't compile.
    pub fn new(pre: &Pre) -> tokenizers::Result<Splitter> {
        let compile = |pass: &Pass| {
            Ok(match pass {
                Pass::Regex(r) => Cut::Regex(SysRegex::new(r)?),
                Pass::Thousands => Cut::Thousands,
            })
        };
        pre.passes.iter().map(compile).collect::<tokenizers::Result<_>>().map(Splitter)
    }

    /// The words of a text. No word is empty, and joined together they give the text.
    pub fn split<'t>(&self, text: &'t str) -> Vec<&'t str> {
        let mut pieces = vec![text];
        for cut in &self.0 {
            pieces = pieces.into_iter().flat_map(|piece| cut.apply(piece)).collect();
        }
        pieces
    }
}

impl Cut {
    fn apply<'t>(&self, text: &'t str) -> Vec<&'t str> {
        let matches: Vec<Range<usize>> = match self {
            Cut::Regex(r) => r.find_iter(text).map(|(start, end)| start..end).collect(),
            Cut::Thousands => thousands(text),
        };
        let mut out = Vec::with_capacity(matches.len() + 1);
        let mut at = 0;
        for m in matches {
            out.extend([&text[at..m.start], &text[m.clone()]]);
            at = m.end;
        }
        out.push(&text[at..]);
        out.retain(|piece| !piece.is_empty());
        out
    }
}

/// The pieces of [`Pass::Thousands`].
fn thousands(text: &str) -> Vec<Range<usize>> {
    let mut out = Vec::new();
    let mut from = 0;
    let mut run = Vec::new(); // The end offset of each digit of the run.
    for (at, c) in text.char_indices().chain([(text.len(), ' ')]) {
        if c.is_numeric() {
            run.push(at + c.len_utf8());
            continue;
        }
        for (i, &end) in run.iter().enumerate() {
            if (run.len() - 1 - i) % 3 == 0 {
                out.push(from..end);
                from = end;
            }
        }
        run.clear();
    }
    out
}
