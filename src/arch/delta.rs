//! Gated delta nets: what takes the place of attention in most blocks of Qwen 3.5.

use serde_json::Value;

use super::from_config::{count, needed};
use super::from_gguf::number;
use super::spec::WIDEST_HEAD;
use crate::checkpoint::Gguf;
use crate::error::{Error, Result};

/// Most elements of a sequence's state in one block: 48 value heads of 128 by 128 are under 2^20.
const LARGEST_STATE: usize = 1 << 24;

/// Linear attention whose state, a matrix for each value head, decays and is corrected by each
/// token (Yang et al. 2024, arXiv 2412.06464).
#[derive(Clone, PartialEq, Debug)]
pub struct DeltaNet {
    /// Number of query heads, and of key heads.
    pub key_heads: usize,
    /// Number of value heads, each with a state of its own.
    pub value_heads: usize,
    /// Width of a query or key head.
    pub key_dim: usize,
    /// Width of a value head.
    pub value_dim: usize,
    /// How many tokens the convolution reads, the current one included.
    pub kernel: usize,
    /// Whether the value heads of a key head lie `key_heads` apart, as in GGUF files. In folders
    /// they lie side by side.
    pub tiled: bool,
    /// Whether the checkpoint stores the logarithm of the decay rate, as folders do. GGUF files
    /// store the negative rate.
    pub log_rate: bool,
    /// Whether a block has a delta net, `[layers]`. The others attend.
    pub blocks: Vec<bool>,
}

impl DeltaNet {
    /// Width of all queries, and of all keys.
    pub fn keys(&self) -> usize {
        self.key_heads * self.key_dim
    }

    /// Width of all values.
    pub fn values(&self) -> usize {
        self.value_heads * self.value_dim
    }

    /// Width of queries, keys and values together: the channels of the convolution.
    pub fn channels(&self) -> usize {
        2 * self.keys() + self.values()
    }

    /// Elements of a sequence's state in one block.
    pub fn state(&self) -> usize {
        self.value_heads * self.key_dim * self.value_dim
    }

    /// The key head that a value head goes with.
    pub fn key_head(&self, value_head: usize) -> usize {
        match self.tiled {
            true => value_head % self.key_heads,
            false => value_head / (self.value_heads / self.key_heads),
        }
    }

    /// Reads GGUF metadata (llama.cpp `src/models/qwen35.cpp`).
    ///
    /// # Errors
    /// A key is missing or makes no sense.
    pub(super) fn from_gguf(file: &Gguf, arch: &str, layers: usize) -> Result<DeltaNet> {
        let path = file.path().display().to_string();
        let need = |k: &str| {
            let key = format!("{arch}.{k}");
            number(file, &key)?.filter(|&v| v > 0).ok_or_else(|| {
                Error::Model(format!(
                    "{path}: metadata key {key} is missing or not a positive number"
                ))
            })
        };
        let (value_heads, inner) = (need("ssm.time_step_rank")?, need("ssm.inner_size")?);
        let every = number(file, &format!("{arch}.full_attention_interval"))?.unwrap_or(4);
        let key = format!("{arch}.attention.recurrent_layers");
        let listed = file.get_bools(&key).or_else(|| {
            let numbers = file.get_u32s(&key)?;
            Some(numbers.into_iter().map(|n| n != 0).collect())
        });
        DeltaNet {
            key_heads: need("ssm.group_count")?,
            value_heads,
            key_dim: need("ssm.state_size")?,
            value_dim: inner / value_heads,
            kernel: need("ssm.conv_kernel")?,
            tiled: true,
            log_rate: false,
            blocks: match listed {
                Some(list) => list.into_iter().take(layers).collect(),
                None => by_interval(layers, every),
            },
        }
        .checked(&path, layers)
    }

    /// Reads `config.json`.
    ///
    /// # Errors
    /// A key is missing or makes no sense.
    pub(super) fn from_config(c: &Value, path: &str, layers: usize) -> Result<DeltaNet> {
        let need = |key: &str| needed(c, key, path);
        let listed = c["layer_types"].as_array();
        let known = |kind: &&Value| *kind != "linear_attention" && *kind != "full_attention";
        if let Some(other) = listed.into_iter().flatten().find(known) {
            let what = format!("{path}: layer_types names {other}, which can't be run");
            return Err(Error::unsupported(what, "supported: full_attention, linear_attention"));
        }
        DeltaNet {
            key_heads: need("linear_num_key_heads")?,
            value_heads: need("linear_num_value_heads")?,
            key_dim: need("linear_key_head_dim")?,
            value_dim: need("linear_value_head_dim")?,
            kernel: need("linear_conv_kernel_dim")?,
            tiled: false,
            log_rate: true,
            blocks: match listed {
                Some(list) => list.iter().map(|kind| kind == "linear_attention").collect(),
                None => by_interval(layers, count(c, "full_attention_interval").unwrap_or(4)),
            },
        }
        .checked(path, layers)
    }

    fn checked(self, path: &str, layers: usize) -> Result<DeltaNet> {
        // Products of these are sizes of tensors and of states: they must stay far from overflow,
        // and a small file must not ask for a large state.
        let sizes = [self.key_heads, self.value_heads, self.key_dim, self.value_dim, self.kernel];
        let sound = sizes.iter().all(|n| (1..=WIDEST_HEAD).contains(n))
            && self.value_heads.is_multiple_of(self.key_heads)
            && self.state() <= LARGEST_STATE;
        if !sound || self.blocks.len() != layers {
            return Err(Error::Model(format!(
                "{path}: delta nets of {} key heads of {} and {} value heads of {} over {} tokens, \
                 in a list of {} blocks, make no sense in a model of {layers} blocks",
                self.key_heads,
                self.key_dim,
                self.value_heads,
                self.value_dim,
                self.kernel,
                self.blocks.len()
            )));
        }
        Ok(self)
    }
}

/// The last of every `every` blocks attends.
fn by_interval(layers: usize, every: usize) -> Vec<bool> {
    (0..layers).map(|layer| every == 0 || !(layer + 1).is_multiple_of(every)).collect()
}
