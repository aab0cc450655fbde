//! A block's mixture of experts: each expert reads the rows that chose it.

use rayon::prelude::*;

use super::block::swish;
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
        let routes = experts.route(&self.project(Role::Router, layer, normed, rows.len())?);
        if experts.shared > 0 {
            let up = self.project(Role::SharedUp, layer, normed, rows.len())?;
            let mut x = self.project(Role::SharedGate, layer, normed, rows.len())?;
            swish(&mut x, &up);
            let gate = self.model.vector(Role::SharedRouter, layer)?;
            x.par_chunks_mut(experts.shared).zip(normed.par_chunks(d)).for_each(|(x, row)| {
                let open = 1.0 / (1.0 + (-dot(&gate, row)).exp());
                x.iter_mut().for_each(|x| *x *= open);
            });
            self.write(layer, Writer::Shared, rows, &x, hidden, tap)?;
        }
        // An expert at a time: its rows are gathered, its tiles decoded, the result is scattered.
        for (expert, chosen) in routes.iter().enumerate().filter(|(_, chosen)| !chosen.is_empty()) {
            self.compute.check()?;
            let n = chosen.len();
            let input: Vec<f32> = chosen
                .iter()
                .flat_map(|&(i, _)| normed[i * d..(i + 1) * d].iter().copied())
                .collect();
            let product = |role, x: &[f32]| {
                self.compute.matmul(x, n, &self.model.expert(role, layer, expert)?)
            };
            let up = product(Role::ExpertUp, &input)?;
            let mut x = product(Role::ExpertGate, &input)?;
            drop(input);
            swish(&mut x, &up);
            drop(up);
            let width = experts.ffn;
            x.par_chunks_mut(width)
                .zip(chosen)
                .for_each(|(x, &(_, weight))| x.iter_mut().for_each(|x| *x *= weight));
            let site = Site { layer, writer: Writer::Experts, expert };
            let some: Vec<Row> = chosen.iter().map(|&(i, _)| rows[i]).collect();
            tap.writer_input(site, &some, &x, width);
            let mut y = product(Role::ExpertDown, &x)?;
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
