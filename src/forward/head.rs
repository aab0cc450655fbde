//! From final hidden states to token probabilities, the vocabulary matrix a tile at a time.

use crate::error::Result;
use crate::model::{Matrix, Model};

use super::matmul::Compute;

/// Rows per pass over the vocabulary matrix.
const ROWS: usize = 2048;

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

/// The output matrix of a model. It takes final hidden states as [`super::Runner`] returns them: normed, `[n, hidden]`.
pub struct Head<'m> {
    compute: &'m Compute,
    output: Matrix<'m>,
}

impl<'m> Head<'m> {
    /// The model's output matrix on a device.
    pub fn new(model: &'m Model, compute: &'m Compute) -> Result<Head<'m>> {
        Ok(Head { compute, output: model.output()? })
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
            let mut rows: Vec<Readout> = (0..n)
                .map(|i| Readout { asked: vec![f32::NAN; asked(first + i).len()], ..Readout::default() })
                .collect();
            let mut sums = vec![Sum::default(); n];
            self.compute.tiles(hidden, n, &self.output, |tokens, logits| {
                for (i, logits) in logits.chunks(tokens.len()).enumerate() {
                    sums[i].add(logits);
                    for (slot, &t) in rows[i].asked.iter_mut().zip(asked(first + i)) {
                        if tokens.contains(&(t as usize)) {
                            *slot = logits[t as usize - tokens.start];
                        }
                    }
                    let top = &mut rows[i].top;
                    for (j, &x) in logits.iter().enumerate() {
                        if top.len() < k || top.last().is_some_and(|&(_, worst)| x > worst) {
                            let at = top.partition_point(|&(_, y)| y >= x);
                            top.insert(at, ((tokens.start + j) as u32, x));
                            top.truncate(k);
                        }
                    }
                }
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

    /// KL(p ‖ q) in nats for each pair of rows, p's and q's hidden states under the same output matrix.
    pub fn kl(&self, p: &[f32], q: &[f32]) -> Result<Vec<f64>> {
        let d = self.output.cols;
        let mut all = Vec::with_capacity(p.len() / d);
        for (p, q) in p.chunks(ROWS * d).zip(q.chunks(ROWS * d)) {
            let n = p.len() / d;
            let both = [p, q].concat();
            let mut sums = vec![Sum::default(); 2 * n];
            // Σ e^{lp - max} (lp - lq), with the same running maximum as p's sum.
            let mut cross = vec![0.0f64; n];
            self.compute.tiles(&both, 2 * n, &self.output, |tokens, logits| {
                let row = |i: usize| &logits[i * tokens.len()..(i + 1) * tokens.len()];
                for i in 0..n {
                    cross[i] *= sums[i].add(row(i));
                    sums[n + i].add(row(n + i));
                    let max = sums[i].max;
                    cross[i] += row(i)
                        .iter()
                        .zip(row(n + i))
                        .map(|(&a, &b)| f64::from(a - max).exp() * f64::from(a - b))
                        .sum::<f64>();
                }
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
    /// Takes more logits in; returns the factor by which earlier terms shrank.
    fn add(&mut self, logits: &[f32]) -> f64 {
        let max = logits.iter().copied().fold(self.max, f32::max);
        let factor = if self.max == f32::NEG_INFINITY { 0.0 } else { f64::from(self.max - max).exp() };
        self.sum = self.sum * factor + logits.iter().map(|&x| f64::from((x - max).exp())).sum::<f64>();
        self.max = max;
        factor
    }

    fn log(&self) -> f64 {
        f64::from(self.max) + self.sum.ln()
    }
}
