//! AVX2 with FMA, and AVX-512.

use std::arch::x86_64::*;

use super::{by_columns, column_words, same_bits, store_some};
use super::{Kernel, Layout, Multiply, Shape, WholeKernel, GROUP};

/// Columns that are packed at a time.
const STEP: usize = 16;

same_bits! {
    four: [u32; 4] => __m128;
    eight: __m256 => [u32; 8];
    bytes: [u8; 16] => __m128i;
    eight_of: __m256i => [u32; 8];
    narrow: [u32; 16] => [__m256; 2];
    whole: [u32; 16] => [__m256i; 2];
    narrow_floats: [f32; 16] => [__m256; 2];
    from_narrow: [__m256; 2] => [f32; 16];
    wide: [u32; 32] => [__m512; 2];
    wide_floats: [f32; 32] => [__m512; 2];
    from_wide: [__m512; 2] => [f32; 32];
}

pub(super) fn kernels() -> impl Iterator<Item = Kernel> {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let avx512 = avx2 && is_x86_feature_detected!("avx512f");
    let of_16 = |columns: usize, multiply: Multiply| Shape {
        rows: 16,
        columns,
        pack: pack::<16>,
        multiply,
    };
    let whole = Some(WholeKernel {
        small: [of_16(3, multiply_small::<32, false>), of_16(3, multiply_small::<256, false>)],
        with_minimum: [of_16(3, multiply_small::<32, true>), of_16(3, multiply_small::<256, true>)],
        signed: [of_16(6, multiply_signed::<32>), of_16(6, multiply_signed::<256>)],
    });
    let large = Kernel {
        name: "avx512",
        floats: Shape { rows: 32, columns: 12, pack: pack::<32>, multiply: avx512_multiply },
        pack_bf16: pack_bf16::<32>,
        // Of 256 bits: where vectors of 512 bits take two steps, they gain nothing.
        whole,
    };
    let small =
        Kernel { name: "avx2", floats: of_16(6, avx2_multiply), pack_bf16: pack_bf16::<16>, whole };
    avx512.then_some(large).into_iter().chain(avx2.then_some(small))
}

/// Interleaves rows of words into a panel of ROWS.
fn pack<const ROWS: usize>(plain: &[u32], panel: &mut [u32], at: usize) {
    // Safety: the kernels that hold this function exist only where the processor has AVX2.
    unsafe { avx2_pack::<ROWS>(plain, panel, at) }
}

#[target_feature(enable = "avx2")]
fn avx2_pack<const ROWS: usize>(plain: &[u32], panel: &mut [u32], at: usize) {
    let k = plain.len() / GROUP;
    let from: [_; GROUP] = std::array::from_fn(|r| plain[r * k..][..k].as_chunks::<STEP>().0);
    let columns = panel[..k * ROWS].as_chunks_mut::<ROWS>().0;
    let (steps, rest) = columns.as_chunks_mut::<STEP>();
    for (i, to) in steps.iter_mut().enumerate() {
        let rows: [&[u32; STEP]; GROUP] = std::array::from_fn(|r| &from[r][i]);
        for (j, to) in to.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            // Four columns of the rows r and r + 4, side by side: what is left to transpose are
            // blocks of 4 by 4.
            let part = |r: usize| four(rows[r].as_chunks::<4>().0[j]);
            let load = |r: usize| _mm256_set_m128(part(r + 4), part(r));
            let [a, b, c, d] = [load(0), load(1), load(2), load(3)];
            let (ab, cd) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d));
            let (ab_high, cd_high) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d));
            group(&mut to[0], at, eight(_mm256_shuffle_ps::<0x44>(ab, cd)));
            group(&mut to[1], at, eight(_mm256_shuffle_ps::<0xee>(ab, cd)));
            group(&mut to[2], at, eight(_mm256_shuffle_ps::<0x44>(ab_high, cd_high)));
            group(&mut to[3], at, eight(_mm256_shuffle_ps::<0xee>(ab_high, cd_high)));
        }
    }
    for (i, to) in (k / STEP * STEP..k).zip(rest) {
        for r in 0..GROUP {
            to[at + r] = plain[r * k + i];
        }
    }
}

