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
    ("<|channel|>analysis", FINAL),
    // Gemma 4; after the opening tag it writes `thought`.
    ("<|channel>", "<channel|>"),
];

/// What opens the channel of the answer in gpt-oss' format (harmony).
pub const FINAL: &str = "<|channel|>final<|message|>";
/// The head of a message there, before its channel.
const HEAD: &str = "<|start|>assistant";
/// What ends a message there, but no answer.
const MESSAGE_END: &str = "<|end|>";

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

/// Whether a token's text is a tag of a block, or a part of one.
pub fn is_tag(token: &str) -> bool {
    BLOCKS.iter().any(|(open, close)| token == *open || token == *close)
        || ["<|start|>", "<|channel|>", "<|message|>"].contains(&token)
}

/// What follows a prompt whose template leaves it to the model whether it thinks, so that it
/// doesn't.
pub fn skip(prompt: &str) -> &'static str {
    if prompt.ends_with(HEAD) {
        FINAL
    } else {
        ""
    }
}

/// What closes a block with the tag `close` where a thought was cut off.
pub fn closing(close: &str) -> String {
    match close {
        FINAL => format!("{MESSAGE_END}{HEAD}{FINAL}"),
        _ => format!("\n{close}\n\n"),
    }
}

/// Whether a thought ends with this token, though the tag that closes it is still to come.
pub fn ends(token: &str) -> bool {
    token == MESSAGE_END
}

/// A thought without the head of the message that follows it.
pub fn without_head(thought: &str) -> &str {
    let thought = thought.trim_end();
    thought.strip_suffix(HEAD).map_or(thought, str::trim_end)
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

    #[test]
    fn in_gpt_oss_an_answer_is_the_message_in_the_final_channel() {
        let user = "<|start|>user<|message|>Hi<|end|><|start|>assistant";
        let thought = "<|channel|>analysis<|message|>Easy.";
        let answer = format!("{thought}{}Hi.", closing(begun(thought).unwrap()));
        assert_eq!(
            answer,
            "<|channel|>analysis<|message|>Easy.<|end|>\
             <|start|>assistant<|channel|>final<|message|>Hi."
        );
        assert_eq!((after(&answer), after(thought)), (Some("Hi."), None));
        assert_eq!(after(&format!("{}Hi.", skip(user))), Some("Hi."));
        assert_eq!((skip("<|im_start|>assistant"), skip("assistant")), ("", ""));
        assert_eq!(without_head(&format!("{thought} {HEAD}")), thought);
        assert!(["<|start|>", "<|channel|>", "<|message|>"].iter().all(|t| is_tag(t)));
        assert!(ends("<|end|>") && !ends("<|channel|>"));
    }
}
