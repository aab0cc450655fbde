//! `diff`.

use std::collections::BTreeMap;

use refusal_patch::arch::Writer;
use refusal_patch::checkpoint::{sha256_file, sha256_tensors, Checkpoint};
use refusal_patch::edit::fold::achieved_all;
use refusal_patch::encoding::Encoding;
use refusal_patch::evaluate::energy::{
    inputs_of, off_direction, writer_inputs, OffDirection, WriterInputs,
};
use refusal_patch::model::Model;
use refusal_patch::num::norm;
use refusal_patch::output::{other_files, Provenance, TensorEdit};
use refusal_patch::text::{Set, Split};
use refusal_patch::weights::{Matrix, Stack};
use refusal_patch::{Error, Result};
use serde::Serialize;
use serde_json::json;

use super::args::DiffArgs;
use super::progress::Bars;
use super::session::{open, prompts};
use super::table::{cells, percent, table};

/// A tensor that differs.
#[derive(Serialize)]
struct Changed {
    tensor: String,
    encoding: [String; 2],
    /// Strength recorded in AFTER, in units of the gap.
    asked: Option<f64>,
    /// ‖u‖ of the edit recorded in AFTER.
    norm: Option<f64>,
    /// The share of it that the stored weights carry.
    achieved: Option<f64>,
    residue: Option<f64>,
    off_direction_energy: Option<OffDirection>,
    codes_moved: Option<u64>,
    /// Share of elements that are zero, before and after.
    sparsity: Option<(f64, f64)>,
    bytes_changed: u64,
}

