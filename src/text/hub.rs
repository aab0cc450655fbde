//! The tokenizer and the chat template of a Hugging Face folder, read as transformers reads them.

use std::collections::HashSet;
use std::path::Path;

use serde_json::Value;

use super::tokenizer::Tokenizer;
use crate::checkpoint::Folder;
use crate::error::{Error, Result};

impl Tokenizer {
    /// The tokenizer of a folder's `tokenizer.json`, or of `json` if given. The begin and end
    /// tokens are those that `generation_config.json`, `config.json`, `tokenizer_config.json` and
    /// `special_tokens_map.json` name.
    ///
    /// # Errors
    /// A file that is missing, can't be read or has another format; no token that ends an answer.
    pub fn from_folder(folder: &Folder, json: Option<&Path>) -> Result<Tokenizer> {
        let own = folder.dir().join("tokenizer.json");
        if json.is_none() && !own.exists() {
            let found = if folder.dir().join("tokenizer.model").exists() {
                " (but a tokenizer.model)"
            } else {
                ""
            };
            return Err(Error::unsupported(
                format!("{}: has no tokenizer.json{found}", folder.dir().display()),
                "write one with transformers: \
                 AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER), \
                 or use `tokenizer`",
            ));
        }
        let mut tokenizer = Tokenizer::plain_json(json.unwrap_or(&own))?;
        let config = folder.json("tokenizer_config.json")?.unwrap_or_default();
        let map = folder.json("special_tokens_map.json")?.unwrap_or_default();
        let generation = folder.json("generation_config.json")?.unwrap_or_default();
        let models = [&generation, folder.text_config(), folder.config()];
        let named = |key: &str| [&config, &map].into_iter().find_map(|c| spelled(&c[key]));
        let [bos, eos] = ["bos_token", "eos_token"].map(named);
        let id = |text: &Option<&str>| text.and_then(|t| tokenizer.token_id(t));
        let listed = |key: &str| {
            models.into_iter().map(|c| ids(&c[key])).find(|l| !l.is_empty()).unwrap_or_default()
        };
        let (bos, eos) = (id(&bos), id(&eos));
        let mut ends: HashSet<u32> = listed("eos_token_id").into_iter().collect();
        let first = |key: &str| listed(key).first().copied();
        let (bos, eos) = (bos.or(first("bos_token_id")), eos.or(first("eos_token_id")));
        ends.extend(eos);
        if ends.is_empty() {
            return Err(Error::Model(format!(
                "{}: no file names the token that ends an answer; \
                 expected eos_token_id in generation_config.json or config.json",
                folder.dir().display()
            )));
        }
        tokenizer.set_begin_and_ends(bos, eos, ends);
        Ok(tokenizer)
    }
}

/// The chat template of a folder, from `chat_template.jinja`, `tokenizer_config.json` or
/// `chat_template.json`; `None` if none of these files has a template.
///
/// # Errors
/// A file that can't be read or is not JSON.
pub fn folder_template(folder: &Folder) -> Result<Option<String>> {
    if let Some(text) = folder.text("chat_template.jinja")? {
        return Ok(Some(text));
    }
    for file in ["tokenizer_config.json", "chat_template.json"] {
        let Some(config) = folder.json(file)? else { continue };
        match &config["chat_template"] {
            Value::String(text) => return Ok(Some(text.clone())),
            // Several templates by name: `default` is the one for plain chats.
            Value::Array(list) => {
                let found = list.iter().find(|t| t["name"] == "default").or(list.first());
                if let Some(text) = found.and_then(|t| t["template"].as_str()) {
                    return Ok(Some(text.to_string()));
                }
            }
            _ => {}
        }
    }
    Ok(None)
}

/// The text of a token that is given as a string or as an object with `content`.
pub(super) fn spelled(token: &Value) -> Option<&str> {
    token.as_str().or(token["content"].as_str())
}

/// One token id, or a list of them.
fn ids(value: &Value) -> Vec<u32> {
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(list) => list.iter().filter_map(id).collect(),
        one => id(one).into_iter().collect(),
    }
}
