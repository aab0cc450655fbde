//! The lengths of writers' products where norms follow the writers.

use std::collections::HashMap;

use super::baseline::Baseline;
use crate::arch::{Role, Writer};
use crate::error::Result;
use crate::forward::{Row, Tap};
use crate::text::{PromptRecord, Set, Split};

/// Training prompts that are looked at.
const PROMPTS: usize = 48;

/// The mean of what the norms behind a writer divide its product by, at the deciding positions of
/// harmful prompts, by block and writer: an edit there is multiplied by it.
pub(super) type Lengths = HashMap<(usize, Writer), f64>;

/// Measures some blocks in one pass; empty where no norm follows the writers.
pub(super) fn lengths(baseline: &Baseline, layers: &[usize]) -> Result<Lengths> {
    /// Keeps the root mean squares of what the norms of `layers` read at the last token of each
    /// sequence.
    struct Collect<'a> {
        layers: &'a [usize],
        last: Vec<usize>,
        hidden: usize,
        eps: f64,
        lengths: Vec<((usize, Role), f64)>,
    }
    impl Tap for Collect<'_> {
        fn norm_behind(&mut self, layer: usize, norm: Role, rows: &[Row], y: &[f32]) {
            if !self.layers.contains(&layer) {
                return;
            }
            let deciding = |row: &Row| self.last[row.seq] == row.pos;
            let some = rows.iter().zip(y.chunks_exact(self.hidden)).filter(|(r, _)| deciding(r));
            self.lengths.extend(some.map(|(_, y)| {
                let sum: f64 = y.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
                ((layer, norm), (sum / y.len() as f64 + self.eps).sqrt())
            }));
        }
    }
    let evaluator = baseline.evaluator;
    let spec = &evaluator.model.spec;
    if !spec.norms.after() {
        return Ok(Lengths::new());
    }
    let harmful: Vec<&PromptRecord> = baseline.prompts.of(Set::Harmful, Split::Train);
    let samples = evaluator.samples(&harmful[..harmful.len().min(PROMPTS)])?;
    let sequences: Vec<Vec<u32>> = samples.into_iter().map(|s| s.tokens).collect();
    let last: Vec<usize> = sequences.iter().map(|s| s.len() - 1).collect();
    let (hidden, eps) = (spec.hidden, f64::from(spec.norm_eps));
    let n = last.len();
    let mut tap = Collect { layers, last, hidden, eps, lengths: Vec::new() };
    evaluator.runner().run(&sequences, &[], &[], &mut tap)?;
    let mut out = Lengths::new();
    for &layer in layers {
        for &writer in spec.writers(layer) {
            // Of two norms the second divides again, row by row.
            let mut all = vec![1.0f64; n];
            for &norm in spec.post_norms(layer, writer) {
                let of = tap.lengths.iter().filter(|(at, _)| *at == (layer, norm));
                all.iter_mut().zip(of).for_each(|(all, (_, length))| *all *= length);
            }
            out.insert((layer, writer), all.iter().sum::<f64>() / n.max(1) as f64);
        }
    }
    Ok(out)
}
