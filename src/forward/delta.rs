//! Gated delta nets: linear attention with a state for each sequence (Yang et al. 2024, arXiv
//! 2412.06464, §3; llama.cpp `src/models/qwen35.cpp`).

use std::collections::HashMap;
use std::ops::Range;

use rayon::prelude::*;

use super::block::rms_norm;
use super::cache::Cache;
use super::runner::{Row, Runner};
use crate::arch::{DeltaNet, Role};
use crate::error::Result;
use crate::num::dot;

/// What a delta net remembers of a sequence.
#[derive(Clone)]
pub(super) struct State {
    /// The last inputs of the convolution, the oldest first: `[kernel - 1, channels]`.
    recent: Vec<f32>,
    /// `[value heads, key_dim, value_dim]`.
    heads: Vec<f32>,
}

impl State {
    /// Before the first token.
    fn empty(net: &DeltaNet) -> State {
        let recent = vec![0.0; (net.kernel - 1) * net.channels()];
        State { recent, heads: vec![0.0; net.state()] }
    }
}

/// The state that a sequence's rows start from.
enum Start {
    /// The sequence begins.
    Empty,
    /// The shared prefix has run.
    Prefix,
    /// An earlier pass ran the tokens before.
    Earlier(State),
}

/// One block's delta net over the rows of a pass.
struct Pass<'a> {
    net: &'a DeltaNet,
    /// The convolution's weights, `[kernel, channels]`.
    weights: Vec<f32>,
    /// Its inputs: queries, keys and values side by side, `[rows, channels]`.
    mixed: Vec<f32>,
    /// How much of the state a row keeps, in (0, 1): `[rows, value heads]`.
    keeps: Vec<f32>,
    /// How far a row corrects the state, in (0, 1): `[rows, value heads]`.
    corrects: Vec<f32>,
}

impl Runner<'_> {
    /// The input of a delta net's output projection, `[rows, values]`. The first `plain` rows are
    /// tokens, the others forks.
    pub(super) fn delta_net(
        &self,
        net: &DeltaNet,
        layer: usize,
        rows: &[Row],
        plain: usize,
        hidden: &[f32],
        cache: &mut Cache,
    ) -> Result<Vec<f32>> {
        let n = rows.len();
        let normed = self.read(Role::AttnNorm, layer, hidden)?;
        let pass = self.delta_pass(net, layer, &normed, n)?;
        let gate = self.project(Role::DeltaGate, layer, &normed, n)?;
        drop(normed);
        // Forks by the place of their parents.
        let mut forks: HashMap<(usize, usize), Vec<usize>> = HashMap::new();
        for (i, row) in rows.iter().enumerate().skip(plain) {
            forks.entry((row.seq, row.pos)).or_default().push(i);
        }
        let of_row = |i: usize| forks.get(&(rows[i].seq, rows[i].pos)).map_or(&[][..], |f| f);
        let mut out = vec![0.0f32; n * net.values()];
        let mut put = |found: Vec<(usize, Vec<f32>)>| {
            for (i, values) in found {
                out[i * net.values()..(i + 1) * net.values()].copy_from_slice(&values);
            }
        };
        let mut sequences = by_sequence(&rows[..plain]);
        let shared = cache.shared_prefix(&rows[..plain]);
        let mut prefix = State::empty(net);
        if let Some(first) = sequences.first_mut().filter(|_| shared > 0) {
            put(pass.run(first.start..first.start + shared, &mut prefix, of_row));
            first.start += shared;
        }
        let mut starts: Vec<(Range<usize>, Start)> = Vec::new();
        for range in sequences.into_iter().filter(|s| !s.is_empty()) {
            let Row { seq, pos, .. } = rows[range.start];
            let start = match pos {
                0 => Start::Empty,
                p if p == shared => Start::Prefix,
                _ => Start::Earlier(cache.take_state(layer, seq)?),
            };
            starts.push((range, start));
        }
        let keeps = cache.keeps_states();
        let run = |(range, start): (Range<usize>, Start)| {
            let mut state = match start {
                Start::Empty => State::empty(net),
                Start::Prefix => prefix.clone(),
                Start::Earlier(state) => state,
            };
            let seq = rows[range.start].seq;
            let found = pass.run(range, &mut state, of_row);
            (found, (seq, keeps.then_some(state)))
        };
        for (found, (seq, state)) in starts.into_par_iter().map(run).collect::<Vec<_>>() {
            put(found);
            if let Some(state) = state {
                cache.keep_state(layer, seq, state);
            }
        }
        let norm = self.model.vector(Role::DeltaNorm, layer)?;
        let mut out = rms_norm(&out, &norm, self.model.spec.norm_eps);
        out.par_iter_mut().zip(&gate).for_each(|(x, &g)| *x *= silu(g));
        Ok(out)
    }

    fn delta_pass<'a>(
        &self,
        net: &'a DeltaNet,
        layer: usize,
        normed: &[f32],
        n: usize,
    ) -> Result<Pass<'a>> {
        let stored = self.model.vector(Role::DeltaConv, layer)?;
        let channels = net.channels();
        let weights = (0..net.kernel)
            .flat_map(|j| (0..channels).map(move |c| (c, j)))
            .map(|(c, j)| stored[c * net.kernel + j])
            .collect();
        let rates: Vec<f32> = self
            .model
            .vector(Role::DeltaRate, layer)?
            .into_iter()
            .map(|rate| if net.log_rate { -rate.exp() } else { rate })
            .collect();
        let steps = self.model.vector(Role::DeltaStep, layer)?;
        let mut keeps = self.project(Role::DeltaAlpha, layer, normed, n)?;
        keeps.chunks_exact_mut(net.value_heads).for_each(|row| {
            row.iter_mut().zip(&steps).zip(&rates).for_each(|((x, step), rate)| {
                *x = (rate * softplus(*x + step)).exp();
            });
        });
        let mut corrects = self.project(Role::DeltaBeta, layer, normed, n)?;
        corrects.iter_mut().for_each(|x| *x = 1.0 / (1.0 + (-*x).exp()));
        let mixed = self.project(Role::DeltaQkv, layer, normed, n)?;
        Ok(Pass { net, weights, mixed, keeps, corrects })
    }
}

