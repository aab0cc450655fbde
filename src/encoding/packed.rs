//! Packed weights, as quantized Hugging Face checkpoints store them: codes, scales and zero points
//! lie in separate tensors. `value = scale · (level(code) − zero)`, rounded to the type in which
//! the format's own library computes the value.

use std::ops::Range;

use half::{bf16, f16};

use super::fp8::{self, Fp8};
use super::{plain, Encoding, Params};

pub use super::mask::Mask;

/// Where an element's code lies in the bytes of the code tensor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Layout {
    /// 32-bit words `[rows, words]`. A word holds the codes of neighbouring inputs, as many as fit
    /// whole: compressed-tensors.
    AlongRow,
    /// 32-bit words `[words, rows]`. An output's codes run down its column of words without gaps,
    /// and a code may cross from one word into the next: GPTQ.
    DownColumn,
    /// 32-bit words `[cols, rows / 8]`. A word holds the codes of eight neighbouring outputs,
    /// interleaved: AWQ.
    Interleaved,
    /// One byte per element, or one float per element, `[rows, cols]`.
    Bytes,
    /// One float per element, `[cols, rows]`: the experts of gpt-oss.
    ByInput,
    /// Two elements to a byte, row by row, the first in the upper half: bitsandbytes.
    Nibbles,
    /// Two elements to a byte, row by row, the first in the lower half: NVFP4 and MXFP4.
    LowNibbles,
}

/// The position, in a word of AWQ, of each of its eight outputs.
const AWQ: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// The level of a code: its meaning before zero point and scale are applied.
#[derive(Clone, Copy, Debug)]
pub enum Levels {
    /// The level is the code, stored as an unsigned number.
    Unsigned,
    /// The level is the code, stored as a signed byte.
    Signed,
    /// The level is an 8-bit float, and the code its rank in numerical order.
    Float(Fp8),
    /// The level is a wider float, and the code its rank in numerical order.
    Plain(Encoding),
    /// Sixteen levels in ascending order, indexed by code, and the stored number of each.
    Table([f32; 16], [u8; 16]),
}

