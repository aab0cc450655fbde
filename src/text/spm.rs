//! SentencePiece as llama.cpp does it, `tokenizer.ggml.model` = `llama`: characters are merged to
//! the token of the highest score first.

use super::merge::merge;
use super::vocab::Vocab;

/// A score for every token.
pub(super) struct Spm {
    scores: Vec<f32>,
    /// Text at the beginning and after a special token gets a blank in front.
    pub add_space_prefix: bool,
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

    /// Appends the bytes that an ordinary token stands for.
    pub fn decode(&self, token: &[u8], out: &mut Vec<u8>) {
        match std::str::from_utf8(token) {
            Ok(text) => out.extend_from_slice(text.replace('\u{2581}', " ").as_bytes()),
            Err(_) => out.extend_from_slice(token),
        }
    }
}

/// An integer that is the lower, the higher the score is.
fn best_first(score: f32) -> i32 {
    // Adding makes a negative zero a positive one.
    let bits = (score + 0.0).to_bits() as i32;
    !(bits ^ (((bits >> 31) as u32) >> 1) as i32)
}
