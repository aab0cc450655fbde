//! The main job: measure, derive, choose, fold, check, write, measure what was written.

use std::path::Path;

use super::candidates::{self, Candidate};
use super::carry::can_carry;
use super::finalist::{Finalist, Search, Tried};
use super::fit::{baseline, Baseline};
use super::material::Material;
use super::outcome::Outcome;
use super::rank::{rank, refine, standard_error, FirstTokenLimits};
use super::{Emit, EncodingChoice, Method, Settings, Source, FINALISTS, HEALTHY, SOUND, TRIES};
use crate::direction::{derive, Classes, Direction, Sample};
use crate::edit::fold::norm;
use crate::error::{Error, Result};
use crate::evaluate::{energy::writer_inputs, Evaluator};
use crate::output::preflight_checkpoint;
use crate::text::{PromptSet, Set, Split};

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
    let file = &evaluator.model.file;
    let spec = &evaluator.model.spec;
    can_carry(&spec.arch, spec.experts.is_some(), file.folder().is_some(), settings.emit, settings.method)?;
    if let Some(out) = out {
        let bytes = if settings.emit == Emit::Weights { file.file_len() } else { 1 << 20 };
        preflight_checkpoint(file, out, bytes, force)?;
    }
    let validation = prompts.split(Split::Validation);
    let max_new = settings.max_new_tokens;
    // Openings are those of the listed refusals and of the model's own, so its answers come first.
    let mut answers = evaluator.answers(&validation, 0, max_new, &[])?;
    let opening = evaluator.refusal_tokens(&answers)?;
    if opening.is_empty() {
        return Err(Error::Model(
            "no token opens a refusal under this tokenizer and template; check --chat-template with inspect --prompt".into(),
        ));
    }
    evaluator.read_openings(&mut answers, &opening)?;
    let base = baseline(evaluator, answers)?;
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
    candidates::score(evaluator, settings.method, &mut candidates, &validation, &opening)?;
    let limits = FirstTokenLimits::new(&base, &opening, prompts.borderline_binds, settings.max_over_refusal);
    if settings.strength.is_none() {
        // Between the strongest that fits and the cliff behind it.
        let mut finer = refine(&candidates, &limits);
        candidates::score(evaluator, settings.method, &mut finer, &validation, &opening)?;
        candidates.extend(finer);
    }
    let order = rank(&candidates, &limits);

    let layers: Vec<usize> = picked.iter().map(|d| d.layer).collect();
    let writers: Vec<_> = layers.iter().flat_map(|&l| spec.writers(l).iter().map(move |&w| (l, w))).collect();
    let inputs = writer_inputs(evaluator, &prompts.of(Set::Harmless, Split::Validation), &writers)?;
    let search = Search {
        evaluator,
        prompts,
        settings,
        base: &base,
        validation: &validation,
        opening: &opening,
        inputs: &inputs,
    };
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
            Tried::Kept(finalist) => finalists.push(*finalist),
            Tried::Broke(miss) => {
                dropped.push((candidate.family, candidate.strength));
                why = miss;
            }
            Tried::Useless(reason) => why = reason,
        }
    }
    let validation = Box::new(base.scores.clone());
    let rate = base.scores.harmful.refusal_rate;
    // Whoever names a strength, or forbids another encoding, asks for that edit, not for advice.
    let free = settings.strength.is_none() && settings.encoding == EncodingChoice::Auto;
    let listed = |candidates: &[Candidate]| order.iter().map(|&i| candidates[i].clone()).collect();
    while let Some(f) = take_best(&mut finalists, &candidates, &base, settings) {
        // A control vector is asked for by those who have nothing else: the strongest inside the limits, with a warning.
        if f.is_weak() && settings.strength.is_none() && settings.emit != Emit::ControlVector {
            why = format!("the best edit gains {:.1} points (McNemar p = {:.2})", 100.0 * f.gain, f.p_value);
            break;
        }
        match search.finish(f, &candidates, &directions, out, force)? {
            Ok(patched) => return Ok(Outcome::Patched(Box::new(patched))),
            Err(miss) => why = miss,
        }
    }
    if rate >= SOUND && free {
        let why = format!(
            "it refuses {:.1} % of the harmful validation prompts, and no edit adds to that without harm to others: {why}",
            100.0 * rate
        );
        return Ok(Outcome::NotNeeded { why, validation, candidates });
    }
    Ok(Outcome::OutOfLimits { why, validation, candidates: listed(&candidates) })
}

