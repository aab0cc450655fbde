//! The blocks that an edit may touch, the directions that it may write along, and the terms that
//! each writer can take.

use super::baseline::{directions, Baseline};
use super::gates::Gates;
use super::scan::Scan;
use super::training::Training;
use super::{Source, Toward};
use crate::arch::Writer;
use crate::direction::Direction;
use crate::edit::Method;
use crate::error::{Error, Result};
use crate::model::Part;
use crate::num::{norm, random_unit};
use crate::output::Emit;
use crate::weights::Matrix;

/// A writer's term, apart from its strength.
#[derive(Clone)]
pub(super) struct Ingredient {
    pub writer: Writer,
    /// The vector that the matrix must write to add the direction to the residual stream,
    /// `[hidden]`.
    pub u: Vec<f32>,
    /// The gate, `[columns of the writer]`; empty where there is none.
    pub v: Vec<f32>,
    /// Separation of a fitted gate, [`crate::edit::gate::Gate::separation`]; NaN without one.
    pub separation: f64,
    /// ‖W‖.
    pub weight_norm: f64,
}

/// The edits of one layer along one direction, apart from their strength.
pub(super) struct Layer {
    pub direction: Direction,
    pub ingredients: Vec<Ingredient>,
    /// Gain of writing after the block, by the causal scan.
    pub gain: f64,
}

impl Layer {
    /// How much the block promises: the gain of the scan times the separation of its best gate; for
    /// `restore` the greatest loss of a writer.
    pub fn promise(&self) -> f64 {
        let of = |i: &Ingredient| match i.separation.is_nan() {
            true => norm(&i.v) / i.weight_norm.max(f64::MIN_POSITIVE),
            false => i.separation * self.gain,
        };
        self.ingredients.iter().map(of).fold(0.0, f64::max)
    }
}

/// The terms of the writers of each direction's block. `routed`: routed experts are among the
/// writers.
pub(super) fn layers(
    baseline: &Baseline,
    method: Method,
    (toward, directions): (Toward, &[Direction]),
    scan: &Scan,
    gates: &Gates,
    routed: bool,
) -> Result<Vec<Layer>> {
    let mut out = Vec::new();
    for direction in directions {
        let mut ingredients = Vec::new();
        let model = baseline.evaluator.model;
        let writers = model.spec.writers(direction.layer).iter().copied();
        for writer in writers.filter(|w| routed || *w != Writer::Experts) {
            baseline.evaluator.progress.check()?;
            let own = model.parts(direction.layer, writer)?;
            let original = match (method, &baseline.reference) {
                (Method::Restore, Some(r)) => {
                    Some(r.evaluator.model.parts(direction.layer, writer)?)
                }
                _ => None,
            };
            let unit = &direction.unit;
            let post_norm = model.post_norm(direction.layer, writer)?;
            let seen = post_norm.as_ref().map_or_else(|| unit.clone(), |n| n.read_direction(unit));
            let (projected, weight_norm) = project(&own, original.as_deref(), &seen);
            // `amplify` and `restore` read products that the norm divides already; a constant is
            // added after the norm.
            let u = match (&post_norm, method) {
                (None, _) | (_, Method::Add) => unit.clone(),
                (Some(n), Method::Gated) => {
                    n.write_direction(unit, gates.length(direction.layer, writer))
                }
                (Some(n), Method::Amplify | Method::Restore) => n.write_direction(unit, 1.0),
            };
            let (v, separation) = match method {
                Method::Amplify => (projected, f64::NAN),
                // Nothing was taken here, so nothing is put back.
                Method::Restore if norm(&projected) == 0.0 => continue,
                Method::Restore => (projected, f64::NAN),
                Method::Add => (Vec::new(), f64::NAN),
                Method::Gated => match gates.get(direction.layer, writer) {
                    Some(gate) => (gate.v.clone(), gate.separation),
                    None => continue,
                },
            };
            ingredients.push(Ingredient { writer, u, v, separation, weight_norm });
        }
        if method == Method::Add {
            // A constant is added once, at the block's end.
            ingredients.truncate(1);
            ingredients.iter_mut().for_each(|i| i.writer = Writer::Ffn);
        }
        let gain = scan.gain(direction.layer, toward, baseline.settings.emit);
        out.push(Layer { direction: direction.clone(), ingredients, gain });
    }
    Ok(out)
}

