//! Special tokens: looked for in text as they are spelled, before anything else.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use ahash::AHashMap;

/// A special token.
pub(super) struct Special {
    pub id: u32,
    pub text: String,
    /// Found in any text; else only where structure is allowed.
    pub user: bool,
    /// Takes the blanks before it along.
    pub lstrip: bool,
    /// Takes the blanks after it along.
    pub rstrip: bool,
}

/// A part of a text.
pub(super) enum Part<'t> {
    Text(&'t str),
    Token(u32),
}

/// All special tokens of a vocabulary.
pub(super) struct Specials {
    /// The longest first.
    list: Vec<Special>,
    by_text: AHashMap<String, usize>,
    /// The lengths of the tokens that begin with a byte.
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

    /// Parts a text as llama.cpp does: longer tokens come first wherever they are, and take their
    /// place from shorter ones. `structure` says whether a token other than a user-defined one may
    /// lie there.
    pub fn part<'t>(
        &self,
        text: &'t str,
        structure: impl Fn(&Range<usize>) -> bool,
    ) -> Vec<Part<'t>> {
        let mut hits = Vec::new();
        for (at, first) in text.bytes().enumerate() {
            for &len in &self.lengths[first as usize] {
                // No text where a character goes on: a token ends with its character.
                let found = text.get(at..at + len).and_then(|t| self.by_text.get(t));
                hits.extend(found.map(|&i| (i, at)));
            }
        }
        hits.sort_unstable();
        // Where each part begins and ends; no token is a gap that a token took along.
        let mut taken: BTreeMap<usize, (usize, Option<u32>)> = BTreeMap::new();
        for (i, start) in hits {
            let special = &self.list[i];
            let end = start + special.text.len();
            let before = taken.range(..end).next_back().map_or(0, |(_, t)| t.0);
            if before > start || !(special.user || structure(&(start..end))) {
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

    /// The tokens themselves.
    pub fn ids(&self) -> HashSet<u32> {
        self.list.iter().map(|s| s.id).collect()
    }
}

/// As C's isspace.
fn is_space(b: &u8) -> bool {
    matches!(b, b'\t'..=b'\r' | b' ')
}
