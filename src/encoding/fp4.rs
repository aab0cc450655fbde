//! MXFP4 and NVFP4: 4-bit floats (OCP's E2M1), in a block that has its scale before them. Levels
//! are twice the floats', scales half.
//!
//! Nibbles are sign and magnitude; a code is a float's place in numerical order, as with wider
//! floats: −0 is −1 and +0 is 0.

use super::block::{Block, Plane};
use super::decode::{groups, scale_only};
use super::Params;

/// A level for each nibble.
const LEVELS: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// An exponent (E8M0); 16 bytes of nibbles.
pub(super) struct MXFP4;
/// A scale (unsigned E4M3) per 16 of 64 elements; 32 bytes of nibbles.
pub(super) struct NVFP4;

impl Block<17, 1> for MXFP4 {
    const LOW: Plane = Plane { at: 1, bits: 4, run: 16 };
    const LEVELS: Option<&'static [i8; 16]> = Some(&LEVELS);
    const SIGN: bool = true;
    #[inline(always)]
    fn params(block: &[u8; 17]) -> [Params; 1] {
        [scale_only(half_of_exponent(block[0]))]
    }
}

impl Block<36, 4> for NVFP4 {
    const LOW: Plane = Plane { at: 4, bits: 4, run: 8 };
    const LEVELS: Option<&'static [i8; 16]> = Some(&LEVELS);
    const SIGN: bool = true;
    #[inline(always)]
    fn params(block: &[u8; 36]) -> [Params; 4] {
        groups(
            #[inline(always)]
            |g| scale_only(half_of_scale(block[g])),
        )
    }
}

/// 2^(e − 128).
#[inline(always)]
fn half_of_exponent(e: u8) -> f32 {
    f32::from_bits(match e {
        // Below 2^−126 a float has no exponent of its own.
        0 | 1 => 0x0020_0000 << e,
        _ => u32::from(e - 1) << 23,
    })
}

/// Half of an unsigned E4M3 number. What would be NaN is 0; the sign bit is not looked at.
#[inline(always)]
fn half_of_scale(bits: u8) -> f32 {
    let (exponent, mantissa) = ((bits >> 3) & 15, f32::from(bits & 7));
    match (bits, exponent) {
        (0x7f, _) => 0.0,
        (_, 0) => mantissa / 1024.0,
        // 2^(exponent − 8).
        _ => (1.0 + mantissa / 8.0) * f32::from_bits((u32::from(exponent) + 119) << 23),
    }
}

/// The level of a code.
pub(super) fn level(code: i32) -> f32 {
    LEVELS[usize::from(super::block::sign_and_magnitude(code))].into()
}

/// The code whose level is nearest; the lowest for a NaN.
pub(super) fn nearest(x: f32) -> i32 {
    (-8..7).filter(|&code| 2.0 * x > level(code) + level(code + 1)).count() as i32 - 8
}

/// The codes of elements under a scale: of two levels equally near the one that llama.cpp finds
/// first, from 0 up, then from −1 down.
fn codes(x: &[f32], scale: f32) -> impl Iterator<Item = i32> + '_ {
    x.iter().map(move |x| {
        let mut best = (f32::INFINITY, 0);
        for code in (0..8).chain((-8..0).rev()) {
            let error = (level(code) * scale - x).abs();
            if error < best.0 {
                best = (error, code);
            }
        }
        best.1
    })
}

fn peak(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |a, x| a.max(x.abs()))
}

/// Writes the exponent of one MXFP4 block and returns its codes: the largest element gets the
/// floats' largest exponent.
pub(super) fn encode_mx(x: &[f32], block: &mut [u8]) -> Vec<i32> {
    let peak = peak(x);
    block[0] = if peak > 0.0 { (peak.log2().floor() + 125.0) as u8 } else { 0 };
    codes(x, half_of_exponent(block[0])).collect()
}

/// Writes the scales of one NVFP4 block and returns its codes: the largest element of a group gets
/// the largest float.
pub(super) fn encode_nv(x: &[f32], block: &mut [u8]) -> Vec<i32> {
    let mut out = Vec::with_capacity(x.len());
    for (x, scale) in x.chunks_exact(16).zip(block) {
        *scale = scale_of(peak(x) / 6.0);
        out.extend(codes(x, half_of_scale(*scale)));
    }
    out
}

/// The E4M3 number nearest to `x` ≥ 0, halves up; at most 448.
fn scale_of(x: f32) -> u8 {
    let exponent = (x.to_bits() >> 23) as i32 - 120;
    match exponent {
        // Steps of 2^−9; the last of them would be a number with an exponent, which llama.cpp
        // doesn't take.
        ..=0 => ((x * 512.0 + 0.5) as u8).min(7),
        1..15 => {
            // Three bits of mantissa, rounded by the one behind; a carry goes on into the exponent.
            let bits = ((x.to_bits() >> 19) + 1) >> 1;
            (bits as i32 - (120 << 3)).min(0x7e) as u8
        }
        _ => 0x7e,
    }
}
