use super::*;

fn product(x: &[f32], n: usize, w: &Matrix, of: Range<usize>) -> Result<Vec<f32>> {
    product_by(Kernel::best(), x, n, w, of)
}

fn product_by(
    kernel: Kernel,
    x: &[f32],
    n: usize,
    w: &Matrix,
    of: Range<usize>,
) -> Result<Vec<f32>> {
    // What is there before doesn't matter.
    let mut y = vec![f32::NAN; n * of.len()];
    super::product_by(kernel, x, n, w, of, &mut y, &Cancel::default())?;
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
            let y = product_by(kernel, &x, n, &w, 0..rows).unwrap();
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
fn a_row_does_not_depend_on_its_batch_nor_on_the_rows_asked_for_nor_on_threads() {
    for kernel in Kernel::all() {
        let (n, k, rows) = (200, 1100, 150);
        let bytes = stored(Encoding::BF16, rows, k);
        let w = matrix(Encoding::BF16, rows, k, &bytes);
        let x = numbers(n * k, 11);
        let all = product_by(kernel, &x, n, &w, 0..rows).unwrap();
        for i in [0, 1, 77, 199] {
            let alone = product_by(kernel, &x[i * k..][..k], 1, &w, 0..rows).unwrap();
            assert_eq!(alone, all[i * rows..][..rows]);
        }
        let some = product_by(kernel, &x, n, &w, 5..9).unwrap();
        for i in 0..n {
            assert_eq!(some[4 * i..][..4], all[i * rows + 5..][..4]);
        }
        for threads in [1, 2, 7] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert_eq!(pool.install(|| product_by(kernel, &x, n, &w, 0..rows)).unwrap(), all);
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
