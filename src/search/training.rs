//! IN's answers to the training prompts, which directions and gates are made from.

use super::baseline::Baseline;
use super::gate_rows::reads_answer;
use crate::error::Result;
use crate::evaluate::{Answer, AnswerOptions, Asked};
use crate::text::{Set, Split};

/// The training prompts, answered.
pub(super) struct Training<'a> {
    /// The prompts; of a model that thinks every other one a second time, after a thought.
    pub asked: Asked<'a>,
    /// IN's answers.
    pub answers: Vec<Answer>,
}

impl<'a> Training<'a> {
    /// Asks IN.
    pub fn take(baseline: &Baseline<'a>) -> Result<Training<'a>> {
        let evaluator = baseline.evaluator;
        let train = baseline.prompts.split(Split::Train);
        // Thoughts take long.
        let thinks = baseline.validation.think();
        let again: Vec<_> = train.iter().copied().step_by(2).filter(|_| thinks).collect();
        let asked = evaluator.ask_twice(&train, &again)?;
        let options = baseline.answer_options();
        if asked.think() {
            let answers = evaluator.answer(&asked, options)?;
            return Ok(Training { asked, answers });
        }
        // Whether a prompt is refused shows early. Whole answers are wanted of those that gates
        // read.
        let short = AnswerOptions { max_new: options.max_new.div_ceil(2), ..options };
        let mut answers = evaluator.answer(&asked, short)?;
        let whole: Vec<usize> =
            (0..train.len()).filter(|&i| reads_answer(i) && train[i].set != Set::Harmful).collect();
        let longer: Vec<_> = whole.iter().map(|&i| train[i]).collect();
        for (i, a) in whole.into_iter().zip(evaluator.answers(&longer, options)?) {
            answers[i] = a;
        }
        Ok(Training { asked, answers })
    }

    /// Whether each prompt is refused, of those asked without a thought.
    pub fn refused(&self) -> Vec<bool> {
        self.answers[..self.asked.plain].iter().map(|a| a.refused).collect()
    }
}
