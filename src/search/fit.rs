//! What is measured of a model before and after: rates, divergence, perplexity.

use serde::Serialize;

use crate::error::Result;
use crate::evaluate::{Answer, Asked, Evaluator, Rate};
use crate::forward::Head;
use crate::text::Set;

/// A model's scores on one split.
#[derive(Clone, Debug, Serialize)]
pub struct Scores {
    /// Refusal of harmful prompts.
    pub harmful: Rate,
    /// Over-refusal of harmless prompts.
    pub harmless: Rate,
    /// Over-refusal of borderline prompts.
    pub borderline: Rate,
    /// Mean KL(IN ‖ this) over IN's own answers to harmless prompts, nats.
    pub kl: f64,
    /// Perplexity of IN's own answers to harmless prompts.
    pub answer_perplexity: f64,
    /// Perplexity of the built-in text.
    pub perplexity: f64,
    /// Share of harmless prompts that are answered token for token as IN answers them.
    pub same_answers: f64,
}

/// IN's answers and states, which candidates are compared with.
pub struct Baseline {
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

/// Measures IN, of whose answers to a split's prompts the refusals are counted already.
pub fn baseline(evaluator: &Evaluator, answers: Vec<Answer>) -> Result<Baseline> {
    let mut forced = Vec::new();
    for a in answers.iter().filter(|a| a.set == Set::Harmless && !a.answer.is_empty()) {
        forced.push((a.read.tokens.clone(), a.answer.clone()));
    }
    let (states, next) = evaluator.answer_states(&forced, 0)?;
    let scores = Scores {
        harmful: Rate::of(&answers, Set::Harmful),
        harmless: Rate::of(&answers, Set::Harmless),
        borderline: Rate::of(&answers, Set::Borderline),
        kl: 0.0,
        answer_perplexity: evaluator.perplexity_of(&states, &next)?,
        perplexity: evaluator.perplexity(0)?,
        same_answers: 1.0,
    };
    Ok(Baseline { answers, forced, states, next, scores })
}

impl Baseline {
    /// Measures another model, or an edit of this one, on the same prompts. The output matrix must be the same.
    pub fn measure(
        &self,
        evaluator: &Evaluator,
        asked: &Asked,
        edit: usize,
        max_new: usize,
        opening: &[u32],
    ) -> Result<(Scores, Vec<Answer>)> {
        let asked = evaluator.ask_again(asked, edit)?;
        let answers = evaluator.answer(&asked, edit, max_new, opening)?;
        let (states, _) = evaluator.answer_states(&self.forced, edit)?;
        let kl = Head::new(evaluator.model, evaluator.compute)?.kl(&self.states, &states)?;
        let harmless: Vec<bool> = self
            .answers
            .iter()
            .zip(&answers)
            .filter(|(a, _)| a.set == Set::Harmless)
            .map(|(a, b)| a.answer == b.answer)
            .collect();
        let scores = Scores {
            harmful: Rate::of(&answers, Set::Harmful),
            harmless: Rate::of(&answers, Set::Harmless),
            borderline: Rate::of(&answers, Set::Borderline),
            kl: kl.iter().sum::<f64>() / kl.len().max(1) as f64,
            answer_perplexity: evaluator.perplexity_of(&states, &self.next)?,
            perplexity: evaluator.perplexity(edit)?,
            same_answers: harmless.iter().filter(|x| **x).count() as f64 / harmless.len().max(1) as f64,
        };
        Ok((scores, answers))
    }

    /// How many harmful prompts are refused now and were not before, and the other way round.
    pub fn changed(&self, after: &[Answer]) -> (usize, usize) {
        let pairs = || self.answers.iter().zip(after).filter(|(a, _)| a.set == Set::Harmful);
        let gained = pairs().filter(|(a, b)| !a.refused && b.refused).count();
        let lost = pairs().filter(|(a, b)| a.refused && !b.refused).count();
        (gained, lost)
    }
}
