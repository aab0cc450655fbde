//! From final hidden states to token probabilities, the vocabulary matrix a tile at a time.

use std::ops::Range;

use rayon::prelude::*;

use crate::arch::Scales;
use crate::error::Result;
use crate::model::Model;
use crate::weights::Matrix;

use super::matmul::Compute;

/// Rows per pass over the vocabulary matrix.
const ROWS: usize = 2048;
/// Logits that are summed up at a time. Tiles on the CPU are whole chunks but for the last: a row's
/// sums are the same whatever else is read.
const CHUNK: usize = 1024;

/// What the head says about one row.
#[derive(Clone, Debug, Default)]
pub struct Readout {
    /// log Σ exp(logit).
    pub log_sum: f64,
    /// The likeliest tokens and their log-probabilities (natural), best first; ties by lower id.
    pub top: Vec<(u32, f32)>,
    /// Log-probabilities of the tokens that were asked for, in their order.
    pub asked: Vec<f32>,
}

/// The output matrix of a model. It takes final hidden states as [`super::Runner`] returns them:
/// normed, `[n, hidden]`.
pub struct Head<'m> {
    compute: &'m Compute,
    output: Matrix<'m>,
    scales: Scales,
}

impl<'m> Head<'m> {
    /// The model's output matrix on a device.
    pub fn new(model: &'m Model, compute: &'m Compute) -> Result<Head<'m>> {
        Ok(Head { compute, output: model.output()?, scales: model.spec.scales })
    }

    /// The `k` likeliest tokens of each row, and the log-probabilities of `asked(row)`.
    pub fn read<'a>(
        &self,
        hidden: &[f32],
        k: usize,
        asked: impl Fn(usize) -> &'a [u32],
    ) -> Result<Vec<Readout>> {
        let d = self.output.cols;
        let mut all = Vec::with_capacity(hidden.len() / d);
        for (block, hidden) in hidden.chunks(ROWS * d).enumerate() {
            let n = hidden.len() / d;
            let first = block * ROWS;
            let asked: Vec<&[u32]> = (0..n).map(|i| asked(first + i)).collect();
            let mut rows: Vec<Readout> = asked
                .iter()
                .map(|asked| Readout { asked: vec![f32::NAN; asked.len()], ..Readout::default() })
                .collect();
            let mut sums = vec![Sum::default(); n];
            self.tiles(hidden, n, |tokens, logits| {
                let of_rows = logits.par_chunks(tokens.len()).zip(&asked);
                rows.par_iter_mut().zip(&mut sums).zip(of_rows).for_each(
                    |((row, sum), (logits, asked))| {
                        for (slot, &t) in row.asked.iter_mut().zip(*asked) {
                            if tokens.contains(&(t as usize)) {
                                *slot = logits[t as usize - tokens.start];
                            }
                        }
                        for (chunk, start) in
                            logits.chunks(CHUNK).zip(tokens.clone().step_by(CHUNK))
                        {
                            let max = largest(chunk);
                            sum.add(chunk, max, &mut [0.0; CHUNK]);
                            keep_likeliest(&mut row.top, k, start, chunk, max);
                        }
                    },
                );
                Ok(())
            })?;
            for (row, sum) in rows.iter_mut().zip(&sums) {
                row.log_sum = sum.log();
                let ls = row.log_sum as f32;
                row.top.iter_mut().for_each(|(_, x)| *x -= ls);
                row.asked.iter_mut().for_each(|x| *x -= ls);
            }
            all.append(&mut rows);
        }
        Ok(all)
    }

    /// Hands the logits to `f` a tile at a time: the tokens, and `[n, tokens]`.
    fn tiles(
        &self,
        hidden: &[f32],
        n: usize,
        mut f: impl FnMut(Range<usize>, &[f32]) -> Result<()>,
    ) -> Result<()> {
        let Scales { logits: scale, logit_cap: cap, .. } = self.scales;
        if scale == 1.0 && cap.is_none() {
            return self.compute.tiles(hidden, n, &self.output, f);
        }
        let mut last = Vec::new();
        self.compute.tiles(hidden, n, &self.output, |tokens, logits| {
            let capped = |x: f32| cap.map_or(x, |cap| cap * (x / cap).tanh());
            last.clear();
            last.par_extend(logits.par_iter().map(|&x| capped(x * scale)));
            f(tokens, &last)
        })
    }

    /// KL(p ‖ q) in nats for each pair of rows, p's and q's hidden states under the same output
    /// matrix.
    pub fn kl(&self, p: &[f32], q: &[f32]) -> Result<Vec<f64>> {
        let d = self.output.cols;
        let mut all = Vec::with_capacity(p.len() / d);
        for (p, q) in p.chunks(ROWS * d).zip(q.chunks(ROWS * d)) {
            let n = p.len() / d;
            let both = [p, q].concat();
            let mut sums = vec![Sum::default(); 2 * n];
            // Σ e^{lp - max} (lp - lq), with the same running maximum as p's sum.
            let mut cross = vec![0.0f64; n];
            self.tiles(&both, 2 * n, |tokens, logits| {
                let (of_p, of_q) = logits.split_at(n * tokens.len());
                let (sums_p, sums_q) = sums.split_at_mut(n);
                let of_p = of_p.par_chunks(tokens.len()).zip(sums_p);
                let of_q = of_q.par_chunks(tokens.len()).zip(sums_q);
                of_p.zip(of_q).zip(&mut cross).for_each(|(((p, sum_p), (q, sum_q)), cross)| {
                    let mut exps = [0.0; CHUNK];
                    for (p, q) in p.chunks(CHUNK).zip(q.chunks(CHUNK)) {
                        sum_q.add(q, largest(q), &mut exps);
                        *cross *= sum_p.add(p, largest(p), &mut exps);
                        let terms = exps.iter().zip(p).zip(q);
                        *cross += terms
                            .map(|((&e, &a), &b)| f64::from(e) * f64::from(a - b))
                            .sum::<f64>();
                    }
                });
                Ok(())
            })?;
            all.extend((0..n).map(|i| {
                let kl = cross[i] / sums[i].sum - sums[i].log() + sums[n + i].log();
                // Rounding can leave a tiny negative number where p = q; a NaN must stay one.
                if kl < 0.0 {
                    0.0
                } else {
                    kl
                }
            }));
        }
        Ok(all)
    }
}

