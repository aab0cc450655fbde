//! From whole blocks to floats, for every encoding that has blocks.

use super::Params;
use std::marker::PhantomData;

/// What decoding reads in a block of `N` bytes: a level for each of its `L` elements, and the
/// parameters of each of its `G` groups.
pub(super) trait Levels<const L: usize, const N: usize, const G: usize> {
    /// What `stored` gives is level + BIAS (mod 256).
    const BIAS: u8 = 0;
    /// The levels, where `stored` gives places in a table.
    const TABLE: Option<&'static [i8; 16]> = None;
    /// Whether the parameters have an offset: an addition saved where they have none.
    const OFFSET: bool = false;

    fn stored(block: &[u8; N], levels: &mut [u8; L]);
    fn params(block: &[u8; N]) -> [Params; G];
}

/// Decodes whole blocks; the slices' lengths have been checked.
pub(super) fn decode<B, const L: usize, const N: usize, const G: usize>(
    bytes: &[u8],
    out: &mut [f32],
) where
    B: Levels<L, N, G>,
{
    let decoding =
        Decoding::<B, L, N, G> { blocks: bytemuck::cast_slice(bytes), out, levels: PhantomData };
    pulp::Arch::new().dispatch(decoding);
}

/// Elements decoded at a time: their levels and values stay in the first-level cache.
const TILE: usize = 2048;

/// The decoding loops, compiled for AVX2 and AVX-512 too.
///
/// Plain loops over a block decode 25 or 0.4 billion elements a second, by how far the optimizer
/// unrolls them. These do 4 to 13 with vectors, 2 to 7 without: levels are gathered eight to an
/// integer, converted in loops too long to unroll, and scaled in explicit vectors.
struct Decoding<'a, B, const L: usize, const N: usize, const G: usize> {
    blocks: &'a [[u8; N]],
    out: &'a mut [f32],
    levels: PhantomData<B>,
}

impl<B: Levels<L, N, G>, const L: usize, const N: usize, const G: usize> pulp::WithSimd
    for Decoding<'_, B, L, N, G>
{
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, simd: S) {
        let mut buffer = [0; TILE];
        for (blocks, out) in self.blocks.chunks(TILE / L).zip(self.out.chunks_mut(TILE)) {
            let levels = &mut buffer[..out.len()];
            for (block, levels) in blocks.iter().zip(bytemuck::cast_slice_mut(levels)) {
                B::stored(block, levels);
            }
            if let Some(table) = B::TABLE {
                levels.iter_mut().for_each(|level| *level = look_up(table, *level));
            }
            for (y, level) in out.iter_mut().zip(levels.iter()) {
                *y = (level.wrapping_sub(B::BIAS) as i8).into();
            }
            for (block, out) in blocks.iter().zip(out.chunks_exact_mut(L)) {
                for (group, p) in out.chunks_exact_mut(L / G).zip(&B::params(block)) {
                    let (scale, offset) = (simd.splat_f32s(p.scale), simd.splat_f32s(p.offset));
                    // Groups are multiples of 16, the widest vector: nothing is left over.
                    for y in S::as_mut_simd_f32s(group).0 {
                        let scaled = simd.mul_f32s(scale, *y);
                        *y = if B::OFFSET { simd.add_f32s(scaled, offset) } else { scaled };
                    }
                }
            }
        }
    }
}

/// `table[place]` as the sum of the gaps below: unlike a load, this runs on whole vectors.
#[inline(always)]
fn look_up(table: &[i8; 16], place: u8) -> u8 {
    let mut level = table[0] as u8;
    for i in 1..16 {
        let gap = table[i].wrapping_sub(table[i - 1]) as u8;
        level = level.wrapping_add(if place >= i as u8 { gap } else { 0 });
    }
    level
}

/// `std::array::from_fn`, which is not inlined into code for other instruction sets.
#[inline(always)]
pub(super) fn groups<const G: usize>(f: impl Fn(usize) -> Params) -> [Params; G] {
    let mut out = [Params::default(); G];
    for (g, p) in out.iter_mut().enumerate() {
        *p = f(g);
    }
    out
}

/// The half-precision float at byte `at`.
#[inline(always)]
pub(super) fn half_at(block: &[u8], at: usize) -> f32 {
    half::f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Parameters without an offset.
#[inline(always)]
pub(super) fn scale_only(scale: f32) -> Params {
    Params { scale, offset: -0.0 }
}

/// One in each byte of a word.
pub(super) const EACH: u64 = 0x0101_0101_0101_0101;

/// The eight bits of a byte, one per byte: copies of it, masked to one bit each, which 0x7f then
/// carries to the top.
#[inline(always)]
pub(super) fn spread(byte: u8) -> u64 {
    let alone = (byte as u64 * EACH) & 0x8040_2010_0804_0201;
    ((alone + 0x7f * EACH) >> 7) & EACH
}
