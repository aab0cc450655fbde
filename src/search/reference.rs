//! The original before compression: what it refuses is the goal, its directions and matrices say
//! what compression took.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::baseline::directions;
use super::Settings;
use crate::arch::Spec;
use crate::compare::same_shape;
use crate::direction::Direction;
use crate::edit::Method;
use crate::error::{Error, Result};
use crate::evaluate::{stats, Answer, AnswerOptions, Change, Evaluator, Rate};
use crate::text::{BySet, PromptSet, Set, Split};

/// What the original says, once it has run. Its weights stay mapped.
pub(super) struct Reference<'a> {
    pub evaluator: &'a Evaluator<'a>,
    /// Its answers to the validation prompts.
    pub answers: Vec<Answer>,
    /// Its directions at the deciding position, block by block.
    pub directions: Vec<Direction>,
}

/// The original's refusal, for reports.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Original {
    /// Its file.
    pub model: String,
    /// On validation prompts: the goal.
    pub validation: BySet<Rate>,
    /// On test prompts. `None` where none were run.
    pub test: Option<BySet<Rate>>,
}

impl<'a> Reference<'a> {
    /// Runs the original: its answers, and its activations, of which means are kept.
    ///
    /// # Errors
    /// It is no original of `input`; what the forward pass says.
    pub fn take(
        evaluator: &'a Evaluator<'a>,
        input: &Evaluator,
        prompts: &PromptSet,
        settings: &Settings,
    ) -> Result<Reference<'a>> {
        fits(evaluator, input, prompts)?;
        if settings.method == Some(Method::Restore) && !same_writers(evaluator, input) {
            return Err(Error::Model(format!(
                "{}: its attention or feed-forward width is not that of {}; `method` restore \
                 needs matrices of equal shape, use `method` auto",
                path(evaluator),
                path(input)
            )));
        }
        let validation = prompts.split(Split::Validation);
        let asked = evaluator.ask_twice(&validation, &validation)?;
        let answers = evaluator.answer(&asked, AnswerOptions::new(settings.max_new_tokens))?;
        let mut directions = directions(evaluator, prompts, &[], Vec::new())?;
        directions.retain(|d| d.position == 0);
        let reference = Reference { evaluator, answers, directions };
        let rates = reference.rates();
        evaluator.progress.note(&format!(
            "the original refuses {:.1} % of the harmful validation prompts, {:.1} % of the \
             harmless and {:.1} % of the borderline ones",
            100.0 * rates.harmful.refusal_rate,
            100.0 * rates.harmless.refusal_rate,
            100.0 * rates.borderline.refusal_rate
        ));
        Ok(reference)
    }

    /// Its refusal of validation prompts.
    pub fn rates(&self) -> BySet<Rate> {
        BySet::over(&self.answers)
    }

    /// What reports say of it.
    pub fn original(&self) -> Original {
        Original { model: path(self.evaluator), validation: self.rates(), test: None }
    }

    /// Whether `answers` to the validation prompts refuse as many harmful ones, to within a
    /// standard error of the paired difference.
    pub fn is_reached(&self, answers: &[Answer]) -> bool {
        let c = Change::of(&self.answers, answers, Set::Harmful, None);
        let short = c.rates.before.refusal_rate - c.rates.after.refusal_rate;
        short <= stats::paired_error(c.gained, c.lost, c.rates.before.n) + 1e-9
    }

    /// By what share of harmful validation prompts `answers` refuse more than the original, beyond
    /// a standard error of the paired difference: a goal is not to be overshot.
    pub fn overshoot(&self, answers: &[Answer]) -> f64 {
        let c = Change::of(&self.answers, answers, Set::Harmful, None);
        let more = c.rates.after.refusal_rate - c.rates.before.refusal_rate;
        let beyond = more - stats::paired_error(c.gained, c.lost, c.rates.before.n);
        if beyond > 1e-9 {
            beyond
        } else {
            0.0
        }
    }

    /// Whether its matrices can be set against those of `input`.
    pub fn same_writers(&self, input: &Evaluator) -> bool {
        same_writers(self.evaluator, input)
    }
}

fn path(evaluator: &Evaluator) -> String {
    evaluator.model.file.path().display().to_string()
}

fn same_writers(a: &Evaluator, b: &Evaluator) -> bool {
    let (a, b) = (&a.model.spec, &b.model.spec);
    // Delta nets have their columns in another order in GGUF files than in folders.
    let widths = |s: &Spec| -> Vec<(usize, usize)> {
        s.blocks.iter().map(|b| (b.ffn, s.heads * b.head_dim)).collect()
    };
    (widths(a), &a.experts, &a.delta) == (widths(b), &b.experts, &b.delta)
}

/// # Errors
/// The original is IN itself, another model, or reads prompts in other tokens.
fn fits(original: &Evaluator, input: &Evaluator, prompts: &PromptSet) -> Result<()> {
    let (a, b) = (path(original), path(input));
    let real = |e: &Evaluator| std::fs::canonicalize(e.model.file.path()).ok();
    if real(original).is_some_and(|p| Some(p) == real(input)) {
        return Err(Error::Model(format!(
            "{a}: the reference is IN itself; give the model before compression"
        )));
    }
    same_shape(original.model, input.model)?;
    let (x, y) = (original.model.spec.vocab, input.model.spec.vocab);
    if x != y {
        return Err(Error::Model(format!(
            "{a} has {x} tokens, {b} has {y}; `reference` must be the original of IN"
        )));
    }
    for p in &prompts.prompts {
        let (x, y) = (original.sample(&p.prompt)?.tokens, input.sample(&p.prompt)?.tokens);
        if x != y {
            let at = x.iter().zip(&y).take_while(|(x, y)| x == y).count();
            return Err(Error::Model(format!(
                "{a} reads prompt {} in other tokens than {b} (from token {at} on: {:?}, \
                 IN: {:?}); give both the same `chat_template` or `tokenizer`",
                p.id,
                x.get(at),
                y.get(at)
            )));
        }
    }
    Ok(())
}