/// The finalist to write: of those within a standard error of the one that is worth most, the one that keeps the
/// tensors' encodings and moves harmless answers least; of control vectors the strongest.
fn take_best(
    finalists: &mut Vec<Finalist>,
    candidates: &[Candidate],
    base: &Baseline,
    settings: &Settings,
) -> Option<Finalist> {
    let worth = |f: &Finalist| f.worth(&base.scores);
    let best = finalists.iter().map(worth).fold(f64::NEG_INFINITY, f64::max);
    let rate = &base.scores.harmful;
    let noise = standard_error(rate.refusal_rate + best, rate.n);
    let size = |f: &Finalist| candidates[f.index].size;
    let near = finalists.iter().enumerate().filter(|(_, f)| worth(f) >= best - noise - 1e-9);
    let (at, _) = match settings.emit {
        Emit::ControlVector => finalists
            .iter()
            .enumerate()
            .max_by(|a, b| a.1.gain.total_cmp(&b.1.gain).then(size(a.1).total_cmp(&size(b.1)))),
        _ => near
            .min_by(|(_, a), (_, b)| a.raised().cmp(&b.raised()).then(a.scores.kl.total_cmp(&b.scores.kl))),
    }?;
    Some(finalists.remove(at))
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
    let given = match &settings.source {
        Source::Own => Vec::new(),
        Source::Random(seed) => {
            (0..spec.layers).map(|l| (l, random_unit(spec.hidden, seed.wrapping_add(l as u64)))).collect()
        }
        Source::Given(saved) => saved.clone(),
    };
    derive(
        &evaluator.runner(),
        spec.layers,
        spec.hidden,
        &classes(Split::Train)?,
        &classes(Split::Validation)?,
        &given,
    )
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
    let deciding = directions.iter().filter(|d| d.position == 0);
    let picked: Vec<&Direction> = match settings.layers {
        Some((first, last)) => deciding.filter(|d| (first..=last).contains(&d.layer)).collect(),
        None => {
            // llama.cpp can't steer block 0 by a control vector.
            let first = usize::from(settings.emit == Emit::ControlVector);
            let range = first..candidate_layers(layers).max(first + 1);
            let mut early: Vec<&Direction> = deciding.filter(|d| range.contains(&d.layer)).collect();
            early.sort_by(|a, b| b.fisher.total_cmp(&a.fisher));
            // A run for every edit is dear, a row for a gate is not.
            early.truncate(if settings.method == Method::Gated { 8 } else { 4 });
            early
        }
    };
    if let (Source::Given(_), Some(d)) = (&settings.source, picked.iter().find(|d| d.own <= 0.0)) {
        return Err(Error::Gate(format!(
            "the saved direction of block {} points away from refusal in this model (cosine {:.2}); this tool only restores refusal",
            d.layer, d.own
        )));
    }
    Ok(picked)
}

/// Blocks from 0 that a patch may touch: the first four fifths. Later ones write too near to the output.
pub fn candidate_layers(layers: usize) -> usize {
    (layers * 4).div_ceil(5).max(1)
}

/// Candidates of every picked layer. The writers' inputs of a few layers at a time are held, as many as fit into half of
/// the memory, each group at the price of another pass over the weights.
fn build(
    evaluator: &Evaluator,
    prompts: &PromptSet,
    base: &Baseline,
    settings: &Settings,
    picked: &[&Direction],
) -> Result<Vec<Candidate>> {
    let mut families = Vec::new();
    if settings.method != Method::Gated {
        let none = Default::default();
        families = candidates::families(evaluator, settings.method, picked, &none, &none)?;
    } else {
        let train = prompts.split(Split::Train);
        let answers = evaluator.answers(&train, 0, settings.max_new_tokens, &[])?;
        let refusals = answers.iter().filter(|a| a.refused && a.set == Set::Harmful);
        let forced: Vec<&[u32]> = refusals.take(64).map(|a| &a.answer[..]).collect();
        let fit = Material::build(evaluator, &train, &answers, &forced)?;
        let validation = prompts.split(Split::Validation);
        let held_out = Material::build(evaluator, &validation, &base.answers, &forced)?;
        let spec = &evaluator.model.spec;
        let bytes = (fit.rows() + held_out.rows()) * (spec.widest_ffn() + spec.heads * spec.head_dim) * 4;
        let at_once = (evaluator.memory / 2 / bytes.max(1)).max(1);
        for group in picked.chunks(at_once) {
            let layers: Vec<usize> = group.iter().map(|d| d.layer).collect();
            let (a, b) = (fit.inputs(evaluator, &layers)?, held_out.inputs(evaluator, &layers)?);
            families.extend(candidates::families(evaluator, settings.method, group, &a, &b)?);
        }
    }
    let keep_all = settings.layers.is_some();
    Ok(candidates::candidates(settings.method, families, settings.strength, keep_all))
}

/// Tokenized prompts are samples too.
impl From<crate::text::Prompt> for Sample {
    fn from(p: crate::text::Prompt) -> Sample {
        Sample { tokens: p.tokens, post_instruction: p.post_instruction }
    }
}
