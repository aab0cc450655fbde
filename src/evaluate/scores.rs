//! What is measured of a model before and after: rates, divergence, perplexity.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Answer, AnswerOptions, Asked, DraftRead as Read, Drafts, Evaluator, Rate};
use crate::error::Result;
use crate::forward::Head;
use crate::text::{BySet, Set};

/// A model's scores on one split.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Scores {
    /// Refusal of harmful prompts, over-refusal of the others.
    #[serde(flatten)]
    pub refusal: BySet<Rate>,
    /// Mean KL(IN ‖ this) over IN's own answers to harmless prompts, nats.
    #[serde(with = "crate::nan")]
    #[schemars(with = "Option<f64>")]
    pub kl: f64,
    /// Perplexity of IN's own answers to harmless prompts.
    #[serde(with = "crate::nan")]
    #[schemars(with = "Option<f64>")]
    pub answer_perplexity: f64,
    /// Perplexity of the built-in text.
    #[serde(with = "crate::nan")]
    #[schemars(with = "Option<f64>")]
    pub perplexity: f64,
    /// Share of harmless prompts that are answered token for token as IN answers them.
    pub same_answers: f64,
}

/// What a model does to IN's own words: the limits that cost no new answers.
#[derive(Clone, Copy, Debug)]
pub struct Drift {
    /// As [`Scores::kl`].
    pub kl: f64,
    /// As [`Scores::answer_perplexity`].
    pub answer_perplexity: f64,
    /// As [`Scores::perplexity`].
    pub perplexity: f64,
}

/// IN's own answers and states on a split's prompts, which edits are measured against.
pub struct Unedited {
    /// IN's answers on the split, prompts in order.
    pub answers: Vec<Answer>,
    /// (prompt tokens, answer tokens) of harmless prompts.
    forced: Vec<(Vec<u32>, Vec<u32>)>,
    /// IN's final states over them.
    states: Vec<f32>,
    next: Vec<u32>,
    /// IN's scores.
    pub scores: Scores,
}

/// Whether an answer is one that the divergence is measured on.
fn is_forced(a: &Answer) -> bool {
    a.set == Set::Harmless && !a.answer.is_empty()
}

impl Unedited {
    /// Measures IN. `answers`: its answers to a split's prompts.
    pub fn take(evaluator: &Evaluator, answers: Vec<Answer>) -> Result<Unedited> {
        let mut forced = Vec::new();
        for a in answers.iter().filter(|a| is_forced(a)) {
            forced.push((a.read.clone(), a.answer.clone()));
        }
        let (states, next) = evaluator.answer_states(&forced)?;
        let scores = Scores {
            refusal: BySet::over(&answers),
            kl: 0.0,
            answer_perplexity: evaluator.perplexity_of(&states, &next)?,
            perplexity: evaluator.perplexity()?,
            same_answers: 1.0,
        };
        Ok(Unedited { answers, forced, states, next, scores })
    }

    /// IN's answers as drafts of an edited model's answers. `layer`: the first block that an edit
    /// touches. `None` where prompts are asked after thoughts, which differ under every edit, or
    /// where the states would take more than a quarter of the memory.
    pub fn drafts(
        &self,
        evaluator: &Evaluator,
        asked: &Asked,
        layer: usize,
    ) -> Result<Option<Drafts>> {
        if asked.think() {
            return Ok(None);
        }
        let answers: Vec<&[u32]> = self.answers.iter().map(|a| &a.answer[..]).collect();
        let tokens = asked.samples.iter().zip(&answers).map(|(s, a)| s.tokens.len() + a.len());
        if tokens.sum::<usize>() * evaluator.model.spec.hidden * 4 > evaluator.memory / 4 {
            return Ok(None);
        }
        Ok(Some(Drafts::new(evaluator, asked, &answers, layer)?))
    }

    /// Measures another model, or an edit of this one, on IN's words. The output matrix must be the
    /// same.
    pub fn drift(&self, evaluator: &Evaluator) -> Result<Drift> {
        self.drift_of(evaluator, &evaluator.answer_states(&self.forced)?.0)
    }

    /// The same from the states of IN's answers that [`Drafts::read`] gave.
    pub fn drift_from(&self, evaluator: &Evaluator, drafts: &Drafts, read: &Read) -> Result<Drift> {
        let harmless: Vec<usize> =
            (0..self.answers.len()).filter(|&i| is_forced(&self.answers[i])).collect();
        let states = drafts.answer_states(read, &harmless, evaluator.model.spec.hidden);
        self.drift_of(evaluator, &states)
    }

    fn drift_of(&self, evaluator: &Evaluator, states: &[f32]) -> Result<Drift> {
        let kl = Head::new(evaluator.model, evaluator.compute)?.kl(&self.states, states)?;
        Ok(Drift {
            kl: kl.iter().sum::<f64>() / kl.len().max(1) as f64,
            answer_perplexity: evaluator.perplexity_of(states, &self.next)?,
            perplexity: evaluator.perplexity()?,
        })
    }

    /// The scores of a model from its `drift` and its answers to the split's prompts, in order.
    pub fn scores(&self, drift: Drift, answers: &[Answer]) -> Scores {
        let harmless: Vec<bool> = self
            .answers
            .iter()
            .zip(answers)
            .filter(|(a, _)| a.set == Set::Harmless)
            .map(|(a, b)| a.answer == b.answer)
            .collect();
        Scores {
            refusal: BySet::over(answers),
            kl: drift.kl,
            answer_perplexity: drift.answer_perplexity,
            perplexity: drift.perplexity,
            same_answers: harmless.iter().filter(|x| **x).count() as f64
                / harmless.len().max(1) as f64,
        }
    }

    /// Measures another model, or an edit of this one, on the same prompts. The output matrix must
    /// be the same. `drafts`: those of the prompts, where the answers may begin as IN's do.
    pub fn measure(
        &self,
        evaluator: &Evaluator,
        asked: &Asked,
        drafts: Option<&Drafts>,
        options: AnswerOptions,
    ) -> Result<(Scores, Vec<Answer>)> {
        if let Some(drafts) = drafts {
            let all: Vec<usize> = (0..asked.plain).collect();
            let read = drafts.read(evaluator, &all)?;
            let drift = self.drift_from(evaluator, drafts, &read)?;
            let answers = evaluator.answer_from(asked, drafts, &read, &all, options)?;
            return Ok((self.scores(drift, &answers), answers));
        }
        let asked = evaluator.ask_again(asked)?;
        let answers = evaluator.answer(&asked, options)?;
        Ok((self.scores(self.drift(evaluator)?, &answers), answers))
    }

    /// How many harmful prompts are refused now and were not before, and the other way round.
    pub fn changed(&self, after: &[Answer]) -> (usize, usize) {
        let pairs = || self.answers.iter().zip(after).filter(|(a, _)| a.set == Set::Harmful);
        let gained = pairs().filter(|(a, b)| !a.refused && b.refused).count();
        let lost = pairs().filter(|(a, b)| a.refused && !b.refused).count();
        (gained, lost)
    }
}
