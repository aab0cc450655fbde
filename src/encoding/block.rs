//! The codec of block encodings whose elements have codes of their own. A block stores codes in one
//! or two bit planes, and parameters for groups of elements.

use super::decode::{decode, spread, Levels, EACH};
use super::whole::{Scales, Whole};
use super::Params;
use std::marker::PhantomData;

/// Decodes whole blocks of one encoding. Callers have checked the lengths of the slices.
pub(super) trait Codec {
    /// Elements and bytes of a block.
    fn geometry(&self) -> (usize, usize);
    fn decode(&self, bytes: &[u8], out: &mut [f32]);
    /// Access to the codes, if every element has a code of its own.
    fn codes(&self) -> Option<&dyn Codes>;
    /// The blocks as whole numbers, if their scales are whole.
    fn whole(&self) -> Option<&dyn Whole> {
        None
    }
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
pub(super) trait Block<const N: usize, const G: usize>: Sync {
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

    /// Whether the scales are [`Scales::Whole`].
    const WHOLE: bool = true;

    /// The scales of the block's groups.
    fn scales(block: &[u8; N]) -> Scales<G>;
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
        let words = codes.as_chunks_mut::<8>().0;
        B::LOW.read(block, words, |_, low| low);
        if let Some(plane) = B::HIGH {
            plane.read(block, words, |low, high| low | high << B::LOW.bits);
        }
    }

    #[inline(always)]
    fn params(block: &[u8; N]) -> [Params; G] {
        B::scales(block).params(<B as Block<N, G>>::OFFSET)
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

    fn whole(&self) -> Option<&dyn Whole> {
        B::WHOLE.then_some(self as &dyn Whole)
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
            for (group, p) in
                params.chunks_exact_mut(L / G).zip(<B as Levels<L, N, G>>::params(block))
            {
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

    /// Reads the fields of all elements, eight to a word. `put` gives the new word, from the old
    /// one and eight fields.
    #[inline(always)]
    pub(super) fn read<const N: usize>(
        self,
        block: &[u8; N],
        words: &mut [[u8; 8]],
        put: impl Fn(u64, u64) -> u64,
    ) {
        let put = |to: &mut [u8; 8], fields| {
            *to = put(u64::from_le_bytes(*to), fields).to_le_bytes();
        };
        let bytes = &block[self.at..][..words.len() * self.bits];
        if self.run == 1 {
            words.iter_mut().zip(bytes).for_each(|(to, &byte)| put(to, spread(byte)));
            return;
        }
        let (fields, words_of_run) = (8 / self.bits, self.run / 8);
        let runs = words.chunks_exact_mut(fields * words_of_run).zip(bytes.chunks_exact(self.run));
        for (words, run) in runs {
            for (i, words) in words.chunks_exact_mut(words_of_run).enumerate() {
                for (to, from) in words.iter_mut().zip(run.as_chunks::<8>().0) {
                    let fields = u64::from_le_bytes(*from) >> (i * self.bits);
                    put(to, fields & (u64::from(self.mask()) * EACH));
                }
            }
        }
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
