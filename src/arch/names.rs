//! The names of tensors, by role, in GGUF files and in Hugging Face folders.

use super::row::{Arch, NormNames, GGUF_NORMS, MOE};
use super::{Role, Writer};
use crate::checkpoint::Checkpoint;

/// How a checkpoint names its tensors.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Names {
    /// `blk.3.ffn_down.weight`
    Gguf {
        /// The modules of a block's norms.
        norms: NormNames,
    },
    /// `model.layers.3.mlp.down_proj.weight`
    HuggingFace {
        /// The part of the names before `layers.`: `model.`, or `model.language_model.` and the
        /// like in a multimodal model.
        prefix: String,
        /// The output matrix, if the model has one apart from the embedding.
        head: String,
        /// The modules of a block's experts and of their router.
        moe: [&'static str; 2],
        /// The modules of a block's norms.
        norms: NormNames,
        /// Other modules with names of their own.
        renamed: &'static [(Role, &'static str)],
    },
}

/// The known prefixes, each with the name of the output matrix.
const PREFIXES: [(&str, &str); 5] = [
    ("model.", "lm_head.weight"),
    ("model.language_model.", "lm_head.weight"),
    ("language_model.model.", "language_model.lm_head.weight"),
    ("language_model.", "lm_head.weight"),
    ("", "lm_head.weight"),
];

/// The modules of Mixtral's experts and their router, in folders of before transformers 5.
const MIXTRAL: [&str; 2] = ["block_sparse_moe.experts", "block_sparse_moe.gate"];

impl Names {
    /// The names in this checkpoint.
    pub fn of(file: &Checkpoint) -> Names {
        let Checkpoint::Folder(folder) = file else {
            let norms = Arch::of(file).and_then(|a| a.own_gguf_norms).unwrap_or(GGUF_NORMS);
            return Names::Gguf { norms };
        };
        let has = |prefix: &str| folder.tensor(&format!("{prefix}embed_tokens.weight")).is_some();
        let (prefix, head) = PREFIXES.into_iter().find(|(p, _)| has(p)).unwrap_or(PREFIXES[0]);
        let mixtral = folder.tensors().iter().any(|t| t.name.contains(".block_sparse_moe."));
        let usual = Arch::of(file).map_or(MOE, |arch| arch.moe_names);
        let moe = if mixtral { MIXTRAL } else { usual };
        // A model of an unknown architecture is never run, so the names of its norms don't matter.
        let llama = ["input_layernorm", "", "post_attention_layernorm", ""];
        let norms = Arch::of(file).map_or(llama, Arch::norm_names);
        let renamed = Arch::of(file).map_or(&[][..], |a| a.renamed);
        Names::HuggingFace { prefix: prefix.into(), head: head.into(), moe, norms, renamed }
    }

    /// The prefix of the names of a block's tensors.
    pub fn block(&self, layer: usize) -> String {
        match self {
            Names::Gguf { .. } => format!("blk.{layer}."),
            Names::HuggingFace { prefix, .. } => format!("{prefix}layers.{layer}."),
        }
    }

    /// The tensor of a role.
    pub fn tensor(&self, role: Role, layer: usize) -> String {
        self.module(role, layer) + role.ending()
    }

    /// The module of a role: the tensor's name without `.weight` or `.bias`. Of a tensor that has
    /// no such ending it is the whole name.
    pub fn module(&self, role: Role, layer: usize) -> String {
        self.block(layer) + &self.within_block(role)
    }

    /// As [`Names::module`], without the block's prefix.
    pub(crate) fn within_block(&self, role: Role) -> String {
        match self {
            Names::Gguf { norms } => role.gguf_with(norms).into(),
            Names::HuggingFace { moe, norms, renamed, .. } => {
                match renamed.iter().find(|(r, _)| *r == role) {
                    Some((_, own)) => (*own).into(),
                    None if role == Role::Router => moe[1].into(),
                    None => role.hugging_face(norms).into(),
                }
            }
        }
    }

    /// The tensor of the token embedding.
    pub fn embedding(&self) -> String {
        match self {
            Names::Gguf { .. } => "token_embd.weight".into(),
            Names::HuggingFace { prefix, .. } => format!("{prefix}embed_tokens.weight"),
        }
    }

