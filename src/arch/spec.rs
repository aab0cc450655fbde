//! The decoder's description. One forward pass reads it; architectures differ by its values only.

use super::row::{Activation, Arch, Norms, QkNorm};
use super::{Experts, Role, Rope, Writer};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};

/// Far beyond any model: tables of a head's width are made before its tensors are looked at.
pub(super) const WIDEST_HEAD: usize = 1 << 16;

/// How a block attends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Attends {
    /// How many tokens it sees, its own among them; `None`: all before it.
    pub window: Option<usize>,
    /// Which rotary embedding turns its queries and keys.
    pub turn: Turn,
}

/// A block's rotary embedding.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Turn {
    /// [`Spec::rope`].
    Global,
    /// [`Spec::local_rope`].
    Local,
    /// None.
    Still,
}

/// What numbers on the way are multiplied by, and where they are capped.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Scales {
    /// Embeddings.
    pub embedding: f32,
    /// What a block adds to the residual stream.
    pub residual: f32,
    /// Products of queries and keys.
    pub attention: f32,
    /// The same, softly: cap · tanh(x / cap).
    pub attention_cap: Option<f32>,
    /// Logits.
    pub logits: f32,
    /// The same, softly.
    pub logit_cap: Option<f32>,
}

/// What the decoder is.
#[derive(Clone, Debug)]
pub struct Spec {
    /// The architecture as GGUF names it.
    pub arch: String,
    /// Blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of the feed-forward layer, where a block has one; else 0.
    pub ffn: usize,
    /// What stands in place of the feed-forward layer, in models with experts.
    pub experts: Option<Experts>,
    /// Tokens.
    pub vocab: usize,
    /// Epsilon of the RMS norms.
    pub norm_eps: f32,
    /// What stored norm weights lack.
    pub norm_offset: f32,
    /// Where a block's norms stand.
    pub norms: Norms,
    /// The feed-forward layer's activation.
    pub activation: Activation,
    /// Gate and up projection are one matrix.
    pub fused_gate_up: bool,
    /// Rotary embedding.
    pub rope: Rope,
    /// That of blocks with windows, where it is another.
    pub local_rope: Option<Rope>,
    /// How each block attends, `[layers]`.
    pub attends: Vec<Attends>,
    /// Norms of queries and keys.
    pub qk_norm: QkNorm,
    /// Factors and caps.
    pub scales: Scales,
    /// Longest context the model was trained for; 0 when the file does not say.
    pub context: usize,
    /// The output matrix is the token embedding.
    pub tied: bool,
}

impl Spec {
    /// Reads the description of either kind of checkpoint.
    ///
    /// # Errors
    /// What [`Spec::from_gguf`] and [`Spec::from_config`] say.
    pub fn of(file: &Checkpoint) -> Result<Spec> {
        match file {
            Checkpoint::Gguf(g) => Spec::from_gguf(g),
            Checkpoint::Folder(f) => Spec::from_config(f),
        }
    }

    /// Whether a block routes its tokens to experts.
    pub fn is_sparse(&self, layer: usize) -> bool {
        self.experts.as_ref().is_some_and(|e| e.are_in(layer))
    }

    /// The writers of a block, in the order in which it runs them.
    pub fn writers(&self, layer: usize) -> &'static [Writer] {
        match &self.experts {
            Some(e) if self.is_sparse(layer) && e.shared > 0 => {
                &[Writer::Attention, Writer::Shared, Writer::Experts]
            }
            Some(_) if self.is_sparse(layer) => &[Writer::Attention, Writer::Experts],
            _ => &[Writer::Attention, Writer::Ffn],
        }
    }

    /// Length of a writer's gate: the columns of its matrix, of experts those of all of them side
    /// by side.
    pub fn columns(&self, writer: Writer) -> usize {
        match writer {
            Writer::Attention => self.heads * self.head_dim,
            Writer::Ffn => self.ffn,
            Writer::Shared => self.experts.as_ref().map_or(0, |e| e.shared),
            Writer::Experts => self.experts.as_ref().map_or(0, |e| e.count * e.ffn),
        }
    }

    /// Width of the widest feed-forward layer, shared or single expert.
    pub fn widest_ffn(&self) -> usize {
        self.experts.as_ref().map_or(0, |e| e.ffn.max(e.shared)).max(self.ffn)
    }

    /// What a block is made of: the tensors it must have, and those it may have.
    pub fn roles(&self, layer: usize) -> Vec<Role> {
        use Role::*;
        let mut all = vec![AttnQ, AttnK, AttnV, AttnQkv, AttnOutput];
        if self.norms.before() {
            all.extend([AttnNorm, FfnNorm]);
        }
        if self.norms.after() {
            all.extend([AttnPostNorm, FfnPostNorm]);
        }
        if self.qk_norm != QkNorm::None {
            all.extend([AttnQNorm, AttnKNorm]);
        }
        match &self.experts {
            Some(e) if self.is_sparse(layer) => {
                all.extend([Router, ExpertGate, ExpertUp, ExpertDown]);
                if e.shared > 0 {
                    all.extend([SharedRouter, SharedGate, SharedUp, SharedDown]);
                }
            }
            _ if self.fused_gate_up => all.extend([FfnGateUp, FfnDown]),
            _ => all.extend([FfnGate, FfnUp, FfnDown]),
        }
        all
    }

    /// A block's rotary embedding, if it has one.
    pub fn rope_of(&self, layer: usize) -> Option<&Rope> {
        match self.attends[layer].turn {
            Turn::Global => Some(&self.rope),
            Turn::Local => self.local_rope.as_ref(),
            Turn::Still => None,
        }
    }
}

/// What defaults follow from.
pub(super) struct Shape {
    pub layers: usize,
    pub hidden: usize,
    pub heads: usize,
    pub head_dim: usize,
}

impl Shape {
    /// The factors of a model that has none of its own.
    pub fn scales(&self, arch: &Arch) -> Scales {
        Scales {
            embedding: if arch.scaled_embedding { (self.hidden as f32).sqrt() } else { 1.0 },
            residual: 1.0,
            attention: 1.0 / (self.head_dim as f32).sqrt(),
            attention_cap: None,
            logits: 1.0,
            logit_cap: None,
        }
    }
}

/// How the blocks of a model attend. `window`: that of the blocks for which `slides` holds.
pub(super) fn attends(
    arch: &Arch,
    layers: usize,
    window: Option<usize>,
    slides: impl Fn(usize) -> bool,
    own_rope: bool,
) -> Vec<Attends> {
    let has_windows = window.is_some();
    let of = |layer: usize| {
        let window = window.filter(|_| slides(layer));
        let every = arch.rope_free_every;
        let still = (every > 0 && (layer + 1).is_multiple_of(every))
            || (arch.rope_in_windows_only && has_windows && window.is_none());
        let turn = match window {
            _ if still => Turn::Still,
            Some(_) if own_rope => Turn::Local,
            _ => Turn::Global,
        };
        Attends { window, turn }
    };
    (0..layers).map(of).collect()
}

impl Scales {
    /// That all of them are positive numbers.
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
