//! A plan file by file: what is new in each file of the checkpoint.

use std::borrow::Cow;
use std::collections::HashMap;

use gguf_rs_lib::format::MetadataValue;

use super::{Added, Patch, Plan};
use crate::checkpoint::{encoded_len, type_name, Shard, Tensor, Value, SPLIT_TENSORS};
use crate::{Error, Result};

/// New content by the name of its tensor.
pub(super) type Patches<'a> = HashMap<&'a str, &'a Patch>;

/// What one file of the new checkpoint is made of.
#[derive(Debug)]
pub(super) struct Part<'a> {
    /// The file of the input.
    pub source: &'a Shard,
    /// New content for tensors of this file.
    pub patches: Patches<'a>,
    /// Tensors to add to this file.
    pub added: &'a [Added],
    /// Metadata to set in this file.
    pub metadata: Vec<(&'a str, Cow<'a, Value>)>,
    /// Metadata keys to leave out of this file.
    pub remove: &'a [String],
}

impl Part<'_> {
    /// Whether the new file is the old one, byte by byte.
    pub fn is_unchanged(&self) -> bool {
        self.patches.is_empty()
            && self.added.is_empty()
            && self.metadata.is_empty()
            && self.remove.is_empty()
    }
}

/// Checks the plan and shares it out: metadata go to the first file, added tensors to the last, so
/// that the order of all tensors is that of an unsplit model.
///
/// # Errors
/// A patch of an unknown tensor or of the wrong size; a tensor that is to be added and is there.
pub(super) fn parts<'a>(plan: &'a Plan<'a>) -> Result<Vec<Part<'a>>> {
    check_added(plan)?;
    let empty = |source| Part {
        source,
        patches: Patches::new(),
        added: &[],
        metadata: Vec::new(),
        remove: &[],
    };
    let mut parts: Vec<Part> = plan.source.shards().iter().map(empty).collect();
    for p in &plan.patches {
        let tensor = plan
            .source
            .tensor(&p.tensor)
            .ok_or_else(|| wrong(plan, &p.tensor, "is not in the file"))?;
        check_patch(plan, tensor, p)?;
        if parts[tensor.file].patches.insert(p.tensor.as_str(), p).is_some() {
            return Err(wrong(plan, &p.tensor, "is patched twice"));
        }
    }
    let metadata = plan.metadata.iter().map(|(key, value)| (key.as_str(), Cow::Borrowed(value)));
    parts[0].metadata.extend(metadata);
    parts[0].remove = &plan.remove;
    if plan.added.is_empty() {
        return Ok(parts);
    }
    let last = parts.len() - 1;
    parts[last].added = &plan.added;
    if last > 0 {
        // llama.cpp reads the number in the first shard; all of them have it.
        let total = (plan.source.tensors().len() + plan.added.len()) as i32;
        for part in &mut parts {
            let value = Value::Scalar(MetadataValue::I32(total));
            part.metadata.push((SPLIT_TENSORS, Cow::Owned(value)));
        }
    }
    Ok(parts)
}

fn check_patch(plan: &Plan, tensor: &Tensor, p: &Patch) -> Result<()> {
    let expected = match p.type_id == tensor.type_id {
        true => tensor.len,
        false => match encoded_len(p.type_id, &tensor.dims) {
            Ok(Some(len)) => len,
            Ok(None) => {
                let what = "can't be re-encoded: the new type is unknown";
                return Err(wrong(plan, &p.tensor, what));
            }
            Err(e) => return Err(wrong(plan, &p.tensor, &e)),
        },
    };
    if p.bytes.len() as u64 != expected {
        let (n, name) = (p.bytes.len(), type_name(p.type_id));
        let what = format!("needs {expected} bytes as {name} and is given {n}");
        return Err(wrong(plan, &p.tensor, &what));
    }
    Ok(())
}

fn check_added(plan: &Plan) -> Result<()> {
    for (i, Added { name, dims, type_id, bytes }) in plan.added.iter().enumerate() {
        if plan.source.tensor(name).is_some() || plan.added[..i].iter().any(|a| a.name == *name) {
            return Err(wrong(plan, name, "is to be added and is there already"));
        }
        if encoded_len(*type_id, dims) != Ok(Some(bytes.len() as u64)) {
            let what = format!("is given {} bytes for the shape {dims:?}", bytes.len());
            return Err(wrong(plan, name, &what));
        }
    }
    Ok(())
}

fn wrong(plan: &Plan, tensor: &str, what: &str) -> Error {
    Error::Model(format!("{}: tensor `{tensor}` {what}", plan.source.path().display()))
}
