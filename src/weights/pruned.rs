//! Pruned matrices: zeros that a patch must leave where they are.

use rayon::prelude::*;

use crate::encoding::packed::Levels;
use crate::encoding::Encoding;
use crate::weights::{Matrix, Storage};

/// Share of zeros from which a matrix of floats was pruned: trained weights are hardly ever zero.
const FLOATS: f64 = 0.05;
/// Patterns that kernels rely on: of so many neighbouring inputs half are zero.
const PATTERNS: [usize; 2] = [4, 8];

/// How many elements are zero.
pub fn zeros(w: &Matrix) -> u64 {
    (0..w.rows)
        .into_par_iter()
        .map_init(
            || vec![0.0f32; w.cols],
            |row, i| {
                w.decode_row(i, row);
                row.iter().filter(|x| **x == 0.0).count() as u64
            },
        )
        .sum()
}

/// Whether a patch must leave the matrix's zeros alone: a matrix that is stored without its zeros,
/// one of floats that was pruned, or codes of few bits in a 2:4 or 4:8 pattern. Other codes are
/// zero by rounding as well, and nothing relies on those that are.
pub fn is_pruned(w: &Matrix) -> bool {
    match w.encoding {
        Storage::Blocks(Encoding::F32 | Encoding::F16 | Encoding::BF16) => mostly(w),
        Storage::Packed(p) if p.mask.is_some() => true,
        Storage::Packed(p) if matches!(p.levels, Levels::Float(_) | Levels::Plain(_)) => mostly(w),
        Storage::Packed(_) => PATTERNS.into_iter().any(|m| has_pattern(w, m)),
        // GGUF's blocks.
        Storage::Blocks(_) => false,
    }
}

/// Least share of a column that pruning must have left for an edit of it: what is left carries all
/// of the column's part.
const LEAST_LEFT: f64 = 0.15;

/// Columns of a pruned matrix that can't carry an edit. Of another matrix none.
pub fn dead_columns(w: &Matrix) -> Vec<usize> {
    if !is_pruned(w) {
        return Vec::new();
    }
    let mut left = vec![0usize; w.cols];
    let mut row = vec![0.0f32; w.cols];
    for i in 0..w.rows {
        w.decode_row(i, &mut row);
        left.iter_mut().zip(&row).for_each(|(n, x)| *n += usize::from(*x != 0.0));
    }
    (0..w.cols).filter(|&j| (left[j] as f64) < LEAST_LEFT * w.rows as f64).collect()
}

fn mostly(w: &Matrix) -> bool {
    zeros(w) as f64 >= FLOATS * (w.rows * w.cols) as f64
}

fn has_pattern(w: &Matrix, m: usize) -> bool {
    let half = |group: &[f32]| 2 * group.iter().filter(|x| **x == 0.0).count() >= m;
    w.cols.is_multiple_of(m)
        && (0..w.rows).into_par_iter().all(|i| {
            let mut row = vec![0.0f32; w.cols];
            w.decode_row(i, &mut row);
            row.chunks_exact(m).all(half)
        })
}
