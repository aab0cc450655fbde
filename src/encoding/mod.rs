//! How weights are stored: decoding bytes to `f32`, encoding `f32`, and changing single
//! quantization codes.
//!
//! [`Encoding::decode`] is the hot path of the forward pass. [`Encoding::unpack`] and
//! [`Encoding::pack`] open blocks for editing. Every element has an integer code, and its value is
//! `scale · level(code) + offset`. Changing a code changes that element only, because scales and
//! offsets stay as they are.
//!
//! The lattice types (IQ1_S to IQ3_S, TQ1_0, TQ2_0) can only be decoded: see
//! [`Encoding::has_codes`].

mod block;
mod decode;
mod encode;
mod fp4;
mod fp8;
mod iquant;
mod kquant;
mod lattice;
mod legacy;
mod mask;
pub mod packed;
mod plain;
pub mod whole;

use block::{Blocks, Codec, Codes};
use lattice::Lattice;
use whole::Whole;

pub use fp8::Fp8;

/// How a tensor's elements are stored. A block holds neighbouring elements of a row (input
/// features).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Encoding {
    /// 32-bit float.
    F32,
    /// IEEE half.
    F16,
    /// The upper half of an `f32`.
    BF16,
    /// 4 bits, `d·q`, 32 elements.
    Q4_0,
    /// 4 bits, `d·q + m`, 32 elements.
    Q4_1,
    /// 5 bits, `d·q`, 32 elements.
    Q5_0,
    /// 5 bits, `d·q + m`, 32 elements.
    Q5_1,
    /// 8 bits, `d·q`, 32 elements.
    Q8_0,
    /// 2 bits, a scale and a minimum (4 bits each) per 16 of the block's 256 elements.
    Q2K,
    /// 3 bits, a 6-bit scale per 16 of 256 elements.
    Q3K,
    /// 4 bits, a scale and a minimum (6 bits each) per 32 of 256 elements.
    Q4K,
    /// 5 bits, a scale and a minimum (6 bits each) per 32 of 256 elements.
    Q5K,
    /// 6 bits, an 8-bit scale per 16 of 256 elements.
    Q6K,
    /// 4 bits that index a table of 16 unevenly spaced levels, 32 elements.
    IQ4NL,
    /// The table of `IQ4NL`, a 6-bit scale per 32 of 256 elements.
    IQ4XS,
    /// 4-bit floats, an exponent per 32 elements.
    MXFP4,
    /// 4-bit floats, an 8-bit float as the scale per 16 of 64 elements.
    NVFP4,
    /// 1.6 bits: lattice points of 8 elements, a 3-bit scale per 32 of 256 elements.
    IQ1S,
    /// 1.8 bits: the lattice points of `IQ1S`, a 3-bit scale per 16 of 256 elements.
    IQ1M,
    /// 2.1 bits: 256 lattice points of 8 elements, a 4-bit scale per 32 of 256 elements.
    IQ2XXS,
    /// 2.3 bits: 512 lattice points of 8 elements, a 4-bit scale per 16 of 256 elements.
    IQ2XS,
    /// 2.6 bits: 1024 lattice points of 8 elements, a 4-bit scale per 16 of 256 elements.
    IQ2S,
    /// 3.1 bits: 256 lattice points of 4 elements, a 4-bit scale per 32 of 256 elements.
    IQ3XXS,
    /// 3.4 bits: 512 lattice points of 4 elements, a 4-bit scale per 32 of 256 elements.
    IQ3S,
    /// 1.7 bits: `d·q` with q from −1 to 1, five elements to a byte, 256 elements.
    TQ1_0,
    /// 2.1 bits: `d·q` with q from −1 to 1, 256 elements.
    TQ2_0,
}

/// The levels that codes stand for.
enum Scale {
    /// Floats in numerical order.
    Ranks,
    /// The table of IQ4_NL.
    Iq4,
    /// 4-bit floats.
    Fp4,
    /// The code itself.
    Integers,
    /// No element has a code of its own.
    None,
}

/// What turns an element's code into its value: `value = scale · level(code) + offset`. The value
/// of a float depends on its code alone.
///
/// Encodings without a minimum have the offset −0.0. Adding −0.0 changes no float, not even −0.0.
#[derive(Clone, Copy, Default, Debug, PartialEq)]
pub struct Params {
    /// Factor of the level. Negative scales and zero scales both occur in real files. Under a zero
    /// scale, no code changes the element.
    pub scale: f32,
    /// Added to the scaled level.
    pub offset: f32,
}

