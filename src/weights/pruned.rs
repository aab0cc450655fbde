//! Pruned matrices, whose zeros a patch must keep.

use rayon::prelude::*;

use crate::encoding::packed::Levels;
use crate::encoding::Encoding;
use crate::weights::{Matrix, Storage};

/// Share of zeros from which a matrix of floats counts as pruned. Training leaves hardly any weight
/// at zero.
const FLOATS: f64 = 0.05;
/// Group sizes of the sparsity patterns that kernels rely on, 2:4 and 4:8: half of so many
/// neighbouring inputs are zero.
const PATTERNS: [usize; 2] = [4, 8];

/// How many elements of the matrix are zero.
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

/// Whether a patch must keep the matrix's zeros. This is so for a matrix that is stored without its
/// zeros, for a pruned matrix of floats, and for packed integer codes with the pattern 2:4 or 4:8.
/// In other quantized matrices, rounding makes zeros too, and nothing relies on them.
pub fn is_pruned(w: &Matrix) -> bool {
    match w.encoding {
        Storage::Blocks(Encoding::F32 | Encoding::F16 | Encoding::BF16) => has_many_zeros(w),
        Storage::Packed(p) if p.mask.is_some() => true,
        Storage::Packed(p) if matches!(p.levels, Levels::Float(_) | Levels::Plain(_)) => {
            has_many_zeros(w)
        }
        Storage::Packed(_) => PATTERNS.into_iter().any(|m| has_pattern(w, m)),
        // The quantized blocks of GGUF.
        Storage::Blocks(_) => false,
    }
}

/// Least share of a column's elements that must be nonzero for an edit of the column: these
/// elements alone carry the column's part of the edit.
const LEAST_LEFT: f64 = 0.15;

/// Columns of a pruned matrix with too few nonzero elements to carry an edit. Empty for a matrix
/// that isn't pruned.
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

/// Whether the share of zeros reaches [`FLOATS`].
fn has_many_zeros(w: &Matrix) -> bool {
    zeros(w) as f64 >= FLOATS * (w.rows * w.cols) as f64
}

/// Whether at least half of every `m` neighbouring inputs are zero.
fn has_pattern(w: &Matrix, m: usize) -> bool {
    let half_is_zero = |group: &[f32]| 2 * group.iter().filter(|x| **x == 0.0).count() >= m;
    w.cols.is_multiple_of(m)
        && (0..w.rows).into_par_iter().all(|i| {
            let mut row = vec![0.0f32; w.cols];
            w.decode_row(i, &mut row);
            row.chunks_exact(m).all(half_is_zero)
        })
}
