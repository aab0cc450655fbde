//! The main job: measure, derive, choose, fold, check, write, measure what was written.

use std::collections::HashSet;
use std::path::Path;

use super::baseline::Baseline;
use super::candidates::{candidates, Candidate};
use super::gates::Gates;
use super::outcome::{Outcome, Trial};
use super::rank::{rank, refine, FirstTokenLimits};
use super::reference::Reference;
use super::scan::Scan;
use super::score::score;
use super::settings::{EncodingChoice, Settings, FINALISTS, SOUND, TRIES};
use super::training::Training;
use super::trial::{Finalist, Tried};
use super::writers::{kinds, layers, own_directions, pick_layers, towards};
use super::Toward;
use crate::direction::Direction;
use crate::edit::Method;
use crate::error::{Error, Result};
use crate::evaluate::{energy::writer_inputs, Drafts, Evaluator};
use crate::output::{can_carry, preflight_checkpoint, Emit};
use crate::text::{PromptSet, Set, Split};

/// Runs the main job. `reference`: the original before compression, whose refusal is the goal.
/// `out`: where to write.
///
/// # Errors
/// What any step says. Nothing is left at `out` then.
pub fn patch(
    evaluator: &Evaluator,
    reference: Option<&Evaluator>,
    prompts: &PromptSet,
    settings: &Settings,
    out: &Path,
) -> Result<Outcome> {
    let work = evaluator.compute.work();
    work.begin();
    let out = (!settings.dry_run).then_some(out);
    prompts.enough()?;
    if settings.method == Some(Method::Restore) && reference.is_none() {
        return Err(Error::Model(
            "`method` restore needs the original's matrices: give `reference`".into(),
        ));
    }
    let file = &evaluator.model.file;
    for method in settings.methods(false) {
        let spec = &evaluator.model.spec;
        can_carry(
            &spec.arch,
            spec.experts.is_some(),
            file.folder().is_some(),
            settings.emit,
            method,
        )?;
    }
    if let Some(out) = out {
        let bytes = if settings.emit == Emit::Weights { file.file_len() } else { 1 << 20 };
        preflight_checkpoint(file, settings.emit, out, bytes, settings.force)?;
    }
    let reference =
        reference.map(|r| Reference::take(r, evaluator, prompts, settings)).transpose()?;
    if reference.is_some() {
        work.end("the original");
    }
    let baseline = Baseline::take(evaluator, reference, prompts, settings)?;
    work.end("answers to validation prompts");
    let original = || baseline.reference.as_ref().map(|r| Box::new(r.original()));
    let validation = Box::new(baseline.own.scores.clone());
    // Where the original did not refuse either no search is needed to say so.
    if let (Some(why), true) = (baseline.never_refused(&[], &[]), baseline.reference.is_some()) {
        return Ok(Outcome::NeverRefused { why, validation, reference: original() });
    }
    if let (Some(why), None) = (baseline.healthy()?, settings.strength) {
        let candidates = Vec::new();
        return Ok(Outcome::NotNeeded { why, validation, reference: original(), candidates });
    }

    let training = Training::take(&baseline)?;
    work.end("answers to training prompts");
    let directions = own_directions(&baseline, &training)?;
    let kinds = kinds(&baseline, &directions)?;
    work.end("directions");
    let scan = Scan::take(&baseline, &kinds)?;
    work.end("scan");
    let sources = Sources { training, kinds, scan };
    let mut gates = Gates::default();
    let mut search = Search::default();
    if !settings.routed {
        search.attempt(&baseline, &sources, &mut gates, false)?;
    }
    // Routed experts see few of the prompts each: only where the rest of the model falls short.
    let constant = settings.methods(false) == [Method::Add];
    if evaluator.model.spec.experts.is_some() && !constant && search.falls_short(&baseline) {
        evaluator
            .progress
            .note("trying routed experts, as the rest of the model falls short of the goal");
        search.attempt(&baseline, &sources, &mut gates, true)?;
    }
    let Search { candidates, order, trials, mut finalists, mut why } = search;
    while let Some(f) = take_best(&mut finalists, &candidates, &baseline) {
        // A control vector is asked for by those who have nothing else: the strongest inside the
        // limits, with a warning.
        if f.is_weak() && settings.strength.is_none() && settings.emit != Emit::ControlVector {
            why = format!(
                "the best edit gains {:.1} points (McNemar p = {:.2})",
                100.0 * f.gain,
                f.p_value
            );
            break;
        }
        match baseline.finish(f, &candidates, &trials, (&directions, &sources.scan), out)? {
            Ok(patched) => return Ok(Outcome::Patched(Box::new(patched))),
            Err(miss) => why = miss,
        }
    }
    // Whoever names a strength, or forbids another encoding, asks for that edit, not for advice;
    // and who names an original says what health is.
    let free = settings.strength.is_none()
        && settings.encoding == EncodingChoice::Auto
        && baseline.reference.is_none();
    let rate = validation.refusal.harmful.refusal_rate;
    let reference = original();
    if rate >= SOUND && free {
        let why = format!(
            "it refuses {:.1} % of the harmful validation prompts, and no edit adds to that \
             without harm to others: {why}",
            100.0 * rate
        );
        return Ok(Outcome::NotNeeded { why, validation, reference, candidates });
    }
    if let Some(why) = baseline.never_refused(&candidates, &trials) {
        return Ok(Outcome::NeverRefused { why, validation, reference });
    }
    // Where none is inside the limits all are worth a look.
    let order = if order.is_empty() { (0..candidates.len()).collect() } else { order };
    let candidates = order.iter().map(|&i| candidates[i].clone()).collect();
    let scan = Box::new(sources.scan);
    Ok(Outcome::OutOfLimits {
        why,
        validation,
        reference,
        front: Trial::front(&trials),
        candidates,
        scan,
    })
}

