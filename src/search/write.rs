//! Writes the chosen edit in the form that was asked for, opens the written file, and measures it.

use std::path::Path;

use super::baseline::Baseline;
use super::candidates::Candidate;
use super::outcome::{LayerScore, Patched, Trial};
use super::trial::Finalist;
use super::{Scan, LEAST_GAIN};
use crate::checkpoint::{sha256_checkpoint, Checkpoint, Gguf, Tensor};
use crate::direction::Direction;
use crate::edit::Edit;
use crate::error::{Error, Result};
use crate::evaluate::stats::SIGNIFICANT;
use crate::evaluate::{Change, Evaluator, Rate, Scores, Unedited};
use crate::model::{Model, Replacement};
use crate::output::{
    load_command, stage, stage_folder, unpatched, Added, Emit, Kind, Patch, Plan, Provenance,
    Sidecar, Staged, TensorEdit,
};
use crate::pair::Pair;
use crate::text::{BySet, Split};

impl Baseline<'_> {
    /// Writes a finalist to `out` (`None`: a dry run) and measures the written file on test
    /// prompts. Where the file is not the model of the trial (an adapter, a bias), it may break a
    /// limit: then nothing is kept, and the reason comes back as text.
    pub fn finish(
        &self,
        finalist: Finalist,
        candidates: &[Candidate],
        trials: &[Trial],
        (directions, scan): (&[Direction], &Scan),
        out: Option<&Path>,
    ) -> Result<std::result::Result<Patched, String>> {
        let Finalist { index, replaced, tensors, scores: after, p_value, gain, .. } = finalist;
        let source = &self.evaluator.model.file;
        let sha_in = sha256_checkpoint(source, self.evaluator.progress)?;
        let emit = self.settings.emit;
        let mut patched = Patched {
            emit,
            out: None,
            load: None,
            warning: None,
            sha256: Pair::new(sha_in.clone(), String::new()),
            bytes: Pair::new(source.file_len(), 0),
            chosen: candidates[index].clone(),
            candidates: candidates.to_vec(),
            trials: trials.to_vec(),
            // A sidecar touches no tensor.
            tensors: if emit == Emit::Weights { tensors } else { Vec::new() },
            validation: Pair::new(self.own.scores.clone(), after),
            test: None,
            thinking: None,
            reference: self.reference.as_ref().map(|r| r.original()),
            changes: Vec::new(),
            gain,
            p_value,
            layers: directions.iter().map(LayerScore::from).collect(),
            scan: scan.clone(),
            answers: Default::default(),
        };
        let Some(out) = out else { return Ok(Ok(patched)) };
        let (staged, miss) = match emit {
            Emit::Weights => {
                let staged = self.stage(&mut patched, &replaced, sha_in, out)?;
                let written = Model::open(staged.path())?;
                let known = holds(&written, self.evaluator.model, &replaced);
                let written = Evaluator { model: &written, ..*self.evaluator };
                let miss = self.measure(&mut patched, &written, known)?;
                (staged, miss)
            }
            Emit::Lora => self.sidecar(&mut patched, Kind::Lora, sha_in, out)?,
            Emit::ControlVector => self.sidecar(&mut patched, Kind::ControlVector, sha_in, out)?,
        };
        if let Some(miss) = miss {
            return Ok(Err(miss));
        }
        if emit == Emit::ControlVector
            && (patched.gain < LEAST_GAIN || patched.p_value >= SIGNIFICANT)
        {
            patched.warning = Some(format!(
                "no control vector inside the limits restores refusal: the strongest gains {:.1} \
                 points (McNemar p = {:.2})",
                100.0 * patched.gain,
                patched.p_value
            ));
        }
        let written = staged.commit()?;
        patched.out = Some(written.path);
        patched.sha256.after = written.sha256;
        patched.bytes.after = written.bytes;
        Ok(Ok(patched))
    }

    /// Holds the written file to the limits on validation prompts once more, unless its tensors are
    /// `known` from the trial, then measures it on test prompts.
    fn measure(
        &self,
        patched: &mut Patched,
        written: &Evaluator,
        known: bool,
    ) -> Result<Option<String>> {
        let options = self.answer_options();
        let first = patched.chosen.layers.first().copied().unwrap_or(0);
        let work = self.evaluator.compute.work();
        work.end("writing");
        if !known {
            let drafts = self.own.drafts(self.evaluator, &self.validation, first)?;
            let (again, answers) =
                self.own.measure(written, &self.validation, drafts.as_ref(), options)?;
            (patched.gain, patched.p_value) = self.gain(&answers);
            if let Some(broken) = self.broken(&again) {
                return Ok(Some(broken.to_string()));
            }
            if patched.gain < 0.0 {
                return Ok(Some("refusal of harmful prompts fell".into()));
            }
            patched.validation.after = again;
            work.end("the written file on validation prompts");
        }
        let test = self.prompts.split(Split::Test);
        let asked = self.evaluator.ask(&test)?;
        let own = Unedited::take(self.evaluator, self.evaluator.answer(&asked, options)?)?;
        let drafts = own.drafts(self.evaluator, &asked, first)?;
        let (scores, answers) = own.measure(written, &asked, drafts.as_ref(), options)?;
        patched.test = Some(Pair::new(own.scores.clone(), scores));
        if let (Some(r), Some(original)) = (&self.reference, &mut patched.reference) {
            original.test = Some(BySet::over(&r.evaluator.answers(&test, options)?));
        }
        if self.validation.think() {
            let rates = |e: &Evaluator| -> Result<BySet<Rate>> {
                let asked = e.ask_after_thoughts(&test)?;
                Ok(BySet::over(&e.answer(&asked, options)?))
            };
            let thinking = Pair::new(rates(self.evaluator)?, rates(written)?);
            let unfinished = thinking.map(BySet::unfinished);
            if unfinished.after > unfinished.before {
                patched.warning.get_or_insert(format!(
                    "with thinking on OUT ends its turn inside the thought on {} of {} test \
                     prompts, IN on {}",
                    unfinished.after,
                    test.len(),
                    unfinished.before
                ));
            }
            patched.thinking = Some(thinking);
        }
        patched.changes = Change::all(&own.answers, &answers);
        drop(drafts);
        patched.answers = Pair::new(own.answers, answers);
        work.end("test prompts");
        Ok(None)
    }

    fn sidecar(
        &self,
        patched: &mut Patched,
        kind: Kind,
        base_sha256: String,
        out: &Path,
    ) -> Result<(Staged, Option<String>)> {
        let model = self.evaluator.model;
        let sidecar = Sidecar {
            kind,
            architecture: model.spec.arch.clone(),
            base_sha256,
            method: patched.chosen.method.name().to_string(),
            strength: patched.chosen.strength as f32,
            edit: patched.chosen.edit.clone(),
        };
        let staged = sidecar.stage(model, out, self.settings.force)?;
        let read = Sidecar::read(staged.path(), model, self.evaluator.progress)?;
        let miss = self.measure(patched, &self.evaluator.under(&read.edit), false)?;
        patched.load = Some(kind.command(model, out));
        Ok((staged, miss))
    }

    /// Writes the new checkpoint under a temporary name.
    fn stage(
        &self,
        patched: &mut Patched,
        replaced: &[Replacement],
        sha_in: String,
        out: &Path,
    ) -> Result<Staged> {
        let progress = self.evaluator.progress;
        match &self.evaluator.model.file {
            Checkpoint::Gguf(g) => {
                stage(&self.plan(g, patched, replaced, sha_in)?, out, self.settings.force, progress)
            }
            Checkpoint::Folder(f) => {
                let others = unpatched(f)?;
                if !others.is_empty() {
                    patched.warning = Some(format!(
                        "OUT also holds weights that were not patched, as they came: {}",
                        others.join(", ")
                    ));
                }
                patched.load = Some(load_command(f, out));
                let record = self.provenance(patched, sha_in)?;
                stage_folder(
                    f,
                    &patches(self.evaluator.model, replaced),
                    &record,
                    out,
                    self.settings.force,
                    progress,
                )
            }
        }
    }

    /// The new GGUF: folded tensors, or biases that carry a constant.
    fn plan<'g>(
        &self,
        file: &'g Gguf,
        patched: &Patched,
        replaced: &[Replacement],
        sha_in: String,
    ) -> Result<Plan<'g>> {
        let model = self.evaluator.model;
        let mut plan = Plan::new(file);
        plan.patches = patches(self.evaluator.model, replaced);
        for t in patched.chosen.edit.iter().filter(|t| t.v.is_empty()) {
            let name = model.bias_name(t.writer.role(), t.layer);
            let old = model.bias(t.writer.role(), t.layer)?;
            let sum = t.u.iter().enumerate().map(|(i, u)| u + old.as_ref().map_or(0.0, |b| b[i]));
            let bytes: Vec<u8> = sum.flat_map(f32::to_le_bytes).collect();
            match old {
                Some(_) => plan.patches.push(Patch { tensor: name, bytes, type_id: 0 }),
                None => {
                    plan.added.push(Added { name, dims: vec![t.u.len() as u64], type_id: 0, bytes })
                }
            }
        }
        self.provenance(patched, sha_in)?.apply(&mut plan);
        Ok(plan)
    }

    fn provenance(&self, p: &Patched, source_sha256: String) -> Result<Provenance> {
        let json = |s: &Scores| {
            let what = serde_json::json!({ "split": "validation", "scores": s });
            serde_json::to_string(&what).map_err(|e| Error::Model(e.to_string()))
        };
        Ok(Provenance {
            version: env!("CARGO_PKG_VERSION").to_string(),
            source_sha256,
            method: p.chosen.method.name().to_string(),
            layers: p.chosen.layers.iter().map(|&l| l as u32).collect(),
            strength: p.chosen.strength as f32,
            before: json(&p.validation.before)?,
            after: json(&p.validation.after)?,
            edits: tensor_edits(self.evaluator.model, &p.chosen.edit)?,
        })
    }
}

