//! Activations → difference of means → scored candidates (Arditi et al. 2024, §2.3; the scores are listed in
//! docs/METHOD.md).

use std::ops::Range;

use crate::edit::fold::norm;
use crate::error::{Error, Result};
use crate::forward::{Row, Runner, Sequence, Tap};

/// A tokenized prompt with the positions that the template adds after the instruction.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Post-instruction positions; the last one decides.
    pub post_instruction: Range<usize>,
}

/// The refusal direction of one layer at one post-instruction position.
#[derive(Clone, Debug)]
pub struct Direction {
    /// The block after which the residual stream was read.
    pub layer: usize,
    /// Post-instruction position counted from the deciding one: 0, -1, …
    pub position: isize,
    /// Unit vector from harmless to harmful, `[hidden]`, without its part along the mean harmless state.
    pub unit: Vec<f32>,
    /// (μ_harmful, μ_harmless) over training prompts, `[hidden]` each.
    pub means: (Vec<f32>, Vec<f32>),
    /// ‖μ_harmful − μ_harmless‖ in the residual stream.
    pub gap: f64,
    /// Cosine of the directions of the two halves of the training prompts.
    pub split_half: f64,
    /// Area under the ROC curve of the projection on validation prompts; deciding position only, else NaN.
    pub auc: f64,
    /// (difference of means)² / (sum of variances) of that projection.
    pub fisher: f64,
    /// Cosine to the model's own direction: 1, unless `unit` was given.
    pub own: f64,
}

/// The prompts that a direction is derived from: training prompts give the means, validation prompts the scores.
pub struct Classes {
    /// Harmful prompts.
    pub harmful: Vec<Sample>,
    /// Harmless prompts.
    pub harmless: Vec<Sample>,
}

/// Derives the direction of every layer and post-instruction position, layer by layer, positions from the deciding one
/// backwards. `given`: unit vectors (block, `[hidden]`) that take the place of the derived ones at the deciding position;
/// gap and scores are this model's.
///
/// # Errors
/// No prompts in a class; what the forward pass says.
pub fn derive(
    runner: &Runner,
    layers: usize,
    hidden: usize,
    train: &Classes,
    validation: &Classes,
    given: &[(usize, Vec<f32>)],
) -> Result<Vec<Direction>> {
    let lists = [&train.harmful, &train.harmless, &validation.harmful, &validation.harmless];
    if lists.iter().any(|l| l.is_empty()) {
        return Err(Error::Model(
            "a direction needs harmful and harmless prompts in training and validation".into(),
        ));
    }
    let positions =
        lists.iter().flat_map(|l| l.iter().map(|s| s.post_instruction.len())).min().unwrap_or(1).max(1);
    let samples: Vec<(usize, &Sample)> =
        lists.iter().enumerate().flat_map(|(class, l)| l.iter().map(move |s| (class, s))).collect();
    let sequences: Vec<Sequence> = samples.iter().map(|(_, s)| s.tokens.clone().into()).collect();
    let mut tap = Means {
        samples: &samples,
        positions,
        hidden,
        sums: vec![0.0; layers * positions * 4 * hidden],
        counts: [0; 4],
        deciding: vec![Vec::new(); layers],
    };
    for (i, (class, _)) in samples.iter().enumerate() {
        if *class < 2 {
            tap.counts[class * 2 + i % 2] += 1;
        }
    }
    runner.run(&sequences, &[], &[], &mut tap)?;
    let mut out = Vec::new();
    for layer in 0..layers {
        for k in 0..positions {
            let unit = given.iter().find(|(l, _)| k == 0 && *l == layer).map(|(_, u)| u);
            out.push(tap.direction(layer, k, unit));
        }
    }
    Ok(out)
}

struct Means<'a> {
    /// (class, sample): 0 and 1 train harmful and harmless, 2 and 3 validation.
    samples: &'a [(usize, &'a Sample)],
    positions: usize,
    hidden: usize,
    /// `[layer][position][class × 2 + half][hidden]`
    sums: Vec<f64>,
    counts: [usize; 4],
    /// Validation states at the deciding position: per layer, (class is harmful, `[hidden]`).
    deciding: Vec<Vec<(bool, Vec<f32>)>>,
}