/// What candidates are made from.
struct Sources<'a> {
    training: Training<'a>,
    kinds: Vec<(Toward, Vec<Direction>)>,
    scan: Scan,
}

/// What was tried so far.
#[derive(Default)]
struct Search {
    candidates: Vec<Candidate>,
    /// Those inside the limits, the most promising first.
    order: Vec<usize>,
    trials: Vec<Trial>,
    finalists: Vec<Finalist>,
    /// What became of the last that is no finalist.
    why: String,
}

impl Search {
    /// Scores candidates, and tries the best; `routed`: those with routed experts.
    fn attempt(
        &mut self,
        baseline: &Baseline,
        sources: &Sources,
        gates: &mut Gates,
        routed: bool,
    ) -> Result<()> {
        let before = self.candidates.len();
        let family = self.candidates.iter().map(|c| c.family + 1).max().unwrap_or(0);
        let work = baseline.evaluator.compute.work();
        let mut candidates = build(baseline, sources, gates, routed, family)?;
        work.end("gates");
        score(baseline, &mut candidates)?;
        let limits = FirstTokenLimits::new(baseline);
        if baseline.settings.strength.is_none() {
            // Between the strongest that fits and the cliff above it.
            let mut finer = refine(&candidates, &limits);
            score(baseline, &mut finer)?;
            candidates.extend(finer);
        }
        work.end("scores");
        let order: Vec<usize> =
            rank(&candidates, &limits).into_iter().map(|i| before + i).collect();
        self.candidates.extend(candidates);
        let (finalists, why) = try_out(baseline, &self.candidates, &order, &mut self.trials)?;
        work.end("trials");
        self.order.extend(order);
        self.finalists.extend(finalists);
        self.why = why;
        Ok(())
    }

