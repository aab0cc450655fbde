use super::*;
use crate::encoding::Encoding;
use crate::num::round_to_i8;
use Arithmetic::{Exact, Rounded};

fn product(x: &[f32], n: usize, w: &Matrix, of: Range<usize>) -> Result<Vec<f32>> {
    product_by(Kernel::best(), Exact, x, n, w, of)
}

fn product_by(
    kernel: Kernel,
    arithmetic: Arithmetic,
    x: &[f32],
    n: usize,
    w: &Matrix,
    of: Range<usize>,
) -> Result<Vec<f32>> {
    // What is there before doesn't matter.
    let mut y = vec![f32::NAN; n * of.len()];
    let way = Way::new(kernel, arithmetic, w);
    super::product_by(way, x, n, w, of, &mut y, &Cancel::default())?;
    Ok(y)
}

/// Reproducible numbers between -1 and 1.
fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn stored(e: Encoding, rows: usize, cols: usize) -> Vec<u8> {
    let row = e.bytes_for(cols);
    // A lattice can't be encoded; any bytes are a block of it. As F16 these are a scale of 0.004.
    let mut bytes = vec![0x1C; rows * row];
    if !e.has_codes() {
        return bytes;
    }
    for (values, bytes) in numbers(rows * cols, 7).chunks(cols).zip(bytes.chunks_mut(row)) {
        e.encode(values, bytes);
    }
    bytes
}

fn matrix(e: Encoding, rows: usize, cols: usize, bytes: &[u8]) -> Matrix<'_> {
    Matrix { rows, cols, encoding: e.into(), bytes }
}

/// The definition: chains of fused multiply-adds, a block of inputs each.
fn by_definition(x: &[f32], n: usize, w: &Matrix) -> Vec<f32> {
    let mut row = vec![0.0; w.cols];
    let mut y = vec![0.0; n * w.rows];
    for r in 0..w.rows {
        w.decode_row(r, &mut row);
        for i in 0..n {
            let x = &x[i * w.cols..][..w.cols];
            let chain = |(x, w): (&[f32], &[f32])| {
                x.iter().zip(w).fold(0.0f32, |s, (x, w)| w.mul_add(*x, s))
            };
            let sums = x.chunks(BLOCK).zip(row.chunks(BLOCK)).map(chain);
            y[i * w.rows + r] = sums.reduce(|a, b| a + b).unwrap_or(0.0);
        }
    }
    y
}

/// The definition in 8-bit integers: the weights as they are stored, x rounded by block, and every
/// block's sums in whole numbers.
fn by_definition_rounded(x: &[f32], n: usize, w: &Matrix, e: Encoding) -> Vec<f32> {
    let len = e.block_len();
    let mut codes = vec![0; w.cols];
    let mut params = vec![Default::default(); w.cols];
    let mut y = vec![0.0; n * w.rows];
    let mut rounded = vec![0; len];
    for r in 0..w.rows {
        w.unpack(r, 0..w.cols, &mut codes, &mut params);
        for i in 0..n {
            for at in (0..w.cols).step_by(len) {
                let scale = f64::from(round_to_i8(&x[i * w.cols + at..][..len], &mut rounded));
                let term = |j: usize| {
                    f64::from(rounded[j]) * f64::from(e.value(params[at + j], codes[at + j]))
                };
                y[i * w.rows + r] += (scale * (0..len).map(term).sum::<f64>()) as f32;
            }
        }
    }
    y
}

const SHAPES: [(usize, usize, usize); 9] = [
    (1, 1, 1),
    (1, 7, 17),
    (2, 513, 1),
    (5, 8, 16),
    (6, 33, 70),
    (7, 1024, 31),
    (13, 1541, 33),
    (40, 900, 130),
    (131, 20, 300),
];

#[test]
fn every_kernel_multiplies_odd_shapes() {
    for kernel in Kernel::all() {
        for ((n, k, rows), e) in
            SHAPES.into_iter().flat_map(|s| [(s, Encoding::F32), (s, Encoding::BF16)])
        {
            let bytes = stored(e, rows, k);
            let w = matrix(e, rows, k, &bytes);
            let x = numbers(n * k, 3);
            let y = product_by(kernel, Exact, &x, n, &w, 0..rows).unwrap();
            let expected = by_definition(&x, n, &w);
            if kernel.name != "portable" {
                assert_eq!(y, expected, "{} {n} {k} {rows}", kernel.name);
            }
            let worst = y.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-5 * (k as f32).sqrt(), "{} {n} {k} {rows}: {worst}", kernel.name);
        }
    }
}

#[test]
fn every_encoding_is_decoded_in_place() {
    for e in Encoding::ALL {
        let (n, k, rows) = (9, 768, 21);
        let bytes = stored(e, rows, k);
        let w = matrix(e, rows, k, &bytes);
        let x = numbers(n * k, 5);
        let expected = by_definition(&x, n, &w);
        let y = product(&x, n, &w, 0..rows).unwrap();
        let worst = y.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-3, "{}: {worst}", e.name());
    }
}

#[test]
fn every_kernel_multiplies_whole_numbers_and_all_give_the_same_bits() {
    for e in Encoding::ALL.into_iter().filter(|e| e.whole().is_some()) {
        for (n, blocks, rows) in [(1, 1, 1), (2, 9, 17), (3, 3, 16), (7, 8, 33), (40, 17, 130)] {
            let k = blocks * e.block_len();
            let bytes = stored(e, rows, k);
            let w = matrix(e, rows, k, &bytes);
            let x = numbers(n * k, 3);
            let expected = by_definition_rounded(&x, n, &w, e);
            let portable = *Kernel::all().last().unwrap();
            let same = product_by(portable, Rounded, &x, n, &w, 0..rows).unwrap();
            let worst = same.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            let size = expected.iter().map(|x| x.abs()).fold(0.0, f32::max);
            assert!(worst <= 3e-6 * size, "{} {n} {k} {rows}: {worst}, {size}", e.name());
            for kernel in Kernel::all().into_iter().filter(|k| k.whole.is_some()) {
                let y = product_by(kernel, Rounded, &x, n, &w, 0..rows).unwrap();
                assert_eq!(y, same, "{} {} {n} {k} {rows}", kernel.name, e.name());
            }
        }
    }
}

