//! The lattice types. A stored code selects a lattice point, which gives the levels of 4 or 8
//! elements; in the ternary types TQ1_0 and TQ2_0, a byte holds base-3 or 2-bit digits.
//!
//! These types can only be decoded. An edit steps codes, and a code here changes several elements
//! at once. The values equal llama.cpp's (ggml/src/ggml-quants.c, `dequantize_row_iq2_xxs` to
//! `_iq1_m`, `_tq1_0`, `_tq2_0`): all products are exact in an `f32`, so their order does not
//! matter.

mod grids;

use super::block::{Codec, Codes, Plane};
use super::decode::{decode, groups, half_at, scale_only, spread, Levels, EACH};
use super::Params;
use std::marker::PhantomData;

/// Number of elements in a block.
const LEN: usize = 256;

/// Block layout: d; for each 32 elements, four points (u8) and a 32-bit word of four sign fields (7
/// bits each) and a scale (4 bits).
pub(super) struct IQ2XXS;
/// Block layout: d; for each 8 elements, a u16 of a point (9 bits) and a sign field (7 bits); for
/// each 16 elements, a scale (4 bits).
pub(super) struct IQ2XS;
/// Block layout: d; the low bytes of 32 points; 32 bytes of signs; the points' upper 2 bits; scales
/// as in IQ2_XS.
pub(super) struct IQ2S;
/// Block layout: d; 64 points (u8); for each 32 elements, a word of signs and scale as in IQ2_XXS.
pub(super) struct IQ3XXS;
/// Block layout: d; the low bytes of 64 points; the points' ninth bits; 32 bytes of signs; for each
/// 32 elements, a scale (4 bits).
pub(super) struct IQ3S;
/// Block layout: d; the low bytes of 32 points; for each 32 elements, a u16 of the points' upper 3
/// bits, a scale (3 bits) and the sign of the shift.
pub(super) struct IQ1S;
/// Block layout: the low bytes of 32 points; for each point, a nibble of its upper 3 bits and the
/// sign of the shift; for each 64 elements, a u16 of four scales (3 bits each) and a nibble of d.
pub(super) struct IQ1M;
/// Block layout: 32 bytes of five base-3 digits, for 160 elements; 16 bytes of five digits, for 80
/// elements; 4 bytes of four digits, for 16 elements; d.
pub(super) struct TQ1;
/// Block layout: 64 bytes of 2-bit digits; d.
pub(super) struct TQ2;

/// The codec of lattice type `B`: blocks of `N` bytes and `LEN` elements, in `G` groups.
pub(super) struct Lattice<B, const N: usize, const G: usize>(PhantomData<B>);

impl<B, const N: usize, const G: usize> Lattice<B, N, G> {
    pub const NEW: Self = Lattice(PhantomData);
}

impl<B: Levels<LEN, N, G>, const N: usize, const G: usize> Codec for Lattice<B, N, G> {
    fn geometry(&self) -> (usize, usize) {
        (LEN, N)
    }

    fn decode(&self, bytes: &[u8], out: &mut [f32]) {
        decode::<B, LEN, N, G>(bytes, out);
    }

    fn codes(&self) -> Option<&dyn Codes> {
        None
    }
}

/// Fills the levels of a block from words of eight levels, one per byte: `word(i)` holds those of
/// the elements `8·i..8·i + 8`.
#[inline(always)]
fn eights(levels: &mut [u8; LEN], word: impl Fn(usize) -> u64) {
    for (i, levels) in levels.chunks_exact_mut(8).enumerate() {
        levels.copy_from_slice(&word(i).to_le_bytes());
    }
}

/// A point with the elements negated whose bit in `signs` is set. No element of a point is zero, so
/// the addition never carries into the next byte.
#[inline(always)]
fn signed(point: u64, signs: u8) -> u64 {
    let minus = spread(signs);
    (point ^ (0xff * minus)) + minus
}

/// Eight signs from the seven that are stored. The eighth makes the number of negative signs even.
#[inline(always)]
fn with_even_parity(signs: u32) -> u8 {
    let seven = signs as u8 & 0x7f;
    seven | ((seven.count_ones() as u8 & 1) << 7)
}

#[inline(always)]
fn u16_at(block: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([block[at], block[at + 1]])
}

