//! y = x Wᵀ on the CPU. Threads split the rows of W: each decodes a tile of them once, interleaves it in panels of 16 rows, and
//! multiplies it by all rows of x. An element of y is one chain of sums over the columns, whatever else is in the batch and
//! however many threads there are.

use std::ops::Range;

use rayon::prelude::*;

use crate::error::Result;
use crate::model::Matrix;
use crate::progress;

/// Rows of W in a panel: two vectors of eight.
const PANEL: usize = 16;
/// Rows of x that are worked on at once: with the panel's two vectors they fill the registers.
const ROWS: usize = 6;
/// Elements of a thread's tile of W: 256 KiB, half of a small second-level cache.
const TILE: usize = 64 << 10;
/// Most rows of a tile.
const MOST: usize = 64;

/// The product with rows `of` of `w`: `x` is `[n, w.cols]`, the result `[n, of.len()]`.
///
/// # Errors
/// `Interrupted`.
pub fn product(x: &[f32], w: &Matrix, of: Range<usize>) -> Result<Vec<f32>> {
    let (k, width) = (w.cols, of.len());
    let step = (TILE / k.max(1) / PANEL * PANEL).clamp(PANEL, MOST);
    let tiles: Vec<Range<usize>> =
        of.clone().step_by(step).map(|start| start..(start + step).min(of.end)).collect();
    let done: Vec<Vec<f32>> = tiles
        .par_iter()
        .map_init(Vec::new, |scratch, rows| {
            progress::check()?;
            Ok(tile(x, w, rows.clone(), scratch))
        })
        .collect::<Result<_>>()?;
    let mut y = vec![0.0f32; x.len() / k.max(1) * width];
    y.par_chunks_mut(width.max(1)).enumerate().for_each(|(i, y)| {
        for (rows, tile) in tiles.iter().zip(&done) {
            let n = rows.len();
            y[rows.start - of.start..][..n].copy_from_slice(&tile[i * n..][..n]);
        }
    });
    Ok(y)
}

/// The product with a few rows of `w`: `[n, rows]`. `scratch`: room for the decoded rows, kept from tile to tile.
fn tile(x: &[f32], w: &Matrix, rows: Range<usize>, scratch: &mut Vec<f32>) -> Vec<f32> {
    let (k, width) = (w.cols, rows.len());
    let panels = width.div_ceil(PANEL);
    // The decoded rows of one panel, then all panels interleaved.
    scratch.resize((panels + 1) * PANEL * k, 0.0);
    let (plain, packed) = scratch.split_at_mut(PANEL * k);
    let simd = simd::best();
    for (p, packed) in packed.chunks_exact_mut((PANEL * k).max(1)).enumerate() {
        for (r, row) in plain.chunks_exact_mut(k).enumerate() {
            match rows.start + p * PANEL + r {
                at if at < rows.end => w.decode_row(at, row),
                _ => row.fill(0.0),
            }
        }
        (simd.interleave)(plain, packed, k);
    }
    let mut y = vec![0.0f32; x.len() / k.max(1) * width];
    for (x, y) in x.chunks(ROWS * k).zip(y.chunks_mut(ROWS * width)) {
        let n = x.len() / k;
        for (p, panel) in packed.chunks_exact(PANEL * k).enumerate() {
            let mut sums = [[0.0f32; PANEL]; ROWS];
            (simd.sums)(x, panel, k, &mut sums);
            let (first, len) = (p * PANEL, PANEL.min(width - p * PANEL));
            for (sums, y) in sums.iter().zip(y.chunks_exact_mut(width)).take(n) {
                y[first..first + len].copy_from_slice(&sums[..len]);
            }
        }
    }
    y
}

/// `[PANEL, k]` → `[k, PANEL]`.
fn interleave(plain: &[f32], packed: &mut [f32], k: usize) {
    // Eight columns at a time: a line of the cache is read and written while it is there.
    const STEP: usize = 8;
    for at in (0..k).step_by(STEP) {
        let n = STEP.min(k - at);
        for (r, row) in plain.chunks_exact(k).enumerate() {
            for (j, &value) in row[at..at + n].iter().enumerate() {
                packed[(at + j) * PANEL + r] = value;
            }
        }
    }
}

