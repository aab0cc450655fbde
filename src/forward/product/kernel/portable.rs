//! The reference of the other kernels: plain loops, which the compiler turns into whatever vectors
//! are always there.

use super::{by_columns, store_some, Kernel, GROUP};

pub(super) const ROWS: usize = 8;

pub(super) const KERNEL: Kernel =
    Kernel { name: "portable", rows: ROWS, columns: 4, pack, pack_bf16, multiply };

pub(super) fn pack(plain: &[f32], panel: &mut [f32], at: usize) {
    let k = plain.len() / GROUP;
    for (r, row) in plain.chunks_exact(k.max(1)).enumerate() {
        for (to, &from) in panel.as_chunks_mut::<ROWS>().0.iter_mut().zip(row) {
            to[at + r] = from;
        }
    }
}

pub(super) fn pack_bf16(stored: [&[u8]; GROUP], panel: &mut [f32], at: usize) {
    for (r, row) in stored.iter().enumerate() {
        for (to, bytes) in panel.as_chunks_mut::<ROWS>().0.iter_mut().zip(row.as_chunks::<2>().0) {
            to[at + r] = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
        }
    }
}

fn multiply(panel: &[f32], x: &[f32], y: &mut [&mut [f32]], at: usize, add: bool) {
    by_columns!(y.len(), columns, (panel, x, y, at, add), 1 2 3 4)
}

fn columns<const N: usize>(panel: &[f32], x: &[f32], y: &mut [&mut [f32]], at: usize, add: bool) {
    let mut sums = [[0.0f32; ROWS]; N];
    for (w, x) in panel.as_chunks::<ROWS>().0.iter().zip(x.as_chunks::<N>().0) {
        for j in 0..N {
            for r in 0..ROWS {
                sums[j][r] += w[r] * x[j];
            }
        }
    }
    for (y, sums) in y.iter_mut().zip(&sums) {
        store_some(sums, &mut y[at..], add);
    }
}
