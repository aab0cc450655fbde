//! Thinking blocks: what some models write before their answer, and how chats are rendered to have
//! it or not.

use serde::Serialize;

/// Thinking blocks, as they open and close.
pub const BLOCKS: [(&str, &str); 6] = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel|>analysis", "<|channel|>final<|message|>"),
];

/// Whether chats are rendered so that a model which can think does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Thinking {
    /// The template's switch is off, and a block that it opens all the same is closed again.
    #[default]
    Off,
    /// The template's switch is on.
    On,
}

/// The block that a prompt leaves open at its end, as it opens and closes.
pub fn left_open(prompt: &str) -> Option<(&'static str, &'static str)> {
    let prompt = prompt.trim_end();
    BLOCKS.into_iter().find(|(open, _)| prompt.ends_with(open))
}

/// How the thinking block closes that an answer begins with.
pub fn begun(answer: &str) -> Option<&'static str> {
    let answer = answer.trim_start();
    BLOCKS.into_iter().find(|(open, _)| answer.starts_with(open)).map(|(_, close)| close)
}

/// Whether an answer begins with a thinking block.
pub fn begins(answer: &str) -> bool {
    begun(answer).is_some()
}

/// Whether a token's text is a tag of a block.
pub fn is_tag(token: &str) -> bool {
    BLOCKS.iter().any(|(open, close)| token == *open || token == *close)
}

/// What follows the thinking block; `None` while the model still thinks. Templates may open the
/// block in the prompt.
pub fn behind(answer: &str) -> Option<&str> {
    let close = |(_, close): &(&str, &str)| answer.rfind(close).map(|at| at + close.len());
    let said = BLOCKS.iter().filter_map(close).max().map_or(answer, |at| &answer[at..]);
    (!begins(said)).then_some(said)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_follows_the_last_block_is_the_answer() {
        for (open, close) in BLOCKS {
            assert_eq!(behind(&format!("{open}a{close}b")), Some("b"), "{open}");
            assert_eq!(behind(&format!("a{close}b")), Some("b"), "opened in the prompt: {open}");
            assert_eq!(behind(&format!("{open}a{close}\n{open}b{close}c")), Some("c"), "{open}");
            assert_eq!(behind(&format!(" {open}a")), None, "{open}");
            assert_eq!(behind(&format!("{open}a{close} {open}b")), None, "{open}");
            assert!(left_open(&format!("user: hi\n{open}\n")).is_some(), "{open}");
            assert!(left_open(&format!("{open}{close}")).is_none(), "{open}");
        }
        assert_eq!(behind("a < b"), Some("a < b"));
    }
}
