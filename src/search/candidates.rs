//! Candidates: layer × writer set × strength, scored by one extra row a prompt in one pass over the weights.

use std::collections::HashMap;

use serde::Serialize;

use crate::direction::Direction;
use crate::edit::{fold::norm, gate, gate::Gate};
use crate::error::Result;
use crate::evaluate::{log_odds, Evaluator};
use crate::forward::{Fork, Head, Sequence};
use crate::model::{Edit, Matrix, RankOne, Writer};
use crate::text::{PromptRecord, Set};

use super::material::Inputs;
use super::Method;

/// Strengths that are tried, in units of the gap; about a factor √2 apart.
const STRENGTHS: [f64; 9] = [0.18, 0.25, 0.35, 0.5, 0.71, 1.0, 1.41, 2.0, 2.83];
/// `amplify` multiplies what a layer writes.
const FACTORS: [f64; 6] = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0];
/// Layers that go into the search.
const LAYERS: usize = 4;

/// An edit with what its first-token score says.
#[derive(Clone, Debug, Serialize)]
pub struct Candidate {
    /// The block that is edited.
    pub layer: usize,
    /// Its writers that are edited.
    pub writers: Vec<&'static str>,
    /// Strength: α in units of the gap (`gated`), or the factor (`amplify`).
    pub strength: f64,
    /// √Σ ‖u vᵀ‖² / √Σ ‖W‖² over the edited tensors.
    pub size: f64,
    /// Validation prompts of each class whose likeliest first token opens a refusal, as shares.
    pub harmful: f64,
    /// The same for harmless prompts.
    pub harmless: f64,
    /// The same for borderline prompts.
    pub borderline: f64,
    /// Mean log-odds of refusal on harmful prompts.
    pub log_odds: f64,
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
struct Ingredient {
    writer: Writer,
    v: Vec<f32>,
    separation: f64,
    weight_norm: f64,
}

/// Builds the candidates from directions and, for `gated`, the writers' inputs in training and validation.
pub fn build(
    evaluator: &Evaluator,
    method: Method,
    directions: &[&Direction],
    train: &Inputs,
    held_out: &Inputs,
    strength: Option<f64>,
) -> Result<Vec<Candidate>> {
    let mut families: Vec<(&Direction, Vec<Ingredient>)> = Vec::new();
    for direction in directions {
        let mut ingredients = Vec::new();
        for writer in Writer::ALL {
            crate::progress::check()?;
            let (_, w) = evaluator.model.writer(direction.layer, writer)?;
            let (projected, weight_norm) = project(&w, &direction.unit);
            let (v, separation) = match method {
                Method::Amplify => (projected, f64::NAN),
                Method::Gated => {
                    let key = (direction.layer, writer);
                    let (Some(a), Some(b)) = (train.get(&key), held_out.get(&key)) else { continue };
                    match gate::fit(a, b, w.cols) {
                        Some(Gate { v, separation, .. }) => (v, separation),
                        None => continue,
                    }
                }
            };
            ingredients.push(Ingredient { writer, v, separation, weight_norm });
        }
        families.push((direction, ingredients));
    }
    if method == Method::Gated {
        // The layers where a gate can tell the prompts apart best.
        let best = |i: &[Ingredient]| i.iter().map(|i| i.separation).fold(0.0, f64::max);
        families.sort_by(|a, b| best(&b.1).total_cmp(&best(&a.1)));
        families.truncate(LAYERS.max(usize::from(strength.is_some())));
        families.sort_by_key(|(d, _)| d.layer);
    }
    let grid: &[f64] = match (&strength, method) {
        (Some(s), _) => std::slice::from_ref(s),
        (None, Method::Gated) => &STRENGTHS,
        (None, Method::Amplify) => &FACTORS,
    };
    let mut out = Vec::new();
    for (f, (direction, ingredients)) in families.iter().enumerate() {
        for (s, set) in [&[Writer::Ffn][..], &[Writer::Attention], &Writer::ALL].iter().enumerate() {
            let parts: Vec<&Ingredient> = ingredients.iter().filter(|i| set.contains(&i.writer)).collect();
            if parts.len() != set.len() {
                continue;
            }
            for &t in grid {
                out.push(candidate(method, direction, &parts, t, f * 3 + s));
            }
        }
    }
    Ok(out)
}

fn candidate(
    method: Method,
    direction: &Direction,
    parts: &[&Ingredient],
    t: f64,
    family: usize,
) -> Candidate {
    // Two gated writers share what is to be added; amplified ones each strengthen their own part.
    let alpha = match method {
        Method::Gated => t * direction.gap / parts.len() as f64,
        Method::Amplify => t,
    };
    let u: Vec<f32> = direction.unit.iter().map(|&x| (f64::from(x) * alpha) as f32).collect();
    let edit: Edit = parts
        .iter()
        .map(|p| RankOne { layer: direction.layer, writer: p.writer, u: u.clone(), v: p.v.clone() })
        .collect();
    let change: f64 = edit.iter().map(|e| (norm(&e.u) * norm(&e.v)).powi(2)).sum();
    let weights: f64 = parts.iter().map(|p| p.weight_norm.powi(2)).sum();
    Candidate {
        layer: direction.layer,
        writers: parts.iter().map(|p| writer_name(p.writer)).collect(),
        strength: t,
        size: (change / weights.max(f64::MIN_POSITIVE)).sqrt(),
        harmful: f64::NAN,
        harmless: f64::NAN,
        borderline: f64::NAN,
        log_odds: f64::NAN,
        separation: parts.iter().map(|p| p.separation).fold(f64::INFINITY, f64::min),
        edit,
        family,
    }
}

/// A writer's name in GGUF.
pub fn writer_name(writer: Writer) -> &'static str {
    match writer {
        Writer::Attention => "attn_output",
        Writer::Ffn => "ffn_down",
    }
}

