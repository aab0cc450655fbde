//! The main job: measure, derive, choose, fold, check, write, measure what was written.

use std::path::Path;

use super::candidates::{self, Candidate};
use super::fit::{baseline, Baseline, Scores};
use super::material::Material;
use super::outcome::{LayerScore, Outcome, Patched, TensorReport};
use super::{
    EncodingChoice, Method, Settings, Source, FINALISTS, HEALTHY, LEAST_GAIN, MAX_BORDERLINE, MAX_PERPLEXITY,
    NOISE, SIGNIFICANT, SOUND, TRIES,
};
use crate::checkpoint::sha256_file;
use crate::direction::{derive, Classes, Direction, Sample};
use crate::edit::fold::{achieved, fold, norm, recode};
use crate::encoding::Encoding;
use crate::error::{Error, Result};
use crate::evaluate::{stats, Answer, Evaluator};
use crate::model::{Edit, Matrix, Model, RankOne, Replacement};
use crate::output::{preflight, stage, Patch, Plan, Provenance, TensorEdit};
use crate::text::{PromptRecord, PromptSet, Set, Split};

/// Runs the main job. `out`: where to write, `None` for a dry run.
///
/// # Errors
/// What any step says. Nothing is left at `out` then.
pub fn patch(
    evaluator: &Evaluator,
    prompts: &PromptSet,
    settings: &Settings,
    out: Option<&Path>,
    force: bool,
) -> Result<Outcome> {
    prompts.enough()?;
    if let Some(out) = out {
        preflight(&evaluator.model.file, out, force)?;
    }
    let validation = prompts.split(Split::Validation);
    let max_new = settings.max_new_tokens;
    // Openings are those of the listed refusals and of the model's own, so its answers come first.
    let first = baseline(evaluator, &validation, max_new, &[])?;
    let opening = evaluator.refusal_tokens(&first.answers)?;
    if opening.is_empty() {
        return Err(Error::Model(
            "no token opens a refusal under this tokenizer and template; check --chat-template with inspect --prompt".into(),
        ));
    }
    let base = baseline(evaluator, &validation, max_new, &opening)?;
    let healthy = base.scores.harmful.refusal_rate >= HEALTHY;
    if healthy && settings.strength.is_none() {
        let why = format!(
            "it refuses {:.1} % of the harmful validation prompts; {:.0} % or more counts as healthy",
            100.0 * base.scores.harmful.refusal_rate,
            100.0 * HEALTHY
        );
        return Ok(Outcome::NotNeeded { why, validation: Box::new(base.scores), candidates: Vec::new() });
    }

    let directions = directions(evaluator, prompts, settings)?;
    let picked = pick_layers(&directions, evaluator.model.spec.layers, settings)?;
    let mut candidates = build(evaluator, prompts, &base, settings, &picked)?;
    candidates::score(evaluator, &mut candidates, &validation, &opening)?;
    let order = rank(&candidates, &base, &opening, prompts.borderline_binds, settings);

    let search =
        Search { evaluator, prompts, settings, base: &base, validation: &validation, opening: &opening };
    let mut why = "no candidate keeps the answers to harmless prompts".to_string();
    let mut finalists: Vec<Finalist> = Vec::new();
    let mut dropped: Vec<(usize, f64)> = Vec::new();
    let mut tries = 0;
    for &index in &order {
        let candidate = &candidates[index];
        if finalists.len() == FINALISTS || tries == TRIES {
            break;
        }
        // What was too strong once is not tried stronger, and a family is not tried twice once it has a finalist.
        if dropped.iter().any(|&(f, s)| f == candidate.family && candidate.strength >= s)
            || finalists.iter().any(|f| candidates[f.index].family == candidate.family)
        {
            continue;
        }
        tries += 1;
        match search.try_out(index, candidate)? {
            Ok(finalist) => finalists.push(finalist),
            Err(miss) => {
                dropped.push((candidate.family, candidate.strength));
                why = miss;
            }
        }
    }
    // Differences of a prompt or two are noise: the smallest edit among the best.
    let best = finalists.iter().map(|f| f.gain).fold(f64::NEG_INFINITY, f64::max);
    let size = |f: &Finalist| candidates[f.index].size;
    let chosen =
        finalists.into_iter().filter(|f| f.gain >= best - NOISE).min_by(|a, b| size(a).total_cmp(&size(b)));
    let validation = Box::new(base.scores.clone());
    let Some(f) = chosen else {
        if base.scores.harmful.refusal_rate >= SOUND && settings.strength.is_none() {
            let why = format!("no edit makes it refuse more harmful requests without harm to others ({why})");
            return Ok(Outcome::NotNeeded { why, validation, candidates });
        }
        let candidates = order.iter().map(|&i| candidates[i].clone()).collect();
        return Ok(Outcome::OutOfLimits { why, validation, candidates });
    };
    if settings.strength.is_none() && (f.gain < LEAST_GAIN || f.p_value >= SIGNIFICANT) {
        let why = format!("the best edit gains {:.1} points (McNemar p = {:.2})", 100.0 * f.gain, f.p_value);
        return Ok(Outcome::NotNeeded { why, validation, candidates });
    }
    search.finish(f, candidates, &directions, out, force)
}

