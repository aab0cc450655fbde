//! What a role's tensor is called in each kind of checkpoint.

use super::arch::{Arch, NormNames};
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
        /// What a block calls its experts' module: `mlp`, of Mixtral `block_sparse_moe`.
        moe: &'static str,
        /// What a block calls its norms.
        norms: NormNames,
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
        let mixtral = folder.tensors().iter().any(|t| t.name.contains(".block_sparse_moe."));
        let moe = if mixtral { "block_sparse_moe" } else { "mlp" };
        // Of an unknown architecture nothing is run, whatever it calls its norms.
        let plain = ["input_layernorm", "", "post_attention_layernorm", ""];
        let norms = Arch::of(file).map_or(plain, Arch::norm_names);
        Names::HuggingFace { prefix: prefix.into(), head: head.into(), moe, norms }
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
            Names::HuggingFace { moe, .. } if role == Role::Router => &format!("{moe}.gate"),
            Names::HuggingFace { norms, .. } => role.hugging_face(norms),
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
    /// What stands in place of a feed-forward layer, or is one.
    pub(super) const FEED_FORWARD: [Role; 11] = {
        use Role::*;
        [
            FfnGate,
            FfnUp,
            FfnDown,
            Router,
            ExpertGate,
            ExpertUp,
            ExpertDown,
            SharedRouter,
            SharedGate,
            SharedUp,
            SharedDown,
        ]
    };

    /// Whether the forward pass adds a bias where the file has one.
    pub(super) fn takes_bias(self) -> bool {
        use Role::*;
        let attention = matches!(self, AttnQ | AttnK | AttnV | AttnQkv | AttnOutput);
        attention || matches!(self, FfnGate | FfnUp | FfnGateUp | FfnDown)
    }

    /// Whether it is a norm's weight.
    pub(super) fn is_norm(self) -> bool {
        use Role::*;
        let of_block = matches!(self, AttnNorm | AttnPostNorm | FfnNorm | FfnPostNorm);
        of_block || matches!(self, AttnQNorm | AttnKNorm)
    }

    /// Whether only models with experts have it.
    pub(super) fn is_experts(self) -> bool {
        use Role::*;
        matches!(
            self,
            Router | ExpertGate | ExpertUp | ExpertDown | SharedRouter | SharedGate | SharedUp | SharedDown
        )
    }

    pub(super) fn gguf(self) -> &'static str {
        match self {
            Role::AttnNorm => "attn_norm",
            Role::AttnQ => "attn_q",
            Role::AttnK => "attn_k",
            Role::AttnV => "attn_v",
            Role::AttnQkv => "attn_qkv",
            Role::AttnQNorm => "attn_q_norm",
            Role::AttnKNorm => "attn_k_norm",
            Role::AttnOutput => "attn_output",
            Role::AttnPostNorm => "post_attention_norm",
            Role::FfnNorm => "ffn_norm",
            Role::FfnPostNorm => "post_ffw_norm",
            Role::FfnGate => "ffn_gate",
            Role::FfnUp | Role::FfnGateUp => "ffn_up",
            Role::FfnDown => "ffn_down",
            Role::Router => "ffn_gate_inp",
            Role::ExpertGate => "ffn_gate_exps",
            Role::ExpertUp => "ffn_up_exps",
            Role::ExpertDown => "ffn_down_exps",
            Role::SharedRouter => "ffn_gate_inp_shexp",
            Role::SharedGate => "ffn_gate_shexp",
            Role::SharedUp => "ffn_up_shexp",
            Role::SharedDown => "ffn_down_shexp",
        }
    }

    pub(super) fn hugging_face(self, norms: &NormNames) -> &'static str {
        match self {
            Role::AttnNorm => norms[0],
            Role::AttnPostNorm => norms[1],
            Role::FfnNorm => norms[2],
            Role::FfnPostNorm => norms[3],
            Role::AttnQkv => "self_attn.qkv_proj",
            Role::FfnGateUp => "mlp.gate_up_proj",
            Role::AttnQ => "self_attn.q_proj",
            Role::AttnK => "self_attn.k_proj",
            Role::AttnV => "self_attn.v_proj",
            Role::AttnQNorm => "self_attn.q_norm",
            Role::AttnKNorm => "self_attn.k_norm",
            Role::AttnOutput => "self_attn.o_proj",
            Role::FfnGate => "mlp.gate_proj",
            Role::FfnUp => "mlp.up_proj",
            Role::FfnDown => "mlp.down_proj",
            Role::Router => "mlp.gate",
            Role::ExpertGate | Role::ExpertUp | Role::ExpertDown => "mlp.experts",
            Role::SharedRouter => "mlp.shared_expert_gate",
            Role::SharedGate => "mlp.shared_expert.gate_proj",
            Role::SharedUp => "mlp.shared_expert.up_proj",
            Role::SharedDown => "mlp.shared_expert.down_proj",
        }
    }
}
