//! Decodes whole blocks to floats, for every encoding that has blocks.

use super::Params;
use std::marker::PhantomData;

/// Reads a block of `N` bytes: a level for each of its `L` elements, and parameters for each of its
/// `G` groups.
pub(super) trait Levels<const L: usize, const N: usize, const G: usize> {
    /// The numbers of `stored` are level + BIAS (mod 256).
    const BIAS: u8 = 0;
    /// A table of levels. With a table, the numbers of `stored` are indices into it.
    const TABLE: Option<&'static [i8; 16]> = None;
    /// Whether the parameters have an offset. Without one, decoding saves an addition.
    const OFFSET: bool = false;

    /// Reads a number for each element of the block, as `BIAS` and `TABLE` describe.
    fn stored(block: &[u8; N], levels: &mut [u8; L]);
    /// The parameters of the block's groups.
    fn params(block: &[u8; N]) -> [Params; G];
}

/// Decodes whole blocks. Callers have checked the lengths of the slices.
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

/// Number of elements that are decoded at a time. Their levels and values fit into the first-level
/// cache.
const TILE: usize = 2048;

/// The decoding loops, compiled for AVX2 and AVX-512 too.
///
/// A plain loop over a block decodes either 25 or 0.4 billion elements a second, depending on how
/// far the optimizer unrolls it. These loops decode 4 to 13 billion with vectors and 2 to 7 billion
/// without. They gather eight levels in one integer, convert levels in loops too long to unroll,
/// and scale in explicit vectors.
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
                    // The widest vector has 16 elements. Groups are multiples of 16, so no element
                    // is left over.
                    for y in S::as_mut_simd_f32s(group).0 {
                        let scaled = simd.mul_f32s(scale, *y);
                        *y = if B::OFFSET { simd.add_f32s(scaled, offset) } else { scaled };
                    }
                }
            }
        }
    }
}

/// `table[index]`, computed as `table[0]` plus the differences between neighbouring levels up to
/// `index`. Unlike a load from the table, this sum can be vectorized.
#[inline(always)]
pub(super) fn look_up(table: &[i8; 16], index: u8) -> u8 {
    let mut level = table[0] as u8;
    for i in 1..16 {
        let difference = table[i].wrapping_sub(table[i - 1]) as u8;
        level = level.wrapping_add(if index >= i as u8 { difference } else { 0 });
    }
    level
}

/// `f` of all groups of a block. Stands in for `std::array::from_fn`, which isn't inlined into
/// functions that are compiled for another instruction set.
#[inline(always)]
pub(super) fn groups<T: Copy + Default, const G: usize>(f: impl Fn(usize) -> T) -> [T; G] {
    let mut out = [T::default(); G];
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

/// A word with 1 in each of its bytes.
pub(super) const EACH: u64 = 0x0101_0101_0101_0101;

/// Spreads the eight bits of `byte` over the eight bytes of a word, as 0 or 1. Every byte of the
/// word gets a copy of `byte` and keeps one bit of it. Adding 0x7f carries that bit to the top, and
/// the shift brings it down to the lowest bit.
#[inline(always)]
pub(super) fn spread(byte: u8) -> u64 {
    let alone = (byte as u64 * EACH) & 0x8040_2010_0804_0201;
    ((alone + 0x7f * EACH) >> 7) & EACH
}
