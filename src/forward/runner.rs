//! The forward pass.

use std::collections::HashMap;

use rayon::prelude::*;

use super::block::rms_norm;
use super::cache::{batches, common_prefix, Cache};
use super::head::Head;
use super::matmul::Compute;
use super::per_layer::Beside;
use crate::arch::{Block, DeltaNet, Role, Turn, Writer};
use crate::edit::Edit;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::progress::{Progress, Silent};
use crate::weights::Matrix;

/// An extra row at `pos` of a sequence, which runs under an edit from the edit's first layer on.
/// The row shares the keys and values of the earlier tokens. An edit that fires only at `pos` does
/// not change them, so a candidate costs one row.
#[derive(Clone, Copy, Debug)]
pub struct Fork<'e> {
    /// Index of the sequence.
    pub seq: usize,
    /// Position in it.
    pub pos: usize,
    /// The edit.
    pub edit: &'e Edit,
}

/// A row of the packed activations.
#[derive(Clone, Copy, Debug)]
pub struct Row<'e> {
    /// Index of the sequence in the caller's list.
    pub seq: usize,
    /// Position in it.
    pub pos: usize,
    /// The fork's index in the caller's list, where the row is one.
    pub fork: Option<usize>,
    pub(super) edit: Option<&'e Edit>,
    /// First row of the sequence's keys and values.
    pub(super) base: usize,
}

/// A matrix that writes into the residual stream.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Site {
    /// The block.
    pub layer: usize,
    /// The writer.
    pub writer: Writer,
    /// Which of the writer's matrices: the expert; 0 where there is one only.
    pub expert: usize,
}

/// Sees activations as they pass. `x` is `[rows, width]`.
pub trait Tap {
    /// The residual stream after block `layer`.
    fn residual(&mut self, _layer: usize, _rows: &[Row], _x: &[f32], _width: usize) {}
    /// The input of a writer's matrix. Of a routed expert: the rows that chose it, times the
    /// router's weight and the expert's factor; of a shared expert: all rows, times its gate if it
    /// has one. The matrix times `x`, and its bias times the router's weight, are what is added to
    /// the residual stream, or to what [`Tap::norm_behind`] sees.
    fn writer_input(&mut self, _site: Site, _rows: &[Row], _x: &[f32], _width: usize) {}
    /// The input of a norm between writers and the residual stream, `[rows, hidden]`.
    fn norm_behind(&mut self, _layer: usize, _norm: Role, _rows: &[Row], _y: &[f32]) {}
    /// How many tokens of a shared prefix may run once for all sequences of a batch. The tap then
    /// sees these rows of the first sequence only.
    fn shared(&self) -> usize {
        0
    }
}

impl Tap for () {
    fn shared(&self) -> usize {
        usize::MAX
    }
}

/// What greedy generation gave for one sequence.
#[derive(Clone, Debug, Default)]
pub struct Generated {
    /// New tokens, without the one that ended the answer.
    pub tokens: Vec<u32>,
    /// The end token, where the answer ended.
    pub end: Option<u32>,
    /// The normed final state at the deciding position, `[hidden]`: the first new token is read
    /// from it.
    pub first: Vec<f32>,
}

/// Runs a model over sequences.
pub struct Runner<'m> {
    pub(super) model: &'m Model,
    pub(super) compute: &'m Compute,
    pub(super) edit: Option<&'m Edit>,
    progress: &'m dyn Progress,
    /// Bytes that activations and caches may take.
    pub(super) memory: usize,
}