#[test]
fn the_largest_codes_and_columns_do_not_overflow() {
    for e in Encoding::ALL.into_iter().filter(|e| e.whole().is_some()) {
        let (k, rows) = (256, 16);
        // The upper bytes of the block's scale and minimum, F16; the exponent of MXFP4.
        let scales: &[usize] = match e {
            Encoding::Q4_1 | Encoding::Q5_1 | Encoding::Q4K | Encoding::Q5K => &[1, 3],
            Encoding::Q2K => &[81, 83],
            Encoding::Q3K => &[109],
            Encoding::Q6K => &[209],
            Encoding::MXFP4 => &[0],
            _ => &[1],
        };
        for (fill, x) in [0xff, 0x80, 0x7f, 0].into_iter().flat_map(|f| [(f, 1.0), (f, -1.0)]) {
            let mut bytes = vec![fill; rows * e.bytes_for(k)];
            for block in bytes.chunks_exact_mut(e.block_bytes()) {
                scales.iter().for_each(|&at| block[at] = 0x38);
            }
            let w = matrix(e, rows, k, &bytes);
            let x = vec![x; k];
            let y = product_by(Kernel::best(), Rounded, &x, 1, &w, 0..rows).unwrap();
            for (y, expected) in y.iter().zip(by_definition(&x, 1, &w)) {
                let near = (y - expected).abs() <= 1e-4 * expected.abs();
                assert!(near, "{} {fill}: {y} in place of {expected}", e.name());
            }
        }
    }
}

#[test]
fn whole_numbers_stay_close_to_exact_products_and_carry_what_is_not_a_number() {
    for e in Encoding::ALL.into_iter().filter(|e| e.whole().is_some()) {
        let (n, k, rows) = (9, 768, 21);
        let bytes = stored(e, rows, k);
        let w = matrix(e, rows, k, &bytes);
        let mut x = numbers(n * k, 5);
        let exact = product(&x, n, &w, 0..rows).unwrap();
        let y = product_by(Kernel::best(), Rounded, &x, n, &w, 0..rows).unwrap();
        let of = |f: &dyn Fn(usize) -> f32| (0..y.len()).map(|i| f(i).powi(2)).sum::<f32>().sqrt();
        let (off, size) = (of(&|i| y[i] - exact[i]), of(&|i| exact[i]));
        assert!(off < 0.01 * size, "{}: {off} of {size}", e.name());
        x[3 * k + 5] = f32::INFINITY;
        x[4 * k + 700] = f32::NAN;
        let y = product_by(Kernel::best(), Rounded, &x, n, &w, 0..rows).unwrap();
        for (i, y) in y.chunks_exact(rows).enumerate() {
            assert_eq!(y.iter().all(|y| y.is_nan()), [3, 4].contains(&i), "{} {i}", e.name());
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch_nor_on_the_rows_asked_for_nor_on_threads() {
    let encodings = [Encoding::BF16, Encoding::Q4K, Encoding::Q5_0, Encoding::Q6K];
    for (kernel, e) in Kernel::all().into_iter().flat_map(|k| encodings.map(|e| (k, e))) {
        let (n, k, rows) = (200, if e == Encoding::BF16 { 1100 } else { 1280 }, 150);
        let bytes = stored(e, rows, k);
        let w = matrix(e, rows, k, &bytes);
        let x = numbers(n * k, 11);
        let product = |x: &[f32], n, of| product_by(kernel, Rounded, x, n, &w, of).unwrap();
        let all = product(&x, n, 0..rows);
        for i in [0, 1, 77, 199] {
            assert_eq!(product(&x[i * k..][..k], 1, 0..rows), all[i * rows..][..rows]);
        }
        let some = product(&x, n, 5..9);
        for i in 0..n {
            assert_eq!(some[4 * i..][..4], all[i * rows + 5..][..4]);
        }
        for threads in [1, 2, 7] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert_eq!(pool.install(|| product(&x, n, 0..rows)), all);
        }
    }
}

#[test]
fn no_columns_rows_or_inputs_are_no_error() {
    let bytes = stored(Encoding::F32, 4, 8);
    let w = matrix(Encoding::F32, 4, 8, &bytes);
    assert!(product(&[], 0, &w, 0..4).unwrap().is_empty());
    assert!(product(&[0.0; 16], 2, &w, 3..3).unwrap().is_empty());
    let none = matrix(Encoding::F32, 4, 0, &[]);
    assert_eq!(product(&[], 2, &none, 0..4).unwrap(), [0.0; 8]);
}

#[test]
fn more_columns_than_are_packed_at_once() {
    let (n, k, rows) = (COLUMNS + 3, 16, 5);
    let bytes = stored(Encoding::F32, rows, k);
    let w = matrix(Encoding::F32, rows, k, &bytes);
    let x = numbers(n * k, 13);
    let y = product(&x, n, &w, 0..rows).unwrap();
    let last = product(&x[(n - 1) * k..], 1, &w, 0..rows).unwrap();
    assert_eq!(last, y[(n - 1) * rows..]);
}
