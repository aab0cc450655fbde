//! Thinking blocks, which some models write before their answer, and the switch that renders chats
//! with thinking or without.

use serde::Serialize;

/// The tags that open and close thinking blocks.
pub const BLOCKS: [(&str, &str); 7] = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel|>analysis", "<|channel|>final<|message|>"),
    // Gemma 4; after the opening tag it writes `thought`.
    ("<|channel>", "<channel|>"),
];

/// Whether chats are rendered with thinking on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Thinking {
    /// The template's switch is off. A block that the template opens all the same is closed, empty.
    #[default]
    Off,
    /// The template's switch is on, and a block that the template opens stays open.
    On,
}

/// The tags (open, close) of the block that a prompt opens at its very end.
pub fn left_open(prompt: &str) -> Option<(&'static str, &'static str)> {
    let prompt = prompt.trim_end();
    BLOCKS.into_iter().find(|(open, _)| prompt.ends_with(open))
}

/// The closing tag of the thinking block that begins the answer; `None` if no block begins it.
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

/// The text after the last closing tag, or the whole answer if it has none. The opening tag may
/// stand in the prompt. `None` if a thinking block begins there: the model still thinks.
pub fn after(answer: &str) -> Option<&str> {
    let close = |(_, close): &(&str, &str)| answer.rfind(close).map(|at| at + close.len());
    let said = BLOCKS.iter().filter_map(close).max().map_or(answer, |at| &answer[at..]);
    (!begins(said)).then_some(said)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_is_the_text_after_the_last_block() {
        for (open, close) in BLOCKS {
            assert_eq!(after(&format!("{open}a{close}b")), Some("b"), "{open}");
            assert_eq!(after(&format!("a{close}b")), Some("b"), "opened in the prompt: {open}");
            assert_eq!(after(&format!("{open}a{close}\n{open}b{close}c")), Some("c"), "{open}");
            assert_eq!(after(&format!(" {open}a")), None, "{open}");
            assert_eq!(after(&format!("{open}a{close} {open}b")), None, "{open}");
            assert!(left_open(&format!("user: hi\n{open}\n")).is_some(), "{open}");
            assert!(left_open(&format!("{open}{close}")).is_none(), "{open}");
        }
        assert_eq!(after("a < b"), Some("a < b"));
    }
}
