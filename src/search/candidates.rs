//! Candidates: layer × writer set × strength, scored by one extra row a prompt in one pass over the weights.

use std::collections::HashMap;

use serde::Serialize;

use crate::direction::Direction;
use crate::edit::{fold::norm, gate, gate::Gate};
use crate::error::Result;
use crate::evaluate::{log_odds, mass, Evaluator};
use crate::forward::{Fork, Head, Readout, Sequence};
use crate::model::{Edit, Part as Tensors, RankOne, Writer};
use crate::text::{PromptRecord, Set};

use super::material::Inputs;
use super::Method;

/// Strengths that are tried, in units of the gap; about a factor √2 apart.
const STRENGTHS: [f64; 9] = [0.18, 0.25, 0.35, 0.5, 0.71, 1.0, 1.41, 2.0, 2.83];
/// `amplify` multiplies what a layer writes.
const FACTORS: [f64; 6] = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0];
/// A constant reaches every token, so less of it does more.
const CONSTANTS: [f64; 7] = [0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6];
/// Layers that go into the search.
const LAYERS: usize = 4;

/// An edit with what its first-token score says.
#[derive(Clone, Debug, Serialize)]
pub struct Candidate {
    /// The blocks that are edited.
    pub layers: Vec<usize>,
    /// Their writers that are edited.
    pub writers: Vec<&'static str>,
    /// Strength: α in units of the gap (`gated`), or the factor (`amplify`).
    pub strength: f64,
    /// √Σ ‖u vᵀ‖² / √Σ ‖W‖² over the edited tensors (of a constant: √Σ ‖u‖² / √Σ ‖W‖²).
    pub size: f64,
    /// Validation prompts of each class whose likeliest first token opens a refusal, as shares.
    pub harmful: f64,
    /// The same for harmless prompts.
    pub harmless: f64,
    /// The same for borderline prompts.
    pub borderline: f64,
    /// Mean log-odds of refusal on harmful prompts.
    pub log_odds: f64,
    /// Mean probability of a first token that opens a refusal, on harmless and on borderline prompts: what over-refusal is to
    /// be expected on prompts like these, known more finely than by counting.
    pub risk: (f64, f64),
    /// Held-out separation of the gate: 1 / root mean square on harmless prompts.
    pub separation: f64,
    /// The terms.
    #[serde(skip)]
    pub edit: Edit,
    /// Which other strengths belong to it.
    #[serde(skip)]
    pub family: usize,
}

/// What a writer's terms are made from.
#[derive(Clone)]
struct Ingredient {
    writer: Writer,
    v: Vec<f32>,
    separation: f64,
    weight_norm: f64,
}

/// The edits of one layer, apart from their strength.
pub struct Layer {
    direction: Direction,
    ingredients: Vec<Ingredient>,
}

/// What each layer's writers can be edited with, from directions and, for `gated`, the writers' inputs in training and
/// validation.
pub fn families(
    evaluator: &Evaluator,
    method: Method,
    directions: &[&Direction],
    train: &Inputs,
    held_out: &Inputs,
) -> Result<Vec<Layer>> {
    let mut layers = Vec::new();
    for &direction in directions {
        let mut ingredients = Vec::new();
        let own = evaluator.model.spec.writers(direction.layer);
        for &writer in own.iter().filter(|w| **w != Writer::Experts) {
            crate::progress::check()?;
            let (projected, weight_norm) =
                project(&evaluator.model.parts(direction.layer, writer)?, &direction.unit);
            let (v, separation) = match method {
                Method::Amplify => (projected, f64::NAN),
                Method::Add => (Vec::new(), f64::NAN),
                Method::Gated => {
                    let key = (direction.layer, writer);
                    let (Some(a), Some(b)) = (train.get(&key), held_out.get(&key)) else { continue };
                    match gate::fit(a, b, evaluator.model.spec.columns(writer))? {
                        Some(Gate { v, separation, .. }) => (v, separation),
                        None => continue,
                    }
                }
            };
            ingredients.push(Ingredient { writer, v, separation, weight_norm });
        }
        if method == Method::Add {
            // A constant is added once, at the block's end.
            ingredients.truncate(1);
            ingredients.iter_mut().for_each(|i| i.writer = Writer::Ffn);
        }
        layers.push(Layer { direction: direction.clone(), ingredients });
    }
    Ok(layers)
}

