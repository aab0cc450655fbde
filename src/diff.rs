//! Two checkpoints tensor by tensor: what differs, and how much of a recorded edit the stored
//! weights carry.

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;

use crate::arch::Writer;
use crate::checkpoint::{sha256_file, sha256_tensors, Checkpoint, Tensor};
use crate::edit::fold::achieved_all;
use crate::encoding::Encoding;
use crate::error::{Error, Result};
use crate::evaluate::energy::{
    inputs_of, off_direction, writer_inputs, OffDirection, WriterInputs,
};
use crate::model::Model;
use crate::num::norm;
use crate::output::{other_files, Provenance, TensorEdit};
use crate::pair::Pair;
use crate::progress::Progress;
use crate::session::Session;
use crate::text::{PromptRecord, PromptSet, Set, Split};
use crate::weights::{Matrix, Stack};

/// What differs between two checkpoints.
#[derive(Debug, Serialize)]
pub struct Difference {
    /// Tensors with the same type and bytes.
    pub identical: usize,
    /// Tensors that differ.
    pub changed: Vec<ChangedTensor>,
    /// Tensors that only AFTER has.
    pub added: Vec<String>,
    /// Metadata keys of GGUF files; of folders the other files.
    pub metadata: MetadataChange,
}

/// A tensor that differs.
#[derive(Debug, Serialize)]
pub struct ChangedTensor {
    /// Its name.
    pub tensor: String,
    /// Its type.
    pub encoding: Pair<String>,
    /// Strength recorded in AFTER, in units of the gap.
    pub asked: Option<f64>,
    /// ‖u‖ of the edit recorded in AFTER.
    pub norm: Option<f64>,
    /// The share of the edit that the stored weights carry.
    pub achieved: Option<f64>,
    /// ‖ûᵀΔ − asked‖ / ‖asked‖.
    pub residue: Option<f64>,
    /// What the fold moved off the edit's direction, where the model can be run.
    pub off_direction_energy: Option<OffDirection>,
    /// Elements that differ.
    pub codes_moved: Option<u64>,
    /// Share of elements that are zero.
    pub sparsity: Option<Pair<f64>>,
    /// Bytes that differ.
    pub bytes_changed: u64,
}

/// Names of metadata keys, or of files.
#[derive(Debug, Serialize)]
pub struct MetadataChange {
    /// Only AFTER has these.
    pub added: Vec<String>,
    /// Only BEFORE has these.
    pub removed: Vec<String>,
    /// Both have these, with other values.
    pub changed: Vec<String>,
}

/// Compares two checkpoints. `session`: BEFORE, where it can be run: only then the change off the
/// direction is measured, on the harmless test prompts of `prompts`.
///
/// # Errors
/// A tensor of BEFORE that AFTER lacks; what reading or the forward pass says.
pub fn diff(
    before: &Checkpoint,
    after: &Checkpoint,
    session: Option<&Session>,
    prompts: &PromptSet,
    progress: &dyn Progress,
) -> Result<Difference> {
    let (a, b) = (sha256_tensors(before, progress)?, sha256_tensors(after, progress)?);
    let provenance = Provenance::of(after)?;
    let edits = provenance.as_ref().map_or(&[][..], |p| &p.edits);
    let models = Pair::new(before, after).map(|c| Model::open(c.path()).ok());
    let harmless = prompts.of(Set::Harmless, Split::Test);
    let mut off = OffDirections { session, harmless: &harmless, inputs: None };
    let places: HashMap<&str, usize> =
        after.tensors().iter().enumerate().map(|(i, t)| (t.name.as_str(), i)).collect();
    let mut changed = Vec::new();
    let mut identical = 0usize;
    for (t, hash) in before.tensors().iter().zip(&a) {
        let Some(&at) = places.get(t.name.as_str()) else {
            return Err(Error::Model(format!(
                "{}: tensor {} is missing",
                after.path().display(),
                t.name
            )));
        };
        let other = &after.tensors()[at];
        if *hash == b[at] && t.type_id == other.type_id {
            identical += 1;
            continue;
        }
        let mut row = ChangedTensor::new(before, t, after, other);
        // Of a packed matrix the tensor of its codes differs.
        let codes = |e: &&TensorEdit| {
            let packed = |m: &Model| m.code_tensor(&e.tensor).is_ok_and(|c| c == t.name);
            e.tensor == t.name || models.before.as_ref().is_some_and(packed)
        };
        let edit = edits.iter().find(codes);
        let stored = |file, model| edit.and_then(|e| stack(file, model, &e.tensor));
        if let (Some(m), Some(n), Some(e)) =
            (stored(before, models.before.as_ref()), stored(after, models.after.as_ref()), edit)
        {
            let (rows, cols) = m.shape();
            let fits = (e.u.len(), e.v.len()) == (rows, cols * m.len())
                && (m.shape(), m.len()) == (n.shape(), n.len());
            if fits {
                row.asked = provenance.as_ref().map(|p| f64::from(p.strength));
                row.fill(e, &m, &n);
                row.off_direction_energy = off.of(e, &m, &n)?;
            }
        }
        changed.push(row);
    }
    let added_tensors: Vec<String> = after
        .tensors()
        .iter()
        .map(|t| t.name.clone())
        .filter(|name| before.tensor(name).is_none())
        .collect();
    let (old, new) = (metadata(before, progress)?, metadata(after, progress)?);
    let added = new.keys().filter(|k| !old.contains_key(*k)).cloned().collect();
    let removed = old.keys().filter(|k| !new.contains_key(*k)).cloned().collect();
    let is_changed = |(k, v): &(&String, &String)| old.get(*k).is_some_and(|o| o != *v);
    let changed_keys = new.iter().filter(is_changed).map(|(k, _)| k.clone()).collect();
    Ok(Difference {
        identical,
        changed,
        added: added_tensors,
        metadata: MetadataChange { added, removed, changed: changed_keys },
    })
}

