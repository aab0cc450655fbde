//! IQ4_NL and IQ4_XS: nibbles that index a table of sixteen unevenly spaced levels.
//!
//! The other i-quants are lattice types, in which one stored code stands for 4 or 8 elements: see
//! [`lattice`](super::lattice).

use super::block::{Block, Plane};
use super::decode::{groups, half_at};
use super::whole::Scales;

/// The levels in ascending order. They lie closer together near zero, where weights are dense.
pub(super) const LEVELS: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Block layout: scale d; 16 bytes of nibbles.
pub(super) struct IQ4NL;
/// Block layout: d; the top two bits of eight scales (u16); the low four bits of the scales (4
/// bytes); 128 bytes of nibbles.
pub(super) struct IQ4XS;

impl Block<18, 1> for IQ4NL {
    const LOW: Plane = Plane { at: 2, bits: 4, run: 16 };
    const LEVELS: Option<&'static [i8; 16]> = Some(&LEVELS);
    #[inline(always)]
    fn scales(block: &[u8; 18]) -> Scales<1> {
        Scales::scale_only(half_at(block, 0), [1])
    }
}

impl Block<136, 8> for IQ4XS {
    const LOW: Plane = Plane { at: 8, bits: 4, run: 16 };
    const LEVELS: Option<&'static [i8; 16]> = Some(&LEVELS);
    #[inline(always)]
    fn scales(block: &[u8; 136]) -> Scales<8> {
        let (d, high) = (half_at(block, 0), u16::from_le_bytes([block[2], block[3]]));
        Scales::scale_only(
            d,
            groups(
                #[inline(always)]
                |g| {
                    let low = (block[4 + g / 2] >> (4 * (g % 2))) & 15;
                    i16::from(low) + 16 * ((high >> (2 * g)) & 3) as i16 - 32
                },
            ),
        )
    }
}

/// The level of a code.
pub(super) fn level(code: i32) -> f32 {
    LEVELS[code as usize & 15].into()
}

/// The code whose level is nearest to `x`; 0 for a NaN.
pub(super) fn nearest(x: f32) -> i32 {
    // Compares with the midpoints. Twice the midpoint between two levels is their sum, an integer.
    LEVELS.windows(2).filter(|w| 2.0 * x > w[0] as f32 + w[1] as f32).count() as i32
}

/// The scale with the least squared error, among scales that put the largest element of `x` near
/// either end of the table.
fn fit(x: &[f32]) -> f32 {
    let peak = x.iter().fold(0.0_f32, |a, &b| if b.abs() > a.abs() { b } else { a });
    if peak == 0.0 {
        return 0.0;
    }
    let mut best = (0.0, peak / LEVELS[0] as f32);
    for end in (-134..=-116).step_by(2).chain((104..=122).step_by(2)) {
        let inverse = end as f32 / peak;
        let (mut xq, mut qq) = (0.0, 0.0);
        for &x in x {
            let q = level(nearest(x * inverse));
            xq += x * q;
            qq += q * q;
        }
        // The scale xq / qq leaves the squared error Σx² − xq² / qq.
        if xq * xq / qq > best.0 {
            best = (xq * xq / qq, xq / qq);
        }
    }
    best.1
}

/// The codes of the elements `x` under a scale.
fn codes(x: &[f32], scale: f32) -> impl Iterator<Item = i32> + '_ {
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    x.iter().map(move |x| nearest(x * inverse))
}

/// Rounds to half precision: the bytes, and their value.
fn half(x: f32) -> ([u8; 2], f32) {
    let h = half::f16::from_f32(x);
    (h.to_le_bytes(), h.to_f32())
}

/// Writes the scale of one IQ4_NL block and returns its codes.
pub(super) fn encode_nl(x: &[f32], block: &mut [u8]) -> Vec<i32> {
    let (bytes, d) = half(fit(x));
    block[..2].copy_from_slice(&bytes);
    codes(x, d).collect()
}

/// Writes the scales of one IQ4_XS block and returns its codes.
pub(super) fn encode_xs(x: &[f32], block: &mut [u8]) -> Vec<i32> {
    let scales: Vec<f32> = x.chunks_exact(32).map(fit).collect();
    let peak = scales.iter().fold(0.0_f32, |a, &b| if b.abs() > a.abs() { b } else { a });
    // A group's scale is stored as −32 to 31. The largest one is stored as −32, the end with one
    // step more.
    let (bytes, d) = half(peak / -32.0);
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    block[..8].fill(0);
    block[..2].copy_from_slice(&bytes);
    let mut out = Vec::with_capacity(x.len());
    for (g, (x, scale)) in x.chunks_exact(32).zip(scales).enumerate() {
        let scale = (scale * inverse).round().clamp(-32.0, 31.0) as i32;
        let stored = (scale + 32) as u8;
        block[2 + g / 4] |= (stored >> 4) << (2 * (g % 4));
        block[4 + g / 2] |= (stored & 15) << (4 * (g % 2));
        out.extend(codes(x, d * scale as f32));
    }
    out
}
