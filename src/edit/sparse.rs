//! Pruned matrices: zeros that a patch must leave where they are.

use rayon::prelude::*;

use crate::encoding::packed::Levels;
use crate::encoding::Encoding;
use crate::model::{Matrix, Storage};

/// Share of zeros from which a matrix of floats was pruned: trained weights are hardly ever zero.
const FLOATS: f64 = 0.05;
/// The same of integer codes, of which many are zero anyway.
const CODES: f64 = 0.45;

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

/// Whether the matrix was pruned, unstructured or N of M.
pub fn is_pruned(w: &Matrix) -> bool {
    let least = match w.encoding {
        Storage::Blocks(Encoding::F32 | Encoding::F16 | Encoding::BF16) => FLOATS,
        Storage::Packed(p) if matches!(p.levels, Levels::Float(_)) => FLOATS,
        Storage::Packed(p) if p.bits >= 4 => CODES,
        // GGUF's blocks, and grids so coarse that zero is one level of few.
        _ => return false,
    };
    zeros(w) as f64 >= least * (w.rows * w.cols) as f64
}
