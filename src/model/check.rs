//! That a checkpoint holds what the decoder needs, in the shapes that it needs, and nothing that it
//! would leave out.

use super::Model;
use crate::arch::{Names, QkNorm, Role};
use crate::error::{Error, Result};

impl Model {
    pub(super) fn check(&self) -> Result<()> {
        let s = &self.spec;
        if let Some(t) = self.file.tensors().iter().find(|t| self.is_odd(&t.name)) {
            return Err(Error::unsupported(
                format!(
                    "{}: tensor {} can't be applied: the decoder has no place for it in {}",
                    self.path(),
                    t.name,
                    s.arch
                ),
                match t.name.ends_with(".scale") {
                    true => "use the model in a type whose tensors have no scale of their own, such as Q8_0",
                    false => "use a file of the same model without it",
                },
            ));
        }
        let (d, q, kv) = (s.hidden, s.heads * s.head_dim, s.kv_heads * s.head_dim);
        let norm_widths = match s.qk_norm {
            QkNorm::Whole => (q, kv),
            _ => (s.head_dim, s.head_dim),
        };
        for layer in 0..s.layers {
            let fused = self.has(Role::AttnQkv, layer)?;
            for role in s.roles(layer) {
                let apart = [Role::AttnQ, Role::AttnK, Role::AttnV].contains(&role);
                if role.is_experts() || (apart && fused) || (role == Role::AttnQkv && !fused) {
                    continue;
                }
                let (rows, cols) = match role {
                    Role::AttnQ => (q, d),
                    Role::AttnK | Role::AttnV => (kv, d),
                    Role::AttnQkv => (q + 2 * kv, d),
                    Role::AttnOutput => (d, q),
                    Role::FfnGate | Role::FfnUp => (s.ffn, d),
                    Role::FfnGateUp => (2 * s.ffn, d),
                    Role::FfnDown => (d, s.ffn),
                    Role::AttnQNorm => (norm_widths.0, 0),
                    Role::AttnKNorm => (norm_widths.1, 0),
                    _ => (d, 0),
                };
                if role.is_norm() {
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
        self.expect(&self.names.embedding(), s.vocab, d)?;
        if !s.tied {
            self.expect(self.names.output(), s.vocab, d)?;
        }
        self.expect_len(&self.names.output_norm(), self.output_norm()?.len(), d)
    }

    /// A tensor that would change what the model computes, and isn't known.
    fn is_odd(&self, name: &str) -> bool {
        let block = match &self.names {
            Names::Gguf if name == "output.bias" => return true,
            Names::Gguf => name.strip_prefix("blk."),
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
        // Blocks behind the last one (multi-token prediction) don't write the main stream.
        let Some(layer) = layer.parse().ok().filter(|&l: &usize| l < self.spec.layers) else {
            return false;
        };
        let mut roles = self.spec.roles(layer);
        if self.spec.experts.is_some() {
            // A block without experts among some with them is told by what is missing there.
            roles.extend(Role::FEED_FORWARD);
        }
        match &self.names {
            Names::Gguf => is_odd_in_gguf(rest, &roles),
            Names::HuggingFace { moe, norms, .. } => {
                let (module, last) = rest.rsplit_once('.').unwrap_or(("", rest));
                // Scales of a quantized cache, and tables that follow from the configuration.
                let cache = ["k_scale", "v_scale", "q_scale", "output_scale", "inv_freq"];
                let experts = self.spec.experts.as_ref();
                let own = if module.is_empty() { rest } else { module };
                let is = |own: &str, name: &str| {
                    own.strip_prefix(name).is_some_and(|m| m.is_empty() || m.starts_with('.'))
                };
                // An expert that the router does not know would be left out silently, and so would
                // experts' biases; some packers write zeros there.
                let zero = || {
                    self.file
                        .tensor(name)
                        .is_some_and(|t| self.file.bytes(t).iter().all(|b| *b == 0))
                };
                let sound = || {
                    let exists = match own.split('.').nth(2).map(str::parse::<usize>) {
                        Some(Ok(n)) => experts.is_some_and(|e| n < e.count),
                        _ => experts.is_some(),
                    };
                    exists && !((last == "bias" || last.ends_with("_bias")) && !zero())
                };
                let known = |r: &Role| match r {
                    Role::Router => is(own, &format!("{moe}.gate")) && sound(),
                    Role::ExpertGate | Role::ExpertUp | Role::ExpertDown => {
                        is(own, &format!("{moe}.experts")) && sound()
                    }
                    _ if r.is_norm() => own == r.hugging_face(norms) && last == "weight",
                    _ => is(own, r.hugging_face(norms)) && (!r.is_experts() || sound()),
                };
                !cache.contains(&last) && !roles.iter().any(known)
            }
        }
    }

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

/// The same of a GGUF's block. `rest`: the tensor's name in it.
fn is_odd_in_gguf(rest: &str, roles: &[Role]) -> bool {
    let (module, last) = rest.rsplit_once('.').unwrap_or(("", rest));
    let fused_experts = module == "ffn_gate_up_exps" && roles.contains(&Role::ExpertUp);
    let fits = |r: &Role| {
        // What activations were rounded by changes no weight.
        let extra = last == "input_scale" || (last == "bias" && r.takes_bias());
        r.gguf() == module && (last == "weight" || extra)
    };
    !(roles.iter().any(fits) || (fused_experts && last == "weight"))
}
