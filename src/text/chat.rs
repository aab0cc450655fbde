//! Renders and tokenizes a chat: from a request to the tokens that the model reads.

use std::ops::Range;

use serde::Serialize;

use super::thinking::{left_open, skip};
use super::{ChatTemplate, Thinking, Tokenizer};
use crate::error::{Error, Result};

/// One turn of a chat.
#[derive(Clone, Debug, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// The text of the turn.
    pub content: String,
}

impl Message {
    /// A turn of a role.
    pub fn new(role: &str, content: &str) -> Message {
        Message { role: role.to_string(), content: content.to_string() }
    }
}

/// A rendered chat.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// The rendered text.
    pub text: String,
    /// The token ids of the text, `bos` included.
    pub tokens: Vec<u32>,
    /// Post-instruction tokens: those that the template adds after the last user text. The last
    /// one is the deciding position.
    pub post_instruction: Range<usize>,
}

/// The tokenizer and the chat template of a model.
pub struct Chat {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The template.
    pub template: ChatTemplate,
    /// The system prompt of every single-turn chat, if any.
    pub system: Option<String>,
}

impl Chat {
    /// A single-turn chat, with thinking on or off as `template.thinking` says.
    ///
    /// # Errors
    /// As of [`Chat::conversation`].
    pub fn prompt(&self, user: &str) -> Result<Prompt> {
        self.prompt_with(user, self.template.thinking)
    }

    /// A single-turn chat, with thinking on or off.
    ///
    /// # Errors
    /// As of [`Chat::conversation`].
    pub fn prompt_with(&self, user: &str, thinking: Thinking) -> Result<Prompt> {
        let system = self.system.iter().map(|s| Message::new("system", s));
        self.render(&system.chain([Message::new("user", user)]).collect::<Vec<_>>(), thinking)
    }

    /// A chat that ends with a user's turn.
    ///
    /// # Errors
    /// The template raises an error, or drops or rewrites the text of a message.
    pub fn conversation(&self, messages: &[Message]) -> Result<Prompt> {
        self.render(messages, self.template.thinking)
    }

    fn render(&self, messages: &[Message], thinking: Thinking) -> Result<Prompt> {
        let mut text = self.template.render(messages, true, thinking)?;
        // Control tokens are parsed only outside of the messages' own texts.
        let contents = match self.find_by_marks(messages, thinking, &text) {
            Some(contents) => contents,
            None => find_from_end(messages, &text)?,
        };
        let end = contents.last().map_or(text.len(), |c| c.end);
        if let (Thinking::Off, Some((_, close))) = (thinking, left_open(&text[end..])) {
            // The template has none of the known switches. Close the block, empty, as templates
            // with a switch do.
            text.truncate(text.trim_end().len());
            text += &format!("\n\n{close}\n\n");
        }
        if thinking == Thinking::Off && self.template.has_channels {
            text += skip(&text);
        }
        let mut tokens = self.tokenizer.encode_template(&text, &contents);
        if let Some(why) = self.tokenizer.fault() {
            return Err(Error::Model(format!(
                "the tokenizer has no tokens for a chat: {why}; use `tokenizer`"
            )));
        }
        if tokens.is_empty() {
            return Err(Error::Model(
                "the chat template renders to nothing; use `chat_template`".into(),
            ));
        }
        // The tokens after those of the text up to the end of the last user text.
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

    /// The byte range of each message's text in a rendered chat. A second rendering has a unique
    /// mark in place of each text, since the template's own words may contain the text as well.
    /// `None` if the template does more with a text than show or trim it.
    fn find_by_marks(
        &self,
        messages: &[Message],
        thinking: Thinking,
        text: &str,
    ) -> Option<Vec<Range<usize>>> {
        let mark = |i: usize| format!("message{i}of{}x{}", messages.len(), text.len());
        let marked = messages.iter().enumerate().map(|(i, m)| Message::new(&m.role, &mark(i)));
        let marked = self.template.render(&marked.collect::<Vec<_>>(), true, thinking).ok()?;
        let (mut rest, mut shown) = (marked.as_str(), Vec::new());
        for (i, m) in messages.iter().enumerate() {
            match rest.split_once(&mark(i)) {
                Some((own, after)) => {
                    shown.push((own, m.content.as_str()));
                    rest = after;
                }
                // Templates may have no place for a system prompt.
                None if m.role == "system" => {}
                None => return None,
            }
        }
        if (0..messages.len()).any(|i| rest.contains(&mark(i))) {
            return None;
        }
        let mut contents = Vec::new();
        let mut at = 0;
        for (i, &(own, content)) in shown.iter().enumerate() {
            at += text[at..].strip_prefix(own).map(|_| own.len())?;
            let follows = shown.get(i + 1).map_or(rest, |&(own, _)| own);
            // The template may trim the text on either side or on both.
            let forms = [content, content.trim_end(), content.trim_start(), content.trim()];
            let last = i + 1 == shown.len();
            let fits = |form: &&str| {
                text[at..].strip_prefix(*form).is_some_and(|t| match last {
                    true => t == follows,
                    false => t.starts_with(follows),
                })
            };
            let form = forms.into_iter().find(fits)?;
            contents.push(at..at + form.len());
            at += form.len();
        }
        Some(contents)
    }
}

/// The byte range of each message's text, searched from the end, since templates begin with texts
/// of their own.
///
/// # Errors
/// `Model` if the rendered chat lacks the text of a message other than the system prompt.
fn find_from_end(messages: &[Message], text: &str) -> Result<Vec<Range<usize>>> {
    let mut contents: Vec<Range<usize>> = Vec::new();
    let mut to = text.len();
    for m in messages.iter().rev() {
        let content = m.content.trim();
        let Some(at) = text[..to].rfind(content) else {
            if m.role == "system" {
                continue;
            }
            return Err(Error::Model(format!(
                "the chat template does not show the {} message {content:?} as it is; \
                 use `chat_template`",
                m.role
            )));
        };
        contents.push(at..at + content.len());
        to = at;
    }
    contents.reverse();
    Ok(contents)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A chat whose tokens don't matter.
    fn chat(template: &str) -> Chat {
        let file = tempfile::NamedTempFile::new().unwrap();
        let json = r#"{"version": "1.0",
            "model": {"type": "BPE", "vocab": {"a": 0, "<": 1}, "merges": []}}"#;
        std::fs::write(file.path(), json).unwrap();
        let tokenizer = Tokenizer::plain_json(file.path()).unwrap();
        Chat { tokenizer, template: ChatTemplate::new(template, "", "").unwrap(), system: None }
    }

