//! The gate v: a ridge solution that is 1 on the writer's inputs where the model decides about a harmful request and 0 on
//! everything else.

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::progress;

/// Rows that share a weight: the zeros come in groups, each with its own mean, so that many unimportant tokens do not
/// drown the few deciding ones.
pub struct Group {
    /// Inputs of the writer, `[n, width]`.
    pub rows: Vec<f32>,
    /// What v·x should be.
    pub target: f32,
    /// The group's share in the loss; its rows share it evenly.
    pub weight: f64,
}

impl Group {
    fn len(&self, width: usize) -> usize {
        self.rows.len() / width
    }
}

/// Ridge strengths that are tried, relative to the inputs' second moments (each feature scaled to 1).
const LAMBDAS: [f64; 9] = [1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0];

/// A gate with what it does on held-out inputs.
#[derive(Clone, Debug)]
pub struct Gate {
    /// `[width]`; mean v·x over held-out harmful prompts at the deciding position is 1.
    pub v: Vec<f32>,
    /// The ridge strength chosen.
    pub lambda: f64,
    /// Σ over groups of weight × mean squared error on held-out inputs, of the rescaled gate.
    pub loss: f64,
    /// (mean of v·x on harmful) / (root mean square on harmless, borderline), both held out at the deciding position.
    pub separation: f64,
}

/// Fits v on `train` and chooses the ridge strength on `held_out`, whose first group are the harmful deciding rows
/// and whose second the harmless ones.
///
/// Solved in sample space (rows × rows) when there are fewer rows than features, else in feature space.
///
/// # Errors
/// `Interrupted`; what the matrix product says.
pub fn fit(train: &[Group], held_out: &[Group], width: usize) -> Result<Option<Gate>> {
    let n: usize = train.iter().map(|g| g.len(width)).sum();
    if n == 0 || width == 0 {
        return Ok(None);
    }
    // Second moments per feature: the ridge penalises each feature by what it carries, or massive activations swamp it.
    let mut moment = vec![0.0f64; width];
    for g in train {
        let c = g.weight / g.len(width).max(1) as f64;
        for row in g.rows.chunks_exact(width) {
            moment.iter_mut().zip(row).for_each(|(m, &x)| *m += c * f64::from(x) * f64::from(x));
        }
    }
    let floor = moment.iter().sum::<f64>() / width as f64 * 1e-9 + f64::MIN_POSITIVE;
    let scale: Vec<f64> = moment.iter().map(|m| 1.0 / (m + floor).sqrt()).collect();
    let mut z = vec![0.0f64; n * width];
    let mut b = Vec::with_capacity(n);
    for (row, (x, target, c)) in z.chunks_exact_mut(width).zip(weighted(train, width)) {
        row.iter_mut().zip(x).zip(&scale).for_each(|((z, &x), s)| *z = c * f64::from(x) * s);
        b.push(c * target);
    }
    let dual = n < width;
    let size = if dual { n } else { width };
    let gram =
        gram(&z, n, width, dual).map_err(|e| Error::Limit(format!("the gate can't be fitted: {e}")))?;
    let right: Vec<f64> = if dual {
        b
    } else {
        (0..width).into_par_iter().map(|j| (0..n).map(|i| z[i * width + j] * b[i]).sum()).collect()
    };
    let mut best: Option<Gate> = None;
    for lambda in LAMBDAS {
        progress::check()?;
        let mut a = gram.clone();
        for i in 0..size {
            a[i * size + i] += lambda;
        }
        let Some(solution) = solve(a, right.clone(), size) else { continue };
        let v: Vec<f64> = if dual {
            let mut v = vec![0.0; width];
            for (row, &s) in z.chunks_exact(width).zip(&solution) {
                v.iter_mut().zip(row).for_each(|(v, z)| *v += s * z);
            }
            v
        } else {
            solution
        };
        let v: Vec<f64> = v.iter().zip(&scale).map(|(v, s)| v * s).collect();
        if let Some(gate) = judge(&v, held_out, width, lambda) {
            if best.as_ref().is_none_or(|b| gate.loss < b.loss) {
                best = Some(gate);
            }
        }
    }
    Ok(best)
}

/// Rescales v on the held-out harmful rows, and measures it.
fn judge(v: &[f64], held_out: &[Group], width: usize, lambda: f64) -> Option<Gate> {
    let values = |g: &Group| -> Vec<f64> {
        g.rows
            .par_chunks_exact(width)
            .map(|x| x.iter().zip(v).map(|(&x, v)| f64::from(x) * v).sum())
            .collect()
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

/// Each row with its target and the root of its share in the loss.
fn weighted(groups: &[Group], width: usize) -> impl Iterator<Item = (&[f32], f64, f64)> {
    groups.iter().flat_map(move |g| {
        let c = (g.weight / g.len(width).max(1) as f64).sqrt();
        g.rows.chunks_exact(width).map(move |x| (x, f64::from(g.target), c))
    })
}

/// Z Zᵀ (dual) or Zᵀ Z, row-major.
fn gram(z: &[f64], n: usize, width: usize, dual: bool) -> candle_core::Result<Vec<f64>> {
    let z = Tensor::from_slice(z, (n, width), &Device::Cpu)?;
    let t = z.t()?;
    let product = if dual { z.matmul(&t)? } else { t.matmul(&z)? };
    product.flatten_all()?.to_vec1()
}

/// Solves A x = b for a symmetric positive definite A, `[n, n]`, by a blocked Cholesky factorisation in place. `None` when
/// A is not positive definite to working precision.
fn solve(mut a: Vec<f64>, mut b: Vec<f64>, n: usize) -> Option<Vec<f64>> {
    const BLOCK: usize = 64;
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
        // The rows below it, then what they take from the rest.
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
            let panel: Vec<f64> = below.chunks_exact(n).flat_map(|row| row[k..end].iter().copied()).collect();
            let panel = Tensor::from_vec(panel, (rest, width), &Device::Cpu).ok()?;
            let update: Vec<f64> = panel.matmul(&panel.t().ok()?).ok()?.flatten_all().ok()?.to_vec1().ok()?;
            below.par_chunks_mut(n).zip(update.par_chunks(rest)).enumerate().for_each(
                |(i, (row, update))| {
                    row[end..=end + i].iter_mut().zip(update).for_each(|(a, u)| *a -= u);
                },
            );
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
        for n in [1, 5, 64, 65, 200] {
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
                    Group { rows: rows(n, width, true, seed), target: 1.0, weight: 1.0 },
                    Group { rows: rows(2 * n, width, false, seed + 1), target: 0.0, weight: 4.0 },
                ]
            };
            let gate = fit(&groups(1, 60), &groups(7, 40), width).unwrap().unwrap();
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
}
