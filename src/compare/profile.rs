//! What is kept of one model for a comparison: its directions, how well they tell the prompts
//! apart, and its answers.

use super::Rendered;
use crate::direction::separation;
use crate::error::{Error, Result};
use crate::evaluate::{Answer, AnswerOptions, Evaluator};
use crate::forward::{Row, Tap};
use crate::num::without;
use crate::text::{Prompt, PromptSet, Set, Split, Thinking};

/// Groups of training prompts of a class, of which halves are made: with eight there are 35 ways to
/// halve them.
const GROUPS: usize = 8;

/// One model as a comparison sees it. The model itself is not needed any more.
pub struct Profile {
    /// Blocks.
    pub layers: usize,
    /// How many of them a direction's source is sought in, [`crate::arch::Spec::early`].
    early: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Whether the model was let think before it answered.
    pub thinking: Thinking,
    /// The prompts as it reads them.
    pub rendered: Rendered,
    /// Answers to the test prompts.
    pub answers: Vec<Answer>,
    /// Perplexity of the built-in text.
    pub perplexity: f64,
    /// Every block and position.
    pub places: Vec<Place>,
    /// Sums of states at the deciding position: `[layer][class][group][hidden]`, and prompts of
    /// each `[class][group]`.
    sums: Vec<f64>,
    counts: Vec<f64>,
    groups: usize,
}

/// The direction of a block at a post-instruction position.
pub struct Place {
    /// The block after which the residual stream was read.
    pub layer: usize,
    /// Counted from the deciding position: 0, -1, …
    pub position: isize,
    /// The direction, a unit vector.
    pub unit: Vec<f64>,
    /// μ_harmful − μ_harmless.
    pub difference: Vec<f64>,
    /// Area under the ROC curve of the projection on validation prompts.
    pub auc: f64,
    /// Its Fisher ratio.
    pub fisher: f64,
}

impl Profile {
    /// Runs a model over all prompts: training prompts for the directions, validation prompts for
    /// what they are worth, test prompts for its answers.
    ///
    /// # Errors
    /// A class without prompts; what the forward pass says.
    pub fn take(evaluator: &Evaluator, prompts: &PromptSet, max_new: usize) -> Result<Profile> {
        let spec = &evaluator.model.spec;
        let (layers, hidden) = (spec.layers, spec.hidden);
        let samples = |split| -> Result<Vec<(usize, Prompt)>> {
            let mut all = Vec::new();
            for (class, set) in [Set::Harmful, Set::Harmless].into_iter().enumerate() {
                let some = evaluator.samples(&prompts.of(set, split))?;
                if some.is_empty() {
                    return Err(Error::Limit(format!(
                        "no {} prompts in the {split:?} split",
                        set.name()
                    )));
                }
                all.extend(some.into_iter().map(|s| (class, s)));
            }
            Ok(all)
        };
        let (train, held_out) = (samples(Split::Train)?, samples(Split::Validation)?);
        let lengths = train.iter().chain(&held_out).map(|(_, s)| s.post_instruction.len());
        let positions = lengths.min().unwrap_or(1).max(1);
        let of = |class| train.iter().filter(|(c, _)| *c == class).count();
        let groups = GROUPS.min(of(0)).min(of(1));

        let sequences = |list: &[(usize, Prompt)]| -> Vec<Vec<u32>> {
            list.iter().map(|(_, s)| s.tokens.clone()).collect()
        };
        let mut sums = Sums {
            samples: &train,
            positions,
            groups,
            hidden,
            all: vec![0.0; layers * positions * 2 * hidden],
            deciding: vec![0.0; layers * 2 * groups * hidden],
        };
        evaluator.runner().run(&sequences(&train), &[], &[], &mut sums)?;
        let (all, deciding) = (sums.all, sums.deciding);
        let mut counts = vec![0.0; 2 * groups];
        for (i, (class, _)) in train.iter().enumerate() {
            counts[class * groups + i % groups] += 1.0;
        }
        let mut places = Vec::new();
        for layer in 0..layers {
            for k in 0..positions {
                let mean = |class: usize| -> Vec<f64> {
                    let at = ((layer * positions + k) * 2 + class) * hidden;
                    all[at..at + hidden].iter().map(|x| x / of(class) as f64).collect()
                };
                let (unit, difference) = direction(&mean(0), &mean(1));
                let (auc, fisher) = (f64::NAN, f64::NAN);
                places.push(Place {
                    layer,
                    position: -(k as isize),
                    unit,
                    difference,
                    auc,
                    fisher,
                });
            }
        }
        let mut projections = Projections {
            samples: &held_out,
            positions,
            places: &places,
            seen: vec![Default::default(); places.len()],
        };
        evaluator.runner().run(&sequences(&held_out), &[], &[], &mut projections)?;
        let seen = projections.seen;
        for (place, [a, b]) in places.iter_mut().zip(&seen) {
            (place.auc, place.fisher) = separation(a, b);
        }

        let mut answers =
            evaluator.answers(&prompts.split(Split::Test), AnswerOptions::new(max_new))?;
        evaluator.read_refusals(&mut answers)?;
        let perplexity = evaluator.perplexity()?;
        let thinking = evaluator.chat.template.thinking;
        let rendered = Rendered::take(evaluator.chat, prompts)?;
        Ok(Profile {
            layers,
            early: spec.early(),
            hidden,
            thinking,
            rendered,
            answers,
            perplexity,
            places,
            sums: deciding,
            counts,
            groups,
        })
    }