impl Levels {
    /// 4-bit floats, OCP's E2M1: a sign, two bits of exponent, one of mantissa. −0.0 and +0.0 have
    /// a code each.
    pub const E2M1: Levels = Levels::Table(
        [-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
        [15, 14, 13, 12, 11, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7],
    );
}

/// A list of numbers, such as scales, in one of several formats.
#[derive(Clone, Copy, Debug)]
pub enum Numbers<'a> {
    /// Floats.
    Plain(Encoding, &'a [u8]),
    /// 8-bit floats: the scales of NVFP4.
    Float(Fp8, &'a [u8]),
    /// Exponents, OCP's E8M0: a byte e stands for 2^(e − 127). The scales of MX formats.
    Exponents(&'a [u8]),
    /// Nested quantization of bitsandbytes: `table[code] · scale of the block + offset`.
    Nested {
        /// One byte for each number.
        codes: &'a [u8],
        /// 256 levels, F32.
        table: &'a [u8],
        /// One scale for each block of numbers, F32.
        scales: &'a [u8],
        /// How many numbers share a scale.
        block: usize,
        /// Added to every number.
        offset: f32,
    },
}

impl Numbers<'_> {
    /// Those of the `i`-th of `n` matrices. A single float is shared by all.
    fn part(&self, i: usize, n: usize) -> Self {
        fn part(b: &[u8], i: usize, n: usize) -> &[u8] {
            &b[i * (b.len() / n)..(i + 1) * (b.len() / n)]
        }
        match *self {
            Numbers::Plain(e, b) if b.len() > e.block_bytes() => Numbers::Plain(e, part(b, i, n)),
            Numbers::Float(kind, b) => Numbers::Float(kind, part(b, i, n)),
            Numbers::Exponents(b) => Numbers::Exponents(part(b, i, n)),
            shared => shared,
        }
    }

    /// The `i`-th number.
    fn at(&self, i: usize) -> f32 {
        let f32_at = |b: &[u8], i: usize| {
            f32::from_le_bytes([b[4 * i], b[4 * i + 1], b[4 * i + 2], b[4 * i + 3]])
        };
        let bits = |b: &[u8], i: usize| u16::from_le_bytes([b[2 * i], b[2 * i + 1]]);
        match *self {
            Numbers::Plain(Encoding::F16, b) => f16::from_bits(bits(b, i)).to_f32(),
            Numbers::Plain(Encoding::BF16, b) => bf16::from_bits(bits(b, i)).to_f32(),
            Numbers::Plain(_, b) => f32_at(b, i),
            Numbers::Float(kind, b) => kind.value(fp8::code(b[i])),
            // The byte 0 stands for 2^−127, a subnormal float.
            Numbers::Exponents(b) => f32::from_bits((u32::from(b[i]) << 23).max(1 << 22)),
            Numbers::Nested { codes, table, scales, block, offset } => {
                f32_at(table, codes[i].into()) * f32_at(scales, i / block) + offset
            }
        }
    }
}

/// The zero point of each output and group.
#[derive(Clone, Copy, Debug)]
pub enum Zeros<'a> {
    /// One zero point for all elements.
    All(i32),
    /// GPTQ: `[groups, rows]`, each of the code's width, packed along the outputs into 32-bit
    /// words.
    Gptq {
        /// The packed words.
        words: &'a [u8],
        /// Added to every stored zero point, modulo 2^bits: 1 in GPTQ's first version, else 0.
        plus: u32,
    },
    /// AWQ: 32-bit words `[groups, rows / 8]`, interleaved.
    Awq(&'a [u8]),
    /// compressed-tensors: 32-bit words `[rows / zero points in a word, groups]`, packed down the
    /// outputs.
    DownRows(&'a [u8]),
    /// Signed bytes `[rows, groups]`.
    Bytes(&'a [u8]),
}

/// Which elements share a scale. The scale of element (row, column) has the index `row / rows ·
/// by_row + group(column) · by_group`.
#[derive(Clone, Copy, Debug)]
pub struct Groups<'a> {
    /// How many neighbouring outputs share a scale.
    pub rows: usize,
    /// How many neighbouring inputs share a scale. Not used with `index`.
    pub cols: usize,
    /// Step of the scale's index from one block of outputs to the next.
    pub by_row: usize,
    /// Step of the scale's index from one group of inputs to the next.
    pub by_group: usize,
    /// The group of each input, I32, for inputs that weren't quantized in their order.
    pub index: Option<&'a [u8]>,
}

impl Groups<'_> {
    fn group(&self, col: usize) -> usize {
        match self.index {
            Some(b) => {
                i32::from_le_bytes([b[4 * col], b[4 * col + 1], b[4 * col + 2], b[4 * col + 3]])
                    as usize
            }
            None => col / self.cols,
        }
    }
}

/// A packed matrix without its codes, which a fold replaces. The builder of this value has checked
/// that every index stays within its slice.
#[derive(Clone, Copy, Debug)]
pub struct Packed<'a> {
    /// The packing's name.
    pub name: &'static str,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Bits of a code. A code that is stored in a byte may have fewer than eight.
    pub bits: u32,
    /// Where the codes lie.
    pub layout: Layout,
    /// The levels of the codes.
    pub levels: Levels,
    /// The scales.
    pub scales: Numbers<'a>,
    /// Every scale is multiplied by this.
    pub factor: f32,
    /// Every scale is divided by this.
    pub divisor: f32,
    /// The zero points.
    pub zeros: Zeros<'a>,
    /// Which elements share scales and zero points.
    pub groups: Groups<'a>,
    /// Which elements are stored; `None`: all. The other elements are zero, and no code changes
    /// them.
    pub mask: Option<Mask<'a>>,
    /// The float type that values are rounded to.
    pub round: Encoding,
}

/// The `i`-th 32-bit word.
fn word(bytes: &[u8], i: usize) -> u32 {
    u32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
}

/// Overwrites the bits of `mask` in the `i`-th word.
fn put(bytes: &mut [u8], i: usize, mask: u32, value: u32) {
    let new = (word(bytes, i) & !mask) | (value & mask);
    bytes[4 * i..4 * i + 4].copy_from_slice(&new.to_le_bytes());
}

impl Packed<'_> {
    /// The mask of a code: its lowest `bits` bits are set.
    fn ones(&self) -> u32 {
        u32::MAX >> (32 - self.bits)
    }

    /// How many codes a word of compressed-tensors holds.
    fn per_word(&self) -> usize {
        (32 / self.bits) as usize
    }

    /// The word that holds a code's lowest bit, the position of that bit in the word, and the
    /// distance to the word in which the code continues.
    fn place(&self, row: usize, col: usize) -> (usize, u32, usize) {
        match self.layout {
            Layout::AlongRow => {
                let n = self.per_word();
                (row * self.cols.div_ceil(n) + col / n, (col % n) as u32 * self.bits, 1)
            }
            Layout::DownColumn => {
                let bit = col * self.bits as usize;
                (bit / 32 * self.rows + row, (bit % 32) as u32, self.rows)
            }
            Layout::Interleaved => (col * (self.rows / 8) + row / 8, 4 * AWQ[row % 8], 1),
            Layout::Bytes | Layout::ByInput | Layout::Nibbles | Layout::LowNibbles => {
                unreachable!("no words")
            }
        }
    }

    /// The byte that holds an element's nibble, and the nibble's lowest bit in this byte.
    fn nibble(&self, row: usize, col: usize) -> (usize, usize) {
        let i = row * self.cols + col;
        match self.layout {
            Layout::Nibbles => (i / 2, 4 * (1 - i % 2)),
            _ => (i / 2, 4 * (i % 2)),
        }
    }

