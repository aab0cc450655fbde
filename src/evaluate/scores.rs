//! What is measured of a model before and after: rates, divergence, perplexity.

use std::ops::Range;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Answer, AnswerOptions, Asked, Drafts, Evaluator, Rate, KL_POSITIONS};
use crate::error::Result;
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

impl Drift {
    /// From every position of IN's answers to harmless prompts.
    pub(super) fn new(kl: &[f64], log_probabilities: &[f32], perplexity: f64) -> Drift {
        Drift {
            kl: kl.iter().sum::<f64>() / kl.len().max(1) as f64,
            answer_perplexity: super::perplexity(log_probabilities),
            perplexity,
        }
    }
}

/// IN's own answers and states on a split's prompts, which edits are measured against.
pub struct Unedited {
    /// IN's answers on the split, prompts in order.
    pub answers: Vec<Answer>,
    /// (prompt tokens, answer tokens) of harmless prompts.
    forced: Vec<(Vec<u32>, Vec<u32>)>,
    /// IN's final states over them, and the tokens that they predict.
    states: Vec<f32>,
    next: Vec<u32>,
    /// By answer: its rows of `states`.
    rows: Vec<Option<Range<usize>>>,
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
        let mut end = 0;
        let rows = answers.iter().map(|a| {
            let n = if is_forced(a) { a.answer.len().min(KL_POSITIONS) } else { 0 };
            end += n;
            (n > 0).then_some(end - n..end)
        });
        let rows = rows.collect();
        let scores = Scores {
            refusal: BySet::over(&answers),
            kl: 0.0,
            answer_perplexity: evaluator.perplexity_of(&states, &next)?,
            perplexity: evaluator.perplexity()?,
            same_answers: 1.0,
        };
        Ok(Unedited { answers, forced, states, next, rows, scores })
    }

    /// IN's final states at the positions that predict the first tokens of an answer, `[tokens,
    /// hidden]`; `None` for an answer that divergence is not measured on.
    pub(super) fn states_of(&self, answer: usize, hidden: usize) -> Option<&[f32]> {
        let rows = self.rows[answer].clone()?;
        Some(&self.states[rows.start * hidden..rows.end * hidden])
    }

    /// IN's answers as drafts of an edited model's answers. `layer`: the first block that an edit
    /// touches. `None` where prompts are asked after thoughts, which differ under every edit, or
    /// where the states would take more than a quarter of the memory.
    pub fn drafts(
        &self,
        evaluator: &Evaluator,
        asked: &Asked,
        layer: usize,
    ) -> Result<Option<Drafts<'_>>> {
        if asked.think() {
            return Ok(None);
        }
        let tokens = asked.samples.iter().zip(&self.answers);
        let tokens = tokens.map(|(s, a)| s.tokens.len() + a.answer.len()).sum::<usize>();
        let tokens = tokens + evaluator.text().iter().map(Vec::len).sum::<usize>();
        if tokens * evaluator.model.spec.hidden * 4 > evaluator.memory / 4 {
            return Ok(None);
        }
        Ok(Some(Drafts::new(evaluator, asked, self, layer)?))
    }

    /// Measures another model, or an edit of this one, on IN's words. The output matrix must be the
    /// same.
    pub fn drift(&self, evaluator: &Evaluator) -> Result<Drift> {
        let d = evaluator.model.spec.hidden;
        let states = evaluator.answer_states(&self.forced)?.0;
        let beside: Vec<(usize, &[f32])> = self.states.chunks_exact(d).enumerate().collect();
        let next = |row: usize| &self.next[row..row + 1];
        let (reads, kl) = evaluator.read_beside(&states, 0, next, &beside)?;
        let log_probabilities: Vec<f32> = reads.iter().map(|r| r.asked[0]).collect();
        Ok(Drift::new(&kl, &log_probabilities, evaluator.perplexity()?))
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
            let drift = drafts.drift(evaluator, &read)?;
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
