//! Trials: a candidate is folded into bytes, as it would be written, answers the validation
//! prompts, and is held to the limits.

use super::baseline::Baseline;
use super::candidates::Candidate;
use super::limits::Broken;
use super::outcome::{TensorReport, Trial};
use super::worth::Outlook;
use super::{EncodingChoice, LEAST_GAIN};
use crate::edit::fold::achieved_all;
use crate::edit::stack::{fold_all, recode_all};
use crate::edit::RankOne;
use crate::encoding::Encoding;
use crate::error::{Error, Result};
use crate::evaluate::energy::{inputs_of, off_direction, WriterInputs};
use crate::evaluate::stats::SIGNIFICANT;
use crate::evaluate::{Answer, DraftRead, Drafts, Evaluator, Rate, Scores};
use crate::model::{Part, Replacement};
use crate::num::norm;
use crate::output::Emit;
use crate::pair::Pair;
use crate::text::Set;
use crate::weights::Storage;

fn describe(c: &Candidate, s: &Scores) -> String {
    let mut out = format!("{} strength {:.2}: ", c.place(), c.strength);
    for (set, rate) in s.refusal.iter().filter(|(_, r)| !r.refusal_rate.is_nan()) {
        let name = if set == Set::Harmful { "refusal" } else { set.name() };
        out += &format!("{name} {:.1} %, ", 100.0 * rate.refusal_rate);
    }
    out + &format!("KL {:.4}, perplexity {:.3}", s.kl, s.perplexity)
}

/// A candidate whose trial kept the limits.
pub(super) struct Finalist {
    pub index: usize,
    /// New bytes of the touched tensors; none where the edit is a constant.
    pub replaced: Vec<Replacement>,
    pub tensors: Vec<TensorReport>,
    pub scores: Scores,
    /// Share of harmful prompts gained.
    pub gain: f64,
    pub p_value: f64,
    /// How likely each validation prompt is refused.
    pub outlook: Outlook,
    /// Whether it refuses at least as often as the original, to within a standard error; false
    /// without an original.
    pub reached: bool,
    /// Share of harmful prompts by which it refuses more than the original, beyond a standard
    /// error; 0 without an original.
    pub overshoot: f64,
}

impl Finalist {
    /// Whether it refuses as often as the original, to within a standard error; true without an
    /// original.
    pub fn meets_goal(&self, baseline: &Baseline) -> bool {
        baseline.reference.is_none() || (self.reached && self.overshoot == 0.0)
    }

    /// Whether the gain is too small to count, or may be chance.
    pub fn is_weak(&self) -> bool {
        (self.gain < LEAST_GAIN && !self.reached) || self.p_value >= SIGNIFICANT
    }
}

/// The result of a trial.
pub(super) enum Tried {
    /// The candidate keeps the limits.
    Kept(Box<Finalist>),
    /// The candidate breaks this limit. Stronger ones of its family will, too.
    Broke(Broken),
    /// The candidate restores nothing, or no encoding holds it.
    Useless(String),
}

/// Scores and answers of a trial, and the limit that it breaks.
struct Measured {
    scores: Scores,
    answers: Vec<Answer>,
    broken: Option<Broken>,
}

/// Most that a fold may change off the edit's direction, in energy on harmless inputs, before the
/// tensor gets a finer encoding.
const MAX_OFF_DIRECTION: f64 = 0.02;