    /// The packing of the `i`-th of `n` matrices whose scales lie one after the other.
    pub(crate) fn of_stack(&self, i: usize, n: usize) -> Self {
        Packed { scales: self.scales.part(i, n), ..*self }
    }

    /// Bytes of an element in [`Layout::Bytes`] and [`Layout::ByInput`].
    fn width(&self) -> usize {
        match self.levels {
            Levels::Plain(e) => e.block_bytes(),
            _ => 1,
        }
    }

    /// The first byte of an element in [`Layout::Bytes`] and [`Layout::ByInput`].
    fn first_byte(&self, row: usize, col: usize) -> usize {
        self.width()
            * match self.layout {
                Layout::ByInput => col * self.rows + row,
                _ => row * self.cols + col,
            }
    }

    /// Where the codes of some columns of a row lie: (column, row and column of its code). With a
    /// mask, the codes of the whole matrix lie in one row, and an element that isn't stored has no
    /// code.
    fn places(
        &self,
        row: usize,
        cols: Range<usize>,
    ) -> impl Iterator<Item = (usize, Option<(usize, usize)>)> + '_ {
        let mut at =
            self.mask.map_or(0, |m| m.start(self.cols, row) + m.before(self.cols, row, cols.start));
        cols.map(move |col| match self.mask {
            None => (col, Some((row, col))),
            Some(m) if m.has(self.cols, row, col) => {
                at += 1;
                (col, Some((0, at - 1)))
            }
            Some(_) => (col, None),
        })
    }

    /// Reads the stored number at a code's place.
    fn stored(&self, bytes: &[u8], row: usize, col: usize) -> u32 {
        match self.layout {
            Layout::Bytes | Layout::ByInput => {
                let (at, n) = (self.first_byte(row, col), self.width());
                bytes[at..at + n].iter().rev().fold(0, |code, &b| code << 8 | u32::from(b))
            }
            Layout::Nibbles | Layout::LowNibbles => {
                let (at, shift) = self.nibble(row, col);
                (u32::from(bytes[at]) >> shift) & 15
            }
            _ => {
                let (at, shift, next) = self.place(row, col);
                let mut code = word(bytes, at) >> shift;
                if shift + self.bits > 32 {
                    code |= word(bytes, at + next) << (32 - shift);
                }
                code & self.ones()
            }
        }
    }

    /// Writes the stored number at a code's place.
    fn store(&self, bytes: &mut [u8], row: usize, col: usize, stored: u32) {
        match self.layout {
            Layout::Bytes | Layout::ByInput => {
                let (at, n) = (self.first_byte(row, col), self.width());
                bytes[at..at + n].copy_from_slice(&stored.to_le_bytes()[..n]);
            }
            Layout::Nibbles | Layout::LowNibbles => {
                let (at, shift) = self.nibble(row, col);
                bytes[at] = (bytes[at] & !(15 << shift)) | ((stored as u8 & 15) << shift);
            }
            _ => {
                let (at, shift, next) = self.place(row, col);
                put(bytes, at, self.ones() << shift, stored << shift);
                if shift + self.bits > 32 {
                    put(bytes, at + next, self.ones() >> (32 - shift), stored >> (32 - shift));
                }
            }
        }
    }

    /// The zero point of an output and a group.
    fn zero(&self, row: usize, group: usize) -> i32 {
        let bits = self.bits as usize;
        match self.zeros {
            Zeros::All(zero) => zero,
            Zeros::Gptq { words, plus } => {
                let bit = row * bits;
                let at = group * (self.rows * bits / 32) + bit / 32;
                let mut zero = word(words, at) >> (bit % 32);
                if bit % 32 + bits > 32 {
                    zero |= word(words, at + 1) << (32 - bit % 32);
                }
                ((zero & self.ones()).wrapping_add(plus) & self.ones()) as i32
            }
            Zeros::Awq(words) => {
                ((word(words, group * (self.rows / 8) + row / 8) >> (4 * AWQ[row % 8])) & 15) as i32
            }
            Zeros::DownRows(words) => {
                let n = self.per_word();
                let at = row / n * self.groups.by_row + group;
                ((word(words, at) >> ((row % n) * bits)) & self.ones()) as i32
            }
            Zeros::Bytes(bytes) => (bytes[row * self.groups.by_row + group] as i8).into(),
        }
    }

    fn params_of(&self, row: usize, group: usize) -> Params {
        let at = row / self.groups.rows * self.groups.by_row + group * self.groups.by_group;
        Params {
            scale: self.scales.at(at) * self.factor / self.divisor,
            offset: self.zero(row, group) as f32,
        }
    }

    /// Reads the codes and parameters of some columns of a row, one of each per column.
    /// [`Params::offset`] holds the zero point. An element that isn't stored gets code 0 and scale
    /// 0.
    pub fn unpack(
        &self,
        bytes: &[u8],
        row: usize,
        cols: Range<usize>,
        codes: &mut [i32],
        params: &mut [Params],
    ) {
        // The group of the last element, and its parameters.
        let mut last = (usize::MAX, Params::default());
        for (((col, place), code), p) in self.places(row, cols).zip(codes).zip(params) {
            let Some((row_of_code, col_of_code)) = place else {
                (*code, *p) = (0, Params::default());
                continue;
            };
            let group = self.groups.group(col);
            if group != last.0 {
                last = (group, self.params_of(row, group));
            }
            *p = last.1;
            let stored = self.stored(bytes, row_of_code, col_of_code);
            *code = match &self.levels {
                Levels::Unsigned => stored as i32,
                Levels::Signed => (stored as u8 as i8).into(),
                Levels::Float(_) => fp8::code(stored as u8),
                Levels::Plain(e) => plain::code(*e, stored),
                Levels::Table(_, numbers) => {
                    numbers.iter().position(|&n| u32::from(n) == stored).unwrap_or(0) as i32
                }
            };
        }
    }

    /// Overwrites the codes of some columns of a row, and nothing else.
    pub fn pack(&self, bytes: &mut [u8], row: usize, cols: Range<usize>, codes: &[i32]) {
        for ((_, place), &code) in self.places(row, cols).zip(codes) {
            let Some((row, col)) = place else { continue };
            let stored = match &self.levels {
                Levels::Unsigned => code as u32,
                Levels::Signed => (code as i8 as u8).into(),
                Levels::Float(_) => fp8::bits(code).into(),
                Levels::Plain(e) => plain::bits(*e, code),
                Levels::Table(_, numbers) => numbers[code as usize & 15].into(),
            };
            self.store(bytes, row, col, stored);
        }
    }

    /// The level of a code.
    fn level(&self, code: i32) -> f32 {
        match &self.levels {
            Levels::Unsigned | Levels::Signed => code as f32,
            Levels::Float(kind) => kind.value(code),
            Levels::Plain(e) => plain::value(*e, code),
            Levels::Table(table, _) => table[code as usize & 15],
        }
    }

    /// The value of a code under the parameters `p`.
    pub fn value(&self, p: Params, code: i32) -> f32 {
        let exact = p.scale * (self.level(code) - p.offset);
        match self.round {
            Encoding::F16 => f16::from_f32(exact).to_f32(),
            Encoding::BF16 => bf16::from_f32(exact).to_f32(),
            _ => exact,
        }
    }

    /// The code in range whose value is nearest to `x`.
    pub fn nearest(&self, p: Params, x: f32) -> i32 {
        let level = x / p.scale + p.offset;
        let (low, high) = self.code_range();
        let guess = match &self.levels {
            Levels::Unsigned | Levels::Signed => level.round() as i32,
            Levels::Float(kind) => kind.nearest(level),
            Levels::Plain(e) => plain::nearest(*e, level),
            Levels::Table(table, _) => {
                table.windows(2).filter(|w| 2.0 * level > w[0] + w[1]).count() as i32
            }
        };
        let guess = guess.clamp(low, high);
        let error = |&code: &i32| (f64::from(self.value(p, code)) - f64::from(x)).abs();
        let around = [guess, (guess - 1).max(low), (guess + 1).min(high)];
        around.into_iter().min_by(|a, b| error(a).total_cmp(&error(b))).unwrap_or(guess)
    }

    /// The lowest and the highest code that a fold may write.
    pub fn code_range(&self) -> (i32, i32) {
        match &self.levels {
            Levels::Unsigned => (0, self.ones() as i32),
            // Symmetric quantizers don't use the code −128.
            Levels::Signed if self.bits == 8 => (-127, 127),
            Levels::Signed => (-(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1),
            Levels::Float(kind) => kind.code_range(),
            Levels::Plain(e) => plain::code_range(*e),
            Levels::Table(..) => (0, 15),
        }
    }

    /// Decodes some columns of a row into `out`, `[cols.len()]`.
    pub fn decode(&self, bytes: &[u8], row: usize, cols: Range<usize>, out: &mut [f32]) {
        const TILE: usize = 512;
        let (mut codes, mut params) = ([0; TILE], [Params::default(); TILE]);
        for (i, out) in out.chunks_mut(TILE).enumerate() {
            let (codes, params) = (&mut codes[..out.len()], &mut params[..out.len()]);
            let start = cols.start + i * TILE;
            self.unpack(bytes, row, start..start + out.len(), codes, params);
            for ((y, &code), &p) in out.iter_mut().zip(codes.iter()).zip(params.iter()) {
                *y = self.value(p, code);
            }
        }
    }
}
