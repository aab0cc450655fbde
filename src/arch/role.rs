//! A block's tensors by what they do.

use super::row::NormNames;

/// What of a block writes into the residual stream ([`Spec::writers`] says what a block has).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Writer {
    /// `attn_output` in GGUF, `o_proj` in Hugging Face.
    Attention,
    /// `ffn_down` in GGUF, `down_proj` in Hugging Face.
    Ffn,
    /// The expert that every token runs through: `ffn_down_shexp`, `shared_expert.down_proj`.
    Shared,
    /// The routed experts, all of a block together: `ffn_down_exps`, `experts.….down_proj`. Their
    /// input is that of each expert times the router's weight, side by side: zero where an expert
    /// isn't chosen.
    Experts,
}

impl Writer {
    /// The role of this writer's matrices.
    pub fn role(self) -> Role {
        match self {
            Writer::Attention => Role::AttnOutput,
            Writer::Ffn => Role::FfnDown,
            Writer::Shared => Role::SharedDown,
            Writer::Experts => Role::ExpertDown,
        }
    }

    /// Its name in GGUF.
    pub fn name(self) -> &'static str {
        self.role().gguf()
    }
}

/// A block's tensors by what they do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub enum Role {
    AttnNorm,
    AttnQ,
    AttnK,
    AttnV,
    AttnQkv,
    AttnQNorm,
    AttnKNorm,
    AttnOutput,
    AttnPostNorm,
    FfnNorm,
    FfnPostNorm,
    FfnGate,
    FfnUp,
    FfnGateUp,
    FfnDown,
    Router,
    ExpertGate,
    ExpertUp,
    ExpertDown,
    SharedRouter,
    SharedGate,
    SharedUp,
    SharedDown,
}

impl Role {
    /// What stands in place of a feed-forward layer, or is one.
    pub(crate) const FEED_FORWARD: [Role; 11] = {
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
    pub(crate) fn takes_bias(self) -> bool {
        use Role::*;
        let attention = matches!(self, AttnQ | AttnK | AttnV | AttnQkv | AttnOutput);
        attention || matches!(self, FfnGate | FfnUp | FfnGateUp | FfnDown)
    }

    /// Whether it is a norm's weight.
    pub(crate) fn is_norm(self) -> bool {
        use Role::*;
        let of_block = matches!(self, AttnNorm | AttnPostNorm | FfnNorm | FfnPostNorm);
        of_block || matches!(self, AttnQNorm | AttnKNorm)
    }

    /// Whether only models with experts have it.
    pub(crate) fn is_experts(self) -> bool {
        use Role::*;
        matches!(
            self,
            Router
                | ExpertGate
                | ExpertUp
                | ExpertDown
                | SharedRouter
                | SharedGate
                | SharedUp
                | SharedDown
        )
    }

    pub(crate) fn gguf(self) -> &'static str {
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

    pub(crate) fn hugging_face(self, norms: &NormNames) -> &'static str {
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
