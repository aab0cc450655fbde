//! Checks the tensors of a model: the decoder's tensors are there, in the right shapes, and no
//! tensor of a block would be left out silently.

use super::Model;
use crate::arch::{DeltaNet, Names, NormNames, QkNorm, Role};
use crate::error::{Error, Result};

impl Model {
    /// Checks all tensors.
    pub(super) fn check(&self) -> Result<()> {
        let s = &self.spec;
        if let Some(t) = self.file.tensors().iter().find(|t| self.is_unknown(&t.name)) {
            return Err(Error::unsupported(
                format!(
                    "{}: tensor {} can't be applied: the decoder has no place for it in {}",
                    self.path(),
                    t.name,
                    s.arch
                ),
                match t.name.ends_with(".scale") {
                    true => {
                        "use the model in a type whose tensors have no scale of their own, such as \
                         Q8_0"
                    }
                    false => "use a file of the same model without it",
                },
            ));
        }
        let d = s.hidden;
        let per_layer = s.per_layer.map_or(0, |p| p.width);
        for (layer, block) in s.blocks.iter().enumerate() {
            let (q, kv) = (s.heads * block.head_dim, block.kv_width());
            // Beside each head's query, its gate.
            let queries = if s.gated_attention { 2 * q } else { q };
            let norm_widths = match s.qk_norm {
                QkNorm::Whole => (q, kv),
                _ => (block.head_dim, block.head_dim),
            };
            let delta = s.delta_in(layer);
            let roles = s.roles(layer);
            let fused = roles.contains(&Role::AttnQkv) && self.has(Role::AttnQkv, layer)?;
            for role in roles {
                if role == Role::OutputScale {
                    self.output_scale(layer)?;
                    continue;
                }
                let separate = [Role::AttnQ, Role::AttnK, Role::AttnV].contains(&role);
                if role.is_experts() || (separate && fused) || (role == Role::AttnQkv && !fused) {
                    continue;
                }
                let (rows, cols) = match role {
                    Role::AttnQ => (queries, d),
                    Role::AttnK | Role::AttnV => (kv, d),
                    Role::AttnQkv => (queries + 2 * kv, d),
                    Role::AttnOutput => (d, q),
                    Role::FfnGate | Role::FfnUp => (block.ffn, d),
                    Role::FfnGateUp => (2 * block.ffn, d),
                    Role::FfnDown => (d, block.ffn),
                    Role::PerLayerGate => (per_layer, d),
                    Role::PerLayerOutput => (d, per_layer),
                    Role::AttnQNorm => (norm_widths.0, 0),
                    Role::AttnKNorm => (norm_widths.1, 0),
                    Role::AttnSinks => (s.heads, 0),
                    _ => delta.and_then(|net| of_delta(net, role, d)).unwrap_or((d, 0)),
                };
                if role.is_vector() {
                    self.expect_len(
                        &self.name(role, layer),
                        self.vector(role, layer)?.len(),
                        rows,
                    )?;
                    continue;
                }
                self.expect(&self.name(role, layer), rows, cols)?;
                if let Some(bias) = self.bias(role, layer)? {
                    self.expect_len(&self.bias_name(role, layer), bias.len(), rows)?;
                }
            }
            if let Some(experts) = s.experts.as_ref().filter(|_| s.is_sparse(layer)) {
                self.check_experts(layer, experts)?;
            }
        }
        if let Some(p) = s.per_layer {
            let [table, projection, norm] = self.names.per_layer();
            let all = p.width.saturating_mul(s.layers);
            self.expect(&table, p.vocab, all)?;
            self.expect(&projection, all, d)?;
            self.expect_len(&norm, self.per_layer_norm()?.len(), p.width)?;
        }
        self.expect(&self.names.embedding(), s.vocab, d)?;
        if !s.tied {
            self.expect(self.names.output(), s.vocab, d)?;
        }
        self.expect_len(&self.names.output_norm(), self.output_norm()?.len(), d)
    }

