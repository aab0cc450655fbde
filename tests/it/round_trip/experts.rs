//! Models with experts: shapes that don't fit are refused, and a written edit does in llama.cpp
//! what it does here.

use std::path::{Path, PathBuf};

use crate::common::experts::{as_folder, logprobs, COUNT};
use crate::common::gguf::saved;
use crate::common::organism::*;
use refusal_patch::arch::Writer;
use refusal_patch::checkpoint::{sha256_checkpoint, sha256_tensors};
use refusal_patch::edit::fold::achieved_all;
use refusal_patch::edit::stack::fold_all;
use refusal_patch::edit::{Edit, RankOne};
use refusal_patch::model::Model;
use refusal_patch::output::{stage_folder, write, Kind, Patch, Plan, Provenance, Sidecar};
use refusal_patch::progress::Silent;
use serde_json::{json, Value};

fn random_model(name: &str) -> PathBuf {
    root().join(format!("tests/data/forward/{name}.gguf"))
}

fn wave(n: usize, f: f32, size: f32) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * f).sin() * size).collect()
}

/// An edit of all writers of block 1, with expert 1 left alone.
fn edit_of(model: &Model) -> Edit {
    let term = |&writer: &Writer| {
        let mut v = wave(model.spec.columns(1, writer), 1.3, 0.3);
        if let (Writer::Experts, Some(e)) = (writer, &model.spec.experts) {
            v[e.ffn..2 * e.ffn].fill(0.0);
        }
        RankOne { layer: 1, writer, u: wave(model.spec.hidden, 0.7, 0.3), v }
    };
    model.spec.writers(1).iter().map(term).collect()
}

/// Writes the edit twice: folded into every tensor, and as an adapter beside the model.
fn written(model: &Model, edit: &Edit, dir: &Path) -> (PathBuf, PathBuf) {
    let (folded, adapter) = (dir.join("folded.gguf"), dir.join("adapter.gguf"));
    let file = model.file.gguf().unwrap();
    let mut plan = Plan::new(file);
    for t in edit {
        for part in model.parts(t.layer, t.writer).unwrap() {
            let (v, encoding) = (part.gate(&t.v), part.stack.encoding());
            let bytes = fold_all(&part.stack, &t.u, v, false).unwrap();
            let stored = achieved_all(&part.stack, &part.stack.with(encoding, &bytes), &t.u, v);
            assert!((stored.gain - 1.0).abs() < 0.01, "{}: {stored:?}", part.tensor);
            if t.writer == Writer::Experts {
                let size = bytes.len() / part.stack.len();
                let (a, b) = (&part.stack.get(1).bytes, &bytes[size..2 * size]);
                assert!(*a == b, "an expert whose gate is zero keeps its bytes");
            }
            plan.patches.push(Patch {
                type_id: encoding.blocks().unwrap().ggml_id(),
                tensor: part.tensor,
                bytes,
            });
        }
    }
    write(&plan, &folded, false, &Silent).unwrap();
    let sidecar = Sidecar {
        kind: Kind::Lora,
        architecture: model.spec.arch.clone(),
        base_sha256: sha256_checkpoint(&model.file, &Silent).unwrap(),
        method: "gated".into(),
        strength: 1.0,
        edit: edit.clone(),
    };
    sidecar.stage(model, &adapter, false).unwrap().commit().unwrap();
    assert_eq!(Sidecar::read(&adapter, model, &Silent).unwrap(), sidecar);
    (folded, adapter)
}

