//! Compiles and renders the checkpoint's Jinja chat template.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use minijinja::value::Rest;
use minijinja::{context, filters, Environment, Error as JinjaError, ErrorKind, State, Value};
use minijinja_contrib::pycompat;

use super::date::strftime;
use super::guard::{self, guarded};
use super::source::normalize;
use super::thinking::{BLOCKS, FINAL};
use super::{Message, Thinking};
use crate::error::{Error, Result};

/// Larger templates are none: real ones have up to some thirty thousand bytes.
const LONGEST: usize = 1 << 20;
/// Instructions of a rendering: real templates take some thousand.
const FUEL: u64 = 100_000;
/// Bytes of a rendered chat.
const MOST: usize = 16 << 20;
/// The most that a filter may be told to indent by, to cut into, to pad to.
const WIDEST: i64 = 1000;

/// A compiled template. Templates come with models of strangers: a rendering has limits for its
/// instructions, its text, its time and its memory.
pub struct ChatTemplate {
    env: Arc<Environment<'static>>,
    /// A rendering went beyond its time or memory, and may go on in its thread.
    overran: AtomicBool,
    bos: String,
    eos: String,
    /// Whether the template mentions `enable_thinking` or a tag of a thinking block.
    pub can_think: bool,
    /// Whether the template's messages have a channel, as those of gpt-oss.
    pub has_channels: bool,
    /// Whether chats are rendered with thinking on, unless a call says otherwise.
    pub thinking: Thinking,
}

