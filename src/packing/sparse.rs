//! Pruned matrices that are stored without their zeros: formats `sparse-bitmask` and
//! `sparse-24-bitmask` of compressed-tensors.

use super::Module;
use crate::checkpoint::Tensor;
use crate::encoding::packed::{Groups, Layout, Levels, Mask, Numbers, Packed, Zeros};
use crate::encoding::{Encoding, Fp8};
use crate::error::Result;
use crate::weights::Matrix;

/// The number 1.0, the scale of plain floats.
pub(super) const ONE: &[u8] = &1f32.to_le_bytes();

impl<'a> Module<'a, '_> {
    /// The tensors are `compressed` (the stored elements, row after row), `bitmask` `[rows, cols /
    /// 8]` and `shape`; for other patterns than 2:4 also `row_offsets`; for FP8 also
    /// `weight_scale`.
    pub(super) fn sparse(&self, t: &'a Tensor) -> Result<(Matrix<'a>, &'a Tensor)> {
        let shape = self.need("shape")?;
        let numbers = self.numbers(shape);
        let &[rows, cols] = &numbers[..] else {
            return Err(self.wrong(&format!("tensor {} must hold two numbers", shape.name)));
        };
        let bits = self.need("bitmask")?;
        let (rows, cols) = (rows as usize, cols as usize);
        // The shape is compared with the mask's before its numbers are multiplied: no overflow.
        let [across, down] = bits.dims[..] else {
            return Err(self.wrong(&format!("tensor {} must be a matrix", bits.name)));
        };
        let mask = Mask {
            bits: self.exact(bits, &["U8"], bits.elements() as usize)?,
            starts: match self.get("row_offsets") {
                Some(t) => Some(self.exact(t, &["I64"], rows)?),
                None => None,
            },
        };
        let sizes = (down as usize, across as usize) == (rows, cols.div_ceil(8));
        if !sizes || !mask.fits(rows, cols, t.elements() as usize) {
            return Err(self.wrong(&format!(
                "tensor {} keeps other elements than the {} that {} holds, in a matrix {numbers:?}",
                bits.name,
                t.elements(),
                t.name
            )));
        }
        let kind = t.type_name();
        let (levels, name, scaled) = match kind.as_str() {
            "F8_E4M3" => (Levels::Float(Fp8::E4M3), "FP8, sparse (compressed-tensors)", true),
            "F32" => (Levels::Plain(Encoding::F32), "F32, sparse (compressed-tensors)", false),
            "F16" => (Levels::Plain(Encoding::F16), "F16, sparse (compressed-tensors)", false),
            "BF16" => (Levels::Plain(Encoding::BF16), "BF16, sparse (compressed-tensors)", false),
            _ => return Err(self.unreadable(t, &format!("a sparse matrix of {kind}"))),
        };
        let (scales, round, groups) = match scaled {
            true => self.by_scale(self.need("weight_scale")?, rows, cols, self.block())?,
            false => {
                let one = Numbers::Plain(Encoding::F32, ONE);
                (one, Encoding::F32, Groups { rows, cols, by_row: 0, by_group: 0, index: None })
            }
        };
        Ok(self.matrix(
            t,
            Packed {
                name,
                rows,
                cols,
                bits: if scaled { 8 } else { 32 },
                layout: Layout::Bytes,
                levels,
                scales,
                factor: 1.0,
                divisor: 1.0,
                zeros: Zeros::All(0),
                groups,
                mask: Some(mask),
                round,
            },
        ))
    }
}
