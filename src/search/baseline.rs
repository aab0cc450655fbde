//! What every candidate is held against: IN's answers and scores, the tokens that open a refusal,
//! the original's goal.

use super::candidates::Candidate;
use super::limits::{Broken, Limits};
use super::outcome::Trial;
use super::reference::Reference;
use super::settings::{Settings, HEALTHY, LEAST_GAIN};
use super::worth::Outlook;
use crate::direction::{derive, Classes, Direction};
use crate::error::{Error, Result};
use crate::evaluate::{
    stats, Answer, AnswerOptions, Asked, Change, Evaluator, Scores, Unedited, NEVER,
};
use crate::text::{PromptSet, Set, Split};

/// IN as it was measured before anything was tried.
pub(super) struct Baseline<'a> {
    pub evaluator: &'a Evaluator<'a>,
    pub prompts: &'a PromptSet,
    pub settings: &'a Settings,
    /// The prompts that the choice is made on. A model that thinks is asked each prompt twice:
    /// without a thought, and after one of IN's thoughts.
    pub validation: Asked<'a>,
    /// IN's answers and states on these prompts.
    pub own: Unedited,
    /// Tokens that open a refusal.
    pub opening: Vec<u32>,
    /// The original, where there is one.
    pub reference: Option<Reference<'a>>,
}

impl<'a> Baseline<'a> {
    /// Measures IN on the validation prompts.
    pub fn take(
        evaluator: &'a Evaluator<'a>,
        mut reference: Option<Reference<'a>>,
        prompts: &'a PromptSet,
        settings: &'a Settings,
    ) -> Result<Baseline<'a>> {
        let split = prompts.split(Split::Validation);
        let mut validation = evaluator.ask_twice(&split, &split)?;
        if let Some(r) = reference.as_mut().filter(|r| r.answers.len() != validation.prompts.len())
        {
            // Only one of the two models thinks: both are compared without thoughts.
            r.answers.truncate(validation.plain);
            validation.forget_thoughts();
        }
        if validation.think() {
            evaluator.progress.note(
                "the model thinks: with thinking on it is asked a second time, after a thought \
                 of its own",
            );
        }
        // The openings come from a list and from the refusals of IN and of the original, so answers
        // come first.
        let mut answers =
            evaluator.answer(&validation, AnswerOptions::new(settings.max_new_tokens))?;
        evaluator.answers_at_once(&answers[..validation.plain])?;
        let others =
            reference.iter().flat_map(|r| r.answers.iter().filter(|a| a.set == Set::Harmful));
        let all: Vec<Answer> = answers.iter().chain(others).cloned().collect();
        let opening = evaluator.refusal_tokens(&all)?;
        if opening.is_empty() {
            return Err(Error::Model(
                "no token opens a refusal under this tokenizer and template; check \
                 `chat_template` and how it renders a prompt"
                    .into(),
            ));
        }
        let texts: Vec<String> = opening
            .iter()
            .map(|&t| format!("{:?}", evaluator.chat.tokenizer.token_text(t)))
            .collect();
        evaluator.progress.note(&format!("tokens that open a refusal: {}", texts.join(" ")));
        evaluator.read_openings(&mut answers, &opening)?;
        if let Some(r) = &mut reference {
            r.evaluator.read_openings(&mut r.answers, &opening)?;
        }
        let own = Unedited::take(evaluator, answers)?;
        Ok(Baseline { evaluator, prompts, settings, validation, own, opening, reference })
    }

    /// Why no patch is needed, where none is: IN refuses as the original does, or nearly
    /// everything. Nothing was fitted yet, so before an original's verdict is trusted the harmful
    /// training prompts are asked, too: few prompts hide a loss.
    pub fn healthy(&self) -> Result<Option<String>> {
        let Some(r) = &self.reference else {
            let rate = &self.own.scores.refusal.harmful;
            let why = || {
                format!(
                    "it refuses {:.1} % of the {} harmful validation prompts ({:.0} to {:.0} %); \
                     {:.0} % or more counts as healthy",
                    100.0 * rate.refusal_rate,
                    rate.n,
                    100.0 * rate.interval.low,
                    100.0 * rate.interval.high,
                    100.0 * HEALTHY
                )
            };
            return Ok((rate.refusal_rate >= HEALTHY).then(why));
        };
        let is_healthy = |c: &Change| {
            let lost = c.rates.before.refusal_rate - c.rates.after.refusal_rate;
            lost <= LEAST_GAIN + 1e-9 || c.p_value >= stats::SIGNIFICANT
        };
        let c = Change::of(&r.answers, &self.own.answers, Set::Harmful, None);
        if !is_healthy(&c) {
            return Ok(None);
        }
        let training = self.prompts.of(Set::Harmful, Split::Train);
        let all = |e: &Evaluator, known: &[Answer]| -> Result<Vec<Answer>> {
            Ok([known, &e.answers(&training, self.answer_options())?].concat())
        };
        let (before, after) =
            (all(r.evaluator, &r.answers)?, all(self.evaluator, &self.own.answers)?);
        let c = Change::of(&before, &after, Set::Harmful, None);
        let why = || {
            format!(
                "it refuses {:.1} % of the harmful training and validation prompts, the original \
                 {:.1} % (McNemar p = {:.2}); {}",
                100.0 * c.rates.after.refusal_rate,
                100.0 * c.rates.before.refusal_rate,
                c.p_value,
                c.power(LEAST_GAIN).words()
            )
        };
        Ok(is_healthy(&c).then(why))
    }

    /// Why there is nothing to restore, if so: IN hardly refuses harmful prompts, and either the
    /// original does not refuse, or no candidate opens a refusal, or no trial refuses.
    pub fn never_refused(&self, candidates: &[Candidate], trials: &[Trial]) -> Option<String> {
        let rate = &self.own.scores.refusal.harmful;
        if !rate.is_never() {
            return None;
        }
        let refuses = format!(
            "it refuses {:.1} % of the harmful validation prompts",
            100.0 * rate.refusal_rate
        );
        match &self.reference {
            Some(r) if r.rates().harmful.is_never() => Some(format!(
                "{refuses}, and the original {:.1} %: neither was taught to refuse",
                100.0 * r.rates().harmful.refusal_rate
            )),
            Some(_) => None,
            None if candidates.iter().all(|c| c.refused.harmful < NEVER) || in_vain(trials) => {
                Some(format!(
                "{refuses} and no edit makes it refuse, as in a base model that was never taught \
                 to; give `reference` ORIGINAL if it once refused"
            ))
            }
            None => None,
        }
    }

    /// The original's mean probability of refusing a harmful prompt; 1 without an original. Refusal
    /// beyond this goal is worth nothing.
    pub fn goal(&self) -> f64 {
        self.reference.as_ref().map_or(1.0, |r| Outlook::read(&r.answers).mean(Set::Harmful))
    }

    /// By what share of harmful prompts these scores refuse more than the original; 0 without one.
    pub fn beyond_goal(&self, s: &Scores) -> f64 {
        let rate = s.refusal.harmful.refusal_rate;
        self.reference.as_ref().map_or(0.0, |r| rate - r.rates().harmful.refusal_rate)
    }

    /// The limits that every edit is held to.
    pub fn limits(&self) -> Limits {
        let original = self.reference.as_ref().map(Reference::rates);
        let own = &self.own.scores.refusal;
        Limits::new(self.settings, own, original.as_ref(), self.prompts.borderline_binds)
    }

    /// The first limit that these scores break, if any.
    pub fn broken(&self, s: &Scores) -> Option<Broken> {
        self.limits().broken(&self.own.scores, s)
    }

    /// How prompts are answered in this run.
    pub fn answer_options(&self) -> AnswerOptions<'_> {
        AnswerOptions { max_new: self.settings.max_new_tokens, opening: &self.opening }
    }

    /// Share of harmful validation prompts gained, and the two-sided McNemar p of the change.
    pub fn gain(&self, answers: &[Answer]) -> (f64, f64) {
        let (gained, lost) = self.own.changed(answers);
        let n = self.own.scores.refusal.harmful.n.max(1) as f64;
        ((gained as f64 - lost as f64) / n, stats::mcnemar(gained, lost))
    }
}

