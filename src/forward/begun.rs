//! Sequences that stop below some block, and go on from there: what every edit of later blocks has
//! in common runs once.

use std::collections::HashMap;
use std::ops::Range;

use super::attention::Kv;
use super::cache::{batches, common_prefix, Cache};
use super::per_layer::Beside;
use super::runner::{Entry, Row, Runner};
use crate::error::Result;

/// The states of sequences below some block.
pub struct Begun {
    sequences: Vec<Vec<u32>>,
    layer: usize,
    /// By batch.
    parts: Vec<Part>,
}

/// A batch that has begun.
struct Part {
    /// Its sequences.
    batch: Range<usize>,
    /// The length of their shared prefix.
    alike: usize,
    /// The states of its rows.
    hidden: Vec<f32>,
    /// Keys and values that blocks to come read, by their block.
    sources: Vec<(usize, Kv)>,
}

impl Begun {
    /// The sequences.
    pub fn sequences(&self) -> &[Vec<u32>] {
        &self.sequences
    }

    /// The block that is to run next.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// Bytes of the states.
    pub fn bytes(&self) -> usize {
        let of = |part: &Part| {
            let sources = part.sources.iter().map(|(_, kv)| kv.k.len() + kv.v.len());
            4 * (part.hidden.len() + sources.sum::<usize>())
        };
        self.parts.iter().map(of).sum()
    }
}

impl<'m> Runner<'m> {
    /// Runs all sequences through the blocks below `layer`; [`Runner::resume`] goes on from there.
    /// An edit of block `layer` or a later one changes nothing below.
    ///
    /// # Errors
    /// As [`Runner::run`].
    pub fn begin(&self, sequences: Vec<Vec<u32>>, layer: usize) -> Result<Begun> {
        self.check(&sequences, 0)?;
        let limit = (self.memory / self.bytes_per_row()).max(1);
        let mut parts = Vec::new();
        for batch in batches(sequences.len(), |s| sequences[s].len(), limit) {
            let alike = common_prefix(&sequences[batch.clone()]);
            let mut cache = Cache::new(self.model, &sequences, &batch, 0, false, alike);
            let rows = cache.rows(&sequences, &batch, self.edit);
            let entry = self.embed(&rows, |r| sequences[r.seq][r.pos])?;
            let (_, hidden) = self.pass(rows, entry, 0..layer, &[], &mut cache, &mut ())?;
            parts.push(Part { batch, alike, hidden, sources: cache.into_sources(layer) });
        }
        Ok(Begun { sequences, layer, parts })
    }

    /// Runs `begun` on through the blocks below `layer`, as [`Runner::begin`] would have from the
    /// start.
    ///
    /// # Errors
    /// As [`Runner::run`].
    pub fn advance(&self, begun: &Begun, layer: usize) -> Result<Begun> {
        let part = |part: &Part| {
            let (_, hidden, cache) = self.go_on(begun, part, begun.layer..layer)?;
            let (batch, alike) = (part.batch.clone(), part.alike);
            Ok(Part { batch, alike, hidden, sources: cache.into_sources(layer) })
        };
        let parts = begun.parts.iter().map(part).collect::<Result<_>>()?;
        Ok(Begun { sequences: begun.sequences.clone(), layer, parts })
    }

    /// Runs the rest of the blocks, as [`Runner::run`] would have from the start. A wanted position
    /// that all sequences share is that of the first one.
    ///
    /// # Errors
    /// As [`Runner::run`].
    pub fn resume(&self, begun: &Begun, wanted: &[(usize, usize)]) -> Result<Vec<f32>> {
        let (d, blocks) = (self.model.spec.hidden, begun.layer..self.model.spec.layers);
        let mut out = vec![0.0f32; wanted.len() * d];
        for part in &begun.parts {
            let (rows, hidden, _) = self.go_on(begun, part, blocks.clone())?;
            let places: HashMap<(usize, usize), usize> =
                rows.iter().enumerate().map(|(at, r)| ((r.seq, r.pos), at)).collect();
            let inside = wanted.iter().enumerate().filter(|(_, w)| part.batch.contains(&w.0));
            for (i, &(seq, pos)) in inside {
                let at = places[&(if pos < part.alike { part.batch.start } else { seq }, pos)];
                out[i * d..(i + 1) * d].copy_from_slice(&hidden[at * d..(at + 1) * d]);
            }
        }
        self.normed(&out)
    }

    /// Runs a batch that has begun through further blocks.
    fn go_on(
        &self,
        begun: &Begun,
        Part { batch, alike, hidden, sources }: &Part,
        blocks: Range<usize>,
    ) -> Result<(Vec<Row<'m>>, Vec<f32>, Cache)> {
        let mut cache = Cache::new(self.model, &begun.sequences, batch, 0, false, *alike);
        cache.set_sources(sources);
        let rows = cache.rows(&begun.sequences, batch, self.edit);
        // Only per-layer embeddings read the tokens again.
        let beside = match self.model.spec.per_layer {
            Some(_) => self.embed(&rows, |r| begun.sequences[r.seq][r.pos])?.beside,
            None => Beside::default(),
        };
        let entry = Entry { hidden: hidden.clone(), beside };
        let (rows, hidden) = self.pass(rows, entry, blocks, &[], &mut cache, &mut ())?;
        Ok((rows, hidden, cache))
    }
}
