//! Compiles and renders the checkpoint's Jinja chat template.

use minijinja::{context, Environment, Error as JinjaError, ErrorKind};

use super::date::strftime;
use super::source::normalize;
use super::thinking::BLOCKS;
use super::{Message, Thinking};
use crate::error::{Error, Result};

/// A compiled template.
pub struct ChatTemplate {
    env: Environment<'static>,
    bos: String,
    eos: String,
    /// Whether the template mentions `enable_thinking` or a tag of a thinking block.
    pub can_think: bool,
    /// Whether chats are rendered with thinking on, unless a call says otherwise.
    pub thinking: Thinking,
}

impl ChatTemplate {
    /// Compiles a template. `bos` and `eos` are the spellings of the begin and end tokens.
    ///
    /// # Errors
    /// A syntax error of Jinja, with its line.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<ChatTemplate> {
        let mut env = Environment::new();
        env.set_trim_blocks(true);
        env.set_lstrip_blocks(true);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_function("raise_exception", |message: String| -> Result<String, JinjaError> {
            Err(JinjaError::new(ErrorKind::InvalidOperation, message))
        });
        env.add_function("strftime_now", |format: String| -> Result<String, JinjaError> {
            strftime(&format).map_err(|e| JinjaError::new(ErrorKind::InvalidOperation, e))
        });
        // minijinja's own filter escapes for HTML; that of transformers does not.
        env.add_filter("tojson", |value: minijinja::Value| -> Result<String, JinjaError> {
            serde_json::to_string(&value)
                .map_err(|e| JinjaError::new(ErrorKind::InvalidOperation, e.to_string()))
        });
        env.add_template_owned("chat", normalize(source)).map_err(|e| {
            Error::Model(format!(
                "the chat template can't be read: {e:#}; use --chat-template FILE"
            ))
        })?;
        Ok(ChatTemplate {
            env,
            bos: bos.into(),
            eos: eos.into(),
            can_think: source.contains("enable_thinking")
                || BLOCKS
                    .iter()
                    .any(|(open, close)| source.contains(open) || source.contains(close)),
            thinking: Thinking::Off,
        })
    }

    /// Renders a chat.
    ///
    /// # Errors
    /// An error that the template raises, or that rendering it gives.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        thinking: Thinking,
    ) -> Result<String> {
        let render = |e: JinjaError| {
            let why = e.detail().unwrap_or("it failed").to_string();
            Error::Model(format!("the chat template refuses this chat: {why} ({})", e.kind()))
        };
        let template = self.env.get_template("chat").map_err(render)?;
        template
            .render(context! {
                messages => messages,
                add_generation_prompt => add_generation_prompt,
                bos_token => self.bos,
                eos_token => self.eos,
                // The switch of Qwen3, SmolLM3 and GLM.
                enable_thinking => thinking == Thinking::On,
                // The switch of Granite and DeepSeek.
                thinking => thinking == Thinking::On,
            })
            .map_err(render)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str) -> Result<String> {
        let messages = [Message::new("user", "Hi"), Message::new("assistant", "Yes")];
        ChatTemplate::new(source, "<s>", "</s>")?.render(&messages, false, Thinking::Off)
    }

    #[test]
    fn a_template_with_windows_line_ends_renders_as_with_others() {
        let source = "\u{feff}{% for m in messages %}\n[{{ m.role }}]\n{{ m.content }}\n\n\
                      {% endfor %}\n{{ 'a\\r\\n' }}\n";
        let expected = render(source).unwrap();
        assert_eq!(expected, "[user]\nHi\n\n[assistant]\nYes\n\na\r\n");
        assert_eq!(render(&source.replace('\n', "\r\n")).unwrap(), expected);
        assert_eq!(render(&source.replace('\n', "\r")).unwrap(), expected);
    }

    #[test]
    fn generation_tags_trim_as_jinja_trims() {
        for (open, close, expected) in [
            ("{% generation %}", "{% endgeneration %}", "[Hi]  Yes [Yes]"),
            ("{%- generation -%}", "{%- endgeneration -%}", "[Hi]Yes[Yes]"),
            ("{%generation -%}", "{%- endgeneration%}", "[Hi] Yes[Yes]"),
        ] {
            let source = format!(
                "[{{{{ messages[0].content }}}}] {open} {{{{ messages[1].content }}}} \
                 {close}[{{{{ messages[1].content }}}}]"
            );
            assert_eq!(render(&source).unwrap(), expected, "{open}");
        }
    }

    #[test]
    fn dates_are_pinned_and_a_wrong_format_is_an_error() {
        assert_eq!(render("{{ strftime_now('%d %b %Y') }}").unwrap(), "01 Jan 2026");
        assert_eq!(
            render("{{ strftime_now('%A, %-d %B %Y') }}").unwrap(),
            "Thursday, 1 January 2026"
        );
        let error = render("{{ strftime_now('%d.%N') }}").unwrap_err().to_string();
        assert!(error.contains("`%N`") && error.contains("%d %B %Y"), "{error}");
    }
}