    /// Whether a tensor would change what the model computes, but has no place in the decoder.
    fn is_unknown(&self, name: &str) -> bool {
        let block = match &self.names {
            Names::Gguf { .. } if name == "output.bias" => return true,
            Names::Gguf { .. } => name.strip_prefix("blk."),
            Names::HuggingFace { prefix, head, .. } => {
                let bias = head.strip_suffix("weight").map(|h| format!("{h}bias"));
                if bias.is_some_and(|b| b == name) {
                    return true;
                }
                name.strip_prefix(&format!("{prefix}layers."))
            }
        };
        let Some(block) = block else { return false };
        let Some((layer, rest)) = block.split_once('.') else { return true };
        // Blocks after the last one (multi-token prediction) don't write to the residual stream.
        let Some(layer) = layer.parse().ok().filter(|&l: &usize| l < self.spec.layers) else {
            return false;
        };
        let mut roles = self.spec.roles(layer);
        roles.extend(self.spec.unread(layer));
        if self.spec.experts.is_some() {
            // In a model with experts, a block may have a feed-forward layer where experts are
            // expected, or the reverse. The error then names the tensor that is missing, not the
            // one that is too many.
            roles.extend(Role::FEED_FORWARD);
        }
        match &self.names {
            Names::Gguf { norms } => {
                let biased = self.spec.experts.as_ref().is_some_and(|e| e.biased);
                is_unknown_in_gguf(rest, &roles, norms, biased)
            }
            Names::HuggingFace { moe, .. } => {
                let (module, last) = rest.rsplit_once('.').unwrap_or(("", rest));
                // These change no weight: scales of a quantized cache, and tables that follow from
                // the configuration.
                let harmless = ["k_scale", "v_scale", "q_scale", "output_scale", "inv_freq"];
                let experts = self.spec.experts.as_ref();
                let own = if module.is_empty() { rest } else { module };
                let is_in = |own: &str, parent: &str| {
                    own.strip_prefix(parent).is_some_and(|m| m.is_empty() || m.starts_with('.'))
                };
                let is_zero = || {
                    self.file
                        .tensor(name)
                        .is_some_and(|t| self.file.bytes(t).iter().all(|b| *b == 0))
                };
                // The decoder would leave out an expert beyond the router's, and in most models
                // biases of experts. Some packers write biases of zeros, which may be left out.
                let applied = || {
                    let inside = own.strip_prefix(moe[0]).and_then(|own| own.split('.').nth(1));
                    let exists = match inside.map(str::parse::<usize>) {
                        Some(Ok(n)) => experts.is_some_and(|e| n < e.count),
                        _ => experts.is_some(),
                    };
                    let biased = experts.is_some_and(|e| e.biased);
                    let is_bias = last == "bias" || last.ends_with("_bias");
                    exists && (biased || !is_bias || is_zero())
                };
                let known = |r: &Role| match (r, self.names.within_block(*r)) {
                    (
                        Role::ExpertGate | Role::ExpertUp | Role::ExpertGateUp | Role::ExpertDown,
                        _,
                    ) => is_in(own, moe[0]) && applied(),
                    (_, module) if r.ending().is_empty() => rest == module,
                    (_, module) if r.is_vector() => own == module && last == "weight",
                    (_, module) => is_in(own, &module) && (!r.is_experts() || applied()),
                };
                !harmless.contains(&last) && !roles.iter().any(known)
            }
        }
    }

    /// Checks that a matrix has this shape.
    pub(super) fn expect(&self, name: &str, rows: usize, cols: usize) -> Result<()> {
        let m = self.matrix_named(name)?;
        if (m.rows, m.cols) != (rows, cols) {
            return Err(Error::Model(format!(
                "{}: tensor {name} is {} x {}, but {} asks for {rows} x {cols}",
                self.path(),
                m.rows,
                m.cols,
                self.description()
            )));
        }
        Ok(())
    }

    /// Checks that a vector has this length.
    pub(super) fn expect_len(&self, name: &str, found: usize, expected: usize) -> Result<()> {
        if found != expected {
            return Err(Error::Model(format!(
                "{}: tensor {name} has {found} elements, but {} asks for {expected}",
                self.path(),
                self.description()
            )));
        }
        Ok(())
    }
}

/// The shape of a tensor of a delta net: rows and columns, or a length and 0. `None` for a tensor
/// of another part.
fn of_delta(net: &DeltaNet, role: Role, hidden: usize) -> Option<(usize, usize)> {
    Some(match role {
        Role::DeltaQkv => (net.channels(), hidden),
        Role::DeltaGate => (net.values(), hidden),
        Role::DeltaBeta | Role::DeltaAlpha => (net.value_heads, hidden),
        Role::DeltaConv => (net.channels() * net.kernel, 0),
        Role::DeltaRate | Role::DeltaStep => (net.value_heads, 0),
        Role::DeltaNorm => (net.value_dim, 0),
        Role::DeltaOutput => (hidden, net.values()),
        _ => return None,
    })
}

/// [`Model::is_unknown`] for a block of a GGUF file. `rest`: the tensor's name without the block's
/// prefix. `biased`: experts have biases.
fn is_unknown_in_gguf(rest: &str, roles: &[Role], norms: &NormNames, biased: bool) -> bool {
    let (module, last) = rest.rsplit_once('.').unwrap_or(("", rest));
    let fused_experts = module == "ffn_gate_up_exps" && roles.contains(&Role::ExpertUp);
    let known = |r: &Role| {
        // `input_scale` is for the rounding of activations, and changes no weight.
        let takes_bias = r.takes_bias() || (biased && r.is_experts());
        let extra = last == "input_scale" || (last == "bias" && takes_bias);
        let own = r.gguf_with(norms);
        match r.ending() {
            "" => own == rest,
            _ => own == module && (last == "weight" || extra),
        }
    };
    !(roles.iter().any(known) || (fused_experts && last == "weight"))
}