/// Whether a written file holds a trial's tensors, each byte of all of them: then it is the model
/// of the trial.
fn holds(written: &Model, source: &Model, replaced: &[Replacement]) -> bool {
    let (before, after) = (&source.file, &written.file);
    let same = |t: &Tensor| {
        let Some(new) = after.tensor(&t.name) else { return false };
        let (type_id, bytes) = match replaced.iter().find(|r| r.tensor == t.name) {
            Some(r) => (r.encoding.map_or(t.type_id, |e| e.ggml_id()), &r.bytes[..]),
            None => (t.type_id, before.bytes(t)),
        };
        new.dims == t.dims && new.type_id == type_id && after.bytes(new) == bytes
    };
    !replaced.is_empty()
        && after.tensors().len() == before.tensors().len()
        && before.tensors().iter().all(same)
}

fn patches(model: &Model, replaced: &[Replacement]) -> Vec<Patch> {
    let own = |r: &Replacement| model.file.tensor(&r.tensor).map_or(0, |t| t.type_id);
    let patch = |r: &Replacement| Patch {
        tensor: r.tensor.clone(),
        bytes: r.bytes.clone(),
        type_id: r.encoding.map_or_else(|| own(r), |e| e.ggml_id()),
    };
    replaced.iter().map(patch).collect()
}

/// The edit tensor by tensor; a constant lies in biases. Experts without an edit are left out.
fn tensor_edits(model: &Model, edit: &Edit) -> Result<Vec<TensorEdit>> {
    let mut all = Vec::new();
    for t in edit {
        if t.v.is_empty() {
            let tensor = model.bias_name(t.writer.role(), t.layer);
            all.push(TensorEdit { tensor, u: t.u.clone(), v: Vec::new() });
            continue;
        }
        for part in model.parts(t.layer, t.writer)? {
            let v = part.gate(&t.v).to_vec();
            if v.iter().any(|x| *x != 0.0) {
                all.push(TensorEdit { tensor: part.tensor, u: t.u.clone(), v });
            }
        }
    }
    Ok(all)
}
