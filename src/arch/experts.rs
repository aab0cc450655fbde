//! Mixtures of experts: a router sends each token through a few of many feed-forward layers.

use serde_json::Value;

use super::{from_config as config, from_gguf, Role};
use crate::checkpoint::Gguf;
use crate::error::{Error, Result};

/// The number of the sigmoid in GGUF's `expert_gating_func`.
const SIGMOID: usize = 2;

/// The error for a router that differs from that of GLM 4.5.
fn unlike_glm(path: &str, what: &str) -> Error {
    Error::unsupported(
        format!("{path}: a router {what} can't be run"),
        "supported: sigmoids (function 2) in one group",
    )
}

/// The experts that replace a block's feed-forward layer, or stand beside it.
///
/// The router weighs the experts of a token: the weights are the softmax of its logits over all
/// experts, or their sigmoids, and the `used` largest weights are kept. Dividing weights of the
/// softmax by their sum gives the softmax over the chosen experts.
#[derive(Clone, PartialEq, Debug)]
pub struct Experts {
    /// Number of routed experts in a block.
    pub count: usize,
    /// Number of routed experts that a token runs through.
    pub used: usize,
    /// Hidden width of a routed expert.
    pub ffn: usize,
    /// Hidden width of the shared expert; 0 if there is none. Every token runs through the shared
    /// expert.
    pub shared: usize,
    /// Whether a sigmoid gate scales the shared expert.
    pub shared_gated: bool,
    /// Whether weights are sigmoids. The experts with the largest sums of weight and correction are
    /// chosen; the checkpoint stores a correction for each expert.
    pub sigmoid: bool,
    /// Factor of the weights.
    pub scale: f32,
    /// Whether the weights of the chosen experts are divided by their sum.
    pub normalised: bool,
    /// The last of every `every` blocks has experts; the other blocks have a plain feed-forward
    /// layer. 1: all blocks have experts.
    pub every: usize,
    /// The blocks before this one have a plain feed-forward layer.
    pub first: usize,
    /// Further blocks that have a plain feed-forward layer.
    pub dense: Vec<usize>,
    /// Whether the router and the experts have biases.
    pub biased: bool,
    /// Whether outputs of gate and up projection take turns in one matrix, and stacks of floats
    /// hold a row for each input: the folders of gpt-oss.
    pub alternating: bool,
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
        let moe = arch.ends_with("moe") || arch == "gpt-oss";
        let named = moe || arch == "gemma4";
        let count = key("expert_count");
        if count.is_none() && !moe {
            return Ok(None);
        }
        if !named && arch != "llama" {
            return Err(Error::unsupported(
                format!("{path}: {arch} with experts can't be run"),
                "supported with experts: llama (Mixtral), qwen2moe, qwen3moe, qwen35moe, \
                 olmoe, gpt-oss, glm4moe, gemma4",
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
        let width = match key("expert_feed_forward_length").filter(|_| named) {
            Some(n) => n,
            None if arch == "gemma4" => need("expert_feed_forward_length", None)?,
            None if moe && !["olmoe", "gpt-oss"].contains(&arch) => {
                need("feed_forward_length", ffn)? / used
            }
            None => need("feed_forward_length", ffn)?,
        };
        let sigmoid = arch == "glm4moe";
        let number = |k: &str| file.get_u32(&format!("{arch}.{k}")).map(|v| v as usize);
        let function = number("expert_gating_func").unwrap_or(SIGMOID);
        let groups = number("expert_group_count").unwrap_or(1);
        if sigmoid && (function != SIGMOID || groups > 1) {
            return Err(unlike_glm(&path, &format!("of function {function} in {groups} groups")));
        }
        let scale = file.get_f32(&format!("{arch}.expert_weights_scale"));
        let scale = scale.filter(|x| sigmoid && *x != 0.0).unwrap_or(1.0);
        let experts = Experts {
            count,
            used,
            sigmoid,
            scale,
            first: number("leading_dense_block_count").filter(|_| sigmoid).unwrap_or(0),
            shared_gated: !sigmoid,
            ffn: width,
            shared: match arch {
                "qwen2moe" | "qwen35moe" => {
                    need("feed_forward_length", key("expert_shared_feed_forward_length").or(ffn))?
                }
                "glm4moe" => number("expert_shared_count").unwrap_or(0).saturating_mul(width),
                _ => 0,
            },
            normalised: match sigmoid {
                true => file.get_bool(&format!("{arch}.expert_weights_norm")).unwrap_or(false),
                false => !["qwen2moe", "olmoe"].contains(&arch),
            },
            biased: arch == "gpt-oss",
            parallel: arch == "gemma4",
            ..Experts::plain()
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
        let plain = Experts::plain();
        let experts = match kind {
            "mixtral" | "gpt_oss" => Experts {
                count: count("num_local_experts", "num_experts")?,
                used: need("num_experts_per_tok")?,
                ffn: need("intermediate_size")?,
                normalised: true,
                biased: kind == "gpt_oss",
                alternating: kind == "gpt_oss",
                ..plain
            },
            "olmoe" => Experts {
                count: count("num_experts", "num_local_experts")?,
                used: need("num_experts_per_tok")?,
                ffn: need("intermediate_size")?,
                normalised: c["norm_topk_prob"].as_bool().unwrap_or(false),
                ..plain
            },
            "glm4_moe" => {
                let ffn = need("moe_intermediate_size")?;
                let groups = number("n_group").unwrap_or(1);
                if groups > 1 {
                    return Err(unlike_glm(path, &format!("in {groups} groups")));
                }
                Experts {
                    count: need("n_routed_experts")?,
                    used: need("num_experts_per_tok")?,
                    ffn,
                    shared: need("n_shared_experts")?.saturating_mul(ffn),
                    shared_gated: false,
                    sigmoid: true,
                    scale: config::float(c, "routed_scaling_factor", path)?.unwrap_or(1.0) as f32,
                    normalised: c["norm_topk_prob"].as_bool().unwrap_or(true),
                    first: c["first_k_dense_replace"].as_u64().unwrap_or(1) as usize,
                    ..plain
                }
            }
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
                    ..plain
                }
            }
            "gemma4_text" if c["enable_moe_block"] == true => Experts {
                count: need("num_experts")?,
                used: need("top_k_experts")?,
                ffn: need("moe_intermediate_size")?,
                normalised: true,
                parallel: true,
                ..plain
            },
            _ => return Ok(None),
        };
        experts.checked(path).map(Some)
    }

    /// Experts in all blocks, without anything special; the numbers are still to be set.
    fn plain() -> Experts {
        Experts {
            count: 0,
            used: 0,
            ffn: 0,
            shared: 0,
            shared_gated: true,
            sigmoid: false,
            scale: 1.0,
            normalised: false,
            every: 1,
            first: 0,
            dense: Vec::new(),
            biased: false,
            alternating: false,
            parallel: false,
        }
    }

    /// Checks that a token uses no more experts than there are, that experts have a width, and that
    /// the weights' factor is a positive number.
    fn checked(self, path: &str) -> Result<Experts> {
        if !(self.scale.is_finite() && self.scale > 0.0) {
            return Err(Error::Model(format!(
                "{path}: experts weighed by a factor of {} make no sense; expected a positive \
                 number",
                self.scale
            )));
        }
        if self.used > self.count || self.ffn == 0 {
            return Err(Error::Model(format!(
                "{path}: {} of {} experts of width {} make no sense; expected a positive width, \
                 and no more experts in use than there are",
                self.used, self.count, self.ffn
            )));
        }
        Ok(self)
    }

    /// The roles of the routed experts' matrices.
    pub(crate) fn roles(&self) -> &'static [Role] {
        match self.alternating {
            true => &[Role::ExpertGateUp, Role::ExpertDown],
            false => &[Role::ExpertGate, Role::ExpertUp, Role::ExpertDown],
        }
    }

