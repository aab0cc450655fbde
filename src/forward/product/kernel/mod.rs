//! The kernels: small blocks of a product that stay in registers. The only instructions here that
//! not every processor has, and the only unsafe code of the forward pass.
//!
//! A kernel multiplies a panel of weight rows, `[k, rows]`, by a panel of columns, `[k, columns]`.
//! An element is one chain of multiply-adds over k, which starts at zero. The kernels for AVX2,
//! AVX-512 and NEON fuse them and give the same bits.
//!
//! **Whole numbers.** The words of weights are those of [`Layout`]. The words of a column's block
//! under small blocks: 4 codes each; for each 32 elements two sums of 16 codes; the scale. Under
//! signed blocks: 2 codes each; the scale. The sums of a block are whole, so exact; the floats that
//! they become are multiplied and added in one order and never fused. All kernels give the same
//! bits.
//!
//! Vectors are loaded and stored as arrays, not through pointers: what is unsafe is to call a
//! function that this processor might not be able to run. Checks of pointers would also cost a
//! debug build most of its speed.
#![allow(unsafe_code)]

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use crate::encoding::whole::Layout;

/// Rows that are packed at a time; the rows of every panel are a multiple.
pub const GROUP: usize = 8;

/// Interleaves rows of words, `[GROUP, k]`, into a panel, `[k, rows]`, from the given row on, a
/// multiple of GROUP.
type Pack = fn(&[u32], &mut [u32], usize);

/// The same of rows of BF16 as they are stored, which become bits of floats.
pub type PackStored = fn([&[u8]; GROUP], &mut [u32], usize);

/// Multiplies a panel of weights, `[k, rows]`, by one of columns, `[k, y.len()]`. Rows `at..at +
/// rows` of `y[j]`, as far as it has them, are set to the sums of column j; or these are added,
/// when `add`. Words are bits of floats, or blocks of whole numbers (`whole.rs`).
pub type Multiply = fn(&[u32], &[u32], &mut [&mut [f32]], usize, bool);

/// A kernel, and the panels that it takes.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Weight rows of a panel, a multiple of [`GROUP`].
    pub rows: usize,
    /// Most columns of a panel.
    pub columns: usize,
    /// Interleaves a group of rows.
    pub pack: Pack,
    /// Multiplies two panels.
    pub multiply: Multiply,
}

/// The kernels for whole numbers: blocks of 32 and of 256 elements.
#[derive(Clone, Copy)]
pub struct WholeKernel {
    /// [`Layout::Small`].
    pub small: [Shape; 2],
    /// [`Layout::WithMinimum`].
    pub with_minimum: [Shape; 2],
    /// [`Layout::Signed`].
    pub signed: [Shape; 2],
}

/// Words of a column's block of `len` elements.
pub const fn column_words(layout: Layout, len: usize) -> usize {
    match layout {
        Layout::Small | Layout::WithMinimum => len / 4 + len / 32 + 1,
        Layout::Signed => len / 2 + 1,
    }
}

/// One processor's way to multiply.
#[derive(Clone, Copy)]
pub struct Kernel {
    /// The instructions that it uses.
    #[cfg_attr(not(test), allow(dead_code))]
    pub name: &'static str,
    /// Floats.
    pub floats: Shape,
    /// Interleaves a group of rows of BF16.
    pub pack_bf16: PackStored,
    /// Whole numbers, where this processor gains by them.
    pub whole: Option<WholeKernel>,
}

impl Kernel {
    /// The kernels that this processor can run, the fastest first.
    pub fn all() -> Vec<Kernel> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        all.extend(x86_64::kernels());
        #[cfg(target_arch = "aarch64")]
        all.extend(aarch64::kernels());
        all.push(portable::KERNEL);
        all
    }

    /// The fastest kernel of this processor.
    pub fn best() -> Kernel {
        static BEST: std::sync::OnceLock<Kernel> = std::sync::OnceLock::new();
        *BEST.get_or_init(|| Kernel::all()[0])
    }
}

/// Calls `$f::<N>` for the number of columns N, one of those given.
macro_rules! by_columns {
    ($columns:expr, $f:ident, $args:tt, $($n:literal)*) => {
        match $columns {
            $($n => by_columns!(@ $f, $n, $args),)*
            n => unreachable!("{n} columns"),
        }
    };
    (@ $f:ident, $n:literal, ($($arg:expr),*)) => { $f::<$n>($($arg),*) };
}
use by_columns;

/// Functions from arrays to vectors and back, which change no bit.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! same_bits {
    ($($name:ident: $from:ty => $to:ty;)*) => {$(
        #[inline(always)]
        fn $name(from: $from) -> $to {
            // Safety: both are so many numbers without padding, which all bits are values of; the
            // compiler compares the sizes.
            unsafe { std::mem::transmute::<$from, $to>(from) }
        }
    )*};
}
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use same_bits;

/// Sets or adds the sums of a column, of which the last rows may not exist.
#[inline(always)]
fn store_some(sums: &[f32], y: &mut [f32], add: bool) {
    for (y, &sum) in y.iter_mut().zip(sums) {
        *y = if add { *y + sum } else { sum };
    }
}
