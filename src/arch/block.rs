//! What sets the blocks of a model apart: what they attend to, their sizes, and whose keys and
//! values they read.

use serde_json::Value;

use super::from_config::{count, needed};
use super::from_gguf::{number, numbers};
use super::row::Arch;
use super::spec::WIDEST_HEAD;
use crate::checkpoint::Gguf;
use crate::error::{Error, Result};

/// A block of the decoder.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Block {
    /// How many tokens a token attends to, itself included. `None`: to itself and all before it.
    pub window: Option<usize>,
    /// Which rotary embedding rotates queries and keys.
    pub turn: Turn,
    /// Width of a head.
    pub head_dim: usize,
    /// Number of key and value heads.
    pub kv_heads: usize,
    /// The earlier block whose keys and values this block reads; `None` if it has its own.
    pub shares: Option<usize>,
    /// Whether the key projection gives the values, too.
    pub keys_are_values: bool,
    /// Hidden width of the plain feed-forward layer; 0 if the block has none.
    pub ffn: usize,
}

/// A block's rotary embedding.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Turn {
    /// [`Spec::rope`](super::Spec::rope).
    Global,
    /// [`Spec::local_rope`](super::Spec::local_rope).
    Local,
    /// No rotary embedding.
    Still,
}

impl Block {
    /// Width of the keys of a token, and of its values.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// The sizes that all blocks have, unless the architecture's blocks are uneven.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub head_dim: usize,
    pub kv_heads: usize,
    pub ffn: usize,
}

/// The blocks of a model. `window`: the window of the blocks for which `slides` holds. `own_rope`:
/// whether these blocks have a rotary embedding of their own.
pub(super) fn blocks(
    arch: &Arch,
    layers: usize,
    sizes: Sizes,
    window: Option<usize>,
    slides: impl Fn(usize) -> bool,
    own_rope: bool,
) -> Vec<Block> {
    let has_windows = window.is_some();
    let block = |layer: usize| {
        let window = window.filter(|_| slides(layer));
        let every = arch.rope_free_every;
        let no_rope = (every > 0 && (layer + 1).is_multiple_of(every))
            || (arch.rope_in_windows_only && has_windows && window.is_none());
        let turn = match window {
            _ if no_rope => Turn::Still,
            Some(_) if own_rope => Turn::Local,
            _ => Turn::Global,
        };
        let Sizes { head_dim, kv_heads, ffn } = sizes;
        Block { window, turn, head_dim, kv_heads, shares: None, keys_are_values: false, ffn }
    };
    (0..layers).map(block).collect()
}

/// Reads what differs from block to block from `config.json` (transformers
/// `models/gemma4/configuration_gemma4.py`).
///
/// # Errors
/// A key makes no sense.
pub(super) fn uneven_by_config(blocks: &mut [Block], c: &Value, path: &str) -> Result<()> {
    let keys_are_values = c["attention_k_eq_v"] == true;
    let wide = count(c, "global_head_dim").unwrap_or(512);
    let few = count(c, "num_global_key_value_heads").filter(|_| keys_are_values);
    for block in blocks.iter_mut().filter(|b| b.window.is_none()) {
        block.keys_are_values = keys_are_values;
        // Where the sizes are listed by block, the two keys are not read.
        if c["per_layer_config"].is_null() {
            block.head_dim = wide;
            block.kv_heads = few.unwrap_or(block.kv_heads);
        }
    }
    for (key, own) in c["per_layer_config"].as_object().into_iter().flatten() {
        let listed = key.parse::<usize>().ok().and_then(|layer| blocks.get_mut(layer));
        let block = listed.ok_or_else(|| {
            Error::Model(format!("{path}: `per_layer_config` has {key:?}; expected a block"))
        })?;
        let size = |name: &str, now: usize| match own.get(name) {
            None => Ok(now),
            Some(_) => needed(own, name, &format!("{path}: block {key} of `per_layer_config`")),
        };
        block.head_dim = size("head_dim", block.head_dim)?;
        block.kv_heads = size("num_key_value_heads", block.kv_heads)?;
    }
    share(blocks, count(c, "num_kv_shared_layers").unwrap_or(0), path)?;
    if c["use_double_wide_mlp"] == true {
        blocks.iter_mut().filter(|b| b.shares.is_some()).for_each(|b| b.ffn *= 2);
    }
    Ok(())
}

