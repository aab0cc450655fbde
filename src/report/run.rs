//! The main job's record: what `--json` prints, what OUT.report.json holds, and what the HTML
//! report is drawn from.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{examples, model_card, Example};
use crate::edit::Method;
use crate::forward::Stage;
use crate::search::{Outcome, Settings};
use crate::text::{BySet, PromptSet};

/// The layout of every command's JSON.
pub const SCHEMA: u32 = 2;

/// One run of the main job.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct RunReport {
    /// [`SCHEMA`].
    pub schema: u32,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// IN, as the user named it.
    pub model: String,
    /// The prompts.
    pub prompts: PromptsUsed,
    /// The limits that the user can set.
    pub limits: LimitsUsed,
    /// Seconds that it took.
    pub seconds: f64,
    /// What its stages took.
    #[serde(default)]
    pub stages: Vec<Stage>,
    /// Most memory that it had, in bytes, where that is known.
    pub peak_memory: Option<u64>,
    /// What the products ran on.
    pub device: String,
    /// Most new tokens of an answer.
    pub max_new_tokens: usize,
    /// How the gate of the edit was made, where one was chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method: Option<Method>,
    /// A few test prompts with the openings of their answers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub examples: Vec<Example>,
    /// A section for a model card, in Markdown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_card: Option<String>,
    /// Where the reports lie, if any were written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report: Option<ReportPaths>,
}

/// Which prompts a run used.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct PromptsUsed {
    /// The hash of all prompts and their splits.
    pub sha256: String,
    /// Where each class came from: a path, or `built in`.
    pub sources: BySet<String>,
}

impl From<&PromptSet> for PromptsUsed {
    fn from(prompts: &PromptSet) -> PromptsUsed {
        PromptsUsed { sha256: prompts.sha256(), sources: prompts.sources.clone() }
    }
}

/// The limits that the user can set.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema)]
pub struct LimitsUsed {
    /// Most KL(IN ‖ OUT) on IN's own answers to harmless prompts, nats.
    pub max_kl: f64,
    /// Most rise of refusals of harmless prompts, as a share.
    pub max_over_refusal: f64,
}

/// Where the reports lie.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct ReportPaths {
    /// For people.
    pub html: String,
    /// For programs.
    pub json: String,
}

/// What the outcome does not know of its run.
#[derive(Clone, Debug)]
pub struct RunFacts {
    /// IN, as the user named it.
    pub model: String,
    /// What the products ran on.
    pub device: String,
    /// Seconds that it took.
    pub seconds: f64,
    /// What its stages took.
    pub stages: Vec<Stage>,
    /// Most memory that it had, in bytes, where that is known.
    pub peak_memory: Option<u64>,
}

impl RunReport {
    /// The record of an outcome.
    pub fn new(
        outcome: Outcome,
        prompts: &PromptSet,
        settings: &Settings,
        facts: RunFacts,
    ) -> RunReport {
        let RunFacts { model, device, seconds, stages, peak_memory } = facts;
        let mut report = RunReport {
            schema: SCHEMA,
            outcome,
            model,
            prompts: prompts.into(),
            limits: LimitsUsed {
                max_kl: settings.max_kl,
                max_over_refusal: settings.max_over_refusal,
            },
            seconds,
            stages,
            peak_memory,
            device,
            max_new_tokens: settings.max_new_tokens,
            method: None,
            examples: Vec::new(),
            model_card: None,
            report: None,
        };
        if let Outcome::Patched(p) = &report.outcome {
            report.method = Some(p.chosen.method);
            report.examples = examples(p);
            report.model_card = Some(model_card(p, &report));
        }
        report
    }
}

/// The JSON Schema of [`RunReport`], as docs/report.schema.json has it.
pub fn json_schema() -> String {
    let schema = schemars::schema_for!(RunReport);
    serde_json::to_string_pretty(&schema).unwrap_or_default() + "\n"
}
