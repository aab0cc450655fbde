//! The codec of block encodings whose elements have codes of their own. A block stores codes in one
//! or two bit planes, and parameters for groups of elements.

use super::decode::{decode, spread, Levels, EACH};
use super::Params;
use std::marker::PhantomData;

/// Decodes whole blocks of one encoding. Callers have checked the lengths of the slices.
pub(super) trait Codec {
    /// Elements and bytes of a block.
    fn geometry(&self) -> (usize, usize);
    fn decode(&self, bytes: &[u8], out: &mut [f32]);
    /// Access to the codes, if every element has a code of its own.
    fn codes(&self) -> Option<&dyn Codes>;
}

/// Reads and writes the codes of whole blocks whose elements have codes of their own. Callers have
/// checked the lengths of the slices.
pub(super) trait Codes {
    fn unpack(&self, bytes: &[u8], codes: &mut [i32], params: &mut [Params]);
    fn pack(&self, bytes: &mut [u8], codes: &[i32]);
}

/// A bit plane: where some bits of every code lie in a block. Each element has a field of `bits`
/// bits. The fields lie from byte `at` on, in runs of `run` bytes. Byte `l` of a run holds the
/// fields of the elements `l`, `l + run`, `l + 2·run` …, the first in the lowest bits.
#[derive(Clone, Copy)]
pub(super) struct Plane {
    pub at: usize,
    pub bits: usize,
    pub run: usize,
}

/// An encoding with blocks of `N` bytes and `G` groups of elements. The elements of a group share
/// their parameters.
pub(super) trait Block<const N: usize, const G: usize> {
    /// The low bits of every code.
    const LOW: Plane;
    /// The bits of every code above those of `LOW`.
    const HIGH: Option<Plane> = None;
    /// The stored number is code + BIAS (mod 256).
    const BIAS: u8 = 0;
    /// The level of each stored number. `None`: levels equal codes.
    const LEVELS: Option<&'static [i8; 16]> = None;
    /// Whether a nibble stores sign and magnitude. Codes are in numerical order all the same.
    const SIGN: bool = false;
    /// Whether the parameters have an offset. Without one, decoding saves an addition.
    const OFFSET: bool = false;

    /// The parameters of the block's groups.
    fn params(block: &[u8; N]) -> [Params; G];
}

/// The codec of encoding `B`: blocks of `L` elements and `N` bytes, in `G` groups.
pub(super) struct Blocks<B, const L: usize, const N: usize, const G: usize>(PhantomData<B>);

impl<B: Block<N, G>, const L: usize, const N: usize, const G: usize> Blocks<B, L, N, G> {
    pub const NEW: Self = Blocks(PhantomData);
}

impl<B: Block<N, G>, const L: usize, const N: usize, const G: usize> Levels<L, N, G> for B {
    const BIAS: u8 = <B as Block<N, G>>::BIAS;
    const TABLE: Option<&'static [i8; 16]> = B::LEVELS;
    const OFFSET: bool = <B as Block<N, G>>::OFFSET;

    /// The stored numbers of a block, BIAS included.
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
                    true => from_sign_and_magnitude(from),
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
                    true => to_sign_and_magnitude(code),
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

    /// The byte that holds the field of element `i`, and the field's lowest bit in this byte.
    #[inline(always)]
    const fn place(self, i: usize) -> (usize, usize) {
        let elements = self.run * 8 / self.bits;
        (self.at + i / elements * self.run + i % self.run, i % elements / self.run * self.bits)
    }

    /// The fields of the elements `i..i + 8`, one per byte. `i` must be a multiple of 8.
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

/// The code of a nibble that stores sign and magnitude. −0 has code −1.
fn from_sign_and_magnitude(nibble: u8) -> i32 {
    match nibble {
        0..8 => nibble.into(),
        _ => 7 - i32::from(nibble),
    }
}

/// The nibble, sign and magnitude, that stores a code.
pub(super) fn to_sign_and_magnitude(code: i32) -> u8 {
    (if code < 0 { 7 - code } else { code }) as u8 & 15
}