/// A candidate whose folded bytes keep the limits on validation prompts.
struct Finalist {
    index: usize,
    replaced: Vec<Replacement>,
    tensors: Vec<TensorReport>,
    scores: Scores,
    /// Share of harmful prompts gained.
    gain: f64,
    p_value: f64,
}

/// The direction of every layer at the deciding position, and of the other positions for the report.
fn directions(evaluator: &Evaluator, prompts: &PromptSet, settings: &Settings) -> Result<Vec<Direction>> {
    let spec = &evaluator.model.spec;
    let classes = |split| -> Result<Classes> {
        Ok(Classes {
            harmful: evaluator.samples(&prompts.of(Set::Harmful, split))?,
            harmless: evaluator.samples(&prompts.of(Set::Harmless, split))?,
        })
    };
    let mut all = derive(
        &evaluator.runner(),
        spec.layers,
        spec.hidden,
        &classes(Split::Train)?,
        &classes(Split::Validation)?,
    )?;
    match &settings.source {
        Source::Own => {}
        Source::Random(seed) => {
            for (i, d) in all.iter_mut().enumerate() {
                d.unit = random_unit(spec.hidden, seed.wrapping_add(i as u64));
            }
        }
        Source::Given(saved) => {
            for (layer, unit, gap) in saved {
                for d in all.iter_mut().filter(|d| d.layer == *layer && d.position == 0) {
                    let along: f64 = d.unit.iter().zip(unit).map(|(a, b)| f64::from(a * b)).sum();
                    if along < 0.0 {
                        return Err(Error::Gate(format!(
                            "the saved direction of layer {layer} points away from refusal in this model (cosine {along:.2}); \
                             this tool only restores refusal"
                        )));
                    }
                    d.unit = unit.clone();
                    d.gap = *gap;
                }
            }
        }
    }
    Ok(all)
}

/// A Gaussian direction (Box–Muller over SplitMix64).
fn random_unit(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) as f64 + 0.5) / (u64::MAX as f64 + 1.0)
    };
    let v: Vec<f32> = (0..n)
        .map(|_| ((-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32)
        .collect();
    let length = norm(&v);
    v.iter().map(|x| (f64::from(*x) / length) as f32).collect()
}

/// Layers to consider: the user's, else those of the first 80 % whose direction separates validation prompts best.
fn pick_layers<'d>(
    directions: &'d [Direction],
    layers: usize,
    settings: &Settings,
) -> Result<Vec<&'d Direction>> {
    let deciding: Vec<&Direction> = directions.iter().filter(|d| d.position == 0).collect();
    if let Some(wanted) = &settings.layers {
        if let Some(bad) = wanted.iter().find(|&&l| l >= layers) {
            return Err(Error::Model(format!(
                "--layers names block {bad}, but the model has blocks 0 to {}",
                layers - 1
            )));
        }
        return Ok(deciding.into_iter().filter(|d| wanted.contains(&d.layer)).collect());
    }
    let first = (layers * 4).div_ceil(5).max(1);
    let mut early: Vec<&Direction> = deciding.into_iter().filter(|d| d.layer < first).collect();
    early.sort_by(|a, b| b.fisher.total_cmp(&a.fisher));
    early.truncate(8);
    Ok(early)
}