impl Tap for Means<'_> {
    fn residual(&mut self, layer: usize, rows: &[Row], x: &[f32], width: usize) {
        for (row, x) in rows.iter().zip(x.chunks_exact(width)) {
            let (class, sample) = self.samples[row.seq];
            let last = sample.post_instruction.end - 1;
            if row.pos > last || last - row.pos >= self.positions {
                continue;
            }
            let k = last - row.pos;
            if class < 2 {
                let slot = ((layer * self.positions + k) * 4 + class * 2 + row.seq % 2) * self.hidden;
                self.sums[slot..slot + width].iter_mut().zip(x).for_each(|(s, &x)| *s += f64::from(x));
            } else if k == 0 {
                self.deciding[layer].push((class == 2, x.to_vec()));
            }
        }
    }
}

impl Means<'_> {
    fn direction(&self, layer: usize, k: usize, given: Option<&Vec<f32>>) -> Direction {
        let d = self.hidden;
        let mean = |parts: &[usize]| -> Vec<f64> {
            let n: usize = parts.iter().map(|&p| self.counts[p]).sum();
            (0..d)
                .map(|j| {
                    parts
                        .iter()
                        .map(|p| self.sums[((layer * self.positions + k) * 4 + p) * d + j])
                        .sum::<f64>()
                        / n.max(1) as f64
                })
                .collect()
        };
        let minus = |a: &[f64], b: &[f64]| -> Vec<f64> { a.iter().zip(b).map(|(a, b)| a - b).collect() };
        let (harmful, harmless) = (mean(&[0, 1]), mean(&[2, 3]));
        let raw = minus(&harmful, &harmless);
        let split_half = cosine(&minus(&mean(&[0]), &mean(&[2])), &minus(&mean(&[1]), &mean(&[3])));
        // Without the part along the mean harmless state: what all prompts share is no refusal.
        let along: f64 = raw.iter().zip(&harmless).map(|(a, b)| a * b).sum::<f64>()
            / harmless.iter().map(|x| x * x).sum::<f64>().max(f64::MIN_POSITIVE);
        let projected: Vec<f32> = raw.iter().zip(&harmless).map(|(r, h)| (r - along * h) as f32).collect();
        let length = norm(&projected).max(f64::MIN_POSITIVE);
        let derived: Vec<f32> = projected.iter().map(|&x| (f64::from(x) / length) as f32).collect();
        let own =
            given.map_or(1.0, |g| g.iter().zip(&derived).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum());
        let unit = given.cloned().unwrap_or(derived);
        let (auc, fisher) = if k == 0 { scores(&self.deciding[layer], &unit) } else { (f64::NAN, f64::NAN) };
        let narrow = |v: &[f64]| v.iter().map(|&x| x as f32).collect();
        Direction {
            layer,
            position: -(k as isize),
            means: (narrow(&harmful), narrow(&harmless)),
            gap: raw.iter().map(|x| x * x).sum::<f64>().sqrt(),
            unit,
            split_half,
            auc,
            fisher,
            own,
        }
    }
}

fn scores(states: &[(bool, Vec<f32>)], unit: &[f32]) -> (f64, f64) {
    let project = |x: &[f32]| -> f64 { x.iter().zip(unit).map(|(a, b)| f64::from(a * b)).sum() };
    let of = |class: bool| -> Vec<f64> {
        states.iter().filter(|(c, _)| *c == class).map(|(_, x)| project(x)).collect()
    };
    separation(&of(true), &of(false))
}

/// How far apart two classes' projections are: area under the ROC curve, and (difference of means)² / (sum of variances).
pub fn separation(a: &[f64], b: &[f64]) -> (f64, f64) {
    let wins: f64 = a
        .iter()
        .map(|x| {
            b.iter()
                .map(|y| {
                    if x > y {
                        1.0
                    } else if x == y {
                        0.5
                    } else {
                        0.0
                    }
                })
                .sum::<f64>()
        })
        .sum();
    let moments = |v: &[f64]| {
        let n = v.len().max(1) as f64;
        let m = v.iter().sum::<f64>() / n;
        (m, v.iter().map(|x| (x - m).powi(2)).sum::<f64>() / n)
    };
    let ((ma, va), (mb, vb)) = (moments(a), moments(b));
    (wins / (a.len() * b.len()).max(1) as f64, (ma - mb).powi(2) / (va + vb).max(f64::MIN_POSITIVE))
}

/// Cosine of two vectors; 0 where one of them is zero.
pub fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot: f64 = a.iter().zip(b).map(|(a, b)| a * b).sum();
    let norms = (a.iter().map(|x| x * x).sum::<f64>() * b.iter().map(|x| x * x).sum::<f64>()).sqrt();
    if norms > 0.0 {
        dot / norms
    } else {
        0.0
    }
}
