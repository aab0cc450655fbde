//! Candidates: method × direction × layer × writer set × strength.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::arch::Writer;
use crate::edit::{Edit, Method, RankOne};
use crate::num::norm;

use super::worth::Outlook;
use super::writers::{Ingredient, Layer};
use super::{Settings, Toward};
use crate::text::BySet;

/// Strengths that are tried, in units of the gap; about a factor √2 apart.
const STRENGTHS: [f64; 9] = [0.18, 0.25, 0.35, 0.5, 0.71, 1.0, 1.41, 2.0, 2.83];
/// `amplify` multiplies what a layer writes.
const FACTORS: [f64; 6] = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0];
/// `restore`: 1 puts back what was taken.
const SHARES: [f64; 5] = [1.0, 2.0, 3.0, 5.0, 8.0];
/// A constant reaches every token, so less of it does more.
const CONSTANTS: [f64; 7] = [0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6];
/// Blocks that go into the search.
pub(super) const LAYERS: usize = 4;
/// The price of an edit as large as the weights, in shares of harmful prompts. Of two edits that
/// refuse alike, the smaller is milder on prompts that nobody tried, and needs no finer encoding.
const BULK: f64 = 0.1;

/// An edit, with its scores by the first token of each answer.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Candidate {
    /// How its gate is made.
    pub method: Method,
    /// Which direction it writes along.
    pub toward: Toward,
    /// The blocks that are edited.
    pub layers: Vec<usize>,
    /// Their writers that are edited.
    pub writers: Vec<String>,
    /// Strength: α in units of the gap (`gated`, `add`), or the factor (`amplify`, `restore`).
    pub strength: f64,
    /// √Σ ‖u vᵀ‖² / √Σ ‖W‖² over the edited tensors (of a constant: √Σ ‖u‖² / √Σ ‖W‖²).
    pub size: f64,
    /// Validation prompts of each class whose likeliest first token opens a refusal, as shares.
    #[serde(flatten, with = "crate::nan::by_set")]
    #[schemars(with = "BySet<Option<f64>>")]
    pub refused: BySet<f64>,
    /// Mean log-odds of refusal on harmful prompts.
    #[serde(with = "crate::nan")]
    #[schemars(with = "Option<f64>")]
    pub log_odds: f64,
    /// Mean probability of a first token that opens a refusal. On harmless and borderline prompts
    /// this is the over-refusal to expect on more such prompts, more finely than a count tells.
    #[serde(with = "crate::nan::by_set")]
    #[schemars(with = "BySet<Option<f64>>")]
    pub risk: BySet<f64>,
    /// How likely each validation prompt is refused under it.
    #[serde(skip)]
    pub outlook: Outlook,
    /// Held-out separation of the gate: 1 / root mean square on harmless prompts; `null` in JSON
    /// where no gate was fitted.
    #[serde(with = "crate::nan")]
    #[schemars(with = "Option<f64>")]
    pub separation: f64,
    /// The terms.
    #[serde(skip)]
    pub edit: Edit,
    /// The number of its family: the same terms at other strengths.
    #[serde(skip)]
    pub family: usize,
}

/// A writer of a family, with its block.
struct Part<'l> {
    layer: &'l Layer,
    ingredient: &'l Ingredient,
}

/// The candidates of one method along one direction: families (writers of one block, or of several)
/// × strengths. `first`: the number of the first family. `routed`: routed experts are among the
/// writers. `beside`: another direction gains more, so the grid of strengths is coarser.
#[allow(clippy::too_many_arguments)]
pub(super) fn candidates(
    method: Method,
    toward: Toward,
    mut layers: Vec<Layer>,
    settings: &Settings,
    first: usize,
    routed: bool,
    beside: bool,
) -> Vec<Candidate> {
    let grid: &[f64] = match (&settings.strength, method) {
        (Some(s), _) => std::slice::from_ref(s),
        (None, Method::Gated) => &STRENGTHS,
        (None, Method::Amplify) => &FACTORS,
        (None, Method::Restore) => &SHARES,
        (None, Method::Add) => &CONSTANTS,
    };
    let step = if beside { 2 } else { 1 };
    let mut out = Vec::new();
    for (family, mut parts) in
        families(method, beside, &mut layers, settings, routed).into_iter().enumerate()
    {
        parts.sort_by_key(|p| p.layer.direction.layer);
        let of = grid
            .iter()
            .step_by(step)
            .map(|&t| candidate(method, toward, &parts, t, first + family));
        out.extend(of);
    }
    out
}