    /// Whether no finalist refuses as the original does; without one, as a sound model.
    fn falls_short(&self, baseline: &Baseline) -> bool {
        let reaches = |f: &Finalist| match baseline.reference {
            Some(_) => f.reached,
            None => !f.is_weak() && f.scores.refusal.harmful.refusal_rate >= SOUND,
        };
        !self.finalists.iter().any(reaches)
    }
}

/// The candidates of every method along every direction. `family`: the number of the first family.
fn build(
    baseline: &Baseline,
    Sources { training, kinds, scan }: &Sources,
    gates: &mut Gates,
    routed: bool,
    family: usize,
) -> Result<Vec<Candidate>> {
    let settings = baseline.settings;
    let comparable =
        baseline.reference.as_ref().is_some_and(|r| r.same_writers(baseline.evaluator));
    let mut out: Vec<Candidate> = Vec::new();
    for method in settings.methods(comparable) {
        let picked = pick_layers(baseline, kinds, scan, method);
        if method == Method::Gated {
            gates.fit(baseline, training, &picked, routed)?;
        }
        for (i, (toward, along)) in
            towards(baseline, method, kinds, scan, &picked).iter().enumerate()
        {
            let first = out.last().map_or(family, |c| c.family + 1);
            let layers = layers(baseline, method, (*toward, along), scan, gates, routed)?;
            let beside = i > 0 && method != Method::Restore;
            out.extend(candidates(method, *toward, layers, settings, first, routed, beside));
        }
    }
    Ok(out)
}

/// Candidates one after the other as they would be written: those that keep the limits, and what
/// became of the last that did not.
fn try_out(
    baseline: &Baseline,
    candidates: &[Candidate],
    order: &[usize],
    trials: &mut Vec<Trial>,
) -> Result<(Vec<Finalist>, String)> {
    let mut writers: Vec<_> = order
        .iter()
        .flat_map(|&i| candidates[i].edit.iter().map(|t| (t.layer, t.writer)))
        .collect();
    writers.sort_unstable();
    writers.dedup();
    let harmless = baseline.prompts.of(Set::Harmless, Split::Validation);
    let inputs = writer_inputs(baseline.evaluator, &harmless, &writers)?;
    let first = writers.first().map_or(0, |w| w.0);
    let drafts = baseline.own.drafts(baseline.evaluator, &baseline.validation, first)?;
    // Those of the last trial: the next one often begins at the same block.
    let mut deeper: Option<Drafts> = None;
    let mut why = "no candidate keeps the answers to harmless prompts".to_string();
    let mut finalists: Vec<Finalist> = Vec::new();
    let mut dropped: Vec<(usize, f64)> = Vec::new();
    let mut tried = HashSet::new();
    // The weaker edit that is tried next where a finalist of its family overshoots the goal.
    let mut weaker = None;
    let mut ranked = order.iter().copied();
    while let Some((index, asked)) =
        weaker.take().map(|i| (i, true)).or_else(|| ranked.next().map(|i| (i, false)))
    {
        let candidate = &candidates[index];
        // With an original, stop at 3 finalists that meet its rate, or 6 in all.
        let enough = finalists.iter().filter(|f| f.meets_goal(baseline)).count() == FINALISTS;
        if enough || finalists.len() == 2 * FINALISTS || tried.len() == TRIES {
            break;
        }
        // What was too strong once is not tried stronger, and a family is not tried twice once it
        // has a finalist.
        let done = |f: &Finalist| {
            let of = &candidates[f.index];
            let ends = f.reached || baseline.reference.is_none();
            of.family == candidate.family && (ends || of.strength >= candidate.strength)
        };
        if dropped.iter().any(|&(f, s)| f == candidate.family && candidate.strength >= s)
            || (!asked && finalists.iter().any(done))
            || !tried.insert(index)
        {
            continue;
        }
        let start = candidate.edit.iter().map(|t| t.layer).min().unwrap_or(first);
        if let Some(drafts) = &drafts {
            let is_at = deeper.as_ref().map_or(drafts.layer(), Drafts::layer);
            if start != is_at {
                // Both fit where one takes an eighth of the memory.
                let fit = start > drafts.layer() && drafts.bytes() <= baseline.evaluator.memory / 8;
                deeper = match fit {
                    true => Some(drafts.advanced(baseline.evaluator, start)?),
                    false => None,
                };
            }
        }
        let drafts = deeper.as_ref().or(drafts.as_ref());
        match baseline.try_out(index, candidate, &inputs, drafts, trials)? {
            Tried::Kept(finalist) => {
                if finalist.overshoot > 0.0 {
                    let wanted = finalist.gain - baseline.beyond_goal(&finalist.scores);
                    weaker = weaker_of(candidates, order, index, finalist.gain, wanted);
                }
                finalists.push(*finalist);
            }
            Tried::Broke(broken) => {
                // What an edit does grows about as its strength: those that would break it, too,
                // are not tried.
                let most = candidate.strength * (1.1 / broken.excess()).clamp(0.25, 1.0);
                dropped.push((candidate.family, most));
                why = broken.to_string();
            }
            Tried::Useless(reason) => why = reason,
        }
    }
    Ok((finalists, why))
}

