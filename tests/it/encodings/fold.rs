//! The edit as stored is the edit that was asked for.

use std::path::Path;

use crate::common::random::Random;
use refusal_patch::arch::Writer;
use refusal_patch::edit::fold::{achieved, fold, recode};
use refusal_patch::encoding::{Encoding, Params};
use refusal_patch::model::Model;
use refusal_patch::num::norm;
use refusal_patch::weights::Matrix;

fn quantized(encoding: Encoding, rows: usize, cols: usize, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let n = encoding.bytes_for(cols);
    let mut bytes = vec![0u8; rows * n];
    for row in bytes.chunks_exact_mut(n) {
        let values: Vec<f32> = (0..cols).map(|_| 0.02 * random.gaussian()).collect();
        encoding.encode(&values, row);
    }
    bytes
}

/// An edit whose size is `share` of ‖W‖, with a few massive entries in û as real models have.
fn edit(w: &Matrix, share: f64, seed: u64) -> (Vec<f32>, Vec<f32>) {
    let mut random = Random(seed);
    let mut vector = |n: usize| (0..n).map(|_| random.gaussian()).collect::<Vec<f32>>();
    let (mut u, v) = (vector(w.rows), vector(w.cols));
    for i in 0..3 {
        u[i * w.rows / 3] *= 6.0;
    }
    let mut energy = 0.0f64;
    let mut row = vec![0.0f32; w.cols];
    for i in 0..w.rows {
        w.decode_row(i, &mut row);
        energy += row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
    }
    let scale = share * energy.sqrt() / (norm(&u) * norm(&v));
    u.iter_mut().for_each(|x| *x = (f64::from(*x) * scale) as f32);
    (u, v)
}

#[test]
fn every_encoding_stores_the_edit_that_was_asked_for() {
    for encoding in Encoding::ALL.into_iter().filter(|e| e.has_codes()) {
        let (rows, cols) = (512, 1024);
        let bytes = quantized(encoding, rows, cols, 1);
        let w = Matrix { rows, cols, encoding: encoding.into(), bytes: &bytes };
        for share in [0.002, 0.005, 0.01, 0.05, 0.27] {
            let (u, v) = edit(&w, share, 2);
            let folded = fold(&w, &u, &v).unwrap();
            let stored = achieved(&w, &Matrix { bytes: &folded, ..w }, &u, &v);
            println!("{} {share}: {stored:?}", encoding.name());
            assert!(
                (0.98..=1.02).contains(&stored.gain),
                "{} at {share}: {stored:?}",
                encoding.name()
            );
            assert!(stored.residue < 0.2, "{} at {share}: {stored:?}", encoding.name());
        }
    }
}

#[test]
fn a_trained_models_writers_store_the_edit_too() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/organism-healthy-F16.gguf");
    let model = Model::open(&model).unwrap();
    for writer in [Writer::Attention, Writer::Ffn] {
        let (name, source) = model.writer(2, writer).unwrap();
        for encoding in Encoding::ALL.into_iter().filter(|e| e.has_codes()) {
            let bytes = recode(&source, encoding, None);
            let w = Matrix { encoding: encoding.into(), bytes: &bytes, ..source };
            for share in [0.002, 0.01, 0.05] {
                let (u, v) = edit(&w, share, 13);
                let folded = fold(&w, &u, &v).unwrap();
                let stored = achieved(&w, &Matrix { bytes: &folded, ..w }, &u, &v);
                assert!(
                    (0.98..=1.02).contains(&stored.gain),
                    "{name} {encoding:?} at {share}: {stored:?}"
                );
            }
        }
    }
}

#[test]
fn scales_and_minimums_stay_as_they_are() {
    for encoding in Encoding::ALL.into_iter().filter(|e| e.has_codes() && e.block_len() > 1) {
        let (rows, cols) = (64, 512);
        let bytes = quantized(encoding, rows, cols, 3);
        let w = Matrix { rows, cols, encoding: encoding.into(), bytes: &bytes };
        let (u, v) = edit(&w, 0.05, 4);
        let folded = fold(&w, &u, &v).unwrap();
        let unpack = |bytes: &[u8]| {
            let (mut codes, mut params) =
                (vec![0; rows * cols], vec![Params::default(); rows * cols]);
            encoding.unpack(bytes, &mut codes, &mut params);
            params.iter().map(|p| (p.scale.to_bits(), p.offset.to_bits())).collect::<Vec<_>>()
        };
        assert!(unpack(&bytes) == unpack(&folded), "{}", encoding.name());
        assert_ne!(bytes, folded, "{}", encoding.name());
    }
}