/// Wᵀ r̂, and ‖W‖.
fn project(w: &Matrix, unit: &[f32]) -> (Vec<f32>, f64) {
    let mut sum = vec![0.0f64; w.cols];
    let mut energy = 0.0f64;
    let mut row = vec![0.0f32; w.cols];
    for (i, &r) in unit.iter().enumerate().take(w.rows) {
        w.decode_row(i, &mut row);
        for (s, &x) in sum.iter_mut().zip(&row) {
            *s += f64::from(r) * f64::from(x);
            energy += f64::from(x) * f64::from(x);
        }
    }
    (sum.into_iter().map(|x| x as f32).collect(), energy.sqrt())
}

/// Scores candidates on prompts: the likeliest first token under each edit, fired at the deciding position.
pub fn score(
    evaluator: &Evaluator,
    candidates: &mut [Candidate],
    prompts: &[&PromptRecord],
    opening: &[u32],
) -> Result<()> {
    let edits: Vec<Edit> = candidates.iter().map(|c| c.edit.clone()).collect();
    let with = Evaluator { edits: &edits, ..*evaluator };
    let sequences: Vec<Sequence> = with.samples(prompts)?.into_iter().map(|s| s.tokens.into()).collect();
    let forks: Vec<Fork> = (0..sequences.len())
        .flat_map(|seq| (1..=edits.len()).map(move |edit| (seq, edit)))
        .map(|(seq, edit)| Fork { seq, pos: sequences[seq].tokens.len() - 1, edit })
        .collect();
    let hidden = with.runner().run(&sequences, &forks, &[], &mut ())?;
    let reads = Head::new(with.model, with.compute)?.read(&hidden, 1, |_| opening)?;
    let mut count: HashMap<(usize, Set), (usize, usize, f64)> = HashMap::new();
    for (fork, read) in forks.iter().zip(&reads) {
        let refuses = read.top.first().is_some_and(|(t, _)| opening.contains(t));
        let c = count.entry((fork.edit - 1, prompts[fork.seq].set)).or_default();
        *c = (c.0 + 1, c.1 + usize::from(refuses), c.2 + log_odds(&read.asked));
    }
    for (i, c) in candidates.iter_mut().enumerate() {
        let share = |set| count.get(&(i, set)).map_or(0.0, |&(n, k, _)| k as f64 / n.max(1) as f64);
        (c.harmful, c.harmless, c.borderline) =
            (share(Set::Harmful), share(Set::Harmless), share(Set::Borderline));
        c.log_odds = count.get(&(i, Set::Harmful)).map_or(f64::NAN, |&(n, _, sum)| sum / n.max(1) as f64);
    }
    Ok(())
}
