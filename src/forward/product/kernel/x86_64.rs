//! AVX2 with FMA, and AVX-512.

use std::arch::x86_64::*;

use super::{by_columns, same_bits, store_some, Kernel, GROUP};

/// Columns that are packed at a time.
const STEP: usize = 16;

same_bits! {
    four: [f32; 4] => __m128;
    eight: __m256 => [f32; 8];
    bytes: [u8; 16] => __m128i;
    eight_of: __m256i => [f32; 8];
    narrow: [f32; 16] => [__m256; 2];
    from_narrow: [__m256; 2] => [f32; 16];
    wide: [f32; 32] => [__m512; 2];
    from_wide: [__m512; 2] => [f32; 32];
}

pub(super) fn kernels() -> impl Iterator<Item = Kernel> {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let avx512 = avx2 && is_x86_feature_detected!("avx512f");
    let large = Kernel {
        name: "avx512",
        rows: 32,
        columns: 12,
        pack: pack::<32>,
        pack_bf16: pack_bf16::<32>,
        multiply: avx512_multiply,
    };
    let small = Kernel {
        name: "avx2",
        rows: 16,
        columns: 6,
        pack: pack::<16>,
        pack_bf16: pack_bf16::<16>,
        multiply: avx2_multiply,
    };
    avx512.then_some(large).into_iter().chain(avx2.then_some(small))
}

/// Interleaves decoded rows into a panel of ROWS.
fn pack<const ROWS: usize>(plain: &[f32], panel: &mut [f32], at: usize) {
    // Safety: the kernels that hold this function exist only where the processor has AVX2.
    unsafe { avx2_pack::<ROWS>(plain, panel, at) }
}

#[target_feature(enable = "avx2")]
fn avx2_pack<const ROWS: usize>(plain: &[f32], panel: &mut [f32], at: usize) {
    let k = plain.len() / GROUP;
    let from: [_; GROUP] = std::array::from_fn(|r| plain[r * k..][..k].as_chunks::<STEP>().0);
    let columns = panel[..k * ROWS].as_chunks_mut::<ROWS>().0;
    let (steps, rest) = columns.as_chunks_mut::<STEP>();
    for (i, to) in steps.iter_mut().enumerate() {
        let rows: [&[f32; STEP]; GROUP] = std::array::from_fn(|r| &from[r][i]);
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

fn pack_bf16<const ROWS: usize>(stored: [&[u8]; GROUP], panel: &mut [f32], at: usize) {
    // Safety: the kernels that hold this function exist only where the processor has AVX2.
    unsafe { avx2_pack_bf16::<ROWS>(stored, panel, at) }
}

#[target_feature(enable = "avx2")]
fn avx2_pack_bf16<const ROWS: usize>(stored: [&[u8]; GROUP], panel: &mut [f32], at: usize) {
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
            to[at + r] = f32::from_bits(u32::from(bits) << 16);
        }
    }
}

/// Writes a group of rows of one column.
#[inline(always)]
fn group<const ROWS: usize>(column: &mut [f32; ROWS], at: usize, values: [f32; GROUP]) {
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

fn avx2_multiply(panel: &[f32], x: &[f32], y: &mut [&mut [f32]], at: usize, add: bool) {
    // Safety: the kernel exists only where the processor has AVX2 and FMA.
    unsafe { by_columns!(y.len(), avx2, (panel, x, y, at, add), 1 2 3 4 5 6) }
}

#[target_feature(enable = "avx2,fma")]
fn avx2<const N: usize>(panel: &[f32], x: &[f32], y: &mut [&mut [f32]], at: usize, add: bool) {
    prefetch(y, at);
    let mut sums = [[_mm256_setzero_ps(); 2]; N];
    for (w, x) in panel.as_chunks::<16>().0.iter().zip(x.as_chunks::<N>().0) {
        let [low, high] = narrow(*w);
        for j in 0..N {
            let x = _mm256_set1_ps(x[j]);
            sums[j][0] = _mm256_fmadd_ps(low, x, sums[j][0]);
            sums[j][1] = _mm256_fmadd_ps(high, x, sums[j][1]);
        }
    }
    for (y, sums) in y.iter_mut().zip(sums) {
        match y[at..].first_chunk_mut::<16>() {
            Some(y) if add => {
                let old = narrow(*y);
                *y = from_narrow([_mm256_add_ps(old[0], sums[0]), _mm256_add_ps(old[1], sums[1])]);
            }
            Some(y) => *y = from_narrow(sums),
            None => store_some(&from_narrow(sums), &mut y[at..], add),
        }
    }
}

fn avx512_multiply(panel: &[f32], x: &[f32], y: &mut [&mut [f32]], at: usize, add: bool) {
    // Safety: the kernel exists only where the processor has AVX-512.
    unsafe { by_columns!(y.len(), avx512, (panel, x, y, at, add), 1 2 3 4 5 6 7 8 9 10 11 12) }
}

#[target_feature(enable = "avx512f")]
fn avx512<const N: usize>(panel: &[f32], x: &[f32], y: &mut [&mut [f32]], at: usize, add: bool) {
    prefetch(y, at);
    let mut sums = [[_mm512_setzero_ps(); 2]; N];
    for (w, x) in panel.as_chunks::<32>().0.iter().zip(x.as_chunks::<N>().0) {
        let [low, high] = wide(*w);
        for j in 0..N {
            let x = _mm512_set1_ps(x[j]);
            sums[j][0] = _mm512_fmadd_ps(low, x, sums[j][0]);
            sums[j][1] = _mm512_fmadd_ps(high, x, sums[j][1]);
        }
    }
    for (y, sums) in y.iter_mut().zip(sums) {
        match y[at..].first_chunk_mut::<32>() {
            Some(y) if add => {
                let old = wide(*y);
                *y = from_wide([_mm512_add_ps(old[0], sums[0]), _mm512_add_ps(old[1], sums[1])]);
            }
            Some(y) => *y = from_wide(sums),
            None => store_some(&from_wide(sums), &mut y[at..], add),
        }
    }
}
