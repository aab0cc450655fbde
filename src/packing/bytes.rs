//! Packings with one code per byte (FP8, INT8), and the two codes per byte of bitsandbytes.

use serde_json::Value;

use super::{shown, Module};
use crate::checkpoint::Tensor;
use crate::encoding::packed::{Groups, Layout, Levels, Numbers, Packed, Zeros};
use crate::encoding::{Encoding, Fp8};
use crate::error::Result;
use crate::weights::Matrix;

impl<'a> Module<'a, '_> {
    /// Reads scales, and finds from their shape which elements share one: all elements, those of an
    /// output, of an output's group of inputs, or of a `block` (outputs, inputs). Returns the
    /// scales, their float type, and the grouping.
    pub(super) fn by_scale(
        &self,
        scale: &'a Tensor,
        rows: usize,
        cols: usize,
        block: (usize, usize),
    ) -> Result<(Numbers<'a>, Encoding, Groups<'a>)> {
        let groups =
            |r, c, by_row, by_group| Groups { rows: r, cols: c, by_row, by_group, index: None };
        let n = scale.elements() as usize;
        let (numbers, round) = match scale.type_name().as_str() {
            // MXFP8 stores scales as exponents.
            "U8" | "F8_E8M0" => (Numbers::Exponents(self.bytes(scale)), Encoding::BF16),
            _ => self.scales(scale, n)?,
        };
        let wide = match scale.dims[..] {
            [across, down] if n > 1 => Some((down as usize, across as usize)),
            _ => None,
        };
        let found = match wide {
            _ if n == 1 => groups(rows, cols, 0, 0),
            None if n == rows => groups(1, cols, 1, 0),
            Some((down, across)) if down == rows && across > 0 && cols.is_multiple_of(across) => {
                groups(1, cols / across, across, 1)
            }
            Some((down, across))
                if (down, across) == (rows.div_ceil(block.0), cols.div_ceil(block.1)) =>
            {
                groups(block.0, block.1, across, 1)
            }
            _ => {
                let what = format!(
                    "tensor {} has the shape {:?} for weights of {rows} x {cols}",
                    scale.name,
                    shown(scale)
                );
                return Err(self.wrong(&what));
            }
        };
        Ok((numbers, round, found))
    }

    /// The block size (outputs, inputs) of packings that have a scale per block.
    pub(super) fn block(&self) -> (usize, usize) {
        [
            &self.config["weight_block_size"],
            &self.config["config_groups"]["group_0"]["weights"]["block_structure"],
        ]
        .into_iter()
        .find_map(|b| Some((b[0].as_u64()?.max(1) as usize, b[1].as_u64()?.max(1) as usize)))
        .unwrap_or((128, 128))
    }

    /// FP8 with `weight_scale` (compressed-tensors, vLLM) or `weight_scale_inv` (DeepSeek, Qwen).
    /// Both are multipliers.
    pub(super) fn float8(&self, t: &'a Tensor, kind: Fp8) -> Result<(Matrix<'a>, &'a Tensor)> {
        let (rows, cols) = self.shape(t)?;
        let Some(scale) = self.get("weight_scale_inv").or(self.get("weight_scale")) else {
            return Err(self.unreadable(t, "FP8 without weight_scale"));
        };
        let (scales, round, groups) = self.by_scale(scale, rows, cols, self.block())?;
        Ok(self.matrix(
            t,
            Packed {
                name: match groups.rows {
                    1 if matches!(scales, Numbers::Exponents(_)) => "MXFP8",
                    n if n == 1 || n == rows => "FP8",
                    _ => "FP8 blocks",
                },
                rows,
                cols,
                bits: 8,
                layout: Layout::Bytes,
                levels: Levels::Float(kind),
                scales,
                factor: 1.0,
                divisor: 1.0,
                zeros: Zeros::All(0),
                groups,
                mask: None,
                round,
            },
        ))
    }

    /// Signed bytes: bitsandbytes with `SCB` (the largest magnitude of each output), or format
    /// `int-quantized` of compressed-tensors.
    pub(super) fn int8(&self, t: &'a Tensor) -> Result<(Matrix<'a>, &'a Tensor)> {
        let (rows, cols) = self.shape(t)?;
        let scb = self.get("SCB");
        let Some(scale) = scb.or(self.get("weight_scale")) else {
            return Err(self.unreadable(t, "I8 without SCB or weight_scale"));
        };
        let (scales, round, groups) = self.by_scale(scale, rows, cols, self.block())?;
        let zeros = match self.get("weight_zero_point") {
            Some(z) if groups.rows == 1 => {
                Zeros::Bytes(self.exact(z, &["I8"], rows * (cols / groups.cols))?)
            }
            Some(z) => return Err(self.unreadable(z, "one zero point for several outputs")),
            None => Zeros::All(0),
        };
        Ok(self.matrix(
            t,
            Packed {
                name: if scb.is_some() { "INT8 (bitsandbytes)" } else { "INT8" },
                rows,
                cols,
                bits: 8,
                layout: Layout::Bytes,
                levels: Levels::Signed,
                scales,
                factor: if scb.is_some() { 1.0 / 127.0 } else { 1.0 },
                divisor: 1.0,
                zeros,
                groups,
                mask: None,
                round,
            },
        ))
    }

    /// NF4 and FP4 of bitsandbytes: `weight` `[rows · cols / 2, 1]`; `absmax`, a scale for each
    /// block, itself quantized if there is a `nested_absmax`; `quant_map`, the levels; and
    /// `quant_state`, JSON.
    pub(super) fn bitsandbytes(&self, t: &'a Tensor) -> Result<(Matrix<'a>, &'a Tensor)> {
        let states =
            ["nf4", "fp4"].map(|k| (k, self.get(&format!("weight.quant_state.bitsandbytes__{k}"))));
        let Some((kind, Some(state))) = states.into_iter().find(|s| s.1.is_some()) else {
            return Err(self.unreadable(t, "U8"));
        };
        let json: Value = serde_json::from_slice(self.bytes(state))
            .map_err(|e| self.wrong(&format!("tensor {} is not JSON: {e}", state.name)))?;
        let number = |key: &str| json[key].as_u64().map(|n| n as usize).filter(|&n| n > 0);
        let (Some(rows), Some(cols), Some(block)) =
            (json["shape"][0].as_u64(), json["shape"][1].as_u64(), number("blocksize"))
        else {
            return Err(self.wrong(&format!("tensor {} lacks shape or blocksize", state.name)));
        };
        let (rows, cols) = (rows as usize, cols as usize);
        let elements = rows.checked_mul(cols).unwrap_or(0);
        self.exact(t, &["U8"], elements / 2)?;
        if elements == 0 || !cols.is_multiple_of(block) {
            return Err(self.unreadable(t, &format!("rows of {cols} in blocks of {block}")));
        }
        let absmax = self.need("weight.absmax")?;
        let n = elements / block;
        let scales = match self.get("weight.nested_absmax") {
            Some(nested) => {
                let of = number("nested_blocksize").unwrap_or(256);
                Numbers::Nested {
                    codes: self.exact(absmax, &["U8"], n)?,
                    table: self.exact(self.need("weight.nested_quant_map")?, &["F32"], 256)?,
                    scales: self.exact(nested, &["F32"], n.div_ceil(of))?,
                    block: of,
                    offset: json["nested_offset"].as_f64().unwrap_or(0.0) as f32,
                }
            }
            None => Numbers::Plain(Encoding::F32, self.exact(absmax, &["F32"], n)?),
        };
        let map = self.exact(self.need("weight.quant_map")?, &["F32"], 16)?;
        let mut levels: Vec<(f32, u8)> = map
            .chunks_exact(4)
            .zip(0..)
            .map(|(b, i)| (f32::from_le_bytes([b[0], b[1], b[2], b[3]]), i))
            .collect();
        levels.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (mut table, mut stored) = ([0.0; 16], [0; 16]);
        for (code, (level, number)) in levels.into_iter().enumerate() {
            (table[code], stored[code]) = (level, number);
        }
        Ok(self.matrix(
            t,
            Packed {
                name: if kind == "nf4" { "NF4 (bitsandbytes)" } else { "FP4 (bitsandbytes)" },
                rows,
                cols,
                bits: 4,
                layout: Layout::Nibbles,
                levels: Levels::Table(table, stored),
                scales,
                factor: 1.0,
                divisor: 1.0,
                zeros: Zeros::All(0),
                groups: Groups {
                    rows: 1,
                    cols: block,
                    by_row: cols / block,
                    by_group: 1,
                    index: None,
                },
                mask: None,
                round: match json["dtype"].as_str() {
                    Some("float16") => Encoding::F16,
                    Some("bfloat16") => Encoding::BF16,
                    _ => Encoding::F32,
                },
            },
        ))
    }
}
