//! Floats: a block is one element, and the code of a float is its rank in numerical order.

use super::block::{Codec, Codes};
use super::{Encoding, Params};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct BF16;

/// Maps a float's bits to its code. The bits of negative floats ascend as the floats descend, so
/// all bits but the sign are inverted. −0.0 gets code −1 and +0.0 gets code 0. The map is its own
/// inverse, for NaNs too.
const fn reorder32(bits: i32) -> i32 {
    bits ^ ((bits >> 31) & i32::MAX)
}

/// [`reorder32`] for 16-bit floats.
const fn reorder16(bits: i16) -> i16 {
    bits ^ ((bits >> 15) & i16::MAX)
}

impl Codec for F32 {
    fn geometry(&self) -> (usize, usize) {
        (1, 4)
    }
    fn decode(&self, bytes: &[u8], out: &mut [f32]) {
        for (y, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
            *y = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        }
    }
    fn codes(&self) -> Option<&dyn Codes> {
        Some(self)
    }
}

impl Codes for F32 {
    fn unpack(&self, bytes: &[u8], codes: &mut [i32], params: &mut [Params]) {
        for (code, b) in codes.iter_mut().zip(bytes.chunks_exact(4)) {
            *code = reorder32(i32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        }
        params.fill(UNSCALED);
    }
    fn pack(&self, bytes: &mut [u8], codes: &[i32]) {
        for (&code, b) in codes.iter().zip(bytes.chunks_exact_mut(4)) {
            b.copy_from_slice(&reorder32(code).to_le_bytes());
        }
    }
}

/// Implements F16 and BF16, which differ only in `decode`.
macro_rules! two_bytes {
    ($float:ty, $decode:expr) => {
        impl Codec for $float {
            fn geometry(&self) -> (usize, usize) {
                (1, 2)
            }
            fn decode(&self, bytes: &[u8], out: &mut [f32]) {
                $decode(bytes, out)
            }
            fn codes(&self) -> Option<&dyn Codes> {
                Some(self)
            }
        }

        impl Codes for $float {
            fn unpack(&self, bytes: &[u8], codes: &mut [i32], params: &mut [Params]) {
                for (code, b) in codes.iter_mut().zip(bytes.chunks_exact(2)) {
                    *code = reorder16(i16::from_le_bytes([b[0], b[1]])).into();
                }
                params.fill(UNSCALED);
            }
            fn pack(&self, bytes: &mut [u8], codes: &[i32]) {
                for (&code, b) in codes.iter().zip(bytes.chunks_exact_mut(2)) {
                    b.copy_from_slice(&reorder16(code as i16).to_le_bytes());
                }
            }
        }
    };
}
two_bytes!(F16, decode_f16);
two_bytes!(BF16, decode_bf16);

/// The parameters of every float.
const UNSCALED: Params = Params { scale: 1.0, offset: -0.0 };

fn decode_f16(bytes: &[u8], out: &mut [f32]) {
    // Mapped bytes needn't be aligned, so they are copied into an aligned buffer.
    let mut buffer = [f16::ZERO; 256];
    for (bytes, out) in bytes.chunks(512).zip(out.chunks_mut(256)) {
        let halves = &mut buffer[..out.len()];
        for (h, b) in halves.iter_mut().zip(bytes.chunks_exact(2)) {
            *h = f16::from_le_bytes([b[0], b[1]]);
        }
        halves.convert_to_f32_slice(out);
    }
}

fn decode_bf16(bytes: &[u8], out: &mut [f32]) {
    for (y, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
        *y = f32::from_bits((u16::from_le_bytes([b[0], b[1]]) as u32) << 16);
    }
}

/// The code of a float's bits. This function and those below are only for F32, F16 and BF16.
pub(super) fn code(encoding: Encoding, bits: u32) -> i32 {
    match encoding {
        Encoding::F16 | Encoding::BF16 => reorder16(bits as u16 as i16).into(),
        _ => reorder32(bits as i32),
    }
}

/// The float's bits of a code.
pub(super) fn bits(encoding: Encoding, code: i32) -> u32 {
    match encoding {
        Encoding::F16 | Encoding::BF16 => (reorder16(code as i16) as u16).into(),
        _ => reorder32(code) as u32,
    }
}

/// The float that has this code.
pub(super) fn value(encoding: Encoding, code: i32) -> f32 {
    match encoding {
        Encoding::F16 => f16::from_bits(reorder16(code as i16) as u16).to_f32(),
        Encoding::BF16 => f32::from_bits((reorder16(code as i16) as u16 as u32) << 16),
        _ => f32::from_bits(reorder32(code) as u32),
    }
}

/// The code of the finite float nearest to `x`, ties to even. A NaN gives the highest or the lowest
/// code, by its sign.
pub(super) fn nearest(encoding: Encoding, x: f32) -> i32 {
    let code = match encoding {
        Encoding::F16 => reorder16(f16::from_f32(x).to_bits() as i16).into(),
        Encoding::BF16 => reorder16(bf16::from_f32(x).to_bits() as i16).into(),
        _ => reorder32(x.to_bits() as i32),
    };
    let (low, high) = code_range(encoding);
    code.clamp(low, high)
}

/// The codes of the lowest and the highest finite float.
pub(super) fn code_range(encoding: Encoding) -> (i32, i32) {
    let high = match encoding {
        Encoding::F16 => f16::MAX.to_bits().into(),
        Encoding::BF16 => bf16::MAX.to_bits().into(),
        _ => f32::MAX.to_bits() as i32,
    };
    (!high, high)
}
