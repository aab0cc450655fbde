//! The points of the lattices, as published in llama.cpp (MIT), ggml/src/ggml-common.h. The script
//! `grids.py` beside this file writes grids.bin from that header.

/// The points of all tables, one table after the other. A point has 16 bits.
const POINTS: &[u8; 9216] = include_bytes!("grids.bin");

/// The eight-element points of the 2-bit types.
pub(super) static IQ2_XXS: [u64; 256] = points::<256, 8>(0, &[8, 25, 43]);
pub(super) static IQ2_XS: [u64; 512] = points::<512, 8>(256, &[8, 25, 43]);
pub(super) static IQ2_S: [u64; 1024] = points::<1024, 8>(768, &[8, 25, 43]);
/// The four-element points of the 3-bit types. A point fills the lower half of a word.
pub(super) static IQ3_XXS: [u64; 256] = points::<256, 4>(1792, &[4, 12, 20, 28, 36, 44, 52, 62]);
pub(super) static IQ3_S: [u64; 512] = points::<512, 4>(2048, &[1, 3, 5, 7, 9, 11, 13, 15]);
/// The eight-element points of both 1-bit types. The elements −1, 0 and 1 are stored as 0, 8 and
/// 16: in eighths, plus 8.
pub(super) static IQ1: [u64; 2048] = points::<2048, 8>(2560, &[0, 8, 16]);

/// `N` points of `E` elements, from point `first` of [`POINTS`] on. In a word of the result, each
/// element is a byte, the first one the lowest.
const fn points<const N: usize, const E: usize>(first: usize, levels: &[u8]) -> [u64; N] {
    let bits = 16 / E;
    let mut out = [0; N];
    let mut i = 0;
    while i < N {
        let at = 2 * (first + i);
        let point = u16::from_le_bytes([POINTS[at], POINTS[at + 1]]) as usize;
        let mut e = 0;
        while e < E {
            let index = (point >> (bits * e)) & ((1 << bits) - 1);
            out[i] |= (levels[index] as u64) << (8 * e);
            e += 1;
        }
        i += 1;
    }
    out
}