    /// Whether block `layer` has experts.
    pub fn are_in(&self, layer: usize) -> bool {
        layer >= self.first
            && !self.dense.contains(&layer)
            && (layer + 1).is_multiple_of(self.every)
    }

    /// Chooses the experts of each row. Returns, for each expert, the rows that chose it, each with
    /// the router's weight. `logits`: the router's, `[rows, count]`; `correction`: what is added to
    /// an expert's sigmoid for the choice, `[count]`. Of equal experts the lower index wins.
    pub fn route(&self, logits: &[f32], correction: Option<&[f32]>) -> Vec<Vec<(usize, f32)>> {
        let mut out = vec![Vec::new(); self.count];
        let mut order: Vec<usize> = Vec::new();
        let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
        for (row, logits) in logits.chunks_exact(self.count).enumerate() {
            let score = |e: usize| match correction {
                Some(correction) => sigmoid(logits[e]) + correction[e],
                None => logits[e],
            };
            order.clear();
            order.extend(0..self.count);
            order.sort_by(|&a, &b| score(b).total_cmp(&score(a)).then(a.cmp(&b)));
            let weight = |e: usize| match self.sigmoid {
                true => sigmoid(logits[e]),
                false => (logits[e] - logits[order[0]]).exp(),
            };
            let sum: f32 = match (self.sigmoid, self.normalised) {
                (true, false) => 1.0,
                (false, false) => order.iter().map(|&e| weight(e)).sum(),
                (_, true) => order[..self.used].iter().map(|&e| weight(e)).sum(),
            };
            // Sigmoids of very small logits are all zero.
            let sum = sum.max(f32::MIN_POSITIVE);
            for &e in &order[..self.used] {
                out[e].push((row, weight(e) / sum * self.scale));
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
        let mut e = Experts { count: 4, used: 2, ffn: 1, normalised: true, ..Experts::plain() };
        // Softmax of these logits: 0.1, 0.4, 0.3, 0.2.
        let logits: Vec<f32> = [0.1f32, 0.4, 0.3, 0.2].iter().map(|p| p.ln() + 7.0).collect();
        let weights = |e: &Experts| {
            let routed = e.route(&logits, None);
            assert!(routed[0].is_empty() && routed[3].is_empty());
            (routed[1][0].1, routed[2][0].1)
        };
        let (a, b) = weights(&e);
        assert!((a - 0.4 / 0.7).abs() < 1e-6 && (b - 0.3 / 0.7).abs() < 1e-6);
        e.normalised = false;
        let (a, b) = weights(&e);
        assert!((a - 0.4).abs() < 1e-6 && (b - 0.3).abs() < 1e-6);
    }

    #[test]
    fn corrections_choose_experts_and_weigh_none() {
        let mut e = Experts {
            count: 3,
            used: 2,
            ffn: 1,
            sigmoid: true,
            scale: 2.0,
            normalised: true,
            ..Experts::plain()
        };
        // Sigmoids: 0.2, 0.5, 0.8.
        let logits = [0.25f32.ln(), 0.0, 4f32.ln()];
        let near = |found: f32, expected: f32| assert!((found - expected).abs() < 1e-6, "{found}");
        let routed = e.route(&logits, Some(&[1.0, 0.0, 0.0]));
        assert!(routed[1].is_empty());
        near(routed[0][0].1, 2.0 * 0.2);
        near(routed[2][0].1, 2.0 * 0.8);
        e.normalised = false;
        let routed = e.route(&logits, Some(&[0.0; 3]));
        near(routed[1][0].1, 2.0 * 0.5);
        near(routed[2][0].1, 2.0 * 0.8);
        // Nothing to divide by.
        e.normalised = true;
        assert_eq!(e.route(&[-200.0; 3], Some(&[0.0; 3]))[0], [(0, 0.0)]);
    }
}