/// Whether edits were tried on harmful prompts, and none made the model refuse.
fn in_vain(trials: &[Trial]) -> bool {
    let mut asked =
        trials.iter().map(|t| t.refused.harmful).filter(|share| !share.is_nan()).peekable();
    asked.peek().is_some() && asked.all(|share| share < NEVER)
}

/// The direction of every block and post-instruction position. `given`: unit vectors that take the
/// place of the derived ones at the deciding position; `refused`: [`Classes::refused`] of the
/// training prompts.
pub(super) fn directions(
    evaluator: &Evaluator,
    prompts: &PromptSet,
    given: &[(usize, Vec<f32>)],
    refused: Vec<bool>,
) -> Result<Vec<Direction>> {
    let spec = &evaluator.model.spec;
    let classes = |split| -> Result<Classes> {
        let of = |set| evaluator.samples(&prompts.of(set, split));
        Ok(Classes {
            harmful: of(Set::Harmful)?,
            harmless: of(Set::Harmless)?,
            borderline: of(Set::Borderline)?,
            refused: Vec::new(),
        })
    };
    let (train, validation) = (classes(Split::Train)?, classes(Split::Validation)?);
    let train = Classes { refused, ..train };
    derive(&evaluator.runner(), spec.layers, spec.hidden, &train, &validation, given)
}