/// The candidates: families (writers of one block, or all writers of the few best blocks) × strengths. Of gated layers those
/// are kept whose gate tells the prompts apart best, unless `keep_all`.
pub fn candidates(
    method: Method,
    mut layers: Vec<Layer>,
    strength: Option<f64>,
    keep_all: bool,
) -> Vec<Candidate> {
    if method == Method::Gated {
        let best = |l: &Layer| l.ingredients.iter().map(|i| i.separation).fold(0.0, f64::max);
        layers.sort_by(|a, b| best(b).total_cmp(&best(a)));
        if !keep_all {
            layers.truncate(LAYERS);
        }
    }
    // A constant after the attention is as good as one at the end of the block before it.
    let (plain, both) =
        (&[Writer::Ffn, Writer::Shared][..], &[Writer::Attention, Writer::Ffn, Writer::Shared][..]);
    let sets = [plain, &[Writer::Attention], both];
    let sets = &sets[..if method == Method::Add { 1 } else { 3 }];
    let parts = |some: &[Layer], set: &[Writer]| -> Vec<Part> {
        let of = |l: &Layer| -> Vec<Part> {
            let wanted = l.ingredients.iter().filter(|i| set.contains(&i.writer));
            wanted.map(|i| Part { direction: l.direction.clone(), ingredient: i.clone() }).collect()
        };
        some.iter().flat_map(of).collect()
    };
    let mut families: Vec<Vec<Part>> = Vec::new();
    for layer in &layers {
        for set in sets {
            let family = parts(std::slice::from_ref(layer), set);
            // Of a block without a feed-forward layer for every token both is the attention alone.
            let double = set.len() == both.len() && family.len() < 2;
            if !family.is_empty() && !double {
                families.push(family);
            }
        }
    }
    // Gates of several blocks err on different prompts: together they err less.
    if method == Method::Gated {
        for k in 2..=layers.len().min(LAYERS) {
            families.push(parts(&layers[..k], plain));
            families.push(parts(&layers[..k], both));
        }
    }
    let grid: &[f64] = match (&strength, method) {
        (Some(s), _) => std::slice::from_ref(s),
        (None, Method::Gated) => &STRENGTHS,
        (None, Method::Amplify) => &FACTORS,
        (None, Method::Add) => &CONSTANTS,
    };
    let mut out = Vec::new();
    for (family, parts) in families.iter_mut().enumerate() {
        parts.sort_by_key(|p| p.direction.layer);
        out.extend(grid.iter().map(|&t| candidate(method, parts, t, family)));
    }
    out
}

/// A writer of a family with the direction of its block.
struct Part {
    direction: Direction,
    ingredient: Ingredient,
}

fn candidate(method: Method, parts: &[Part], t: f64, family: usize) -> Candidate {
    let term = |p: &Part| {
        // Gated writers share what is to be added; amplified ones each strengthen their own part.
        let alpha = match method {
            Method::Gated | Method::Add => t * p.direction.gap / parts.len() as f64,
            Method::Amplify => t,
        };
        let u = p.direction.unit.iter().map(|&x| (f64::from(x) * alpha) as f32).collect();
        RankOne { layer: p.direction.layer, writer: p.ingredient.writer, u, v: p.ingredient.v.clone() }
    };
    let edit: Edit = parts.iter().map(term).collect();
    let open = |e: &RankOne| if e.v.is_empty() { 1.0 } else { norm(&e.v) };
    let change: f64 = edit.iter().map(|e| (norm(&e.u) * open(e)).powi(2)).sum();
    let weights: f64 = parts.iter().map(|p| p.ingredient.weight_norm.powi(2)).sum();
    let mut layers: Vec<usize> = parts.iter().map(|p| p.direction.layer).collect();
    layers.dedup();
    let mut writers: Vec<&str> = parts.iter().map(|p| p.ingredient.writer.name()).collect();
    writers.sort_unstable();
    writers.dedup();
    Candidate {
        layers,
        writers,
        strength: t,
        size: (change / weights.max(f64::MIN_POSITIVE)).sqrt(),
        harmful: f64::NAN,
        harmless: f64::NAN,
        borderline: f64::NAN,
        log_odds: f64::NAN,
        risk: (f64::NAN, f64::NAN),
        separation: parts.iter().map(|p| p.ingredient.separation).fold(f64::INFINITY, f64::min),
        edit,
        family,
    }
}

