//! The k-quants: super-blocks of 256 elements, with one or two half-precision scales, and a small
//! integer scale for each group.
//!
//! A half-precision scale has 11 significant bits, a group's scale 7, a code 5. Every product of
//! the three is exact in an `f32`, in any order. Only the subtraction of a minimum rounds. So
//! machines with and without fused multiply-add give the same values.

use super::block::{Block, Plane};
use super::decode::{groups, half_at};
use super::whole::{Scales, Units};

/// Block layout: 16 bytes with a scale in the low nibble and a minimum in the high nibble; 64 bytes
/// of 2-bit codes; d, dmin.
pub(super) struct Q2K;
/// Block layout: 32 bytes of the codes' third bits; 64 bytes of their low two bits; 12 bytes of
/// 6-bit scales; d.
pub(super) struct Q3K;
/// Block layout: d, dmin; 12 bytes of 6-bit scales and minimums; 128 bytes of nibbles.
pub(super) struct Q4K;
/// Block layout: d, dmin; 12 bytes of 6-bit scales and minimums; 32 bytes of the codes' fifth bits;
/// 128 bytes of their low four bits.
pub(super) struct Q5K;
/// Block layout: 128 bytes of the codes' low four bits; 64 bytes of their top two bits; 16 signed
/// scales; d.
pub(super) struct Q6K;

impl Block<84, 16> for Q2K {
    const LOW: Plane = Plane { at: 16, bits: 2, run: 32 };
    const OFFSET: bool = true;
    #[inline(always)]
    fn scales(block: &[u8; 84]) -> Scales<16> {
        Scales::Whole(Units {
            scale: half_at(block, 80),
            minimum: half_at(block, 82),
            unit: groups(
                #[inline(always)]
                |g| (block[g] & 15).into(),
            ),
            least: groups(
                #[inline(always)]
                |g| (block[g] >> 4).into(),
            ),
        })
    }
}

impl Block<110, 16> for Q3K {
    const LOW: Plane = Plane { at: 32, bits: 2, run: 32 };
    const HIGH: Option<Plane> = Some(Plane { at: 0, bits: 1, run: 32 });
    const BIAS: u8 = 4;
    #[inline(always)]
    fn scales(block: &[u8; 110]) -> Scales<16> {
        let (d, packed) = (half_at(block, 108), &block[96..108]);
        Scales::scale_only(
            d,
            groups(
                #[inline(always)]
                |g| {
                    // The scales' low four bits: bytes 0..8, laid out as a plane of run 8. Their
                    // top two bits: bytes 8..12, a plane of run 4.
                    let low = (packed[g % 8] >> (4 * (g / 8))) & 15;
                    let high = (packed[8 + g % 4] >> (2 * (g / 4))) & 3;
                    i16::from(low | (high << 4)) - 32
                },
            ),
        )
    }
}

/// The scales of Q4_K and Q5_K, whose blocks begin alike: d, dmin, then a 6-bit scale and a
/// 6-bit minimum for each of eight groups, packed into 12 bytes. Groups 0..4: the scales are the
/// low six bits of bytes 0..4, the minimums those of bytes 4..8. Groups 4..8: bytes 8..12 hold the
/// low four bits of a scale in the low nibble and those of a minimum in the high nibble; the top
/// two bits are the top bits of bytes 0..4 (scales) and 4..8 (minimums).
#[inline(always)]
fn scales_and_minimums(block: &[u8]) -> Scales<8> {
    let packed = &block[4..16];
    Scales::Whole(Units {
        scale: half_at(block, 0),
        minimum: half_at(block, 2),
        unit: groups(
            #[inline(always)]
            |g| {
                match g {
                    0..4 => packed[g] & 63,
                    _ => (packed[g + 4] & 15) + (packed[g - 4] >> 6 << 4),
                }
                .into()
            },
        ),
        least: groups(
            #[inline(always)]
            |g| {
                match g {
                    0..4 => packed[g + 4] & 63,
                    _ => (packed[g + 4] >> 4) + (packed[g] >> 6 << 4),
                }
                .into()
            },
        ),
    })
}

impl Block<144, 8> for Q4K {
    const LOW: Plane = Plane { at: 16, bits: 4, run: 32 };
    const OFFSET: bool = true;
    #[inline(always)]
    fn scales(block: &[u8; 144]) -> Scales<8> {
        scales_and_minimums(block)
    }
}

impl Block<176, 8> for Q5K {
    const LOW: Plane = Plane { at: 48, bits: 4, run: 32 };
    const HIGH: Option<Plane> = Some(Plane { at: 16, bits: 1, run: 32 });
    const OFFSET: bool = true;
    #[inline(always)]
    fn scales(block: &[u8; 176]) -> Scales<8> {
        scales_and_minimums(block)
    }
}

impl Block<210, 16> for Q6K {
    const LOW: Plane = Plane { at: 0, bits: 4, run: 64 };
    const HIGH: Option<Plane> = Some(Plane { at: 128, bits: 2, run: 32 });
    const BIAS: u8 = 32;
    #[inline(always)]
    fn scales(block: &[u8; 210]) -> Scales<16> {
        Scales::scale_only(
            half_at(block, 208),
            groups(
                #[inline(always)]
                |g| i16::from(block[192 + g] as i8),
            ),
        )
    }
}
