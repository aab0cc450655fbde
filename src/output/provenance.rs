//! What a patched checkpoint says about itself: where it comes from, what was done, and the edit in
//! full.

use serde::{Deserialize, Serialize};

use super::folder::RECORD;
use super::{layout::PADDING_KEY, Plan};
use crate::checkpoint::{Checkpoint, Folder, Gguf, Value};
use crate::{Error, Result};

const PREFIX: &str = "refusal_patch.";
const EDIT: &str = "refusal_patch.edit.";
const TAGS: &str = "general.tags";
const TAG: &str = "refusal-patch";

/// The edit of one tensor: W + u·vᵀ was asked for.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct TensorEdit {
    /// The tensor's name.
    pub tensor: String,
    /// Along the output features, with the strength: one value a row.
    pub u: Vec<f32>,
    /// Along the input features.
    pub v: Vec<f32>,
}

/// How a checkpoint was patched: the `refusal_patch.*` metadata of a GGUF, `refusal_patch.json` of
/// a folder.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Provenance {
    /// The version of this program.
    pub version: String,
    /// The SHA-256 of the input, in hex.
    pub source_sha256: String,
    /// The method of the edit.
    pub method: String,
    /// The layers that it touches.
    pub layers: Vec<u32>,
    /// Its strength.
    pub strength: f32,
    /// What was measured on the input, as JSON.
    pub before: String,
    /// What was measured on the output, as JSON.
    pub after: String,
    /// The edit, tensor by tensor.
    pub edits: Vec<TensorEdit>,
}

impl Provenance {
    /// Adds the provenance to a plan, instead of what an earlier patch of the same file left, and
    /// the tag `refusal-patch` to the tags that the file has.
    pub fn apply(&self, plan: &mut Plan) {
        let entries = self.entries();
        let stale = |key: &str| key.starts_with(PREFIX) && !entries.iter().any(|(k, _)| k == key);
        plan.remove
            .extend(plan.source.metadata().iter().map(|e| &e.key).filter(|k| stale(k)).cloned());
        plan.metadata.extend(entries);
        plan.metadata.extend(tags(plan.source));
    }

    /// The entries of the `refusal_patch` namespace.
    fn entries(&self) -> Vec<(String, Value)> {
        let mut entries: Vec<(String, Value)> = [
            ("version", Value::from(self.version.as_str())),
            ("source_sha256", Value::from(self.source_sha256.as_str())),
            ("method", Value::from(self.method.as_str())),
            ("layers", Value::u32s(&self.layers)),
            ("strength", Value::from(self.strength)),
            ("before", Value::from(self.before.as_str())),
            ("after", Value::from(self.after.as_str())),
        ]
        .map(|(key, value)| (format!("{PREFIX}{key}"), value))
        .into();
        for e in &self.edits {
            entries.push((format!("{EDIT}{}.u", e.tensor), Value::f32s(&e.u)));
            entries.push((format!("{EDIT}{}.v", e.tensor), Value::f32s(&e.v)));
        }
        entries
    }

    /// The provenance of either kind of checkpoint; `None` for one that wasn't patched.
    ///
    /// # Errors
    /// A record that is damaged.
    pub fn of(file: &Checkpoint) -> Result<Option<Provenance>> {
        match file {
            Checkpoint::Gguf(g) => Provenance::read(g),
            Checkpoint::Folder(f) => Provenance::read_folder(f),
        }
    }

    fn read_folder(folder: &Folder) -> Result<Option<Provenance>> {
        let Some(value) = folder.json(RECORD)? else { return Ok(None) };
        serde_json::from_value(value).map(Some).map_err(|e| {
            Error::format(
                folder.dir().join(RECORD),
                None,
                format!("the record of the patch is damaged: {e}"),
            )
        })
    }

    /// The record as a folder holds it.
    pub(super) fn to_json(&self) -> Result<String> {
        serde_json::to_string(self)
            .map_err(|e| Error::Model(format!("the record can't be written: {e}")))
    }

    /// The provenance of a file; `None` for one that wasn't patched.
    pub fn read(file: &Gguf) -> Result<Option<Provenance>> {
        // A sidecar of ours has keys of its own.
        let ours = |key: &str| key.starts_with(PREFIX) && key != PADDING_KEY;
        let patched = file.get("refusal_patch.sidecar").is_none()
            && file.metadata().iter().any(|e| ours(&e.key));
        if !patched {
            return Ok(None);
        }
        let text = |key: &str| needed(file, key, Value::as_str).map(str::to_string);
        let mut edits = Vec::new();
        for e in file.metadata() {
            let tensor = e.key.strip_prefix(EDIT).and_then(|k| k.strip_suffix(".u"));
            if let Some(tensor) = tensor {
                edits.push(TensorEdit {
                    tensor: tensor.to_string(),
                    u: needed(file, &format!("edit.{tensor}.u"), Value::to_f32s)?,
                    v: needed(file, &format!("edit.{tensor}.v"), Value::to_f32s)?,
                });
            }
        }
        Ok(Some(Provenance {
            version: text("version")?,
            source_sha256: text("source_sha256")?,
            method: text("method")?,
            layers: needed(file, "layers", Value::to_u32s)?,
            strength: needed(file, "strength", Value::as_f64)? as f32,
            before: text("before")?,
            after: text("after")?,
            edits,
        }))
    }
}

/// A value that a patched file must have, in the right type.
fn needed<'a, T>(file: &'a Gguf, key: &str, convert: impl Fn(&'a Value) -> Option<T>) -> Result<T> {
    let key = format!("{PREFIX}{key}");
    let value = file.get(&key);
    value.and_then(convert).ok_or_else(|| {
        let found = value
            .map_or("is missing".to_string(), |v| format!("has the wrong type, {}", v.type_name()));
        Error::format(
            file.path(),
            None,
            format!("its record of the patch is damaged: `{key}` {found}"),
        )
    })
}

/// The file's tags with this program's added; `None` where nothing is to be changed.
fn tags(source: &Gguf) -> Option<(String, Value)> {
    let mut tags = match source.get(TAGS) {
        None => Vec::new(),
        // Tags of another type are none that this program could add to.
        Some(value) => value.as_strings()?.to_vec(),
    };
    if tags.iter().any(|t| t == TAG.as_bytes()) {
        return None;
    }
    tags.push(TAG.as_bytes().to_vec());
    Some((TAGS.to_string(), Value::Strings(tags)))
}