pub fn run(args: DiffArgs) -> Result<u8> {
    let (before, after) = (Checkpoint::open(&args.before)?, Checkpoint::open(&args.after)?);
    let bars = Bars::new(args.run.quiet || args.run.json);
    let (a, b) = (sha256_tensors(&before, &bars)?, sha256_tensors(&after, &bars)?);
    let provenance = Provenance::of(&after)?;
    let edits = provenance.as_ref().map_or(&[][..], |p| &p.edits);
    let prompts = prompts(&args.run)?;
    let session = open(&args.before, &args.run);
    let models = [&args.before, &args.after].map(|p| Model::open(p));
    let site = |name: &str| {
        let model = &session.as_ref().ok()?.model;
        let mut writers =
            (0..model.spec.layers).flat_map(|l| model.spec.writers(l).iter().map(move |w| (l, *w)));
        writers.find(|&(l, w)| model.names.is_writer(name, l, w))
    };
    // Of the writer that was looked at last: experts can be many tensors.
    let mut inputs: Option<((usize, Writer), WriterInputs)> = None;
    let harmless = prompts.of(Set::Harmless, Split::Test);
    let mut changed = Vec::new();
    let mut identical = 0usize;
    for (t, hash) in before.tensors().iter().zip(&a) {
        let Some(at) = after.tensors().iter().position(|o| o.name == t.name) else {
            return Err(Error::Model(format!(
                "{}: tensor {} is missing",
                args.after.display(),
                t.name
            )));
        };
        let other = &after.tensors()[at];
        if *hash == b[at] && t.type_id == other.type_id {
            identical += 1;
            continue;
        }
        let (x, y) = (before.bytes(t), after.bytes(other));
        let mut row = Changed {
            tensor: t.name.clone(),
            encoding: [t.type_name(), other.type_name()],
            asked: None,
            norm: None,
            achieved: None,
            residue: None,
            off_direction_energy: None,
            codes_moved: None,
            sparsity: None,
            bytes_changed: if x.len() == y.len() {
                x.iter().zip(y).filter(|(a, b)| a != b).count()
            } else {
                y.len()
            } as u64,
        };
        // Of a packed matrix the tensor of its codes differs.
        let codes = |e: &&TensorEdit| {
            e.tensor == t.name
                || models[0]
                    .as_ref()
                    .is_ok_and(|m| m.code_tensor(&e.tensor).is_ok_and(|c| c == t.name))
        };
        let edit = edits.iter().find(codes);
        let stored = |file, model| edit.and_then(|e| stack(file, model, &e.tensor));
        if let (Some(m), Some(n), Some(e)) =
            (stored(&before, &models[0]), stored(&after, &models[1]), edit)
        {
            let (rows, cols) = m.shape();
            if (e.u.len(), e.v.len()) == (rows, cols * m.len())
                && (m.shape(), m.len()) == (n.shape(), n.len())
            {
                let stored = achieved_all(&m, &n, &e.u, &e.v);
                row.asked = provenance.as_ref().map(|p| f64::from(p.strength));
                row.norm = Some(norm(&e.u));
                row.achieved = Some(stored.gain);
                row.residue = Some(stored.residue);
                row.codes_moved = Some(stored.codes_moved);
                row.sparsity = Some(stored.sparsity());
                if let (Ok(session), Some(at)) = (&session, site(&e.tensor)) {
                    let evaluator = session.evaluator();
                    if inputs.as_ref().is_none_or(|(of, _)| *of != at) {
                        inputs = Some((at, writer_inputs(&evaluator, &harmless, &[at])?));
                    }
                    let parts = session.model.parts(at.0, at.1)?;
                    let part = parts.iter().find(|p| p.tensor == e.tensor);
                    if let (Some(part), Some((_, all))) = (part, &inputs) {
                        let x = inputs_of(all, at.0, at.1, part);
                        row.off_direction_energy =
                            Some(off_direction(evaluator.compute, &m, &n, &e.u, &x)?);
                    }
                }
            }
        }
        changed.push(row);
    }
    let added_tensors: Vec<&str> = after
        .tensors()
        .iter()
        .map(|t| t.name.as_str())
        .filter(|name| before.tensor(name).is_none())
        .collect();
    let (old, new) = (metadata(&before, &bars)?, metadata(&after, &bars)?);
    let added: Vec<&String> = new.keys().filter(|k| !old.contains_key(*k)).collect();
    let removed: Vec<&String> = old.keys().filter(|k| !new.contains_key(*k)).collect();
    let differ: Vec<&String> =
        new.iter().filter(|(k, v)| old.get(*k).is_some_and(|o| o != *v)).map(|(k, _)| k).collect();
    if let Err(e) = &session {
        eprintln!("note: the off-direction change was not measured: {e}");
    }
    if args.run.json {
        super::print_json(json!({
            "identical": identical,
            "changed": changed,
            "added": added_tensors,
            "metadata": { "added": added, "removed": removed, "changed": differ },
        }));
        return Ok(0);
    }
    let mut out = format!("{identical} tensors identical (sha256), {} changed\n", changed.len());
    if !changed.is_empty() {
        let mut rows = vec![cells![
            "tensor",
            "encoding",
            "asked",
            "achieved",
            "residue",
            "off direction",
            "worst row",
            "codes moved",
            "zeros",
            "bytes changed"
        ]];
        let number =
            |x: Option<f64>, digits: usize| x.map_or("-".to_string(), |x| format!("{x:.digits$}"));
        for c in &changed {
            let off = c.off_direction_energy.as_ref();
            rows.push(cells![
                c.tensor,
                if c.encoding[0] == c.encoding[1] {
                    c.encoding[0].clone()
                } else {
                    c.encoding.join(" -> ")
                },
                number(c.asked, 4),
                number(c.achieved, 4),
                number(c.residue, 4),
                off.map_or("-".to_string(), |o| percent(o.overall)),
                off.map_or("-".to_string(), |o| percent(o.worst_row)),
                c.codes_moved.map_or("-".to_string(), |n| n.to_string()),
                c.sparsity.map_or("-".to_string(), |(a, b)| format!(
                    "{} -> {}",
                    percent(a),
                    percent(b)
                )),
                c.bytes_changed
            ]);
        }
        out += &format!("\n{}", table(&rows));
    }
    if !added_tensors.is_empty() {
        out += &format!("\nadded: {}\n", added_tensors.join(", "));
    }
    out += &format!(
        "\nmetadata: {} {} added, {} removed, {} changed\n",
        if after.folder().is_some() { "files" } else { "keys" },
        added.len(),
        removed.len(),
        differ.len()
    );
    super::print(&out);
    Ok(0)
}

/// What a checkpoint holds besides tensors: a GGUF's metadata by key, of a folder the other files
/// by name.
fn metadata(file: &Checkpoint, bars: &Bars) -> Result<BTreeMap<String, String>> {
    match file {
        Checkpoint::Gguf(g) => {
            Ok(g.metadata().iter().map(|e| (e.key.clone(), format!("{:?}", e.value))).collect())
        }
        Checkpoint::Folder(f) => other_files(f)?
            .into_iter()
            .map(|(name, path)| Ok((name, sha256_file(&path, bars)?)))
            .collect(),
    }
}

/// The matrices of a checkpoint's tensor: of a model that can be run in any packing, of another a
/// plain tensor.
fn stack<'a>(file: &'a Checkpoint, model: &'a Result<Model>, name: &str) -> Option<Stack<'a>> {
    if let Ok(model) = model {
        return model.stack(name).ok();
    }
    let t = file.tensor(name)?;
    let (&[cols, rows] | &[cols, rows, _]) = &t.dims[..] else { return None };
    let encoding = Encoding::from_ggml(t.type_id)?.into();
    let all = Matrix { rows: rows as usize, cols: cols as usize, encoding, bytes: file.bytes(t) };
    Some(Stack::new(all, t.dims.get(2).map_or(1, |n| *n as usize)))
}
