//! The outcome of a run, as data for the table, the JSON and the report.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Broken, Candidate, Original, Scan, Toward};
use crate::direction::Direction;
use crate::edit::fold::Achieved;
use crate::edit::Method;
use crate::evaluate::{Answer, Change, Rate, Scores};
use crate::output::Emit;
use crate::pair::Pair;
use crate::text::BySet;

/// What came of a run.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub enum Outcome {
    /// OUT is written.
    Patched(Box<Patched>),
    /// IN refuses as it should; nothing is written.
    NotNeeded {
        /// Why, in words.
        why: String,
        /// IN on the validation prompts.
        validation: Box<Scores>,
        /// The original, where one was given.
        #[serde(skip_serializing_if = "Option::is_none")]
        reference: Option<Box<Original>>,
        /// Scored candidates, when the search got that far.
        candidates: Vec<Candidate>,
    },
    /// No edit restores refusal inside the limits; nothing is written.
    OutOfLimits {
        /// Why, in words.
        why: String,
        /// IN on the validation prompts.
        validation: Box<Scores>,
        /// The original, where one was given.
        #[serde(skip_serializing_if = "Option::is_none")]
        reference: Option<Box<Original>>,
        /// Of the edits that were tried those that no other one beats in refusal, over-refusal and
        /// KL at once.
        front: Vec<Trial>,
        /// The candidates, best first.
        candidates: Vec<Candidate>,
        /// What writing does, block by block.
        scan: Box<Scan>,
    },
    /// IN refuses next to nothing and no edit makes it refuse: there is nothing to strengthen.
    /// Nothing is written.
    NeverRefused {
        /// Why, in words.
        why: String,
        /// IN on the validation prompts.
        validation: Box<Scores>,
        /// The original, where one was given.
        #[serde(skip_serializing_if = "Option::is_none")]
        reference: Option<Box<Original>>,
    },
}

/// A written patch and what was measured of it.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Patched {
    /// What OUT is.
    pub emit: Emit,
    /// What a user types to load a sidecar.
    pub load: Option<String>,
    /// What OUT does not reach, in words.
    pub warning: Option<String>,
    /// OUT, when it was written (not in a dry run).
    pub out: Option<PathBuf>,
    /// sha256 of IN and of OUT.
    pub sha256: Pair<String>,
    /// Bytes of IN and of OUT.
    pub bytes: Pair<u64>,
    /// The chosen edit.
    pub chosen: Candidate,
    /// All scored candidates.
    pub candidates: Vec<Candidate>,
    /// The edits that were tried as they would be written, in order.
    pub trials: Vec<Trial>,
    /// Touched tensors.
    pub tensors: Vec<TensorReport>,
    /// Validation prompts: IN and OUT. The choice was made on these.
    pub validation: Pair<Scores>,
    /// Test prompts: IN and OUT. Nothing was chosen on these. `None` in a dry run.
    pub test: Option<Pair<Scores>>,
    /// Test prompts with thinking on, for a model that can think: IN and OUT, each after its own
    /// thoughts, which are cut off and closed after [`crate::evaluate::THOUGHT`] tokens. `test` is
    /// with thinking off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thinking: Option<Pair<BySet<Rate>>>,
    /// The original, where one was given: its refusal is the goal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference: Option<Original>,
    /// Test prompts by set and category, paired: IN and OUT. Empty in a dry run.
    pub changes: Vec<Change>,
    /// Share of harmful validation prompts gained.
    pub gain: f64,
    /// Two-sided McNemar p of the change on the validation prompts.
    pub p_value: f64,
    /// The direction's scores by layer, deciding position.
    pub layers: Vec<LayerScore>,
    /// What writing does, block by block.
    pub scan: Scan,
    /// Test answers before and after.
    #[serde(skip)]
    pub answers: Pair<Vec<Answer>>,
}

impl Patched {
    /// What the report is about: test prompts with their scores, in a dry run validation prompts.
    pub fn measured(&self) -> (&'static str, &Pair<Scores>) {
        self.test.as_ref().map_or(("validation", &self.validation), |t| ("test", t))
    }

    /// The original's refusal on the prompts that the report is about: test prompts, in a dry run
    /// validation prompts.
    pub fn original(&self) -> Option<&BySet<Rate>> {
        self.reference.as_ref().map(|o| o.test.as_ref().unwrap_or(&o.validation))
    }
}

/// An edit as it would be written, by greedy answers to the validation prompts.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Trial {
    /// How its gate is made.
    pub method: Method,
    /// Which direction it writes along.
    pub toward: Toward,
    /// Where it edits, for people.
    pub place: String,
    /// Its strength.
    pub strength: f64,
    /// Prompts refused, as shares; no number (`null` in JSON) where a limit was broken before they
    /// were asked.
    #[serde(flatten, with = "crate::nan::by_set")]
    #[schemars(with = "BySet<Option<f64>>")]
    pub refused: BySet<f64>,
    /// KL(IN ‖ OUT) on harmless answers, nats.
    #[serde(with = "crate::nan")]
    #[schemars(with = "Option<f64>")]
    pub kl: f64,
    /// The limit that it breaks.
    pub broken: Option<Broken>,
}

