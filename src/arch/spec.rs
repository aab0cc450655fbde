//! The decoder's description. There is one forward pass for all architectures, and it reads this
//! description.

use super::row::{Activation, Arch, Norms, QkNorm};
use super::{Block, DeltaNet, Experts, Role, Rope, Turn, Writer};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};

/// Far beyond any model: tables of a head's width are made before its tensors are looked at.
pub(super) const WIDEST_HEAD: usize = 1 << 16;

/// Factors and soft caps of the forward pass. A soft cap turns x into cap · tanh(x / cap).
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Scales {
    /// Factor of the embeddings.
    pub embedding: f32,
    /// Factor of every writer's output.
    pub residual: f32,
    /// Factor of the products of queries and keys.
    pub attention: f32,
    /// Soft cap of the scaled products of queries and keys.
    pub attention_cap: Option<f32>,
    /// Factor of the logits.
    pub logits: f32,
    /// Soft cap of the scaled logits.
    pub logit_cap: Option<f32>,
}

/// Per-layer embeddings: a token has a vector for each block, which a gate lets into the residual
/// stream at the block's end. To the vector from a table comes a projection of the token's
/// embedding.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PerLayer {
    /// Width of a block's vector.
    pub width: usize,
    /// Number of tokens in the table.
    pub vocab: usize,
}

/// The description of a decoder.
#[derive(Clone, Debug)]
pub struct Spec {
    /// The architecture's name in GGUF.
    pub arch: String,
    /// Number of blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Number of query heads.
    pub heads: usize,
    /// The blocks, `[layers]`.
    pub blocks: Vec<Block>,
    /// The experts that replace feed-forward layers or stand beside them, in models with experts.
    pub experts: Option<Experts>,
    /// The delta nets that replace attention in some blocks, in models with such blocks.
    pub delta: Option<DeltaNet>,
    /// Whether the query projection also gives a gate for each head's output.
    pub gated_attention: bool,
    /// Number of tokens in the vocabulary.
    pub vocab: usize,
    /// Epsilon of the RMS norms.
    pub norm_eps: f32,
    /// Added to every stored norm weight: 1 if the checkpoint stores weights minus one, else 0.
    pub norm_offset: f32,
    /// Where a block has norms.
    pub norms: Norms,
    /// The feed-forward layer's activation.
    pub activation: Activation,
    /// Whether gate and up projection are one matrix.
    pub fused_gate_up: bool,
    /// Rotary embedding.
    pub rope: Rope,
    /// Rotary embedding of blocks with windows, if it differs from `rope`.
    pub local_rope: Option<Rope>,
    /// Norms of queries and keys.
    pub qk_norm: QkNorm,
    /// Whether each head has an attention sink.
    pub sinks: bool,
    /// Whether each head's values are normed, without a weight.
    pub value_norm: bool,
    /// The embeddings that each block reads beside the residual stream, in models with such.
    pub per_layer: Option<PerLayer>,
    /// Whether a block may end with a factor of the whole residual stream.
    pub output_scale: bool,
    /// Factors and soft caps.
    pub scales: Scales,
    /// The longest text that can be run, in tokens; 0 if the checkpoint gives no limit.
    pub context: usize,
    /// Whether the output matrix is the token embedding.
    pub tied: bool,
}

impl Spec {
    /// Reads the description of a checkpoint.
    ///
    /// # Errors
    /// The errors of [`Spec::from_gguf`] and [`Spec::from_config`].
    pub fn of(file: &Checkpoint) -> Result<Spec> {
        match file {
            Checkpoint::Gguf(g) => Spec::from_gguf(g),
            Checkpoint::Folder(f) => Spec::from_config(f),
        }
    }

    /// Whether block `layer` routes its tokens to experts.
    pub fn is_sparse(&self, layer: usize) -> bool {
        self.experts.as_ref().is_some_and(|e| e.are_in(layer))
    }

