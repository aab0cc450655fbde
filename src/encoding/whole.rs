//! Blocks as whole numbers, for products in 8-bit integers:
//! `element = scale · unit · level − minimum · least`, with a scale and a minimum of the block, and
//! a unit and a least of each group.

use super::block::{Block, Blocks};
use super::decode::{look_up, scale_only, Levels};
use super::Params;
use std::marker::PhantomData;

/// Elements that share a unit and a least in a block's words.
pub const GROUP: usize = 16;

/// The scales of a block's `G` groups.
pub(super) enum Scales<const G: usize> {
    /// Whole multiples of the block's scale and minimum.
    Whole(Units<G>),
    /// A scale of its own for each group, without a minimum.
    Floats([f32; G]),
}

/// A block's scale and minimum, and how often each group has them.
pub(super) struct Units<const G: usize> {
    pub scale: f32,
    pub minimum: f32,
    pub unit: [i16; G],
    pub least: [i16; G],
}

impl<const G: usize> Scales<G> {
    /// Scales without a minimum.
    #[inline(always)]
    pub fn scale_only(scale: f32, unit: [i16; G]) -> Scales<G> {
        Scales::Whole(Units { scale, minimum: 0.0, unit, least: [0; G] })
    }

    /// What turns codes into values. `offset`: whether there is a minimum.
    #[inline(always)]
    pub fn params(self, offset: bool) -> [Params; G] {
        let mut out = [Params::default(); G];
        match self {
            Scales::Whole(all) => {
                for (g, p) in out.iter_mut().enumerate() {
                    *p = scale_only(all.scale * f32::from(all.unit[g]));
                    if offset {
                        p.offset = -(all.minimum * f32::from(all.least[g]));
                    }
                }
            }
            Scales::Floats(scales) => {
                for (p, scale) in out.iter_mut().zip(scales) {
                    *p = scale_only(scale);
                }
            }
        }
        out
    }
}

/// What the words of a block hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Layout {
    /// Levels from 0 to 31, four to a word; the unit of each 16 elements, twice; the leasts of two
    /// times 16 elements; the scale, which is the minimum, too. Units and leasts are signed halves
    /// of a word, the first in the lower bits; scales are floats.
    Small,
    /// The same, then a minimum.
    WithMinimum,
    /// `unit · level` of each element, at most 4096 in size, two to a word; the scale. There is no
    /// minimum.
    Signed,
}

impl Layout {
    /// Words of a block of `len` elements.
    pub const fn words(self, len: usize) -> usize {
        match self {
            Layout::Small => len / 4 + len / GROUP + len / (2 * GROUP) + 1,
            Layout::WithMinimum => Layout::Small.words(len) + 1,
            Layout::Signed => len / 2 + 1,
        }
    }
}

/// Blocks whose scales are whole.
pub trait Whole: Sync {
    /// Elements of a block: 32 or 256.
    fn block_len(&self) -> usize;
    /// What its words hold.
    fn layout(&self) -> Layout;
    /// Reads whole blocks into words.
    ///
    /// # Panics
    /// If the lengths don't fit each other.
    fn read(&self, bytes: &[u8], words: &mut [u32]);
}

impl<B: Block<N, G>, const L: usize, const N: usize, const G: usize> Blocks<B, L, N, G> {
    const LAYOUT: Layout = {
        let high = match B::HIGH {
            Some(plane) => plane.bits,
            None => 0,
        };
        match B::LEVELS {
            None if B::LOW.bits + high <= 5 => match <B as Block<N, G>>::OFFSET {
                true => Layout::WithMinimum,
                false => Layout::Small,
            },
            _ => Layout::Signed,
        }
    };
}

impl<B: Block<N, G>, const L: usize, const N: usize, const G: usize> Whole for Blocks<B, L, N, G> {
    fn block_len(&self) -> usize {
        L
    }

    fn layout(&self) -> Layout {
        Self::LAYOUT
    }

    fn read(&self, bytes: &[u8], words: &mut [u32]) {
        assert_eq!(words.len(), bytes.len() / N * Self::LAYOUT.words(L), "words of the blocks");
        let blocks = bytemuck::cast_slice(bytes);
        pulp::Arch::new().dispatch(Reading::<B, L, N, G> { blocks, words, encoding: PhantomData });
    }
}

