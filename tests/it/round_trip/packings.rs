//! An edit is stored in the packing of the tensor that it changes.

use refusal_patch::arch::Writer;
use refusal_patch::edit::fold::{achieved, fold_pruned};
use refusal_patch::encoding::packed::Levels;
use refusal_patch::encoding::{Encoding, Params};
use refusal_patch::model::Model;
use refusal_patch::pair::Pair;
use refusal_patch::weights::pruned::{is_pruned, zeros};
use refusal_patch::weights::{Matrix, Storage};

use crate::common::packings::*;

#[test]
fn an_edit_is_stored_in_the_packing_and_nothing_else_changes() {
    let dir = tempfile::tempdir().unwrap();
    for (name, _) in PACKINGS {
        let out = dir.path().join(name);
        let (u, v) = patched(name, &out);
        let [before, after] = [&data(name), &out].map(|p| Model::open(p).unwrap());
        let [(_, w), (_, x)] = [&before, &after].map(|m| m.writer(0, Writer::Ffn).unwrap());
        let stored = achieved(&w, &x, &u, &v);
        println!(
            "{name}: {:.4} stored, {} of {} codes moved",
            stored.gain, stored.codes_moved, stored.elements
        );
        assert!((0.98..=1.02).contains(&stored.gain), "{name}: {stored:?}");
    }
}

/// Sets the elements to zero that `keep` rejects. Every kept element is not zero.
fn prune(w: &Matrix, keep: impl Fn(usize, usize) -> bool) -> Vec<u8> {
    let mut out = w.bytes.to_vec();
    let (mut codes, mut params) = (vec![0; w.cols], vec![Params::default(); w.cols]);
    for row in 0..w.rows {
        w.unpack(row, 0..w.cols, &mut codes, &mut params);
        for (col, (code, p)) in codes.iter_mut().zip(&params).enumerate() {
            let zero = w.encoding.nearest(*p, 0.0);
            *code = match (keep(row, col), w.encoding.value(*p, *code) == 0.0) {
                (false, _) => zero,
                (true, true) => zero + 1,
                (true, false) => *code,
            };
        }
        w.pack(&mut out, row, 0..w.cols, &codes);
    }
    out
}

#[test]
fn zeros_of_a_pruned_matrix_stay_and_the_edit_is_whole() {
    let dense: Vec<f32> = vector(64 * 512, 5);
    let mut plain = Vec::new();
    for encoding in [Encoding::BF16, Encoding::F16, Encoding::F32] {
        let mut bytes = vec![0; encoding.bytes_for(dense.len())];
        encoding.encode(&dense, &mut bytes);
        plain.push((encoding, bytes));
    }
    let models = ["ct-w4a16", "ct-w4a16-asym", "gptq-4", "ct-fp8-channel", "bnb-int8", "awq"]
        .map(|name| Model::open(&data(name)).unwrap());
    let mut all: Vec<Matrix> = plain
        .iter()
        .map(|(e, bytes)| Matrix { rows: 64, cols: 512, encoding: (*e).into(), bytes })
        .collect();
    all.extend(models.iter().map(|m| m.writer(0, Writer::Ffn).unwrap().1));
    let scattered = vector(64 * 512, 9);
    for w in &all {
        let name = w.encoding.name();
        assert!(!is_pruned(w), "{name}");
        let of_four = prune(w, |row, col| [0, 3].contains(&((col + row) % 4)));
        let half = prune(w, |row, col| scattered[row * 512 + col] > 0.0);
        for (pattern, bytes) in [("2:4", &of_four), ("unstructured", &half)] {
            let w = Matrix { bytes, ..*w };
            // Scattered zeros of integer codes may come from rounding.
            let codes =
                matches!(w.encoding, Storage::Packed(p) if !matches!(p.levels, Levels::Float(_)));
            assert_eq!(is_pruned(&w), pattern == "2:4" || !codes, "{name} {pattern}");
            let (u, v) = edit(&w);
            let folded = fold_pruned(&w, &u, &v).unwrap();
            let after = Matrix { bytes: &folded, ..w };
            let stored = achieved(&w, &after, &u, &v);
            println!("{name} {pattern}: {:.4} stored", stored.gain);
            assert!((0.98..=1.02).contains(&stored.gain), "{name} {pattern}: {stored:?}");
            let mask = |w: &Matrix| decoded(w).iter().map(|x| *x == 0.0).collect::<Vec<_>>();
            assert_eq!(mask(&w), mask(&after), "{name} {pattern}");
            assert_eq!(stored.zeros, Pair::new(zeros(&w), zeros(&w)));
            assert!(stored.codes_moved > 0);
        }
    }
}
