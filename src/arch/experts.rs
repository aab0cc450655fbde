//! Mixtures of experts: a router sends each token through a few of many feed-forward layers.

use serde_json::Value;

use super::{from_config as config, from_gguf};
use crate::checkpoint::Gguf;
use crate::error::{Error, Result};

/// What stands in place of a block's feed-forward layer.
///
/// A token's weights are the softmax of the router's logits over all experts; the `used` largest
/// are kept. Where they are divided by their sum, that is the softmax over the chosen ones.
#[derive(Clone, PartialEq, Debug)]
pub struct Experts {
    /// Experts of a block.
    pub count: usize,
    /// Experts that a token runs through.
    pub used: usize,
    /// Width of an expert.
    pub ffn: usize,
    /// Width of the shared expert, through which every token runs, behind a sigmoid gate; 0 where
    /// there is none.
    pub shared: usize,
    /// The chosen experts' weights are divided by their sum.
    pub normalised: bool,
    /// Every so many blocks one has experts, the others a plain feed-forward layer; 1: all have
    /// some.
    pub every: usize,
    /// Blocks that have a plain feed-forward layer all the same.
    pub dense: Vec<usize>,
}

impl Experts {
    /// Reads GGUF metadata: Mixtral is the architecture `llama` with experts. What llama.cpp
    /// decides by architecture (`src/models/*.cpp`) is decided so here.
    ///
    /// # Errors
    /// A key that is missing or makes no sense; experts in an architecture that has none.
    pub(super) fn from_gguf(file: &Gguf, arch: &str) -> Result<Option<Experts>> {
        let path = file.path().display().to_string();
        let key =
            |k: &str| file.get_u32(&format!("{arch}.{k}")).map(|v| v as usize).filter(|&v| v > 0);
        let (count, moe) = (key("expert_count"), arch.ends_with("moe"));
        if count.is_none() && !moe {
            return Ok(None);
        }
        if !moe && arch != "llama" {
            return Err(Error::unsupported(
                format!("{path}: {arch} with experts can't be run"),
                "supported with experts: llama (Mixtral), qwen2moe, qwen3moe",
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
        let ffn =
            from_gguf::number(file, &format!("{arch}.feed_forward_length"))?.filter(|&v| v > 0);
        let experts = Experts {
            count,
            used,
            ffn: match key("expert_feed_forward_length").filter(|_| moe) {
                Some(n) => n,
                None if moe => need("feed_forward_length", ffn)? / used,
                None => need("feed_forward_length", ffn)?,
            },
            shared: match arch {
                "qwen2moe" => {
                    need("feed_forward_length", key("expert_shared_feed_forward_length").or(ffn))?
                }
                _ => 0,
            },
            normalised: arch != "qwen2moe",
            every: 1,
            dense: Vec::new(),
        };
        experts.checked(&path).map(Some)
    }

    /// Reads `config.json`.
    ///
    /// # Errors
    /// A key that is missing or makes no sense.
    pub(super) fn from_config(c: &Value, kind: &str, path: &str) -> Result<Option<Experts>> {
        let number = |key: &str| config::count(c, key);
        let need = |key: &str| config::needed(c, key, path);
        // Libraries write either name.
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
            },
            "qwen2_moe" | "qwen3_moe" => {
                let plain = c["mlp_only_layers"].as_array().into_iter().flatten();
                Experts {
                    count: count("num_experts", "num_local_experts")?,
                    used: need("num_experts_per_tok")?,
                    ffn: need("moe_intermediate_size")?,
                    shared: if kind == "qwen2_moe" {
                        need("shared_expert_intermediate_size")?
                    } else {
                        0
                    },
                    normalised: c["norm_topk_prob"].as_bool().unwrap_or(false),
                    every: number("decoder_sparse_step").unwrap_or(1),
                    dense: plain.filter_map(Value::as_u64).map(|l| l as usize).collect(),
                }
            }
            _ => return Ok(None),
        };
        experts.checked(path).map(Some)
    }

    fn checked(self, path: &str) -> Result<Experts> {
        if self.used > self.count || self.ffn == 0 {
            return Err(Error::Model(format!(
                "{path}: {} of {} experts of width {} make no sense; expected at most as many used as there are",
                self.used, self.count, self.ffn
            )));
        }
        Ok(self)
    }

    /// Whether a block routes its tokens.
    pub fn are_in(&self, layer: usize) -> bool {
        !self.dense.contains(&layer) && (layer + 1).is_multiple_of(self.every)
    }

    /// Where tokens go: for each expert the rows that it is chosen by, with the router's weights.
    /// `logits`: `[rows, count]`. Of equal logits the lower expert goes first.
    pub fn route(&self, logits: &[f32]) -> Vec<Vec<(usize, f32)>> {
        let mut out = vec![Vec::new(); self.count];
        let mut order: Vec<usize> = Vec::new();
        for (row, logits) in logits.chunks_exact(self.count).enumerate() {
            order.clear();
            order.extend(0..self.count);
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
            let weight = |e: usize| (logits[e] - logits[order[0]]).exp();
            let over = if self.normalised { &order[..self.used] } else { &order[..] };
            let sum: f32 = over.iter().map(|&e| weight(e)).sum();
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
