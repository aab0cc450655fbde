//! SentencePiece as in llama.cpp, `tokenizer.ggml.model` = `llama`: of all merges that give a
//! token, the one whose token has the highest score comes first.

use super::merge::merge;
use super::vocab::Vocab;

/// Merges characters by the scores of tokens.
pub(super) struct Spm {
    /// The score of each token.
    scores: Vec<f32>,
    /// Whether a blank goes before the start of a text and before text after a special token.
    pub add_space_prefix: bool,
    /// The token for a byte that has no token of its own.
    unknown: Option<u32>,
}

impl Spm {
    pub fn new(scores: Vec<f32>, add_space_prefix: bool, unknown: Option<u32>) -> Spm {
        Spm { scores, add_space_prefix, unknown }
    }

    pub fn encode(&self, vocab: &Vocab, text: &str, out: &mut Vec<u32>) {
        let prefix = if self.add_space_prefix { " " } else { "" };
        let text = format!("{prefix}{text}").replace(' ', "\u{2581}");
        let spans = merge(&text, |left, right| {
            let id = vocab.id(&text[left.start..right.end])?;
            Some(best_first(self.scores.get(id as usize).copied().unwrap_or(0.0)))
        });
        for span in spans {
            let text = &text[span];
            match vocab.id(text) {
                Some(id) => out.push(id),
                None => out.extend(text.bytes().filter_map(|b| vocab.byte(b).or(self.unknown))),
            }
        }
    }

    /// Appends the bytes of an ordinary token's text.
    pub fn decode(&self, token: &[u8], out: &mut Vec<u8>) {
        match std::str::from_utf8(token) {
            Ok(text) => out.extend_from_slice(text.replace('\u{2581}', " ").as_bytes()),
            Err(_) => out.extend_from_slice(token),
        }
    }
}

/// An integer that orders scores from the highest to the lowest.
fn best_first(score: f32) -> i32 {
    // Adding zero turns −0 into +0, so that both compare equal.
    let bits = (score + 0.0).to_bits() as i32;
    !(bits ^ (((bits >> 31) as u32) >> 1) as i32)
}
