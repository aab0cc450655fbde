//! An entry of a file of prompts: a string, an object or a row of a table.

use std::fmt;

use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::super::prompts::Split;

/// Columns or fields that hold the prompt; the first that a file has counts. `prompt` is the name
/// in this program's files, XSTest and OR-Bench; `forbidden_prompt` in StrongREJECT; `goal` in
/// AdvBench and JailbreakBench; `behavior` in HarmBench.
pub(super) const PROMPT: [&str; 4] = ["prompt", "forbidden_prompt", "goal", "behavior"];
/// Columns or fields that hold the category: the usual name, HarmBench's, XSTest's.
pub(super) const CATEGORY: [&str; 3] = ["category", "semanticcategory", "type"];
/// Columns or fields that hold the id: the usual name, HarmBench's.
pub(super) const ID: [&str; 2] = ["id", "behaviorid"];
/// HarmBench's column for a text that a behavior is about, and the separator with which HarmBench's
/// own code puts that text before the behavior.
pub(super) const CONTEXT: (&str, &str) = ("contextstring", "\n\n---\n\n");
/// The end of the message about a file without a prompt column or field.
pub(super) const EXPECTED: &str =
    "expected `prompt` (or `forbidden_prompt`, `goal`, `behavior`), and if wanted `id`, \
     `category` and `split` (train, validation or test)";

/// A prompt, with the fields that the file gives.
pub(super) struct Entry {
    pub id: Option<String>,
    pub prompt: String,
    pub category: Option<String>,
    pub split: Option<Split>,
}

impl Entry {
    /// An entry that is only a prompt.
    pub fn text(prompt: &str) -> Entry {
        Entry { id: None, prompt: prompt.to_string(), category: None, split: None }
    }

    /// The entry of an object or a row; the names of its fields are in small letters.
    ///
    /// # Errors
    /// A message: no field holds a prompt, or the prompt is not a string.
    pub fn of(fields: &[(String, Value)]) -> Result<Entry, String> {
        let get = |name: &str| fields.iter().find(|(n, _)| n == name).map(|(_, v)| v);
        let text = |name: &&str| get(name).and_then(as_text);
        let Some((name, value)) = PROMPT.iter().find_map(|name| Some((name, get(name)?))) else {
            let found: Vec<String> = fields.iter().map(|(n, _)| format!("`{n}`")).collect();
            return Err(format!("an object with the fields {}; {EXPECTED}", found.join(", ")));
        };
        let Value::String(prompt) = value else { return Err(wrong_value(name, value, "a string")) };
        let context = text(&CONTEXT.0).filter(|c| *name == "behavior" && !c.trim().is_empty());
        Ok(Entry {
            id: ID.iter().find_map(text),
            prompt: context.map_or(prompt.clone(), |c| format!("{c}{}{prompt}", CONTEXT.1)),
            category: CATEGORY.iter().find_map(text),
            split: get("split").and_then(as_split),
        })
    }
}

/// A string or a number as text; `None` for other values.
fn as_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(n) => Some(n.to_string()),
        _ => None,
    }
}

/// The split that a value names, in any case.
fn as_split(value: &Value) -> Option<Split> {
    let name = value.as_str()?.trim();
    [("train", Split::Train), ("validation", Split::Validation), ("test", Split::Test)]
        .into_iter()
        .find_map(|(n, split)| name.eq_ignore_ascii_case(n).then_some(split))
}

/// Checks the value of a field. `null` counts as no value, except for a prompt.
///
/// # Errors
/// A message that names the field, its value and the expected values.
pub(super) fn check(name: &str, value: &Value) -> Result<(), String> {
    let (fits, expected) = match name {
        "prompt" => (value.is_string(), "a string"),
        "id" | "category" => (as_text(value).is_some(), "a string or a number"),
        "split" => (as_split(value).is_some(), "train, validation or test"),
        _ => return Ok(()),
    };
    match fits || value.is_null() && name != "prompt" {
        true => Ok(()),
        false => Err(wrong_value(name, value, expected)),
    }
}

fn wrong_value(name: &str, value: &Value, expected: &str) -> String {
    let mut found: String = value.to_string();
    if found.chars().count() > 40 {
        found = found.chars().take(40).chain("...".chars()).collect();
    }
    format!("`{name}` is {found}, expected {expected}")
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Entry, D::Error> {
        d.deserialize_any(EntryVisitor)
    }
}

/// Reads an entry, which is a string or an object.
struct EntryVisitor;

impl<'de> Visitor<'de> for EntryVisitor {
    type Value = Entry;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a string, or an object with `prompt`")
    }

    fn visit_str<E>(self, text: &str) -> Result<Entry, E> {
        Ok(Entry::text(text))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entry, A::Error> {
        let mut fields: Vec<(String, Value)> = Vec::new();
        while let Some((name, value)) = map.next_entry::<String, Value>()? {
            let name = name.to_lowercase();
            if fields.iter().any(|(n, _)| *n == name) {
                return Err(A::Error::custom(format!("`{name}` is there twice, expected once")));
            }
            // Checked here, so that the error has the line of this field.
            check(&name, &value).map_err(A::Error::custom)?;
            fields.push((name, value));
        }
        Entry::of(&fields).map_err(A::Error::custom)
    }
}
