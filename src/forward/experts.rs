//! A block's mixture of experts: each expert reads the rows that chose it.

use rayon::prelude::*;

use super::block::activate;
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
        let d = self.model.spec.hidden;
        let correction = match experts.sigmoid {
            true => Some(self.model.vector(Role::RouterCorrection, layer)?),
            false => None,
        };
        let logits = self.project(Role::Router, layer, normed, rows.len())?;
        let routes = experts.route(&logits, correction.as_deref());
        if experts.shared > 0 {
            let up = self.project(Role::SharedUp, layer, normed, rows.len())?;
            let mut x = self.project(Role::SharedGate, layer, normed, rows.len())?;
            activate(self.model.spec.activation, &mut x, &up);
            if experts.shared_gated {
                let gate = self.model.vector(Role::SharedRouter, layer)?;
                x.par_chunks_mut(experts.shared).zip(normed.par_chunks(d)).for_each(|(x, row)| {
                    let open = 1.0 / (1.0 + (-dot(&gate, row)).exp());
                    x.iter_mut().for_each(|x| *x *= open);
                });
            }
            self.write(layer, Writer::Shared, rows, &x, hidden, tap)?;
        }
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
            activate(self.model.spec.activation, &mut x, &up);
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
                self.add_edit(site, row, x, y);
            });
            for (&(i, _), y) in chosen.iter().zip(y.chunks_exact(d)) {
                hidden[i * d..(i + 1) * d].iter_mut().zip(y).for_each(|(h, y)| *h += y);
            }
        }
        // A constant at the end of the block belongs to the same site as a dense layer's.
        let site = Site { layer, writer: Writer::Ffn, expert: 0 };
        hidden.par_chunks_mut(d).zip(rows).for_each(|(h, row)| self.add_edit(site, row, &[], h));
        Ok(())
    }
}

/// The elements at even places, and those at odd ones.
fn in_turn(both: &[f32]) -> (Vec<f32>, Vec<f32>) {
    both.chunks_exact(2).map(|pair| (pair[0], pair[1])).unzip()
}
