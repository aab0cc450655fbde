//! Products with stored matrices on the CPU: y = x Wᵀ.
//!
//! Threads take tiles of weight rows. A tile is unpacked once, [`BLOCK`] inputs at a time, into
//! panels that stay in the thread's second-level cache, and multiplied by all columns (rows of x),
//! which were packed into panels before.
//!
//! Block types of GGUF whose scales are whole are multiplied as they are stored: x is rounded to 8
//! bits, as llama.cpp rounds it, and the products are whole numbers ([`way`]). All other matrices,
//! and all of them under [`Arithmetic::Exact`], are decoded to 32-bit floats.
//!
//! **What an element of y is** depends on its row of W and its row of x alone: a sum over blocks of
//! inputs, in order; of floats, a block is one chain of multiply-adds. The number of threads, the
//! other rows of the batch, and which rows of W are asked for change no bit of it. Processors with
//! fused multiply-add (AVX2, AVX-512, NEON) give the same bits; others round twice. Of whole
//! numbers all processors that multiply them give the same bits.

mod kernel;
#[cfg(test)]
mod tests;
mod way;

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use crate::error::Result;
use crate::progress::Cancel;
use crate::weights::Matrix;
use kernel::{Kernel, GROUP};
use way::Way;

/// Inputs of a chain of multiply-adds; a multiple of every encoding's block. Another value rounds
/// differently.
const BLOCK: usize = 256;
/// Most weight rows of a tile of floats: with `BLOCK` inputs 128 KiB, which leaves room for y in a
/// small second-level cache.
const ROWS: usize = 128;
/// Columns up to which a tile is one panel: it is multiplied while it is in the first-level cache.
const FEW: usize = 64;
/// Most columns of floats at once: a tile's part of y, 192 KiB, is beside it in the cache, and to
/// decode it again costs little.
const COLUMNS: usize = 384;
/// Fewest columns for which a tile is decoded once more, so that no thread is idle.
const PIECE: usize = 48;

thread_local! {
    /// A thread's tile, and before it the unpacked rows that are about to be interleaved.
    static SCRATCH: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

/// What numbers are multiplied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Arithmetic {
    /// 8-bit integers where the stored type allows it, else floats.
    Rounded,
    /// 32-bit floats.
    Exact,
}

/// Sets `y`, `[n, of.len()]`, to the product of `n` rows of x, `[n, w.cols]`, with rows `of` of
/// `w`.
///
/// # Errors
/// `Interrupted`.
pub fn product(
    arithmetic: Arithmetic,
    x: &[f32],
    n: usize,
    w: &Matrix,
    of: Range<usize>,
    y: &mut [f32],
    cancel: &Cancel,
) -> Result<()> {
    product_by(Way::new(Kernel::best(), arithmetic, w), x, n, w, of, y, cancel)
}

fn product_by(
    way: Way,
    x: &[f32],
    n: usize,
    w: &Matrix,
    of: Range<usize>,
    y: &mut [f32],
    cancel: &Cancel,
) -> Result<()> {
    if y.is_empty() || w.cols == 0 {
        y.fill(0.0);
        return Ok(());
    }
    let most = n.div_ceil(n.div_ceil(way.most().columns));
    let words = way.column_words(w.cols);
    let mut packed = vec![0; most * words];
    for (x, y) in x[..n * w.cols].chunks(most * w.cols).zip(y.chunks_mut(most * of.len())) {
        let columns = Columns::pack(way, x, w.cols, &mut packed[..x.len() / w.cols * words]);
        tasks(&way, y, &columns, &of)
            .into_par_iter()
            .try_for_each(|task| task.run(way, w, &columns, cancel))?;
    }
    Ok(())
}

/// Rows of x in panels of nearly equal width, `[words, width]` each.
struct Columns<'a> {
    way: Way,
    /// Words of a row.
    words: usize,
    /// The first column of each panel, and how many there are.
    starts: Vec<usize>,
    packed: &'a [u32],
}

impl Columns<'_> {
    fn pack<'a>(way: Way, x: &[f32], k: usize, packed: &'a mut [u32]) -> Columns<'a> {
        let (n, words) = (x.len() / k, way.column_words(k));
        let panels = n.div_ceil(way.shape.columns);
        let starts: Vec<usize> = (0..=panels).map(|p| p * n / panels).collect();
        let mut rest = &mut *packed;
        let mut parts = Vec::with_capacity(panels);
        for range in starts.windows(2) {
            let width = range[1] - range[0];
            let (part, others) = std::mem::take(&mut rest).split_at_mut(width * words);
            parts.push((&x[range[0] * k..range[1] * k], part));
            rest = others;
        }
        parts.into_par_iter().for_each(|(from, to)| transpose(&way.columns(from, k), words, to));
        Columns { way, words, starts, packed }
    }

    /// The inputs `from` of a panel.
    fn panel(&self, p: usize, from: &Range<usize>) -> &[u32] {
        let (start, width) = (self.starts[p], self.starts[p + 1] - self.starts[p]);
        let words = self.way.column_words(from.start)..self.way.column_words(from.end);
        &self.packed[start * self.words + words.start * width..][..words.len() * width]
    }
}

