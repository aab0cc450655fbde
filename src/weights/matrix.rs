//! A matrix in stored form, in any encoding or packing. The forward pass decodes its rows, and a
//! fold steps its codes.

use std::ops::Range;

use crate::encoding::packed::Packed;
use crate::encoding::{Encoding, Params};

/// How a matrix's elements are stored.
// A matrix lives on the stack for one product, so the size of this enum doesn't matter.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Copy, Debug)]
pub enum Storage<'a> {
    /// One tensor of blocks along the rows, or of floats.
    Blocks(Encoding),
    /// One tensor of codes; other tensors hold the scales and zero points.
    Packed(Packed<'a>),
}

impl From<Encoding> for Storage<'_> {
    fn from(encoding: Encoding) -> Self {
        Storage::Blocks(encoding)
    }
}

impl Storage<'_> {
    /// The name of the encoding or of the packing.
    pub fn name(&self) -> &'static str {
        match self {
            Storage::Blocks(e) => e.name(),
            Storage::Packed(p) => p.name,
        }
    }

    /// The encoding of a matrix in one tensor; `None` for a packed matrix.
    pub fn blocks(&self) -> Option<Encoding> {
        match self {
            Storage::Blocks(e) => Some(*e),
            Storage::Packed(_) => None,
        }
    }

    /// How the `i`-th of `n` matrices in one tensor is stored.
    pub(super) fn of_stack(&self, i: usize, n: usize) -> Self {
        match self {
            Storage::Blocks(e) => Storage::Blocks(*e),
            Storage::Packed(p) => Storage::Packed(p.of_stack(i, n)),
        }
    }

    /// Whether every element has a code of its own, which a fold can step.
    pub fn has_codes(&self) -> bool {
        self.blocks().is_none_or(Encoding::has_codes)
    }

    /// The value of a code under the parameters `p`.
    ///
    /// # Panics
    /// If the encoding has no codes.
    pub fn value(&self, p: Params, code: i32) -> f32 {
        match self {
            Storage::Blocks(e) => e.value(p, code),
            Storage::Packed(k) => k.value(p, code),
        }
    }

    /// The code in range whose value is nearest to `x`.
    ///
    /// # Panics
    /// If the encoding has no codes.
    pub fn nearest(&self, p: Params, x: f32) -> i32 {
        match self {
            Storage::Blocks(e) => e.nearest(p, x),
            Storage::Packed(k) => k.nearest(p, x),
        }
    }

    /// The lowest and the highest code.
    ///
    /// # Panics
    /// If the encoding has no codes.
    pub fn code_range(&self) -> (i32, i32) {
        match self {
            Storage::Blocks(e) => e.code_range(),
            Storage::Packed(k) => k.code_range(),
        }
    }
}

/// A matrix in stored form: `rows` outputs by `cols` inputs.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// How the elements are stored.
    pub encoding: Storage<'a>,
    /// The bytes of the tensor that holds the codes.
    pub bytes: &'a [u8],
}

impl Matrix<'_> {
    /// Number of bytes in one row; the average if rows share bytes.
    pub fn row_bytes(&self) -> usize {
        match self.encoding {
            Storage::Blocks(e) => e.bytes_for(self.cols),
            Storage::Packed(_) => self.bytes.len() / self.rows.max(1),
        }
    }

    /// Decodes row `row` into `out`, `[cols]`.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        self.decode(row, 0..self.cols, out);
    }

    /// The bytes of some columns of a row. `cols` must be whole blocks. Empty for a packed matrix.
    pub fn stored(&self, row: usize, cols: Range<usize>) -> &[u8] {
        match self.encoding {
            Storage::Blocks(e) => &self.bytes[self.span(e, row, &cols)],
            Storage::Packed(_) => &[],
        }
    }

    /// Decodes some columns of a row into `out`, `[cols.len()]`. `cols` must be whole blocks.
    pub fn decode(&self, row: usize, cols: Range<usize>, out: &mut [f32]) {
        match self.encoding {
            Storage::Blocks(e) => e.decode(&self.bytes[self.span(e, row, &cols)], out),
            Storage::Packed(p) => p.decode(self.bytes, row, cols, out),
        }
    }

    /// Reads the codes and parameters of some columns of a row, one of each per column. `cols` must
    /// be whole blocks.
    pub fn unpack(&self, row: usize, cols: Range<usize>, codes: &mut [i32], params: &mut [Params]) {
        match self.encoding {
            Storage::Blocks(e) => e.unpack(&self.bytes[self.span(e, row, &cols)], codes, params),
            Storage::Packed(p) => p.unpack(self.bytes, row, cols, codes, params),
        }
    }

    /// Overwrites the codes of some columns of a row in `bytes`, which have the layout of this
    /// matrix's own bytes.
    pub fn pack(&self, bytes: &mut [u8], row: usize, cols: Range<usize>, codes: &[i32]) {
        match self.encoding {
            Storage::Blocks(e) => e.pack(&mut bytes[self.span(e, row, &cols)], codes),
            Storage::Packed(p) => p.pack(bytes, row, cols, codes),
        }
    }

    /// The range of the bytes that holds some columns of a row.
    fn span(&self, e: Encoding, row: usize, cols: &Range<usize>) -> Range<usize> {
        let at = row * self.row_bytes() + e.bytes_for(cols.start);
        at..at + e.bytes_for(cols.len())
    }
}
