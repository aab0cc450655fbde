//! What an edit does off its direction to the inputs that must not notice it.

use serde::Serialize;

use super::Evaluator;
use crate::edit::fold::norm;
use crate::error::Result;
use crate::forward::{Row, Sequence, Tap};
use crate::model::{Matrix, Model, Writer};
use crate::text::{PromptSet, Set, Split};

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

/// Runs the evaluator's model on harmless test prompts and measures how far `after` is from the tensor
/// called `name`, off the direction of `u`. `None` when the tensor is no writer.
///
/// # Errors
/// What the forward pass says.
pub fn off_direction(
    evaluator: &Evaluator,
    prompts: &PromptSet,
    name: &str,
    after: &Matrix,
    u: &[f32],
) -> Result<Option<OffDirection>> {
    let writers = (0..evaluator.model.spec.layers).flat_map(|l| Writer::ALL.map(|w| (l, w)));
    let Some((layer, writer)) = writers.into_iter().find(|&(l, w)| Model::name(w.role(), l) == name) else {
        return Ok(None);
    };
    let (_, before) = evaluator.model.writer(layer, writer)?;
    let x = inputs(evaluator, prompts, layer, writer)?;
    let n = x.len() / before.cols;
    let (a, b) = (evaluator.compute.matmul(&x, n, &before)?, evaluator.compute.matmul(&x, n, after)?);
    let length = norm(u).max(f64::MIN_POSITIVE);
    let unit: Vec<f64> = u.iter().map(|&x| f64::from(x) / length).collect();
    let d = before.rows;
    let (mut off, mut whole) = (vec![0.0f64; d], vec![0.0f64; d]);
    for (a, b) in a.chunks_exact(d).zip(b.chunks_exact(d)) {
        let delta: Vec<f64> = a.iter().zip(b).map(|(a, b)| f64::from(*b) - f64::from(*a)).collect();
        let along: f64 = delta.iter().zip(&unit).map(|(x, u)| x * u).sum();
        for i in 0..d {
            off[i] += (delta[i] - along * unit[i]).powi(2);
            whole[i] += f64::from(a[i]).powi(2);
        }
    }
    let share = |off: f64, whole: f64| (off / whole.max(f64::MIN_POSITIVE)).sqrt();
    Ok(Some(OffDirection {
        overall: share(off.iter().sum(), whole.iter().sum()),
        worst_row: off.iter().zip(&whole).map(|(o, w)| share(*o, *w)).fold(0.0, f64::max),
    }))
}

fn inputs(evaluator: &Evaluator, prompts: &PromptSet, layer: usize, writer: Writer) -> Result<Vec<f32>> {
    struct Collect {
        at: (usize, Writer),
        x: Vec<f32>,
    }
    impl Tap for Collect {
        fn writer_input(&mut self, layer: usize, writer: Writer, rows: &[Row], x: &[f32], width: usize) {
            if (layer, writer) == self.at {
                let step = rows.len().div_ceil(ROWS).max(1);
                x.chunks_exact(width).step_by(step).for_each(|row| self.x.extend_from_slice(row));
            }
        }
    }
    let prompts = prompts.of(Set::Harmless, Split::Test);
    let samples = evaluator.samples(&prompts[..prompts.len().min(PROMPTS)])?;
    let sequences: Vec<Sequence> = samples.into_iter().map(|s| s.tokens.into()).collect();
    let mut tap = Collect { at: (layer, writer), x: Vec::new() };
    evaluator.runner().run(&sequences, &[], &[], &mut tap)?;
    Ok(tap.x)
}