impl<'m> Runner<'m> {
    /// A runner over `model`, under `edit` on every token, that keeps its activations and caches
    /// within `memory` bytes.
    pub fn new(
        model: &'m Model,
        compute: &'m Compute,
        edit: Option<&'m Edit>,
        memory: usize,
        progress: &'m dyn Progress,
    ) -> Runner<'m> {
        Runner { model, compute, edit, progress, memory }
    }

    /// Runs all sequences and returns the final normed hidden states of the `wanted` (sequence,
    /// position) pairs and, after them, of the forks: `[wanted + forks, hidden]`.
    ///
    /// # Errors
    /// A token outside the vocabulary; what the device says; `Interrupted`.
    pub fn run(
        &self,
        sequences: &[Vec<u32>],
        forks: &[Fork<'_>],
        wanted: &[(usize, usize)],
        tap: &mut dyn Tap,
    ) -> Result<Vec<f32>> {
        let d = self.model.spec.hidden;
        self.check(sequences, 0)?;
        let mut out = vec![0.0f32; (wanted.len() + forks.len()) * d];
        let mut extra = vec![0usize; sequences.len()];
        forks.iter().for_each(|f| extra[f.seq] += 1);
        let limit = (self.memory / self.bytes_per_row()).max(1);
        for batch in batches(sequences.len(), |s| sequences[s].len() + extra[s], limit) {
            let inside: Vec<(usize, &Fork)> =
                forks.iter().enumerate().filter(|(_, f)| batch.contains(&f.seq)).collect();
            // A wanted row can't be part of the shared prefix: only the first sequence has those
            // rows.
            let read = wanted.iter().filter(|w| batch.contains(&w.0)).map(|w| w.1);
            let first_read =
                read.chain(inside.iter().map(|(_, f)| f.pos)).min().unwrap_or(usize::MAX);
            let shared = tap.shared().min(first_read);
            let alike =
                if shared == 0 { 0 } else { common_prefix(&sequences[batch.clone()]).min(shared) };
            let mut cache = Cache::new(self.model, sequences, &batch, 0, false, alike);
            let rows = cache.rows(sequences, &batch, self.edit);
            let blocks = 0..self.model.spec.layers;
            let entry = self.embed(&rows, |r| sequences[r.seq][r.pos])?;
            let (rows, hidden) = self.pass(rows, entry, blocks, &inside, &mut cache, tap)?;
            let hidden = self.normed(&hidden)?;
            let places: HashMap<(usize, usize), usize> = rows
                .iter()
                .enumerate()
                .filter(|(_, r)| r.fork.is_none())
                .map(|(at, r)| ((r.seq, r.pos), at))
                .collect();
            let copy = |out: &mut [f32], i: usize, at: usize| {
                out[i * d..(i + 1) * d].copy_from_slice(&hidden[at * d..(at + 1) * d]);
            };
            for (i, w) in wanted.iter().enumerate().filter(|(_, w)| batch.contains(&w.0)) {
                copy(&mut out, i, places[w]);
            }
            for (at, row) in rows.iter().enumerate() {
                if let Some(f) = row.fork {
                    copy(&mut out, wanted.len() + f, at);
                }
            }
        }
        Ok(out)
    }

    /// Continues every sequence greedily by at most `max_new` tokens, until `is_end`.
    ///
    /// # Errors
    /// As [`Runner::run`].
    pub fn generate(
        &self,
        sequences: &[Vec<u32>],
        max_new: usize,
        is_end: &dyn Fn(u32) -> bool,
    ) -> Result<Vec<Generated>> {
        let spec = &self.model.spec;
        self.check(sequences, max_new)?;
        let head = Head::new(self.model, self.compute)?;
        let mut out = vec![Generated::default(); sequences.len()];
        // A row of a generating sequence keeps its keys and values in every layer.
        let delta_nets = (0..spec.layers).filter(|&l| spec.delta_in(l).is_some()).count();
        let keeps = |&l: &usize| spec.delta_in(l).is_none() && spec.blocks[l].shares.is_none();
        let cached: usize =
            (0..spec.layers).filter(keeps).map(|l| spec.blocks[l].kv_width() * 2 * 4).sum();
        let row = self.bytes_per_row() + cached;
        let limit = (self.memory / row).max(1);
        // A sequence's states, in rows.
        let of_net = |d: &DeltaNet| 4 * (d.state() + d.kernel * d.channels());
        let states = (spec.delta.as_ref().map_or(0, of_net) * delta_nets).div_ceil(row);
        let silent = Runner { progress: &Silent, ..*self };
        for batch in batches(sequences.len(), |s| sequences[s].len() + max_new + states, limit) {
            let alike = common_prefix(&sequences[batch.clone()]);
            let mut cache = Cache::new(self.model, sequences, &batch, max_new, true, alike);
            let mut rows = cache.rows(sequences, &batch, self.edit);
            self.progress.start("generate", max_new as u64, "tokens");
            for step in 0..max_new {
                let token = |r: &Row| {
                    let prompt = &sequences[r.seq];
                    prompt
                        .get(r.pos)
                        .copied()
                        .unwrap_or_else(|| out[r.seq].tokens[r.pos - prompt.len()])
                };
                let entry = self.embed(&rows, token)?;
                let (run, hidden) =
                    silent.pass(rows, entry, 0..spec.layers, &[], &mut cache, &mut ())?;
                // The last row of each sequence tells its next token.
                let last: Vec<usize> = (0..run.len())
                    .filter(|&i| run.get(i + 1).is_none_or(|next| next.seq != run[i].seq))
                    .collect();
                let d = spec.hidden;
                let ends: Vec<f32> =
                    last.iter().flat_map(|&i| hidden[i * d..(i + 1) * d].iter().copied()).collect();
                let ends = self.normed(&ends)?;
                let next = head.read(&ends, 1, |_| &[])?;
                rows = Vec::with_capacity(last.len());
                for ((&i, read), end) in last.iter().zip(&next).zip(ends.chunks_exact(d)) {
                    let Some(&(token, _)) = read.top.first() else { continue };
                    let answer = &mut out[run[i].seq];
                    if step == 0 {
                        answer.first = end.to_vec();
                    }
                    if is_end(token) {
                        answer.end = Some(token);
                    } else {
                        answer.tokens.push(token);
                        rows.push(Row { pos: run[i].pos + 1, ..run[i] });
                    }
                }
                self.progress.advance(1);
                if rows.is_empty() || step + 1 == max_new {
                    break;
                }
            }
            self.progress.finish();
        }
        Ok(out)
    }

    /// No text may be empty. With its answer it may not be longer than the model's context.
    pub(super) fn check(&self, sequences: &[Vec<u32>], more: usize) -> Result<()> {
        let context = match self.model.spec.context {
            0 => usize::MAX,
            n => n,
        };
        for s in sequences {
            if s.is_empty() {
                return Err(Error::Model("a prompt has no tokens under this template".into()));
            }
            if s.len() + more > context {
                return Err(Error::Limit(format!(
                    "a prompt of {} tokens with {more} to answer does not fit into the model's \
                     context of {context}; shorten it",
                    s.len()
                )));
            }
        }
        Ok(())
    }

    pub(super) fn bytes_per_row(&self) -> usize {
        let s = &self.model.spec;
        // The router's logits, and where it sends a row.
        let routed = s.experts.as_ref().map_or(0, |e| e.count + 4 * e.used);
        // A product of gate and up is there until it is split.
        let alternating = s.experts.as_ref().filter(|e| e.alternating).map_or(0, |e| 2 * e.ffn);
        let split = if s.fused_gate_up { s.widest_ffn() } else { alternating };
        let queries = if s.gated_attention { 4 } else { 2 };
        let kv = s.blocks.iter().map(Block::kv_width).max().unwrap_or(0);
        let attention = queries * s.widest_heads() + 4 * kv;
        let delta = s.delta.as_ref().map_or(0, |d| d.channels() + 3 * d.values());
        // Kept over the blocks: keys and values that later blocks read, and per-layer inputs.
        let sources = s.sources().into_iter().zip(&s.blocks).filter(|(source, _)| *source);
        let kept = sources.map(|(_, b)| 2 * b.kv_width()).sum::<usize>()
            + s.per_layer.map_or(0, |p| (s.layers + 2) * p.width);
        // The two sums of layers that stand side by side.
        let beside = s.experts.as_ref().filter(|e| e.parallel).map_or(0, |_| 2 * s.hidden);
        4 * (3 * s.hidden + attention.max(delta) + 3 * s.widest_ffn() + split + routed)
            + 4 * (kept + beside)
    }

    /// Final states after the last norm, as the head takes them.
    pub(super) fn normed(&self, hidden: &[f32]) -> Result<Vec<f32>> {
        Ok(rms_norm(hidden, &self.model.output_norm()?, self.model.spec.norm_eps))
    }

    /// Runs `rows` through some blocks. Forks join as rows at the first layer of their edit. Returns
    /// all rows and their states.
    pub(super) fn pass<'e>(
        &self,
        mut rows: Vec<Row<'e>>,
        entry: Entry,
        blocks: std::ops::Range<usize>,
        forks: &[(usize, &Fork<'e>)],
        cache: &mut Cache,
        tap: &mut dyn Tap,
    ) -> Result<(Vec<Row<'e>>, Vec<f32>)> {
        let Entry { mut hidden, mut beside } = entry;
        let spec = &self.model.spec;
        let d = spec.hidden;
        let plain = rows.len();
        let longest = rows.iter().map(|r| r.pos + 1).max().unwrap_or(0);
        let global = spec.rope.table(longest);
        let local = spec.local_rope.as_ref().map(|rope| rope.table(longest));
        let index: HashMap<(usize, usize), usize> = if forks.is_empty() {
            Default::default()
        } else {
            rows.iter().enumerate().map(|(i, r)| ((r.seq, r.pos), i)).collect()
        };
        self.progress.start("forward pass", blocks.len() as u64, "layers");
        for layer in blocks {
            self.compute.check()?;
            for &(at, f) in forks {
                if f.edit.iter().map(|t| t.layer).min() == Some(layer) {
                    let parent = index[&(f.seq, f.pos)];
                    rows.push(Row { fork: Some(at), edit: Some(f.edit), ..rows[parent] });
                    hidden.extend_from_within(parent * d..(parent + 1) * d);
                    beside.fork(parent);
                }
            }
            self.compute.work().block(rows.len(), spec.layers);
            let (writer, mixed) = if let Some(net) = spec.delta_in(layer) {
                let mixed = self.delta_net(net, layer, &rows, plain, &hidden, cache)?;
                (Writer::Delta, mixed)
            } else {
                let turn = match spec.blocks[layer].turn {
                    Turn::Global => Some((&spec.rope, &global)),
                    Turn::Local => spec.local_rope.as_ref().zip(local.as_ref()),
                    Turn::Still => None,
                };
                let mixed = self.attention(layer, &rows, plain, &hidden, turn, cache)?;
                (Writer::Attention, mixed)
            };
            self.write(layer, writer, &rows, &mixed, &mut hidden, tap)?;
            drop(mixed);
            match spec.experts.as_ref().filter(|_| spec.is_sparse(layer)) {
                Some(experts) if experts.parallel => {
                    self.side_by_side(layer, experts, &rows, &mut hidden, tap)?;
                }
                Some(experts) => {
                    let normed = self.read(Role::FfnNorm, layer, &hidden)?;
                    self.mixture(layer, experts, &rows, &normed, &mut hidden, tap)?;
                }
                None => {
                    let normed = self.read(Role::FfnNorm, layer, &hidden)?;
                    let gated = self.feed_forward(layer, &normed, rows.len())?;
                    drop(normed);
                    self.write(layer, Writer::Ffn, &rows, &gated, &mut hidden, tap)?;
                }
            }
            self.end(layer, &rows, &beside, &mut hidden)?;
            if !hidden.par_iter().all(|x| x.is_finite()) {
                return Err(Error::Model(format!(
                    "{}: block {layer} gives numbers that are not finite; the weights are \
                     damaged, or an edit is too strong",
                    self.model.file.path().display()
                )));
            }
            if self.model.file.file_len() > self.memory as u64 {
                self.model.release(layer);
            }
            tap.residual(layer, &rows, &hidden, d);
            self.progress.advance(1);
        }
        self.progress.finish();
        Ok((rows, hidden))
    }

    pub(super) fn embed(&self, rows: &[Row], token: impl Fn(&Row) -> u32) -> Result<Entry> {
        let embedding = self.model.embedding()?;
        let tokens: Vec<u32> = rows.iter().map(token).collect();
        let mut hidden = vec![0.0f32; rows.len() * embedding.cols];
        for (&token, out) in tokens.iter().zip(hidden.chunks_exact_mut(embedding.cols)) {
            self.token(token, &embedding, out)?;
        }
        let scale = self.model.spec.scales.embedding;
        if scale != 1.0 {
            hidden.iter_mut().for_each(|x| *x *= scale);
        }
        let beside = self.beside(&tokens, &hidden)?;
        Ok(Entry { hidden, beside })
    }

    /// Decodes a token's row of a table of embeddings.
    pub(super) fn token(&self, token: u32, table: &Matrix, out: &mut [f32]) -> Result<()> {
        if token as usize >= table.rows {
            return Err(Error::Model(format!(
                "token {token} is outside of the model's vocabulary of {}; the tokenizer belongs \
                 to another model",
                table.rows
            )));
        }
        table.decode_row(token as usize, out);
        Ok(())
    }
}

/// What rows enter the first of their blocks with.
pub(super) struct Entry {
    /// Their states, `[rows, hidden]`.
    pub hidden: Vec<f32>,
    pub beside: Beside,
}