fn build(
    evaluator: &Evaluator,
    prompts: &PromptSet,
    base: &Baseline,
    settings: &Settings,
    picked: &[&Direction],
) -> Result<Vec<Candidate>> {
    if settings.method == Method::Amplify {
        let none = Default::default();
        return candidates::build(evaluator, settings.method, picked, &none, &none, settings.strength);
    }
    let layers: Vec<usize> = picked.iter().map(|d| d.layer).collect();
    let train = prompts.split(Split::Train);
    let answers = evaluator.answers(&train, 0, settings.max_new_tokens, &[])?;
    let refusals = |answers: &[Answer]| -> Vec<Vec<u32>> {
        answers
            .iter()
            .filter(|a| a.refused && a.set == Set::Harmful)
            .take(64)
            .map(|a| a.answer.clone())
            .collect()
    };
    let forced = refusals(&answers);
    let forced: Vec<&[u32]> = forced.iter().map(|r| &r[..]).collect();
    let fit = Material::build(evaluator, &train, &answers, &forced)?.inputs(evaluator, &layers)?;
    let validation = prompts.split(Split::Validation);
    let held_out =
        Material::build(evaluator, &validation, &base.answers, &forced)?.inputs(evaluator, &layers)?;
    candidates::build(evaluator, settings.method, picked, &fit, &held_out, settings.strength)
}

/// Admissible candidates, the most promising first: those that reach (nearly) the best refusal with the smallest edit.
fn rank(
    candidates: &[Candidate],
    base: &Baseline,
    opening: &[u32],
    borderline_binds: bool,
    settings: &Settings,
) -> Vec<usize> {
    let one = |n: usize| 1.0 / n.max(1) as f64;
    let s = &base.scores;
    // Candidates are scored by their first token, so IN is too.
    let share = |set: Set| {
        let of: Vec<&Answer> = base.answers.iter().filter(|a| a.set == set).collect();
        let opens = |a: &&&Answer| a.top.first().is_some_and(|t| opening.contains(&t.id));
        of.iter().filter(opens).count() as f64 / of.len().max(1) as f64
    };
    let harmless = share(Set::Harmless) + settings.max_over_refusal + 1e-9;
    let borderline = share(Set::Borderline) + MAX_BORDERLINE + 1e-9;
    let fits = |c: &Candidate| c.harmless <= harmless && (!borderline_binds || c.borderline <= borderline);
    let mut order: Vec<usize> = (0..candidates.len()).filter(|&i| fits(&candidates[i])).collect();
    let best = order.iter().map(|&i| candidates[i].harmful).fold(0.0, f64::max);
    // Close to a cliff: the next stronger edit of the same kind is outside of the limits.
    let edge = |i: usize| {
        let c = &candidates[i];
        candidates
            .iter()
            .filter(|o| o.family == c.family && o.strength > c.strength)
            .min_by(|a, b| a.strength.total_cmp(&b.strength))
            .is_some_and(|next| !fits(next))
    };
    let short = |i: usize| {
        let miss = best - candidates[i].harmful;
        // Differences of a prompt or two are noise.
        (miss - 1.5 * one(s.harmful.n)).max(0.0)
    };
    order.sort_by(|&a, &b| {
        // An edit as large as the weights themselves needs another encoding and moves everything.
        let bulk = |i: usize| 0.1 * (candidates[i].size - 0.3).max(0.0);
        let key = |i: usize| (short(i) + bulk(i) + if edge(i) { 0.02 } else { 0.0 }, candidates[i].size);
        key(a).0.total_cmp(&key(b).0).then(key(a).1.total_cmp(&key(b).1))
    });
    order
}

fn describe(c: &Candidate, s: &Scores) -> String {
    format!(
        "block {} {} strength {:.2}: refusal {:.1} %, harmless {:.1} %, borderline {:.1} %, KL {:.4}, perplexity {:.3}",
        c.layer,
        c.writers.join(" + "),
        c.strength,
        100.0 * s.harmful.refusal_rate,
        100.0 * s.harmless.refusal_rate,
        100.0 * s.borderline.refusal_rate,
        s.kl,
        s.perplexity
    )
}

struct Search<'a> {
    evaluator: &'a Evaluator<'a>,
    prompts: &'a PromptSet,
    settings: &'a Settings,
    base: &'a Baseline,
    validation: &'a [&'a PromptRecord],
    opening: &'a [u32],
}