impl ChatTemplate {
    /// Compiles a template. `bos` and `eos` are the spellings of the begin and end tokens.
    ///
    /// # Errors
    /// A syntax error of Jinja, with its line.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<ChatTemplate> {
        if source.len() > LONGEST {
            return Err(Error::Limit(format!(
                "the chat template has {} bytes, {LONGEST} is the most; use `chat_template` FILE",
                source.len()
            )));
        }
        let mut env = Environment::new();
        env.set_fuel(Some(FUEL));
        env.set_trim_blocks(true);
        env.set_lstrip_blocks(true);
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
        bound_filters(&mut env);
        env.add_template_owned("chat", normalize(source)).map_err(|e| {
            Error::Model(format!(
                "the chat template can't be read: {e:#}; use `chat_template` FILE"
            ))
        })?;
        Ok(ChatTemplate {
            env: Arc::new(env),
            overran: AtomicBool::new(false),
            bos: bos.into(),
            eos: eos.into(),
            can_think: source.contains("enable_thinking")
                || BLOCKS
                    .iter()
                    .any(|(open, close)| source.contains(open) || source.contains(close)),
            has_channels: source.contains(FINAL),
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
        let what = "the chat template";
        if self.overran.load(Ordering::Relaxed) {
            return Err(Error::Limit(format!("{what} went beyond its limits before")));
        }
        let context = context! {
            messages => messages,
            add_generation_prompt => add_generation_prompt,
            bos_token => self.bos,
            eos_token => self.eos,
            // Qwen3, SmolLM3, GLM; Granite and DeepSeek.
            enable_thinking => thinking == Thinking::On,
            thinking => thinking == Thinking::On,
        };
        let env = Arc::clone(&self.env);
        let rendered = guarded(what, guard::TEMPLATE, move || render(&env, context));
        self.overran.fetch_or(rendered.is_err(), Ordering::Relaxed);
        rendered.and_then(|text| text.map_err(Error::Model)).map_err(|e| match e {
            Error::Limit(why) => Error::Limit(format!("{why}; use `chat_template` FILE")),
            other => other,
        })
    }
}

/// Filters that would take a number's word for how much to allocate, and texts that pad.
fn bound_filters(env: &mut Environment) {
    let filters = [
        ("batch", Value::from_function(filters::batch)),
        ("format", Value::from_function(filters::format)),
        ("indent", Value::from_function(filters::indent)),
        ("slice", Value::from_function(filters::slice)),
    ];
    for (name, filter) in filters {
        env.add_filter(name, move |state: &State, args: Rest<Value>| {
            let named = args.iter().filter(|v| v.is_kwargs());
            let named: Vec<Value> = named
                .flat_map(|v| v.try_iter().into_iter().flatten().map(|key| v.get_item(&key)))
                .collect::<Result<_, _>>()?;
            args.iter().chain(&named).try_for_each(|v| match name {
                "format" => v.as_str().map_or(Ok(()), narrow),
                _ => v.as_i64().map_or(Ok(()), |n| if n > WIDEST { Err(wide()) } else { Ok(()) }),
            })?;
            filter.call(state, &args)
        });
    }
    env.set_unknown_method_callback(|state, value, method, args| {
        if let ("format", Some(text)) = (method, value.as_str()) {
            narrow(text)?;
        }
        pycompat::unknown_method_callback(state, value, method, args)
    });
}

/// That a format's widths and precisions are numbers of three digits at most.
fn narrow(format: &str) -> Result<(), JinjaError> {
    let digits = |run: &str| run.len() > 3 && run.bytes().all(|b| b.is_ascii_digit());
    match format.split(|c: char| !c.is_ascii_digit()).any(digits) {
        true => Err(wide()),
        false => Ok(()),
    }
}

fn wide() -> JinjaError {
    let what = format!("a filter is told a width or a count over {WIDEST}");
    JinjaError::new(ErrorKind::InvalidOperation, what)
}

/// Renders, and says why not.
fn render(env: &Environment, context: Value) -> Result<String, String> {
    let mut text = Limited(Vec::new());
    let template = env.get_template("chat");
    let rendered = template.and_then(|t| t.render_captured_to(context, &mut text).map(drop));
    rendered.map_err(|e| {
        let why = match e.kind() {
            ErrorKind::OutOfFuel => format!("it takes more than {FUEL} instructions"),
            ErrorKind::WriteFailure => format!("it writes more than {MOST} bytes"),
            _ => e.detail().unwrap_or("it failed").to_string(),
        };
        format!("the chat template refuses this chat: {why} ({})", e.kind())
    })?;
    String::from_utf8(text.0).map_err(|e| e.to_string())
}

/// Text with a limit.
struct Limited(Vec<u8>);

impl io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MOST {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
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
    fn what_gemma_4s_template_is_made_of_renders_as_in_jinja() {
        // Macros that call themselves, namespaces, maps in order, ranges that count down, methods
        // of texts and maps.
        let source = r#"{%- macro show(x) -%}{%- if x is string -%}'{{ x }}'
            {%- elif x is boolean -%}{{ 'yes' if x else 'no' }}
            {%- elif x is mapping -%}{
            {%- for key, value in x | dictsort -%}{{ key }}:{{ show(value) }}
            {%- if not loop.last %},{% endif %}{%- endfor -%}}
            {%- elif x is sequence -%}{%- for y in x -%}{{ show(y) }};{%- endfor -%}
            {%- else -%}{{ x }}{%- endif -%}{%- endmacro -%}
            {%- macro answer(text) -%}{%- set ns = namespace(all='') -%}
            {%- for part in text.split('<channel|>') -%}{%- if '<|channel>' in part -%}
            {%- set ns.all = ns.all + part.split('<|channel>')[0] -%}
            {%- else -%}{%- set ns.all = ns.all + part -%}{%- endif -%}{%- endfor -%}
            {{- ns.all | trim -}}{%- endmacro -%}
            {{- show({'b': [1, 'x'], 'a': {'c': true}}) }}|
            {{- answer('<|channel>thought
<channel|> so be it ') }}|
            {%- for i in range(2, -1, -1) -%}{{ i }}{%- endfor -%}|
            {{- messages[0].get('tool_calls') or messages[0]['content'] | upper }}|
            {%- if not enable_thinking | default(false) -%}plain{%- endif -%}"#;
        assert_eq!(render(source).unwrap(), "{a:{c:yes},b:1;'x';}|so be it|210|HI|plain");
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

    #[test]
    fn a_template_has_limits_for_what_it_takes() {
        let doubled = "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = ";
        for (source, why) in [
            (
                "{% for i in range(1000) %}{% for j in range(1000) %}x{% endfor %}{% endfor %}"
                    .into(),
                "instructions",
            ),
            ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}".into(), "recursion"),
            ("{{ ('a' * 10000000) ~ ('a' * 10000000) }}".into(), "bytes"),
            (format!("{doubled}n.s ~ n.s %}}{{% endfor %}}"), "256 MB"),
            ("{{ messages | string | indent(1000000000000) }}".into(), "width"),
            ("{{ messages | string | indent(width=1000000000000) }}".into(), "width"),
            ("{{ [1] | batch(1000000000000) | list }}".into(), "count"),
            ("{{ [1] | slice(1000000000000) | list }}".into(), "count"),
            ("{{ '%1000000000000d' | format(1) }}".into(), "width"),
            ("{{ '%.70000f' | format(1.5) }}".into(), "width"),
            ("{{ '{:1000000000000}'.format(1) }}".into(), "width"),
            ("a".repeat(LONGEST + 1), "1048576 is the most"),
        ] {
            let error = render(&source).unwrap_err().to_string();
            let start = &source[..source.len().min(80)];
            assert!(error.contains(why), "{start}: {error}");
        }
    }

    #[test]
    fn values_deep_inside_each_other_are_dropped_and_written_all_the_same() {
        let nest = "{% set n = namespace(s=[]) %}{% for i in range(12000) %}\
                    {% set n.s = [n.s] %}{% endfor %}";
        assert_eq!(render(nest).unwrap(), "");
        for shown in ["{{ n.s }}", "{{ n.s | tojson }}", "{{ n.s == [n.s] }}"] {
            let _ = render(&format!("{nest}{shown}"));
        }
    }

    #[test]
    fn filters_with_limits_do_what_they_did() {
        assert_eq!(render("{{ 'a\nb' | indent(2) }}").unwrap(), "a\n  b");
        assert_eq!(render("{{ 'a\nb' | indent(width=2, first=true) }}").unwrap(), "  a\n  b");
        assert_eq!(render("{{ [1, 2, 3] | batch(2) | list }}").unwrap(), "[[1, 2], [3]]");
        assert_eq!(render("{{ '%3d %s' | format(1, 2026) }}").unwrap(), "  1 2026");
        assert_eq!(render("{{ '{:>3}'.format(1) }}").unwrap(), "  1");
    }
}
