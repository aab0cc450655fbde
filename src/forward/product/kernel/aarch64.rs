//! NEON, which every 64-bit ARM processor has.

use std::arch::aarch64::*;

use super::portable::{pack, pack_bf16, ROWS};
use super::{by_columns, same_bits, store_some, Kernel, Shape};

same_bits! {
    vectors: [u32; ROWS] => [float32x4_t; 2];
    floats: [float32x4_t; 2] => [f32; ROWS];
}

pub(super) fn kernels() -> impl Iterator<Item = Kernel> {
    let floats = Shape { rows: ROWS, columns: 12, pack, multiply };
    std::iter::once(Kernel { name: "neon", floats, pack_bf16, whole: None })
}

fn multiply(panel: &[u32], x: &[u32], y: &mut [&mut [f32]], at: usize, add: bool) {
    // Safety: NEON is part of this architecture.
    unsafe { by_columns!(y.len(), neon, (panel, x, y, at, add), 1 2 3 4 5 6 7 8 9 10 11 12) }
}

#[target_feature(enable = "neon")]
fn neon<const N: usize>(panel: &[u32], x: &[u32], y: &mut [&mut [f32]], at: usize, add: bool) {
    let mut sums = [[vdupq_n_f32(0.0); 2]; N];
    for (w, x) in panel.as_chunks::<ROWS>().0.iter().zip(x.as_chunks::<N>().0) {
        let [low, high] = vectors(*w);
        for j in 0..N {
            sums[j][0] = vfmaq_n_f32(sums[j][0], low, f32::from_bits(x[j]));
            sums[j][1] = vfmaq_n_f32(sums[j][1], high, f32::from_bits(x[j]));
        }
    }
    for (y, sums) in y.iter_mut().zip(sums) {
        store_some(&floats(sums), &mut y[at..], add);
    }
}
