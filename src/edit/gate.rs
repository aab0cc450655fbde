//! The gate v: a ridge solution that is 1 on the writer's inputs where the model decides about a
//! harmful request and 0 on everything else.

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use crate::error::{Error, Result};

/// Rows that share a weight: the zeros come in groups, each with its own mean, so that many
/// unimportant tokens do not drown the few deciding ones.
#[derive(Clone, Debug)]
pub struct Group {
    /// How many rows there are.
    pub rows: usize,
    /// Which row each input belongs to, and which of the writer's matrices reads it: a row has one
    /// input, of experts one for each that it was sent to.
    pub cells: Vec<(usize, usize)>,
    /// The inputs, `[cells, width]`; an expert's times the router's weight.
    pub inputs: Vec<f32>,
    /// What v·x should be, the sum over a row's inputs.
    pub target: f32,
    /// The group's share in the loss; its rows share it evenly.
    pub weight: f64,
}

impl Group {
    /// An empty group.
    pub fn new(target: f32, weight: f64) -> Group {
        Group { rows: 0, cells: Vec::new(), inputs: Vec::new(), target, weight }
    }

    /// A group of a writer with one matrix; `inputs`: `[n, width]`.
    pub fn plain(inputs: Vec<f32>, width: usize, target: f32, weight: f64) -> Group {
        let rows = inputs.len() / width;
        Group { rows, cells: (0..rows).map(|i| (i, 0)).collect(), inputs, target, weight }
    }

    /// Sets inputs to zero that a gate can't use: `columns` lists them for each matrix from `first`
    /// on.
    pub fn silence(&mut self, first: usize, columns: &[Vec<usize>]) {
        let width = self.inputs.len() / self.cells.len().max(1);
        for (&(_, part), x) in self.cells.iter().zip(self.inputs.chunks_exact_mut(width.max(1))) {
            let list = part.checked_sub(first).and_then(|at| columns.get(at));
            list.into_iter().flatten().for_each(|&j| x[j] = 0.0);
        }
    }

    /// Root of a row's share in the loss.
    fn share(&self) -> f64 {
        (self.weight / self.rows.max(1) as f64).sqrt()
    }

    fn each(&self, width: usize) -> impl Iterator<Item = (usize, usize, &[f32])> {
        self.cells
            .iter()
            .zip(self.inputs.chunks_exact(width))
            .map(|(&(row, part), x)| (row, part, x))
    }
}

/// Fewest harmful rows of an expert: a gate that was fitted on fewer does not generalise.
const LEAST_ROWS: usize = 16;

/// Ridge strengths that are tried, relative to the inputs' second moments (each feature scaled to
/// 1).
const LAMBDAS: [f64; 9] = [1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0];

/// A gate with what it does on held-out inputs.
#[derive(Clone, Debug)]
pub struct Gate {
    /// `[width]`, of experts side by side; mean v·x over held-out harmful prompts at the deciding
    /// position is 1.
    pub v: Vec<f32>,
    /// The ridge strength chosen.
    pub lambda: f64,
    /// Σ over groups of weight × mean squared error on held-out inputs, of the rescaled gate.
    pub loss: f64,
    /// (mean of v·x on harmful) / (root mean square on harmless), both held out at the deciding
    /// position.
    pub separation: f64,
}

/// Gates for every ridge strength, not measured yet.
pub struct Fits {
    /// By strength: v, `[parts × width]`.
    gates: Vec<(f64, Vec<f64>)>,
    width: usize,
}

/// Fits a gate for every ridge strength. The first group of `train` are the harmful rows at the
/// deciding position, the second the harmless ones there. A gate has `width` elements for each of
/// the writer's `parts` matrices, side by side; they are zero for an expert that too few harmful
/// rows chose. `None`: there are no rows.
///
/// Solved in sample space (rows × rows) when there are fewer rows than features, else in feature
/// space. Either takes the inputs of one matrix at a time: with thousands of rows memory is theirs,
/// however many features there are.
///
/// # Errors
/// `Interrupted`; what the matrix product says.
pub fn fit(train: &[Group], width: usize, parts: usize) -> Result<Option<Fits>> {
    let Some(problem) = Problem::new(train, width, parts) else { return Ok(None) };
    let (n, columns) = (problem.rows, problem.kept.len() * width);
    let dual = n < columns;
    let size = if dual { n } else { columns };
    let (gram, right) = if dual { problem.in_samples() } else { problem.in_features() }
        .map_err(|e| Error::Limit(format!("the gate can't be fitted: {e}")))?;
    let mut gates = Vec::new();
    for lambda in LAMBDAS {
        let mut a = gram.clone();
        for i in 0..size {
            a[i * size + i] += lambda;
        }
        let Some(solution) = solve(a, right.clone(), size) else { continue };
        gates.push((lambda, problem.gate(&solution, dual)));
    }
    Ok(Some(Fits { gates, width }))
}

