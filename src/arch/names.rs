//! What a role's tensor is called in each kind of checkpoint.

use super::row::{Arch, NormNames};
use super::{Role, Writer};
use crate::checkpoint::Checkpoint;

/// A checkpoint's way to name its tensors.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Names {
    /// `blk.3.ffn_down.weight`
    Gguf,
    /// `model.layers.3.mlp.down_proj.weight`
    HuggingFace {
        /// What is in front of `layers.`: `model.`, of a multimodal model `model.language_model.`
        /// and the like.
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

impl Names {
    /// The tensor in which a role's experts are stacked, and which share of its rows is the role's:
    /// (index, of so many).
    pub(crate) fn stacked(&self, role: Role, layer: usize) -> [(String, usize, usize); 2] {
        let block = self.block(layer);
        let half = usize::from(role == Role::ExpertUp);
        match self {
            Names::Gguf => [
                (format!("{}.weight", self.module(role, layer)), 0, 1),
                (format!("{block}ffn_gate_up_exps.weight"), half, 2),
            ],
            Names::HuggingFace { moe, .. } => [
                (format!("{block}{moe}.experts.{}", moe_proj(role)), 0, 1),
                (format!("{block}{moe}.experts.gate_up_proj"), half, 2),
            ],
        }
    }

    /// Whether a tensor is one of a block's writer.
    pub fn is_writer(&self, tensor: &str, layer: usize, writer: Writer) -> bool {
        let Some(rest) = tensor.strip_prefix(&self.block(layer)) else { return false };
        match self {
            Names::HuggingFace { moe, .. } if writer == Writer::Experts => {
                let of = rest.strip_prefix(moe).and_then(|r| r.strip_prefix(".experts."));
                of.is_some_and(|r| {
                    r == "down_proj"
                        || r.ends_with(".down_proj.weight")
                        || r.ends_with(".w2.weight")
                })
            }
            _ => tensor == format!("{}.weight", self.module(writer.role(), layer)),
        }
    }

    /// The module of one expert, where each has modules of its own (Hugging Face).
    pub(crate) fn expert(&self, role: Role, layer: usize, expert: usize) -> String {
        let Names::HuggingFace { moe, .. } = self else { return self.module(role, layer) };
        let name = match (*moe, role) {
            ("block_sparse_moe", Role::ExpertGate) => "w1",
            ("block_sparse_moe", Role::ExpertUp) => "w3",
            ("block_sparse_moe", _) => "w2",
            _ => moe_proj(role),
        };
        format!("{}{moe}.experts.{expert}.{name}", self.block(layer))
    }
}

fn moe_proj(role: Role) -> &'static str {
    match role {
        Role::ExpertGate => "gate_proj",
        Role::ExpertUp => "up_proj",
        _ => "down_proj",
    }
}