    /// The text before the request, the request, and the text after it.
    fn parts(template: &str, request: &str) -> [String; 3] {
        let chat = chat(template);
        let messages = [Message::new("user", request)];
        let text = chat.template.render(&messages, true, Thinking::Off).unwrap();
        let marked = chat.find_by_marks(&messages, Thinking::Off, &text);
        let range = marked.unwrap_or_else(|| find_from_end(&messages, &text).unwrap())[0].clone();
        [&text[..range.start], &text[range.clone()], &text[range.end..]].map(str::to_string)
    }

    #[test]
    fn a_request_is_found_though_the_template_holds_its_words_itself() {
        let template = "You are a helpful assistant.\n\
                        {% for m in messages %}user: {{ m.content }}<e>{% endfor %}assistant:";
        for request in ["assistant", "a", "user", "e", "You are", "<e>assistant:"] {
            let [before, own, after] = parts(template, request);
            assert_eq!(before, "You are a helpful assistant.\nuser: ");
            assert_eq!((own.as_str(), after.as_str()), (request, "<e>assistant:"));
        }
    }

    #[test]
    fn a_request_is_found_trimmed_or_as_it_is() {
        let plain = "U:{% for m in messages %} {{ m.content }} {% endfor %}A:";
        assert_eq!(parts(plain, " a\n"), ["U: ", " a\n", " A:"]);
        assert_eq!(parts(&plain.replace("content", "content | trim"), " a\n"), ["U: ", "a", " A:"]);
        assert_eq!(
            parts(&plain.replace("content", "content.rstrip()"), " a\n"),
            ["U: ", " a", " A:"]
        );
        // Shown twice: the last place counts.
        let twice = "{% for m in messages %}{{ m.content }}, I say {{ m.content }}{% endfor %}. A:";
        assert_eq!(parts(twice, "a"), ["a, I say ", "a", ". A:"]);
    }

    #[test]
    fn a_template_that_rewrites_the_request_is_an_error() {
        let chat = chat("{% for m in messages %}{{ m.content | upper }}{% endfor %}");
        let error = chat.prompt("how so").unwrap_err().to_string();
        assert!(
            error.contains("user message \"how so\"") && error.contains("`chat_template`"),
            "{error}"
        );
    }

    #[test]
    fn without_thinking_an_answer_begins_in_the_final_channel() {
        let template = "<|start|>user<|message|>{{ messages[0].content }}<|end|>\
                        {% if false %}<|channel|>final<|message|>{% endif %}<|start|>assistant";
        let chat = chat(template);
        let of = |thinking| chat.prompt_with("a", thinking).unwrap().text;
        let asked = "<|start|>user<|message|>a<|end|><|start|>assistant";
        assert_eq!(of(Thinking::On), asked);
        assert_eq!(of(Thinking::Off), format!("{asked}<|channel|>final<|message|>"));
    }
}
