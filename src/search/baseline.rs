//! What every candidate is held against: IN's answers and scores, the tokens that open a refusal,
//! the original's goal.

use super::candidates::Candidate;
use super::gate_rows::reads_answer;
use super::outcome::Trial;
use super::reference::{Rates, Reference};
use super::worth::Outlook;
use super::{Settings, HEALTHY, LEAST_GAIN, MAX_BORDERLINE, MAX_PERPLEXITY, SIGNIFICANT};
use crate::direction::{derive, Classes, Direction};
use crate::error::{Error, Result};
use crate::evaluate::{baseline, Baseline, Scores};
use crate::evaluate::{stats, Answer, Asked, Change, Evaluator, Rate, NEVER};
use crate::text::{PromptSet, Set, Split};

/// IN as it was measured before anything was tried.
pub(super) struct Ground<'a> {
    pub evaluator: &'a Evaluator<'a>,
    pub prompts: &'a PromptSet,
    pub settings: &'a Settings,
    /// The prompts that the choice is made on, of a model that thinks each twice: without a
    /// thought, and behind one of IN's.
    pub validation: Asked<'a>,
    /// IN on them.
    pub base: Baseline,
    /// Tokens that open a refusal.
    pub opening: Vec<u32>,
    /// The original, where there is one.
    pub reference: Option<Reference<'a>>,
}

/// IN's answers to the training prompts, which directions and gates are made from.
pub(super) struct Training<'a> {
    /// The prompts; of a model that thinks every other one a second time, behind a thought.
    pub asked: Asked<'a>,
    /// Its answers.
    pub answers: Vec<Answer>,
}