    /// Where the direction tells the validation prompts apart best, among the first four fifths of
    /// the blocks.
    pub fn source(&self) -> Option<&Place> {
        let early = self.places.iter().filter(|p| p.layer < self.early);
        early.max_by(|a, b| a.fisher.total_cmp(&b.fisher))
    }

    /// The deciding position of a block.
    pub fn deciding(&self, layer: usize) -> Option<&Place> {
        self.places.iter().find(|p| p.layer == layer && p.position == 0)
    }

    /// The directions of the two halves of the training prompts, for every way to halve them.
    pub fn halves(&self, layer: usize) -> Vec<(Vec<f64>, Vec<f64>)> {
        let g = self.groups;
        let half = |bits: usize| -> Vec<f64> {
            let mean = |class: usize| -> Vec<f64> {
                let mut sum = vec![0.0; self.hidden];
                let mut n = 0.0;
                for group in (0..g).filter(|group| bits >> group & 1 == 1) {
                    let at = ((layer * 2 + class) * g + group) * self.hidden;
                    sum.iter_mut().zip(&self.sums[at..at + self.hidden]).for_each(|(s, x)| *s += x);
                    n += self.counts[class * g + group];
                }
                sum.iter().map(|x| x / n).collect()
            };
            direction(&mean(0), &mean(1)).0
        };
        let whole = (1usize << g) - 1;
        let halves = (1..whole).filter(|bits| bits & 1 == 1 && bits.count_ones() as usize == g / 2);
        halves.map(|bits| (half(bits), half(whole & !bits))).collect()
    }
}

/// The unit direction from harmless to harmful, without its part along the mean harmless state, and
/// the plain difference.
fn direction(harmful: &[f64], harmless: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let difference: Vec<f64> = harmful.iter().zip(harmless).map(|(a, b)| a - b).collect();
    let unit = without(&difference, harmless);
    let length = unit.iter().map(|x| x * x).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
    (unit.iter().map(|x| x / length).collect(), difference)
}

/// Sums of training states.
struct Sums<'a> {
    samples: &'a [(usize, Prompt)],
    positions: usize,
    groups: usize,
    hidden: usize,
    /// `[layer][position][class][hidden]`
    all: Vec<f64>,
    /// `[layer][class][group][hidden]`
    deciding: Vec<f64>,
}

/// The class of a row's prompt, and its position counted back from the deciding one, where that is
/// one of interest.
fn place(samples: &[(usize, Prompt)], row: &Row, positions: usize) -> Option<(usize, usize)> {
    let (class, sample) = &samples[row.seq];
    let k = (sample.post_instruction.end - 1).checked_sub(row.pos)?;
    (k < positions).then_some((*class, k))
}

impl Tap for Sums<'_> {
    fn residual(&mut self, layer: usize, rows: &[Row], x: &[f32], width: usize) {
        for (row, x) in rows.iter().zip(x.chunks_exact(width)) {
            let Some((class, k)) = place(self.samples, row, self.positions) else { continue };
            let add = |to: &mut [f64], slot: usize| {
                let at = slot * self.hidden;
                to[at..at + width].iter_mut().zip(x).for_each(|(s, &x)| *s += f64::from(x));
            };
            add(&mut self.all, (layer * self.positions + k) * 2 + class);
            if k == 0 {
                add(&mut self.deciding, (layer * 2 + class) * self.groups + row.seq % self.groups);
            }
        }
    }
}

/// Projections of validation states on the directions.
struct Projections<'a> {
    samples: &'a [(usize, Prompt)],
    positions: usize,
    places: &'a [Place],
    /// Harmful and harmless prompts, for each place.
    seen: Vec<[Vec<f64>; 2]>,
}

impl Tap for Projections<'_> {
    fn residual(&mut self, layer: usize, rows: &[Row], x: &[f32], width: usize) {
        for (row, x) in rows.iter().zip(x.chunks_exact(width)) {
            let Some((class, k)) = place(self.samples, row, self.positions) else { continue };
            let at = layer * self.positions + k;
            let unit = &self.places[at].unit;
            self.seen[at][class].push(x.iter().zip(unit).map(|(&x, u)| f64::from(x) * u).sum());
        }
    }
}
