//! One block: attention, feed-forward layer, and what both add to the residual stream.

use std::ops::Range;

use rayon::prelude::*;

use super::attention::{attend, rotate, Kv, Span};
use super::cache::Cache;
use super::per_layer::Beside;
use super::runner::{Row, Runner, Site, Tap};
use crate::arch::{Activation, QkNorm, Role, Rope, Writer};
use crate::edit::RankOne;
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
        let block = &spec.blocks[layer];
        let (hd, qw, kvw) = (block.head_dim, spec.heads * block.head_dim, block.kv_width());
        // The block whose keys and values are read.
        let source = block.shares.unwrap_or(layer);
        let own = source == layer;
        let queries = if spec.gated_attention { 2 * qw } else { qw };
        let apart = [(Role::AttnQ, queries), (Role::AttnK, kvw), (Role::AttnV, kvw)];
        let [mut q, mut k, mut v] = if own && !block.keys_are_values {
            match self.model.has(Role::AttnQkv, layer)? {
                true => self.split(Role::AttnQkv, apart, layer, &normed, rows.len())?,
                false => [
                    self.project(Role::AttnQ, layer, &normed, rows.len())?,
                    self.project(Role::AttnK, layer, &normed, rows.len())?,
                    self.project(Role::AttnV, layer, &normed, rows.len())?,
                ],
            }
        } else {
            let q = self.project(Role::AttnQ, layer, &normed, rows.len())?;
            let k = match own {
                true => self.project(Role::AttnK, layer, &normed, rows.len())?,
                false => Vec::new(),
            };
            [q, k.clone(), k]
        };
        drop(normed);
        let gate = spec.gated_attention.then(|| {
            let (query, gate) = halves(&q, hd);
            q = query;
            gate
        });
        if spec.qk_norm != QkNorm::None {
            // Chunks are as long as the weights: a head, or all of them.
            q = rms_norm(&q, &self.model.norm(Role::AttnQNorm, layer)?, spec.norm_eps);
            if own {
                k = rms_norm(&k, &self.model.norm(Role::AttnKNorm, layer)?, spec.norm_eps);
            }
        }
        if spec.value_norm {
            v = rms_norm(&v, &vec![1.0; hd], spec.norm_eps);
        }
        if let Some((rope, (cos, sin))) = turn {
            let half = rope.dims / 2;
            let at = |i: usize| rows[i].pos * half..(rows[i].pos + 1) * half;
            let turned = |(i, x): (usize, &mut [f32])| {
                rotate(x, rope, hd, &cos[at(i)], &sin[at(i)]);
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
        if own {
            cache.keep(layer, &rows[..plain], &k, &v);
            cache
                .keep_forks(layer, Kv { k: k.split_off(plain * kvw), v: v.split_off(plain * kvw) });
        }
        drop((k, v));
        let (kv, forked) = (cache.layer(source), cache.forks(source));
        // The forks that ran in the block of the keys and values have some of their own. For the
        // others, which joined later, their parents' are the same.
        let with_own = plain + forked.k.len() / kvw;
        let spans: Vec<Span> = rows
            .iter()
            .enumerate()
            .map(|(i, r)| {
                let first = block.window.map_or(0, |w| (r.pos + 1).saturating_sub(w));
                let has_own = (plain..with_own).contains(&i);
                let seen = r.pos + usize::from(!has_own) - first;
                Span { start: r.base + first, seen }
            })
            .collect();
        let sinks = match spec.sinks {
            true => Some(self.model.vector(Role::AttnSinks, layer)?),
            false => None,
        };
        let part = |of: Range<usize>, own| {
            let q = &q[of.start * qw..of.end * qw];
            attend(q, kv, &spans[of], own, sinks.as_deref(), spec, block)
        };
        let mut mixed = part(0..plain, None);
        mixed.extend(part(plain..with_own, Some((&forked.k[..], &forked.v[..]))));
        mixed.extend(part(with_own..rows.len(), None));
        if let Some(gate) = gate {
            mixed.par_iter_mut().zip(&gate).for_each(|(x, g)| *x *= 1.0 / (1.0 + (-g).exp()));
        }
        Ok(mixed)
    }

    /// The input of a dense feed-forward layer's down projection.
    pub(super) fn feed_forward(&self, layer: usize, x: &[f32], n: usize) -> Result<Vec<f32>> {
        let spec = &self.model.spec;
        let width = spec.blocks[layer].ffn;
        let apart = [(Role::FfnGate, width), (Role::FfnUp, width)];
        let [mut gate, up] = match spec.fused_gate_up {
            true => self.split(Role::FfnGateUp, apart, layer, x, n)?,
            false => {
                [self.project(Role::FfnGate, layer, x, n)?, self.project(Role::FfnUp, layer, x, n)?]
            }
        };
        spec.activation.gate(&mut gate, &up);
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
        let d = spec.hidden;
        let input = |i: usize| &x[i * width..(i + 1) * width];
        if !spec.norms.after() && spec.scales.residual == 1.0 {
            tap.writer_input(site, rows, x, width);
            let y = self.project(writer.role(), layer, x, rows.len())?;
            hidden.par_chunks_mut(d).zip(y.par_chunks(d)).enumerate().for_each(|(i, (h, y))| {
                h.iter_mut().zip(y).for_each(|(h, y)| *h += y);
                self.add_gated(site, &rows[i], input(i), h);
                self.add_constants(site, &rows[i], h);
            });
            return Ok(());
        }
        // An edit of the matrix changes the input of the norm. A constant is added after the norm.
        let mut y = self.product(site, rows, x, tap)?;
        for norm in spec.post_norms(layer, writer) {
            y = self.norm_behind(*norm, layer, rows, &y, tap)?;
        }
        let scale = spec.scales.residual;
        hidden.par_chunks_mut(d).zip(y.par_chunks(d)).enumerate().for_each(|(i, (h, y))| {
            h.iter_mut().zip(y).for_each(|(h, y)| *h += scale * y);
            self.add_constants(site, &rows[i], h);
        });
        Ok(())
    }

    /// The product of a writer's matrix with the rows' gated terms.
    pub(super) fn product(
        &self,
        site: Site,
        rows: &[Row],
        x: &[f32],
        tap: &mut dyn Tap,
    ) -> Result<Vec<f32>> {
        let width = x.len() / rows.len().max(1);
        tap.writer_input(site, rows, x, width);
        let mut y = self.project(site.writer.role(), site.layer, x, rows.len())?;
        y.par_chunks_mut(self.model.spec.hidden).enumerate().for_each(|(i, y)| {
            self.add_gated(site, &rows[i], &x[i * width..(i + 1) * width], y);
        });
        Ok(y)
    }

    /// What a norm behind a writer makes of its input.
    pub(super) fn norm_behind(
        &self,
        norm: Role,
        layer: usize,
        rows: &[Row],
        y: &[f32],
        tap: &mut dyn Tap,
    ) -> Result<Vec<f32>> {
        tap.norm_behind(layer, norm, rows, y);
        Ok(rms_norm(y, &self.model.norm(norm, layer)?, self.model.spec.norm_eps))
    }

    /// Ends a block: per-layer embeddings write, the whole stream gets its factor, and after all
    /// of it come the constants of edits, as a control vector does.
    pub(super) fn end(
        &self,
        layer: usize,
        rows: &[Row],
        beside: &Beside,
        hidden: &mut [f32],
    ) -> Result<()> {
        self.add_per_layer(layer, beside, hidden)?;
        let scale = self.model.output_scale(layer)?;
        if scale != 1.0 {
            hidden.par_iter_mut().for_each(|h| *h *= scale);
        }
        let site = Site { layer, writer: END, expert: 0 };
        let d = self.model.spec.hidden;
        hidden.par_chunks_mut(d).zip(rows).for_each(|(h, row)| {
            for term in terms(row, site).filter(|t| t.v.is_empty()) {
                h.iter_mut().zip(&term.u).for_each(|(h, u)| *h += u);
            }
        });
        Ok(())
    }

    /// Adds the gated terms of a row's edit to a matrix's output: `x` is the matrix's input, `out`
    /// is `[hidden]`.
    pub(super) fn add_gated(&self, site: Site, row: &Row, x: &[f32], out: &mut [f32]) {
        for term in terms(row, site) {
            let Some(v) = term.v.get(site.expert * x.len()..).filter(|_| !term.v.is_empty()) else {
                continue;
            };
            let gate = dot(&v[..x.len()], x);
            out.iter_mut().zip(&term.u).for_each(|(o, u)| *o += gate * u);
        }
    }

    /// Adds the constants of a row's edit, but those of the block's end.
    fn add_constants(&self, site: Site, row: &Row, out: &mut [f32]) {
        for term in terms(row, site).filter(|t| t.v.is_empty() && t.writer != END) {
            out.iter_mut().zip(&term.u).for_each(|(o, u)| *o += u);
        }
    }
}

/// A constant of this writer is added at the block's end.
const END: Writer = Writer::Ffn;

/// The terms of a row's edit at a site.
fn terms<'r>(row: &'r Row, site: Site) -> impl Iterator<Item = &'r RankOne> {
    let all = row.edit.into_iter().flatten();
    all.filter(move |t| t.layer == site.layer && t.writer == site.writer)
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

impl Activation {
    /// gate ← activation(gate) · up
    pub(super) fn gate(self, gate: &mut [f32], up: &[f32]) {
        match self {
            Activation::Silu => swish(gate, up),
            Activation::GeluTanh => gelu(gate, up),
            Activation::ClampedSwiglu => clamped_swiglu(gate, up),
        }
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
