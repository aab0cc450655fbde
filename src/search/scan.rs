//! The causal scan: what writing along a direction after a block does to refusal (as Arditi et al.
//! 2024, §2.3 choose by intervention). A block can tell harmful from harmless prompts splendidly
//! where nothing downstream reads that as a refusal.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::baseline::Baseline;
use super::Toward;
use crate::arch::Writer;
use crate::direction::Direction;
use crate::edit::{Edit, RankOne};
use crate::error::Result;
use crate::evaluate::mass;
use crate::forward::{Fork, Head};
use crate::output::Emit;
use crate::text::{BySet, PromptRecord, Set, Split};

/// What is added after a block, in units of its gap between harmful and harmless prompts. The
/// strongest shows the cliff.
const STRENGTHS: [f64; 3] = [0.5, 1.0, 2.0];
/// Training prompts of each class that are looked at.
const PROMPTS: [(Set, usize); 3] = [(Set::Harmful, 48), (Set::Harmless, 24), (Set::Borderline, 16)];

/// What one addition at the deciding position does: mean probability of a first token that opens a
/// refusal.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Effect {
    /// The block after which it is added.
    pub layer: usize,
    /// Along which direction.
    pub toward: Toward,
    /// In units of the gap; 0 is the model as it is.
    pub strength: f64,
    /// By class of prompts.
    #[serde(flatten)]
    pub refusal: BySet<f64>,
}

/// The effects of every block, direction and strength.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct Scan {
    /// The model as it is.
    pub base: Option<Effect>,
    /// Block by block.
    pub effects: Vec<Effect>,
}

impl Scan {
    /// Measures every direction of `kinds` on training prompts: a row for each prompt, block,
    /// direction and strength, in one pass over the weights.
    pub(super) fn take(baseline: &Baseline, kinds: &[(Toward, Vec<Direction>)]) -> Result<Scan> {
        let evaluator = baseline.evaluator;
        let prompts: Vec<&PromptRecord> = PROMPTS
            .iter()
            .flat_map(|&(set, most)| {
                let of = baseline.prompts.of(set, Split::Train);
                let n = of.len();
                (0..most.min(n)).map(move |i| of[i * n / most.min(n)]).collect::<Vec<_>>()
            })
            .collect();
        let mut steps: Vec<(usize, Toward, f64)> = Vec::new();
        let mut edits: Vec<Edit> = Vec::new();
        for (toward, directions) in kinds {
            for (d, t) in directions.iter().flat_map(|d| STRENGTHS.map(|t| (d, t))) {
                let u = d.unit.iter().map(|&x| (f64::from(x) * t * d.gap) as f32).collect();
                edits.push(vec![RankOne { layer: d.layer, writer: Writer::Ffn, u, v: Vec::new() }]);
                steps.push((d.layer, *toward, t));
            }
        }
        let samples = evaluator.samples(&prompts)?;
        let sequences: Vec<Vec<u32>> = samples.into_iter().map(|s| s.tokens).collect();
        let last = |seq: usize| sequences[seq].len() - 1;
        let wanted: Vec<(usize, usize)> = (0..sequences.len()).map(|s| (s, last(s))).collect();
        let of = |seq: usize| edits.iter().map(move |edit| (seq, edit));
        let forks: Vec<Fork> = (0..sequences.len())
            .flat_map(of)
            .map(|(seq, edit)| Fork { seq, pos: last(seq), edit })
            .collect();
        let states = evaluator.runner().run(&sequences, &forks, &wanted, &mut ())?;
        let reads = Head::new(evaluator.model, evaluator.compute)?
            .read(&states, 0, |_| &baseline.opening)?;
        let (plain, forked) = reads.split_at(wanted.len());
        let mean = |values: &dyn Fn(Set) -> Vec<f64>, set: Set| {
            let v = values(set);
            v.iter().sum::<f64>() / v.len().max(1) as f64
        };
        let effect = |(layer, toward, strength): (usize, Toward, f64),
                      values: &dyn Fn(Set) -> Vec<f64>| {
            Effect { layer, toward, strength, refusal: BySet::of(|set| mean(values, set)) }
        };
        let base = effect((0, Toward::Projected, 0.0), &|set| {
            let of = prompts.iter().zip(plain).filter(|(p, _)| p.set == set);
            of.map(|(_, r)| mass(&r.asked)).collect()
        });
        let n = edits.len();
        let effects = steps.into_iter().enumerate().map(|(e, step)| {
            effect(step, &|set| {
                let of = prompts.iter().zip(forked.chunks_exact(n)).filter(|(p, _)| p.set == set);
                of.map(|(_, rows)| mass(&rows[e].asked)).collect()
            })
        });
        let scan = Scan { effects: effects.collect(), base: Some(base) };
        kinds.iter().for_each(|(toward, of)| {
            evaluator.progress.note(&scan.line(*toward, of, baseline.settings.emit))
        });
        Ok(scan)
    }

    /// The gains along one kind of direction, for the log.
    fn line(&self, toward: Toward, of: &[Direction], emit: Emit) -> String {
        let gain = |d: &Direction| format!("{:.0}", 100.0 * self.gain(d.layer, toward, emit));
        let all: Vec<String> = of.iter().map(gain).collect();
        format!(
            "points of refusal that writing along {} gains, block by block: {}",
            toward.words(),
            all.join(" ")
        )
    }

    /// What adding along a block's direction gains: the rise of the mean probability of refusal on
    /// harmful prompts, the mean over the strengths, so that a block with a cliff counts less. A
    /// constant reaches every prompt: there what harmless prompts gain is taken off.
    pub fn gain(&self, layer: usize, toward: Toward, emit: Emit) -> f64 {
        let Some(base) = &self.base else { return 0.0 };
        let of: Vec<&Effect> =
            self.effects.iter().filter(|e| e.layer == layer && e.toward == toward).collect();
        let rise = |e: &Effect| match emit {
            Emit::ControlVector => {
                e.refusal.harmful
                    - base.refusal.harmful
                    - (e.refusal.harmless - base.refusal.harmless)
            }
            _ => e.refusal.harmful - base.refusal.harmful,
        };
        of.iter().map(|e| rise(e)).sum::<f64>() / of.len().max(1) as f64
    }
}
