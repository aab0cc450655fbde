//! Batches of sequences, and the keys and values of one.

use std::collections::HashMap;
use std::ops::Range;

use super::attention::Kv;
use super::delta::State;
use super::runner::Row;
use crate::arch::Block;
use crate::edit::Edit;
use crate::error::{Error, Result};
use crate::model::Model;

/// Consecutive ranges of sequences whose sizes add up to at most `limit` (a longer one runs alone).
pub(super) fn batches(n: usize, size: impl Fn(usize) -> usize, limit: usize) -> Vec<Range<usize>> {
    let mut out: Vec<Range<usize>> = Vec::new();
    let mut filled = 0;
    for s in 0..n {
        match out.last_mut() {
            Some(last) if filled + size(s) <= limit => last.end = s + 1,
            _ => {
                out.push(s..s + 1);
                filled = 0;
            }
        }
        filled += size(s);
    }
    out
}

/// Length of the longest prefix that all sequences share. No sequence's last token counts.
pub(super) fn common_prefix(sequences: &[Vec<u32>]) -> usize {
    let Some((first, others)) = sequences.split_first() else { return 0 };
    let alike = |s: &Vec<u32>| s.iter().zip(first).take_while(|(a, b)| a == b).count();
    let shortest = sequences.iter().map(Vec::len).min().unwrap_or(0);
    others.iter().map(alike).min().unwrap_or(0).min(shortest.saturating_sub(1))
}

/// Keys and values of a batch: of every layer while generating, else of the current one and of
/// those that later blocks read. While generating also the states of delta nets.
pub(super) struct Cache {
    layers: Vec<Kv>,
    /// By block: which of `layers` holds its keys and values.
    places: Vec<usize>,
    /// By block: elements of a row.
    widths: Vec<usize>,
    /// By block: whether later blocks read its keys and values.
    sources: Vec<bool>,
    /// By block: keys and values of forks, of the current block and of those that later blocks
    /// read.
    forks: HashMap<usize, Kv>,
    /// By layer and sequence; `None` where no later pass needs them.
    states: Option<HashMap<(usize, usize), State>>,
    base: HashMap<usize, usize>,
    /// Length of the shared prefix, which runs once, as rows of the first sequence.
    alike: usize,
}

impl Cache {
    pub fn new(
        model: &Model,
        sequences: &[Vec<u32>],
        batch: &Range<usize>,
        more: usize,
        every_layer: bool,
        alike: usize,
    ) -> Cache {
        let mut at = 0;
        let mut base = HashMap::new();
        for s in batch.clone() {
            base.insert(s, at);
            at += sequences[s].len() + more;
        }
        let (spec, sources) = (&model.spec, model.spec.sources());
        let widths: Vec<usize> = spec.blocks.iter().map(Block::kv_width).collect();
        // The first place is that of the current block.
        let (mut places, mut sizes) = (Vec::new(), vec![0]);
        for (layer, &width) in widths.iter().enumerate() {
            let attends = spec.blocks[layer].shares.is_none() && spec.delta_in(layer).is_none();
            let width = if attends { width } else { 0 };
            if every_layer || sources[layer] {
                places.push(sizes.len());
                sizes.push(width);
            } else {
                places.push(0);
                sizes[0] = width.max(sizes[0]);
            }
        }
        let kv = |width: usize| Kv { k: vec![0.0; at * width], v: vec![0.0; at * width] };
        let layers = sizes.into_iter().map(kv).collect();
        let (forks, states) = (HashMap::new(), every_layer.then(HashMap::new));
        Cache { layers, places, widths, sources, forks, states, base, alike }
    }

    /// The rows of a batch's prompts under `edit`; the shared prefix only once.
    pub fn rows<'e>(
        &self,
        sequences: &[Vec<u32>],
        batch: &Range<usize>,
        edit: Option<&'e Edit>,
    ) -> Vec<Row<'e>> {
        let of = |seq: usize| {
            let begin = if seq == batch.start { 0 } else { self.alike };
            let base = self.base[&seq];
            (begin..sequences[seq].len()).map(move |pos| Row { seq, pos, fork: None, edit, base })
        };
        batch.clone().flat_map(of).collect()
    }

    /// Keeps the keys and values of rows, `[rows, width]`; those of the shared prefix for every
    /// sequence.
    pub fn keep(&mut self, layer: usize, rows: &[Row], k: &[f32], v: &[f32]) {
        let (width, alike) = (self.widths[layer], self.alike);
        // Only the sequence that runs the shared prefix has a row at position 0.
        let begins = rows.first().filter(|r| r.pos == 0).map(|r| r.base);
        let bases: Vec<usize> = self.base.values().copied().collect();
        let kv = &mut self.layers[self.places[layer]];
        for (i, row) in rows.iter().enumerate() {
            let to = (row.base + row.pos) * width;
            kv.k[to..to + width].copy_from_slice(&k[i * width..(i + 1) * width]);
            kv.v[to..to + width].copy_from_slice(&v[i * width..(i + 1) * width]);
        }
        let Some(from) = begins else { return };
        for to in bases.into_iter().filter(|&b| b != from) {
            let (from, n) = (from * width, alike * width);
            kv.k.copy_within(from..from + n, to * width);
            kv.v.copy_within(from..from + n, to * width);
        }
    }

    /// Length of the shared prefix, where these rows run it.
    pub fn shared_prefix(&self, rows: &[Row]) -> usize {
        rows.first().filter(|r| r.pos == 0 && self.base.len() > 1).map_or(0, |_| self.alike)
    }

    /// Whether a later pass needs the states of delta nets.
    pub fn keeps_states(&self) -> bool {
        self.states.is_some()
    }

    /// Keeps a sequence's state for the next pass.
    pub fn keep_state(&mut self, layer: usize, seq: usize, state: State) {
        if let Some(states) = &mut self.states {
            states.insert((layer, seq), state);
        }
    }

    /// The state that a sequence was kept with.
    ///
    /// # Errors
    /// There is none, which is an error of this program.
    pub fn take_state(&mut self, layer: usize, seq: usize) -> Result<State> {
        let kept = self.states.as_mut().and_then(|s| s.remove(&(layer, seq)));
        kept.ok_or_else(|| {
            Error::Model(format!("block {layer} lost the state of sequence {seq}; report this"))
        })
    }

    /// Keeps the keys and values of forks, in the forks' order.
    pub fn keep_forks(&mut self, layer: usize, kv: Kv) {
        let sources = &self.sources;
        self.forks.retain(|&other, _| sources[other]);
        self.forks.insert(layer, kv);
    }

    /// The keys and values of a block.
    pub fn layer(&self, layer: usize) -> &Kv {
        &self.layers[self.places[layer]]
    }

    /// The keys and values of the forks that a block ran.
    pub fn forks(&self, layer: usize) -> &Kv {
        const NONE: &Kv = &Kv { k: Vec::new(), v: Vec::new() };
        self.forks.get(&layer).unwrap_or(NONE)
    }

    /// The keys and values of blocks below `layer` that later blocks read.
    pub fn into_sources(mut self, layer: usize) -> Vec<(usize, Kv)> {
        let some = (0..layer).filter(|&source| self.sources[source]);
        some.map(|source| (source, std::mem::take(&mut self.layers[self.places[source]]))).collect()
    }

    /// Sets what [`Cache::into_sources`] gave.
    pub fn set_sources(&mut self, kept: &[(usize, Kv)]) {
        kept.iter().for_each(|(source, kv)| self.layers[self.places[*source]] = kv.clone());
    }
}
