//! Gates and strengths, and folding an edit into an encoding.

pub mod fold;
pub mod gate;
pub mod stack;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::arch::Writer;

/// A rank-one term of one writer: y' = y + u (v·x), or y' = y + u where it has no gate.
#[derive(Clone, Debug, PartialEq)]
pub struct RankOne {
    /// The block, from 0.
    pub layer: usize,
    /// Which of its writers.
    pub writer: Writer,
    /// What is written, strength included: α·û, `[hidden]`.
    pub u: Vec<f32>,
    /// The gate over the writer's input, `[columns of the writer]`; of experts side by side, in
    /// their order. Empty: no gate, a constant is added at every token.
    pub v: Vec<f32>,
}

/// An edit: rank-one terms that belong together.
pub type Edit = Vec<RankOne>;

/// How the gate of an edit is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// v is a ridge solution that fires on harmful prompts at the deciding position only.
    Gated,
    /// v = Wᵀ r̂: strengthens what the layer writes along the direction; the baseline of Chhabra &
    /// Khalili 2025.
    Amplify,
    /// v = (W₀ − W)ᵀ r̂ with the original's W₀: the part along the direction that compression took.
    Restore,
    /// No gate: a constant, which a bias of the writer or a control vector carries. Touches every
    /// token.
    Add,
}

impl Method {
    /// Its name, as in reports.
    pub fn name(self) -> &'static str {
        match self {
            Method::Gated => "gated",
            Method::Amplify => "amplify",
            Method::Restore => "restore",
            Method::Add => "add",
        }
    }
}
