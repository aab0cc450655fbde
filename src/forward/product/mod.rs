//! Products with stored matrices on the CPU: y = x Wᵀ in 32-bit floats.
//!
//! Threads take tiles of weight rows. A tile is decoded once, a block of [`BLOCK`] inputs at a
//! time, into panels that stay in the thread's second-level cache, and multiplied by all columns
//! (rows of x), which were packed into panels before.
//!
//! **What an element of y is** depends on its row of W and its row of x alone: the sum over blocks
//! of inputs, in order, of one chain of multiply-adds each. The number of threads, the other rows
//! of the batch, and which rows of W are asked for change no bit of it. Processors with fused
//! multiply-add (AVX2, AVX-512, NEON) give the same bits; others round twice.

mod kernel;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use crate::encoding::Encoding;
use crate::error::Result;
use crate::progress::Cancel;
use crate::weights::Matrix;
use kernel::{Kernel, GROUP};

/// Inputs of a chain of multiply-adds; a multiple of every encoding's block. Another value rounds
/// differently.
const BLOCK: usize = 256;
/// Most weight rows of a tile: with `BLOCK` inputs 128 KiB, which leaves room for y in a small
/// second-level cache.
const ROWS: usize = 128;
/// Columns up to which a tile is one panel: it is multiplied while it is in the first-level cache.
const FEW: usize = 64;
/// Most columns at once: a tile's part of y, 192 KiB, is beside it in the cache, and to decode it
/// again costs little.
const COLUMNS: usize = 384;
/// Fewest columns for which a tile is decoded once more, so that no thread is idle.
const PIECE: usize = 48;

thread_local! {
    /// A thread's tile, and before it the decoded rows that are about to be packed.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Sets `y`, `[n, of.len()]`, to the product of `n` rows of x, `[n, w.cols]`, with rows `of` of
/// `w`.
///
/// # Errors
/// `Interrupted`.
pub fn product(
    x: &[f32],
    n: usize,
    w: &Matrix,
    of: Range<usize>,
    y: &mut [f32],
    cancel: &Cancel,
) -> Result<()> {
    product_by(Kernel::best(), x, n, w, of, y, cancel)
}

fn product_by(
    kernel: Kernel,
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
    let most = n.div_ceil(n.div_ceil(COLUMNS));
    let mut packed = vec![0.0f32; most * w.cols];
    for (x, y) in x[..n * w.cols].chunks(most * w.cols).zip(y.chunks_mut(most * of.len())) {
        let columns = Columns::pack(kernel, x, w.cols, &mut packed[..x.len()]);
        tasks(kernel, y, &columns, &of)
            .into_par_iter()
            .try_for_each(|task| task.run(kernel, w, &columns, cancel))?;
    }
    Ok(())
}

/// Rows of x in panels of nearly equal width, `[k, width]` each.
struct Columns<'a> {
    /// Inputs.
    k: usize,
    /// The first column of each panel, and how many there are.
    starts: Vec<usize>,
    packed: &'a [f32],
}

impl Columns<'_> {
    fn pack<'a>(kernel: Kernel, x: &[f32], k: usize, packed: &'a mut [f32]) -> Columns<'a> {
        let n = x.len() / k;
        let panels = n.div_ceil(kernel.columns);
        let starts: Vec<usize> = (0..=panels).map(|p| p * n / panels).collect();
        let mut rest = &mut *packed;
        let mut parts = Vec::with_capacity(panels);
        for range in starts.windows(2) {
            let (part, others) = std::mem::take(&mut rest).split_at_mut((range[1] - range[0]) * k);
            parts.push((&x[range[0] * k..range[1] * k], part));
            rest = others;
        }
        parts.into_par_iter().for_each(|(from, to)| transpose(from, k, to));
        Columns { k, starts, packed }
    }

    /// The inputs `from` of a panel.
    fn panel(&self, p: usize, from: &Range<usize>) -> &[f32] {
        let (start, width) = (self.starts[p], self.starts[p + 1] - self.starts[p]);
        &self.packed[start * self.k + from.start * width..start * self.k + from.end * width]
    }
}

