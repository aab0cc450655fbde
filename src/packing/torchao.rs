//! The packing of torchao, as transformers saves it: `_weight_qdata`, `_weight_scale` and
//! `_weight_zero_point`.

use super::Module;
use crate::checkpoint::Tensor;
use crate::encoding::packed::{Layout, Levels, Packed, Zeros};
use crate::encoding::Fp8;
use crate::error::Result;
use crate::weights::Matrix;

impl<'a> Module<'a, '_> {
    /// `Int8Tensor`, `Float8Tensor` and `IntxUnpackedToInt8Tensor`, which store one element per
    /// byte. There is a scale for the whole tensor, for each output, for each group of inputs, or
    /// for each block. Values are rounded to the model's float type.
    pub(super) fn torchao(&self, t: &'a Tensor) -> Result<(Matrix<'a>, &'a Tensor)> {
        let kind = t.type_name();
        let levels = match kind.as_str() {
            "F8_E4M3" => Levels::Float(Fp8::E4M3),
            "F8_E5M2" => Levels::Float(Fp8::E5M2),
            "I8" => Levels::Signed,
            _ => return Err(self.unreadable(t, &format!("torchao, codes in {kind}"))),
        };
        if let Some(scale) = self.get("_weight_act_pre_scale") {
            return Err(self.unreadable(scale, "torchao, inputs that are scaled"));
        }
        let (rows, cols) = self.shape(t)?;
        let scale = self.need("_weight_scale")?;
        let block = match scale.dims[..] {
            [across, down] if across > 0 && down > 0 => {
                (rows.div_ceil(down as usize), cols.div_ceil(across as usize))
            }
            _ => (rows, cols),
        };
        let (scales, _, groups) = self.by_scale(scale, rows, cols, block)?;
        let zeros = match self.get("_weight_zero_point") {
            Some(z) if z.type_name() == "I8" && groups.rows == 1 => {
                Zeros::Bytes(self.exact(z, &["I8"], scale.elements() as usize)?)
            }
            Some(z) => {
                return Err(
                    self.unreadable(z, "torchao, zero points that are no bytes of an output")
                )
            }
            None => Zeros::All(0),
        };
        Ok(self.matrix(
            t,
            Packed {
                name: if kind == "I8" { "INT8 (torchao)" } else { "FP8 (torchao)" },
                rows,
                cols,
                bits: if kind == "I8" { self.intx_bits() } else { 8 },
                layout: Layout::Bytes,
                levels,
                scales,
                factor: 1.0,
                divisor: 1.0,
                zeros,
                groups,
                mask: None,
                round: self.dtype(),
            },
        ))
    }

    /// The bits of a code: the narrowest `weight_dtype` in the configuration. A byte may hold a
    /// code of fewer than eight bits.
    fn intx_bits(&self) -> u32 {
        fn least(v: &serde_json::Value) -> u32 {
            match v {
                serde_json::Value::Object(map) => {
                    let own =
                        map.get("weight_dtype").and_then(|d| d["_data"].as_str().or(d.as_str()));
                    let own = own.and_then(|d| {
                        d.trim_start_matches("torch.").strip_prefix("int")?.parse().ok()
                    });
                    map.values().map(least).chain(own).min().unwrap_or(8)
                }
                serde_json::Value::Array(list) => list.iter().map(least).min().unwrap_or(8),
                _ => 8,
            }
        }
        least(self.config).clamp(1, 8)
    }
}