fn pack_bf16<const ROWS: usize>(stored: [&[u8]; GROUP], panel: &mut [u32], at: usize) {
    // Safety: the kernels that hold this function exist only where the processor has AVX2.
    unsafe { avx2_pack_bf16::<ROWS>(stored, panel, at) }
}

#[target_feature(enable = "avx2")]
fn avx2_pack_bf16<const ROWS: usize>(stored: [&[u8]; GROUP], panel: &mut [u32], at: usize) {
    let k = stored[0].len() / 2;
    let from = stored.map(|row| row[..2 * k].as_chunks::<{ 2 * STEP }>().0);
    let columns = panel[..k * ROWS].as_chunks_mut::<ROWS>().0;
    let (steps, rest) = columns.as_chunks_mut::<STEP>();
    let zero = _mm256_setzero_si256();
    for (i, to) in steps.iter_mut().enumerate() {
        let rows: [&[u8; 2 * STEP]; GROUP] = std::array::from_fn(|r| &from[r][i]);
        for (j, to) in to.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            // Eight columns of the rows r and r + 4, side by side.
            let part = |r: usize| bytes(rows[r].as_chunks::<16>().0[j]);
            let load = |r: usize| _mm256_set_m128i(part(r + 4), part(r));
            let [a, b, c, d] = [load(0), load(1), load(2), load(3)];
            let (ab, cd) = (_mm256_unpacklo_epi16(a, b), _mm256_unpacklo_epi16(c, d));
            let (ab_high, cd_high) = (_mm256_unpackhi_epi16(a, b), _mm256_unpackhi_epi16(c, d));
            let pairs = [
                _mm256_unpacklo_epi32(ab, cd),
                _mm256_unpackhi_epi32(ab, cd),
                _mm256_unpacklo_epi32(ab_high, cd_high),
                _mm256_unpackhi_epi32(ab_high, cd_high),
            ];
            // A float's upper half is a BF16.
            for (pair, to) in pairs.into_iter().zip(to.as_chunks_mut::<2>().0) {
                group(&mut to[0], at, eight_of(_mm256_unpacklo_epi16(zero, pair)));
                group(&mut to[1], at, eight_of(_mm256_unpackhi_epi16(zero, pair)));
            }
        }
    }
    for (i, to) in (k / STEP * STEP..k).zip(rest) {
        for (r, row) in stored.iter().enumerate() {
            let bits = u16::from_le_bytes([row[2 * i], row[2 * i + 1]]);
            to[at + r] = u32::from(bits) << 16;
        }
    }
}

/// Writes a group of rows of one column.
#[inline(always)]
fn group<const ROWS: usize>(column: &mut [u32; ROWS], at: usize, values: [u32; GROUP]) {
    column.as_chunks_mut::<GROUP>().0[at / GROUP] = values;
}

/// Prefetches the lines of y that a kernel is about to write.
#[inline(always)]
fn prefetch(y: &[&mut [f32]], at: usize) {
    for y in y {
        // Safety: a prefetch never fails, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(y.as_ptr().wrapping_add(at).cast()) }
    }
}

fn avx2_multiply(panel: &[u32], x: &[u32], y: &mut [&mut [f32]], at: usize, add: bool) {
    // Safety: the kernel exists only where the processor has AVX2 and FMA.
    unsafe { by_columns!(y.len(), avx2, (panel, x, y, at, add), 1 2 3 4 5 6) }
}

#[target_feature(enable = "avx2,fma")]
fn avx2<const N: usize>(panel: &[u32], x: &[u32], y: &mut [&mut [f32]], at: usize, add: bool) {
    prefetch(y, at);
    let mut sums = [[_mm256_setzero_ps(); 2]; N];
    for (w, x) in panel.as_chunks::<16>().0.iter().zip(x.as_chunks::<N>().0) {
        let [low, high] = narrow(*w);
        for j in 0..N {
            let x = _mm256_set1_ps(f32::from_bits(x[j]));
            sums[j][0] = _mm256_fmadd_ps(low, x, sums[j][0]);
            sums[j][1] = _mm256_fmadd_ps(high, x, sums[j][1]);
        }
    }
    for (y, sums) in y.iter_mut().zip(sums) {
        put(y, at, sums, add);
    }
}