impl Fits {
    /// The gate with the least loss on held-out rows, in the groups of [`fit`].
    pub fn choose(&self, held_out: &[Group]) -> Option<Gate> {
        let all =
            self.gates.iter().filter_map(|(lambda, v)| judge(v, held_out, self.width, *lambda));
        all.reduce(|best, gate| if gate.loss < best.loss { gate } else { best })
    }
}

/// The rows of the ridge problem: each row times the root of its share in the loss, each feature
/// scaled.
struct Problem<'a> {
    groups: &'a [Group],
    width: usize,
    /// Elements of the gate.
    len: usize,
    /// Rows of all groups.
    rows: usize,
    /// The matrices that are edited.
    kept: Vec<usize>,
    /// Of each feature.
    scale: Vec<f64>,
}

impl<'a> Problem<'a> {
    /// `None` where there are no rows, or too few of every expert.
    fn new(groups: &'a [Group], width: usize, parts: usize) -> Option<Problem<'a>> {
        let rows = groups.iter().map(|g| g.rows).sum();
        let mut fires = vec![0usize; parts];
        groups.first()?.cells.iter().for_each(|&(_, part)| fires[part] += 1);
        let kept: Vec<usize> =
            (0..parts).filter(|&p| parts == 1 || fires[p] >= LEAST_ROWS).collect();
        if rows == 0 || width == 0 || kept.is_empty() {
            return None;
        }
        // Second moments per feature: the ridge penalises each feature by what it carries, or
        // massive activations swamp it.
        let mut moment = vec![0.0f64; parts * width];
        for g in groups {
            let c = g.share().powi(2);
            for (_, part, x) in g.each(width) {
                let moment = &mut moment[part * width..][..width];
                moment.iter_mut().zip(x).for_each(|(m, &x)| *m += c * f64::from(x) * f64::from(x));
            }
        }
        let floor = moment.iter().sum::<f64>() / moment.len() as f64 * 1e-9 + f64::MIN_POSITIVE;
        let scale = moment.iter().map(|m| 1.0 / (m + floor).sqrt()).collect();
        Some(Problem { groups, width, len: parts * width, rows, kept, scale })
    }

    /// A matrix's inputs: the rows that they belong to, and `[inputs, width]`.
    fn part(&self, part: usize) -> (Vec<usize>, Vec<f64>) {
        let scale = &self.scale[part * self.width..][..self.width];
        let (mut rows, mut z, mut first) = (Vec::new(), Vec::new(), 0);
        for g in self.groups {
            let c = g.share();
            for (row, _, x) in g.each(self.width).filter(|(_, p, _)| *p == part) {
                rows.push(first + row);
                z.extend(x.iter().zip(scale).map(|(&x, s)| c * f64::from(x) * s));
            }
            first += g.rows;
        }
        (rows, z)
    }

    /// The targets of v·x, row by row.
    fn targets(&self) -> Vec<f64> {
        let of = |g: &Group| std::iter::repeat_n(g.share() * f64::from(g.target), g.rows);
        self.groups.iter().flat_map(of).collect()
    }

    /// Z Zᵀ and b.
    fn in_samples(&self) -> candle_core::Result<(Vec<f64>, Vec<f64>)> {
        let n = self.rows;
        let mut all = vec![0.0f64; n * n];
        for &part in &self.kept {
            let (rows, z) = self.part(part);
            let some = gram(&z, rows.len(), self.width, true)?;
            for (&row, line) in rows.iter().zip(some.chunks_exact(rows.len().max(1))) {
                rows.iter().zip(line).for_each(|(&other, x)| all[row * n + other] += x);
            }
        }
        Ok((all, self.targets()))
    }

    /// Zᵀ Z and Zᵀ b.
    fn in_features(&self) -> candle_core::Result<(Vec<f64>, Vec<f64>)> {
        let (n, columns) = (self.rows, self.kept.len() * self.width);
        let mut z = vec![0.0f64; n * columns];
        for (i, &part) in self.kept.iter().enumerate() {
            let (rows, some) = self.part(part);
            for (row, x) in rows.iter().zip(some.chunks_exact(self.width)) {
                z[row * columns + i * self.width..][..self.width].copy_from_slice(x);
            }
        }
        let b = self.targets();
        let right = (0..columns)
            .into_par_iter()
            .map(|j| (0..n).map(|i| z[i * columns + j] * b[i]).sum())
            .collect();
        Ok((gram(&z, n, columns, false)?, right))
    }

    /// The gate from a solution in either space.
    fn gate(&self, solution: &[f64], dual: bool) -> Vec<f64> {
        let mut v = vec![0.0f64; self.len];
        for (i, &part) in self.kept.iter().enumerate() {
            let v = &mut v[part * self.width..][..self.width];
            if dual {
                let (rows, z) = self.part(part);
                for (&row, z) in rows.iter().zip(z.chunks_exact(self.width)) {
                    v.iter_mut().zip(z).for_each(|(v, z)| *v += solution[row] * z);
                }
            } else {
                v.copy_from_slice(&solution[i * self.width..][..self.width]);
            }
        }
        v.iter().zip(&self.scale).map(|(v, s)| v * s).collect()
    }
}

/// Rescales v on the held-out harmful rows, and measures it.
fn judge(v: &[f64], held_out: &[Group], width: usize, lambda: f64) -> Option<Gate> {
    let values = |g: &Group| -> Vec<f64> {
        let cells: Vec<(usize, usize, &[f32])> = g.each(width).collect();
        let products: Vec<(usize, f64)> = cells
            .into_par_iter()
            .map(|(row, part, x)| {
                (row, x.iter().zip(&v[part * width..]).map(|(&x, v)| f64::from(x) * v).sum())
            })
            .collect();
        let mut out = vec![0.0f64; g.rows];
        products.iter().for_each(|(row, x)| out[*row] += x);
        out
    };
    let all: Vec<Vec<f64>> = held_out.iter().map(values).collect();
    let mean = all.first()?.iter().sum::<f64>() / all.first()?.len().max(1) as f64;
    if mean.is_nan() || mean <= 1e-3 {
        return None;
    }
    let error = |i: usize| {
        let t = f64::from(held_out[i].target);
        all[i].iter().map(|x| (x / mean - t).powi(2)).sum::<f64>() / all[i].len().max(1) as f64
    };
    let loss = (0..all.len()).map(|i| held_out[i].weight * error(i)).sum();
    let leak = if all.len() > 1 { error(1).sqrt() } else { f64::NAN };
    Some(Gate {
        v: v.iter().map(|v| (v / mean) as f32).collect(),
        lambda,
        loss,
        separation: 1.0 / leak.max(1e-6),
    })
}

/// Z Zᵀ (dual) or Zᵀ Z, row-major.
fn gram(z: &[f64], n: usize, width: usize, dual: bool) -> candle_core::Result<Vec<f64>> {
    let z = Tensor::from_slice(z, (n, width), &Device::Cpu)?;
    let t = z.t()?;
    let product = if dual { z.matmul(&t)? } else { t.matmul(&z)? };
    product.flatten_all()?.to_vec1()
}

/// Solves A x = b for a symmetric positive definite A, `[n, n]`, by a blocked Cholesky
/// factorisation in place. `None` when A is not positive definite to working precision.
fn solve(mut a: Vec<f64>, mut b: Vec<f64>, n: usize) -> Option<Vec<f64>> {
    const BLOCK: usize = 64;
    const ROWS: usize = 512;
    for k in (0..n).step_by(BLOCK) {
        let end = (k + BLOCK).min(n);
        let width = end - k;
        // The diagonal block.
        for j in k..end {
            for i in j..end {
                let sum: f64 = (k..j).map(|p| a[i * n + p] * a[j * n + p]).sum();
                let x = a[i * n + j] - sum;
                a[i * n + j] = if i > j {
                    x / a[j * n + j]
                } else if x > 0.0 {
                    x.sqrt()
                } else {
                    return None;
                };
            }
        }
        // The rows below it, then the update of the rest.
        let (top, below) = a.split_at_mut(end * n);
        below.par_chunks_mut(n).for_each(|row| {
            for j in k..end {
                let diagonal = &top[j * n..];
                let sum: f64 = (k..j).map(|p| row[p] * diagonal[p]).sum();
                row[j] = (row[j] - sum) / diagonal[j];
            }
        });
        let rest = n - end;
        if rest > 0 {
            let panel: Vec<f64> =
                below.chunks_exact(n).flat_map(|row| row[k..end].iter().copied()).collect();
            let panel = Tensor::from_vec(panel, (rest, width), &Device::Cpu).ok()?;
            // Only the lower triangle is read, so some rows at a time need the columns up to theirs.
            for (i, rows) in below.chunks_mut(ROWS * n).enumerate() {
                let (first, count) = (i * ROWS, rows.len() / n);
                let columns = first + count;
                let some = panel.narrow(0, first, count).ok()?;
                let product = some.matmul(&panel.narrow(0, 0, columns).ok()?.t().ok()?).ok()?;
                let update: Vec<f64> = product.flatten_all().ok()?.to_vec1().ok()?;
                let rows = rows.par_chunks_mut(n).zip(update.par_chunks(columns));
                rows.for_each(|(row, update)| {
                    row[end..end + columns].iter_mut().zip(update).for_each(|(a, u)| *a -= u);
                });
            }
        }
    }
    for i in 0..n {
        let sum: f64 = (0..i).map(|p| a[i * n + p] * b[p]).sum();
        b[i] = (b[i] - sum) / a[i * n + i];
    }
    for i in (0..n).rev() {
        let sum: f64 = (i + 1..n).map(|p| a[p * n + i] * b[p]).sum();
        b[i] = (b[i] - sum) / a[i * n + i];
    }
    b.iter().all(|x| x.is_finite()).then_some(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(n: usize, seed: u64) -> Vec<f64> {
        let mut s = seed;
        (0..n)
            .map(|_| {
                s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (s >> 33) as f64 / (1u64 << 31) as f64 - 0.5
            })
            .collect()
    }

    #[test]
    fn the_solver_solves_across_block_borders() {
        for n in [1, 5, 64, 65, 200, 700] {
            let z = random(n * (n + 3), n as u64);
            let mut a = gram(&z, n, n + 3, true).unwrap();
            for i in 0..n {
                a[i * n + i] += 0.1;
            }
            let x = random(n, 9);
            let b: Vec<f64> = (0..n).map(|i| (0..n).map(|j| a[i * n + j] * x[j]).sum()).collect();
            let found = solve(a, b, n).unwrap();
            assert!(found.iter().zip(&x).all(|(a, b)| (a - b).abs() < 1e-7), "n = {n}");
        }
    }

    #[test]
    fn an_indefinite_matrix_is_not_solved() {
        assert!(solve(vec![1.0, 2.0, 2.0, 1.0], vec![1.0, 1.0], 2).is_none());
    }

    /// Harmful rows share feature 0, everything carries a massive activation in feature 1.
    fn rows(n: usize, width: usize, harmful: bool, seed: u64) -> Vec<f32> {
        let mut x: Vec<f32> = random(n * width, seed).iter().map(|&x| x as f32).collect();
        for row in x.chunks_exact_mut(width) {
            row[0] += if harmful { 3.0 } else { 0.0 };
            row[1] += 500.0;
        }
        x
    }

    #[test]
    fn the_gate_fires_on_harmful_rows_only_in_either_space() {
        for width in [8, 300] {
            let groups = |seed: u64, n: usize| {
                vec![
                    Group::plain(rows(n, width, true, seed), width, 1.0, 1.0),
                    Group::plain(rows(2 * n, width, false, seed + 1), width, 0.0, 4.0),
                ]
            };
            let gate =
                fit(&groups(1, 60), width, 1).unwrap().unwrap().choose(&groups(7, 40)).unwrap();
            assert!(gate.separation > 2.0, "width {width}: separation {}", gate.separation);
            let held = rows(50, width, true, 77);
            let mean: f64 = held
                .chunks_exact(width)
                .map(|x| x.iter().zip(&gate.v).map(|(a, b)| f64::from(a * b)).sum::<f64>())
                .sum::<f64>()
                / 50.0;
            assert!((mean - 1.0).abs() < 0.2, "width {width}: mean gate {mean}");
        }
    }

    #[test]
    fn experts_share_one_gate_and_rarely_chosen_ones_are_left_alone() {
        // Each row goes to two of four experts; expert 3 is hardly ever chosen. In feature space,
        // then in sample space.
        for width in [6, 200] {
            let group = |n: usize, harmful: bool, seed: u64| {
                let mut g =
                    Group::new(f32::from(u8::from(harmful)), if harmful { 1.0 } else { 4.0 });
                g.rows = n;
                let x = rows(2 * n, width, harmful, seed);
                for (i, x) in x.chunks_exact(2 * width).enumerate() {
                    let pair = if i % 20 == 7 { [1, 3] } else { [[0, 1], [1, 2], [0, 2]][i % 3] };
                    for (&e, (x, router)) in pair.iter().zip(x.chunks_exact(width).zip([0.7, 0.3]))
                    {
                        g.cells.push((i, e));
                        g.inputs.extend(x.iter().map(|x| router * x));
                    }
                }
                g
            };
            let groups = |seed: u64| vec![group(90, true, seed), group(180, false, seed + 1)];
            let gate = fit(&groups(3), width, 4).unwrap().unwrap().choose(&groups(11)).unwrap();
            assert!(gate.separation > 2.0, "width {width}: separation {}", gate.separation);
            assert_eq!(gate.v.len(), 4 * width);
            assert!(gate.v[3 * width..].iter().all(|v| *v == 0.0));
            assert!((0..3).all(|e| gate.v[e * width..][..width].iter().any(|v| *v != 0.0)));
        }
    }
}
