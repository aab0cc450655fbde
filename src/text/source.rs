//! Prepares the source of a chat template for the Jinja compiler.

/// The source without a byte order mark, with `\n` for every line end as in Jinja, and without the
/// statement `generation`. That statement is transformers' own: it marks the text that a model is
/// trained on. It becomes `if true`, so that Jinja trims the blanks around it as transformers does.
pub(super) fn normalize(source: &str) -> String {
    let source = source.strip_prefix('\u{feff}').unwrap_or(source);
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    while let Some(at) = rest.find('{') {
        let (text, tag) = rest.split_at(at);
        out += text;
        let len = match tag.as_bytes().get(1) {
            Some(b'#') => tag.find("#}").map_or(tag.len(), |end| end + 2),
            Some(b'{') => length(tag, "}}"),
            Some(b'%') => length(tag, "%}"),
            _ => 1,
        };
        let (tag, after) = tag.split_at(len);
        rest = after;
        match word(tag) {
            Some((start, "generation")) => {
                out += &format!("{}if true{}", &tag[..start], &tag[start + "generation".len()..]);
            }
            Some((start, "endgeneration")) => {
                out += &format!("{}endif{}", &tag[..start], &tag[start + "endgeneration".len()..]);
            }
            Some((_, "raw")) => {
                // A raw block holds no tags.
                let end = raw_end(rest);
                out += tag;
                out += &rest[..end];
                rest = &rest[end..];
            }
            _ => out += tag,
        }
    }
    out + rest
}

/// The length of a tag that ends with `close`, which does not count inside a string. The whole
/// length if nothing closes the tag.
fn length(tag: &str, close: &str) -> usize {
    let bytes = tag.as_bytes();
    let mut at = 2;
    let mut quote = None;
    while at < bytes.len() {
        match (quote, bytes[at]) {
            (Some(_), b'\\') => at += 1,
            (Some(q), b) if q == b => quote = None,
            (None, b @ (b'\'' | b'"')) => quote = Some(b),
            (None, _) if bytes[at..].starts_with(close.as_bytes()) => return at + close.len(),
            _ => {}
        }
        at += 1;
    }
    tag.len()
}

/// The word of a statement that is a single word, and the word's offset in the tag. `None` for
/// other statements and other tags.
fn word(tag: &str) -> Option<(usize, &str)> {
    let inner = tag.strip_prefix("{%")?.strip_suffix("%}")?;
    let trim = ['-', '+'];
    let left = inner.strip_prefix(trim).unwrap_or(inner);
    let left = left.trim_start();
    let start = tag.len() - "%}".len() - left.len();
    let word = left.strip_suffix(trim).unwrap_or(left).trim_end();
    word.bytes().all(|b| b.is_ascii_alphabetic()).then_some((start, word))
}

/// The offset of the `{% endraw %}` that ends a raw block; the end of the text if there is none.
fn raw_end(text: &str) -> usize {
    let trim = ['-', '+'];
    // Looks no further than the word: a search for each tag's end would take the square of the
    // text's length where none has one.
    let is_end = |at: &usize| {
        let inner = &text[*at + "{%".len()..];
        let word = inner.strip_prefix(trim).unwrap_or(inner).trim_start();
        let Some(after) = word.strip_prefix("endraw") else { return false };
        let close = after.trim_start();
        close.strip_prefix(trim).unwrap_or(close).starts_with("%}")
    };
    text.match_indices("{%").map(|(at, _)| at).find(is_end).unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_tags_become_conditions_however_they_are_spelled() {
        for (tags, expected) in [
            ("{% generation %}a{% endgeneration %}", "{% if true %}a{% endif %}"),
            ("{%generation%}a{%endgeneration%}", "{%if true%}a{%endif%}"),
            ("{%- generation -%} a {%- endgeneration -%}", "{%- if true -%} a {%- endif -%}"),
            ("{%-generation+%}a{%+ endgeneration-%}", "{%-if true+%}a{%+ endif-%}"),
            ("{%\n  generation\t%}a{%-  endgeneration\n-%}", "{%\n  if true\t%}a{%-  endif\n-%}"),
        ] {
            assert_eq!(normalize(tags), expected);
        }
    }

    #[test]
    fn other_text_stays_as_it_is() {
        for text in [
            "{# {% generation %} #}",
            "{{ '{% generation %}' }}",
            "{{ \"a\\\"{% generation %}\" }}{ generation }",
            "{% raw %}{% generation %}{% endraw %}",
            "{%- raw -%}{{ '{% generation %}{%- endraw %}{% set generation = 1 %}",
            "{% if generation %}{% endif %}{% unclosed",
            "{",
        ] {
            assert_eq!(normalize(text), text);
        }
        assert_eq!(
            normalize("{% raw %}{%x%}{% endraw %}{% generation %}"),
            "{% raw %}{%x%}{% endraw %}{% if true %}"
        );
    }

    #[test]
    fn line_ends_are_jinjas_and_a_byte_order_mark_is_dropped() {
        assert_eq!(normalize("\u{feff}a\r\n\r\nb\rc\n\u{feff}"), "a\n\nb\nc\n\u{feff}");
    }

    #[test]
    fn a_template_of_tags_that_never_end_is_read_in_no_time() {
        let text = format!("{{% raw %}}{}", "{%".repeat(500_000));
        let begun = std::time::Instant::now();
        assert_eq!(normalize(&text), text);
        assert!(begun.elapsed().as_secs() < 5);
    }
}
