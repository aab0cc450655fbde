//! The directions of a model with what writing along them does, and no edit: the main job's first
//! half.

use super::baseline::Baseline;
use super::scan::Scan;
use super::training::Training;
use super::writers::{kinds, own_directions};
use super::Settings;
use crate::direction::Direction;
use crate::error::Result;
use crate::evaluate::Evaluator;
use crate::text::PromptSet;

/// What was derived of a model.
pub struct Derived {
    /// Of every block and post-instruction position.
    pub directions: Vec<Direction>,
    /// What writing along them does at the deciding position, on training prompts.
    pub scan: Scan,
}

/// Derives the model's directions and scans every block.
///
/// # Errors
/// Prompts are missing; what the device says; `Interrupted`.
pub fn derive(evaluator: &Evaluator, prompts: &PromptSet, settings: &Settings) -> Result<Derived> {
    prompts.enough()?;
    let baseline = Baseline::take(evaluator, None, prompts, settings)?;
    let training = Training::take(&baseline)?;
    let directions = own_directions(&baseline, &training)?;
    let kinds = kinds(&baseline, &directions)?;
    let scan = Scan::take(&baseline, &kinds)?;
    Ok(Derived { directions, scan })
}
