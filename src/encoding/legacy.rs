//! llama.cpp's oldest encodings: blocks of 32 elements with one half-precision scale, with or
//! without a minimum.

use super::block::{Block, Plane};
use super::decode::half_at;
use super::whole::{Scales, Units};

/// Block layout: scale d; 16 bytes of nibbles.
pub(super) struct Q4_0;
/// Block layout: scale d, minimum m; 16 bytes of nibbles.
pub(super) struct Q4_1;
/// Block layout: scale d; the codes' fifth bits in element order (4 bytes); 16 bytes of their low
/// four bits.
pub(super) struct Q5_0;
/// Block layout: scale d, minimum m; the codes' fifth bits in element order (4 bytes); 16 bytes of
/// their low four bits.
pub(super) struct Q5_1;
/// Block layout: scale d; 32 signed bytes.
pub(super) struct Q8_0;

const fn nibbles(at: usize) -> Plane {
    Plane { at, bits: 4, run: 16 }
}

const fn fifth_bits(at: usize) -> Option<Plane> {
    Some(Plane { at, bits: 1, run: 1 })
}

impl Block<18, 1> for Q4_0 {
    const LOW: Plane = nibbles(2);
    const BIAS: u8 = 8;
    #[inline(always)]
    fn scales(block: &[u8; 18]) -> Scales<1> {
        Scales::scale_only(half_at(block, 0), [1])
    }
}

impl Block<20, 1> for Q4_1 {
    const LOW: Plane = nibbles(4);
    const OFFSET: bool = true;
    #[inline(always)]
    fn scales(block: &[u8; 20]) -> Scales<1> {
        Scales::Whole(Units {
            scale: half_at(block, 0),
            minimum: -half_at(block, 2),
            unit: [1],
            least: [1],
        })
    }
}

impl Block<22, 1> for Q5_0 {
    const LOW: Plane = nibbles(6);
    const HIGH: Option<Plane> = fifth_bits(2);
    const BIAS: u8 = 16;
    #[inline(always)]
    fn scales(block: &[u8; 22]) -> Scales<1> {
        Scales::scale_only(half_at(block, 0), [1])
    }
}

impl Block<24, 1> for Q5_1 {
    const LOW: Plane = nibbles(8);
    const HIGH: Option<Plane> = fifth_bits(4);
    const OFFSET: bool = true;
    #[inline(always)]
    fn scales(block: &[u8; 24]) -> Scales<1> {
        Scales::Whole(Units {
            scale: half_at(block, 0),
            minimum: -half_at(block, 2),
            unit: [1],
            least: [1],
        })
    }
}

impl Block<34, 1> for Q8_0 {
    const LOW: Plane = Plane { at: 2, bits: 8, run: 32 };
    #[inline(always)]
    fn scales(block: &[u8; 34]) -> Scales<1> {
        Scales::scale_only(half_at(block, 0), [1])
    }
}
