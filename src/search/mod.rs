//! Chooses the edit that restores refusal inside the limits: candidates are scored in one pass over
//! the weights, a few finalists by greedy generation (docs/METHOD.md, "The search").

mod baseline;
mod candidates;
mod derive;
mod gate_rows;
mod gates;
mod lengths;
mod limits;
mod outcome;
mod patch;
mod rank;
mod reference;
mod scan;
mod score;
mod settings;
mod training;
mod trial;
mod worth;
mod write;
mod writers;

pub use candidates::Candidate;
pub use derive::{derive, Derived};
pub use limits::{Broken, Limit};
pub use outcome::{LayerScore, Outcome, Patched, Stored, TensorReport, Trial};
pub use patch::patch;
pub use reference::Original;
pub use scan::{Effect, Scan};
pub use settings::{
    EncodingChoice, Settings, Source, HEALTHY, LEAST_GAIN, MAX_BORDERLINE, MAX_PERPLEXITY, SOUND,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The direction that an edit writes along.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Toward {
    /// The model's own difference of means, without its part along the mean harmless state.
    Projected,
    /// The model's own mean state of refused less that of answered prompts, as
    /// [`Toward::Projected`].
    Refused,
    /// The original's, as [`Toward::Projected`]; its gap there is the unit of strength.
    Original,
    /// The original's mean state of harmful prompts less that of the model: what compression took.
    Taken,
    /// One that was given: saved, or random.
    Given,
}

impl Toward {
    /// For people.
    pub fn words(self) -> &'static str {
        match self {
            Toward::Projected => "the model's own direction from harmless to harmful",
            Toward::Refused => "the model's own direction from answered to refused",
            Toward::Original => "the original's direction",
            Toward::Taken => "what compression took",
            Toward::Given => "the given direction",
        }
    }
}
