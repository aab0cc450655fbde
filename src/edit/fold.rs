//! Folding a rank-one edit into stored weights by stepping codes; scales, minimums and zero points
//! stay.
//!
//! De-quantizing, editing and re-quantizing loses the edit: per weight it is far below half a
//! quantization step. Here the target T = W + u vᵀ is rounded on the grid that the file has, and
//! then each column's projection on û is brought to the asked value by moving single codes one
//! step. Which codes move is drawn at random with odds |û_i| / step, the odds of stochastic
//! rounding: the change is then u vᵀ in expectation in *every* direction, and what is off û is
//! noise that no input adds up coherently.

use std::ops::Range;

use rayon::prelude::*;

use crate::encoding::{Encoding, Params};
use crate::error::{Error, Result};
use crate::num::norm;
use crate::pair::Pair;
use crate::weights::{pruned, Matrix, Stack, Storage};

/// Columns that are worked on together: the longest block.
const PANEL: usize = 256;

/// How much of an edit the stored weights carry.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Achieved {
    /// (ûᵀΔ · asked) / ‖asked‖², where asked = ‖u‖ v: 1 when all of the edit is there.
    pub gain: f64,
    /// ‖ûᵀΔ − asked‖ / ‖asked‖.
    pub residue: f64,
    /// ‖u vᵀ‖ / ‖W‖.
    pub size: f64,
    /// Codes (elements) that differ.
    pub codes_moved: u64,
    /// All elements.
    pub elements: u64,
    /// Bytes that differ.
    pub bytes_changed: u64,
    /// Elements that are zero, before and after.
    pub zeros: Pair<u64>,
}

impl Achieved {
    /// Share of elements that are zero, before and after.
    pub fn sparsity(&self) -> Pair<f64> {
        self.zeros.map(|n| *n as f64 / self.elements.max(1) as f64)
    }
}

/// The bytes of the tensor's codes with `u vᵀ` folded in. `u`: `[rows]`, strength included; `v`:
/// `[cols]`.
///
/// # Errors
/// `Interrupted`; `Unsupported` where a code stands for several elements.
pub fn fold(w: &Matrix, u: &[f32], v: &[f32]) -> Result<Vec<u8>> {
    fold_into(w, u, v, false)
}

/// The same for a pruned tensor: zeros stay zeros, nothing becomes zero, and the edit is spread
/// over the rest of each column so that its projection on û is what was asked.
///
/// # Errors
/// As of [`fold`].
pub fn fold_pruned(w: &Matrix, u: &[f32], v: &[f32]) -> Result<Vec<u8>> {
    fold_into(w, u, v, true)
}

fn fold_into(w: &Matrix, u: &[f32], v: &[f32], pruned: bool) -> Result<Vec<u8>> {
    if !w.encoding.has_codes() {
        return Err(Error::unsupported(
            format!(
                "a code of {} stands for several weights: none can be stepped",
                w.encoding.name()
            ),
            "store the matrix in another encoding first",
        ));
    }
    let mut out = w.bytes.to_vec();
    let norm = norm(u);
    if norm == 0.0 {
        return Ok(out);
    }
    let unit: Vec<f64> = u.iter().map(|&x| f64::from(x) / norm).collect();
    let rms = norm
        * (v.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / v.len().max(1) as f64).sqrt();
    let edit = Asked { u, v, unit: &unit, norm, rms, pruned };
    let panels: Vec<Range<usize>> =
        (0..w.cols).step_by(PANEL).map(|c| c..(c + PANEL).min(w.cols)).collect();
    for group in panels.chunks(rayon::current_num_threads()) {
        let done: Vec<Vec<i32>> =
            group.par_iter().map(|cols| fold_panel(w, cols.clone(), &edit)).collect();
        // One after the other: columns can share words.
        for (cols, codes) in group.iter().zip(done) {
            let mut row_codes = vec![0i32; cols.len()];
            for row in 0..w.rows {
                row_codes
                    .iter_mut()
                    .enumerate()
                    .for_each(|(j, code)| *code = codes[j * w.rows + row]);
                w.pack(&mut out, row, cols.clone(), &row_codes);
            }
        }
    }
    Ok(out)
}

