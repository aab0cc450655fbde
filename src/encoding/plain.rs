//! Floats: a block is one element, and its code is its bit pattern in numerical order.

use super::block::{Codec, Codes};
use super::{Encoding, Params};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct BF16;

/// A code's place: negative floats run backwards in their bits, so all but the sign is inverted.
/// −0.0 becomes −1 and +0.0 becomes 0; the map is its own inverse, NaNs included.
const fn order32(bits: i32) -> i32 {
    bits ^ ((bits >> 31) & i32::MAX)
}

const fn order16(bits: i16) -> i16 {
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
            *code = order32(i32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        }
        params.fill(UNSCALED);
    }
    fn pack(&self, bytes: &mut [u8], codes: &[i32]) {
        for (&code, b) in codes.iter().zip(bytes.chunks_exact_mut(4)) {
            b.copy_from_slice(&order32(code).to_le_bytes());
        }
    }
}

/// F16 and BF16 differ in `decode` alone.
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
                    *code = order16(i16::from_le_bytes([b[0], b[1]])).into();
                }
                params.fill(UNSCALED);
            }
            fn pack(&self, bytes: &mut [u8], codes: &[i32]) {
                for (&code, b) in codes.iter().zip(bytes.chunks_exact_mut(2)) {
                    b.copy_from_slice(&order16(code as i16).to_le_bytes());
                }
            }
        }
    };
}
two_bytes!(F16, decode_f16);
two_bytes!(BF16, decode_bf16);

const UNSCALED: Params = Params { scale: 1.0, offset: -0.0 };

fn decode_f16(bytes: &[u8], out: &mut [f32]) {
    // Mapped bytes need not be aligned: they go through a buffer that is.
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

/// The place of a float's bits in numerical order.
pub(super) fn order(encoding: Encoding, bits: u32) -> i32 {
    match encoding {
        Encoding::F16 | Encoding::BF16 => order16(bits as u16 as i16).into(),
        _ => order32(bits as i32),
    }
}

/// The bits at a place.
pub(super) fn bits(encoding: Encoding, code: i32) -> u32 {
    match encoding {
        Encoding::F16 | Encoding::BF16 => (order16(code as i16) as u16).into(),
        _ => order32(code) as u32,
    }
}

/// The float that has this code. Only for the three float encodings, as the functions below.
pub(super) fn value(encoding: Encoding, code: i32) -> f32 {
    match encoding {
        Encoding::F16 => f16::from_bits(order16(code as i16) as u16).to_f32(),
        Encoding::BF16 => f32::from_bits((order16(code as i16) as u16 as u32) << 16),
        _ => f32::from_bits(order32(code) as u32),
    }
}

/// The code of the nearest finite float, ties to even; the largest for a NaN.
pub(super) fn nearest(encoding: Encoding, x: f32) -> i32 {
    let code = match encoding {
        Encoding::F16 => order16(f16::from_f32(x).to_bits() as i16).into(),
        Encoding::BF16 => order16(bf16::from_f32(x).to_bits() as i16).into(),
        _ => order32(x.to_bits() as i32),
    };
    let (low, high) = code_range(encoding);
    code.clamp(low, high)
}

pub(super) fn code_range(encoding: Encoding) -> (i32, i32) {
    let high = match encoding {
        Encoding::F16 => f16::MAX.to_bits().into(),
        Encoding::BF16 => bf16::MAX.to_bits().into(),
        _ => f32::MAX.to_bits() as i32,
    };
    (!high, high)
}
