//! Packed checkpoints: read as their own libraries read them, patched in place (tests/data/packings/make.py).

#[path = "common/folder.rs"]
mod folder;

use std::fs;
use std::path::{Path, PathBuf};

use folder::*;
use refusal_patch::checkpoint::{sha256_tensors, Checkpoint};
use refusal_patch::edit::fold::{achieved, fold, fold_pruned};
use refusal_patch::edit::sparse::{is_pruned, zeros};
use refusal_patch::encoding::packed::Levels;
use refusal_patch::encoding::{Encoding, Params};
use refusal_patch::model::{Matrix, Model, Storage, Writer};
use refusal_patch::output::{stage_folder, Patch, Provenance, TensorEdit};
use refusal_patch::progress::Silent;
use safetensors::{Dtype, SafeTensors};

/// Every packing of the data, with the largest relative difference from its library's numbers: none but where a library
/// multiplies in another order.
const PACKINGS: [(&str, f32); 19] = [
    ("ct-w4a16", 0.0),
    ("ct-w4a16-asym", 0.0),
    ("ct-w8a16", 0.0),
    ("ct-int8", 0.0),
    ("ct-fp8-tensor", 0.0),
    ("ct-fp8-channel", 0.0),
    ("ct-fp8-block", 0.0),
    ("gptq-2", 0.0),
    ("gptq-3", 0.0),
    ("gptq-4", 0.0),
    ("gptq-4-act", 0.0),
    ("gptq-4-v2", 0.0),
    ("gptq-8", 0.0),
    ("awq", 0.0),
    ("fp8-block", 0.0),
    ("nf4", 0.0),
    ("nf4-nested", 0.0),
    ("fp4", 0.0),
    ("bnb-int8", 1e-6),
];

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/packings").join(name)
}

fn decoded(w: &Matrix) -> Vec<f32> {
    let mut all = vec![0.0; w.rows * w.cols];
    all.chunks_exact_mut(w.cols).enumerate().for_each(|(i, row)| w.decode_row(i, row));
    all
}

#[test]
fn every_packing_is_read_as_its_own_library_reads_it() {
    for (name, most) in PACKINGS {
        let model = Model::open(&data(name)).unwrap();
        let bytes = fs::read(data(name).join("expected.safetensors")).unwrap();
        let expected = SafeTensors::deserialize(&bytes).unwrap();
        for writer in [Writer::Attention, Writer::Ffn] {
            let (tensor, w) = model.writer(0, writer).unwrap();
            let t = expected.tensor(&tensor).unwrap();
            let encoding = match t.dtype() {
                Dtype::BF16 => Encoding::BF16,
                Dtype::F16 => Encoding::F16,
                _ => Encoding::F32,
            };
            let mut values = vec![0.0; w.rows * w.cols];
            encoding.decode(t.data(), &mut values);
            let off = |(a, b): (&f32, &f32)| (a - b).abs() / b.abs().max(1e-6);
            let worst = decoded(&w).iter().zip(&values).map(off).fold(0.0, f32::max);
            println!("{name} {tensor}: {worst:.1e} as {}", w.encoding.name());
            assert!(worst <= most, "{name} {tensor}: {worst}");
            assert!(values.iter().any(|x| *x != 0.0));
        }
    }
}