fn apart(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn an_adapter_of_experts_does_in_llama_cpp_what_the_folded_file_does() {
    for name in ["mixtral", "qwen2moe", "qwen3moe"] {
        let dir = tempfile::tempdir().unwrap();
        let base = random_model(name);
        let model = Model::open(&base).unwrap();
        let (folded, adapter) = written(&model, &edit_of(&model), dir.path());
        let texts: Vec<Value> = (0..6u32)
            .map(|s| json!([[1], (2..40).map(|i| (i * (s + 3) * 7) % 250).collect::<Vec<_>>()]))
            .collect();
        let texts = json!(texts);
        let of = |model: &Path, lora| logprobs(model, lora, &texts, dir.path());
        let Some(plain) = of(&base, None) else { return };
        let (fold, lora) = (of(&folded, None).unwrap(), of(&base, Some(&adapter)).unwrap());
        let (near, far) = (apart(&fold, &lora), apart(&plain, &lora));
        println!(
            "{name}: max |Δ logprob| of fold and adapter {near:.4}, of base and adapter {far:.2}"
        );
        assert!(near < 0.05 && far > 20.0 * near, "{name}: {near} {far}");
    }
}

/// Writes `put` over the bytes `skip` after the first `find`. Opening the file fails and says
/// everything in `saying`.
fn refused(bytes: &[u8], find: &[u8], skip: usize, put: &[u8], saying: &[&str]) {
    let mut bytes = bytes.to_vec();
    let at = bytes.windows(find.len()).position(|w| w == find).unwrap() + find.len() + skip;
    bytes[at..at + put.len()].copy_from_slice(put);
    let (_dir, path) = saved(&bytes);
    let e = Model::open(&path).map(drop).expect_err("is refused").to_string();
    assert!(saying.iter().all(|s| e.contains(s)) && e.lines().count() == 1 && e.len() < 600, "{e}");
}

#[test]
fn hostile_counts_and_shapes_are_one_clear_error() {
    let bytes = std::fs::read(random_model("qwen2moe")).unwrap();
    let number = |key: &str, value: u32, saying: &[&str]| {
        refused(&bytes, format!("qwen2moe.{key}").as_bytes(), 4, &value.to_le_bytes(), saying);
    };
    number("expert_count", 1 << 31, &["ffn_gate_inp.weight is 6 x 64", "2147483648 x 64"]);
    number("expert_count", 5, &["ffn_gate_inp.weight is 6 x 64", "5 x 64"]);
    number("expert_count", 0, &["qwen2moe.expert_count is missing or not a positive number"]);
    number("expert_used_count", 7, &["7 of 6 experts", "no more experts in use than there are"]);
    number("expert_used_count", u32::MAX, &["4294967295 of 6 experts"]);
    number(
        "expert_feed_forward_length",
        41,
        &["ffn_gate_exps.weight is 6 x 40 x 64", "6 x 41 x 64"],
    );
    number("expert_shared_feed_forward_length", 1 << 31, &["ffn_gate_shexp.weight is 72 x 64"]);
    // The dimensions follow a name and their count. The new shapes have as many elements.
    let dims = |d: [u64; 3]| d.map(u64::to_le_bytes).concat();
    let shape = |tensor: &str, d: [u64; 3], saying: &[&str]| {
        refused(&bytes, tensor.as_bytes(), 4, &dims(d), saying);
    };
    shape(
        "blk.1.ffn_down_exps.weight",
        [40, 6, 64],
        &["ffn_down_exps.weight is 64 x 6 x 40", "6 x 64 x 40"],
    );
    shape("blk.0.ffn_up_exps.weight", [64, 240, 1], &["ffn_up_exps.weight is 1 x 240 x 64"]);
    // A name that the decoder doesn't know.
    refused(
        &bytes,
        b"blk.1.ffn_down_",
        0,
        b"expt",
        &["can't be applied", "blk.1.ffn_down_expt.weight"],
    );
}

#[test]
fn adapters_of_folders_name_modules_of_their_own_and_stacked_parameters() {
    for (stack, key, name) in [
        (false, "target_modules", "model.layers.1.block_sparse_moe.experts.3.w2"),
        (true, "target_parameters", "model.layers.1.mlp.experts.down_proj"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let model = Model::open(&as_folder(dir.path(), stack)).unwrap();
        let sidecar = Sidecar {
            kind: Kind::Lora,
            architecture: "llama".into(),
            base_sha256: sha256_checkpoint(&model.file, &Silent).unwrap(),
            method: "gated".into(),
            strength: 1.0,
            edit: edit_of(&model),
        };
        let out = dir.path().join("adapter");
        sidecar.stage(&model, &out, false).unwrap().commit().unwrap();
        assert_eq!(Sidecar::read(&out, &model, &Silent).unwrap(), sidecar);
        let config: Value =
            serde_json::from_slice(&std::fs::read(out.join("adapter_config.json")).unwrap())
                .unwrap();
        assert!(config[key].as_array().unwrap().contains(&json!(name)), "{config}");
        assert!(config["target_modules"]
            .as_array()
            .unwrap()
            .contains(&json!("model.layers.1.self_attn.o_proj")));
        let bytes = std::fs::read(out.join("adapter_model.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let shape = |half: &str| {
            let module = name.strip_suffix(".down_proj").unwrap_or(name);
            tensors
                .tensor(&format!("base_model.model.{module}.lora_{half}.weight"))
                .unwrap()
                .shape()
                .to_vec()
        };
        let n = if stack { COUNT } else { 1 };
        assert_eq!((shape("A"), shape("B")), (vec![n, 768], vec![256, n]));
    }
}

#[test]
fn experts_of_gpt_oss_hold_an_edit_in_mxfp4_and_in_floats_with_a_row_for_each_input() {
    for (name, codes) in [("gpt-oss", "down_proj"), ("gpt-oss-mxfp4", "down_proj_blocks")] {
        let dir = tempfile::tempdir().unwrap();
        let model = Model::open(&root().join("fixtures/architectures").join(name)).unwrap();
        let part = &model.parts(1, Writer::Experts).unwrap()[0];
        let (u, mut v) = (
            wave(model.spec.hidden, 0.7, 0.05),
            wave(model.spec.columns(1, Writer::Experts), 1.3, 1.0),
        );
        let width = part.stack.shape().1;
        v[width..2 * width].fill(0.0);
        let patch = Patch {
            tensor: model.code_tensor(&part.tensor).unwrap(),
            bytes: fold_all(&part.stack, &u, &v, true).unwrap(),
            type_id: 0,
        };
        assert_eq!(patch.tensor, format!("model.layers.1.mlp.experts.{codes}"));
        let type_id = model.file.tensor(&patch.tensor).unwrap().type_id;
        let (patch, out) = (Patch { type_id, ..patch }, dir.path().join("out"));
        let record = Provenance {
            version: "0".into(),
            source_sha256: String::new(),
            method: "gated".into(),
            layers: vec![1],
            strength: 1.0,
            before: "{}".into(),
            after: "{}".into(),
            edits: Vec::new(),
        };
        let folder = model.file.folder().unwrap();
        stage_folder(folder, &[patch], &record, &out, false, &Silent).unwrap().commit().unwrap();
        let written = Model::open(&out).unwrap();
        let after = &written.parts(1, Writer::Experts).unwrap()[0].stack;
        let stored = achieved_all(&part.stack, after, &u, &v);
        println!("{name}: {:.4} stored, {} codes moved", stored.gain, stored.codes_moved);
        assert!((0.98..=1.02).contains(&stored.gain), "{name}: {stored:?}");
        assert!(part.stack.get(1).bytes == after.get(1).bytes, "an expert without an edit");
        assert!(part.stack.get(2).bytes != after.get(2).bytes);
        let [a, b] = [&model.file, &written.file].map(|f| sha256_tensors(f, &Silent).unwrap());
        for (t, (a, b)) in model.file.tensors().iter().zip(a.iter().zip(&b)) {
            assert_eq!(
                a != b,
                t.name.ends_with(&format!("layers.1.mlp.experts.{codes}")),
                "{}",
                t.name
            );
        }
    }
}

#[test]
fn biases_and_sinks_that_do_not_fit_are_one_clear_error() {
    let bytes = std::fs::read(root().join("fixtures/architectures/gpt-oss.gguf")).unwrap();
    let gone = |tensor: &str, saying: &[&str]| {
        // Another name of the same length.
        let at = tensor.len() - 3;
        refused(&bytes, &tensor.as_bytes()[..at], 0, b"xyz", saying);
    };
    gone("blk.1.ffn_down_exps.bias", &["blk.1.ffn_down_exps.bxyz can't be applied"]);
    gone("blk.2.attn_sinks.weight", &["blk.2.attn_sinks.weixyz can't be applied"]);
    // Behind the blocks, where tensors of no block stand.
    let moved = |tensor: &str, saying: &[&str]| {
        let mut bytes = bytes.clone();
        let at = bytes.windows(tensor.len()).position(|w| w == tensor.as_bytes()).unwrap();
        bytes[at + "blk.".len()] = b'9';
        refused(&bytes, b"GGUF", 0, b"", saying);
    };
    moved("blk.1.ffn_gate_inp.bias", &["tensor blk.1.ffn_gate_inp.bias is missing"]);
    moved("blk.1.ffn_up_exps.bias", &["tensor blk.1.ffn_up_exps.bias is missing"]);
    moved("blk.0.attn_sinks.weight", &["tensor blk.0.attn_sinks.weight is missing"]);
    let fewer = |tensor: &str, saying: &[&str]| {
        refused(&bytes, tensor.as_bytes(), 4, &1u64.to_le_bytes(), saying);
    };
    fewer("blk.0.attn_sinks.weight", &["attn_sinks.weight has 1 elements", "asks for 2"]);
    fewer("blk.2.ffn_gate_inp.bias", &["ffn_gate_inp.bias has 1 elements", "asks for 3"]);
    fewer("blk.0.ffn_gate_exps.bias", &["ffn_gate_exps.bias has 3 elements", "asks for 48"]);
}