impl Baseline<'_> {
    /// Tries a candidate as it would be written: as folded bytes, or as a constant. `inputs`: the
    /// writers' inputs on harmless validation prompts. The scores go to `trials`.
    pub fn try_out(
        &self,
        index: usize,
        candidate: &Candidate,
        inputs: &WriterInputs,
        drafts: Option<&Drafts>,
        trials: &mut Vec<Trial>,
    ) -> Result<Tried> {
        let (mut replaced, mut tensors) = (Vec::new(), Vec::new());
        let constant = candidate.edit.iter().all(|t| t.v.is_empty());
        let mut beside = constant;
        if !constant {
            match self.store(candidate, inputs) {
                Ok(stored) => (replaced, tensors) = stored,
                // Where no grid holds the fold, an adapter still carries the same edit.
                Err(Error::Gate(_)) if self.settings.emit == Emit::Lora => beside = true,
                Err(Error::Gate(reason)) => return Ok(Tried::Useless(reason)),
                Err(e) => return Err(e),
            }
        }
        let patched = self.evaluator.model.with(replaced)?;
        let edit = beside.then_some(&candidate.edit);
        let after = Evaluator { model: &patched, edit, ..*self.evaluator };
        let Measured { scores, answers, broken } = self.measure_trial(&after, drafts)?;
        trials.push(Trial::new(candidate, &scores, broken));
        let verdict = broken.map_or(String::new(), |b| format!(": {b}"));
        self.evaluator.progress.note(&format!("{}{verdict}", describe(candidate, &scores)));
        if let Some(broken) = broken {
            return Ok(Tried::Broke(broken));
        }
        let (gain, p_value) = self.gain(&answers);
        if gain < 0.0 {
            return Ok(Tried::Useless("refusal of harmful prompts fell".into()));
        }
        Ok(Tried::Kept(Box::new(Finalist {
            index,
            replaced: patched.replaced,
            tensors,
            scores,
            gain,
            p_value,
            outlook: Outlook::read(&answers),
            reached: self.reference.as_ref().is_some_and(|r| r.is_reached(&answers)),
            overshoot: self.reference.as_ref().map_or(0.0, |r| r.overshoot(&answers)),
        })))
    }

    /// Measures a trial until it breaks a limit, the cheap limits first. Scores that were not
    /// measured by then are NaN.
    fn measure_trial(&self, after: &Evaluator, drafts: Option<&Drafts>) -> Result<Measured> {
        let own = &self.own;
        // Most trials end by over-refusal, so harmful prompts are answered last, although they come
        // first in the list.
        let prompts = &self.validation.prompts;
        let (harmful, others): (Vec<usize>, Vec<usize>) =
            (0..self.validation.plain).partition(|&i| prompts[i].set == Set::Harmful);
        let drafts = drafts.map(|d| Ok::<_, Error>((d, d.read(after, &others)?))).transpose()?;
        let drift = match &drafts {
            Some((drafts, read)) => drafts.drift(after, read)?,
            None => own.drift(after)?,
        };
        let unknown = |rate: &mut Rate| rate.refusal_rate = f64::NAN;
        let mut scores = Scores {
            kl: drift.kl,
            answer_perplexity: drift.answer_perplexity,
            perplexity: drift.perplexity,
            ..own.scores.clone()
        };
        if let Some(broken) = self.broken(&scores) {
            Set::ALL.iter().for_each(|&set| unknown(scores.refusal.get_mut(set)));
            return Ok(Measured { scores, answers: Vec::new(), broken: Some(broken) });
        }
        let options = self.answer_options();
        let answers = if let Some((drafts, read)) = &drafts {
            let answer = |read: &DraftRead, prompts: &[usize]| {
                after.answer_from(&self.validation, drafts, read, prompts, options)
            };
            let others = answer(read, &others)?;
            for set in [Set::Harmless, Set::Borderline] {
                *scores.refusal.get_mut(set) = Rate::of(&others, set);
            }
            if let Some(broken) = self.broken(&scores) {
                unknown(&mut scores.refusal.harmful);
                return Ok(Measured { scores, answers: Vec::new(), broken: Some(broken) });
            }
            [answer(&drafts.read(after, &harmful)?, &harmful)?, others].concat()
        } else {
            after.answer(&after.ask_again(&self.validation)?, options)?
        };
        let scores = own.scores(drift, &answers);
        let broken = self.broken(&scores);
        Ok(Measured { scores, answers, broken })
    }

    /// Folds a candidate into the tensors' own encodings, or into wider ones where the grid can't
    /// hold it.
    fn store(
        &self,
        c: &Candidate,
        inputs: &WriterInputs,
    ) -> Result<(Vec<Replacement>, Vec<TensorReport>)> {
        let mut replacements = Vec::new();
        let mut reports = Vec::new();
        for term in &c.edit {
            for part in self.evaluator.model.parts(term.layer, term.writer)? {
                if part.gate(&term.v).iter().all(|x| *x == 0.0) {
                    continue;
                }
                let (replacement, report) = self.store_part(&part, term, inputs)?;
                replacements.push(replacement);
                reports.push(report);
            }
        }
        Ok((replacements, reports))
    }

    fn store_part(
        &self,
        part: &Part,
        term: &RankOne,
        inputs: &WriterInputs,
    ) -> Result<(Replacement, TensorReport)> {
        let (name, stack) = (&part.tensor, &part.stack);
        let (w, u, v) = (stack.get(0), &term.u[..], part.gate(&term.v));
        let (folder, own) = (self.evaluator.model.file.folder().is_some(), w.encoding.blocks());
        // None: the tensor's own encoding.
        let ladder: Vec<Option<Encoding>> = match self.settings.encoding {
            EncodingChoice::Fixed(e) if folder && own != Some(e) => {
                return Err(Error::unsupported(
                    format!("tensor {name} is {}: safetensors keep their types", w.encoding.name()),
                    "use `encoding` auto, or `emit` lora",
                ))
            }
            EncodingChoice::Keep if !w.encoding.has_codes() => {
                return Err(Error::Gate(format!(
                    "a code of tensor {name} ({}) stands for several weights: none can be stepped; \
                     use `encoding` auto, q8_0 or f16",
                    w.encoding.name()
                )))
            }
            EncodingChoice::Keep => vec![None],
            EncodingChoice::Fixed(e) => vec![Some(e)],
            EncodingChoice::Auto if folder => vec![None],
            EncodingChoice::Auto => ladder(&w.encoding)
                .iter()
                .copied()
                .filter(|e| e.is_none_or(|e| e.bytes_for(w.cols) > w.row_bytes()))
                .collect(),
        };
        let mut gain = None;
        for step in
            ladder.into_iter().filter(|e| e.is_none_or(|e| w.cols.is_multiple_of(e.block_len())))
        {
            let wider = step.filter(|e| own != Some(*e));
            let encoding = wider.map_or(stack.encoding(), Storage::Blocks);
            let mut ways = Vec::new();
            match wider {
                // Folders rely on zeros that stay zero.
                None => ways.push(fold_all(stack, u, v, folder)?),
                Some(e) => {
                    let plain = recode_all(stack, e, None);
                    ways.push(fold_all(&stack.with(encoding, &plain), u, v, false)?);
                    // New scales may be chosen for the edited weights, which a large edit needs.
                    ways.push(recode_all(stack, e, Some((u, v))));
                }
            }
            for bytes in ways {
                let after = stack.with(encoding, &bytes);
                let stored = achieved_all(stack, &after, u, v);
                gain = Some(stored.gain);
                // A folder's tensors can't get a finer encoding: there the limits on answers decide
                // alone.
                let auto = self.settings.encoding == EncodingChoice::Auto && !folder;
                if auto && encoding.blocks() != Some(Encoding::F16) {
                    let x = inputs_of(inputs, term.layer, term.writer, part);
                    let off = off_direction(self.evaluator.compute, stack, &after, u, &x)?;
                    if off.overall > MAX_OFF_DIRECTION {
                        continue;
                    }
                }
                if (0.98..=1.02).contains(&stored.gain) {
                    let tensor = self.evaluator.model.code_tensor(name)?;
                    let report = TensorReport {
                        tensor: name.clone(),
                        encoding: Pair::new(w.encoding.name(), encoding.name())
                            .map(|n| n.to_string()),
                        asked: norm(&term.u),
                        achieved: stored.into(),
                    };
                    return Ok((Replacement { tensor, encoding: wider, bytes }, report));
                }
            }
        }
        let what = match gain {
            Some(gain) => format!("holds {:.1} % of the edit", 100.0 * gain),
            None => {
                format!("has rows of {} elements, which the encoding asked for can't hold", w.cols)
            }
        };
        let hint = if folder { "`emit` lora" } else { "`encoding` auto, q8_0 or f16" };
        Err(Error::Gate(format!("tensor {name} ({}) {what}; use {hint}", w.encoding.name())))
    }
}

/// The encodings that a GGUF tensor is tried in, in order: its own (`None`), then finer ones.
/// Lattice types have no codes to step and lie far below 4 bits, so smaller steps up are tried too.
fn ladder(own: &Storage) -> &'static [Option<Encoding>] {
    use Encoding::*;
    match own.has_codes() {
        true => &[None, Some(Q6K), Some(Q8_0), Some(F16)],
        false => &[Some(Q4K), Some(Q5K), Some(Q6K), Some(Q8_0), Some(F16)],
    }
}