impl Trial {
    pub(super) fn new(c: &Candidate, s: &Scores, broken: Option<Broken>) -> Trial {
        Trial {
            method: c.method,
            toward: c.toward,
            place: c.place(),
            strength: c.strength,
            refused: s.refusal.map(|r| r.refusal_rate),
            kl: s.kl,
            broken,
        }
    }

    /// At least as good in refusal, over-refusal and KL, and better in one.
    fn beats(&self, other: &Trial) -> bool {
        let costs =
            |t: &Trial| [-t.refused.harmful, t.refused.harmless, t.refused.borderline, t.kl];
        let (a, b) = (costs(self), costs(other));
        a.iter().zip(&b).all(|(x, y)| x <= y) && a != b
    }

    /// Those that no other one beats, most refusal first. Where each broke a limit before harmful
    /// prompts were asked: all, the smallest KL first.
    pub(super) fn front(trials: &[Trial]) -> Vec<Trial> {
        let best = |t: &&Trial| !t.refused.harmful.is_nan() && !trials.iter().any(|o| o.beats(t));
        let mut front: Vec<Trial> = trials.iter().filter(best).cloned().collect();
        if front.is_empty() {
            front = trials.to_vec();
        }
        front.sort_by(|a, b| {
            b.refused.harmful.total_cmp(&a.refused.harmful).then(a.kl.total_cmp(&b.kl))
        });
        front
    }
}

/// The direction's scores at one layer.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct LayerScore {
    /// The block.
    pub layer: usize,
    /// Position counted from the deciding one: 0, -1, …
    pub position: isize,
    /// ‖μ_harmful − μ_harmless‖.
    pub gap: f64,
    /// Area under the ROC curve on validation prompts; deciding position only, else NaN (`null` in
    /// JSON).
    #[serde(with = "crate::nan")]
    #[schemars(with = "Option<f64>")]
    pub auc: f64,
    /// Fisher ratio there; the same.
    #[serde(with = "crate::nan")]
    #[schemars(with = "Option<f64>")]
    pub fisher: f64,
    /// Cosine of the two halves' directions.
    pub split_half: f64,
}

impl From<&Direction> for LayerScore {
    fn from(d: &Direction) -> LayerScore {
        LayerScore {
            layer: d.layer,
            position: d.position,
            gap: d.gap,
            auc: d.auc,
            fisher: d.fisher,
            split_half: d.split_half,
        }
    }
}

/// A touched tensor.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct TensorReport {
    /// Its name.
    pub tensor: String,
    /// Encoding before and after.
    pub encoding: Pair<String>,
    /// Strength of the edit, ‖u‖.
    pub asked: f64,
    /// The share of it that the stored weights carry, and what it took.
    #[serde(flatten)]
    pub achieved: Stored,
}

/// [`Achieved`] for reports.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Stored {
    /// Share of the edit that is stored: 1 = all.
    pub achieved: f64,
    /// ‖ûᵀΔ − asked‖ / ‖asked‖.
    pub residue: f64,
    /// ‖u vᵀ‖ / ‖W‖.
    pub size: f64,
    /// Elements that changed.
    pub codes_moved: u64,
    /// All elements.
    pub elements: u64,
    /// Bytes that changed.
    pub bytes_changed: u64,
    /// Share of elements that are zero, before and after.
    pub sparsity: Pair<f64>,
}

impl From<Achieved> for Stored {
    fn from(a: Achieved) -> Stored {
        Stored {
            achieved: a.gain,
            residue: a.residue,
            size: a.size,
            codes_moved: a.codes_moved,
            elements: a.elements,
            bytes_changed: a.bytes_changed,
            sparsity: a.sparsity(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_front_holds_what_no_other_trial_beats() {
        let trial = |harmful, harmless, kl| Trial {
            method: Method::Gated,
            toward: Toward::Projected,
            place: String::new(),
            strength: 1.0,
            refused: BySet { harmful, harmless, borderline: 0.0 },
            kl,
            broken: None,
        };
        let front = Trial::front(&[
            trial(0.7, 0.0, 0.001),
            trial(0.9, 0.01, 0.002),
            trial(0.8, 0.01, 0.003), // beaten by the one before it
            trial(0.95, 0.05, 0.002),
            trial(0.6, 0.0, 0.0005),
        ]);
        assert_eq!(
            front.iter().map(|t| t.refused.harmful).collect::<Vec<_>>(),
            [0.95, 0.9, 0.7, 0.6]
        );
    }
}