impl ChangedTensor {
    /// What the bytes alone say.
    fn new(before: &Checkpoint, t: &Tensor, after: &Checkpoint, other: &Tensor) -> ChangedTensor {
        let (x, y) = (before.bytes(t), after.bytes(other));
        let bytes_changed = match x.len() == y.len() {
            true => x.iter().zip(y).filter(|(a, b)| a != b).count(),
            false => y.len(),
        };
        ChangedTensor {
            tensor: t.name.clone(),
            encoding: Pair::new(t.type_name(), other.type_name()),
            asked: None,
            norm: None,
            achieved: None,
            residue: None,
            off_direction_energy: None,
            codes_moved: None,
            sparsity: None,
            bytes_changed: bytes_changed as u64,
        }
    }

    /// How much of a recorded edit the stored weights carry.
    fn fill(&mut self, edit: &TensorEdit, before: &Stack, after: &Stack) {
        let stored = achieved_all(before, after, &edit.u, &edit.v);
        self.norm = Some(norm(&edit.u));
        self.achieved = Some(stored.gain);
        self.residue = Some(stored.residue);
        self.codes_moved = Some(stored.codes_moved);
        self.sparsity = Some(stored.sparsity());
    }
}

/// Measures what edits do off their direction, where BEFORE can be run.
struct OffDirections<'a> {
    session: Option<&'a Session>,
    harmless: &'a [&'a PromptRecord],
    /// Of the writer that was looked at last: experts can be many tensors.
    inputs: Option<((usize, Writer), WriterInputs)>,
}

impl OffDirections<'_> {
    fn of(
        &mut self,
        edit: &TensorEdit,
        before: &Stack,
        after: &Stack,
    ) -> Result<Option<OffDirection>> {
        let Some(session) = self.session else { return Ok(None) };
        let model = &session.model;
        let mut writers =
            (0..model.spec.layers).flat_map(|l| model.spec.writers(l).iter().map(move |w| (l, *w)));
        let Some(at) = writers.find(|&(l, w)| model.names.is_writer(&edit.tensor, l, w)) else {
            return Ok(None);
        };
        let evaluator = session.evaluator();
        if self.inputs.as_ref().is_none_or(|(of, _)| *of != at) {
            self.inputs = Some((at, writer_inputs(&evaluator, self.harmless, &[at])?));
        }
        let parts = model.parts(at.0, at.1)?;
        let part = parts.iter().find(|p| p.tensor == edit.tensor);
        let (Some(part), Some((_, all))) = (part, &self.inputs) else { return Ok(None) };
        let x = inputs_of(all, at.0, at.1, part);
        off_direction(evaluator.compute, before, after, &edit.u, &x).map(Some)
    }
}

/// What a checkpoint holds besides tensors: a GGUF's metadata by key, of a folder the other files
/// by name.
fn metadata(file: &Checkpoint, progress: &dyn Progress) -> Result<BTreeMap<String, String>> {
    match file {
        Checkpoint::Gguf(g) => {
            Ok(g.metadata().iter().map(|e| (e.key.clone(), format!("{:?}", e.value))).collect())
        }
        Checkpoint::Folder(f) => other_files(f)?
            .into_iter()
            .map(|(name, path)| Ok((name, sha256_file(&path, progress)?)))
            .collect(),
    }
}

/// The matrices of a checkpoint's tensor: of a model that can be run in any packing, of another a
/// plain tensor.
fn stack<'a>(file: &'a Checkpoint, model: Option<&'a Model>, name: &str) -> Option<Stack<'a>> {
    if let Some(model) = model {
        return model.stack(name).ok();
    }
    let t = file.tensor(name)?;
    let (&[cols, rows] | &[cols, rows, _]) = &t.dims[..] else { return None };
    let encoding = Encoding::from_ggml(t.type_id)?.into();
    let all = Matrix { rows: rows as usize, cols: cols as usize, encoding, bytes: file.bytes(t) };
    Some(Stack::new(all, t.dims.get(2).map_or(1, |n| *n as usize)))
}
