//! What a run came to, as data for the table, the JSON and the report.

use std::path::PathBuf;

use serde::Serialize;

use super::{Candidate, Scores};
use crate::direction::Direction;
use crate::edit::fold::Achieved;
use crate::evaluate::{Answer, Change};

/// What came of a run.
#[derive(Debug, Serialize)]
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
        /// Scored candidates, when the search got that far.
        candidates: Vec<Candidate>,
    },
    /// No edit restores refusal inside the limits; nothing is written.
    OutOfLimits {
        /// Why, in words.
        why: String,
        /// IN on the validation prompts.
        validation: Box<Scores>,
        /// The candidates, best first.
        candidates: Vec<Candidate>,
    },
}

/// A written patch and what was measured of it.
#[derive(Debug, Serialize)]
pub struct Patched {
    /// What OUT is.
    pub emit: super::Emit,
    /// What a user types to load a sidecar.
    pub load: Option<String>,
    /// What OUT does not reach, in words.
    pub warning: Option<String>,
    /// OUT, when it was written (not in a dry run).
    pub out: Option<PathBuf>,
    /// sha256 of IN and of OUT.
    pub sha256: (String, String),
    /// Bytes of IN and of OUT.
    pub bytes: (u64, u64),
    /// The chosen edit.
    pub chosen: Candidate,
    /// All scored candidates.
    pub candidates: Vec<Candidate>,
    /// Touched tensors.
    pub tensors: Vec<TensorReport>,
    /// Validation prompts: IN and OUT. The choice was made on these.
    pub validation: (Scores, Scores),
    /// Test prompts: IN and OUT. Nothing was chosen on these. `None` in a dry run.
    pub test: Option<(Scores, Scores)>,
    /// Test prompts by set and category, paired: IN and OUT. Empty in a dry run.
    pub changes: Vec<Change>,
    /// Share of harmful validation prompts gained.
    pub gain: f64,
    /// Two-sided McNemar p of the change on the validation prompts.
    pub p_value: f64,
    /// The direction's scores by layer, deciding position.
    pub layers: Vec<LayerScore>,
    /// Test answers before and after.
    #[serde(skip)]
    pub answers: (Vec<Answer>, Vec<Answer>),
}

/// The direction's scores at one layer.
#[derive(Clone, Debug, Serialize)]
pub struct LayerScore {
    /// The block.
    pub layer: usize,
    /// Position counted from the deciding one: 0, -1, …
    pub position: isize,
    /// ‖μ_harmful − μ_harmless‖.
    pub gap: f64,
    /// Area under the ROC curve on validation prompts.
    pub auc: f64,
    /// Fisher ratio there.
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
#[derive(Clone, Debug, Serialize)]
pub struct TensorReport {
    /// Its name.
    pub tensor: String,
    /// Encoding before and after.
    pub encoding: (&'static str, &'static str),
    /// Strength of the edit, ‖u‖.
    pub asked: f64,
    /// The share of it that the stored weights carry, and what it took.
    #[serde(flatten)]
    pub achieved: Stored,
}

/// [`Achieved`] for reports.
#[derive(Clone, Debug, Serialize)]
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
    pub sparsity: (f64, f64),
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
