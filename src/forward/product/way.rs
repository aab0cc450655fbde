//! How a matrix and the columns that it is multiplied by are unpacked into words of 32 bits.

use std::borrow::Cow;
use std::ops::Range;

use super::kernel::{column_words, Kernel, PackStored, Shape};
use super::{Arithmetic, BLOCK, COLUMNS, ROWS};
use crate::encoding::whole::{pair, Layout, Whole, GROUP};
use crate::encoding::Encoding;
use crate::num::round_to_i8;
use crate::weights::Matrix;

/// How much is multiplied at a time.
pub struct Most {
    /// Weight rows of a tile.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
}

/// How a matrix is multiplied.
#[derive(Clone, Copy)]
pub struct Way {
    /// The kernel.
    pub shape: Shape,
    /// Interleaves rows of BF16 as they are stored, where they are.
    pub pack_bf16: Option<PackStored>,
    /// Reads blocks as whole numbers; `None`: words are floats.
    whole: Option<&'static dyn Whole>,
}

impl Way {
    /// How `kernel` multiplies `w`.
    pub fn new(kernel: Kernel, arithmetic: Arithmetic, w: &Matrix) -> Way {
        let encoding = w.encoding.blocks();
        let whole =
            encoding.filter(|_| arithmetic == Arithmetic::Rounded).and_then(Encoding::whole);
        if let (Some(whole), Some(kernels)) = (whole, kernel.whole) {
            let shapes = match whole.layout() {
                Layout::Small => kernels.small,
                Layout::WithMinimum => kernels.with_minimum,
                Layout::Signed => kernels.signed,
            };
            let shape = shapes[usize::from(whole.block_len() == 256)];
            return Way { shape, pack_bf16: None, whole: Some(whole) };
        }
        let pack_bf16 = matches!(encoding, Some(Encoding::BF16)).then_some(kernel.pack_bf16);
        Way { shape: kernel.floats, pack_bf16, whole: None }
    }

    /// The size of a tile and of its part of y. Whole numbers are multiplied faster, so a tile that
    /// is unpacked must serve more columns; it has fewer words, so y may be of the same size.
    pub fn most(&self) -> Most {
        match self.whole {
            Some(_) => Most { rows: ROWS / 2, columns: 2 * COLUMNS },
            None => Most { rows: ROWS, columns: COLUMNS },
        }
    }

    /// Words of `k` inputs of a column.
    pub fn column_words(&self, k: usize) -> usize {
        self.whole.map_or(k, |w| k / w.block_len() * column_words(w.layout(), w.block_len()))
    }

    /// Words of `k` inputs of a row of the matrix; at most `k`.
    pub fn row_words(&self, k: usize) -> usize {
        self.whole.map_or(k, |w| k / w.block_len() * w.layout().words(w.block_len()))
    }

    /// The words of columns, `[n, k]`.
    pub fn columns<'x>(&self, x: &'x [f32], k: usize) -> Cow<'x, [u32]> {
        let Some(whole) = self.whole else { return Cow::Borrowed(bytemuck::cast_slice(x)) };
        let mut words = Vec::with_capacity(x.len() / k * self.column_words(k));
        let mut codes = [0; BLOCK];
        // Rows are whole blocks, so blocks don't cross their ends.
        for x in x.chunks_exact(whole.block_len()) {
            let codes = &mut codes[..x.len()];
            let scale = round_to_i8(x, codes);
            if whole.layout() == Layout::Signed {
                words.extend(codes.as_chunks().0.iter().map(|&[a, b]| pair(a.into(), b.into())));
            } else {
                let word = |c: &[i8; 4]| u32::from_le_bytes(c.map(|c| c as u8));
                words.extend(codes.as_chunks().0.iter().map(word));
                let sum = |codes: &[i8]| codes.iter().map(|&c| i16::from(c)).sum();
                words.extend(
                    codes.chunks_exact(2 * GROUP).map(|c| pair(sum(&c[..GROUP]), sum(&c[GROUP..]))),
                );
            }
            words.push(scale.to_bits());
        }
        Cow::Owned(words)
    }

    /// The words of some inputs of a row of the matrix.
    pub fn row(&self, w: &Matrix, row: usize, inputs: Range<usize>, words: &mut [u32]) {
        match self.whole {
            Some(whole) => whole.read(w.stored(row, inputs), words),
            None => w.decode(row, inputs, bytemuck::cast_slice_mut(words)),
        }
    }
}
