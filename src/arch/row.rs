//! The facts about an architecture: a row of the table, for GGUF files and Hugging Face folders
//! alike.

use super::role::Role;
use super::rope::RopeStyle;
use super::table;
use crate::checkpoint::Checkpoint;
use crate::error::Error;

/// Where a block has RMS norms.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Norms {
    /// Before the attention and before the feed-forward layer (pre-norm).
    Before,
    /// After the attention and after the feed-forward layer, on the output that is added to the
    /// residual stream (post-norm).
    After,
    /// Both before and after.
    Around,
}

impl Norms {
    /// Whether the input of the attention and of the feed-forward layer is normed.
    pub fn before(self) -> bool {
        self != Norms::After
    }

    /// Whether a writer's output is normed before it is added to the residual stream.
    pub fn after(self) -> bool {
        self != Norms::Before
    }
}

/// How queries and keys are normed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum QkNorm {
    /// They are not normed.
    None,
    /// Each head is normed by itself.
    Head,
    /// All heads are normed together, as one vector.
    Whole,
}

/// The activation of the gate in a feed-forward layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Activation {
    /// x / (1 + e⁻ˣ)
    Silu,
    /// The tanh approximation of GELU.
    GeluTanh,
    /// x / (1 + e^(−1.702 x)) of x clamped to at most 7; the up projection is clamped to ±7 and
    /// then increased by 1 (gpt-oss).
    ClampedSwiglu,
}

impl Activation {
    /// The activation's names in `config.json`. Gemma 1's files say `gelu` and mean the tanh
    /// approximation.
    pub fn names(self) -> &'static [&'static str] {
        match self {
            Activation::Silu | Activation::ClampedSwiglu => &["silu", "swish"],
            Activation::GeluTanh => &["gelu_pytorch_tanh", "gelu"],
        }
    }
}

/// Which blocks attend to a window of tokens only (sliding-window attention).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Windows {
    /// No block, or every block. In the latter case, texts longer than the window are refused.
    Uniform,
    /// All blocks but every n-th, if the checkpoint gives a window.
    AllBut(usize),
}

/// A row of the table: the facts about one architecture.
#[derive(Debug)]
pub struct Arch {
    /// `general.architecture` in GGUF.
    pub gguf: &'static str,
    /// `model_type` in `config.json`. A type that belongs to several architectures is listed in the
    /// first.
    pub model_types: &'static [&'static str],
    /// Which dimensions of a head rotate together in GGUF files.
    pub rope: RopeStyle,
    /// Which dimensions of a head rotate together in Hugging Face folders.
    pub folder_rope: RopeStyle,
    /// Where a block has norms.
    pub norms: Norms,
    /// The norms' modules in folders, if they aren't the usual ones of [`Arch::norm_names`].
    pub own_norm_names: Option<NormNames>,
    /// The norms' modules in GGUF files, if they aren't the usual ones.
    pub own_gguf_norms: Option<NormNames>,
    /// Modules that have other names in folders than usual, norms apart.
    pub renamed: &'static [(Role, &'static str)],
    /// Norms of queries and keys.
    pub qk_norm: QkNorm,
    /// Whether each head has an attention sink: a logit that takes part in the softmax and has no
    /// value.
    pub sinks: bool,
    /// The modules of a block's experts and of their router in folders.
    pub moe_names: [&'static str; 2],
    /// Whether each head's values are normed, without a weight.
    pub value_norm: bool,
    /// Whether products of queries and keys are taken as they are.
    pub unscaled_attention: bool,
    /// Whether blocks may differ in their sizes, may read keys and values of earlier blocks, and
    /// may have no value projection.
    pub uneven_blocks: bool,
    /// Whether a model may have per-layer embeddings.
    pub per_layer: bool,
    /// Whether a block may end with a factor of the whole residual stream.
    pub output_scale: bool,
    /// Whether most blocks have a gated delta net in place of attention.
    pub delta_nets: bool,
    /// Whether the query projection also gives a gate for each head's output, after the head's
    /// query.
    pub gated_attention: bool,
    /// The feed-forward layer's activation.
    pub activation: Activation,
    /// Whether embeddings are multiplied by √hidden.
    pub scaled_embedding: bool,
    /// Whether folders store norm weights minus one. GGUF files store the full weights.
    pub norms_minus_one: bool,
    /// Whether gate and up projection are one matrix, gate first.
    pub fused_gate_up: bool,
    /// Which blocks have windows.
    pub windows: Windows,
    /// The last of every `rope_free_every` blocks doesn't rotate queries and keys; 0: all blocks
    /// do.
    pub rope_free_every: usize,
    /// Whether, in a model with windows, only blocks with a window rotate queries and keys.
    pub rope_in_windows_only: bool,
    /// Whether llama.cpp reads `rope_freqs.weight`.
    pub rope_freqs: bool,
    /// Whether llama.cpp loads and applies biases of `attn_output` and `ffn_down`. Most files have
    /// none.
    pub takes_bias: bool,
    /// JSON: the defaults of the model's class in transformers, for keys that published
    /// `config.json` files leave out. An empty object if no default is needed: then a missing key
    /// is an error.
    pub defaults: &'static str,
}

