//! What the block encodings whose elements have codes of their own have in common: codes spread
//! over one or two bit planes, parameters per group.

use super::decode::{decode, spread, Levels, EACH};
use super::Params;
use std::marker::PhantomData;

/// Whole blocks of one encoding; the slices' lengths have been checked.
pub(super) trait Codec {
    /// Elements and bytes of a block.
    fn geometry(&self) -> (usize, usize);
    fn decode(&self, bytes: &[u8], out: &mut [f32]);
    /// The codes, where every element has one of its own.
    fn codes(&self) -> Option<&dyn Codes>;
}

/// Whole blocks whose elements have codes of their own; the slices' lengths have been checked.
pub(super) trait Codes {
    fn unpack(&self, bytes: &[u8], codes: &mut [i32], params: &mut [Params]);
    fn pack(&self, bytes: &mut [u8], codes: &[i32]);
}

/// Where some bits of every code lie: from byte `at` on, fields of `bits` bits, in runs of `run`
/// bytes. Byte `l` of a run holds the elements `l`, `l + run`, `l + 2·run` …, the first in its
/// lowest bits.
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
}

impl<B: Block<N, G>, const L: usize, const N: usize, const G: usize> Levels<L, N, G> for B {
    const BIAS: u8 = <B as Block<N, G>>::BIAS;
    const TABLE: Option<&'static [i8; 16]> = B::LEVELS;
    const OFFSET: bool = <B as Block<N, G>>::OFFSET;

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

    #[inline(always)]
    fn params(block: &[u8; N]) -> [Params; G] {
        <B as Block<N, G>>::params(block)
    }
}

impl<B: Block<N, G>, const L: usize, const N: usize, const G: usize> Codec for Blocks<B, L, N, G> {
    fn geometry(&self) -> (usize, usize) {
        (L, N)
    }

    fn decode(&self, bytes: &[u8], out: &mut [f32]) {
        decode::<B, L, N, G>(bytes, out);
    }

    fn codes(&self) -> Option<&dyn Codes> {
        Some(self)
    }
}

impl<B: Block<N, G>, const L: usize, const N: usize, const G: usize> Codes for Blocks<B, L, N, G> {
    fn unpack(&self, bytes: &[u8], codes: &mut [i32], params: &mut [Params]) {
        let blocks: &[[u8; N]] = bytemuck::cast_slice(bytes);
        let out = codes.chunks_exact_mut(L).zip(params.chunks_exact_mut(L));
        for (block, (codes, params)) in blocks.iter().zip(out) {
            let mut stored = [0; L];
            <B as Levels<L, N, G>>::stored(block, &mut stored);
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
    pub(super) fn fields<const N: usize>(self, block: &[u8; N], i: usize) -> u64 {
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
