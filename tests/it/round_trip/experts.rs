//! Models with experts: what is refused, what is written, and that it does in llama.cpp what it
//! does here.

use std::path::{Path, PathBuf};

use crate::common::experts::{upcycled, COUNT};
use crate::common::folder;
use crate::common::gguf::saved;
use crate::common::organism::*;
use refusal_patch::arch::Writer;
use refusal_patch::checkpoint::{sha256_checkpoint, Gguf};
use refusal_patch::edit::fold::achieved_all;
use refusal_patch::edit::stack::fold_all;
use refusal_patch::edit::{Edit, RankOne};
use refusal_patch::encoding::Encoding;
use refusal_patch::evaluate::Evaluator;
use refusal_patch::forward::Compute;
use refusal_patch::model::Model;
use refusal_patch::output::{write, Kind, Patch, Plan, Sidecar};
use refusal_patch::progress::Silent;
use refusal_patch::search::{patch, Outcome, Settings};
use refusal_patch::text::PromptSet;
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
        let mut v = wave(model.spec.columns(writer), 1.3, 0.3);
        if let (Writer::Experts, Some(e)) = (writer, &model.spec.experts) {
            v[e.ffn..2 * e.ffn].fill(0.0);
        }
        RankOne { layer: 1, writer, u: wave(model.spec.hidden, 0.7, 0.3), v }
    };
    model.spec.writers(1).iter().map(term).collect()
}

/// The edit folded into every tensor, and beside the model as an adapter.
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

