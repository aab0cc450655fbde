//! The reference of the other kernels: plain loops, which the compiler turns into whatever vectors
//! are always there.

use super::{by_columns, column_words, store_some};
use super::{Kernel, Layout, Shape, WholeKernel, GROUP};

pub(super) const ROWS: usize = 8;

pub(super) const KERNEL: Kernel = Kernel {
    name: "portable",
    floats: Shape { rows: ROWS, columns: 4, pack, multiply },
    pack_bf16,
    whole: Some(WholeKernel {
        small: [shape(multiply_small::<32, false>), shape(multiply_small::<256, false>)],
        with_minimum: [shape(multiply_small::<32, true>), shape(multiply_small::<256, true>)],
        signed: [shape(multiply_signed::<32>), shape(multiply_signed::<256>)],
    }),
};

const fn shape(multiply: super::Multiply) -> Shape {
    Shape { rows: ROWS, columns: 4, pack, multiply }
}

pub(super) fn pack(plain: &[u32], panel: &mut [u32], at: usize) {
    let k = plain.len() / GROUP;
    for (r, row) in plain.chunks_exact(k.max(1)).enumerate() {
        for (to, &from) in panel.as_chunks_mut::<ROWS>().0.iter_mut().zip(row) {
            to[at + r] = from;
        }
    }
}

pub(super) fn pack_bf16(stored: [&[u8]; GROUP], panel: &mut [u32], at: usize) {
    for (r, row) in stored.iter().enumerate() {
        for (to, bytes) in panel.as_chunks_mut::<ROWS>().0.iter_mut().zip(row.as_chunks::<2>().0) {
            to[at + r] = u32::from(u16::from_le_bytes(*bytes)) << 16;
        }
    }
}

fn multiply(panel: &[u32], x: &[u32], y: &mut [&mut [f32]], at: usize, add: bool) {
    by_columns!(y.len(), columns, (panel, x, y, at, add), 1 2 3 4)
}

fn columns<const N: usize>(panel: &[u32], x: &[u32], y: &mut [&mut [f32]], at: usize, add: bool) {
    let mut sums = [[0.0f32; ROWS]; N];
    for (w, x) in panel.as_chunks::<ROWS>().0.iter().zip(x.as_chunks::<N>().0) {
        for j in 0..N {
            for r in 0..ROWS {
                sums[j][r] += f32::from_bits(w[r]) * f32::from_bits(x[j]);
            }
        }
    }
    for (y, sums) in y.iter_mut().zip(&sums) {
        store_some(sums, &mut y[at..], add);
    }
}

fn multiply_small<const L: usize, const MINIMUM: bool>(
    panel: &[u32],
    x: &[u32],
    y: &mut [&mut [f32]],
    at: usize,
    add: bool,
) {
    let n = y.len();
    let layout = if MINIMUM { Layout::WithMinimum } else { Layout::Small };
    let w = panel.as_chunks::<ROWS>().0.chunks_exact(layout.words(L));
    let (units, leasts, scales) = (L / 4, L / 4 + L / 16, L / 4 + L / 16 + L / 32);
    for (j, y) in y.iter_mut().enumerate() {
        let mut values = [0.0; ROWS];
        for (w, x) in w.clone().zip(x.chunks_exact(n * column_words(layout, L))) {
            let x = |i: usize| x[i * n + j];
            for (r, value) in values.iter_mut().enumerate() {
                let part = |i: usize| four_products(w[i][r], x(i)) * pair(w[units + i / 4][r])[0];
                let sum: i32 = (0..L / 4).map(part).sum();
                let least = |i: usize| two_products(w[leasts + i][r], x(L / 4 + i));
                let least: i32 = (0..L / 32).map(least).sum();
                let scale = f32::from_bits(x(L / 4 + L / 32));
                let scaled =
                    |sum: i32, i: usize| sum as f32 * (f32::from_bits(w[scales + i][r]) * scale);
                *value += match MINIMUM {
                    true => scaled(sum, 0) - scaled(least, 1),
                    false => scaled(sum - least, 0),
                };
            }
        }
        store_some(&values, &mut y[at..], add);
    }
}

fn multiply_signed<const L: usize>(
    panel: &[u32],
    x: &[u32],
    y: &mut [&mut [f32]],
    at: usize,
    add: bool,
) {
    let n = y.len();
    let w = panel.as_chunks::<ROWS>().0.chunks_exact(Layout::Signed.words(L));
    for (j, y) in y.iter_mut().enumerate() {
        let mut values = [0.0; ROWS];
        for (w, x) in w.clone().zip(x.chunks_exact(n * Layout::Signed.words(L))) {
            for (r, value) in values.iter_mut().enumerate() {
                let sum: i32 = (0..L / 2).map(|i| two_products(w[i][r], x[i * n + j])).sum();
                let scale = f32::from_bits(w[L / 2][r]) * f32::from_bits(x[L / 2 * n + j]);
                *value += sum as f32 * scale;
            }
        }
        store_some(&values, &mut y[at..], add);
    }
}

/// Four unsigned bytes by four signed ones.
fn four_products(w: u32, x: u32) -> i32 {
    let (w, x) = (w.to_le_bytes(), x.to_le_bytes());
    (0..4).map(|i| i32::from(w[i]) * i32::from(x[i] as i8)).sum()
}

/// Two signed halves.
fn pair(word: u32) -> [i32; 2] {
    [(word as i16).into(), ((word >> 16) as i16).into()]
}

fn two_products(w: u32, x: u32) -> i32 {
    let (w, x) = (pair(w), pair(x));
    w[0] * x[0] + w[1] * x[1]
}
