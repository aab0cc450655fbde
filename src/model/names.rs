//! What a role's tensor is called in each kind of checkpoint.

use super::Role;
use crate::checkpoint::Checkpoint;

/// A checkpoint's way to name its tensors.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Names {
    /// `blk.3.ffn_down.weight`
    Gguf,
    /// `model.layers.3.mlp.down_proj.weight`
    HuggingFace {
        /// What is in front of `layers.`: `model.`, of a multimodal model `model.language_model.` and the like.
        prefix: String,
        /// The output matrix, where the model has one of its own.
        head: String,
    },
}

/// The prefixes of language models, with their output matrices.
const PREFIXES: [(&str, &str); 5] = [
    ("model.", "lm_head.weight"),
    ("model.language_model.", "lm_head.weight"),
    ("language_model.model.", "language_model.lm_head.weight"),
    ("language_model.", "lm_head.weight"),
    ("", "lm_head.weight"),
];

impl Names {
    /// The names that fit a checkpoint.
    pub fn of(file: &Checkpoint) -> Names {
        let Checkpoint::Folder(folder) = file else { return Names::Gguf };
        let has = |prefix: &str| folder.tensor(&format!("{prefix}embed_tokens.weight")).is_some();
        let (prefix, head) = PREFIXES.into_iter().find(|(p, _)| has(p)).unwrap_or(PREFIXES[0]);
        Names::HuggingFace { prefix: prefix.into(), head: head.into() }
    }

    /// What every tensor of a block begins with.
    pub fn block(&self, layer: usize) -> String {
        match self {
            Names::Gguf => format!("blk.{layer}."),
            Names::HuggingFace { prefix, .. } => format!("{prefix}layers.{layer}."),
        }
    }

    /// A role's module: the name without `.weight` or `.bias`.
    pub fn module(&self, role: Role, layer: usize) -> String {
        let name = match self {
            Names::Gguf => role.gguf(),
            Names::HuggingFace { .. } => role.hugging_face(),
        };
        format!("{}{name}", self.block(layer))
    }

    /// The token embedding.
    pub fn embedding(&self) -> String {
        match self {
            Names::Gguf => "token_embd.weight".into(),
            Names::HuggingFace { prefix, .. } => format!("{prefix}embed_tokens.weight"),
        }
    }

    /// The output matrix.
    pub fn output(&self) -> &str {
        match self {
            Names::Gguf => "output.weight",
            Names::HuggingFace { head, .. } => head,
        }
    }

    /// The final norm.
    pub fn output_norm(&self) -> String {
        match self {
            Names::Gguf => "output_norm.weight".into(),
            Names::HuggingFace { prefix, .. } => format!("{prefix}norm.weight"),
        }
    }
}

impl Role {
    /// Every role.
    pub(super) const ALL: [Role; 11] = {
        use Role::*;
        [AttnNorm, AttnQ, AttnK, AttnV, AttnQNorm, AttnKNorm, AttnOutput, FfnNorm, FfnGate, FfnUp, FfnDown]
    };

    fn gguf(self) -> &'static str {
        match self {
            Role::AttnNorm => "attn_norm",
            Role::AttnQ => "attn_q",
            Role::AttnK => "attn_k",
            Role::AttnV => "attn_v",
            Role::AttnQNorm => "attn_q_norm",
            Role::AttnKNorm => "attn_k_norm",
            Role::AttnOutput => "attn_output",
            Role::FfnNorm => "ffn_norm",
            Role::FfnGate => "ffn_gate",
            Role::FfnUp => "ffn_up",
            Role::FfnDown => "ffn_down",
        }
    }

    pub(super) fn hugging_face(self) -> &'static str {
        match self {
            Role::AttnNorm => "input_layernorm",
            Role::AttnQ => "self_attn.q_proj",
            Role::AttnK => "self_attn.k_proj",
            Role::AttnV => "self_attn.v_proj",
            Role::AttnQNorm => "self_attn.q_norm",
            Role::AttnKNorm => "self_attn.k_norm",
            Role::AttnOutput => "self_attn.o_proj",
            Role::FfnNorm => "post_attention_layernorm",
            Role::FfnGate => "mlp.gate_proj",
            Role::FfnUp => "mlp.up_proj",
            Role::FfnDown => "mlp.down_proj",
        }
    }
}
