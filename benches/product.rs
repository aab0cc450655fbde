//! Speed of products with stored matrices: `cargo bench --bench product [-- COLUMNS]`.

use refusal_patch::encoding::Encoding;
use refusal_patch::forward::{Arithmetic, Compute};
use refusal_patch::weights::Matrix;
use std::hint::black_box;
use std::time::Instant;

/// Inputs and outputs: a small model's feed-forward, its vocabulary, a large model's feed-forward.
const SHAPES: [(usize, usize); 4] = [(896, 4864), (4864, 896), (896, 151_936), (4096, 14_336)];
const COLUMNS: [usize; 6] = [1, 8, 32, 112, 320, 2048];

fn main() {
    let only: Option<usize> = std::env::args().skip(1).find_map(|a| a.parse().ok());
    for threads in [1, rayon::current_num_threads()] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        let peak = pool.install(|| rayon::broadcast(|_| peak()).iter().sum::<f64>());
        println!("{threads} threads: {peak:.0} GFLOP/s with registers alone");
        for encoding in [Encoding::BF16, Encoding::Q4K, Encoding::Q6K] {
            for ((k, rows), arithmetic) in
                SHAPES.into_iter().flat_map(|s| [(s, Arithmetic::Exact), (s, Arithmetic::Rounded)])
            {
                // As llama.cpp does: a matrix that k-quants don't fit is stored as Q5_0.
                let encoding =
                    if k % encoding.block_len() == 0 { encoding } else { Encoding::Q5_0 };
                if arithmetic == Arithmetic::Rounded && encoding.whole().is_none() {
                    continue;
                }
                let bytes = weights(encoding, rows, k);
                let w = Matrix { rows, cols: k, encoding: encoding.into(), bytes: &bytes };
                print!("{:5} {arithmetic:?} {k:5} -> {rows:6}:", encoding.name());
                for n in COLUMNS.into_iter().filter(|n| only.is_none_or(|only| only == *n)) {
                    let speed = pool.install(|| product(arithmetic, n, &w));
                    print!("  {n:4} {speed:6.1} ({:3.0} %)", 100.0 * speed / peak);
                }
                println!();
            }
        }
    }
}

/// GFLOP/s of the fastest of a few products.
fn product(arithmetic: Arithmetic, n: usize, w: &Matrix) -> f64 {
    let compute = Compute::cpu().with_arithmetic(arithmetic);
    let x: Vec<f32> = (0..n * w.cols).map(|i| (i * 7919 % 2003) as f32 * 1e-3 - 1.0).collect();
    let mut fastest = f64::INFINITY;
    let start = Instant::now();
    for _ in 0..2000 {
        let run = Instant::now();
        // The vocabulary's product is taken a tile at a time.
        let done = match w.rows > 100_000 {
            true => compute.tiles(black_box(&x), n, w, |_, tile| {
                black_box(tile);
                Ok(())
            }),
            false => compute.matmul(black_box(&x), n, w).map(|y| drop(black_box(y))),
        };
        done.expect("a product");
        fastest = fastest.min(run.elapsed().as_secs_f64());
        if start.elapsed().as_secs_f64() > 1.0 {
            break;
        }
    }
    2.0 * (n * w.rows * w.cols) as f64 / fastest / 1e9
}

/// Rows of plausible weights: a few different ones, again and again.
fn weights(e: Encoding, rows: usize, cols: usize) -> Vec<u8> {
    let values: Vec<f32> =
        (0..8 * cols).map(|i| ((i * 7919 % 2003) as f32 - 1001.0) * 1e-4).collect();
    let mut bytes = vec![0; e.bytes_for(values.len())];
    e.encode(&values, &mut bytes);
    let len = e.bytes_for(rows * cols);
    bytes.into_iter().cycle().take(len).collect()
}

/// GFLOP/s of multiply-adds that stay in registers, on one thread.
fn peak() -> f64 {
    struct Chains;
    impl pulp::WithSimd for Chains {
        type Output = f64;
        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, simd: S) -> f64 {
            const STEPS: usize = 1 << 20;
            let (a, b) = (simd.splat_f32s(black_box(0.999)), simd.splat_f32s(black_box(1e-3)));
            let mut fastest = f64::INFINITY;
            for _ in 0..50 {
                let mut sums = [simd.splat_f32s(1.0); 12];
                let run = Instant::now();
                for _ in 0..STEPS {
                    sums.iter_mut().for_each(|s| *s = simd.mul_add_f32s(a, *s, b));
                }
                black_box(sums);
                fastest = fastest.min(run.elapsed().as_secs_f64());
            }
            (2 * STEPS * 12 * S::F32_LANES) as f64 / fastest / 1e9
        }
    }
    pulp::Arch::new().dispatch(Chains)
}
