//! What an edit does off its direction to the inputs that must not notice it.

use std::collections::HashMap;

use serde::Serialize;

use super::Evaluator;
use crate::arch::Writer;
use crate::error::Result;
use crate::forward::{Compute, Row, Site, Tap};
use crate::model::Part;
use crate::num::norm;
use crate::text::PromptRecord;
use crate::weights::Stack;

/// Inputs that are looked at.
const ROWS: usize = 1024;
/// Prompts they come from.
const PROMPTS: usize = 64;

/// √(Σ ‖(I − ûûᵀ) Δ x‖² / Σ ‖W x‖²) over a writer's inputs x on harmless prompts.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct OffDirection {
    /// Over all outputs.
    pub overall: f64,
    /// For the output where it is worst.
    pub worst_row: f64,
}

/// What writers read on harmless prompts: `[rows, width]` by matrix.
pub type WriterInputs = HashMap<Site, Vec<f32>>;

/// Runs the evaluator's model on harmless prompts, some rows of each. `writers`: those that are
/// looked at, with their blocks.
///
/// # Errors
/// What the forward pass says.
pub fn writer_inputs(
    evaluator: &Evaluator,
    prompts: &[&PromptRecord],
    writers: &[(usize, Writer)],
) -> Result<WriterInputs> {
    struct Collect<'a> {
        writers: &'a [(usize, Writer)],
        step: usize,
        x: WriterInputs,
    }
    impl Tap for Collect<'_> {
        fn writer_input(&mut self, site: Site, rows: &[Row], x: &[f32], width: usize) {
            if self.writers.contains(&(site.layer, site.writer)) {
                let kept = self.x.entry(site).or_default();
                // By place in its text, so that batches make no difference.
                let some =
                    rows.iter().zip(x.chunks_exact(width)).filter(|(r, _)| r.pos % self.step == 0);
                some.for_each(|(_, row)| kept.extend_from_slice(row));
            }
        }
    }
    let samples = evaluator.samples(&prompts[..prompts.len().min(PROMPTS)])?;
    let sequences: Vec<Vec<u32>> = samples.into_iter().map(|s| s.tokens).collect();
    let rows: usize = sequences.iter().map(|s| s.len()).sum();
    let mut tap = Collect { writers, step: rows.div_ceil(ROWS).max(1), x: WriterInputs::new() };
    evaluator.runner().run(&sequences, &[], &[], &mut tap)?;
    Ok(tap.x)
}

/// Of what was collected the inputs of each matrix of a writer's part; empty where there were none.
pub fn inputs_of<'x>(
    all: &'x WriterInputs,
    layer: usize,
    writer: Writer,
    part: &Part,
) -> Vec<&'x [f32]> {
    let site = |i| Site { layer, writer, expert: part.first + i };
    (0..part.stack.len()).map(|i| all.get(&site(i)).map_or(&[][..], Vec::as_slice)).collect()
}

/// How far `after` is from `before` off the direction of `u`, over all matrices of a tensor, on
/// their inputs `x` (`[rows, columns]` each).
///
/// # Errors
/// What the matrix product says.
pub fn off_direction(
    compute: &Compute,
    before: &Stack,
    after: &Stack,
    u: &[f32],
    x: &[&[f32]],
) -> Result<OffDirection> {
    let (d, cols) = before.shape();
    let length = norm(u).max(f64::MIN_POSITIVE);
    let unit: Vec<f64> = u.iter().map(|&x| f64::from(x) / length).collect();
    let (mut off, mut whole) = (vec![0.0f64; d], vec![0.0f64; d]);
    for ((before, after), x) in before.iter().zip(after.iter()).zip(x) {
        let n = x.len() / cols;
        let (a, b) = (compute.matmul(x, n, &before)?, compute.matmul(x, n, &after)?);
        for (a, b) in a.chunks_exact(d).zip(b.chunks_exact(d)) {
            let delta: Vec<f64> =
                a.iter().zip(b).map(|(a, b)| f64::from(*b) - f64::from(*a)).collect();
            let along: f64 = delta.iter().zip(&unit).map(|(x, u)| x * u).sum();
            for i in 0..d {
                off[i] += (delta[i] - along * unit[i]).powi(2);
                whole[i] += f64::from(a[i]).powi(2);
            }
        }
    }
    let share = |off: f64, whole: f64| (off / whole.max(f64::MIN_POSITIVE)).sqrt();
    Ok(OffDirection {
        overall: share(off.iter().sum(), whole.iter().sum()),
        worst_row: off.iter().zip(&whole).map(|(o, w)| share(*o, *w)).fold(0.0, f64::max),
    })
}