    /// The tensors of per-layer embeddings: the table, the projection of the token embedding, and
    /// the norm of what it gives.
    pub fn per_layer(&self) -> [String; 3] {
        match self {
            Names::Gguf { .. } => {
                ["per_layer_token_embd", "per_layer_model_proj", "per_layer_proj_norm"]
                    .map(|name| format!("{name}.weight"))
            }
            Names::HuggingFace { prefix, .. } => [
                "embed_tokens_per_layer",
                "per_layer_model_projection",
                "per_layer_projection_norm",
            ]
            .map(|name| format!("{prefix}{name}.weight")),
        }
    }

    /// The tensor of the output matrix.
    pub fn output(&self) -> &str {
        match self {
            Names::Gguf { .. } => "output.weight",
            Names::HuggingFace { head, .. } => head,
        }
    }

    /// The tensor of the final norm.
    pub fn output_norm(&self) -> String {
        match self {
            Names::Gguf { .. } => "output_norm.weight".into(),
            Names::HuggingFace { prefix, .. } => format!("{prefix}norm.weight"),
        }
    }
}

impl Names {
    /// Two tensors that may hold the experts of a role in a stack, each as (name, part, parts): the
    /// role has part `part` of `parts` equal parts of each expert's rows. The second tensor fuses
    /// gate and up projection. In MXFP4 `NAME_blocks` and `NAME_scales` hold what NAME would.
    pub(crate) fn stacked(&self, role: Role, layer: usize) -> [(String, usize, usize); 2] {
        let block = self.block(layer);
        let part = usize::from(role == Role::ExpertUp);
        match self {
            Names::Gguf { .. } => [
                (format!("{}.weight", self.module(role, layer)), 0, 1),
                (format!("{block}ffn_gate_up_exps.weight"), part, 2),
            ],
            Names::HuggingFace { moe, .. } => [
                (format!("{block}{}.{}", moe[0], expert_module(role)), 0, 1),
                (format!("{block}{}.gate_up_proj", moe[0]), part, 2),
            ],
        }
    }

    /// The tensor with the biases of a role of all experts.
    pub(crate) fn expert_biases(&self, role: Role, layer: usize) -> String {
        match self {
            Names::Gguf { .. } => format!("{}.bias", self.module(role, layer)),
            Names::HuggingFace { .. } => format!("{}_bias", self.stacked(role, layer)[0].0),
        }
    }

    /// Whether a tensor belongs to this writer of block `layer`.
    pub fn is_writer(&self, tensor: &str, layer: usize, writer: Writer) -> bool {
        let Some(rest) = tensor.strip_prefix(&self.block(layer)) else { return false };
        match self {
            Names::HuggingFace { moe, .. } if writer == Writer::Experts => {
                let experts = rest.strip_prefix(moe[0]).and_then(|r| r.strip_prefix('.'));
                experts.is_some_and(|r| {
                    r == "down_proj"
                        || r == "down_proj_blocks"
                        || r.ends_with(".down_proj.weight")
                        || r.ends_with(".w2.weight")
                })
            }
            _ => tensor == self.tensor(writer.role(), layer),
        }
    }

    /// The module of one expert in a Hugging Face folder that stores experts apart.
    pub(crate) fn expert(&self, role: Role, layer: usize, expert: usize) -> String {
        let Names::HuggingFace { moe, .. } = self else { return self.module(role, layer) };
        let name = match (*moe == MIXTRAL, role) {
            (true, Role::ExpertGate) => "w1",
            (true, Role::ExpertUp) => "w3",
            (true, _) => "w2",
            _ => expert_module(role),
        };
        format!("{}{}.{expert}.{name}", self.block(layer), moe[0])
    }
}

/// The module of an expert's role in Hugging Face folders, except in Mixtral.
fn expert_module(role: Role) -> &'static str {
    match role {
        Role::ExpertGate => "gate_proj",
        Role::ExpertUp => "up_proj",
        Role::ExpertGateUp => "gate_up_proj",
        _ => "down_proj",
    }
}