/// An edit, with the sums that every column needs.
struct Asked<'a> {
    u: &'a [f32],
    v: &'a [f32],
    unit: &'a [f64],
    norm: f64,
    /// The typical column's projection.
    rms: f64,
    pruned: bool,
}

/// One panel of columns, all rows: returns its codes, column after column.
fn fold_panel(w: &Matrix, cols: Range<usize>, edit: &Asked) -> Vec<i32> {
    let width = cols.len();
    // Column-major, so that a column's elements lie together.
    let mut codes = vec![0i32; w.rows * width];
    let mut params = vec![Params::default(); w.rows * width];
    let (mut row_codes, mut row_params) = (vec![0i32; width], vec![Params::default(); width]);
    for row in 0..w.rows {
        w.unpack(row, cols.clone(), &mut row_codes, &mut row_params);
        for j in 0..width {
            codes[j * w.rows + row] = row_codes[j];
            params[j * w.rows + row] = row_params[j];
        }
    }
    let mut scratch = Vec::new();
    for (j, col) in cols.enumerate() {
        let column = Column {
            encoding: &w.encoding,
            params: &params[j * w.rows..][..w.rows],
            edit,
            v: edit.v[col],
            index: col as u64,
        };
        column.fold(&mut codes[j * w.rows..][..w.rows], &mut scratch);
    }
    codes
}

/// A code that could move one step.
struct Move {
    key: f32,
    row: u32,
    up: bool,
}

/// Least share of û that a pruned column must have kept for an edit of it.
const LEAST_KEPT: f64 = 0.05;

struct Column<'a> {
    encoding: &'a Storage<'a>,
    params: &'a [Params],
    edit: &'a Asked<'a>,
    v: f32,
    index: u64,
}

