//! The masks of sparse packings.

/// Which elements of a pruned matrix are stored. Only stored elements have codes, and the codes lie
/// row after row.
#[derive(Clone, Copy, Debug)]
pub struct Mask<'a> {
    /// One bit for each element, the first in the lowest bit of a byte. Every row begins at a whole
    /// byte.
    pub bits: &'a [u8],
    /// Where each row's codes begin, I64. `None`: half of every row is stored.
    pub starts: Option<&'a [u8]>,
}

impl Mask<'_> {
    /// How many of a row's elements before `col` are stored.
    pub(super) fn before(&self, cols: usize, row: usize, col: usize) -> usize {
        let bits = &self.bits[row * cols.div_ceil(8)..][..cols.div_ceil(8)];
        let whole: u32 = bits[..col / 8].iter().map(|b| b.count_ones()).sum();
        let rest = bits.get(col / 8).map_or(0, |b| (b & !(0xff << (col % 8))).count_ones());
        (whole + rest) as usize
    }

    /// Whether an element is stored.
    pub(super) fn has(&self, cols: usize, row: usize, col: usize) -> bool {
        self.bits[row * cols.div_ceil(8) + col / 8] >> (col % 8) & 1 == 1
    }

    /// Where a row's codes begin.
    pub(super) fn start(&self, cols: usize, row: usize) -> usize {
        match self.starts {
            Some(b) => (0..8).rev().fold(0, |n, i| n << 8 | usize::from(b[8 * row + i])),
            None => row * (cols / 2),
        }
    }

    /// Whether the mask fits a matrix of this shape that has `codes` codes.
    pub fn fits(&self, rows: usize, cols: usize, codes: usize) -> bool {
        let sizes = self.bits.len() == rows * cols.div_ceil(8)
            && self.starts.is_none_or(|b| b.len() == 8 * rows)
            && (cols.is_multiple_of(8)
                || rows == 0
                || (0..rows).all(|r| self.padding_is_zero(cols, r)));
        let mut at = 0;
        sizes
            && (0..rows).all(|row| {
                let contiguous = self.start(cols, row) == at;
                at += self.before(cols, row, cols);
                contiguous
            })
            && at == codes
    }

    /// Whether the bits after a row's end, in its last byte, are zero.
    fn padding_is_zero(&self, cols: usize, row: usize) -> bool {
        self.bits[(row + 1) * cols.div_ceil(8) - 1] >> (cols % 8) == 0
    }
}