    /// The delta net of block `layer`, if it has one in place of attention.
    pub fn delta_in(&self, layer: usize) -> Option<&DeltaNet> {
        self.delta.as_ref().filter(|d| d.blocks[layer])
    }

    /// The writers of block `layer`, in the order in which they write. Per-layer embeddings write
    /// as well, but no edit touches their projection: all that it reads of a text is one token.
    pub fn writers(&self, layer: usize) -> &'static [Writer] {
        use Writer::*;
        let experts = self.experts.as_ref().filter(|_| self.is_sparse(layer));
        if experts.is_some_and(|e| e.parallel) {
            return &[Attention, Ffn, Experts];
        }
        match (self.delta_in(layer).is_some(), experts.map(|e| e.shared > 0)) {
            (false, None) => &[Attention, Ffn],
            (false, Some(false)) => &[Attention, Experts],
            (false, Some(true)) => &[Attention, Shared, Experts],
            (true, None) => &[Delta, Ffn],
            (true, Some(false)) => &[Delta, Experts],
            (true, Some(true)) => &[Delta, Shared, Experts],
        }
    }

    /// The norms between a writer of block `layer` and the residual stream, in their order.
    pub fn post_norms(&self, layer: usize, writer: Writer) -> &'static [Role] {
        use Role::*;
        let parallel = self.is_sparse(layer) && self.experts.as_ref().is_some_and(|e| e.parallel);
        match writer {
            _ if !self.norms.after() => &[],
            Writer::Attention | Writer::Delta => &[AttnPostNorm],
            Writer::Ffn if parallel => &[DensePostNorm, FfnPostNorm],
            Writer::Experts if parallel => &[ExpertPostNorm, FfnPostNorm],
            Writer::Ffn | Writer::Shared | Writer::Experts => &[FfnPostNorm],
        }
    }

    /// Number of columns of a writer's matrix in block `layer`, which is the length of a gate. The
    /// columns of routed experts are counted side by side.
    pub fn columns(&self, layer: usize, writer: Writer) -> usize {
        let block = &self.blocks[layer];
        match writer {
            Writer::Attention => self.heads * block.head_dim,
            Writer::Ffn => block.ffn,
            Writer::Shared => self.experts.as_ref().map_or(0, |e| e.shared),
            Writer::Experts => self.experts.as_ref().map_or(0, |e| e.count * e.ffn),
            Writer::Delta => self.delta.as_ref().map_or(0, DeltaNet::values),
        }
    }

    /// The largest hidden width among the feed-forward layer, the shared expert and a routed
    /// expert.
    pub fn widest_ffn(&self) -> usize {
        let dense = self.blocks.iter().map(|b| b.ffn).max().unwrap_or(0);
        self.experts.as_ref().map_or(0, |e| e.ffn.max(e.shared)).max(dense)
    }

    /// The largest width of all heads of a block.
    pub fn widest_heads(&self) -> usize {
        self.heads * self.blocks.iter().map(|b| b.head_dim).max().unwrap_or(0)
    }

    /// Whether later blocks read a block's keys and values, `[layers]`.
    pub fn sources(&self) -> Vec<bool> {
        let mut all = vec![false; self.layers];
        self.blocks.iter().filter_map(|b| b.shares).for_each(|source| all[source] = true);
        all
    }

    /// How many blocks, from 0, lie early enough that the rest of the model still reads what they
    /// write: the first four fifths.
    pub fn early(&self) -> usize {
        (self.layers * 4).div_ceil(5).max(1)
    }

    /// The roles of a block's tensors. Of `AttnQkv` and the three of `AttnQ`, `AttnK` and `AttnV`,
    /// a block has either; `OutputScale` and `ExpertScale` may be missing; all other tensors are
    /// required.
    pub fn roles(&self, layer: usize) -> Vec<Role> {
        use Role::*;
        let mut all = match self.delta_in(layer) {
            Some(_) => vec![
                DeltaQkv,
                DeltaGate,
                DeltaBeta,
                DeltaAlpha,
                DeltaConv,
                DeltaRate,
                DeltaStep,
                DeltaNorm,
                DeltaOutput,
            ],
            None if self.blocks[layer].shares.is_some() => vec![AttnQ, AttnOutput],
            None if self.blocks[layer].keys_are_values => vec![AttnQ, AttnK, AttnOutput],
            None => vec![AttnQ, AttnK, AttnV, AttnQkv, AttnOutput],
        };
        if self.norms.before() {
            all.extend([AttnNorm, FfnNorm]);
        }
        if self.norms.after() {
            all.extend([AttnPostNorm, FfnPostNorm]);
        }
        if self.qk_norm != QkNorm::None && self.delta_in(layer).is_none() {
            all.push(AttnQNorm);
            if self.blocks[layer].shares.is_none() {
                all.push(AttnKNorm);
            }
        }
        if self.per_layer.is_some() {
            all.extend([PerLayerGate, PerLayerOutput, PerLayerNorm]);
        }
        if self.output_scale {
            all.push(OutputScale);
        }
        if self.sinks && self.delta_in(layer).is_none() {
            all.push(AttnSinks);
        }
        match &self.experts {
            Some(e) if self.is_sparse(layer) => {
                all.push(Router);
                all.extend(e.sigmoid.then_some(RouterCorrection));
                all.extend(e.roles());
                if e.shared > 0 {
                    all.extend([SharedGate, SharedUp, SharedDown]);
                    all.extend(e.shared_gated.then_some(SharedRouter));
                }
                if e.parallel {
                    all.extend([FfnGate, FfnUp, FfnDown, RouterScale, ExpertScale]);
                    all.extend([ExpertNorm, DensePostNorm, ExpertPostNorm]);
                }
            }
            _ if self.fused_gate_up => all.extend([FfnGateUp, FfnDown]),
            _ => all.extend([FfnGate, FfnUp, FfnDown]),
        }
        all
    }

    /// The roles of tensors that a block may have, although nothing reads them: the keys and values
    /// of a block that reads those of another one.
    pub fn unread(&self, layer: usize) -> &'static [Role] {
        match self.blocks[layer].shares {
            Some(_) => &[Role::AttnK, Role::AttnV, Role::AttnKNorm],
            None => &[],
        }
    }

    /// The rotary embedding of block `layer`, if it has one.
    pub fn rope_of(&self, layer: usize) -> Option<&Rope> {
        match self.blocks[layer].turn {
            Turn::Global => Some(&self.rope),
            Turn::Local => self.local_rope.as_ref(),
            Turn::Still => None,
        }
    }
}

/// The sizes from which default factors follow.
pub(super) struct Shape {
    pub layers: usize,
    pub hidden: usize,
    pub heads: usize,
    pub head_dim: usize,
}

impl Shape {
    /// The default factors of an architecture.
    pub fn scales(&self, arch: &Arch) -> Scales {
        Scales {
            embedding: if arch.scaled_embedding { (self.hidden as f32).sqrt() } else { 1.0 },
            residual: 1.0,
            attention: match arch.unscaled_attention {
                true => 1.0,
                false => 1.0 / (self.head_dim as f32).sqrt(),
            },
            attention_cap: None,
            logits: 1.0,
            logit_cap: None,
        }
    }
}

impl Scales {
    /// Checks that all factors and caps are positive numbers.
    pub(super) fn checked(self, path: &str) -> Result<Scales> {
        let caps = self.attention_cap.into_iter().chain(self.logit_cap);
        let all = [self.embedding, self.residual, self.attention, self.logits];
        match all.into_iter().chain(caps).find(|x| !(x.is_finite() && *x > 0.0)) {
            None => Ok(self),
            Some(x) => Err(Error::Model(format!(
                "{path}: a factor or cap of {x} makes no sense; expected positive numbers"
            ))),
        }
    }
}