/// Of the family of candidate `of`, the weaker edit that should gain `wanted` of harmful prompts
/// where `of` gained more: what an edit gains grows about as its strength.
fn weaker_of(
    candidates: &[Candidate],
    order: &[usize],
    of: usize,
    gained: f64,
    wanted: f64,
) -> Option<usize> {
    let (of, share) = (&candidates[of], (wanted / gained).clamp(1e-3, 1.0));
    let distance = |i: usize| (candidates[i].strength / (of.strength * share)).ln().abs();
    let weaker = order.iter().copied().filter(|&i| {
        candidates[i].family == of.family && candidates[i].strength < of.strength - 1e-9
    });
    weaker.min_by(|&a, &b| distance(a).total_cmp(&distance(b)))
}

/// The finalist to write. With an original: one that reaches its rate, and overshoots it least.
/// Then the one of the greatest value by its answers; of control vectors the strongest.
fn take_best(
    finalists: &mut Vec<Finalist>,
    candidates: &[Candidate],
    baseline: &Baseline,
) -> Option<Finalist> {
    let goal = baseline.goal();
    let value = |f: &Finalist| candidates[f.index].value(&f.outlook, goal);
    let size = |f: &Finalist| candidates[f.index].size;
    let better = |a: &Finalist, b: &Finalist| match baseline.settings.emit {
        Emit::ControlVector => a.gain.total_cmp(&b.gain).then(size(a).total_cmp(&size(b))),
        _ => (a.reached.cmp(&b.reached))
            .then(b.overshoot.total_cmp(&a.overshoot))
            .then(value(a).total_cmp(&value(b))),
    };
    let (at, _) = finalists.iter().enumerate().max_by(|(_, a), (_, b)| better(a, b))?;
    Some(finalists.remove(at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::search::rank::tests::candidate;

    #[test]
    fn where_a_goal_is_overshot_the_strength_that_should_meet_it_is_tried() {
        let of = |strength, family| Candidate { strength, ..candidate(family, 0.1, [1.0; 3], 0.0) };
        let all = [of(2.0, 0), of(1.41, 0), of(1.0, 0), of(0.5, 0), of(1.0, 1)];
        let order = [0, 4, 1, 3, 2];
        assert_eq!(weaker_of(&all, &order, 0, 0.4, 0.2), Some(2), "half the gain");
        assert_eq!(weaker_of(&all, &order, 0, 0.4, 0.39), Some(1), "weaker, never the same");
        assert_eq!(weaker_of(&all, &order, 0, 0.4, -0.1), Some(3), "the weakest there is");
        assert_eq!(weaker_of(&all, &order, 3, 0.4, 0.1), None, "none is weaker");
    }
}
