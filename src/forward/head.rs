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

/// The distribution of a row's next token, as far as it was asked for.
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
        Ok(self.read_beside(hidden, k, asked, &[])?.0)
    }

    /// The same, and KL(p ‖ q) in nats for each pair in `beside`: (row, p's final hidden state),
    /// rows in ascending order; q is the row's distribution.
    pub fn read_beside<'a>(
        &self,
        hidden: &[f32],
        k: usize,
        asked: impl Fn(usize) -> &'a [u32],
        beside: &[(usize, &[f32])],
    ) -> Result<(Vec<Readout>, Vec<f64>)> {
        let d = self.output.cols;
        let mut all = Vec::with_capacity(hidden.len() / d);
        let mut kl = Vec::with_capacity(beside.len());
        let mut beside = beside;
        for (block, hidden) in hidden.chunks(ROWS * d).enumerate() {
            let n = hidden.len() / d;
            let first = block * ROWS;
            let inside = beside.partition_point(|&(row, _)| row < first + n);
            let (pairs, later) = beside.split_at(inside);
            beside = later;
            let asked: Vec<&[u32]> = (0..n).map(|i| asked(first + i)).collect();
            let mut rows: Vec<Readout> = asked
                .iter()
                .map(|asked| Readout { asked: vec![f32::NAN; asked.len()], ..Readout::default() })
                .collect();
            let mut sums = vec![Sum::default(); n];
            let mut divergences = vec![Divergence::default(); pairs.len()];
            // The rows, and after them those beside.
            let mut states = std::borrow::Cow::Borrowed(hidden);
            if !pairs.is_empty() {
                pairs.iter().for_each(|(_, p)| states.to_mut().extend_from_slice(p));
            }
            self.tiles(&states, n + pairs.len(), |tokens, logits| {
                let (own, others) = logits.split_at(n * tokens.len());
                let of_rows = own.par_chunks(tokens.len()).zip(&asked);
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
                let of_pairs = others.par_chunks(tokens.len()).zip(pairs);
                divergences.par_iter_mut().zip(of_pairs).for_each(|(sum, (p, &(row, _)))| {
                    let at = (row - first) * tokens.len();
                    let q = &own[at..at + tokens.len()];
                    p.chunks(CHUNK).zip(q.chunks(CHUNK)).for_each(|(p, q)| sum.add(p, q));
                });
                Ok(())
            })?;
            for (row, sum) in rows.iter_mut().zip(&sums) {
                row.log_sum = sum.log();
                let ls = row.log_sum as f32;
                row.top.iter_mut().for_each(|(_, x)| *x -= ls);
                row.asked.iter_mut().for_each(|x| *x -= ls);
            }
            kl.extend(
                divergences.iter().zip(pairs).map(|(sum, pair)| sum.kl(&sums[pair.0 - first])),
            );
            all.append(&mut rows);
        }
        Ok((all, kl))
    }

    /// Hands the logits to `f` a tile at a time: the tokens, and `[n, tokens]`.
    fn tiles(
        &self,
        hidden: &[f32],
        n: usize,
        mut f: impl FnMut(Range<usize>, &[f32]) -> Result<()>,
    ) -> Result<()> {
        self.compute.work().read(n);
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
}

/// A running KL(p ‖ q).
#[derive(Clone, Copy, Default)]
struct Divergence {
    p: Sum,
    /// Σ e^{lp - max} (lp - lq), with the same running maximum as p's sum.
    cross: f64,
}

impl Divergence {
    /// Adds up to CHUNK logits of either.
    fn add(&mut self, p: &[f32], q: &[f32]) {
        let mut exps = [0.0; CHUNK];
        self.cross *= self.p.add(p, largest(p), &mut exps);
        let terms = exps.iter().zip(p).zip(q);
        self.cross += terms.map(|((&e, &a), &b)| f64::from(e) * f64::from(a - b)).sum::<f64>();
    }

    /// The divergence, in nats; `q`: q's sum over all logits.
    fn kl(&self, q: &Sum) -> f64 {
        let kl = self.cross / self.p.sum - self.p.log() + q.log();
        // Rounding can leave a tiny negative number where p = q; a NaN must stay one.
        if kl < 0.0 {
            0.0
        } else {
            kl
        }
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
    /// Adds up to CHUNK logits, of which `max` is the largest. Leaves exp(logit - largest so far)
    /// in `exps`. Returns the factor by which earlier terms shrank.
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

/// e^x for x <= 0, within 2e-7. No branches, so the compiler uses vectors. x = z ln 2 + r, and e^r
/// is a polynomial (Cephes).
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