/// The two inner loops, for one kind of processor.
#[derive(Clone, Copy)]
struct Loops {
    /// The sums of up to [`ROWS`] rows of x, `[rows, k]`, with a panel, `[k, PANEL]`.
    sums: fn(&[f32], &[f32], usize, &mut [[f32; PANEL]; ROWS]),
    /// [`interleave`].
    interleave: fn(&[f32], &mut [f32], usize),
}

/// The reference of the vector kernels.
fn portable(x: &[f32], panel: &[f32], k: usize, sums: &mut [[f32; PANEL]; ROWS]) {
    for (row, sums) in x.chunks_exact(k).zip(sums) {
        for (x, w) in row.iter().zip(panel.chunks_exact(PANEL)) {
            for (s, w) in sums.iter_mut().zip(w) {
                *s += x * w;
            }
        }
    }
}

/// The one place of instructions that not every processor has.
#[allow(unsafe_code)]
mod simd {
    use super::{interleave, portable, Loops, PANEL, ROWS};

    /// The fastest of this processor.
    pub fn best() -> Loops {
        #[cfg(target_arch = "x86_64")]
        if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
            return Loops { sums: fma, interleave: transpose };
        }
        Loops { sums: portable, interleave }
    }

    #[cfg(target_arch = "x86_64")]
    fn transpose(plain: &[f32], packed: &mut [f32], k: usize) {
        assert!(plain.len() == PANEL * k && packed.len() == PANEL * k);
        let whole = k / 8 * 8;
        for at in (0..whole).step_by(8) {
            for half in [0, 8] {
                // Safety: as in `fma`; eight rows of eight are inside of `plain` and of `packed`.
                unsafe {
                    eight(plain[half * k + at..].as_ptr(), k, packed[at * PANEL + half..].as_mut_ptr())
                };
            }
        }
        for at in whole..k {
            for (r, to) in packed[at * PANEL..][..PANEL].iter_mut().enumerate() {
                *to = plain[r * k + at];
            }
        }
    }

    /// Transposes eight rows, `k` apart, of eight numbers to rows that are [`PANEL`] apart.
    ///
    /// Safety: the processor has AVX2; both places hold such rows.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    unsafe fn eight(from: *const f32, k: usize, to: *mut f32) {
        use std::arch::x86_64::*;
        // Safety: the caller's.
        let r: [__m256; 8] = std::array::from_fn(|i| unsafe { _mm256_loadu_ps(from.add(i * k)) });
        let low = |a, b| _mm256_unpacklo_ps(a, b);
        let high = |a, b| _mm256_unpackhi_ps(a, b);
        let t = [
            low(r[0], r[1]),
            high(r[0], r[1]),
            low(r[2], r[3]),
            high(r[2], r[3]),
            low(r[4], r[5]),
            high(r[4], r[5]),
            low(r[6], r[7]),
            high(r[6], r[7]),
        ];
        let front = |a, b| _mm256_shuffle_ps::<0x44>(a, b);
        let back = |a, b| _mm256_shuffle_ps::<0xEE>(a, b);
        let s = [
            front(t[0], t[2]),
            back(t[0], t[2]),
            front(t[1], t[3]),
            back(t[1], t[3]),
            front(t[4], t[6]),
            back(t[4], t[6]),
            front(t[5], t[7]),
            back(t[5], t[7]),
        ];
        for i in 0..4 {
            // Safety: the caller's.
            unsafe {
                _mm256_storeu_ps(to.add(i * PANEL), _mm256_permute2f128_ps::<0x20>(s[i], s[i + 4]));
                _mm256_storeu_ps(to.add((i + 4) * PANEL), _mm256_permute2f128_ps::<0x31>(s[i], s[i + 4]));
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn fma(x: &[f32], panel: &[f32], k: usize, sums: &mut [[f32; PANEL]; ROWS]) {
        assert!(k > 0 && x.len() <= ROWS * k && panel.len() == k * PANEL);
        // Safety: `best` gives this function out only where the processor has both features; the assertion keeps the
        // pointers below inside of the slices.
        unsafe {
            match x.len() / k {
                1 => rows::<1>(x, panel, k, sums),
                2 => rows::<2>(x, panel, k, sums),
                3 => rows::<3>(x, panel, k, sums),
                4 => rows::<4>(x, panel, k, sums),
                5 => rows::<5>(x, panel, k, sums),
                6 => rows::<6>(x, panel, k, sums),
                _ => {}
            }
        }
    }

    /// Safety: the processor has AVX2 and FMA; `x` holds N rows of `k`, `panel` `k` rows of [`PANEL`].
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn rows<const N: usize>(x: &[f32], panel: &[f32], k: usize, sums: &mut [[f32; PANEL]; ROWS]) {
        use std::arch::x86_64::*;
        let mut low = [_mm256_setzero_ps(); N];
        let mut high = [_mm256_setzero_ps(); N];
        let (mut w, mut at) = (panel.as_ptr(), x.as_ptr());
        for _ in 0..k {
            // Safety: `w` moves over the panel a row at a time, `at` over the first row of x; see above.
            unsafe {
                let (a, b) = (_mm256_loadu_ps(w), _mm256_loadu_ps(w.add(8)));
                for j in 0..N {
                    let x = _mm256_broadcast_ss(&*at.add(j * k));
                    low[j] = _mm256_fmadd_ps(a, x, low[j]);
                    high[j] = _mm256_fmadd_ps(b, x, high[j]);
                }
                w = w.add(PANEL);
                at = at.add(1);
            }
        }
        for j in 0..N {
            // Safety: a row of sums has room for two vectors.
            unsafe {
                _mm256_storeu_ps(sums[j].as_mut_ptr(), low[j]);
                _mm256_storeu_ps(sums[j].as_mut_ptr().add(8), high[j]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoding::Encoding;
    use crate::model::Storage;

    fn numbers(n: usize, seed: u64) -> Vec<f32> {
        let mut s = seed;
        let mut next = || {
            s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (s >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    #[test]
    fn every_shape_gives_the_sums_of_products_alone_or_in_a_batch() {
        for (n, k, rows) in [(1, 1, 1), (5, 7, 3), (6, 8, 16), (13, 33, 70), (40, 900, 130), (0, 4, 4)] {
            let (x, weights) = (numbers(n * k, 1), numbers(rows * k, 2));
            let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
            let w = Matrix { rows, cols: k, encoding: Storage::Blocks(Encoding::F32), bytes: &bytes };
            let y = product(&x, &w, 0..rows).unwrap();
            for i in 0..n {
                for r in 0..rows {
                    let of = x[i * k..][..k].iter().zip(&weights[r * k..][..k]);
                    let sum: f64 = of.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    assert!((f64::from(y[i * rows + r]) - sum).abs() < 1e-4 * (k as f64).sqrt());
                }
                let alone = product(&x[i * k..][..k], &w, 0..rows).unwrap();
                assert_eq!(alone, y[i * rows..][..rows], "row {i} of {n}");
            }
            let part = 1.min(rows - 1)..rows;
            let some = product(&x, &w, part.clone()).unwrap();
            for i in 0..n {
                assert_eq!(some[i * part.len()..][..part.len()], y[i * rows + part.start..][..part.len()]);
            }
        }
    }

    #[test]
    fn the_vector_loops_agree_with_the_portable_ones() {
        for k in [1, 8, 21, 64] {
            let plain = numbers(PANEL * k, 5);
            let (mut a, mut b) = (vec![0.0; PANEL * k], vec![0.0; PANEL * k]);
            (simd::best().interleave)(&plain, &mut a, k);
            interleave(&plain, &mut b, k);
            assert_eq!(a, b);
        }
        for (n, k) in [(1, 5), (4, 64), (6, 333)] {
            let (x, panel) = (numbers(n * k, 3), numbers(k * PANEL, 4));
            let (mut a, mut b) = ([[0.0; PANEL]; ROWS], [[0.0; PANEL]; ROWS]);
            (simd::best().sums)(&x, &panel, k, &mut a);
            portable(&x, &panel, k, &mut b);
            let worst = a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).abs());
            assert!(worst.fold(0.0, f32::max) < 1e-4);
        }
    }
}