/// The modules of a block's norms in a folder: before the attention, after it, before the
/// feed-forward layer, after it. Empty where there is no norm.
pub type NormNames = [&'static str; 4];

/// The modules of experts and their router in most folders.
pub(super) const MOE: [&str; 2] = ["mlp.experts", "mlp.gate"];

/// The modules of a block's norms in most GGUF files.
pub(super) const GGUF_NORMS: NormNames =
    ["attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"];

impl Arch {
    /// The row of a `general.architecture`.
    pub fn of_gguf(name: &str) -> Option<&'static Arch> {
        table::ROWS.iter().find(|a| a.gguf == name)
    }

    /// The row of a `model_type`.
    pub fn of_model_type(name: &str) -> Option<&'static Arch> {
        table::ROWS.iter().find(|a| a.model_types.contains(&name))
    }

    /// The row of a checkpoint; `None` if its architecture is unknown.
    pub fn of(file: &Checkpoint) -> Option<&'static Arch> {
        match file {
            Checkpoint::Gguf(g) => g.arch().ok().and_then(Arch::of_gguf),
            Checkpoint::Folder(f) => {
                f.text_config()["model_type"].as_str().and_then(Arch::of_model_type)
            }
        }
    }

    /// The norms' modules in transformers. `post_attention_layernorm` is the norm before the
    /// feed-forward layer in models with norms before only. In the others it is the norm after the
    /// attention.
    pub fn norm_names(&self) -> NormNames {
        if let Some(own) = self.own_norm_names {
            return own;
        }
        let attention = "post_attention_layernorm";
        let feed_forward = "post_feedforward_layernorm";
        match self.norms {
            Norms::Before => ["input_layernorm", "", attention, ""],
            Norms::After => ["", attention, "", feed_forward],
            Norms::Around => {
                ["input_layernorm", attention, "pre_feedforward_layernorm", feed_forward]
            }
        }
    }

    /// The error for an architecture that isn't in the table. `key`: `architecture` for a GGUF
    /// file, `model_type` for a folder.
    pub(super) fn unknown(path: &str, key: &str, name: &str) -> Error {
        let names = |of: &dyn Fn(&'static Arch) -> Vec<&'static str>| {
            table::ROWS.iter().flat_map(of).collect::<Vec<_>>().join(", ")
        };
        let supported = match key {
            "architecture" => names(&|a| vec![a.gguf]),
            _ => names(&|a| a.model_types.to_vec()),
        };
        let why = table::FOREIGN.iter().find(|(names, _)| names.contains(&name));
        let why = why.map_or(String::new(), |(_, parts)| format!(": {parts}"));
        Error::unsupported(
            format!("{path}: {key} {name} can't be run{why}"),
            format!(
                "use another model, or its original before a conversion; supported: {supported}"
            ),
        )
    }
}
