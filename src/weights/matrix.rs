//! A matrix as it is stored, whatever that is: rows to decode for the forward pass, codes to step
//! for the fold.

use std::ops::Range;

use crate::encoding::packed::Packed;
use crate::encoding::{Encoding, Params};

/// How a matrix's elements are stored.
// A matrix lives on the stack for one product: its size doesn't matter.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Copy, Debug)]
pub enum Storage<'a> {
    /// Blocks along a row, or floats, in one tensor.
    Blocks(Encoding),
    /// Codes in one tensor, scales and zero points in others.
    Packed(Packed<'a>),
}

impl From<Encoding> for Storage<'_> {
    fn from(encoding: Encoding) -> Self {
        Storage::Blocks(encoding)
    }
}

impl Storage<'_> {
    /// The encoding's or the packing's name.
    pub fn name(&self) -> &'static str {
        match self {
            Storage::Blocks(e) => e.name(),
            Storage::Packed(p) => p.name,
        }
    }

    /// The encoding, where the matrix lies in one tensor.
    pub fn blocks(&self) -> Option<Encoding> {
        match self {
            Storage::Blocks(e) => Some(*e),
            Storage::Packed(_) => None,
        }
    }

    /// Whether every element has a code of its own, which a fold can step.
    pub fn has_codes(&self) -> bool {
        self.blocks().is_none_or(Encoding::has_codes)
    }

    /// The value of a code.
    pub fn value(&self, p: Params, code: i32) -> f32 {
        match self {
            Storage::Blocks(e) => e.value(p, code),
            Storage::Packed(k) => k.value(p, code),
        }
    }

    /// The code in range whose value is nearest to `x`.
    pub fn nearest(&self, p: Params, x: f32) -> i32 {
        match self {
            Storage::Blocks(e) => e.nearest(p, x),
            Storage::Packed(k) => k.nearest(p, x),
        }
    }

    /// The lowest and the highest code.
    pub fn code_range(&self) -> (i32, i32) {
        match self {
            Storage::Blocks(e) => e.code_range(),
            Storage::Packed(k) => k.code_range(),
        }
    }
}

/// A matrix as it is stored: `rows` outputs by `cols` inputs.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// How its elements are stored.
    pub encoding: Storage<'a>,
    /// The bytes of its codes.
    pub bytes: &'a [u8],
}

impl Matrix<'_> {
    /// The bytes of one row; on average, where rows share bytes.
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

    /// The bytes of some columns of a row, whole blocks; none where they don't lie in one tensor.
    pub fn stored(&self, row: usize, cols: Range<usize>) -> &[u8] {
        match self.encoding {
            Storage::Blocks(e) => &self.bytes[self.span(e, row, &cols)],
            Storage::Packed(_) => &[],
        }
    }

    /// Decodes some columns of a row, whole blocks, into `out`, `[cols.len()]`.
    pub fn decode(&self, row: usize, cols: Range<usize>, out: &mut [f32]) {
        match self.encoding {
            Storage::Blocks(e) => e.decode(&self.bytes[self.span(e, row, &cols)], out),
            Storage::Packed(p) => p.decode(self.bytes, row, cols, out),
        }
    }

    /// The codes and parameters of some columns of a row, whole blocks.
    pub fn unpack(&self, row: usize, cols: Range<usize>, codes: &mut [i32], params: &mut [Params]) {
        match self.encoding {
            Storage::Blocks(e) => e.unpack(&self.bytes[self.span(e, row, &cols)], codes, params),
            Storage::Packed(p) => p.unpack(self.bytes, row, cols, codes, params),
        }
    }

    /// Overwrites these codes in `bytes`, which are laid out as this matrix's own.
    pub fn pack(&self, bytes: &mut [u8], row: usize, cols: Range<usize>, codes: &[i32]) {
        match self.encoding {
            Storage::Blocks(e) => e.pack(&mut bytes[self.span(e, row, &cols)], codes),
            Storage::Packed(p) => p.pack(bytes, row, cols, codes),
        }
    }

    fn span(&self, e: Encoding, row: usize, cols: &Range<usize>) -> Range<usize> {
        let at = row * self.row_bytes() + e.bytes_for(cols.start);
        at..at + e.bytes_for(cols.len())
    }
}