impl Column<'_> {
    fn fold(&self, codes: &mut [i32], moves: &mut Vec<Move>) {
        let Asked { u, unit, norm, rms, pruned, .. } = *self.edit;
        if self.v == 0.0 {
            return;
        }
        let e = self.encoding;
        // Elements that stay what they are.
        let mut fixed = Vec::new();
        let mut share = 1.0;
        if pruned {
            fixed = (0..codes.len()).map(|i| e.value(self.params[i], codes[i]) == 0.0).collect();
            share = unit.iter().zip(&fixed).filter(|(_, f)| !**f).map(|(u, _)| u * u).sum();
            if share < LEAST_KEPT {
                return;
            }
        }
        let is_fixed = |i: usize| fixed.get(i) == Some(&true);
        // 1. Nearest codes of the target; the residue of the projection that this leaves.
        let mut residue = 0.0f64;
        let mut target = vec![0.0f64; codes.len()];
        for (i, code) in codes.iter_mut().enumerate() {
            if is_fixed(i) {
                continue;
            }
            let p = self.params[i];
            let w = e.value(p, *code);
            let edit = f64::from(u[i]) * f64::from(self.v) / share;
            target[i] = f64::from(w) + edit;
            let near = e.nearest(p, target[i] as f32);
            let value = e.value(p, near);
            // An equal value (scale 0, a rounded float) keeps its code.
            if value != w && !(pruned && value == 0.0) {
                *code = near;
            }
            residue += unit[i] * (target[i] - f64::from(e.value(p, *code)));
        }
        // 2. Single steps until the projection is right: a two-hundredth of the typical column, or
        //   of this one.
        let enough = 0.005 * rms.min(norm * f64::from(self.v.abs())).max(0.1 * rms);
        for round in 0..8u64 {
            if residue.abs() <= enough {
                return;
            }
            self.moves(codes, &target, residue, round, &fixed, moves);
            let before = residue;
            for m in moves.iter() {
                let (i, p) = (m.row as usize, self.params[m.row as usize]);
                let Some((next, value)) = self.step(p, codes[i], m.up) else { continue };
                let gain = unit[i] * (f64::from(value) - f64::from(e.value(p, codes[i])));
                // Never past zero by more than what is left.
                if gain.abs() < 2.0 * residue.abs() && gain.signum() == residue.signum() {
                    codes[i] = next;
                    residue -= gain;
                    if residue.abs() <= enough {
                        return;
                    }
                }
            }
            if residue == before {
                return;
            }
        }
    }

    /// The next code with another value, and that value: −0 and +0 are both codes, and neighbours
    /// can be rounded to one number.
    fn step(&self, p: Params, code: i32, up: bool) -> Option<(i32, f32)> {
        let (low, high) = self.encoding.code_range();
        let now = self.encoding.value(p, code);
        let by = if up { 1 } else { -1 };
        [code.saturating_add(by), code.saturating_add(2 * by)]
            .into_iter()
            .filter(|next| (low..=high).contains(next))
            .map(|next| (next, self.encoding.value(p, next)))
            .find(|&(_, value)| value != now)
    }

    /// Every move that shrinks the residue, the likeliest first: an exponential race with rates
    /// gain / cost.
    fn moves(
        &self,
        codes: &[i32],
        target: &[f64],
        residue: f64,
        round: u64,
        fixed: &[bool],
        moves: &mut Vec<Move>,
    ) {
        let (e, unit) = (self.encoding, self.edit.unit);
        moves.clear();
        for (i, &code) in codes.iter().enumerate() {
            if fixed.get(i) == Some(&true) {
                continue;
            }
            let p = self.params[i];
            let now = f64::from(e.value(p, code));
            for up in [true, false] {
                let Some((_, value)) = self.step(p, code, up) else { continue };
                if self.edit.pruned && value == 0.0 {
                    continue;
                }
                let step = f64::from(value) - now;
                let gain = unit[i] * step;
                if gain * residue <= 0.0 || gain.abs() >= 2.0 * residue.abs() {
                    continue;
                }
                let off = target[i] - now;
                // How much the squared error grows; a step towards the target costs (next to)
                // nothing.
                let cost = ((off - step).powi(2) - off.powi(2)).max(1e-3 * step * step);
                let draw = -(uniform(self.index, i as u64, round)).ln();
                moves.push(Move { key: (cost / gain.abs() * draw) as f32, row: i as u32, up });
            }
        }
        moves.sort_unstable_by(|a, b| a.key.total_cmp(&b.key).then(a.row.cmp(&b.row)));
    }
}

/// SplitMix64 of a column, a row and a round as a number in (0, 1): the same on every machine and
/// any thread count.
fn uniform(column: u64, row: u64, round: u64) -> f64 {
    let mut z = (column << 32 ^ row)
        .wrapping_add(round.wrapping_mul(0xD1B5_4A32_D192_ED03))
        .wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) as f64 + 0.5) / (u64::MAX as f64 + 1.0)
}

/// A matrix in another encoding, with an edit u vᵀ added before it is quantized.
pub fn recode(w: &Matrix, encoding: Encoding, edit: Option<(&[f32], &[f32])>) -> Vec<u8> {
    let n = encoding.bytes_for(w.cols);
    let mut out = vec![0u8; w.rows * n];
    let mut row = vec![0.0f32; w.cols];
    for (i, bytes) in out.chunks_exact_mut(n).enumerate() {
        w.decode_row(i, &mut row);
        if let Some((u, v)) = edit {
            row.iter_mut().zip(v).for_each(|(x, v)| *x += u[i] * v);
        }
        encoding.encode(&row, bytes);
    }
    out
}

/// Compares stored weights before and after with the edit asked; the encodings may differ.
pub fn achieved(before: &Matrix, after: &Matrix, u: &[f32], v: &[f32]) -> Achieved {
    achieved_all(&(*before).into(), &(*after).into(), u, v)
}