/// Numbers between −1 and 1 that are the same everywhere.
fn vector(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed;
    let mut next = || {
        s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (s >> 33) as f32 / (1u64 << 30) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// An edit of a twentieth of the matrix' norm.
fn edit(w: &Matrix) -> (Vec<f32>, Vec<f32>) {
    let norm = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>().sqrt();
    let (u, v) = (vector(w.rows, 1), vector(w.cols, 2));
    let scale = 0.05 * norm(&decoded(w)) / (norm(&u) * norm(&v));
    (u.iter().map(|x| x * scale).collect(), v)
}

#[test]
fn an_edit_is_stored_in_the_packing_and_nothing_else_changes() {
    let dir = tempfile::tempdir().unwrap();
    for (name, _) in PACKINGS {
        let model = Model::open(&data(name)).unwrap();
        let (tensor, w) = model.writer(0, Writer::Ffn).unwrap();
        let (u, v) = edit(&w);
        assert_eq!(fold(&w, &u, &vec![0.0; w.cols]).unwrap(), w.bytes, "{name}: no edit, no change");
        let bytes = fold(&w, &u, &v).unwrap();
        let codes = model.code_tensor(&tensor).unwrap();
        let type_id = model.file.tensor(&codes).unwrap().type_id;
        let record = Provenance {
            version: "0".into(),
            source_sha256: String::new(),
            method: "gated".into(),
            layers: vec![0],
            strength: 1.0,
            before: "{}".into(),
            after: "{}".into(),
            edits: vec![TensorEdit { tensor: tensor.clone(), u: u.clone(), v: v.clone() }],
        };
        let patch = Patch { tensor: codes.clone(), bytes, type_id };
        let out = dir.path().join(name);
        let folder = model.file.folder().unwrap();
        stage_folder(folder, &[patch], &record, &out, false, &Silent).unwrap().commit().unwrap();

        let written = Model::open(&out).unwrap();
        let stored = achieved(&w, &written.writer(0, Writer::Ffn).unwrap().1, &u, &v);
        println!(
            "{name}: {:.4} stored, {} of {} codes moved",
            stored.gain, stored.codes_moved, stored.elements
        );
        assert!((0.98..=1.02).contains(&stored.gain), "{name}: {stored:?}");
        let [a, b] = [&model.file, &written.file].map(|f| sha256_tensors(f, &Silent).unwrap());
        for (t, (a, b)) in model.file.tensors().iter().zip(a.iter().zip(&b)) {
            assert_eq!(a != b, t.name == codes, "{name}: {}", t.name);
        }
    }
}

/// Zeros where `keep` says no, and what the mask of the result is.
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
    let mut all: Vec<Matrix> =
        plain.iter().map(|(e, bytes)| Matrix { rows: 64, cols: 512, encoding: (*e).into(), bytes }).collect();
    all.extend(models.iter().map(|m| m.writer(0, Writer::Ffn).unwrap().1));
    let scattered = vector(64 * 512, 9);
    for w in &all {
        let name = w.encoding.name();
        assert!(!is_pruned(w), "{name}");
        let of_four = prune(w, |row, col| [0, 3].contains(&((col + row) % 4)));
        let half = prune(w, |row, col| scattered[row * 512 + col] > 0.0);
        for (pattern, bytes) in [("2:4", &of_four), ("unstructured", &half)] {
            let w = Matrix { bytes, ..*w };
            // Scattered zeros among integer codes may be rounding.
            let codes = matches!(w.encoding, Storage::Packed(p) if !matches!(p.levels, Levels::Float(_)));
            assert_eq!(is_pruned(&w), pattern == "2:4" || !codes, "{name} {pattern}");
            let (u, v) = edit(&w);
            let folded = fold_pruned(&w, &u, &v).unwrap();
            let after = Matrix { bytes: &folded, ..w };
            let stored = achieved(&w, &after, &u, &v);
            println!("{name} {pattern}: {:.4} stored", stored.gain);
            assert!((0.98..=1.02).contains(&stored.gain), "{name} {pattern}: {stored:?}");
            let mask = |w: &Matrix| decoded(w).iter().map(|x| *x == 0.0).collect::<Vec<_>>();
            assert_eq!(mask(&w), mask(&after), "{name} {pattern}");
            assert_eq!(stored.zeros, (zeros(&w), zeros(&w)));
            assert!(stored.codes_moved > 0);
        }
    }
}

/// A copy of a packing's folder in which a tensor is another one, or gone.
fn changed(dir: &Path, packing: &str, part: &str, new: Option<Named>) -> Result<(), String> {
    let from = Checkpoint::open(&data(packing)).unwrap();
    let wanted = format!("model.layers.0.mlp.down_proj.{part}");
    assert!(from.tensor(&wanted).is_some(), "{wanted}");
    let mut tensors: Vec<Named> = Vec::new();
    for t in from.tensors().iter().filter(|t| t.name != wanted) {
        let dtype = Box::leak(t.type_name().into_boxed_str());
        let shape: Vec<usize> = t.dims.iter().rev().map(|&d| d as usize).collect();
        tensors.push(named(&t.name, dtype, &shape, from.bytes(t).to_vec()));
    }
    tensors.extend(new.map(|n| Named { name: wanted, ..n }));
    fs::copy(data(packing).join("config.json"), dir.join("config.json")).unwrap();
    write_weights(dir, &tensors, 1);
    Model::open(dir).map(drop).map_err(|e| e.to_string())
}

#[test]
fn parts_of_a_packing_that_do_not_fit_are_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let i32s = |n: i32, len: usize| n.to_le_bytes().repeat(len);
    for (packing, part, new, saying) in [
        ("gptq-4-act", "g_idx", Some(named("", "I32", &[128], i32s(4, 128))), "expected 0 to 3"),
        ("gptq-4", "g_idx", Some(named("", "I32", &[127], i32s(0, 127))), "g_idx is I32 [127]"),
        ("gptq-4", "scales", Some(named("", "F16", &[1, 64], vec![0; 128])), "expected I32 of 8 elements"),
        ("gptq-4", "qzeros", None, "down_proj.qzeros is missing"),
        ("gptq-3", "qweight", Some(named("", "I32", &[7, 64], vec![0; 1792])), "3 bits don't fit"),
        ("awq", "qzeros", Some(named("", "I32", &[1, 8], vec![0; 32])), "qzeros is I32 [1, 8]"),
        ("ct-w4a16", "weight_shape", Some(named("", "I64", &[2], vec![0xff; 16])), "does not fit"),
        ("ct-w4a16", "weight_scale", Some(named("", "BF16", &[63, 4], vec![0; 504])), "weight_scale is BF16"),
        (
            "fp8-block",
            "weight_scale_inv",
            Some(named("", "F32", &[3, 3], vec![0; 36])),
            "weights of 64 x 128",
        ),
        ("fp8-block", "weight_scale_inv", None, "FP8 without weight_scale"),
        ("nf4", "weight.quant_state.bitsandbytes__nf4", None, "can't be read (U8)"),
        ("nf4", "weight.absmax", Some(named("", "F32", &[1], vec![0; 4])), "absmax is F32 [1]"),
        ("ct-w4a16", "weight_packed", Some(named("", "U8", &[64, 64], vec![0; 4096])), "U8 codes"),
        ("ct-w4a16", "weight_packed", None, "packed in a way that can't be read (found: weight_scale"),
    ] {
        let e = changed(dir.path(), packing, part, new).unwrap_err();
        assert!(e.contains(saying) && e.contains("down_proj"), "`{e}` should say `{saying}`");
        assert!(e.len() < 600, "too long: {e}");
    }
}