fn multiply_small<const L: usize, const MINIMUM: bool>(
    panel: &[u32],
    x: &[u32],
    y: &mut [&mut [f32]],
    at: usize,
    add: bool,
) {
    // Safety: the kernel exists only where the processor has AVX2.
    unsafe {
        match y.len() {
            1 => small::<L, MINIMUM, 1>(panel, x, y, at, add),
            2 => small::<L, MINIMUM, 2>(panel, x, y, at, add),
            3 => small::<L, MINIMUM, 3>(panel, x, y, at, add),
            n => unreachable!("{n} columns"),
        }
    }
}

/// Up to 31 by up to 127, two of them, four times, fits 16 bits.
#[target_feature(enable = "avx2")]
fn small<const L: usize, const MINIMUM: bool, const N: usize>(
    panel: &[u32],
    x: &[u32],
    y: &mut [&mut [f32]],
    at: usize,
    add: bool,
) {
    prefetch(y, at);
    let zero = _mm256_setzero_si256();
    let mut values = [[_mm256_setzero_ps(); 2]; N];
    let layout = if MINIMUM { Layout::WithMinimum } else { Layout::Small };
    let rows = panel.as_chunks::<16>().0.chunks_exact(layout.words(L));
    let columns = x.as_chunks::<N>().0.chunks_exact(column_words(layout, L));
    for (w, x) in rows.zip(columns) {
        let (levels, w) = w.split_at(L / 4);
        let (units, w) = w.split_at(L / 16);
        let (leasts, w) = w.split_at(L / 32);
        let (codes, x) = x.split_at(L / 4);
        let (code_sums, x) = x.split_at(L / 32);
        let mut sums = [[zero; 2]; N];
        let groups = levels.as_chunks::<4>().0.iter().zip(codes.as_chunks::<4>().0);
        for ((levels, codes), unit) in groups.zip(units) {
            let mut group = [[zero; 2]; N];
            for (w, x) in levels.iter().zip(codes) {
                let [low, high] = whole(*w);
                for j in 0..N {
                    let x = _mm256_set1_epi32(x[j] as i32);
                    group[j][0] = _mm256_add_epi16(group[j][0], _mm256_maddubs_epi16(low, x));
                    group[j][1] = _mm256_add_epi16(group[j][1], _mm256_maddubs_epi16(high, x));
                }
            }
            let unit = whole(*unit);
            for j in 0..N {
                for i in 0..2 {
                    let part = _mm256_madd_epi16(group[j][i], unit[i]);
                    sums[j][i] = _mm256_add_epi32(sums[j][i], part);
                }
            }
        }
        let mut least_sums = [[zero; 2]; N];
        for (w, x) in leasts.iter().zip(code_sums) {
            let w = whole(*w);
            for j in 0..N {
                let x = _mm256_set1_epi32(x[j] as i32);
                for i in 0..2 {
                    let part = _mm256_madd_epi16(w[i], x);
                    least_sums[j][i] = _mm256_add_epi32(least_sums[j][i], part);
                }
            }
        }
        let scale = narrow(w[0]);
        let minimum = if MINIMUM { narrow(w[1]) } else { scale };
        for (j, values) in values.iter_mut().enumerate() {
            let x = _mm256_set1_ps(f32::from_bits(x[0][j]));
            for i in 0..2 {
                let scaled =
                    |sum, scale| _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(scale, x));
                let (sum, least) = (sums[j][i], least_sums[j][i]);
                let value = match MINIMUM {
                    true => _mm256_sub_ps(scaled(sum, scale[i]), scaled(least, minimum[i])),
                    false => scaled(_mm256_sub_epi32(sum, least), scale[i]),
                };
                values[i] = _mm256_add_ps(values[i], value);
            }
        }
    }
    for (y, values) in y.iter_mut().zip(values) {
        put(y, at, values, add);
    }
}

