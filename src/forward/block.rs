//! One block: attention, feed-forward layer, and what both add to the residual stream.

use rayon::prelude::*;

use super::attention::{attend, rotate, Span};
use super::cache::Cache;
use super::runner::{Row, Runner, Site, Tap};
use crate::arch::{Activation, QkNorm, Role, Rope, Writer};
use crate::error::Result;
use crate::num::dot;

/// A rotary embedding with its cosines and sines.
type Table<'a> = (&'a Rope, &'a (Vec<f32>, Vec<f32>));

impl Runner<'_> {
    /// The residual stream after a norm: the input of a block's matrices.
    pub(super) fn read(&self, norm: Role, layer: usize, hidden: &[f32]) -> Result<Vec<f32>> {
        match self.model.spec.norms.before() {
            true => Ok(rms_norm(hidden, &self.model.norm(norm, layer)?, self.model.spec.norm_eps)),
            false => Ok(hidden.to_vec()),
        }
    }

    /// The input of the attention's output projection. The first `plain` rows are tokens, the
    /// others forks.
    pub(super) fn attention(
        &self,
        layer: usize,
        rows: &[Row],
        plain: usize,
        hidden: &[f32],
        turn: Option<Table>,
        cache: &mut Cache,
    ) -> Result<Vec<f32>> {
        let spec = &self.model.spec;
        let normed = self.read(Role::AttnNorm, layer, hidden)?;
        let (qw, kvw) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let queries = if spec.gated_attention { 2 * qw } else { qw };
        let apart = [(Role::AttnQ, queries), (Role::AttnK, kvw), (Role::AttnV, kvw)];
        let [mut q, mut k, v] = match self.model.has(Role::AttnQkv, layer)? {
            true => self.split(Role::AttnQkv, apart, layer, &normed, rows.len())?,
            false => [
                self.project(Role::AttnQ, layer, &normed, rows.len())?,
                self.project(Role::AttnK, layer, &normed, rows.len())?,
                self.project(Role::AttnV, layer, &normed, rows.len())?,
            ],
        };
        drop(normed);
        let gate = spec.gated_attention.then(|| {
            let (query, gate) = halves(&q, spec.head_dim);
            q = query;
            gate
        });
        if spec.qk_norm != QkNorm::None {
            // Chunks are as long as the weights: a head, or all of them.
            q = rms_norm(&q, &self.model.norm(Role::AttnQNorm, layer)?, spec.norm_eps);
            k = rms_norm(&k, &self.model.norm(Role::AttnKNorm, layer)?, spec.norm_eps);
        }
        if let Some((rope, (cos, sin))) = turn {
            let half = rope.dims / 2;
            let at = |i: usize| rows[i].pos * half..(rows[i].pos + 1) * half;
            let turned = |(i, x): (usize, &mut [f32])| {
                rotate(x, rope, spec.head_dim, &cos[at(i)], &sin[at(i)]);
            };
            q.par_chunks_mut(qw).enumerate().for_each(turned);
            k.par_chunks_mut(kvw).enumerate().for_each(turned);
            if rope.growth.is_some() {
                q.par_chunks_mut(qw).enumerate().for_each(|(i, x)| {
                    let growth = rope.growth_at(rows[i].pos);
                    x.iter_mut().for_each(|x| *x *= growth);
                });
            }
        }
        cache.keep(layer, &rows[..plain], &k, &v);
        let kv = cache.layer(layer);
        // A fork sees its parent's earlier tokens, and itself.
        let spans: Vec<Span> = rows
            .iter()
            .map(|r| {
                let first = spec.attends[layer].window.map_or(0, |w| (r.pos + 1).saturating_sub(w));
                let seen = r.pos + usize::from(r.fork.is_none()) - first;
                Span { start: r.base + first, seen }
            })
            .collect();
        let sinks = match spec.sinks {
            true => Some(self.model.vector(Role::AttnSinks, layer)?),
            false => None,
        };
        let sinks = sinks.as_deref();
        let mut mixed = attend(&q[..plain * qw], kv, &spans[..plain], None, sinks, spec);
        if rows.len() > plain {
            let own = (&k[plain * kvw..], &v[plain * kvw..]);
            mixed.extend(attend(&q[plain * qw..], kv, &spans[plain..], Some(own), sinks, spec));
        }
        if let Some(gate) = gate {
            mixed.par_iter_mut().zip(&gate).for_each(|(x, g)| *x *= 1.0 / (1.0 + (-g).exp()));
        }
        Ok(mixed)
    }

    /// The input of a dense feed-forward layer's down projection.
    pub(super) fn feed_forward(&self, layer: usize, x: &[f32], n: usize) -> Result<Vec<f32>> {
        let spec = &self.model.spec;
        let apart = [(Role::FfnGate, spec.ffn), (Role::FfnUp, spec.ffn)];
        let [mut gate, up] = match spec.fused_gate_up {
            true => self.split(Role::FfnGateUp, apart, layer, x, n)?,
            false => {
                [self.project(Role::FfnGate, layer, x, n)?, self.project(Role::FfnUp, layer, x, n)?]
            }
        };
        activate(spec.activation, &mut gate, &up);
        Ok(gate)
    }

    /// A matrix's product with its bias, where it has one.
    pub(super) fn project(
        &self,
        role: Role,
        layer: usize,
        x: &[f32],
        n: usize,
    ) -> Result<Vec<f32>> {
        let mut y = self.compute.matmul(x, n, &self.model.matrix(role, layer)?)?;
        self.add_bias(role, layer, &mut y)?;
        Ok(y)
    }

    fn add_bias(&self, role: Role, layer: usize, y: &mut [f32]) -> Result<()> {
        if let Some(bias) = self.model.bias(role, layer)? {
            y.par_chunks_mut(bias.len())
                .for_each(|y| y.iter_mut().zip(&bias).for_each(|(y, b)| *y += b));
        }
        Ok(())
    }

    /// The product of a matrix that holds several, one below the other. `parts`: their roles and
    /// heights. Splitting the product works in every packing; rows of a packed matrix share bytes.
    fn split<const N: usize>(
        &self,
        fused: Role,
        parts: [(Role, usize); N],
        layer: usize,
        x: &[f32],
        n: usize,
    ) -> Result<[Vec<f32>; N]> {
        let y = self.project(fused, layer, x, n)?;
        let width: usize = parts.iter().map(|p| p.1).sum();
        let mut out = [(); N].map(|()| Vec::new());
        let mut from = 0;
        for ((role, height), out) in parts.into_iter().zip(&mut out) {
            out.reserve(n * height);
            y.chunks_exact(width).for_each(|y| out.extend_from_slice(&y[from..from + height]));
            // In GGUF `attn_qkv.weight` can go with `attn_q.bias` and its like. The feed-forward
            // roles share a name with what they are fused in, whose bias is in already.
            if fused == Role::AttnQkv {
                self.add_bias(role, layer, out)?;
            }
            from += height;
        }
        Ok(out)
    }

    /// A writer: projects, adds the rows' edits, adds the result to the residual stream.
    pub(super) fn write(
        &self,
        layer: usize,
        writer: Writer,
        rows: &[Row],
        x: &[f32],
        hidden: &mut [f32],
        tap: &mut dyn Tap,
    ) -> Result<()> {
        let spec = &self.model.spec;
        let width = x.len() / rows.len().max(1);
        let site = Site { layer, writer, expert: 0 };
        tap.writer_input(site, rows, x, width);
        let mut y = self.project(writer.role(), layer, x, rows.len())?;
        let d = spec.hidden;
        let input = |i: usize| &x[i * width..(i + 1) * width];
        if !spec.norms.after() && spec.scales.residual == 1.0 {
            hidden.par_chunks_mut(d).zip(y.par_chunks(d)).enumerate().for_each(|(i, (h, y))| {
                h.iter_mut().zip(y).for_each(|(h, y)| *h += y);
                self.add_edit(site, &rows[i], input(i), h);
            });
            return Ok(());
        }
        // An edit of the matrix changes the input of the norm. A constant is added after the norm.
        y.par_chunks_mut(d).enumerate().for_each(|(i, y)| {
            self.add_terms(site, &rows[i], input(i), y, |gated| gated);
        });
        if spec.norms.after() {
            y = rms_norm(&y, &self.model.norm(writer.post_norm(), layer)?, spec.norm_eps);
        }
        let scale = spec.scales.residual;
        hidden.par_chunks_mut(d).zip(y.par_chunks(d)).enumerate().for_each(|(i, (h, y))| {
            h.iter_mut().zip(y).for_each(|(h, y)| *h += scale * y);
            self.add_terms(site, &rows[i], input(i), h, |gated| !gated);
        });
        Ok(())
    }

    /// Adds a row's edit to a matrix's output: `x` is the matrix's input, `out` is `[hidden]`.
    pub(super) fn add_edit(&self, site: Site, row: &Row, x: &[f32], out: &mut [f32]) {
        self.add_terms(site, row, x, out, |_| true);
    }

    /// Adds the gated terms of a row's edit alone, or the constant ones alone.
    fn add_terms(
        &self,
        site: Site,
        row: &Row,
        x: &[f32],
        out: &mut [f32],
        wanted: fn(bool) -> bool,
    ) {
        let Some(edit) = row.edit else { return };
        let here = edit.iter().filter(|t| t.layer == site.layer && t.writer == site.writer);
        for term in here.filter(|t| wanted(!t.v.is_empty())) {
            let gate = match term.v.get(site.expert * x.len()..) {
                Some(v) if !term.v.is_empty() => dot(&v[..x.len()], x),
                _ => 1.0,
            };
            out.iter_mut().zip(&term.u).for_each(|(o, u)| *o += gate * u);
        }
    }
}

