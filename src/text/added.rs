//! Tokens that a `tokenizer.json` lacks and a file beside it defines. transformers adds them when
//! it loads a folder.

use std::ffi::OsStr;
use std::path::Path;

use serde_json::Value;
use tokenizers::AddedToken;

use super::hub::spelled;
use crate::checkpoint::read_json;
use crate::error::{Error, Result};

/// Keys of special tokens in `tokenizer_config.json` and `special_tokens_map.json`.
const NAMED: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
/// Keys of lists of further special tokens.
const LISTS: [&str; 2] = ["additional_special_tokens", "extra_special_tokens"];

/// A token that a file beside the `tokenizer.json` names.
pub(super) struct Added {
    token: AddedToken,
    /// The id and the file that gives it, if a file gives one.
    id: Option<(u32, &'static str)>,
}

/// The tokens that the files beside a `tokenizer.json` name, in the order in which transformers
/// adds them: first those of `added_tokens_decoder` in `tokenizer_config.json`, or else of
/// `added_tokens.json`, then the special tokens.
///
/// # Errors
/// A file that can't be read, or a malformed token.
pub(super) fn beside(tokenizer: &Path) -> Result<Vec<Added>> {
    // The files beside a tokenizer of another name may belong to another model.
    let own = tokenizer.file_name() == Some(OsStr::new("tokenizer.json"));
    let read = |name: &str| {
        let path = tokenizer.with_file_name(name);
        match own && path.exists() {
            true => read_json(&path),
            false => Ok(Value::Null),
        }
    };
    let (config, map) = (read("tokenizer_config.json")?, read("special_tokens_map.json")?);
    let mut specials: Vec<AddedToken> = Vec::new();
    for source in [&config, &map] {
        let named = NAMED.iter().map(|n| &source[n]);
        let listed = LISTS.iter().flat_map(|n| members(&source[n]));
        for token in named.chain(listed).filter_map(|t| described(t, true)) {
            if !specials.iter().any(|s| s.content == token.content) {
                specials.push(token);
            }
        }
    }
    let mut out = Vec::new();
    let wrong =
        |name: &str, what: String| Error::format(tokenizer.with_file_name(name), None, what);
    if let Value::Object(decoder) = &config["added_tokens_decoder"] {
        let file = "tokenizer_config.json";
        for (id, token) in decoder {
            let special = token["special"] == true;
            let (Ok(n), Some(token)) = (id.parse::<u32>(), described(token, special)) else {
                let what = format!("`added_tokens_decoder` has {id:?}: {token}");
                return Err(wrong(
                    file,
                    format!("{what}; expected an id and a token with its `content`"),
                ));
            };
            out.push(Added { token, id: Some((n, file)) });
        }
    } else if let Value::Object(encoder) = read("added_tokens.json")? {
        let file = "added_tokens.json";
        for (text, id) in &encoder {
            let Some(n) = id.as_u64().and_then(|n| u32::try_from(n).ok()) else {
                return Err(wrong(
                    file,
                    format!("{text:?} has the id {id}; expected a whole number"),
                ));
            };
            let special = specials.iter().any(|s| s.content == *text);
            out.push(Added { token: AddedToken::from(text.clone(), special), id: Some((n, file)) });
        }
    }
    out.sort_by_key(|a| a.id.map(|(n, _)| n));
    out.extend(specials.into_iter().map(|token| Added { token, id: None }));
    Ok(out)
}

/// The members of a list, or the values of an object.
fn members(value: &Value) -> Vec<&Value> {
    match value {
        Value::Array(list) => list.iter().collect(),
        Value::Object(object) => object.values().collect(),
        _ => Vec::new(),
    }
}

/// A token that is given as a string, or as an object with its `content` and its matching flags.
fn described(token: &Value, special: bool) -> Option<AddedToken> {
    let text = spelled(token).filter(|t| !t.is_empty())?;
    let flag = |name: &str, default: bool| token[name].as_bool().unwrap_or(default);
    let plain = AddedToken::from(text, special);
    let normalized = flag("normalized", plain.normalized);
    Some(
        plain
            .single_word(flag("single_word", false))
            .lstrip(flag("lstrip", false))
            .rstrip(flag("rstrip", false))
            .normalized(normalized),
    )
}

/// Adds the tokens that the tokenizer lacks.
///
/// # Errors
/// `Unsupported` if a token would get another id than its file gives. It would get the wrong id in
/// transformers as well.
pub(super) fn add(inner: &mut tokenizers::Tokenizer, more: &[Added], path: &Path) -> Result<()> {
    for Added { token, id } in more {
        let known = inner.get_added_tokens_decoder().values().any(|t| t.content == token.content);
        if known {
            continue;
        }
        let added = inner.add_tokens([token.clone()]);
        added.map_err(|e| {
            Error::format(path, None, format!("can't add {:?}: {e}", token.content))
        })?;
        let found = inner.token_to_id(&token.content);
        if let Some((id, file)) = id.filter(|(id, _)| found != Some(*id)) {
            let text = &token.content;
            let found = found.map_or("none".to_string(), |n| n.to_string());
            return Err(Error::unsupported(
                format!(
                    "{}: lacks the token {text:?}, which has the id {id} by {file} and would get \
                     {found} as the next one",
                    path.display()
                ),
                "save the tokenizer anew \
                 (AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)), \
                 or use `tokenizer`",
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::Tokenizer;
    use super::*;

    /// The tokenizer of a folder that holds a tokenizer.json of three tokens and these files.
    fn open(files: &[(&str, Value)]) -> Result<Tokenizer> {
        let dir = tempfile::tempdir().unwrap();
        let own = json!({
            "version": "1.0",
            "truncation": { "direction": "Right", "max_length": 2, "strategy": "LongestFirst",
                            "stride": 0 },
            "padding": { "strategy": { "Fixed": 8 }, "direction": "Left", "pad_to_multiple_of": 4,
                         "pad_id": 2, "pad_type_id": 0, "pad_token": "<pad>" },
            "added_tokens": [{ "id": 2, "content": "<pad>", "special": true, "single_word": false,
                               "lstrip": false, "rstrip": false, "normalized": false }],
            "model": { "type": "BPE", "vocab": { "a": 0, "<": 1 }, "merges": [] },
        });
        for (name, value) in [("tokenizer.json", own)].iter().chain(files) {
            std::fs::write(dir.path().join(name), value.to_string()).unwrap();
        }
        Tokenizer::plain_json(&dir.path().join("tokenizer.json"))
    }

    #[test]
    fn padding_and_truncation_of_the_file_are_no_part_of_a_text() {
        let t = open(&[]).unwrap();
        assert_eq!(t.encode("aaa<pad>a", true), [0, 0, 0, 2, 0]);
        assert_eq!(t.encode("aaaaa", false), [0; 5]);
    }

    #[test]
    fn tokens_that_only_the_other_files_know_are_added_with_their_ids() {
        let token = |text: &str, special: bool| json!({ "content": text, "special": special, "lstrip": false });
        let decoder =
            json!({ "4": token("<e>", true), "3": token("<u>", true), "2": token("<pad>", true) });
        for files in [
            vec![(
                "tokenizer_config.json",
                json!({ "added_tokens_decoder": decoder, "eos_token": "<e>" }),
            )],
            vec![
                ("tokenizer_config.json", json!({ "eos_token": { "content": "<e>" } })),
                ("added_tokens.json", json!({ "<e>": 4, "<u>": 3 })),
                (
                    "special_tokens_map.json",
                    json!({ "additional_special_tokens": ["<u>", "<pad>"] }),
                ),
            ],
        ] {
            let t = open(&files).unwrap();
            assert_eq!(t.encode("<u>a<e>", true), [3, 0, 4]);
            assert!(!t.encode("<u>", false).contains(&3), "no structure in a user's text");
            assert_eq!(t.decode(&[3, 0, 4]), "a");
        }
        // Tokens without an id get the next ids, as in transformers. Tokens that are not special
        // are found in any text.
        let t = open(&[
            ("added_tokens.json", json!({ "<tool>": 3 })),
            ("special_tokens_map.json", json!({ "bos_token": "<s>" })),
        ])
        .unwrap();
        assert_eq!(t.encode("<s>a", true), [4, 0]);
        assert_eq!(t.encode("a<tool>", false), [0, 3]);
    }

    #[test]
    fn a_token_whose_id_does_not_fit_is_an_error_that_names_it() {
        for (name, value, words) in [
            ("added_tokens.json", json!({ "<u>": 7 }), ["\"<u>\"", "id 7", "get 3"]),
            ("added_tokens.json", json!({ "<u>": "x" }), ["\"<u>\"", "\"x\"", "whole number"]),
            (
                "tokenizer_config.json",
                json!({ "added_tokens_decoder": { "3": { "special": true } } }),
                ["added_tokens_decoder", "\"3\"", "`content`"],
            ),
        ] {
            let error = open(&[(name, value)]).err().unwrap().to_string();
            assert!(words.iter().all(|w| error.contains(w)) && error.contains(name), "{error}");
        }
    }
}