/// `[n, k]` → `[k, n]` for a few rows.
fn transpose(from: &[u32], k: usize, to: &mut [u32]) {
    /// A line of the cache: it is read while it is there.
    const STEP: usize = 16;
    let n = to.len() / k;
    for at in (0..k).step_by(STEP) {
        let to = &mut to[at * n..(at + STEP).min(k) * n];
        for (j, row) in from.chunks_exact(k).enumerate() {
            for (to, &from) in to.chunks_exact_mut(n).zip(&row[at..]) {
                to[j] = from;
            }
        }
    }
}

/// What one thread does at a time: some rows of W by some columns.
struct Task<'y> {
    /// Rows of W.
    rows: Range<usize>,
    /// Panels of columns.
    panels: Range<usize>,
    /// `rows` of each column of y.
    y: Vec<&'y mut [f32]>,
}

/// Splits y among tasks.
fn tasks<'y>(way: &Way, y: &'y mut [f32], columns: &Columns, of: &Range<usize>) -> Vec<Task<'y>> {
    let threads = rayon::current_num_threads();
    let (rows, panels) = (of.len(), columns.starts.len() - 1);
    let least = way.shape.rows;
    let step = rows.div_ceil(4 * threads).next_multiple_of(least).clamp(least, way.most().rows);
    let tiles = rows.div_ceil(step);
    let pieces = (2 * threads).div_ceil(tiles).min(y.len() / rows / PIECE).max(1);
    let mut tasks = Vec::with_capacity(tiles * pieces);
    let mut columns_of_y = y.chunks_exact_mut(rows);
    for piece in 0..pieces {
        let panels = piece * panels / pieces..(piece + 1) * panels / pieces;
        let n = columns.starts[panels.end] - columns.starts[panels.start];
        let first = tasks.len();
        tasks.extend((of.start..of.end).step_by(step).map(|start| Task {
            rows: start..(start + step).min(of.end),
            panels: panels.clone(),
            y: Vec::with_capacity(n),
        }));
        for y in columns_of_y.by_ref().take(n) {
            for (task, part) in tasks[first..].iter_mut().zip(y.chunks_mut(step)) {
                task.y.push(part);
            }
        }
    }
    tasks
}

impl Task<'_> {
    fn run(mut self, way: Way, w: &Matrix, columns: &Columns, cancel: &Cancel) -> Result<()> {
        cancel.check()?;
        let tile = if self.y.len() <= FEW { way.shape.rows } else { way.most().rows };
        SCRATCH.with_borrow_mut(|scratch| {
            for at in (0..self.rows.len()).step_by(tile) {
                let first = self.rows.start + at;
                let rows = first..(first + tile).min(self.rows.end);
                for start in (0..w.cols).step_by(BLOCK) {
                    let inputs = start..(start + BLOCK).min(w.cols);
                    let panels = pack_tile(way, w, &rows, &inputs, scratch);
                    self.multiply(way, panels, at, columns, &inputs);
                }
            }
        });
        Ok(())
    }

    /// `tile`: panels of rows, the first of them the task's row `at`.
    fn multiply(
        &mut self,
        way: Way,
        tile: &[u32],
        at: usize,
        columns: &Columns,
        inputs: &Range<usize>,
    ) {
        let first = columns.starts[self.panels.start];
        let (rows, words) = (way.shape.rows, way.row_words(inputs.len()));
        for p in self.panels.clone() {
            let x = columns.panel(p, inputs);
            let y = &mut self.y[columns.starts[p] - first..columns.starts[p + 1] - first];
            for (i, panel) in tile.chunks_exact(rows * words).enumerate() {
                (way.shape.multiply)(panel, x, y, at + i * rows, inputs.start > 0);
            }
        }
    }
}

/// Unpacks some inputs of some rows into panels, `[words, rows of the kernel]` each, the last one
/// filled up with zeros.
fn pack_tile<'s>(
    way: Way,
    w: &Matrix,
    rows: &Range<usize>,
    inputs: &Range<usize>,
    scratch: &'s mut Vec<u32>,
) -> &'s [u32] {
    /// Words of a line of the cache: panels begin at one.
    const LINE: usize = 16;
    let (height, words) = (way.shape.rows, way.row_words(inputs.len()));
    scratch.resize((GROUP + ROWS.next_multiple_of(height)) * BLOCK + LINE, 0);
    let skip = scratch.as_ptr().align_offset(4 * LINE).min(LINE);
    let (plain, tile) = scratch[skip..].split_at_mut(GROUP * BLOCK);
    let plain = &mut plain[..GROUP * words];
    let tile = &mut tile[..rows.len().next_multiple_of(height) * words];
    for (p, panel) in tile.chunks_exact_mut(height * words).enumerate() {
        for at in (0..height).step_by(GROUP) {
            let first = rows.start + p * height + at;
            if let (true, Some(pack)) = (first + GROUP <= rows.end, way.pack_bf16) {
                let stored = std::array::from_fn(|r| w.stored(first + r, inputs.clone()));
                pack(stored, panel, at);
                continue;
            }
            for (row, plain) in (first..).zip(plain.chunks_exact_mut(words)) {
                match row < rows.end {
                    true => way.row(w, row, inputs.clone(), plain),
                    false => plain.fill(0),
                }
            }
            (way.shape.pack)(plain, panel, at);
        }
    }
    tile
}