/// Elements that are read at a time.
const TILE: usize = 256;

/// The loops of [`Whole::read`], compiled for AVX2 and AVX-512 too.
struct Reading<'a, B, const L: usize, const N: usize, const G: usize> {
    blocks: &'a [[u8; N]],
    words: &'a mut [u32],
    encoding: PhantomData<B>,
}

impl<B: Block<N, G>, const L: usize, const N: usize, const G: usize> pulp::WithSimd
    for Reading<'_, B, L, N, G>
{
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        let layout = Blocks::<B, L, N, G>::LAYOUT;
        let words = self.words.chunks_exact_mut(layout.words(L));
        if layout != Layout::Signed {
            for (block, words) in self.blocks.iter().zip(words) {
                let (levels, words) = words.split_at_mut(L / 4);
                if let [levels] = bytemuck::cast_slice_mut::<u32, u8>(levels).as_chunks_mut::<L>().0
                {
                    <B as Levels<L, N, G>>::stored(block, levels);
                }
                small_scales::<B, L, N, G>(block, words);
            }
            return;
        }
        // As in `decode`, levels are converted in loops too long to unroll.
        let (mut stored, mut levels, mut units) = ([0; TILE], [0; TILE], [[0; 4]; TILE / GROUP]);
        let mut words = words;
        for blocks in self.blocks.chunks(TILE / L) {
            for (block, stored) in blocks.iter().zip(stored.as_chunks_mut::<L>().0) {
                <B as Levels<L, N, G>>::stored(block, stored);
            }
            if let Some(table) = B::LEVELS {
                stored.iter_mut().for_each(|level| *level = look_up(table, *level));
            }
            for (level, stored) in levels.iter_mut().zip(stored) {
                *level = i16::from(stored.wrapping_sub(<B as Block<N, G>>::BIAS) as i8);
            }
            // The only group of a short block has the unit 1.
            if G > 1 {
                for (block, units) in blocks.iter().zip(units.chunks_exact_mut(L / GROUP)) {
                    let Scales::Whole(all) = B::scales(block) else { continue };
                    for (i, words) in units.iter_mut().enumerate() {
                        *words = [four(all.unit[i / (L / GROUP / G)]); 4];
                    }
                }
                let units: &[i16] = bytemuck::cast_slice(&units);
                for (level, &unit) in levels.iter_mut().zip(units) {
                    *level = level.wrapping_mul(unit);
                }
            }
            for ((block, levels), words) in
                blocks.iter().zip(levels.as_chunks::<L>().0).zip(&mut words)
            {
                let Scales::Whole(all) = B::scales(block) else { continue };
                let (to, scale) = words.split_at_mut(L / 2);
                to.copy_from_slice(bytemuck::cast_slice(levels));
                scale[0] = all.scale.to_bits();
            }
        }
    }
}

/// A word of four times the same half.
#[inline(always)]
fn four(x: i16) -> u64 {
    u64::from(x as u16) * 0x0001_0001_0001_0001
}

/// The words of a small block after its levels.
#[inline(always)]
fn small_scales<B: Block<N, G>, const L: usize, const N: usize, const G: usize>(
    block: &[u8; N],
    words: &mut [u32],
) {
    let Scales::Whole(all) = B::scales(block) else { return };
    // A bias is a minimum, too.
    let bias = i16::from(<B as Block<N, G>>::BIAS);
    let (units, words) = words.split_at_mut(L / GROUP);
    let (leasts, words) = words.split_at_mut(L / GROUP / 2);
    for (i, word) in units.iter_mut().enumerate() {
        let unit = all.unit[i / (L / GROUP / G)];
        *word = pair(unit, unit);
    }
    for (i, word) in leasts.iter_mut().enumerate() {
        let least = |i: usize| {
            let g = i / (L / GROUP / G);
            if <B as Block<N, G>>::OFFSET {
                all.least[g]
            } else {
                bias * all.unit[g]
            }
        };
        *word = pair(least(2 * i), least(2 * i + 1));
    }
    for (word, x) in words.iter_mut().zip([all.scale, all.minimum]) {
        *word = x.to_bits();
    }
}

/// Two halves of a word, the first in the lower bits.
#[inline(always)]
pub fn pair(first: i16, second: i16) -> u32 {
    u32::from(first as u16) | u32::from(second as u16) << 16
}
