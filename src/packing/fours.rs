//! NVFP4 and MXFP4: 4-bit floats (OCP's E2M1), two to a byte along a row.

use super::{shown, Module};
use crate::checkpoint::{Folder, Tensor};
use crate::encoding::packed::{Groups, Layout, Levels, Numbers, Packed, Zeros};
use crate::encoding::{Encoding, Fp8};
use crate::error::Result;
use crate::weights::{Matrix, Stack};

/// How many inputs share a scale in NVFP4.
const NVFP4: usize = 16;
/// How many inputs share a scale in MXFP4.
const MXFP4: usize = 32;

/// A packed matrix of E2M1 codes, with a scale for each `group` neighbouring inputs of a row.
fn fours<'a>(
    name: &'static str,
    (rows, cols): (usize, usize),
    group: usize,
    scales: Numbers<'a>,
    round: Encoding,
) -> Packed<'a> {
    Packed {
        name,
        rows,
        cols,
        bits: 4,
        layout: Layout::LowNibbles,
        levels: Levels::E2M1,
        scales,
        factor: 1.0,
        divisor: 1.0,
        zeros: Zeros::All(0),
        groups: Groups { rows: 1, cols: group, by_row: cols / group, by_group: 1, index: None },
        mask: None,
        round,
    }
}

impl<'a> Module<'a, '_> {
    /// Two formats of compressed-tensors, both with `weight_packed` `[rows, cols / 2]`.
    /// `nvfp4-pack-quantized` has `weight_scale` in FP8 and `weight_global_scale`, a divisor.
    /// `mxfp4-pack-quantized` has `weight_scale` as exponents.
    pub(super) fn compressed_fours(&self, t: &'a Tensor) -> Result<(Matrix<'a>, &'a Tensor)> {
        let (rows, cols) = self.halves(t)?;
        let scale = self.need("weight_scale")?;
        if let Some(z) = self.get("weight_zero_point") {
            return Err(self.unreadable(z, "4-bit floats with zero points"));
        }
        let packed = match (scale.type_name().as_str(), self.get("weight_global_scale")) {
            ("F8_E4M3", Some(global)) => {
                let scales = self.by_group(scale, "F8_E4M3", rows, cols, NVFP4)?;
                Packed {
                    divisor: self.number(global)?,
                    ..fours(
                        "NVFP4 (compressed-tensors)",
                        (rows, cols),
                        NVFP4,
                        scales,
                        Encoding::BF16,
                    )
                }
            }
            ("U8", None) if !self.formats().contains(&"mxfp6-pack-quantized") => {
                let scales = self.by_group(scale, "U8", rows, cols, MXFP4)?;
                fours("MXFP4 (compressed-tensors)", (rows, cols), MXFP4, scales, Encoding::BF16)
            }
            (kind, _) => {
                let formats = self.formats().join(", ");
                return Err(
                    self.unreadable(t, &format!("U8 codes, {kind} scales, format {formats}"))
                );
            }
        };
        Ok(self.matrix(t, packed))
    }

    /// NVFP4 of ModelOpt: `weight` `[rows, cols / 2]`, `weight_scale` in FP8, and `weight_scale_2`,
    /// a multiplier. `second` is `weight_scale_2`.
    pub(super) fn modelopt(
        &self,
        t: &'a Tensor,
        second: &'a Tensor,
    ) -> Result<(Matrix<'a>, &'a Tensor)> {
        if let Some(s) = self.get("pre_quant_scale") {
            return Err(self.unreadable(s, "ModelOpt's NVFP4_AWQ, which scales inputs"));
        }
        let (rows, cols) = self.halves(t)?;
        let scales = self.by_group(self.need("weight_scale")?, "F8_E4M3", rows, cols, NVFP4)?;
        let plain = fours("NVFP4 (ModelOpt)", (rows, cols), NVFP4, scales, self.dtype());
        Ok(self.matrix(t, Packed { factor: self.number(second)?, ..plain }))
    }

    /// Rows and columns of a matrix that stores two columns to a byte.
    fn halves(&self, t: &Tensor) -> Result<(usize, usize)> {
        let (rows, bytes) = self.shape(t)?;
        match bytes.checked_mul(2) {
            Some(cols) if t.type_name() == "U8" => Ok((rows, cols)),
            _ => Err(self.wrong(&format!("tensor {} is {}, expected U8", t.name, t.type_name()))),
        }
    }

    /// 8-bit scales `[rows, cols / group]`: exponents if `kind` is U8, else FP8.
    fn by_group(
        &self,
        t: &'a Tensor,
        kind: &str,
        rows: usize,
        cols: usize,
        group: usize,
    ) -> Result<Numbers<'a>> {
        if !cols.is_multiple_of(group) {
            return Err(self.wrong(&format!("rows of {cols} in groups of {group}")));
        }
        let bytes = self.exact(t, &[kind], rows * (cols / group))?;
        Ok(match kind {
            "U8" => Numbers::Exponents(bytes),
            _ => Numbers::Float(Fp8::E4M3, bytes),
        })
    }

    /// The number in a tensor that must hold a single positive one.
    fn number(&self, t: &'a Tensor) -> Result<f32> {
        let b = self.exact(t, &["F32"], 1)?;
        let number = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        match number.is_finite() && number > 0.0 {
            true => Ok(number),
            false => {
                Err(self
                    .wrong(&format!("tensor {} is {number}, expected a positive number", t.name)))
            }
        }
    }
}

/// A stack of experts in MXFP4, outputs by inputs, as gpt-oss stores experts: `NAME_blocks`
/// `[experts, rows, cols / 32, 16]` and `NAME_scales` `[experts, rows, cols / 32]`, both U8.
/// Returned with `NAME_blocks`, which holds the codes. `None` if the folder has no such tensor.
///
/// # Errors
/// The scales are missing, or shapes don't fit.
pub fn packed_experts<'a>(
    folder: &'a Folder,
    name: &str,
) -> Result<Option<(Stack<'a>, &'a Tensor)>> {
    let Some(blocks) = folder.tensor(&format!("{name}_blocks")) else { return Ok(None) };
    let m = Module { folder, name, config: super::configuration(folder) };
    let scales = format!("{name}_scales");
    let scales =
        folder.tensor(&scales).ok_or_else(|| m.wrong(&format!("tensor {scales} is missing")))?;
    let fits = match (&blocks.dims[..], &scales.dims[..]) {
        (&[16, groups, rows, experts], [g, r, e]) => {
            // No dimension is larger than the number of elements, which the file's bytes bound.
            let sound = (&groups, &rows, &experts) == (g, r, e) && blocks.elements() > 0;
            sound.then_some((MXFP4 * groups as usize, rows as usize, experts as usize))
        }
        _ => None,
    };
    let Some((cols, rows, experts)) = fits else {
        return Err(m.wrong(&format!(
            "tensor {} has the shape {:?} and its scales {:?}, expected \
             [experts, rows, groups, 16] and the same without 16",
            blocks.name,
            shown(blocks),
            shown(scales)
        )));
    };
    let exponents = m.exact(scales, &["U8"], scales.elements() as usize)?;
    m.exact(blocks, &["U8"], blocks.elements() as usize)?;
    let scales = Numbers::Exponents(exponents);
    let packed = fours("MXFP4", (rows, cols), MXFP4, scales, Encoding::BF16);
    Ok(Some((Stack::new(m.matrix(blocks, packed).0, experts), blocks)))
}
