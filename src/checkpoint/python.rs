//! Makes the output of Python's `json` module valid JSON.

/// Literals that Python's `json` module writes and JSON doesn't have.
const LITERALS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];

/// Puts [`LITERALS`] into quotes, outside of strings. `None` if the text has none.
pub(super) fn quoted(json: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(json.len() + 16);
    let mut at = 0;
    let mut in_string = false;
    let mut found = false;
    while let Some(&b) = json.get(at) {
        let literal = LITERALS.iter().find(|l| !in_string && json[at..].starts_with(l.as_bytes()));
        if let Some(literal) = literal {
            out.extend(format!("\"{literal}\"").bytes());
            (at, found) = (at + literal.len(), true);
            continue;
        }
        if in_string && b == b'\\' {
            out.extend(&json[at..json.len().min(at + 2)]);
            at += 2;
            continue;
        }
        in_string ^= b == b'"';
        out.push(b);
        at += 1;
    }
    found.then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_become_strings_and_strings_stay() {
        for (json, expected) in [
            (r#"{"a": NaN}"#, Some(r#"{"a": "NaN"}"#)),
            (r#"[0.0, Infinity,-Infinity]"#, Some(r#"[0.0, "Infinity","-Infinity"]"#)),
            (r#"{"NaN \" Infinity": NaN}"#, Some(r#"{"NaN \" Infinity": "NaN"}"#)),
            (r#"{"a": "NaN"}"#, None),
            (r#"{"a\\": null}"#, None),
            (r#""a\"#, None),
        ] {
            let found = quoted(json.as_bytes()).map(|b| String::from_utf8(b).unwrap());
            assert_eq!(found.as_deref(), expected, "{json}");
        }
    }
}