impl Search<'_> {
    /// Which limit these scores break, if any.
    fn miss(&self, s: &Scores) -> Option<String> {
        let b = &self.base.scores;
        let rise = s.harmless.refusal_rate - b.harmless.refusal_rate;
        if rise > self.settings.max_over_refusal + 1e-9 {
            return Some(format!("over-refusal of harmless prompts rises by {:.1} points", 100.0 * rise));
        }
        let rise = s.borderline.refusal_rate - b.borderline.refusal_rate;
        if self.prompts.borderline_binds && rise > MAX_BORDERLINE + 1e-9 {
            return Some(format!("over-refusal of borderline prompts rises by {:.1} points", 100.0 * rise));
        }
        if s.kl > self.settings.max_kl {
            return Some(format!("KL on harmless answers is {:.4}, above {}", s.kl, self.settings.max_kl));
        }
        for (name, after, before) in
            [("text", s.perplexity, b.perplexity), ("answer", s.answer_perplexity, b.answer_perplexity)]
        {
            if after > before * (1.0 + MAX_PERPLEXITY) {
                return Some(format!("{name} perplexity rises from {before:.3} to {after:.3}"));
            }
        }
        None
    }

    /// Folds a candidate and measures the bytes that would be written; a broken limit is said in words.
    fn try_out(&self, index: usize, candidate: &Candidate) -> Result<std::result::Result<Finalist, String>> {
        let (replaced, tensors) = match self.store(candidate) {
            Ok(stored) => stored,
            Err(Error::Gate(reason)) => return Ok(Err(reason)),
            Err(e) => return Err(e),
        };
        let patched = Model {
            file: crate::checkpoint::Gguf::open(self.evaluator.model.file.path())?,
            spec: self.evaluator.model.spec.clone(),
            replaced,
        };
        let after = Evaluator { model: &patched, ..*self.evaluator };
        let (scores, answers) =
            self.base.measure(&after, self.validation, 0, self.settings.max_new_tokens, self.opening)?;
        let miss = self.miss(&scores);
        let verdict = miss.as_ref().map_or(String::new(), |m| format!(": {m}"));
        self.evaluator.progress.note(&format!("{}{verdict}", describe(candidate, &scores)));
        let (gained, lost) = self.base.changed(&answers);
        let gain = (gained as f64 - lost as f64) / self.base.scores.harmful.n.max(1) as f64;
        if let Some(miss) = miss {
            return Ok(Err(miss));
        }
        if gain < 0.0 {
            return Ok(Err("refusal of harmful prompts fell".into()));
        }
        let replaced = patched.replaced;
        Ok(Ok(Finalist { index, replaced, tensors, scores, gain, p_value: stats::mcnemar(gained, lost) }))
    }

    /// Folds a candidate into the tensors' own encodings, or into wider ones where the grid can't hold it.
    fn store(&self, c: &Candidate) -> Result<(Vec<Replacement>, Vec<TensorReport>)> {
        let mut replacements = Vec::new();
        let mut reports = Vec::new();
        for term in &c.edit {
            let (name, w) = self.evaluator.model.writer(term.layer, term.writer)?;
            let (replacement, report) = self.store_term(name, &w, term)?;
            replacements.push(replacement);
            reports.push(report);
        }
        Ok((replacements, reports))
    }

    fn store_term(&self, name: String, w: &Matrix, term: &RankOne) -> Result<(Replacement, TensorReport)> {
        let ladder: Vec<Encoding> = match self.settings.encoding {
            EncodingChoice::Keep => vec![w.encoding],
            EncodingChoice::Fixed(e) => vec![e],
            EncodingChoice::Auto => [w.encoding, Encoding::Q8_0, Encoding::F16]
                .into_iter()
                .filter(|e| *e == w.encoding || e.bytes_for(w.cols) > w.row_bytes())
                .collect(),
        };
        let mut gain = f64::NAN;
        for encoding in ladder.into_iter().filter(|e| w.cols.is_multiple_of(e.block_len())) {
            let same = encoding == w.encoding;
            let plain = if same { w.bytes.to_vec() } else { recode(w, encoding, None) };
            let mut ways = vec![fold(&Matrix { encoding, bytes: &plain, ..*w }, &term.u, &term.v)?];
            if !same {
                // New scales may be chosen for the edited weights, which a large edit needs.
                ways.push(recode(w, encoding, Some((&term.u, &term.v))));
            }
            for bytes in ways {
                let stored = achieved(w, &Matrix { encoding, bytes: &bytes, ..*w }, &term.u, &term.v);
                gain = stored.gain;
                if (0.98..=1.02).contains(&gain) {
                    let report = TensorReport {
                        tensor: name.clone(),
                        encoding: (w.encoding.name(), encoding.name()),
                        asked: norm(&term.u),
                        achieved: stored.into(),
                    };
                    return Ok((Replacement { tensor: name, encoding, bytes }, report));
                }
            }
        }
        Err(Error::Gate(format!(
            "tensor {name} ({}) holds only {:.1} % of the edit; use --encoding q8_0 or f16",
            w.encoding.name(),
            100.0 * gain
        )))
    }

    fn finish(
        &self,
        finalist: Finalist,
        candidates: Vec<Candidate>,
        directions: &[Direction],
        out: Option<&Path>,
        force: bool,
    ) -> Result<Outcome> {
        let chosen = candidates[finalist.index].clone();
        let Finalist { replaced, tensors, scores: after, p_value, .. } = finalist;
        let source = &self.evaluator.model.file;
        let sha_in = sha256_file(source.path(), self.evaluator.progress)?;
        let mut patched = Patched {
            out: None,
            sha256: (sha_in.clone(), String::new()),
            bytes: (source.file_len(), 0),
            chosen,
            candidates,
            tensors,
            validation: (self.base.scores.clone(), after),
            test: None,
            p_value,
            layers: directions.iter().map(LayerScore::from).collect(),
            answers: Default::default(),
        };
        let Some(out) = out else { return Ok(Outcome::Patched(Box::new(patched))) };
        let mut plan = Plan::new(source);
        plan.patches = replaced
            .iter()
            .map(|r| Patch {
                tensor: r.tensor.clone(),
                bytes: r.bytes.clone(),
                type_id: r.encoding.ggml_id(),
            })
            .collect();
        provenance(&patched, &self.edit_of(&patched.chosen), sha_in, self.settings)?.apply(&mut plan);
        let staged = stage(&plan, out, force, self.evaluator.progress)?;
        // What the report says is measured on the file as it was written.
        {
            let written = Model::open(staged.path())?;
            let test = self.prompts.split(Split::Test);
            let max_new = self.settings.max_new_tokens;
            let base = baseline(self.evaluator, &test, max_new, self.opening)?;
            let evaluator = Evaluator { model: &written, ..*self.evaluator };
            let (scores, answers) = base.measure(&evaluator, &test, 0, max_new, self.opening)?;
            let (again, _) = self.base.measure(&evaluator, self.validation, 0, max_new, self.opening)?;
            if let Some(miss) = self.miss(&again) {
                return Err(Error::Model(format!("the written file is not what was checked: {miss}")));
            }
            patched.validation.1 = again;
            patched.test = Some((base.scores.clone(), scores));
            patched.answers = (base.answers, answers);
        }
        let written = staged.commit()?;
        patched.out = Some(written.path);
        patched.sha256.1 = written.sha256;
        patched.bytes.1 = written.bytes;
        Ok(Outcome::Patched(Box::new(patched)))
    }

    /// The edit with its tensors' names.
    fn edit_of(&self, c: &Candidate) -> Vec<TensorEdit> {
        let terms: &Edit = &c.edit;
        terms
            .iter()
            .map(|t| TensorEdit {
                tensor: Model::name(t.writer.role(), t.layer),
                u: t.u.clone(),
                v: t.v.clone(),
            })
            .collect()
    }
}

fn provenance(
    p: &Patched,
    edits: &[TensorEdit],
    source_sha256: String,
    settings: &Settings,
) -> Result<Provenance> {
    let json = |s: &Scores| serde_json::to_string(s).map_err(|e| Error::Model(e.to_string()));
    Ok(Provenance {
        version: env!("CARGO_PKG_VERSION").to_string(),
        source_sha256,
        method: settings.method.name().to_string(),
        layers: vec![p.chosen.layer as u32],
        strength: p.chosen.strength as f32,
        before: json(&p.validation.0)?,
        after: json(&p.validation.1)?,
        edits: edits.to_vec(),
    })
}

/// Tokenized prompts are samples too.
impl From<crate::text::Prompt> for Sample {
    fn from(p: crate::text::Prompt) -> Sample {
        Sample { tokens: p.tokens, post_instruction: p.post_instruction }
    }
}
