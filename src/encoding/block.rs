//! What all block encodings have in common: codes spread over one or two bit planes, parameters per group.

use super::Params;
use std::marker::PhantomData;

/// Whole blocks of one encoding; the slices' lengths have been checked.
pub(super) trait Codec {
    /// Elements and bytes of a block.
    fn geometry(&self) -> (usize, usize);
    fn decode(&self, bytes: &[u8], out: &mut [f32]);
    fn unpack(&self, bytes: &[u8], codes: &mut [i32], params: &mut [Params]);
    fn pack(&self, bytes: &mut [u8], codes: &[i32]);
}

/// Where some bits of every code lie: from byte `at` on, fields of `bits` bits, in runs of `run` bytes.
/// Byte `l` of a run holds the elements `l`, `l + run`, `l + 2·run` …, the first in its lowest bits.
#[derive(Clone, Copy)]
pub(super) struct Plane {
    pub at: usize,
    pub bits: usize,
    pub run: usize,
}

/// A block of `N` bytes, its elements in `G` groups that share their parameters.
pub(super) trait Block<const N: usize, const G: usize> {
    /// The low bits of every code.
    const LOW: Plane;
    /// The bits above those of `LOW`.
    const HIGH: Option<Plane> = None;
    /// What is stored is code + BIAS (mod 256).
    const BIAS: u8 = 0;
    /// The codes' levels, where these are not the codes themselves.
    const LEVELS: Option<&'static [i8; 16]> = None;
    /// Whether nibbles are sign and magnitude; codes are in numerical order all the same.
    const SIGN: bool = false;
    /// Whether the parameters have an offset: an addition saved where they have none.
    const OFFSET: bool = false;

    fn params(block: &[u8; N]) -> [Params; G];
}

/// The codec of `B`: blocks of `L` elements.
pub(super) struct Blocks<B, const L: usize, const N: usize, const G: usize>(PhantomData<B>);

impl<B: Block<N, G>, const L: usize, const N: usize, const G: usize> Blocks<B, L, N, G> {
    pub const NEW: Self = Blocks(PhantomData);

    /// The codes of a block as stored, BIAS included.
    #[inline(always)]
    fn stored(block: &[u8; N], codes: &mut [u8; L]) {
        for (i, codes) in codes.chunks_exact_mut(8).enumerate() {
            let mut word = B::LOW.fields(block, 8 * i);
            if let Some(plane) = B::HIGH {
                word |= plane.fields(block, 8 * i) << B::LOW.bits;
            }
            codes.copy_from_slice(&word.to_le_bytes());
        }
    }
}

impl<B: Block<N, G>, const L: usize, const N: usize, const G: usize> Codec for Blocks<B, L, N, G> {
    fn geometry(&self) -> (usize, usize) {
        (L, N)
    }

    fn decode(&self, bytes: &[u8], out: &mut [f32]) {
        let decoding =
            Decoding::<B, L, N, G> { blocks: bytemuck::cast_slice(bytes), out, codec: PhantomData };
        pulp::Arch::new().dispatch(decoding);
    }

    fn unpack(&self, bytes: &[u8], codes: &mut [i32], params: &mut [Params]) {
        let blocks: &[[u8; N]] = bytemuck::cast_slice(bytes);
        let out = codes.chunks_exact_mut(L).zip(params.chunks_exact_mut(L));
        for (block, (codes, params)) in blocks.iter().zip(out) {
            let mut stored = [0; L];
            Self::stored(block, &mut stored);
            for (to, from) in codes.iter_mut().zip(stored) {
                *to = match B::SIGN {
                    true => in_order(from),
                    false => (from.wrapping_sub(B::BIAS) as i8).into(),
                };
            }
            for (group, p) in params.chunks_exact_mut(L / G).zip(B::params(block)) {
                group.fill(p);
            }
        }
    }

    fn pack(&self, bytes: &mut [u8], codes: &[i32]) {
        let blocks: &mut [[u8; N]] = bytemuck::cast_slice_mut(bytes);
        for (block, codes) in blocks.iter_mut().zip(codes.chunks_exact(L)) {
            for (i, &code) in codes.iter().enumerate() {
                let stored = match B::SIGN {
                    true => sign_and_magnitude(code),
                    false => (code as u8).wrapping_add(B::BIAS),
                };
                B::LOW.put(block, i, stored);
                if let Some(plane) = B::HIGH {
                    plane.put(block, i, stored >> B::LOW.bits);
                }
            }
        }
    }
}