/// The families: writers that are edited together. Unless the user named blocks, those with the
/// greatest promise are kept; for `restore` those that lost most.
fn families<'l>(
    method: Method,
    beside: bool,
    layers: &'l mut Vec<Layer>,
    settings: &Settings,
    routed: bool,
) -> Vec<Vec<Part<'l>>> {
    use Writer::*;
    let sets: [&[Writer]; 3] = match routed {
        false => [&[Ffn, Shared], &[Attention, Delta], &[Attention, Delta, Ffn, Shared]],
        true => [&[Experts], &[Ffn, Shared, Experts], &[Attention, Delta, Ffn, Shared, Experts]],
    };
    layers.sort_by(|a, b| b.promise().total_cmp(&a.promise()));
    let most = match (&settings.layers, method, settings.method) {
        (Some(_), ..) => layers.len(),
        // The method is mild: all blocks together, else the block that lost most.
        (None, Method::Restore, None) => 1,
        _ => LAYERS,
    };
    // Compression took from every block, so `restore` keeps all of them.
    if method != Method::Restore {
        layers.truncate(most);
    }
    let [first, _, all] = sets;
    let sets: Vec<&[Writer]> = match method {
        // A constant after the attention is as good as one at the end of the block before it.
        Method::Add => vec![first],
        Method::Restore if settings.method.is_none() => vec![all],
        _ if beside => vec![first, all],
        _ => sets.to_vec(),
    };
    let parts = |some: &'l [Layer], set: &[Writer]| -> Vec<Part<'l>> {
        let of = |layer: &'l Layer| {
            // Among routed experts, a feed-forward layer counts where it stands beside some.
            let alone = routed && layer.ingredients.iter().all(|i| i.writer != Experts);
            let fits = move |w: Writer| set.contains(&w) && !(alone && w == Ffn);
            let wanted = layer.ingredients.iter().filter(move |i| fits(i.writer));
            wanted.map(move |ingredient| Part { layer, ingredient }).collect::<Vec<_>>()
        };
        some.iter().flat_map(of).collect()
    };
    let layers: &'l [Layer] = layers;
    let mut out = Vec::new();
    for layer in layers.iter().take(most) {
        for set in &sets {
            out.push(parts(std::slice::from_ref(layer), set));
        }
    }
    match method {
        // Gates of several blocks err on different prompts: together they err less.
        Method::Gated => {
            for k in 2..=layers.len().min(LAYERS) {
                if !beside {
                    out.push(parts(&layers[..k], first));
                }
                out.push(parts(&layers[..k], all));
            }
        }
        Method::Restore if layers.len() > 1 => {
            out.extend(sets.iter().map(|set| parts(layers, set)))
        }
        _ => {}
    }
    let sites = |family: &[Part]| -> Vec<(usize, Writer)> {
        family.iter().map(|p| (p.layer.direction.layer, p.ingredient.writer)).collect()
    };
    // Without a shared expert two sets can be the same. Sets without routed experts were tried
    // before.
    let mut seen: Vec<Vec<(usize, Writer)>> = Vec::new();
    out.retain(|family| {
        let these = sites(family);
        let new = !these.is_empty() && !seen.contains(&these);
        let fits = !routed || these.iter().any(|(_, w)| *w == Writer::Experts);
        seen.push(these);
        new && fits
    });
    out
}

fn candidate(method: Method, toward: Toward, parts: &[Part], t: f64, family: usize) -> Candidate {
    let term = |p: &Part| {
        let direction = &p.layer.direction;
        // Gated writers share the addition; the other methods act on each writer's own output.
        let alpha = match method {
            Method::Gated | Method::Add => t * direction.gap / parts.len() as f64,
            Method::Amplify | Method::Restore => t,
        };
        let u = p.ingredient.u.iter().map(|&x| (f64::from(x) * alpha) as f32).collect();
        RankOne {
            layer: direction.layer,
            writer: p.ingredient.writer,
            u,
            v: p.ingredient.v.clone(),
        }
    };
    let edit: Edit = parts.iter().map(term).collect();
    let open = |e: &RankOne| if e.v.is_empty() { 1.0 } else { norm(&e.v) };
    let change: f64 = edit.iter().map(|e| (norm(&e.u) * open(e)).powi(2)).sum();
    let weights: f64 = parts.iter().map(|p| p.ingredient.weight_norm.powi(2)).sum();
    let mut layers: Vec<usize> = parts.iter().map(|p| p.layer.direction.layer).collect();
    layers.dedup();
    let mut writers: Vec<String> =
        parts.iter().map(|p| p.ingredient.writer.name().to_string()).collect();
    writers.sort_unstable();
    writers.dedup();
    Candidate {
        method,
        toward,
        layers,
        writers,
        strength: t,
        size: (change / weights.max(f64::MIN_POSITIVE)).sqrt(),
        refused: BySet::of(|_| f64::NAN),
        log_odds: f64::NAN,
        risk: BySet::of(|_| f64::NAN),
        outlook: Outlook::default(),
        separation: parts.iter().map(|p| p.ingredient.separation).fold(f64::INFINITY, f64::min),
        edit,
        family,
    }
}

impl Candidate {
    /// The worth of the edit, less the price of its size. `outlook`: from first tokens, or from
    /// answers. `goal`: refusal beyond the goal is worth nothing.
    pub fn value(&self, outlook: &Outlook, goal: f64) -> f64 {
        outlook.worth(goal) - BULK * self.size
    }

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

    /// What it does, for people: `gated along the original's direction`.
    pub fn kind(&self) -> String {
        let along = self.toward.words();
        format!("{} along {along}", self.method.name())
    }

    /// Where it edits, for people: `block 2 attn_output + ffn_down`.
    pub fn place(&self) -> String {
        let blocks: Vec<String> = self.layers.iter().map(usize::to_string).collect();
        let word = if blocks.len() > 1 { "blocks" } else { "block" };
        format!("{word} {} {}", blocks.join(" + "), self.writers.join(" + "))
    }
}
