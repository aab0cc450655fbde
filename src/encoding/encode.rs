//! Quantizes from scratch. Only tensors that are new or change their encoding need this: a fold
//! steps existing codes.

use super::{fp4, iquant, Encoding};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::{bf16, f16};

/// Encodes whole blocks. Callers have checked the lengths of the slices.
pub(super) fn encode(encoding: Encoding, values: &[f32], out: &mut [u8]) {
    let dtype = match encoding {
        Encoding::F32 => return each(values, out, |x| x.to_le_bytes()),
        Encoding::F16 => return each(values, out, |x| f16::from_f32(x).to_le_bytes()),
        Encoding::BF16 => return each(values, out, |x| bf16::from_f32(x).to_le_bytes()),
        Encoding::Q8_0 => return blocks(encoding, values, out, q8_0),
        Encoding::IQ4NL => return blocks(encoding, values, out, iquant::encode_nl),
        Encoding::IQ4XS => return blocks(encoding, values, out, iquant::encode_xs),
        Encoding::MXFP4 => return blocks(encoding, values, out, fp4::encode_mx),
        Encoding::NVFP4 => return blocks(encoding, values, out, fp4::encode_nv),
        Encoding::Q4_0 => GgmlDType::Q4_0,
        Encoding::Q4_1 => GgmlDType::Q4_1,
        Encoding::Q5_0 => GgmlDType::Q5_0,
        Encoding::Q5_1 => GgmlDType::Q5_1,
        Encoding::Q2K => GgmlDType::Q2K,
        Encoding::Q3K => GgmlDType::Q3K,
        Encoding::Q4K => GgmlDType::Q4K,
        Encoding::Q5K => GgmlDType::Q5K,
        Encoding::Q6K => GgmlDType::Q6K,
        Encoding::IQ1S
        | Encoding::IQ1M
        | Encoding::IQ2XXS
        | Encoding::IQ2XS
        | Encoding::IQ2S
        | Encoding::IQ3XXS
        | Encoding::IQ3S
        | Encoding::TQ1_0
        | Encoding::TQ2_0 => encoding.no_codes(),
    };
    let quantized = Tensor::from_slice(values, values.len(), &Device::Cpu)
        .and_then(|t| QTensor::quantize(&t, dtype))
        .expect("whole blocks on the CPU");
    out.copy_from_slice(&quantized.data().expect("data on the CPU"));
}

/// Encodes floats one by one, `N` bytes each.
fn each<const N: usize>(values: &[f32], out: &mut [u8], bytes: impl Fn(f32) -> [u8; N]) {
    for (out, &x) in out.chunks_exact_mut(N).zip(values) {
        out.copy_from_slice(&bytes(x));
    }
}

/// Encodes block by block. `quantize` writes the scales of a block and returns its codes.
fn blocks(
    e: Encoding,
    values: &[f32],
    out: &mut [u8],
    quantize: fn(&[f32], &mut [u8]) -> Vec<i32>,
) {
    for (x, block) in values.chunks_exact(e.block_len()).zip(out.chunks_exact_mut(e.block_bytes()))
    {
        let codes = quantize(x, block);
        e.pack(block, &codes);
    }
}

/// Writes the scale of one Q8_0 block and returns its codes. As in llama.cpp's reference, the codes
/// are computed from the scale before it is rounded, and ties are rounded away from zero.
fn q8_0(x: &[f32], block: &mut [u8]) -> Vec<i32> {
    let d = x.iter().fold(0.0_f32, |a, x| a.max(x.abs())) / 127.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    block[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    x.iter().map(|x| (x * inverse).round() as i8 as i32).collect()
}
