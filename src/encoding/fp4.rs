//! MXFP4 and NVFP4: a block holds its scales, then 4-bit floats (OCP's E2M1). Levels here are twice
//! the floats, and scales are halved, so that levels are whole numbers.
//!
//! A nibble stores sign and magnitude. A code is the float's rank in numerical order, as for wider
//! floats: −0.0 has code −1 and +0.0 has code 0.

use super::block::{Block, Plane};
use super::decode::groups;
use super::whole::Scales;

/// The level of each nibble.
const LEVELS: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Block layout: an exponent (E8M0); 16 bytes of nibbles.
pub(super) struct MXFP4;
/// Block layout: 4 scales (unsigned E4M3), each of 16 elements; 32 bytes of nibbles.
pub(super) struct NVFP4;

impl Block<17, 1> for MXFP4 {
    const LOW: Plane = Plane { at: 1, bits: 4, run: 16 };
    const LEVELS: Option<&'static [i8; 16]> = Some(&LEVELS);
    const SIGN: bool = true;
    #[inline(always)]
    fn scales(block: &[u8; 17]) -> Scales<1> {
        Scales::scale_only(half_of_exponent(block[0]), [1])
    }
}

impl Block<36, 4> for NVFP4 {
    const LOW: Plane = Plane { at: 4, bits: 4, run: 8 };
    const LEVELS: Option<&'static [i8; 16]> = Some(&LEVELS);
    const SIGN: bool = true;
    const WHOLE: bool = false;
    #[inline(always)]
    fn scales(block: &[u8; 36]) -> Scales<4> {
        Scales::Floats(groups(
            #[inline(always)]
            |g| half_of_scale(block[g]),
        ))
    }
}

/// Half of the scale 2^(e − 127), which is 2^(e − 128).
#[inline(always)]
fn half_of_exponent(e: u8) -> f32 {
    f32::from_bits(match e {
        // Floats below 2^−126 are subnormal.
        0 | 1 => 0x0020_0000 << e,
        _ => u32::from(e - 1) << 23,
    })
}

/// Half of an unsigned E4M3 number. The bits of NaN, 0x7f, give 0. The sign bit is ignored.
#[inline(always)]
fn half_of_scale(bits: u8) -> f32 {
    let (exponent, mantissa) = ((bits >> 3) & 15, f32::from(bits & 7));
    match (bits, exponent) {
        (0x7f, _) => 0.0,
        (_, 0) => mantissa / 1024.0,
        // The power of two is 2^(exponent − 8).
        _ => (1.0 + mantissa / 8.0) * f32::from_bits((u32::from(exponent) + 119) << 23),
    }
}

/// The level of a code.
pub(super) fn level(code: i32) -> f32 {
    LEVELS[usize::from(super::block::to_sign_and_magnitude(code))].into()
}

/// The code whose level is nearest to `x`; the lowest code for a NaN.
pub(super) fn nearest(x: f32) -> i32 {
    (-8..7).filter(|&code| 2.0 * x > level(code) + level(code + 1)).count() as i32 - 8
}

/// The codes of the elements `x` under a scale. Of two equally near levels, the one that llama.cpp
/// tries first wins: codes 0 to 7, then −1 down to −8.
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

/// The largest magnitude among the elements.
fn peak(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |a, x| a.max(x.abs()))
}

/// Writes the exponent of one MXFP4 block and returns its codes. The block's largest element gets
/// the largest exponent of a 4-bit float.
pub(super) fn encode_mx(x: &[f32], block: &mut [u8]) -> Vec<i32> {
    let peak = peak(x);
    block[0] = if peak > 0.0 { (peak.log2().floor() + 125.0) as u8 } else { 0 };
    codes(x, half_of_exponent(block[0])).collect()
}

/// Writes the scales of one NVFP4 block and returns its codes. The largest element of each group
/// gets the largest 4-bit float.
pub(super) fn encode_nv(x: &[f32], block: &mut [u8]) -> Vec<i32> {
    let mut out = Vec::with_capacity(x.len());
    for (x, scale) in x.chunks_exact(16).zip(block) {
        *scale = scale_of(peak(x) / 6.0);
        out.extend(codes(x, half_of_scale(*scale)));
    }
    out
}

/// The bits of the E4M3 number nearest to `x` ≥ 0, at most 448. Ties are rounded up.
fn scale_of(x: f32) -> u8 {
    let exponent = (x.to_bits() >> 23) as i32 - 120;
    match exponent {
        // Subnormal numbers: 0 to 7 times 2^−9. llama.cpp doesn't round up to the smallest normal
        // number, 8 times 2^−9.
        ..=0 => ((x * 512.0 + 0.5) as u8).min(7),
        1..15 => {
            // Three bits of mantissa, rounded by the next bit. A carry goes on into the exponent.
            let bits = ((x.to_bits() >> 19) + 1) >> 1;
            (bits as i32 - (120 << 3)).min(0x7e) as u8
        }
        _ => 0x7e,
    }
}
