//! The lengths of writers' products where a norm follows the writers.

use std::collections::HashMap;

use super::baseline::Baseline;
use crate::arch::Writer;
use crate::error::Result;
use crate::forward::{Row, Site, Tap};
use crate::text::{PromptRecord, Set, Split};

/// Training prompts that are looked at.
const PROMPTS: usize = 48;

/// The mean root mean square of a writer's product at the deciding positions of harmful prompts, by
/// block and writer: what an edit is divided by there.
pub(super) type Lengths = HashMap<(usize, Writer), f64>;

/// Measures some blocks in one pass; empty where no norm follows the writers.
pub(super) fn lengths(baseline: &Baseline, layers: &[usize]) -> Result<Lengths> {
    /// Keeps what the writers of `layers` read at the last token of each sequence.
    struct Collect<'a> {
        layers: &'a [usize],
        last: Vec<usize>,
        x: HashMap<(usize, Writer), Vec<f32>>,
    }
    impl Tap for Collect<'_> {
        fn writer_input(&mut self, site: Site, rows: &[Row], x: &[f32], width: usize) {
            if self.layers.contains(&site.layer) {
                let kept = self.x.entry((site.layer, site.writer)).or_default();
                let deciding = |row: &Row| self.last[row.seq] == row.pos;
                let some = rows.iter().zip(x.chunks_exact(width)).filter(|(row, _)| deciding(row));
                some.for_each(|(_, x)| kept.extend_from_slice(x));
            }
        }
    }
    let evaluator = baseline.evaluator;
    let model = evaluator.model;
    if !model.spec.norms.after() {
        return Ok(Lengths::new());
    }
    let harmful: Vec<&PromptRecord> = baseline.prompts.of(Set::Harmful, Split::Train);
    let samples = evaluator.samples(&harmful[..harmful.len().min(PROMPTS)])?;
    let sequences: Vec<Vec<u32>> = samples.into_iter().map(|s| s.tokens).collect();
    let last = sequences.iter().map(|s| s.len() - 1).collect();
    let mut tap = Collect { layers, last, x: HashMap::new() };
    evaluator.runner().run(&sequences, &[], &[], &mut tap)?;
    let mut out = Lengths::new();
    for ((layer, writer), x) in tap.x {
        let (_, w) = model.writer(layer, writer)?;
        let n = x.len() / w.cols;
        let y = evaluator.compute.matmul(&x, n, &w)?;
        let length = |y: &[f32]| {
            let sum: f64 = y.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
            (sum / y.len() as f64 + f64::from(model.spec.norm_eps)).sqrt()
        };
        out.insert(
            (layer, writer),
            y.chunks_exact(w.rows).map(length).sum::<f64>() / n.max(1) as f64,
        );
    }
    Ok(out)
}