/// `[n, k]` → `[k, n]` for a few rows.
fn transpose(from: &[f32], k: usize, to: &mut [f32]) {
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
fn tasks<'y>(
    kernel: Kernel,
    y: &'y mut [f32],
    columns: &Columns,
    of: &Range<usize>,
) -> Vec<Task<'y>> {
    let threads = rayon::current_num_threads();
    let (rows, panels) = (of.len(), columns.starts.len() - 1);
    let step = rows.div_ceil(4 * threads).next_multiple_of(kernel.rows).clamp(kernel.rows, ROWS);
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
    fn run(mut self, kernel: Kernel, w: &Matrix, columns: &Columns, cancel: &Cancel) -> Result<()> {
        cancel.check()?;
        let tile = if self.y.len() <= FEW { kernel.rows } else { ROWS };
        SCRATCH.with_borrow_mut(|scratch| {
            for at in (0..self.rows.len()).step_by(tile) {
                let first = self.rows.start + at;
                let rows = first..(first + tile).min(self.rows.end);
                for start in (0..w.cols).step_by(BLOCK) {
                    let inputs = start..(start + BLOCK).min(w.cols);
                    let panels = pack_tile(kernel, w, &rows, &inputs, scratch);
                    self.multiply(kernel, panels, at, columns, &inputs);
                }
            }
        });
        Ok(())
    }

    /// `tile`: panels of rows, the first of them the task's row `at`.
    fn multiply(
        &mut self,
        kernel: Kernel,
        tile: &[f32],
        at: usize,
        columns: &Columns,
        inputs: &Range<usize>,
    ) {
        let first = columns.starts[self.panels.start];
        for p in self.panels.clone() {
            let x = columns.panel(p, inputs);
            let y = &mut self.y[columns.starts[p] - first..columns.starts[p + 1] - first];
            for (i, panel) in tile.chunks_exact(kernel.rows * inputs.len()).enumerate() {
                (kernel.multiply)(panel, x, y, at + i * kernel.rows, inputs.start > 0);
            }
        }
    }
}

/// Decodes some inputs of some rows into panels, `[inputs, kernel.rows]` each, the last one filled
/// up with zeros.
fn pack_tile<'s>(
    kernel: Kernel,
    w: &Matrix,
    rows: &Range<usize>,
    inputs: &Range<usize>,
    scratch: &'s mut Vec<f32>,
) -> &'s [f32] {
    /// Floats of a line of the cache: panels begin at one.
    const LINE: usize = 16;
    scratch.resize((GROUP + ROWS.next_multiple_of(kernel.rows)) * BLOCK + LINE, 0.0);
    let skip = scratch.as_ptr().align_offset(4 * LINE).min(LINE);
    let (plain, tile) = scratch[skip..].split_at_mut(GROUP * BLOCK);
    let k = inputs.len();
    let plain = &mut plain[..GROUP * k];
    let tile = &mut tile[..rows.len().next_multiple_of(kernel.rows) * k];
    for (p, panel) in tile.chunks_exact_mut(kernel.rows * k).enumerate() {
        for at in (0..kernel.rows).step_by(GROUP) {
            let first = rows.start + p * kernel.rows + at;
            if first + GROUP <= rows.end && matches!(w.encoding.blocks(), Some(Encoding::BF16)) {
                let stored = std::array::from_fn(|r| w.stored(first + r, inputs.clone()));
                (kernel.pack_bf16)(stored, panel, at);
                continue;
            }
            for (row, plain) in (first..).zip(plain.chunks_exact_mut(k)) {
                match row < rows.end {
                    true => w.decode(row, inputs.clone(), plain),
                    false => plain.fill(0.0),
                }
            }
            (kernel.pack)(plain, panel, at);
        }
    }
    tile
}