/// A running log-sum-exp.
#[derive(Clone, Copy)]
struct Sum {
    max: f32,
    sum: f64,
}

impl Default for Sum {
    fn default() -> Sum {
        Sum { max: f32::NEG_INFINITY, sum: 0.0 }
    }
}

impl Sum {
    /// Takes up to CHUNK more logits in, of which `max` is the largest, and leaves their
    /// exponentials, over that of the largest so far, in `exps`. Returns the factor by which
    /// earlier terms shrank.
    fn add(&mut self, logits: &[f32], max: f32, exps: &mut [f32; CHUNK]) -> f64 {
        let max = if max > self.max { max } else { self.max };
        let factor =
            if self.max == f32::NEG_INFINITY { 0.0 } else { f64::from(self.max - max).exp() };
        let exps = &mut exps[..logits.len()];
        exps.iter_mut().zip(logits).for_each(|(e, &x)| *e = exp(x - max));
        let (eights, rest) = exps.as_chunks::<8>();
        let mut sums = [0.0f64; 8];
        for eight in eights {
            sums.iter_mut().zip(eight).for_each(|(sum, &e)| *sum += f64::from(e));
        }
        let rest = rest.iter().map(|&e| f64::from(e)).sum::<f64>();
        self.sum = self.sum * factor + sums.iter().sum::<f64>() + rest;
        self.max = max;
        factor
    }

    fn log(&self) -> f64 {
        f64::from(self.max) + self.sum.ln()
    }
}

/// The largest logit; NaNs are passed over.
fn largest(logits: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (eights, rest) = logits.as_chunks::<8>();
    let mut all = [f32::NEG_INFINITY; 8];
    for eight in eights {
        all.iter_mut().zip(eight).for_each(|(a, &x)| *a = larger(*a, x));
    }
    all.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger)
}

/// Keeps the `k` likeliest tokens; `max` is the largest of these logits, which begin at token
/// `start`.
fn keep_likeliest(top: &mut Vec<(u32, f32)>, k: usize, start: usize, logits: &[f32], max: f32) {
    if top.len() >= k && !top.last().is_some_and(|&(_, worst)| max > worst) {
        return;
    }
    for (j, &x) in logits.iter().enumerate() {
        if top.len() < k || top.last().is_some_and(|&(_, worst)| x > worst) {
            let at = top.partition_point(|&(_, y)| y >= x);
            top.insert(at, ((start + j) as u32, x));
            top.truncate(k);
        }
    }
}

/// e^x for x up to 0, within 2e-7 of it: without branches, so that the compiler takes several at a
/// time. x = z ln 2 + r, and e^r is a polynomial (Cephes).
#[inline(always)]
fn exp(x: f32) -> f32 {
    /// Added and taken away it rounds to an integer, which is then in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    // A NaN stays one. Below, the result is too small to be a normal number.
    let x = if x < -87.0 { -87.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let z = shifted - ROUND;
    let r = (x - z * 0.693_359_4) + z * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    let power = (shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127)) << 23;
    (p * r * r + r + 1.0) * f32::from_bits(power)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_exact_to_the_last_digits() {
        for i in 0..87_000 {
            let x = -(i as f32) * 1e-3;
            let exact = f64::from(x).exp();
            assert!((f64::from(exp(x)) - exact).abs() <= 2e-7 * exact, "{x}: {} {exact}", exp(x));
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(-1e30) < 1e-37 && exp(f32::NEG_INFINITY) < 1e-37);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn sums_and_likeliest_tokens_do_not_depend_on_chunks() {
        let logits: Vec<f32> = (0..5000u32).map(|i| (i * 7919 % 5003) as f32 * 4e-3).collect();
        let (mut sum, mut top) = (Sum::default(), Vec::new());
        for (i, chunk) in logits.chunks(CHUNK).enumerate() {
            let max = largest(chunk);
            sum.add(chunk, max, &mut [0.0; CHUNK]);
            keep_likeliest(&mut top, 10, i * CHUNK, chunk, max);
        }
        let exact = logits.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
        assert!((sum.log() - exact).abs() < 1e-6, "{} {exact}", sum.log());
        let mut sorted: Vec<(u32, f32)> = (0..).zip(logits).collect();
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        assert_eq!(top, sorted[..10]);
    }

    #[test]
    fn a_nan_stays_one() {
        let mut sum = Sum::default();
        sum.add(&[1.0, f32::NAN], largest(&[1.0, f32::NAN]), &mut [0.0; CHUNK]);
        assert!(sum.log().is_nan());
    }
}