impl<'a> Training<'a> {
    /// Asks IN.
    pub fn take(ground: &Ground<'a>) -> Result<Training<'a>> {
        let train = ground.prompts.split(Split::Train);
        // Thoughts take long.
        let again: Vec<_> =
            train.iter().copied().step_by(2).filter(|_| ground.validation.think()).collect();
        let asked = ground.evaluator.ask_twice(&train, &again)?;
        let answer =
            |asked: &Asked, max_new| ground.evaluator.answer(asked, 0, max_new, &ground.opening);
        let most = ground.settings.max_new_tokens;
        if asked.think() {
            let answers = answer(&asked, most)?;
            return Ok(Training { asked, answers });
        }
        // Whether a prompt is refused shows early. Whole answers are wanted of those that gates
        // read.
        let mut answers = answer(&asked, most.div_ceil(2))?;
        let whole: Vec<usize> =
            (0..train.len()).filter(|&i| reads_answer(i) && train[i].set != Set::Harmful).collect();
        let longer: Vec<_> = whole.iter().map(|&i| train[i]).collect();
        for (i, a) in whole.into_iter().zip(answer(&ground.evaluator.ask(&longer)?, most)?) {
            answers[i] = a;
        }
        Ok(Training { asked, answers })
    }

    /// Whether each prompt is refused, of those asked without a thought.
    pub fn refused(&self) -> Vec<bool> {
        self.answers[..self.asked.plain].iter().map(|a| a.refused).collect()
    }
}

impl<'a> Ground<'a> {
    /// Measures IN on the validation prompts.
    pub fn take(
        evaluator: &'a Evaluator<'a>,
        mut reference: Option<Reference<'a>>,
        prompts: &'a PromptSet,
        settings: &'a Settings,
    ) -> Result<Ground<'a>> {
        let split = prompts.split(Split::Validation);
        let mut validation = evaluator.ask_twice(&split, &split)?;
        if let Some(r) = reference.as_mut().filter(|r| r.answers.len() != validation.prompts.len())
        {
            // Only one of them thinks: they are compared where both answer.
            r.answers.truncate(validation.plain);
            validation.forget_thoughts();
        }
        if validation.think() {
            evaluator.progress.note(
                "the model thinks: with thinking on it is asked a second time, behind a thought of its own",
            );
        }
        // Openings are those of the listed refusals, of the model's own and of the original's, so
        // answers come first.
        let mut answers = evaluator.answer(&validation, 0, settings.max_new_tokens, &[])?;
        evaluator.answers_at_once(&answers[..validation.plain])?;
        let others =
            reference.iter().flat_map(|r| r.answers.iter().filter(|a| a.set == Set::Harmful));
        let all: Vec<Answer> = answers.iter().chain(others).cloned().collect();
        let opening = evaluator.refusal_tokens(&all)?;
        if opening.is_empty() {
            return Err(Error::Model(
                "no token opens a refusal under this tokenizer and template; check --chat-template with inspect --prompt".into(),
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
        let base = baseline(evaluator, answers)?;
        Ok(Ground { evaluator, prompts, settings, validation, base, opening, reference })
    }

    /// Why no patch is needed, where none is: IN refuses as the original does, or nearly
    /// everything.
    pub fn healthy(&self) -> Option<String> {
        let rate = self.base.scores.harmful.refusal_rate;
        let refuses = format!("it refuses {:.1} % of the harmful validation prompts", 100.0 * rate);
        let Some(r) = &self.reference else {
            let rest = format!("{:.0} % or more counts as healthy", 100.0 * HEALTHY);
            return (rate >= HEALTHY).then(|| format!("{refuses}; {rest}"));
        };
        let c = Change::of(&r.answers, &self.base.answers, Set::Harmful, None);
        let goal = c.rates.0.refusal_rate;
        let healthy = goal - rate <= LEAST_GAIN + 1e-9 || c.p_value >= SIGNIFICANT;
        healthy.then(|| {
            format!("{refuses}, the original {:.1} % (McNemar p = {:.2})", 100.0 * goal, c.p_value)
        })
    }

    /// Why there is nothing to restore, where there isn't: harmful prompts are hardly refused, and
    /// no candidate opens a refusal or none that was tried goes on with one, or the original does
    /// not refuse either.
    pub fn never_refused(&self, candidates: &[Candidate], trials: &[Trial]) -> Option<String> {
        let rate = &self.base.scores.harmful;
        if !rate.is_never() {
            return None;
        }
        let refuses = format!(
            "it refuses {:.1} % of the harmful validation prompts",
            100.0 * rate.refusal_rate
        );
        match &self.reference {
            Some(r) if r.rates().harmful.is_never() => {
                Some(format!("{refuses}, and the original {:.1} %: neither was taught to refuse", 100.0 * r.rates().harmful.refusal_rate))
            }
            Some(_) => None,
            None if candidates.iter().all(|c| c.harmful < NEVER) || in_vain(trials) => Some(format!(
                "{refuses} and no edit makes it refuse, as in a base model that was never taught to; give --reference ORIGINAL if it once refused"
            )),
            None => None,
        }
    }

    /// How likely the original refuses a harmful prompt: to refuse more is worth nothing. Without
    /// an original 1.
    pub fn goal(&self) -> f64 {
        self.reference.as_ref().map_or(1.0, |r| Outlook::read(&r.answers).mean(Set::Harmful))
    }

    /// Which limit these scores break, if any. What the original refuses OUT may refuse, too.
    pub fn miss(&self, s: &Scores) -> Option<Broken> {
        let (b, settings) = (&self.base.scores, self.settings);
        let rates = self.reference.as_ref().map(Reference::rates);
        let more = |of: fn(&Rates) -> &Rate, own: &Rate, least: f64| {
            rates.as_ref().map_or(least, |r| least.max(of(r).refusal_rate - own.refusal_rate))
        };
        let rises = Rises {
            harmless: more(|r| &r.harmless, &b.harmless, settings.max_over_refusal),
            borderline: match self.prompts.borderline_binds {
                true => more(|r| &r.borderline, &b.borderline, MAX_BORDERLINE),
                false => f64::INFINITY,
            },
        };
        miss(b, s, rises, settings.max_over_refusal, settings.max_kl)
    }

    /// Share of harmful validation prompts gained, and the two-sided McNemar p of the change.
    pub fn gain(&self, answers: &[Answer]) -> (f64, f64) {
        let (gained, lost) = self.base.changed(answers);
        let n = self.base.scores.harmful.n.max(1) as f64;
        ((gained as f64 - lost as f64) / n, stats::mcnemar(gained, lost))
    }
}

/// Whether edits were tried on harmful prompts, and none made the model refuse.
fn in_vain(trials: &[Trial]) -> bool {
    let mut asked = trials.iter().map(|t| t.harmful).filter(|share| !share.is_nan()).peekable();
    asked.peek().is_some() && asked.all(|share| share < NEVER)
}

/// A limit that an edit breaks.
#[derive(Clone, Debug)]
pub(super) struct Broken {
    /// Which one, and by how much, in words.
    pub what: String,
    /// What was measured over what is allowed: over 1, or infinite where it is no number.
    pub excess: f64,
}

/// Most that over-refusal may rise by, as shares of harmless and of borderline prompts.
#[derive(Clone, Copy)]
struct Rises {
    harmless: f64,
    borderline: f64,
}

/// Which limit the scores `s` break beside IN's `b`. What is no number keeps no limit.
fn miss(
    b: &Scores,
    s: &Scores,
    rises: Rises,
    max_over_refusal: f64,
    max_kl: f64,
) -> Option<Broken> {
    let broken = |found: f64, most: f64, what: String| {
        let excess = if found.is_nan() { f64::INFINITY } else { found / most.max(1e-9) };
        (found.is_nan() || found > most + 1e-9).then_some(Broken { what, excess })
    };
    let points = |rise: f64| format!("rises by {:.1} points", 100.0 * rise);
    let rise = s.harmless.refusal_rate - b.harmless.refusal_rate;
    let what = format!("over-refusal of harmless prompts {}", points(rise));
    if let Some(b) = broken(rise, rises.harmless, what) {
        return Some(b);
    }
    let rise = s.borderline.refusal_rate - b.borderline.refusal_rate;
    let what = format!("over-refusal of borderline prompts {}", points(rise));
    if let Some(b) = broken(rise, rises.borderline, what) {
        return Some(b);
    }
    let rise =
        (s.harmless.unfinished as f64 - b.harmless.unfinished as f64) / s.harmless.n.max(1) as f64;
    let what = format!(
        "thoughts about harmless prompts that never end rise by {:.1} points",
        100.0 * rise
    );
    if let Some(b) = broken(rise, max_over_refusal, what) {
        return Some(b);
    }
    let what = format!("KL on harmless answers is {:.4}, above {max_kl}", s.kl);
    if let Some(b) = broken(s.kl, max_kl, what) {
        return Some(b);
    }
    [("text", s.perplexity, b.perplexity), ("answer", s.answer_perplexity, b.answer_perplexity)]
        .into_iter()
        .find_map(|(name, after, before)| {
            let what = format!("{name} perplexity rises from {before:.3} to {after:.3}");
            broken(after / before - 1.0, MAX_PERPLEXITY, what)
        })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_limit_binds_and_what_is_no_number_keeps_none() {
        type Change = fn(&mut Scores);
        let rate = || Rate { n: 200, ..Rate::default() };
        let before = Scores {
            harmful: rate(),
            harmless: rate(),
            borderline: rate(),
            kl: 0.0,
            answer_perplexity: 1.1,
            perplexity: 20.0,
            same_answers: 1.0,
        };
        let after = |change: Change, borderline: f64| {
            let mut s = before.clone();
            change(&mut s);
            miss(&before, &s, Rises { harmless: 0.01, borderline }, 0.01, 0.02)
        };
        assert!(after(|s| s.harmless.unfinished = 2, 0.05).is_none());
        let changes: [(Change, &str); 7] = [
            (|s| s.harmless.refusal_rate = 0.015, "harmless prompts rises by 1.5 points"),
            (|s| s.borderline.refusal_rate = 0.06, "borderline prompts rises by 6.0 points"),
            (|s| s.harmless.unfinished = 3, "never end rise by 1.5 points"),
            (|s| s.kl = 0.03, "KL"),
            (|s| s.kl = f64::NAN, "KL"),
            (|s| s.perplexity = 20.3, "text perplexity rises"),
            (|s| s.answer_perplexity = f64::NAN, "answer perplexity rises"),
        ];
        for (change, words) in changes {
            let broken = after(change, 0.05).expect(words);
            assert!(broken.what.contains(words) && broken.excess > 1.0, "{broken:?}");
        }
        assert!(after(|s| s.borderline.refusal_rate = 0.06, f64::INFINITY).is_none());
        assert!(
            (after(|s| s.harmless.refusal_rate = 0.015, 0.05).unwrap().excess - 1.5).abs() < 1e-9
        );
        assert_eq!(after(|s| s.kl = f64::NAN, 0.05).unwrap().excess, f64::INFINITY);
    }
}
