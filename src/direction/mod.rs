//! Activations → difference of means → scored candidates (Arditi et al. 2024, §2.3; the scores are
//! listed in docs/METHOD.md).

use crate::error::{Error, Result};
use crate::forward::{Row, Runner, Tap};
use crate::num::{cosine, norm, without};
use crate::text::Prompt;

/// Mean states of two classes, `[hidden]` each.
#[derive(Clone, Debug)]
pub struct ClassMeans {
    /// Of harmful prompts.
    pub harmful: Vec<f32>,
    /// Of harmless prompts.
    pub harmless: Vec<f32>,
}

/// The refusal direction of one layer at one post-instruction position.
#[derive(Clone, Debug)]
pub struct Direction {
    /// The block after which the residual stream was read.
    pub layer: usize,
    /// Post-instruction position counted from the deciding one: 0, -1, …
    pub position: isize,
    /// Unit vector from harmless to harmful, `[hidden]`, without its part along the mean harmless
    /// state.
    pub unit: Vec<f32>,
    /// Mean states of training prompts.
    pub means: ClassMeans,
    /// ‖μ_harmful − μ_harmless‖ in the residual stream.
    pub gap: f64,
    /// Cosine of the directions of the two halves of the training prompts.
    pub split_half: f64,
    /// Area under the ROC curve of the projection on validation prompts; deciding position only,
    /// else NaN.
    pub auc: f64,
    /// (difference of means)² / (sum of variances) of that projection.
    pub fisher: f64,
    /// Cosine to the model's own direction: 1, unless `unit` was given.
    pub own: f64,
    /// Unit vector from answered to refused training prompts of any class, `[hidden]`, made like
    /// `unit`; deciding position only, and only where [`Classes::refused`] says which are refused.
    pub refused: Option<Vec<f32>>,
}

/// The prompts that a direction is derived from: training prompts give the means, validation
/// prompts the scores.
pub struct Classes {
    /// Harmful prompts.
    pub harmful: Vec<Prompt>,
    /// Harmless prompts.
    pub harmless: Vec<Prompt>,
    /// Borderline prompts. Only [`Direction::refused`] reads them.
    pub borderline: Vec<Prompt>,
    /// Whether the model refuses each of the harmful, the harmless and the borderline prompts, in
    /// that order. Empty: not known.
    pub refused: Vec<bool>,
}

impl Classes {
    /// Whether the model refuses a prompt of these.
    fn is_refused(&self, index: usize) -> Option<bool> {
        self.refused.get(index).copied()
    }
}

/// Derives the direction of every layer and post-instruction position, layer by layer, positions
/// from the deciding one backwards. `given`: unit vectors (block, `[hidden]`) that take the place
/// of the derived ones at the deciding position; gap and scores are this model's.
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
    let positions = lists
        .iter()
        .flat_map(|l| l.iter().map(|s| s.post_instruction.len()))
        .min()
        .unwrap_or(1)
        .max(1);
    let mut samples: Vec<Seen> = Vec::new();
    for (class, list) in lists.into_iter().enumerate() {
        samples.extend(list.iter().map(|sample| Seen { class, sample, refused: None }));
    }
    // Training prompts come first.
    let plain = train.harmful.len() + train.harmless.len();
    samples[..plain].iter_mut().enumerate().for_each(|(i, s)| s.refused = train.is_refused(i));
    let borderline = train.borderline.iter().enumerate();
    let of = |(i, sample)| Seen { class: BORDERLINE, sample, refused: train.is_refused(plain + i) };
    samples.extend(borderline.map(of).filter(|s| s.refused.is_some()));
    let sequences: Vec<Vec<u32>> = samples.iter().map(|s| s.sample.tokens.clone()).collect();
    let mut tap = Means {
        samples: &samples,
        positions,
        hidden,
        sums: vec![0.0; layers * positions * 4 * hidden],
        counts: [0; 4],
        by_answer: vec![0.0; layers * 2 * hidden],
        answers: [0; 2],
        deciding: vec![Vec::new(); layers],
    };
    for (i, s) in samples.iter().enumerate() {
        if s.class < 2 {
            tap.counts[s.class * 2 + i % 2] += 1;
        }
        if let Some(refused) = s.refused {
            tap.answers[usize::from(refused)] += 1;
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

/// The class of borderline training prompts.
const BORDERLINE: usize = 4;
/// How many refused (or answered) prompts weigh as much as the class means: with fewer of them the
/// direction shrinks towards the difference of the class means.
const SHRINK: f64 = 8.0;

/// A prompt of the pass.
struct Seen<'a> {
    /// 0 and 1: train harmful and harmless; 2 and 3: validation; [`BORDERLINE`].
    class: usize,
    sample: &'a Prompt,
    refused: Option<bool>,
}

struct Means<'a> {
    samples: &'a [Seen<'a>],
    positions: usize,
    hidden: usize,
    /// `[layer][position][class × 2 + half][hidden]`
    sums: Vec<f64>,
    counts: [usize; 4],
    /// `[layer][answered, refused][hidden]`, training prompts at the deciding position.
    by_answer: Vec<f64>,
    answers: [usize; 2],
    /// Validation states at the deciding position: per layer, (class is harmful, `[hidden]`).
    deciding: Vec<Vec<(bool, Vec<f32>)>>,
}

