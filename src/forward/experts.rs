//! A block's mixture of experts: each expert reads the rows that chose it.

use rayon::prelude::*;

use super::block::rms_norm;
use super::runner::{Row, Runner, Site, Tap};
use crate::arch::{Experts, Role, Writer};
use crate::error::Result;
use crate::num::dot;

impl Runner<'_> {
    /// Adds a block's shared and routed experts to the residual stream. `normed` and `hidden`:
    /// `[rows, hidden]`.
    pub(super) fn mixture(
        &self,
        layer: usize,
        experts: &Experts,
        rows: &[Row],
        normed: &[f32],
        hidden: &mut [f32],
        tap: &mut dyn Tap,
    ) -> Result<()> {
        let spec = &self.model.spec;
        let correction = match experts.sigmoid {
            true => Some(self.model.vector(Role::RouterCorrection, layer)?),
            false => None,
        };
        let logits = self.project(Role::Router, layer, normed, rows.len())?;
        let routes = experts.route(&logits, correction.as_deref());
        if experts.shared > 0 {
            let up = self.project(Role::SharedUp, layer, normed, rows.len())?;
            let mut x = self.project(Role::SharedGate, layer, normed, rows.len())?;
            spec.activation.gate(&mut x, &up);
            if experts.shared_gated {
                let gate = self.model.vector(Role::SharedRouter, layer)?;
                let of_rows = normed.par_chunks(spec.hidden);
                x.par_chunks_mut(experts.shared).zip(of_rows).for_each(|(x, row)| {
                    let open = 1.0 / (1.0 + (-dot(&gate, row)).exp());
                    x.iter_mut().for_each(|x| *x *= open);
                });
            }
            self.write(layer, Writer::Shared, rows, &x, hidden, tap)?;
        }
        self.add_routed(layer, experts, &routes, rows, normed, hidden, tap)
    }

    /// Adds a dense layer and routed experts that stand side by side. Each has norms of its own
    /// before and behind; their sum is normed, too.
    pub(super) fn side_by_side(
        &self,
        layer: usize,
        experts: &Experts,
        rows: &[Row],
        hidden: &mut [f32],
        tap: &mut dyn Tap,
    ) -> Result<()> {
        let (spec, n) = (&self.model.spec, rows.len());
        let x = self.feed_forward(layer, &self.read(Role::FfnNorm, layer, hidden)?, n)?;
        let dense = self.product(Site { layer, writer: Writer::Ffn, expert: 0 }, rows, &x, tap)?;
        drop(x);
        let mut sum = self.norm_behind(Role::DensePostNorm, layer, rows, &dense, tap)?;
        drop(dense);
        // What the router reads is normed with its scale for a weight.
        let mut weight = self.model.vector(Role::RouterScale, layer)?;
        let root = 1.0 / (spec.hidden as f32).sqrt();
        weight.iter_mut().for_each(|w| *w *= root);
        let read = rms_norm(hidden, &weight, spec.norm_eps);
        let mut routes = experts.route(&self.project(Role::Router, layer, &read, n)?, None);
        drop(read);
        for (chosen, scale) in
            routes.iter_mut().zip(self.model.expert_scales(layer)?.iter().flatten())
        {
            chosen.iter_mut().for_each(|(_, weight)| *weight *= scale);
        }
        let normed = self.read(Role::ExpertNorm, layer, hidden)?;
        let mut routed = vec![0.0f32; hidden.len()];
        self.add_routed(layer, experts, &routes, rows, &normed, &mut routed, tap)?;
        drop(normed);
        let routed = self.norm_behind(Role::ExpertPostNorm, layer, rows, &routed, tap)?;
        sum.par_iter_mut().zip(&routed).for_each(|(s, r)| *s += r);
        let sum = self.norm_behind(Role::FfnPostNorm, layer, rows, &sum, tap)?;
        let scale = spec.scales.residual;
        hidden.par_iter_mut().zip(&sum).for_each(|(h, s)| *h += scale * s);
        Ok(())
    }

    /// Adds the routed experts to `out`. `routes`: the rows that chose each expert, with weights.
    #[allow(clippy::too_many_arguments)]
    fn add_routed(
        &self,
        layer: usize,
        experts: &Experts,
        routes: &[Vec<(usize, f32)>],
        rows: &[Row],
        normed: &[f32],
        out: &mut [f32],
        tap: &mut dyn Tap,
    ) -> Result<()> {
        let spec = &self.model.spec;
        let d = spec.hidden;
        let mut biases = Vec::new();
        for &role in experts.roles() {
            biases.extend(self.model.expert_biases(role, layer)?.map(|all| (role, all)));
        }
        let bias = |role: Role, expert: usize| {
            let all = &biases.iter().find(|(r, _)| *r == role)?.1;
            all.chunks_exact(all.len() / experts.count).nth(expert)
        };
        // An expert at a time: its rows are gathered, its tiles decoded, the result is scattered.
        for (expert, chosen) in routes.iter().enumerate().filter(|(_, chosen)| !chosen.is_empty()) {
            self.compute.check()?;
            let n = chosen.len();
            let input: Vec<f32> = chosen
                .iter()
                .flat_map(|&(i, _)| normed[i * d..(i + 1) * d].iter().copied())
                .collect();
            let product = |role, x: &[f32], weight: &dyn Fn(usize) -> f32| -> Result<Vec<f32>> {
                let mut y = self.compute.matmul(x, n, &self.model.expert(role, layer, expert)?)?;
                if let Some(bias) = bias(role, expert) {
                    for (i, y) in y.chunks_exact_mut(bias.len()).enumerate() {
                        let weight = weight(i);
                        y.iter_mut().zip(bias).for_each(|(y, b)| *y += weight * b);
                    }
                }
                Ok(y)
            };
            let whole = |_: usize| 1.0;
            let (mut x, up) = match experts.alternating {
                true => in_turn(&product(Role::ExpertGateUp, &input, &whole)?),
                false => {
                    let up = product(Role::ExpertUp, &input, &whole)?;
                    (product(Role::ExpertGate, &input, &whole)?, up)
                }
            };
            drop(input);
            spec.activation.gate(&mut x, &up);
            drop(up);
            let width = experts.ffn;
            x.par_chunks_mut(width)
                .zip(chosen)
                .for_each(|(x, &(_, weight))| x.iter_mut().for_each(|x| *x *= weight));
            let site = Site { layer, writer: Writer::Experts, expert };
            let some: Vec<Row> = chosen.iter().map(|&(i, _)| rows[i]).collect();
            tap.writer_input(site, &some, &x, width);
            // The router weighs the bias, too.
            let mut y = product(Role::ExpertDown, &x, &|i| chosen[i].1)?;
            y.par_chunks_mut(d).zip(x.par_chunks(width)).zip(&some).for_each(|((y, x), row)| {
                self.add_gated(site, row, x, y);
            });
            for (&(i, _), y) in chosen.iter().zip(y.chunks_exact(d)) {
                out[i * d..(i + 1) * d].iter_mut().zip(y).for_each(|(h, y)| *h += y);
            }
        }
        Ok(())
    }
}

/// The elements at even places, and those at odd ones.
fn in_turn(both: &[f32]) -> (Vec<f32>, Vec<f32>) {
    both.chunks_exact(2).map(|pair| (pair[0], pair[1])).unzip()
}