/// Wᵀ r̂, or (W₀ − W)ᵀ r̂ where there is an `original` W₀ of the same shape, of all matrices of a
/// writer side by side; and ‖W‖. A row of each at a time is decoded.
fn project(own: &[Part], original: Option<&[Part]>, unit: &[f32]) -> (Vec<f32>, f64) {
    let (mut all, mut energy) = (Vec::new(), 0.0f64);
    let mut originals = original.into_iter().flatten().flat_map(|p| p.stack.iter());
    for w in own.iter().flat_map(|p| p.stack.iter()) {
        let original: Option<Matrix> = originals.next();
        let mut sum = vec![0.0f64; w.cols];
        let (mut row, mut before) = (vec![0.0f32; w.cols], vec![0.0f32; w.cols]);
        for (i, &r) in unit.iter().enumerate().take(w.rows) {
            w.decode_row(i, &mut row);
            energy += row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
            if let Some(o) = &original {
                o.decode_row(i, &mut before);
                row.iter_mut().zip(&before).for_each(|(x, o)| *x = o - *x);
            }
            sum.iter_mut().zip(&row).for_each(|(s, &x)| *s += f64::from(r) * f64::from(x));
        }
        all.extend(sum.into_iter().map(|x| x as f32));
    }
    (all, energy.sqrt())
}

/// IN's directions: derived, given, or random for the control.
pub(super) fn own_directions(baseline: &Baseline, training: &Training) -> Result<Vec<Direction>> {
    let spec = &baseline.evaluator.model.spec;
    let given = match &baseline.settings.source {
        Source::Own => Vec::new(),
        Source::Random(seed) => (0..spec.layers)
            .map(|l| (l, random_unit(spec.hidden, seed.wrapping_add(l as u64))))
            .collect(),
        Source::Given(saved) => saved.clone(),
    };
    directions(baseline.evaluator, baseline.prompts, &given, training.refused())
}

/// Every block's directions, kind by kind: what the causal scan compares.
pub(super) fn kinds(
    baseline: &Baseline,
    own: &[Direction],
) -> Result<Vec<(Toward, Vec<Direction>)>> {
    let own: Vec<&Direction> = own.iter().filter(|d| d.position == 0).collect();
    let cloned = || own.iter().map(|&d| d.clone()).collect::<Vec<_>>();
    match &baseline.settings.source {
        Source::Own => {}
        Source::Random(_) => return Ok(vec![(Toward::Given, cloned())]),
        Source::Given(saved) => {
            let named = baseline.settings.layers.clone().unwrap_or(0..=usize::MAX);
            let is_saved = |d: &Direction| saved.iter().any(|(l, _)| *l == d.layer);
            let given = cloned().into_iter().filter(|d| is_saved(d) && named.contains(&d.layer));
            let (given, away): (Vec<Direction>, Vec<Direction>) = given.partition(|d| d.own > 0.0);
            // A block that the user named is not dropped silently.
            if let Some(d) =
                away.first().filter(|_| given.is_empty() || baseline.settings.layers.is_some())
            {
                return Err(Error::Gate(format!(
                    "the saved direction of block {} points away from refusal in this model \
                     (cosine {:.2}); this tool only restores refusal",
                    d.layer, d.own
                )));
            }
            return Ok(vec![(Toward::Given, given)]);
        }
    }
    let refused =
        own.iter().filter_map(|d| Some(Direction { unit: d.refused.clone()?, ..(*d).clone() }));
    let mut kinds = vec![(Toward::Projected, cloned()), (Toward::Refused, refused.collect())];
    if let Some(reference) = &baseline.reference {
        let originals = &reference.directions;
        kinds.push((
            Toward::Original,
            own.iter().filter_map(|d| of_original(d, originals)).collect(),
        ));
        kinds.push((Toward::Taken, own.iter().filter_map(|d| taken(d, originals)).collect()));
    }
    kinds.retain(|(_, of)| !of.is_empty());
    Ok(kinds)
}

