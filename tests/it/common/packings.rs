//! The packed folders of tests/data/packings, and a patch of each.

use std::path::{Path, PathBuf};

use refusal_patch::arch::Writer;
use refusal_patch::checkpoint::{sha256_tensors, Checkpoint};
use refusal_patch::edit::fold::{fold, fold_pruned};
use refusal_patch::model::Model;
use refusal_patch::output::{stage_folder, Patch, Provenance, TensorEdit};
use refusal_patch::progress::Silent;
use refusal_patch::weights::pruned::is_pruned;
use refusal_patch::weights::Matrix;

/// Every packing of the data, with the relative difference from its library's numbers that is
/// allowed: 0, unless the library multiplies in another order.
pub const PACKINGS: [(&str, f32); 29] = [
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
    ("ct-nvfp4", 0.0),
    ("ct-mxfp4", 0.0),
    ("ct-mxfp8", 0.0),
    ("ct-sparse", 0.0),
    ("ct-sparse-24", 0.0),
    ("ct-sparse-24-fp8", 0.0),
    ("modelopt-nvfp4", 0.0),
    ("ao-int8", 0.0),
    ("ao-fp8", 0.0),
    ("ao-int4-unpacked", 0.0),
];

pub fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/packings").join(name)
}

pub fn decoded(w: &Matrix) -> Vec<f32> {
    let mut all = vec![0.0; w.rows * w.cols];
    all.chunks_exact_mut(w.cols).enumerate().for_each(|(i, row)| w.decode_row(i, row));
    all
}

/// Reproducible numbers between −1 and 1.
pub fn vector(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed;
    let mut next = || {
        s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (s >> 33) as f32 / (1u64 << 30) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// An edit of a twentieth of the matrix' norm.
pub fn edit(w: &Matrix) -> (Vec<f32>, Vec<f32>) {
    let norm = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>().sqrt();
    let (u, v) = (vector(w.rows, 1), vector(w.cols, 2));
    let scale = 0.05 * norm(&decoded(w)) / (norm(&u) * norm(&v));
    (u.iter().map(|x| x * scale).collect(), v)
}

/// Writes a packing's folder with an edit folded into one writer, and returns the edit.
pub fn patched(name: &str, out: &Path) -> (Vec<f32>, Vec<f32>) {
    let model = Model::open(&data(name)).unwrap();
    let (tensor, w) = model.writer(0, Writer::Ffn).unwrap();
    let (u, v) = edit(&w);
    assert_eq!(fold(&w, &u, &vec![0.0; w.cols]).unwrap(), w.bytes, "{name}: no edit, no change");
    let pruned = is_pruned(&w);
    assert_eq!(pruned, name.starts_with("ct-sparse"), "{name}");
    let bytes = if pruned { fold_pruned(&w, &u, &v) } else { fold(&w, &u, &v) }.unwrap();
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
    let folder = model.file.folder().unwrap();
    stage_folder(folder, &[patch], &record, out, false, &Silent).unwrap().commit().unwrap();
    let written = Checkpoint::open(out).unwrap();
    let [a, b] = [&model.file, &written].map(|f| sha256_tensors(f, &Silent).unwrap());
    for (t, (a, b)) in model.file.tensors().iter().zip(a.iter().zip(&b)) {
        assert_eq!(a != b, t.name == codes, "{name}: {}", t.name);
    }
    (u, v)
}