#[test]
fn plain_requantizing_loses_what_the_fold_stores() {
    for (encoding, most) in
        [(Encoding::Q4_0, 0.5), (Encoding::Q3K, 0.5), (Encoding::Q4K, 0.6), (Encoding::IQ4XS, 0.6)]
    {
        let (rows, cols) = (512, 1024);
        let bytes = quantized(encoding, rows, cols, 5);
        let w = Matrix { rows, cols, encoding: encoding.into(), bytes: &bytes };
        let (u, v) = edit(&w, 0.005, 6);
        let plain = recode(&w, encoding, Some((&u, &v)));
        let stored = achieved(&w, &Matrix { bytes: &plain, ..w }, &u, &v);
        println!("{} requantized: {:.3}", encoding.name(), stored.gain);
        assert!(stored.gain < most, "{}: requantizing kept {:.3}", encoding.name(), stored.gain);
    }
}

#[test]
fn a_wide_matrix_holds_a_small_edit_which_requantizing_loses() {
    // The writers of an 8 B model: edits of 0.2 to 1 % of ‖W‖ are far below half a step of every
    // weight.
    let cols = 14336;
    for (encoding, share, rows) in [
        (Encoding::Q4K, 0.002, 4096),
        (Encoding::Q4_0, 0.01, 4096),
        (Encoding::Q4_1, 0.005, 512),
        (Encoding::Q5_0, 0.002, 512),
        (Encoding::Q5_1, 0.002, 512),
        (Encoding::Q2K, 0.01, 512),
        (Encoding::Q3K, 0.005, 512),
        (Encoding::Q5K, 0.002, 512),
        (Encoding::Q6K, 0.002, 512),
        (Encoding::IQ4NL, 0.005, 512),
        (Encoding::IQ4XS, 0.005, 512),
        (Encoding::Q8_0, 0.002, 512),
        (Encoding::BF16, 0.002, 512),
        (Encoding::F16, 0.002, 512),
    ] {
        let one = quantized(encoding, 64, cols, 7);
        // The same rows repeat: this test is not about quantizing 59 M weights.
        let bytes: Vec<u8> = one.iter().copied().cycle().take(one.len() * rows / 64).collect();
        let w = Matrix { rows, cols, encoding: encoding.into(), bytes: &bytes };
        let (u, v) = edit(&w, share, 8);
        let folded = fold(&w, &u, &v).unwrap();
        let stored = achieved(&w, &Matrix { bytes: &folded, ..w }, &u, &v);
        // Re-quantizing works row by row, so some rows are enough.
        let some = Matrix { rows: 64, bytes: &one, ..w };
        let plain = recode(&some, encoding, Some((&u[..64], &v)));
        let lost = achieved(&some, &Matrix { bytes: &plain, ..some }, &u[..64], &v);
        println!(
            "{} {share} {rows} rows: requantized {:.3}, {stored:?}",
            encoding.name(),
            lost.gain
        );
        assert!((0.98..=1.02).contains(&stored.gain), "{}: {stored:?}", encoding.name());
        if !matches!(encoding, Encoding::Q8_0 | Encoding::F16 | Encoding::BF16) {
            assert!(lost.gain < 0.9, "{}: requantizing kept {:.3}", encoding.name(), lost.gain);
        }
    }
}

#[test]
fn the_fold_is_the_same_at_any_thread_count() {
    let bytes = quantized(Encoding::Q5K, 128, 2048, 9);
    let w = Matrix { rows: 128, cols: 2048, encoding: Encoding::Q5K.into(), bytes: &bytes };
    let (u, v) = edit(&w, 0.01, 10);
    let with = |n: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
        pool.install(|| fold(&w, &u, &v).unwrap())
    };
    assert_eq!(with(1), with(4));
}

#[test]
fn a_gate_of_zero_leaves_its_columns_alone() {
    let bytes = quantized(Encoding::Q4K, 128, 512, 11);
    let w = Matrix { rows: 128, cols: 512, encoding: Encoding::Q4K.into(), bytes: &bytes };
    let (u, mut v) = edit(&w, 0.05, 12);
    v[..256].fill(0.0);
    let folded = fold(&w, &u, &v).unwrap();
    let after = Matrix { bytes: &folded, ..w };
    let (mut a, mut b) = (vec![0.0; 512], vec![0.0; 512]);
    for i in 0..128 {
        w.decode_row(i, &mut a);
        after.decode_row(i, &mut b);
        assert_eq!(a[..256], b[..256]);
    }
}