#[inline(always)]
fn u32_at(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// The `i`-th nibble, counted from byte `at`.
#[inline(always)]
fn nibble(block: &[u8], at: usize, i: usize) -> u8 {
    (block[at + i / 2] >> (4 * (i % 2))) & 15
}

impl Levels<LEN, 66, 8> for IQ2XXS {
    #[inline(always)]
    fn stored(block: &[u8; 66], levels: &mut [u8; LEN]) {
        eights(
            levels,
            #[inline(always)]
            |i| {
                let (at, l) = (2 + i / 4 * 8, i % 4);
                let signs = with_even_parity(u32_at(block, at + 4) >> (7 * l));
                signed(grids::IQ2_XXS[usize::from(block[at + l])], signs)
            },
        )
    }

    #[inline(always)]
    fn params(block: &[u8; 66]) -> [Params; 8] {
        let d = half_at(block, 0);
        groups(
            #[inline(always)]
            |g| scale_only(d * (0.5 + (block[9 + 8 * g] >> 4) as f32) * 0.25),
        )
    }
}

/// The parameters of IQ2_XS and IQ2_S. Their scales begin at byte `at`.
#[inline(always)]
fn iq2_params(block: &[u8], at: usize) -> [Params; 16] {
    let d = half_at(block, 0);
    groups(
        #[inline(always)]
        |g| scale_only(d * (0.5 + nibble(block, at, g) as f32) * 0.25),
    )
}

impl Levels<LEN, 74, 16> for IQ2XS {
    #[inline(always)]
    fn stored(block: &[u8; 74], levels: &mut [u8; LEN]) {
        eights(
            levels,
            #[inline(always)]
            |i| {
                let code = u16_at(block, 2 + 2 * i);
                let signs = with_even_parity(u32::from(code >> 9));
                signed(grids::IQ2_XS[usize::from(code & 511)], signs)
            },
        )
    }

    #[inline(always)]
    fn params(block: &[u8; 74]) -> [Params; 16] {
        iq2_params(block, 66)
    }
}

impl Levels<LEN, 82, 16> for IQ2S {
    #[inline(always)]
    fn stored(block: &[u8; 82], levels: &mut [u8; LEN]) {
        eights(
            levels,
            #[inline(always)]
            |i| {
                let high = usize::from(block[66 + i / 4] >> (2 * (i % 4))) & 3;
                signed(grids::IQ2_S[usize::from(block[2 + i]) | high << 8], block[34 + i])
            },
        )
    }

    #[inline(always)]
    fn params(block: &[u8; 82]) -> [Params; 16] {
        iq2_params(block, 74)
    }
}

impl Levels<LEN, 98, 8> for IQ3XXS {
    #[inline(always)]
    fn stored(block: &[u8; 98], levels: &mut [u8; LEN]) {
        eights(
            levels,
            #[inline(always)]
            |i| {
                let point = |j: usize| grids::IQ3_XXS[usize::from(block[2 + j])];
                let signs = with_even_parity(u32_at(block, 66 + i / 4 * 4) >> (7 * (i % 4)));
                signed(point(2 * i) | point(2 * i + 1) << 32, signs)
            },
        )
    }

    #[inline(always)]
    fn params(block: &[u8; 98]) -> [Params; 8] {
        let d = half_at(block, 0);
        groups(
            #[inline(always)]
            |g| scale_only(d * (0.5 + (block[69 + 4 * g] >> 4) as f32) * 0.5),
        )
    }
}

impl Levels<LEN, 110, 8> for IQ3S {
    #[inline(always)]
    fn stored(block: &[u8; 110], levels: &mut [u8; LEN]) {
        eights(
            levels,
            #[inline(always)]
            |i| {
                let high = usize::from(block[66 + i / 4] >> (2 * (i % 4)));
                let low = |j: usize| usize::from(block[2 + j]);
                let first = grids::IQ3_S[low(2 * i) | (high & 1) << 8];
                let second = grids::IQ3_S[low(2 * i + 1) | (high & 2) << 7];
                signed(first | second << 32, block[74 + i])
            },
        )
    }

    #[inline(always)]
    fn params(block: &[u8; 110]) -> [Params; 8] {
        let d = half_at(block, 0);
        groups(
            #[inline(always)]
            |g| scale_only(d * f32::from(1 + 2 * nibble(block, 106, g))),
        )
    }
}

/// The levels of a point of the 1-bit types, shifted up or down by an eighth of an element. Levels
/// count eighths, plus `IQ1_BIAS`, so that bytes lie from 0 to 18.
#[inline(always)]
fn shifted(index: usize, down: bool) -> u64 {
    grids::IQ1[index & 2047] + if down { 0 } else { 2 * EACH }
}

/// Added to the levels of the 1-bit types, which run from −9 to 9 eighths.
const IQ1_BIAS: u8 = 9;

/// The parameters of the 1-bit types from a 3-bit scale. A level is an eighth.
#[inline(always)]
fn iq1_params(d: f32, scale: u16) -> Params {
    scale_only(d * f32::from(2 * (scale & 7) + 1) * 0.125)
}

impl Levels<LEN, 50, 8> for IQ1S {
    const BIAS: u8 = IQ1_BIAS;

    #[inline(always)]
    fn stored(block: &[u8; 50], levels: &mut [u8; LEN]) {
        eights(
            levels,
            #[inline(always)]
            |i| {
                let group = usize::from(u16_at(block, 34 + i / 4 * 2));
                let high = (group >> (3 * (i % 4))) & 7;
                shifted(usize::from(block[2 + i]) | high << 8, group >> 15 != 0)
            },
        )
    }

    #[inline(always)]
    fn params(block: &[u8; 50]) -> [Params; 8] {
        let d = half_at(block, 0);
        groups(
            #[inline(always)]
            |g| iq1_params(d, u16_at(block, 34 + 2 * g) >> 12),
        )
    }
}

impl Levels<LEN, 56, 16> for IQ1M {
    const BIAS: u8 = IQ1_BIAS;

    #[inline(always)]
    fn stored(block: &[u8; 56], levels: &mut [u8; LEN]) {
        eights(
            levels,
            #[inline(always)]
            |i| {
                let high = usize::from(nibble(block, 32, i));
                shifted(usize::from(block[i]) | (high & 7) << 8, high >> 3 != 0)
            },
        )
    }

    #[inline(always)]
    fn params(block: &[u8; 56]) -> [Params; 16] {
        let scales = |i: usize| u16_at(block, 48 + 2 * i);
        let d = (0..4).fold(0, |d, i| d | (scales(i) >> 12) << (4 * i));
        let d = half::f16::from_bits(d).to_f32();
        groups(
            #[inline(always)]
            |g| iq1_params(d, scales(g / 4) >> (3 * (g % 4))),
        )
    }
}

impl Levels<LEN, 54, 1> for TQ1 {
    const BIAS: u8 = 1;

    #[inline(always)]
    fn stored(block: &[u8; 54], levels: &mut [u8; LEN]) {
        let (first, rest) = levels.split_at_mut(160);
        let (second, third) = rest.split_at_mut(80);
        digits::<32>(&block[..32], first);
        digits::<16>(&block[32..48], second);
        digits::<4>(&block[48..52], third);
    }

    #[inline(always)]
    fn params(block: &[u8; 54]) -> [Params; 1] {
        [scale_only(half_at(block, 52))]
    }
}

/// The base-3 digits of `R` bytes: the first digit of every byte, then the second of every byte,
/// and so on. A byte is a fraction in units of 1/256. Three times this fraction has the first digit
/// as its whole part.
#[inline(always)]
fn digits<const R: usize>(bytes: &[u8], levels: &mut [u8]) {
    let mut power = 1u8;
    for levels in levels.chunks_exact_mut(R) {
        for (level, byte) in levels.iter_mut().zip(bytes) {
            *level = ((u16::from(byte.wrapping_mul(power)) * 3) >> 8) as u8;
        }
        power = power.wrapping_mul(3);
    }
}

impl Levels<LEN, 66, 1> for TQ2 {
    const BIAS: u8 = 1;

    #[inline(always)]
    fn stored(block: &[u8; 66], levels: &mut [u8; LEN]) {
        const DIGITS: Plane = Plane { at: 0, bits: 2, run: 32 };
        DIGITS.read(block, levels.as_chunks_mut().0, |_, digits| digits);
    }

    #[inline(always)]
    fn params(block: &[u8; 66]) -> [Params; 1] {
        [scale_only(half_at(block, 64))]
    }
}