impl Candidate {
    /// The same edit, `factor` times as strong, not scored yet.
    pub fn scaled(&self, factor: f64) -> Candidate {
        let mut c = self.clone();
        c.strength *= factor;
        c.size *= factor;
        for term in &mut c.edit {
            term.u.iter_mut().for_each(|x| *x = (f64::from(*x) * factor) as f32);
        }
        c
    }

    /// Where it edits, for people: `block 2 attn_output + ffn_down`.
    pub fn place(&self) -> String {
        let blocks: Vec<String> = self.layers.iter().map(usize::to_string).collect();
        let word = if blocks.len() > 1 { "blocks" } else { "block" };
        format!("{word} {} {}", blocks.join(" + "), self.writers.join(" + "))
    }
}

/// Wᵀ r̂ of a writer's matrices, side by side, and their norm ‖W‖.
fn project(parts: &[Tensors], unit: &[f32]) -> (Vec<f32>, f64) {
    let (mut all, mut energy) = (Vec::new(), 0.0f64);
    for w in parts.iter().flat_map(|p| p.stack.iter()) {
        let mut sum = vec![0.0f64; w.cols];
        let mut row = vec![0.0f32; w.cols];
        for (i, &r) in unit.iter().enumerate().take(w.rows) {
            w.decode_row(i, &mut row);
            for (s, &x) in sum.iter_mut().zip(&row) {
                *s += f64::from(r) * f64::from(x);
                energy += f64::from(x) * f64::from(x);
            }
        }
        all.extend(sum.into_iter().map(|x| x as f32));
    }
    (all, energy.sqrt())
}

/// Scores candidates on prompts by the likeliest first token under each edit. A gate fires at the deciding position only, so
/// there a row for each edit is enough; other edits reach every token, which takes a run for each.
pub fn score(
    evaluator: &Evaluator,
    method: Method,
    candidates: &mut [Candidate],
    prompts: &[&PromptRecord],
    opening: &[u32],
) -> Result<()> {
    let edits: Vec<Edit> = candidates.iter().map(|c| c.edit.clone()).collect();
    let with = Evaluator { edits: &edits, ..*evaluator };
    let sequences: Vec<Sequence> = with.samples(prompts)?.into_iter().map(|s| s.tokens.into()).collect();
    let (gated, everywhere): (Vec<usize>, Vec<usize>) =
        (1..=edits.len()).partition(|_| method == Method::Gated);
    #[derive(Default)]
    struct Sum {
        n: usize,
        refused: usize,
        log_odds: f64,
        probability: f64,
    }
    let mut sums: HashMap<(usize, Set), Sum> = HashMap::new();
    let mut note = |edit: usize, seq: usize, read: &Readout| {
        let s = sums.entry((edit - 1, prompts[seq].set)).or_default();
        s.n += 1;
        s.refused += usize::from(read.top.first().is_some_and(|(t, _)| opening.contains(t)));
        s.log_odds += log_odds(&read.asked);
        s.probability += mass(&read.asked);
    };
    if !gated.is_empty() {
        let forks: Vec<Fork> = (0..sequences.len())
            .flat_map(|seq| gated.iter().map(move |&edit| (seq, edit)))
            .map(|(seq, edit)| Fork { seq, pos: sequences[seq].tokens.len() - 1, edit })
            .collect();
        let hidden = with.runner().run(&sequences, &forks, &[], &mut ())?;
        let reads = Head::new(with.model, with.compute)?.read(&hidden, 1, |_| opening)?;
        forks.iter().zip(&reads).for_each(|(f, read)| note(f.edit, f.seq, read));
    }
    for edit in everywhere {
        let under: Vec<Sequence> = sequences.iter().map(|s| Sequence { edit, ..s.clone() }).collect();
        let reads = with.first_tokens(&under, 1, opening)?;
        reads.iter().enumerate().for_each(|(seq, read)| note(edit, seq, read));
    }
    for (i, c) in candidates.iter_mut().enumerate() {
        let mean = |set, of: fn(&Sum) -> f64| sums.get(&(i, set)).map_or(0.0, |s| of(s) / s.n as f64);
        let share = |set| mean(set, |s| s.refused as f64);
        (c.harmful, c.harmless, c.borderline) =
            (share(Set::Harmful), share(Set::Harmless), share(Set::Borderline));
        c.log_odds = mean(Set::Harmful, |s| s.log_odds);
        c.risk = (mean(Set::Harmless, |s| s.probability), mean(Set::Borderline, |s| s.probability));
    }
    Ok(())
}
