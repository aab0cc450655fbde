//! The roles of a block's tensors: what each tensor does.

use super::row::{NormNames, GGUF_NORMS};

/// A layer of a block that writes into the residual stream. [`Spec::writers`](super::Spec::writers)
/// lists the writers of a block.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Writer {
    /// `attn_output` in GGUF, `o_proj` in Hugging Face.
    Attention,
    /// `ffn_down` in GGUF, `down_proj` in Hugging Face.
    Ffn,
    /// The shared expert, through which every token runs: `ffn_down_shexp`,
    /// `shared_expert.down_proj`.
    Shared,
    /// The routed experts of a block, taken together: `ffn_down_exps`, `experts.….down_proj`. The
    /// input of this writer holds, side by side, the input of each expert times the router's
    /// weight. The part of an expert that isn't chosen is zero.
    Experts,
    /// The delta net that takes the place of attention in some blocks: `ssm_out`,
    /// `linear_attn.out_proj`.
    Delta,
}

impl Writer {
    /// The role of this writer's matrices.
    pub fn role(self) -> Role {
        match self {
            Writer::Attention => Role::AttnOutput,
            Writer::Ffn => Role::FfnDown,
            Writer::Shared => Role::SharedDown,
            Writer::Experts => Role::ExpertDown,
            Writer::Delta => Role::DeltaOutput,
        }
    }

    /// The writer's name in GGUF.
    pub fn name(self) -> &'static str {
        self.role().gguf()
    }
}

/// The role of a tensor in its block.
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
    AttnSinks,
    AttnOutput,
    AttnPostNorm,
    FfnNorm,
    FfnPostNorm,
    FfnGate,
    FfnUp,
    FfnGateUp,
    FfnDown,
    Router,
    RouterCorrection,
    ExpertGate,
    ExpertUp,
    ExpertGateUp,
    ExpertDown,
    RouterScale,
    ExpertScale,
    ExpertNorm,
    ExpertPostNorm,
    DensePostNorm,
    SharedRouter,
    SharedGate,
    SharedUp,
    SharedDown,
    PerLayerGate,
    PerLayerOutput,
    PerLayerNorm,
    OutputScale,
    DeltaQkv,
    DeltaGate,
    DeltaBeta,
    DeltaAlpha,
    DeltaConv,
    DeltaRate,
    DeltaStep,
    DeltaNorm,
    DeltaOutput,
}

impl Role {
    /// The roles of a feed-forward layer with separate gate and up projections, and of experts.
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

    /// Whether the forward pass adds a bias of this role, if the file has one.
    pub(crate) fn takes_bias(self) -> bool {
        use Role::*;
        let attention = matches!(self, AttnQ | AttnK | AttnV | AttnQkv | AttnOutput);
        attention || matches!(self, FfnGate | FfnUp | FfnGateUp | FfnDown)
    }

    /// Whether the tensor is a vector, or is read as one (a delta net's convolution).
    pub(crate) fn is_vector(self) -> bool {
        use Role::*;
        let of_block = matches!(self, AttnNorm | AttnPostNorm | FfnNorm | FfnPostNorm);
        of_block
            || matches!(self, AttnQNorm | AttnKNorm | AttnSinks)
            || matches!(self, RouterScale | ExpertScale | PerLayerNorm | OutputScale)
            || matches!(self, ExpertNorm | ExpertPostNorm | DensePostNorm)
            || matches!(self, DeltaConv | DeltaRate | DeltaStep | DeltaNorm)
    }