/// The same for all matrices of a tensor; `v`: their gates side by side.
pub fn achieved_all(before: &Stack, after: &Stack, u: &[f32], v: &[f32]) -> Achieved {
    let (_, cols) = before.shape();
    let mut sum = Sums::default();
    for ((b, a), v) in before.iter().zip(after.iter()).zip(v.chunks_exact(cols)) {
        sum.add(&compare(&b, &a, u, v));
    }
    let total = sum.total.max(f64::MIN_POSITIVE);
    Achieved {
        gain: sum.along / total,
        residue: (sum.miss / total).sqrt(),
        size: (total / sum.energy.max(f64::MIN_POSITIVE)).sqrt(),
        codes_moved: sum.moved,
        elements: sum.elements,
        bytes_changed: sum.bytes,
        zeros: sum.zeros,
    }
}

/// What the shares of [`Achieved`] are made from.
#[derive(Default)]
struct Sums {
    along: f64,
    miss: f64,
    total: f64,
    energy: f64,
    moved: u64,
    elements: u64,
    bytes: u64,
    zeros: Pair<u64>,
}

impl Sums {
    fn add(&mut self, o: &Sums) {
        self.along += o.along;
        self.miss += o.miss;
        self.total += o.total;
        self.energy += o.energy;
        self.moved += o.moved;
        self.elements += o.elements;
        self.bytes += o.bytes;
        self.zeros.before += o.zeros.before;
        self.zeros.after += o.zeros.after;
    }
}

fn compare(before: &Matrix, after: &Matrix, u: &[f32], v: &[f32]) -> Sums {
    let norm_u = norm(u).max(f64::MIN_POSITIVE);
    struct Part {
        projection: Vec<f64>,
        energy: f64,
        moved: u64,
    }
    let part = |rows: Range<usize>| {
        let (mut a, mut b) = (vec![0.0f32; before.cols], vec![0.0f32; before.cols]);
        let mut part = Part { projection: vec![0.0; before.cols], energy: 0.0, moved: 0 };
        for i in rows {
            before.decode_row(i, &mut a);
            after.decode_row(i, &mut b);
            let unit = f64::from(u[i]) / norm_u;
            for j in 0..before.cols {
                let delta = f64::from(b[j]) - f64::from(a[j]);
                part.projection[j] += unit * delta;
                part.energy += f64::from(a[j]).powi(2);
                part.moved += u64::from(delta != 0.0);
            }
        }
        part
    };
    // Fixed chunks, added in order: the same sum at any thread count.
    let chunks: Vec<Range<usize>> =
        (0..before.rows).step_by(256).map(|r| r..(r + 256).min(before.rows)).collect();
    let parts: Vec<Part> = chunks.into_par_iter().map(part).collect();
    let mut projection = vec![0.0f64; before.cols];
    let (mut energy, mut moved) = (0.0, 0);
    for p in &parts {
        projection.iter_mut().zip(&p.projection).for_each(|(a, b)| *a += b);
        energy += p.energy;
        moved += p.moved;
    }
    let asked: Vec<f64> = v.iter().map(|&v| norm_u * f64::from(v)).collect();
    Sums {
        along: projection.iter().zip(&asked).map(|(p, a)| p * a).sum(),
        miss: projection.iter().zip(&asked).map(|(p, a)| (p - a).powi(2)).sum(),
        total: asked.iter().map(|a| a * a).sum(),
        energy,
        moved,
        elements: (before.rows * before.cols) as u64,
        bytes: if before.bytes.len() == after.bytes.len() {
            before.bytes.iter().zip(after.bytes).filter(|(a, b)| a != b).count() as u64
        } else {
            after.bytes.len() as u64
        },
        zeros: Pair::new(pruned::zeros(before), pruned::zeros(after)),
    }
}