fn multiply_signed<const L: usize>(
    panel: &[u32],
    x: &[u32],
    y: &mut [&mut [f32]],
    at: usize,
    add: bool,
) {
    // Safety: the kernel exists only where the processor has AVX2.
    unsafe {
        match y.len() {
            1 => signed::<L, 1>(panel, x, y, at, add),
            2 => signed::<L, 2>(panel, x, y, at, add),
            3 => signed::<L, 3>(panel, x, y, at, add),
            4 => signed::<L, 4>(panel, x, y, at, add),
            5 => signed::<L, 5>(panel, x, y, at, add),
            6 => signed::<L, 6>(panel, x, y, at, add),
            n => unreachable!("{n} columns"),
        }
    }
}

#[target_feature(enable = "avx2")]
fn signed<const L: usize, const N: usize>(
    panel: &[u32],
    x: &[u32],
    y: &mut [&mut [f32]],
    at: usize,
    add: bool,
) {
    prefetch(y, at);
    let mut values = [[_mm256_setzero_ps(); 2]; N];
    let rows = panel.as_chunks::<16>().0.chunks_exact(Layout::Signed.words(L));
    let columns = x.as_chunks::<N>().0.chunks_exact(Layout::Signed.words(L));
    for (w, x) in rows.zip(columns) {
        let (levels, scale) = w.split_at(L / 2);
        let mut sums = [[_mm256_setzero_si256(); 2]; N];
        for (w, x) in levels.iter().zip(x) {
            let [low, high] = whole(*w);
            for j in 0..N {
                let x = _mm256_set1_epi32(x[j] as i32);
                sums[j][0] = _mm256_add_epi32(sums[j][0], _mm256_madd_epi16(low, x));
                sums[j][1] = _mm256_add_epi32(sums[j][1], _mm256_madd_epi16(high, x));
            }
        }
        let scale = narrow(scale[0]);
        for (j, values) in values.iter_mut().enumerate() {
            let x = _mm256_set1_ps(f32::from_bits(x[L / 2][j]));
            for i in 0..2 {
                let sum = _mm256_cvtepi32_ps(sums[j][i]);
                let value = _mm256_mul_ps(sum, _mm256_mul_ps(scale[i], x));
                values[i] = _mm256_add_ps(values[i], value);
            }
        }
    }
    for (y, values) in y.iter_mut().zip(values) {
        put(y, at, values, add);
    }
}

/// Sets or adds 16 rows of a column, of which the last may not exist.
#[inline]
#[target_feature(enable = "avx2")]
fn put(y: &mut [f32], at: usize, values: [__m256; 2], add: bool) {
    match y[at..].first_chunk_mut::<16>() {
        Some(y) if add => {
            let old = narrow_floats(*y);
            *y = from_narrow([_mm256_add_ps(old[0], values[0]), _mm256_add_ps(old[1], values[1])]);
        }
        Some(y) => *y = from_narrow(values),
        None => store_some(&from_narrow(values), &mut y[at..], add),
    }
}

fn avx512_multiply(panel: &[u32], x: &[u32], y: &mut [&mut [f32]], at: usize, add: bool) {
    // Safety: the kernel exists only where the processor has AVX-512.
    unsafe { by_columns!(y.len(), avx512, (panel, x, y, at, add), 1 2 3 4 5 6 7 8 9 10 11 12) }
}

#[target_feature(enable = "avx512f")]
fn avx512<const N: usize>(panel: &[u32], x: &[u32], y: &mut [&mut [f32]], at: usize, add: bool) {
    prefetch(y, at);
    let mut sums = [[_mm512_setzero_ps(); 2]; N];
    for (w, x) in panel.as_chunks::<32>().0.iter().zip(x.as_chunks::<N>().0) {
        let [low, high] = wide(*w);
        for j in 0..N {
            let x = _mm512_set1_ps(f32::from_bits(x[j]));
            sums[j][0] = _mm512_fmadd_ps(low, x, sums[j][0]);
            sums[j][1] = _mm512_fmadd_ps(high, x, sums[j][1]);
        }
    }
    for (y, sums) in y.iter_mut().zip(sums) {
        match y[at..].first_chunk_mut::<32>() {
            Some(y) if add => {
                let old = wide_floats(*y);
                *y = from_wide([_mm512_add_ps(old[0], sums[0]), _mm512_add_ps(old[1], sums[1])]);
            }
            Some(y) => *y = from_wide(sums),
            None => store_some(&from_wide(sums), &mut y[at..], add),
        }
    }
}