/// Blocks whose gates are fitted at most.
const PICKED: usize = 8;
/// Blocks that gain less than this share of the best one are left out.
const LEAST_SHARE: f64 = 0.25;

/// Blocks to consider: the user's, else those where writing gains most.
pub(super) fn pick_layers(
    baseline: &Baseline,
    kinds: &[(Toward, Vec<Direction>)],
    scan: &Scan,
    method: Method,
) -> Vec<usize> {
    let (layers, settings) = (baseline.evaluator.model.spec.layers, baseline.settings);
    if let Some(named) = &settings.layers {
        return named.clone().collect();
    }
    if method == Method::Restore {
        // What was taken is known of all.
        return (0..baseline.evaluator.model.spec.early()).collect();
    }
    let gain = |layer: usize| {
        kinds
            .iter()
            .map(|(toward, _)| scan.gain(layer, *toward, settings.emit))
            .fold(f64::MIN, f64::max)
    };
    // llama.cpp can't steer block 0 by a control vector.
    let first = usize::from(settings.emit == Emit::ControlVector);
    let mut all: Vec<usize> = (first..layers).collect();
    all.sort_by(|&a, &b| gain(b).total_cmp(&gain(a)).then(a.cmp(&b)));
    // A gated candidate costs one extra row; an ungated one costs a run.
    all.truncate(if method == Method::Gated { PICKED } else { 4 });
    let least = LEAST_SHARE * all.first().map_or(0.0, |&l| gain(l));
    all.retain(|&l| gain(l) >= least || least <= 0.0);
    all
}

/// The directions that a method may edit the picked blocks along, the greatest gain first.
pub(super) fn towards(
    baseline: &Baseline,
    method: Method,
    kinds: &[(Toward, Vec<Direction>)],
    scan: &Scan,
    picked: &[usize],
) -> Vec<(Toward, Vec<Direction>)> {
    let emit = baseline.settings.emit;
    let total = |(toward, of): &(Toward, Vec<Direction>)| -> f64 {
        let mut gains: Vec<f64> = of.iter().map(|d| scan.gain(d.layer, *toward, emit)).collect();
        gains.sort_by(|a, b| b.total_cmp(a));
        gains.iter().take(super::candidates::LAYERS).sum()
    };
    let mut some: Vec<(Toward, Vec<Direction>)> = kinds
        .iter()
        .map(|(toward, of)| {
            (*toward, of.iter().filter(|d| picked.contains(&d.layer)).cloned().collect())
        })
        .filter(|(_, of): &(_, Vec<Direction>)| !of.is_empty())
        .collect();
    if method == Method::Restore {
        some.retain(|(toward, _)| *toward == Toward::Original);
    }
    some.sort_by(|a, b| total(b).total_cmp(&total(a)));
    some.truncate(2);
    some
}

/// The original's direction and gap in a layer; none where it points away from refusal in this
/// model.
fn of_original(own: &Direction, originals: &[Direction]) -> Option<Direction> {
    let original = originals.iter().find(|d| d.layer == own.layer)?;
    let cosine: f64 =
        original.unit.iter().zip(&own.unit).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    (cosine > 0.0).then(|| Direction {
        unit: original.unit.clone(),
        gap: original.gap,
        own: cosine,
        ..own.clone()
    })
}

/// What compression took from the mean state of harmful prompts.
fn taken(own: &Direction, originals: &[Direction]) -> Option<Direction> {
    let original = originals.iter().find(|d| d.layer == own.layer)?;
    let lost: Vec<f32> =
        original.means.harmful.iter().zip(&own.means.harmful).map(|(a, b)| a - b).collect();
    let length = norm(&lost);
    let unit = lost.iter().map(|&x| (f64::from(x) / length) as f32).collect();
    (length > 0.0).then(|| Direction { unit, ..own.clone() })
}
