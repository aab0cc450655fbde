//! Special tokens: their spellings are found in a text before the rest of the text is encoded.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use ahash::AHashMap;

/// A special token.
pub(super) struct Special {
    pub id: u32,
    pub text: String,
    /// User-defined tokens are found in any text, other special tokens only where control tokens
    /// are allowed.
    pub user: bool,
    /// The token also removes the blanks before it.
    pub lstrip: bool,
    /// The token also removes the blanks after it.
    pub rstrip: bool,
}

/// A part of a text: a special token, or the text between two of them.
pub(super) enum Part<'t> {
    Text(&'t str),
    Token(u32),
}

/// All special tokens of a vocabulary.
pub(super) struct Specials {
    /// Sorted by length, the longest first.
    list: Vec<Special>,
    /// Indices into `list`.
    by_text: AHashMap<String, usize>,
    /// For each byte, the lengths of the tokens that begin with it.
    lengths: Vec<Vec<usize>>,
}

impl Specials {
    pub fn new(mut list: Vec<Special>) -> Specials {
        list.retain(|s| !s.text.is_empty());
        list.sort_by_key(|s| (std::cmp::Reverse(s.text.len()), s.id));
        let mut lengths = vec![Vec::new(); 256];
        let mut by_text = AHashMap::new();
        for (i, s) in list.iter().enumerate() {
            by_text.entry(s.text.clone()).or_insert(i);
            let lengths: &mut Vec<usize> = &mut lengths[s.text.as_bytes()[0] as usize];
            if !lengths.contains(&s.text.len()) {
                lengths.push(s.text.len());
            }
        }
        Specials { list, by_text, lengths }
    }

    /// Splits a text at its special tokens, as llama.cpp does: longer tokens are placed first,
    /// wherever they stand, and a shorter token that would overlap them is not placed. `allowed`
    /// says whether a token that is not user-defined may stand at a byte range.
    pub fn split<'t>(
        &self,
        text: &'t str,
        allowed: impl Fn(&Range<usize>) -> bool,
    ) -> Vec<Part<'t>> {
        let mut hits = Vec::new();
        for (at, first) in text.bytes().enumerate() {
            for &len in &self.lengths[first as usize] {
                // `get` is `None` where the range would split a character.
                let found = text.get(at..at + len).and_then(|t| self.by_text.get(t));
                hits.extend(found.map(|&i| (i, at)));
            }
        }
        hits.sort_unstable();
        // Placed ranges by their start: the end, and the token. `None` marks removed blanks.
        let mut taken: BTreeMap<usize, (usize, Option<u32>)> = BTreeMap::new();
        for (i, start) in hits {
            let special = &self.list[i];
            let end = start + special.text.len();
            let before = taken.range(..end).next_back().map_or(0, |(_, t)| t.0);
            if before > start || !(special.user || allowed(&(start..end))) {
                continue;
            }
            taken.insert(start, (end, Some(special.id)));
            let after = taken.range(end..).next().map_or(text.len(), |(&s, _)| s);
            if special.rstrip {
                let gap = text[end..after].bytes().take_while(is_space).count();
                if gap > 0 {
                    taken.insert(end, (end + gap, None));
                }
            }
            if special.lstrip {
                let gap = text[before..start].bytes().rev().take_while(is_space).count();
                if gap > 0 {
                    taken.insert(start - gap, (start, None));
                }
            }
        }
        let mut out = Vec::new();
        let mut at = 0;
        for (start, (end, token)) in taken {
            if at < start {
                out.push(Part::Text(&text[at..start]));
            }
            out.extend(token.map(Part::Token));
            at = end;
        }
        if at < text.len() {
            out.push(Part::Text(&text[at..]));
        }
        out
    }

    /// The ids of all special tokens.
    pub fn ids(&self) -> HashSet<u32> {
        self.list.iter().map(|s| s.id).collect()
    }
}

/// C's `isspace`.
fn is_space(b: &u8) -> bool {
    matches!(b, b'\t'..=b'\r' | b' ')
}