impl Encoding {
    /// Every encoding.
    pub const ALL: [Encoding; 26] = {
        use Encoding::*;
        [
            F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K, IQ4NL, IQ4XS,
            MXFP4, NVFP4, IQ1S, IQ1M, IQ2XXS, IQ2XS, IQ2S, IQ3XXS, IQ3S, TQ1_0, TQ2_0,
        ]
    };

    /// The encoding with this type id in GGUF files; `None` if this program doesn't know the id.
    pub fn from_ggml(id: u32) -> Option<Encoding> {
        Self::ALL.into_iter().find(|e| e.ggml_id() == id)
    }

    /// The type id in GGUF files (llama.cpp, `enum ggml_type`).
    pub fn ggml_id(self) -> u32 {
        self.identity().0
    }

    /// The name as llama.cpp's tools print it, such as `Q4_K`.
    pub fn name(self) -> &'static str {
        self.identity().1
    }

    /// Number of elements in a block (1 for floats).
    pub fn block_len(self) -> usize {
        self.codec().geometry().0
    }

    /// Number of bytes in a block.
    pub fn block_bytes(self) -> usize {
        self.codec().geometry().1
    }

    /// Number of bytes in a row of `elements` elements. An incomplete last block counts as a whole
    /// one.
    pub fn bytes_for(self, elements: usize) -> usize {
        let (len, bytes) = self.codec().geometry();
        elements.div_ceil(len) * bytes
    }

    /// Whether every element has a code of its own, which a fold can step. In a lattice type one
    /// stored code stands for several elements. A lattice type can be decoded, but not unpacked,
    /// packed or encoded.
    pub fn has_codes(self) -> bool {
        self.codec().codes().is_some()
    }

    /// Decodes whole blocks. The values equal those of llama.cpp's `dequantize_row_*` bit for bit.
    ///
    /// # Panics
    /// If `bytes` and `out` don't hold the same number of whole blocks.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        self.check(bytes.len(), out.len());
        self.codec().decode(bytes, out);
    }

    /// The blocks as whole numbers; `None` for floats, for lattice types and for NVFP4, whose
    /// groups have scales of their own.
    pub fn whole(self) -> Option<&'static dyn Whole> {
        self.codec().whole()
    }

    /// Reads the codes and parameters of whole blocks, one of each per element.
    ///
    /// A float's code is its rank in numerical order: code + 1 is the next larger float, +0.0 has
    /// code 0 and −0.0 has code −1. This holds for 4-bit floats too.
    ///
    /// # Panics
    /// If the three slices don't hold the same number of whole blocks, or the encoding has no
    /// codes.
    pub fn unpack(self, bytes: &[u8], codes: &mut [i32], params: &mut [Params]) {
        self.check(bytes.len(), codes.len());
        assert_eq!(codes.len(), params.len(), "one Params per code");
        self.codes().unpack(bytes, codes, params);
    }

    /// Overwrites the codes of whole blocks, and nothing else. Packing the codes that `unpack` gave
    /// changes no bit. A code must lie in [`code_range`](Self::code_range) or come from `unpack`,
    /// which also gives the codes of infinities and NaNs.
    ///
    /// # Panics
    /// If `bytes` and `codes` don't hold the same number of whole blocks, or the encoding has no
    /// codes.
    pub fn pack(self, bytes: &mut [u8], codes: &[i32]) {
        self.check(bytes.len(), codes.len());
        self.codes().pack(bytes, codes);
    }

    /// The value that `decode` gives an element with this code, bit for bit.
    ///
    /// # Panics
    /// If the encoding has no codes.
    pub fn value(self, p: Params, code: i32) -> f32 {
        let level = match self.scale() {
            Scale::Ranks => return plain::value(self, code),
            Scale::Iq4 => iquant::level(code),
            Scale::Fp4 => fp4::level(code),
            Scale::Integers => code as f32,
            Scale::None => self.no_codes(),
        };
        p.scale * level + p.offset
    }

    /// The code in range whose value is nearest to `x`. For a NaN, or under a zero scale, the
    /// result is an arbitrary code in range.
    ///
    /// # Panics
    /// If the encoding has no codes.
    pub fn nearest(self, p: Params, x: f32) -> i32 {
        let level = ((x as f64 - p.offset as f64) / p.scale as f64) as f32;
        let guess = match self.scale() {
            Scale::Ranks => return plain::nearest(self, x),
            Scale::Iq4 => iquant::nearest(level),
            Scale::Fp4 => fp4::nearest(level),
            Scale::Integers => level.round() as i32,
            Scale::None => self.no_codes(),
        };
        let (low, high) = self.code_range();
        let guess = guess.clamp(low, high);
        // Both the division and the decoded value are rounded: near a tie, a neighbour can be
        // closer.
        let error = |&code: &i32| (self.value(p, code) as f64 - x as f64).abs();
        let around = [guess, (guess - 1).max(low), (guess + 1).min(high)];
        around.into_iter().min_by(|a, b| error(a).total_cmp(&error(b))).unwrap_or(guess)
    }

    /// The lowest and the highest code. For floats: the codes of the lowest and the highest finite
    /// value.
    ///
    /// # Panics
    /// If the encoding has no codes.
    pub fn code_range(self) -> (i32, i32) {
        match self {
            Encoding::IQ4NL | Encoding::IQ4XS | Encoding::Q4_1 | Encoding::Q4K => (0, 15),
            Encoding::Q4_0 | Encoding::MXFP4 | Encoding::NVFP4 => (-8, 7),
            Encoding::Q5_0 => (-16, 15),
            Encoding::Q5_1 | Encoding::Q5K => (0, 31),
            Encoding::Q8_0 => (-128, 127),
            Encoding::Q2K => (0, 3),
            Encoding::Q3K => (-4, 3),
            Encoding::Q6K => (-32, 31),
            Encoding::F32 | Encoding::F16 | Encoding::BF16 => plain::code_range(self),
            Encoding::IQ1S
            | Encoding::IQ1M
            | Encoding::IQ2XXS
            | Encoding::IQ2XS
            | Encoding::IQ2S
            | Encoding::IQ3XXS
            | Encoding::IQ3S
            | Encoding::TQ1_0
            | Encoding::TQ2_0 => self.no_codes(),
        }
    }

    /// Quantizes whole blocks from scratch. Floats, Q8_0, MXFP4 and NVFP4 get the same bits as from
    /// llama.cpp's reference. The other encodings get other bits, found by a search of the same
    /// quality.
    ///
    /// # Panics
    /// If `values` and `out` don't hold the same number of whole blocks, or the encoding has no
    /// codes.
    pub fn encode(self, values: &[f32], out: &mut [u8]) {
        self.check(out.len(), values.len());
        encode::encode(self, values, out);
    }

    fn check(self, bytes: usize, elements: usize) {
        let whole = elements.is_multiple_of(self.block_len());
        assert!(
            whole && bytes == self.bytes_for(elements),
            "{}: {bytes} bytes for {elements} elements",
            self.name()
        );
    }

    /// What the codes are. No `_`: a new encoding must say what its codes mean.
    fn scale(self) -> Scale {
        match self {
            Encoding::F32 | Encoding::F16 | Encoding::BF16 => Scale::Ranks,
            Encoding::IQ4NL | Encoding::IQ4XS => Scale::Iq4,
            Encoding::MXFP4 | Encoding::NVFP4 => Scale::Fp4,
            Encoding::Q4_0
            | Encoding::Q4_1
            | Encoding::Q5_0
            | Encoding::Q5_1
            | Encoding::Q8_0
            | Encoding::Q2K
            | Encoding::Q3K
            | Encoding::Q4K
            | Encoding::Q5K
            | Encoding::Q6K => Scale::Integers,
            Encoding::IQ1S
            | Encoding::IQ1M
            | Encoding::IQ2XXS
            | Encoding::IQ2XS
            | Encoding::IQ2S
            | Encoding::IQ3XXS
            | Encoding::IQ3S
            | Encoding::TQ1_0
            | Encoding::TQ2_0 => Scale::None,
        }
    }

    fn codes(self) -> &'static dyn Codes {
        self.codec().codes().unwrap_or_else(|| self.no_codes())
    }

    fn no_codes(self) -> ! {
        panic!("{}: no element has a code of its own", self.name())
    }

    fn identity(self) -> (u32, &'static str) {
        match self {
            Encoding::F32 => (0, "F32"),
            Encoding::F16 => (1, "F16"),
            Encoding::BF16 => (30, "BF16"),
            Encoding::Q4_0 => (2, "Q4_0"),
            Encoding::Q4_1 => (3, "Q4_1"),
            Encoding::Q5_0 => (6, "Q5_0"),
            Encoding::Q5_1 => (7, "Q5_1"),
            Encoding::Q8_0 => (8, "Q8_0"),
            Encoding::Q2K => (10, "Q2_K"),
            Encoding::Q3K => (11, "Q3_K"),
            Encoding::Q4K => (12, "Q4_K"),
            Encoding::Q5K => (13, "Q5_K"),
            Encoding::Q6K => (14, "Q6_K"),
            Encoding::IQ4NL => (20, "IQ4_NL"),
            Encoding::IQ4XS => (23, "IQ4_XS"),
            Encoding::MXFP4 => (39, "MXFP4"),
            Encoding::NVFP4 => (40, "NVFP4"),
            Encoding::IQ1S => (19, "IQ1_S"),
            Encoding::IQ1M => (29, "IQ1_M"),
            Encoding::IQ2XXS => (16, "IQ2_XXS"),
            Encoding::IQ2XS => (17, "IQ2_XS"),
            Encoding::IQ2S => (22, "IQ2_S"),
            Encoding::IQ3XXS => (18, "IQ3_XXS"),
            Encoding::IQ3S => (21, "IQ3_S"),
            Encoding::TQ1_0 => (34, "TQ1_0"),
            Encoding::TQ2_0 => (35, "TQ2_0"),
        }
    }

    /// The encoding's codec. Its type parameters give a block's elements, bytes and groups; a
    /// [`Lattice`] block always has 256 elements.
    fn codec(self) -> &'static dyn Codec {
        match self {
            Encoding::F32 => &plain::F32,
            Encoding::F16 => &plain::F16,
            Encoding::BF16 => &plain::BF16,
            Encoding::Q4_0 => &Blocks::<legacy::Q4_0, 32, 18, 1>::NEW,
            Encoding::Q4_1 => &Blocks::<legacy::Q4_1, 32, 20, 1>::NEW,
            Encoding::Q5_0 => &Blocks::<legacy::Q5_0, 32, 22, 1>::NEW,
            Encoding::Q5_1 => &Blocks::<legacy::Q5_1, 32, 24, 1>::NEW,
            Encoding::Q8_0 => &Blocks::<legacy::Q8_0, 32, 34, 1>::NEW,
            Encoding::Q2K => &Blocks::<kquant::Q2K, 256, 84, 16>::NEW,
            Encoding::Q3K => &Blocks::<kquant::Q3K, 256, 110, 16>::NEW,
            Encoding::Q4K => &Blocks::<kquant::Q4K, 256, 144, 8>::NEW,
            Encoding::Q5K => &Blocks::<kquant::Q5K, 256, 176, 8>::NEW,
            Encoding::Q6K => &Blocks::<kquant::Q6K, 256, 210, 16>::NEW,
            Encoding::IQ4NL => &Blocks::<iquant::IQ4NL, 32, 18, 1>::NEW,
            Encoding::IQ4XS => &Blocks::<iquant::IQ4XS, 256, 136, 8>::NEW,
            Encoding::MXFP4 => &Blocks::<fp4::MXFP4, 32, 17, 1>::NEW,
            Encoding::NVFP4 => &Blocks::<fp4::NVFP4, 64, 36, 4>::NEW,
            Encoding::IQ1S => &Lattice::<lattice::IQ1S, 50, 8>::NEW,
            Encoding::IQ1M => &Lattice::<lattice::IQ1M, 56, 16>::NEW,
            Encoding::IQ2XXS => &Lattice::<lattice::IQ2XXS, 66, 8>::NEW,
            Encoding::IQ2XS => &Lattice::<lattice::IQ2XS, 74, 16>::NEW,
            Encoding::IQ2S => &Lattice::<lattice::IQ2S, 82, 16>::NEW,
            Encoding::IQ3XXS => &Lattice::<lattice::IQ3XXS, 98, 8>::NEW,
            Encoding::IQ3S => &Lattice::<lattice::IQ3S, 110, 8>::NEW,
            Encoding::TQ1_0 => &Lattice::<lattice::TQ1, 54, 1>::NEW,
            Encoding::TQ2_0 => &Lattice::<lattice::TQ2, 66, 1>::NEW,
        }
    }
}