impl Pass<'_> {
    /// Runs consecutive rows of a sequence, and the forks of each before the row itself. Returns
    /// rows with their outputs.
    fn run<'f>(
        &self,
        rows: Range<usize>,
        state: &mut State,
        forks: impl Fn(usize) -> &'f [usize],
    ) -> Vec<(usize, Vec<f32>)> {
        let mut out = Vec::with_capacity(rows.len());
        for i in rows {
            for &fork in forks(i) {
                out.push((fork, self.token(fork, state).0));
            }
            let (values, updates) = self.token(i, state);
            state.update(self, i, &updates);
            out.push((i, values));
        }
        out
    }

    /// What a row reads from the state before it, corrected by the row itself: `[values]`; and what
    /// the state learns: the keys, and for each value head the error.
    fn token(&self, i: usize, state: &State) -> (Vec<f32>, (Vec<f32>, Vec<f32>)) {
        let net = self.net;
        let mut x = self.convolved(i, &state.recent);
        let (queries, rest) = x.split_at_mut(net.keys());
        let (keys, values) = rest.split_at_mut(net.keys());
        let scale = 1.0 / (net.key_dim as f32).sqrt();
        queries.chunks_exact_mut(net.key_dim).for_each(|q| normalise(q, scale));
        keys.chunks_exact_mut(net.key_dim).for_each(|k| normalise(k, 1.0));
        let (mut out, mut errors) = (vec![0.0f32; net.values()], vec![0.0f32; net.values()]);
        let mut known = vec![0.0f32; net.value_dim];
        for h in 0..net.value_heads {
            let at = net.key_head(h) * net.key_dim;
            let (q, k) = (&queries[at..at + net.key_dim], &keys[at..at + net.key_dim]);
            let of_head = h * net.value_dim..(h + 1) * net.value_dim;
            let (read, error) = (&mut out[of_head.clone()], &mut errors[of_head.clone()]);
            known.fill(0.0);
            let size = net.key_dim * net.value_dim;
            let lines = state.heads[h * size..(h + 1) * size].chunks_exact(net.value_dim);
            for ((line, &q), &k) in lines.zip(q).zip(k) {
                for ((s, read), known) in line.iter().zip(&mut *read).zip(&mut known) {
                    *read += q * s;
                    *known += k * s;
                }
            }
            let keeps = self.keeps[i * net.value_heads + h];
            let corrects = self.corrects[i * net.value_heads + h];
            let alike = dot(q, k);
            for (j, (read, error)) in read.iter_mut().zip(error).enumerate() {
                *error = corrects * (values[of_head.start + j] - keeps * known[j]);
                *read = keeps * *read + alike * *error;
            }
        }
        (out, (keys.to_vec(), errors))
    }

    /// Queries, keys and values of a row after the convolution and its activation, `[channels]`.
    fn convolved(&self, i: usize, recent: &[f32]) -> Vec<f32> {
        let channels = self.net.channels();
        let mut out = vec![0.0f32; channels];
        let own = &self.mixed[i * channels..(i + 1) * channels];
        let inputs = recent.chunks_exact(channels).chain([own]);
        for (x, w) in inputs.zip(self.weights.chunks_exact(channels)) {
            out.iter_mut().zip(x).zip(w).for_each(|((out, x), w)| *out += x * w);
        }
        out.iter_mut().for_each(|x| *x = silu(*x));
        out
    }
}

impl State {
    /// Takes a row in.
    fn update(&mut self, pass: &Pass, i: usize, (keys, errors): &(Vec<f32>, Vec<f32>)) {
        let net = pass.net;
        let size = net.key_dim * net.value_dim;
        for (h, head) in self.heads.chunks_exact_mut(size).enumerate() {
            let keeps = pass.keeps[i * net.value_heads + h];
            let keys = &keys[net.key_head(h) * net.key_dim..][..net.key_dim];
            let errors = &errors[h * net.value_dim..(h + 1) * net.value_dim];
            for (line, k) in head.chunks_exact_mut(net.value_dim).zip(keys) {
                line.iter_mut().zip(errors).for_each(|(s, e)| *s = keeps * *s + k * e);
            }
        }
        let channels = net.channels();
        if !self.recent.is_empty() {
            self.recent.drain(..channels);
            self.recent.extend_from_slice(&pass.mixed[i * channels..(i + 1) * channels]);
        }
    }
}

/// Ranges of rows that belong to one sequence.
fn by_sequence(rows: &[Row]) -> Vec<Range<usize>> {
    let mut out = Vec::new();
    let mut start = 0;
    for of_one in rows.chunk_by(|a, b| a.seq == b.seq) {
        out.push(start..start + of_one.len());
        start += of_one.len();
    }
    out
}

/// x ← scale · x / ‖x‖
fn normalise(x: &mut [f32], scale: f32) {
    let scale = scale / (dot(x, x) + 1e-6).sqrt();
    x.iter_mut().for_each(|x| *x *= scale);
}

fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

/// ln(1 + eˣ)
fn softplus(x: f32) -> f32 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}
