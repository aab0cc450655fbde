//! What architectures are made of: one row each, read for GGUF files and Hugging Face folders
//! alike.

use super::rope::RopeStyle;
use super::table;
use crate::checkpoint::Checkpoint;
use crate::error::Error;

/// Where a block's RMS norms stand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Norms {
    /// In front of the attention and of the feed-forward layer.
    Before,
    /// Behind them, on what is added to the residual stream.
    After,
    /// On both sides.
    Around,
}

impl Norms {
    /// Whether the readers' input is normed.
    pub fn before(self) -> bool {
        self != Norms::After
    }

    /// Whether the writers' output is normed before it is added.
    pub fn after(self) -> bool {
        self != Norms::Before
    }
}

/// How queries and keys are normed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum QkNorm {
    /// Not at all.
    None,
    /// Each head by itself.
    Head,
    /// All heads together.
    Whole,
}

/// What the gate of a feed-forward layer goes through.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Activation {
    /// x / (1 + e⁻ˣ)
    Silu,
    /// The tanh approximation of GELU.
    GeluTanh,
}

impl Activation {
    /// Its names in `config.json`. Gemma 1's files say `gelu` and mean the approximation.
    pub fn names(self) -> &'static [&'static str] {
        match self {
            Activation::Silu => &["silu", "swish"],
            Activation::GeluTanh => &["gelu_pytorch_tanh", "gelu"],
        }
    }
}

/// Which blocks see a window of tokens only.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Windows {
    /// None, or all of them: texts longer than the window are refused.
    Uniform,
    /// All but every n-th block, where there is a window at all.
    AllBut(usize),
}

/// A row of the table.
#[derive(Debug)]
pub struct Arch {
    /// `general.architecture` in GGUF.
    pub gguf: &'static str,
    /// `model_type` in `config.json`; one that belongs to several architectures stands in the
    /// first.
    pub model_types: &'static [&'static str],
    /// Which dimensions of a head rotate together in GGUF.
    pub rope: RopeStyle,
    /// Which do in folders.
    pub folder_rope: RopeStyle,
    /// Where the norms stand.
    pub norms: Norms,
    /// What transformers calls them, where that isn't what [`Arch::norm_names`] says.
    pub own_norm_names: Option<NormNames>,
    /// Norms of queries and keys.
    pub qk_norm: QkNorm,
    /// The feed-forward layer's activation.
    pub activation: Activation,
    /// Embeddings are multiplied by √hidden.
    pub scaled_embedding: bool,
    /// Folders store norm weights minus one. GGUF stores them whole.
    pub norms_minus_one: bool,
    /// Gate and up projection are one matrix, gate first.
    pub fused_gate_up: bool,
    /// Which blocks have windows.
    pub windows: Windows,
    /// Every so many blocks one doesn't rotate queries and keys; 0: all do.
    pub rope_free_every: usize,
    /// Of a model with windows only blocks with one rotate queries and keys.
    pub rope_in_windows_only: bool,
    /// llama.cpp reads `rope_freqs.weight`.
    pub rope_freqs: bool,
    /// llama.cpp loads and applies a bias of `attn_output` and `ffn_down`, which most files lack.
    pub takes_bias: bool,
    /// What the model's class in transformers takes where `config.json` leaves a key out. Files of
    /// other architectures are complete, or say what is missing.
    pub defaults: &'static str,
}

/// The norms' modules in a folder: before and behind the attention, before and behind the
/// feed-forward layer.
pub type NormNames = [&'static str; 4];

impl Arch {
    /// The row of a GGUF architecture.
    pub fn of_gguf(name: &str) -> Option<&'static Arch> {
        table::ROWS.iter().find(|a| a.gguf == name)
    }

    /// The row of a `model_type`.
    pub fn of_model_type(name: &str) -> Option<&'static Arch> {
        table::ROWS.iter().find(|a| a.model_types.contains(&name))
    }

    /// The row of a checkpoint, if its architecture is known.
    pub fn of(file: &Checkpoint) -> Option<&'static Arch> {
        match file {
            Checkpoint::Gguf(g) => g.arch().ok().and_then(Arch::of_gguf),
            Checkpoint::Folder(f) => {
                f.text_config()["model_type"].as_str().and_then(Arch::of_model_type)
            }
        }
    }

    /// What transformers calls the norms. `post_attention_layernorm` is in front of the
    /// feed-forward layer, unless a norm of its own stands there.
    pub fn norm_names(&self) -> NormNames {
        if let Some(own) = self.own_norm_names {
            return own;
        }
        let behind = "post_attention_layernorm";
        let last = "post_feedforward_layernorm";
        match self.norms {
            Norms::Before => ["input_layernorm", "", behind, ""],
            Norms::After => ["", behind, "", last],
            Norms::Around => ["input_layernorm", behind, "pre_feedforward_layernorm", last],
        }
    }

    /// That a GGUF architecture or a `model_type` isn't known: what it is, and what can be done.
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