/// Log-probabilities in llama.cpp of the tokens of some texts; `None` without the client.
fn logprobs(model: &Path, lora: Option<&Path>, texts: &Value, dir: &Path) -> Option<Vec<f64>> {
    let answer = ask(json!({ "model": model, "lora": lora, "forced": texts }), dir)?;
    let rows = answer["logprobs"].as_array().unwrap().iter().flat_map(|r| r.as_array().unwrap());
    Some(rows.map(|x| x.as_f64().unwrap()).collect())
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

/// A file's bytes with a metadata value or a shape replaced, and what is said of it.
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
    number("expert_used_count", 7, &["7 of 6 experts", "at most as many used as there are"]);
    number("expert_used_count", u32::MAX, &["4294967295 of 6 experts"]);
    number(
        "expert_feed_forward_length",
        41,
        &["ffn_gate_exps.weight is 6 x 40 x 64", "6 x 41 x 64"],
    );
    number("expert_shared_feed_forward_length", 1 << 31, &["ffn_gate_shexp.weight is 72 x 64"]);
    // Dimensions stand behind a name and their number: the same elements in other shapes.
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

/// Patches and holds the result to what a patch promises; returns the report.
fn repaired(input: &Path, out: &Path, options: &[&str]) -> Value {
    let (code, report) = run(&[&[text(input), text(out)][..], options].concat());
    assert_eq!((code, &report["outcome"]), (0, &"patched".into()), "{report}");
    let rate = |i: usize, set: &str| report["test"][i][set]["refusal_rate"].as_f64().unwrap();
    println!(
        "{} {}: harmful {:.4} -> {:.4}, harmless {:.4} -> {:.4}, borderline {:.4} -> {:.4}, {} s",
        report["chosen"]["layers"],
        report["chosen"]["writers"],
        rate(0, "harmful"),
        rate(1, "harmful"),
        rate(0, "harmless"),
        rate(1, "harmless"),
        rate(0, "borderline"),
        rate(1, "borderline"),
        report["seconds"].as_f64().unwrap().round()
    );
    report
}

#[test]
#[ignore = "minutes more"]
fn an_organism_with_experts_is_repaired_and_llama_cpp_agrees() {
    let dir = tempfile::tempdir().unwrap();
    let input = upcycled(&first().file("broken-Q4_K_M"), dir.path().join("in.gguf"), false);
    let out = dir.path().join("out.gguf");
    let report = repaired(&input, &out, &[]);
    let (before, after) = (first().measure(&input, dir.path()), first().measure(&out, dir.path()));
    assert!(after.harmful >= before.harmful + 0.15, "refusal is back");
    assert!(after.harmless <= before.harmless + 0.015 && after.exact >= before.exact - 0.015);
    let (_, diff) = run(&["diff", text(&input), text(&out)]);
    let changed = diff["changed"].as_array().unwrap();
    assert_eq!(changed.len(), report["tensors"].as_array().unwrap().len());
    for c in changed {
        assert!((0.98..=1.02).contains(&c["achieved"].as_f64().unwrap()), "{c}");
        assert!(c["off_direction_energy"]["overall"].as_f64().unwrap() <= 0.05, "{c}");
    }
}

#[test]
#[ignore = "minutes more"]
fn routed_experts_are_gated_together_and_the_adapter_agrees_with_the_fold() {
    let dir = tempfile::tempdir().unwrap();
    let base = upcycled(&first().file("broken-Q8_0"), dir.path().join("in.gguf"), true);
    let model = Model::open(&base).unwrap();
    let (chat, compute) = (chat(&model), Compute::cpu());
    let evaluator = Evaluator {
        model: &model,
        chat: &chat,
        compute: &compute,
        edits: &[],
        memory: 1 << 30,
        progress: &Silent,
    };
    let (folded, adapter) = (dir.path().join("folded.gguf"), dir.path().join("adapter.gguf"));
    let settings = Settings { routed: true, layers: Some((2, 2)), ..Settings::default() };
    let outcome =
        patch(&evaluator, None, &PromptSet::built_in(), &settings, Some(&folded), false).unwrap();
    let Outcome::Patched(p) = outcome else { panic!("not patched: {outcome:?}") };
    let (before, after) = p.test.as_ref().unwrap();
    println!(
        "{:?} strength {:.2}: harmful {:.4} -> {:.4}, harmless {:.4} -> {:.4}, borderline {:.4} -> {:.4}, KL {:.4}",
        p.chosen.writers,
        p.chosen.strength,
        before.harmful.refusal_rate,
        after.harmful.refusal_rate,
        before.harmless.refusal_rate,
        after.harmless.refusal_rate,
        before.borderline.refusal_rate,
        after.borderline.refusal_rate,
        after.kl
    );
    assert!(p.chosen.writers.contains(&"ffn_down_exps"), "{:?}", p.chosen.writers);
    // By the experts of one block alone.
    assert!(after.harmful.refusal_rate >= before.harmful.refusal_rate + 0.1);
    let sidecar = Sidecar {
        kind: Kind::Lora,
        architecture: model.spec.arch.clone(),
        base_sha256: sha256_checkpoint(&model.file, &Silent).unwrap(),
        method: "gated".into(),
        strength: p.chosen.strength as f32,
        edit: p.chosen.edit.clone(),
    };
    sidecar.stage(&model, &adapter, false).unwrap().commit().unwrap();
    let (_, eval) = run(&["eval", text(&folded)]);
    let (_, beside) = run(&["eval", text(&base), "--sidecar", text(&adapter)]);
    let rate = |v: &Value| v["summary"]["harmful"]["refusal_rate"].as_f64().unwrap();
    println!(
        "refusal of the folded file {:.4}, with the adapter {:.4}",
        rate(&eval),
        rate(&beside)
    );
    assert!((rate(&eval) - rate(&beside)).abs() <= 0.02);
    let Some(theirs) = llama_cpp(&folded, &eval, dir.path(), &[]) else { return };
    let with = llama_cpp(&base, &eval, dir.path(), &["--lora", text(&adapter)]).unwrap();
    println!("llama.cpp: {theirs:.4?} folded, {with:.4?} with the adapter");
    assert!((theirs.0 - with.0).abs() <= 0.02 && (theirs.1 - with.1).abs() <= 0.02);
    assert!((theirs.0 - rate(&eval)).abs() <= 0.03);
    let texts: Vec<Value> = eval["prompts"]
        .as_array()
        .unwrap()
        .iter()
        .step_by(12)
        .map(|p| {
            json!([p["tokens"], chat.tokenizer.encode(p["continuation"].as_str().unwrap(), false)])
        })
        .collect();
    let texts = json!(texts);
    let of = |model: &Path, lora| logprobs(model, lora, &texts, dir.path()).unwrap();
    let (plain, fold, lora) = (of(&base, None), of(&folded, None), of(&base, Some(&adapter)));
    let mean = |a: &[f64], b: &[f64]| {
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f64>() / a.len() as f64
    };
    println!(
        "mean |Δ logprob|: fold and adapter {:.4}, base and adapter {:.4}",
        mean(&fold, &lora),
        mean(&plain, &lora)
    );
    assert!(mean(&fold, &lora) <= 0.01 && mean(&plain, &lora) > 4.0 * mean(&fold, &lora));
}

/// An organism with experts as a Hugging Face folder, experts apart or stacked.
fn as_folder(dir: &Path, stack: bool) -> PathBuf {
    let file =
        Gguf::open(&upcycled(&first().file("broken-Q8_0"), dir.join("f16.gguf"), true)).unwrap();
    let input = dir.join("in");
    std::fs::create_dir(&input).unwrap();
    folder::organism_files(&input);
    let path = input.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let more = json!({
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": COUNT,
        "num_experts_per_tok": 2, "sliding_window": null,
    });
    more.as_object().unwrap().iter().for_each(|(k, v)| config[k] = v.clone());
    std::fs::write(&path, config.to_string()).unwrap();
    let tensors = folder::tensors_of(&file, Encoding::BF16);
    folder::write_weights(&input, &if stack { folder::stacked(tensors) } else { tensors }, 1);
    input
}

#[test]
#[ignore = "minutes more"]
fn a_folder_with_experts_is_repaired_apart_and_stacked() {
    for stack in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let input = as_folder(dir.path(), stack);
        let out = dir.path().join("out");
        let report = repaired(&input, &out, &["--layers", "2"]);
        let rate = |i: usize| report["test"][i]["harmful"]["refusal_rate"].as_f64().unwrap();
        assert!(rate(1) >= rate(0) + 0.15);
        let (_, diff) = run(&["diff", text(&input), text(&out)]);
        for c in diff["changed"].as_array().unwrap() {
            assert!((0.98..=1.02).contains(&c["achieved"].as_f64().unwrap()), "{c}");
        }
    }
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
