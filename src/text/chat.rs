//! From a request to the tokens that the model reads.

use std::ops::Range;

use serde::Serialize;

use super::thinking::left_open;
use super::{ChatTemplate, Thinking, Tokenizer};
use crate::error::{Error, Result};

/// One turn of a chat.
#[derive(Clone, Debug, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// Its text.
    pub content: String,
}

impl Message {
    /// A turn.
    pub fn new(role: &str, content: &str) -> Message {
        Message { role: role.to_string(), content: content.to_string() }
    }
}

/// A rendered chat.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// The rendered text.
    pub text: String,
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Tokens that the template adds after the last user text; the last one decides.
    pub post_instruction: Range<usize>,
}

/// A tokenizer and a template.
pub struct Chat {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The template.
    pub template: ChatTemplate,
    /// A system prompt for every chat.
    pub system: Option<String>,
}

impl Chat {
    /// A single-turn chat.
    pub fn prompt(&self, user: &str) -> Result<Prompt> {
        self.prompt_with(user, self.template.thinking)
    }

    /// A single-turn chat, with thinking on or off.
    pub fn prompt_with(&self, user: &str, thinking: Thinking) -> Result<Prompt> {
        let system = self.system.iter().map(|s| Message::new("system", s));
        self.render(&system.chain([Message::new("user", user)]).collect::<Vec<_>>(), thinking)
    }

    /// Any chat that ends with a user's turn.
    ///
    /// # Errors
    /// The template refuses it, or drops or rewrites a message's text.
    pub fn conversation(&self, messages: &[Message]) -> Result<Prompt> {
        self.render(messages, self.template.thinking)
    }

    fn render(&self, messages: &[Message], thinking: Thinking) -> Result<Prompt> {
        let mut text = self.template.render(messages, true, thinking)?;
        // Where each message's own text lies: special tokens are parsed everywhere else only.
        let mut contents: Vec<Range<usize>> = Vec::new();
        let mut from = 0;
        for m in messages {
            let content = m.content.trim();
            let Some(at) = text[from..].find(content) else {
                if m.role == "system" {
                    continue;
                }
                return Err(Error::Model(format!(
                    "the chat template does not show the {} message {content:?} as it is; use --chat-template",
                    m.role
                )));
            };
            contents.push(from + at..from + at + content.len());
            from += at + content.len();
        }
        let end = contents.last().map_or(text.len(), |c| c.end);
        if let (Thinking::Off, Some((_, close))) = (thinking, left_open(&text[end..])) {
            // The template has no switch, or not this one: an empty block, as those write it that have one.
            text.truncate(text.trim_end().len());
            text += &format!("\n\n{close}\n\n");
        }
        let mut tokens = self.tokenizer.encode_template(&text, &contents);
        if tokens.is_empty() {
            return Err(Error::Model("the chat template renders to nothing; use --chat-template".into()));
        }
        // Tokens from the first one on that begins after the user's text.
        let head = self.tokenizer.encode_template(&text[..end], &contents).len();
        let tail = tokens.len().saturating_sub(head).clamp(1, tokens.len());
        if self.tokenizer.chat_bos() {
            if let Some(bos) = self.tokenizer.bos().filter(|b| tokens.first() != Some(b)) {
                tokens.insert(0, bos);
            }
        }
        let post_instruction = tokens.len() - tail..tokens.len();
        Ok(Prompt { text, tokens, post_instruction })
    }
}