/// Elements decoded at a time: their codes and values stay in the first-level cache.
const TILE: usize = 2048;

/// The decoding loops, compiled for AVX2 and AVX-512 too.
///
/// Plain loops over a block decode 25 or 0.4 billion elements a second, by how far the optimizer unrolls them. These do
/// 4 to 13 with vectors, 2 to 7 without: codes are gathered eight to an integer, converted in loops too long to unroll,
/// and scaled in explicit vectors.
struct Decoding<'a, B, const L: usize, const N: usize, const G: usize> {
    blocks: &'a [[u8; N]],
    out: &'a mut [f32],
    codec: PhantomData<B>,
}

impl<B: Block<N, G>, const L: usize, const N: usize, const G: usize> pulp::WithSimd
    for Decoding<'_, B, L, N, G>
{
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, simd: S) {
        let mut buffer = [0; TILE];
        for (blocks, out) in self.blocks.chunks(TILE / L).zip(self.out.chunks_mut(TILE)) {
            let codes = &mut buffer[..out.len()];
            for (block, codes) in blocks.iter().zip(bytemuck::cast_slice_mut(codes)) {
                Blocks::<B, L, N, G>::stored(block, codes);
            }
            if let Some(table) = B::LEVELS {
                codes.iter_mut().for_each(|code| *code = look_up(table, *code));
            }
            for (y, code) in out.iter_mut().zip(codes.iter()) {
                *y = (code.wrapping_sub(B::BIAS) as i8).into();
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

impl Plane {
    const fn mask(self) -> u8 {
        (0xff_u16 >> (8 - self.bits)) as u8
    }

    /// The byte that holds element `i`'s field, and the field's lowest bit in it.
    #[inline(always)]
    const fn place(self, i: usize) -> (usize, usize) {
        let elements = self.run * 8 / self.bits;
        (self.at + i / elements * self.run + i % self.run, i % elements / self.run * self.bits)
    }

    /// The fields of the elements `i..i + 8`, one per byte; `i` is a multiple of 8.
    #[inline(always)]
    fn fields<const N: usize>(self, block: &[u8; N], i: usize) -> u64 {
        let (byte, bit) = self.place(i);
        if self.run == 1 {
            return spread(block[byte]);
        }
        let mut word = [0; 8];
        word.copy_from_slice(&block[byte..byte + 8]);
        u64::from_le_bytes(word) >> bit & (self.mask() as u64 * EACH)
    }

    /// Overwrites the field of element `i` with the low bits of `code`.
    fn put<const N: usize>(self, block: &mut [u8; N], i: usize, code: u8) {
        let (byte, bit) = self.place(i);
        block[byte] = block[byte] & !(self.mask() << bit) | (code & self.mask()) << bit;
    }
}

/// One in each byte of a word.
const EACH: u64 = 0x0101_0101_0101_0101;

/// The eight bits of a byte, one per byte: copies of it, masked to one bit each, which 0x7f then carries to the top.
#[inline(always)]
fn spread(byte: u8) -> u64 {
    let alone = (byte as u64 * EACH) & 0x8040_2010_0804_0201;
    ((alone + 0x7f * EACH) >> 7) & EACH
}

/// The place of a nibble of sign and magnitude in numerical order: −0 is −1.
fn in_order(nibble: u8) -> i32 {
    match nibble {
        0..8 => nibble.into(),
        _ => 7 - i32::from(nibble),
    }
}

/// The nibble at a place.
pub(super) fn sign_and_magnitude(code: i32) -> u8 {
    (if code < 0 { 7 - code } else { code }) as u8 & 15
}

/// `table[code]` as the sum of the gaps below: unlike a load, this runs on whole vectors.
#[inline(always)]
fn look_up(table: &[i8; 16], code: u8) -> u8 {
    let mut level = table[0] as u8;
    for i in 1..16 {
        let gap = table[i].wrapping_sub(table[i - 1]) as u8;
        level = level.wrapping_add(if code >= i as u8 { gap } else { 0 });
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