impl Tap for Means<'_> {
    fn shared(&self) -> usize {
        usize::MAX
    }

    fn residual(&mut self, layer: usize, rows: &[Row], x: &[f32], width: usize) {
        for (row, x) in rows.iter().zip(x.chunks_exact(width)) {
            let Seen { class, sample, refused } = self.samples[row.seq];
            let last = sample.post_instruction.end - 1;
            if row.pos > last || last - row.pos >= self.positions {
                continue;
            }
            let k = last - row.pos;
            if let (0, Some(refused)) = (k, refused) {
                let slot = (layer * 2 + usize::from(refused)) * self.hidden;
                self.by_answer[slot..slot + width]
                    .iter_mut()
                    .zip(x)
                    .for_each(|(s, &x)| *s += f64::from(x));
            }
            if class < 2 {
                let slot =
                    ((layer * self.positions + k) * 4 + class * 2 + row.seq % 2) * self.hidden;
                self.sums[slot..slot + width]
                    .iter_mut()
                    .zip(x)
                    .for_each(|(s, &x)| *s += f64::from(x));
            } else if k == 0 && class != BORDERLINE {
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
        let minus =
            |a: &[f64], b: &[f64]| -> Vec<f64> { a.iter().zip(b).map(|(a, b)| a - b).collect() };
        let (harmful, harmless) = (mean(&[0, 1]), mean(&[2, 3]));
        let raw = minus(&harmful, &harmless);
        let split_half = cosine(&minus(&mean(&[0]), &mean(&[2])), &minus(&mean(&[1]), &mean(&[3])));
        let derived = unit_without(&raw, &harmless);
        let refused = (k == 0 && self.answers != [0, 0])
            .then(|| unit_without(&self.refused(layer, &raw), &harmless));
        let own = given.map_or(1.0, |g| {
            g.iter().zip(&derived).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        });
        let unit = given.cloned().unwrap_or(derived);
        let (auc, fisher) =
            if k == 0 { scores(&self.deciding[layer], &unit) } else { (f64::NAN, f64::NAN) };
        let narrow = |v: &[f64]| v.iter().map(|&x| x as f32).collect();
        Direction {
            layer,
            position: -(k as isize),
            means: ClassMeans { harmful: narrow(&harmful), harmless: narrow(&harmless) },
            gap: raw.iter().map(|x| x * x).sum::<f64>().sqrt(),
            unit,
            split_half,
            auc,
            fisher,
            own,
            refused,
        }
    }

    /// Mean state of refused less mean state of answered training prompts, shrunk towards `raw`,
    /// the difference of the class means, where either are few (docs/METHOD.md, "The direction").
    fn refused(&self, layer: usize, raw: &[f64]) -> Vec<f64> {
        let fewer = self.answers[0].min(self.answers[1]) as f64;
        let share = fewer / (fewer + SHRINK);
        let mean = |refused: usize, j: usize| {
            self.by_answer[(layer * 2 + refused) * self.hidden + j]
                / self.answers[refused].max(1) as f64
        };
        let mixed = |(j, r): (usize, &f64)| share * (mean(1, j) - mean(0, j)) + (1.0 - share) * r;
        raw.iter().enumerate().map(mixed).collect()
    }
}

/// The unit vector along `raw` without its part along the mean harmless state: all prompts share
/// that part, so it is no refusal.
fn unit_without(raw: &[f64], harmless: &[f64]) -> Vec<f32> {
    let projected: Vec<f32> = without(raw, harmless).into_iter().map(|x| x as f32).collect();
    let length = norm(&projected).max(f64::MIN_POSITIVE);
    projected.iter().map(|&x| (f64::from(x) / length) as f32).collect()
}

fn scores(states: &[(bool, Vec<f32>)], unit: &[f32]) -> (f64, f64) {
    let project = |x: &[f32]| -> f64 { x.iter().zip(unit).map(|(a, b)| f64::from(a * b)).sum() };
    let of = |class: bool| -> Vec<f64> {
        states.iter().filter(|(c, _)| *c == class).map(|(_, x)| project(x)).collect()
    };
    separation(&of(true), &of(false))
}

/// How far apart two classes' projections are: area under the ROC curve, and (difference of means)²
/// / (sum of variances).
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
