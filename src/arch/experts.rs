//! Mixtures of experts: a router sends each token through a few of many feed-forward layers.

use serde_json::Value;

use super::{from_config as config, from_gguf};
use crate::checkpoint::Gguf;
use crate::error::{Error, Result};

/// The experts that replace a block's feed-forward layer, or stand beside it.
///
/// The router weighs the experts of a token: the weights are the softmax of its logits over all
/// experts, and the `used` largest weights are kept. Dividing these by their sum gives the softmax
/// over the chosen experts.
#[derive(Clone, PartialEq, Debug)]
pub struct Experts {
    /// Number of routed experts in a block.
    pub count: usize,
    /// Number of routed experts that a token runs through.
    pub used: usize,
    /// Hidden width of a routed expert.
    pub ffn: usize,
    /// Hidden width of the shared expert; 0 if there is none. Every token runs through the shared
    /// expert, which is scaled by a sigmoid gate.
    pub shared: usize,
    /// Whether the weights of the chosen experts are divided by their sum.
    pub normalised: bool,
    /// The last of every `every` blocks has experts; the other blocks have a plain feed-forward
    /// layer. 1: all blocks have experts.
    pub every: usize,
    /// Further blocks that have a plain feed-forward layer.
    pub dense: Vec<usize>,
    /// Whether the plain feed-forward layer runs beside the experts: both read the residual stream
    /// through norms of their own, and their normed sum is added to it. The router reads the
    /// stream normed and scaled, and each expert's output has a factor.
    pub parallel: bool,
}

impl Experts {
    /// Reads GGUF metadata; `None` for a model without experts. Mixtral is the architecture `llama`
    /// with experts. Values that llama.cpp sets by architecture (`src/models/*.cpp`) are set by
    /// architecture here too.
    ///
    /// # Errors
    /// A key is missing or makes no sense; the architecture isn't supported with experts.
    pub(super) fn from_gguf(file: &Gguf, arch: &str) -> Result<Option<Experts>> {
        let path = file.path().display().to_string();
        let key =
            |k: &str| file.get_u32(&format!("{arch}.{k}")).map(|v| v as usize).filter(|&v| v > 0);
        // Gemma 4 with experts has the name of Gemma 4 without.
        let moe = arch.ends_with("moe");
        let named = moe || arch == "gemma4";
        let count = key("expert_count");
        if count.is_none() && !moe {
            return Ok(None);
        }
        if !named && arch != "llama" {
            return Err(Error::unsupported(
                format!("{path}: {arch} with experts can't be run"),
                "supported with experts: llama (Mixtral), qwen2moe, qwen3moe, qwen35moe, \
                 olmoe, gemma4",
            ));
        }
        let need = |name: &str, v: Option<usize>| {
            v.ok_or_else(|| {
                Error::Model(format!(
                    "{path}: metadata key {arch}.{name} is missing or not a positive number"
                ))
            })
        };
        let (count, used) =
            (need("expert_count", count)?, need("expert_used_count", key("expert_used_count"))?);
        // In Gemma 4 it is the width of the layers beside the experts, which may differ.
        let ffn = match arch {
            "gemma4" => None,
            _ => from_gguf::number(file, &format!("{arch}.feed_forward_length"))?,
        };
        let ffn = ffn.filter(|&v| v > 0);
        let experts = Experts {
            count,
            used,
            ffn: match key("expert_feed_forward_length").filter(|_| named) {
                Some(n) => n,
                None if arch == "gemma4" => need("expert_feed_forward_length", None)?,
                None if moe && arch != "olmoe" => need("feed_forward_length", ffn)? / used,
                None => need("feed_forward_length", ffn)?,
            },
            shared: match arch {
                "qwen2moe" | "qwen35moe" => {
                    need("feed_forward_length", key("expert_shared_feed_forward_length").or(ffn))?
                }
                _ => 0,
            },
            normalised: !["qwen2moe", "olmoe"].contains(&arch),
            every: 1,
            dense: Vec::new(),
            parallel: arch == "gemma4",
        };
        experts.checked(&path).map(Some)
    }

