//! Byte-pair encoding, `tokenizer.ggml.model` = `gpt2` or `gemma4`.

use ahash::AHashMap;

use super::merge::merge;
use super::pre::{Pre, Spelling};
use super::split::Splitter;
use super::vocab::Vocab;

/// Splits text into words and merges the characters of each word.
pub(super) struct Bpe {
    splitter: Splitter,
    /// The rank of each merge, spelled as in the file: `left right`. A merge whose result is no
    /// token is kept, since a later merge may make a token of the result.
    ranks: AHashMap<Vec<u8>, u32>,
    ignore_merges: bool,
    spelling: Spelling,
    alphabet: Alphabet,
}

impl Bpe {
    pub fn new(pre: &Pre, merges: &[Vec<u8>]) -> tokenizers::Result<Bpe> {
        let mut ranks = AHashMap::with_capacity(merges.len());
        for (merge, rank) in merges.iter().zip(0..) {
            ranks.entry(merge.clone()).or_insert(rank);
        }
        let splitter = Splitter::new(pre)?;
        let alphabet = Alphabet::new();
        Ok(Bpe {
            splitter,
            ranks,
            ignore_merges: pre.ignore_merges,
            spelling: pre.spelling,
            alphabet,
        })
    }

    pub fn encode(&self, vocab: &Vocab, text: &str, out: &mut Vec<u32>) {
        if self.spelling == Spelling::Bytes {
            let mut spelled = String::new();
            for word in self.splitter.split(text) {
                spelled.clear();
                spelled.extend(word.bytes().map(|b| self.alphabet.chars[b as usize]));
                self.word(vocab, &spelled, out);
            }
        } else {
            for word in self.splitter.split(&text.replace(' ', "\u{2581}")) {
                self.word(vocab, word, out);
            }
        }
    }

    fn word(&self, vocab: &Vocab, word: &str, out: &mut Vec<u32>) {
        let whole = self.ignore_merges
            || self.spelling == Spelling::RawNewlines && word.bytes().all(|b| b == b'\n');
        if let Some(id) = vocab.id(word).filter(|_| whole) {
            out.push(id);
            return;
        }
        let mut key = Vec::new();
        let spans = merge(word, |left, right| {
            key.clear();
            key.extend_from_slice(word[left].as_bytes());
            key.push(b' ');
            key.extend_from_slice(word[right].as_bytes());
            self.ranks.get(key.as_slice()).copied()
        });
        for span in spans {
            let text = &word[span];
            match vocab.id(text) {
                Some(id) => out.push(id),
                // The merges ended in text that is no token. Its bytes are, so no text is lost.
                None if self.spelling == Spelling::Bytes => {
                    out.extend(text.chars().filter_map(|c| vocab.id(c.encode_utf8(&mut [0; 4]))));
                }
                None => out.extend(text.bytes().filter_map(|b| vocab.byte(b))),
            }
        }
    }

    /// Appends the bytes of an ordinary token's text.
    pub fn decode(&self, token: &[u8], out: &mut Vec<u8>) {
        match (self.spelling, std::str::from_utf8(token)) {
            (Spelling::Bytes, Ok(text)) => {
                for c in text.chars() {
                    match self.alphabet.byte(c) {
                        Some(b) => out.push(b),
                        None => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
                    }
                }
            }
            (_, Ok(text)) => out.extend_from_slice(text.replace('\u{2581}', " ").as_bytes()),
            (_, Err(_)) => out.extend_from_slice(token),
        }
    }
}

/// GPT-2's printable character for each byte.
struct Alphabet {
    chars: [char; 256],
    bytes: Vec<Option<u8>>,
}

impl Alphabet {
    fn new() -> Alphabet {
        let mut spare = (256u32..).filter_map(char::from_u32);
        let chars = std::array::from_fn(|b| match b as u8 {
            b @ (33..=126 | 161..=172 | 174..=255) => char::from(b),
            _ => spare.next().unwrap_or_default(),
        });
        let mut bytes = vec![None; 512];
        for (c, b) in chars.iter().zip(0..=u8::MAX) {
            bytes[*c as usize] = Some(b);
        }
        Alphabet { chars, bytes }
    }

    fn byte(&self, c: char) -> Option<u8> {
        self.bytes.get(c as usize).copied().flatten()
    }
}
