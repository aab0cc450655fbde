//! Stacks of floats with a row for each input, where other matrices have one for each output: the
//! experts of gpt-oss.

use super::sparse::ONE;
use crate::encoding::packed::{Groups, Layout, Levels, Numbers, Packed, Zeros};
use crate::encoding::Encoding;
use crate::weights::{Matrix, Stack, Storage};

/// A stack `[matrices, cols, rows]` of one of the plain float types. `shape`: rows and columns of a
/// matrix, outputs and inputs.
///
/// # Panics
/// If the encoding has blocks.
pub(crate) fn by_input<'a>(
    encoding: Encoding,
    shape: (usize, usize),
    count: usize,
    bytes: &'a [u8],
) -> Stack<'a> {
    assert_eq!(encoding.block_len(), 1, "a plain float");
    let (rows, cols) = shape;
    let packed = Packed {
        name: match encoding {
            Encoding::F16 => "F16, a row for each input",
            Encoding::BF16 => "BF16, a row for each input",
            _ => "F32, a row for each input",
        },
        rows,
        cols,
        bits: 32,
        layout: Layout::ByInput,
        levels: Levels::Plain(encoding),
        scales: Numbers::Plain(Encoding::F32, ONE),
        factor: 1.0,
        divisor: 1.0,
        zeros: Zeros::All(0),
        groups: Groups { rows, cols, by_row: 0, by_group: 0, index: None },
        mask: None,
        round: Encoding::F32,
    };
    Stack::new(Matrix { rows, cols, encoding: Storage::Packed(packed), bytes }, count)
}
