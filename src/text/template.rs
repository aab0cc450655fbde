//! The checkpoint's Jinja chat template.

use minijinja::{context, Environment, Error as JinjaError, ErrorKind};

use super::thinking::BLOCKS;
use super::{Message, Thinking};
use crate::error::{Error, Result};

/// A compiled template.
pub struct ChatTemplate {
    env: Environment<'static>,
    bos: String,
    eos: String,
    /// Whether it knows of thinking blocks.
    pub can_think: bool,
    /// Whether it is rendered with them.
    pub thinking: Thinking,
}

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    /// Jinja's own, with its line.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<ChatTemplate> {
        let mut env = Environment::new();
        env.set_trim_blocks(true);
        env.set_lstrip_blocks(true);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_function("raise_exception", |message: String| -> Result<String, JinjaError> {
            Err(JinjaError::new(ErrorKind::InvalidOperation, message))
        });
        env.add_function("strftime_now", |format: String| -> String {
            // A pinned date, so that results do not change overnight.
            let names =
                [("%Y", "2026"), ("%m", "01"), ("%d", "01"), ("%b", "Jan"), ("%B", "January"), ("%y", "26")];
            names.iter().fold(format, |f, (from, to)| f.replace(from, to))
        });
        // Hugging Face's filter does not escape for HTML.
        env.add_filter("tojson", |value: minijinja::Value| -> Result<String, JinjaError> {
            serde_json::to_string(&value)
                .map_err(|e| JinjaError::new(ErrorKind::InvalidOperation, e.to_string()))
        });
        let plain = source
            .replace("{% generation %}", "")
            .replace("{% endgeneration %}", "")
            .replace("{%- generation %}", "")
            .replace("{%- endgeneration %}", "")
            .replace("{%- generation -%}", "")
            .replace("{%- endgeneration -%}", "");
        env.add_template_owned("chat", plain).map_err(|e| {
            Error::Model(format!("the chat template can't be read: {e:#}; use --chat-template FILE"))
        })?;
        Ok(ChatTemplate {
            env,
            bos: bos.into(),
            eos: eos.into(),
            can_think: source.contains("enable_thinking")
                || BLOCKS.iter().any(|(open, close)| source.contains(open) || source.contains(close)),
            thinking: Thinking::Off,
        })
    }

    /// Renders a chat.
    ///
    /// # Errors
    /// What the template raises.
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
                // Qwen3, SmolLM3, GLM; Granite and DeepSeek.
                enable_thinking => thinking == Thinking::On,
                thinking => thinking == Thinking::On,
            })
            .map_err(render)
    }
}
