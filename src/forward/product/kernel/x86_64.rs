//! AVX2 with FMA, and AVX-512.

use std::arch::x86_64::*;

use super::{by_columns, same_bits, store_some, Kernel, GROUP};

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
    let large = Kernel { name: "avx512", rows: 32, columns: 12, pack, pack_bf16, multiply: avx512_multiply };
    let small = Kernel { name: "avx2", rows: 16, columns: 6, pack, pack_bf16, multiply: avx2_multiply };
    avx512.then_some(large).into_iter().chain(avx2.then_some(small))
}

fn pack(plain: &[f32], panel: &mut [f32], rows: usize, at: usize) {
    // Safety: the kernels that hold this function exist only where the processor has AVX2.
    unsafe { avx2_pack(plain, panel, rows, at) }
}

#[target_feature(enable = "avx2")]
fn avx2_pack(plain: &[f32], panel: &mut [f32], rows: usize, at: usize) {
    let k = plain.len() / GROUP;
    let from: [_; GROUP] = std::array::from_fn(|r| plain[r * k..][..k].as_chunks::<4>().0);
    for i in 0..k / 4 {
        // Four columns of the rows r and r + 4, side by side: what is left to transpose are blocks of 4 by 4.
        let load = |r: usize| _mm256_set_m128(four(from[r + 4][i]), four(from[r][i]));
        let [a, b, c, d] = [load(0), load(1), load(2), load(3)];
        let (ab, cd) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d));
        let (ab_high, cd_high) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d));
        let columns = [
            _mm256_shuffle_ps::<0x44>(ab, cd),
            _mm256_shuffle_ps::<0xee>(ab, cd),
            _mm256_shuffle_ps::<0x44>(ab_high, cd_high),
            _mm256_shuffle_ps::<0xee>(ab_high, cd_high),
        ];
        let to = panel[4 * i * rows..][..4 * rows].as_chunks_mut::<GROUP>().0;
        for (j, column) in columns.into_iter().enumerate() {
            to[(j * rows + at) / GROUP] = eight(column);
        }
    }
    for i in k / 4 * 4..k {
        for r in 0..GROUP {
            panel[i * rows + at + r] = plain[r * k + i];
        }
    }
}

fn pack_bf16(stored: [&[u8]; GROUP], panel: &mut [f32], rows: usize, at: usize) {
    // Safety: the kernels that hold this function exist only where the processor has AVX2.
    unsafe { avx2_pack_bf16(stored, panel, rows, at) }
}

#[target_feature(enable = "avx2")]
fn avx2_pack_bf16(stored: [&[u8]; GROUP], panel: &mut [f32], rows: usize, at: usize) {
    let k = panel.len() / rows;
    let from = stored.map(|row| row[..2 * k].as_chunks::<16>().0);
    for i in 0..k / 8 {
        // Eight columns of the rows r and r + 4, side by side.
        let load = |r: usize| _mm256_set_m128i(bytes(from[r + 4][i]), bytes(from[r][i]));
        let [a, b, c, d] = [load(0), load(1), load(2), load(3)];
        let (ab, cd) = (_mm256_unpacklo_epi16(a, b), _mm256_unpacklo_epi16(c, d));
        let (ab_high, cd_high) = (_mm256_unpackhi_epi16(a, b), _mm256_unpackhi_epi16(c, d));
        let pairs = [
            _mm256_unpacklo_epi32(ab, cd),
            _mm256_unpackhi_epi32(ab, cd),
            _mm256_unpacklo_epi32(ab_high, cd_high),
            _mm256_unpackhi_epi32(ab_high, cd_high),
        ];
        let zero = _mm256_setzero_si256();
        let to = panel[8 * i * rows..][..8 * rows].as_chunks_mut::<GROUP>().0;
        for (j, pair) in pairs.into_iter().enumerate() {
            to[(2 * j * rows + at) / GROUP] = eight_of(_mm256_unpacklo_epi16(zero, pair));
            to[((2 * j + 1) * rows + at) / GROUP] = eight_of(_mm256_unpackhi_epi16(zero, pair));
        }
    }
    for i in k / 8 * 8..k {
        for (r, row) in stored.iter().enumerate() {
            let bits = u16::from_le_bytes([row[2 * i], row[2 * i + 1]]);
            panel[i * rows + at + r] = f32::from_bits(u32::from(bits) << 16);
        }
    }
}

/// Calls for the lines of y that a kernel is going to write: they come while it multiplies.
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