    /// Reads `config.json`; `None` for a model without experts. `kind` is the `model_type`.
    ///
    /// # Errors
    /// A key is missing or makes no sense.
    pub(super) fn from_config(c: &Value, kind: &str, path: &str) -> Result<Option<Experts>> {
        let number = |key: &str| config::count(c, key);
        let need = |key: &str| config::needed(c, key, path);
        // The key has either of two names, depending on the library that wrote it.
        let count = |a: &str, b: &str| number(b).map_or_else(|| need(a), Ok);
        let experts = match kind {
            "mixtral" => Experts {
                count: count("num_local_experts", "num_experts")?,
                used: need("num_experts_per_tok")?,
                ffn: need("intermediate_size")?,
                shared: 0,
                normalised: true,
                every: 1,
                dense: Vec::new(),
                parallel: false,
            },
            "olmoe" => Experts {
                count: count("num_experts", "num_local_experts")?,
                used: need("num_experts_per_tok")?,
                ffn: need("intermediate_size")?,
                shared: 0,
                normalised: c["norm_topk_prob"].as_bool().unwrap_or(false),
                every: 1,
                dense: Vec::new(),
                parallel: false,
            },
            "qwen2_moe" | "qwen3_moe" | "qwen3_5_moe_text" => {
                let dense = c["mlp_only_layers"].as_array().into_iter().flatten();
                Experts {
                    count: count("num_experts", "num_local_experts")?,
                    used: need("num_experts_per_tok")?,
                    ffn: need("moe_intermediate_size")?,
                    shared: if kind == "qwen3_moe" {
                        0
                    } else {
                        need("shared_expert_intermediate_size")?
                    },
                    normalised: kind == "qwen3_5_moe_text"
                        || c["norm_topk_prob"].as_bool().unwrap_or(false),
                    every: number("decoder_sparse_step").unwrap_or(1),
                    dense: dense.filter_map(Value::as_u64).map(|l| l as usize).collect(),
                    parallel: false,
                }
            }
            "gemma4_text" if c["enable_moe_block"] == true => Experts {
                count: need("num_experts")?,
                used: need("top_k_experts")?,
                ffn: need("moe_intermediate_size")?,
                shared: 0,
                normalised: true,
                every: 1,
                dense: Vec::new(),
                parallel: true,
            },
            _ => return Ok(None),
        };
        experts.checked(path).map(Some)
    }

    /// Checks that a token uses no more experts than there are, and that experts have a width.
    fn checked(self, path: &str) -> Result<Experts> {
        if self.used > self.count || self.ffn == 0 {
            return Err(Error::Model(format!(
                "{path}: {} of {} experts of width {} make no sense; expected a positive width, \
                 and no more experts in use than there are",
                self.used, self.count, self.ffn
            )));
        }
        Ok(self)
    }

    /// Whether block `layer` has experts.
    pub fn are_in(&self, layer: usize) -> bool {
        !self.dense.contains(&layer) && (layer + 1).is_multiple_of(self.every)
    }

    /// Chooses the experts of each row. Returns, for each expert, the rows that chose it, each with
    /// the router's weight. `logits`: the router's, `[rows, count]`. Of experts with equal logits,
    /// the lower index wins.
    pub fn route(&self, logits: &[f32]) -> Vec<Vec<(usize, f32)>> {
        let mut out = vec![Vec::new(); self.count];
        let mut order: Vec<usize> = Vec::new();
        for (row, logits) in logits.chunks_exact(self.count).enumerate() {
            order.clear();
            order.extend(0..self.count);
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
            let weight = |e: usize| (logits[e] - logits[order[0]]).exp();
            let summed = if self.normalised { &order[..self.used] } else { &order[..] };
            let sum: f32 = summed.iter().map(|&e| weight(e)).sum();
            for &e in &order[..self.used] {
                out[e].push((row, weight(e) / sum));
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_shares_of_all_experts_or_of_the_chosen_ones() {
        let mut e = Experts {
            count: 4,
            used: 2,
            ffn: 1,
            shared: 0,
            normalised: true,
            every: 1,
            dense: vec![],
            parallel: false,
        };
        // Softmax of these logits: 0.1, 0.4, 0.3, 0.2.
        let logits: Vec<f32> = [0.1f32, 0.4, 0.3, 0.2].iter().map(|p| p.ln() + 7.0).collect();
        let weights = |e: &Experts| {
            let routed = e.route(&logits);
            assert!(routed[0].is_empty() && routed[3].is_empty());
            (routed[1][0].1, routed[2][0].1)
        };
        let (a, b) = weights(&e);
        assert!((a - 0.4 / 0.7).abs() < 1e-6 && (b - 0.3 / 0.7).abs() < 1e-6);
        e.normalised = false;
        let (a, b) = weights(&e);
        assert!((a - 0.4).abs() < 1e-6 && (b - 0.3).abs() < 1e-6);
    }
}