    /// What follows the module in the tensor's name.
    pub(crate) fn ending(self) -> &'static str {
        match self {
            Role::AttnSinks | Role::RouterCorrection | Role::DeltaRate | Role::DeltaStep => "",
            Role::RouterScale | Role::ExpertScale | Role::OutputScale => "",
            _ => ".weight",
        }
    }

    /// Whether only models with experts have such a tensor.
    pub(crate) fn is_experts(self) -> bool {
        use Role::*;
        matches!(
            self,
            Router
                | RouterCorrection
                | ExpertGate
                | ExpertUp
                | ExpertGateUp
                | ExpertDown
                | RouterScale
                | ExpertScale
                | SharedRouter
                | SharedGate
                | SharedUp
                | SharedDown
        )
    }

    /// The module in GGUF files, without the block's prefix.
    pub(crate) fn gguf(self) -> &'static str {
        self.gguf_with(&GGUF_NORMS)
    }

    /// As [`Role::gguf`], with these modules of norms.
    pub(crate) fn gguf_with(self, norms: &NormNames) -> &'static str {
        match self {
            Role::AttnNorm => norms[0],
            Role::AttnQ => "attn_q",
            Role::AttnK => "attn_k",
            Role::AttnV => "attn_v",
            Role::AttnQkv => "attn_qkv",
            Role::AttnQNorm => "attn_q_norm",
            Role::AttnKNorm => "attn_k_norm",
            Role::AttnSinks => "attn_sinks.weight",
            Role::AttnOutput => "attn_output",
            Role::AttnPostNorm => norms[1],
            Role::FfnNorm => norms[2],
            Role::FfnPostNorm => norms[3],
            Role::FfnGate => "ffn_gate",
            Role::FfnUp | Role::FfnGateUp => "ffn_up",
            Role::FfnDown => "ffn_down",
            Role::Router => "ffn_gate_inp",
            Role::RouterCorrection => "exp_probs_b.bias",
            Role::ExpertGate => "ffn_gate_exps",
            Role::ExpertUp => "ffn_up_exps",
            Role::ExpertGateUp => "ffn_gate_up_exps",
            Role::ExpertDown => "ffn_down_exps",
            Role::RouterScale => "ffn_gate_inp.scale",
            Role::ExpertScale => "ffn_down_exps.scale",
            Role::ExpertNorm => "pre_ffw_norm_2",
            Role::ExpertPostNorm => "post_ffw_norm_2",
            Role::DensePostNorm => "post_ffw_norm_1",
            Role::PerLayerGate => "inp_gate",
            Role::PerLayerOutput => "proj",
            Role::PerLayerNorm => "post_norm",
            Role::OutputScale => "layer_output_scale.weight",
            Role::SharedRouter => "ffn_gate_inp_shexp",
            Role::SharedGate => "ffn_gate_shexp",
            Role::SharedUp => "ffn_up_shexp",
            Role::SharedDown => "ffn_down_shexp",
            Role::DeltaQkv => "attn_qkv",
            Role::DeltaGate => "attn_gate",
            Role::DeltaBeta => "ssm_beta",
            Role::DeltaAlpha => "ssm_alpha",
            Role::DeltaConv => "ssm_conv1d",
            Role::DeltaRate => "ssm_a",
            Role::DeltaStep => "ssm_dt.bias",
            Role::DeltaNorm => "ssm_norm",
            Role::DeltaOutput => "ssm_out",
        }
    }

    /// The module in Hugging Face folders, without the block's prefix.
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
            Role::AttnSinks => "self_attn.sinks",
            Role::AttnOutput => "self_attn.o_proj",
            Role::FfnGate => "mlp.gate_proj",
            Role::FfnUp => "mlp.up_proj",
            Role::FfnDown => "mlp.down_proj",
            Role::Router => "mlp.gate",
            Role::RouterCorrection => "mlp.gate.e_score_correction_bias",
            Role::ExpertGate | Role::ExpertUp | Role::ExpertGateUp | Role::ExpertDown => {
                "mlp.experts"
            }
            Role::RouterScale => "router.scale",
            Role::ExpertScale => "router.per_expert_scale",
            Role::ExpertNorm => "pre_feedforward_layernorm_2",
            Role::ExpertPostNorm => "post_feedforward_layernorm_2",
            Role::DensePostNorm => "post_feedforward_layernorm_1",
            Role::PerLayerGate => "per_layer_input_gate",
            Role::PerLayerOutput => "per_layer_projection",
            Role::PerLayerNorm => "post_per_layer_input_norm",
            Role::OutputScale => "layer_scalar",
            Role::SharedRouter => "mlp.shared_expert_gate",
            Role::SharedGate => "mlp.shared_expert.gate_proj",
            Role::SharedUp => "mlp.shared_expert.up_proj",
            Role::SharedDown => "mlp.shared_expert.down_proj",
            Role::DeltaQkv => "linear_attn.in_proj_qkv",
            Role::DeltaGate => "linear_attn.in_proj_z",
            Role::DeltaBeta => "linear_attn.in_proj_b",
            Role::DeltaAlpha => "linear_attn.in_proj_a",
            Role::DeltaConv => "linear_attn.conv1d",
            Role::DeltaRate => "linear_attn.A_log",
            Role::DeltaStep => "linear_attn.dt_bias",
            Role::DeltaNorm => "linear_attn.norm",
            Role::DeltaOutput => "linear_attn.out_proj",
        }
    }
}