/// Queries and gates, which lie side by side for each head.
fn halves(both: &[f32], head_dim: usize) -> (Vec<f32>, Vec<f32>) {
    let (mut queries, mut gates) = (Vec::new(), Vec::new());
    for head in both.chunks_exact(2 * head_dim) {
        queries.extend_from_slice(&head[..head_dim]);
        gates.extend_from_slice(&head[head_dim..]);
    }
    (queries, gates)
}

/// gate ← activation(gate) · up
pub(super) fn activate(activation: Activation, gate: &mut [f32], up: &[f32]) {
    match activation {
        Activation::Silu => swish(gate, up),
        Activation::GeluTanh => gelu(gate, up),
        Activation::ClampedSwiglu => clamped_swiglu(gate, up),
    }
}

/// gate ← silu(gate) · up
fn swish(gate: &mut [f32], up: &[f32]) {
    gate.par_iter_mut().zip(up).for_each(|(g, u)| *g = *g / (1.0 + (-*g).exp()) * u);
}

/// gate ← g / (1 + e^(−1.702 g)) · (u + 1), of gate g up to 7 and up projection u from −7 to 7.
fn clamped_swiglu(gate: &mut [f32], up: &[f32]) {
    gate.par_iter_mut().zip(up).for_each(|(gate, up)| {
        // `min` would hide what is not a number.
        let g = if *gate > 7.0 { 7.0 } else { *gate };
        let u = up.clamp(-7.0, 7.0);
        *gate = g / (1.0 + (-1.702 * g).exp()) * (u + 1.0);
    });
}

/// gate ← gelu(gate) · up, by the tanh approximation.
fn gelu(gate: &mut [f32], up: &[f32]) {
    let of = |x: f32| {
        let inner = std::f32::consts::FRAC_2_PI.sqrt() * (x + 0.044_715 * x * x * x);
        0.5 * x * (1.0 + inner.tanh())
    };
    gate.par_iter_mut().zip(up).for_each(|(g, u)| *g = of(*g) * u);
}

/// x / rms(x) · w over chunks of `w.len()`.
pub(super) fn rms_norm(x: &[f32], w: &[f32], eps: f32) -> Vec<f32> {
    let mut out = vec![0.0f32; x.len()];
    out.par_chunks_mut(w.len()).zip(x.par_chunks(w.len())).for_each(|(out, x)| {
        let mean = dot(x, x) / w.len() as f32;
        let scale = 1.0 / (mean + eps).sqrt();
        for i in 0..w.len() {
            out[i] = x[i] * scale * w[i];
        }
    });
    out
}