/// Reads what differs from block to block from GGUF metadata (llama.cpp `src/models/gemma4.cpp`).
///
/// # Errors
/// A key makes no sense.
pub(super) fn uneven_by_gguf(blocks: &mut [Block], file: &Gguf, arch: &str) -> Result<()> {
    let path = file.path().display().to_string();
    let key = |k: &str| format!("{arch}.{k}");
    let layers = blocks.len();
    let kv_heads = numbers(file, &key("attention.head_count_kv"), layers)?;
    let ffn = numbers(file, &key("feed_forward_length"), layers)?;
    let swa = number(file, &key("attention.key_length_swa"))?;
    if number(file, &key("attention.value_length_swa"))? != swa {
        return Err(Error::unsupported(
            format!("{path}: values wider or narrower than keys in blocks with windows"),
            "such models can't be run",
        ));
    }
    for (layer, block) in blocks.iter_mut().enumerate() {
        block.kv_heads = kv_heads.as_ref().map_or(block.kv_heads, |all| all[layer]);
        block.ffn = ffn.as_ref().map_or(block.ffn, |all| all[layer]);
        if block.window.is_some() {
            block.head_dim = swa.unwrap_or(block.head_dim);
        }
    }
    share(blocks, number(file, &key("attention.shared_kv_layers"))?.unwrap_or(0), &path)?;
    let has = |layer: usize, name: &str| file.tensor(&format!("blk.{layer}.{name}.weight"));
    for (layer, block) in blocks.iter_mut().enumerate().filter(|(_, b)| b.shares.is_none()) {
        block.keys_are_values = has(layer, "attn_v").or(has(layer, "attn_qkv")).is_none();
    }
    Ok(())
}

/// Lets each of the last `shared` blocks read the keys and values of the last block before them all
/// that has a window as it has, or none.
///
/// # Errors
/// There is no such block, or it has other sizes.
fn share(blocks: &mut [Block], shared: usize, path: &str) -> Result<()> {
    let own = blocks.len().saturating_sub(shared);
    for layer in own..blocks.len() {
        let block = blocks[layer];
        let alike = |b: &Block| b.window.is_some() == block.window.is_some();
        let source = blocks[..own].iter().rposition(alike).filter(|&source| {
            let b = &blocks[source];
            (b.head_dim, b.kv_heads) == (block.head_dim, block.kv_heads)
        });
        let Some(source) = source else {
            return Err(Error::Model(format!(
                "{path}: the last {shared} of {} blocks read earlier keys and values, but none of \
                 the blocks before them fits block {layer}",
                blocks.len()
            )));
        };
        blocks[layer].shares = Some(source);
    }
    Ok(())
}

/// Checks the sizes of heads.
pub(super) fn check(blocks: &[Block], heads: usize, path: &str) -> Result<()> {
    let sound = |b: &&Block| {
        let (dim, kv) = (b.head_dim, b.kv_heads);
        kv > 0 && heads.is_multiple_of(kv) && dim > 0 && dim <= WIDEST_HEAD
    };
    match blocks.iter().find(|b| !sound(b)) {
        None => Ok(()),
        Some(Block { head_dim, kv_heads, .. }) => Err(Error::Model(format!(
            "{path}: {heads} heads of {head_dim} with {kv_heads} key/value heads make no sense"
        ))),
    }
}

/// The width of a head in the blocks that a rotary embedding rotates; `other` if it rotates none.
///
/// # Errors
/// These blocks differ.
pub(super) fn turned(blocks: &[Block], turn: Turn, other: usize, path: &str) -> Result<usize> {
    let mut widths = blocks.iter().filter(|b| b.turn == turn).map(|b| b.head_dim);
    let first = widths.next().unwrap_or(other);
    match widths.find(|w| *w != first) {
        None => Ok(first),
        Some(w) => Err(Error::unsupported(
            format!("{path}: heads of {first} and of {w} among blocks of one kind"),
            "such models can't be run",
        )),
    }
}
