//! An edit in a file beside the model does in llama.cpp what it does here.

use std::path::Path;

use crate::common::organism::*;
use crate::common::sidecar::{adapter_and_fold_agree, quick};
use refusal_patch::checkpoint::{sha256_file, Gguf};
use refusal_patch::model::Model;
use refusal_patch::output::{read_direction, Provenance};
use refusal_patch::progress::Silent;
use serde_json::{json, Value};

#[test]
fn an_adapter_does_what_the_folded_file_does() {
    adapter_and_fold_agree("broken-Q4_K_M", "1.0", 0.05);
}

#[test]
fn a_bias_carries_a_constant_where_the_architecture_allows_one() {
    let dir = tempfile::tempdir().unwrap();
    let base = first().file("broken-Q4_K_M");
    let out = dir.path().join("out.gguf");
    let few = few_prompts(dir.path());
    let add = ["--method", "add", "--strength", "0.05", "--max-kl", "1", "--max-over-refusal", "1"];
    let (code, report) = run(&[&[text(&base), text(&out)][..], &add, &words(&few)].concat());
    assert_eq!(code, 0, "{report}");
    let (_, diff) = run(&["diff", text(&base), text(&out)]);
    let layer = &report["chosen"]["layers"][0];
    assert_eq!(diff["added"], json!([format!("blk.{layer}.ffn_down.bias")]));
    assert_eq!(diff["changed"], json!([]));
    let (_, eval) = run(&["eval", text(&out)]);
    let Some(theirs) = llama_cpp(&out, &eval, dir.path(), &[]) else { return };
    let ours = eval["summary"]["harmful"]["refusal_rate"].as_f64().unwrap();
    println!("bias: {ours:.3}, llama.cpp {:.3}", theirs.0);
    assert!((ours - theirs.0).abs() <= 0.03);
}

#[test]
fn a_saved_direction_gives_the_same_bytes_at_any_thread_count() {
    let dir = tempfile::tempdir().unwrap();
    let base = first().file("broken-Q4_K_M");
    let saved = dir.path().join("d.safetensors");
    let few = few_prompts(dir.path());
    assert_eq!(
        run(&[&["derive", text(&base), "-o", text(&saved)][..], &words(&few)].concat()).0,
        0
    );
    let mut hashes = Vec::new();
    for (name, options) in [
        ("own.gguf", &["--threads", "2"][..]),
        ("one.gguf", &["--threads", "1", "--direction", text(&saved)]),
        ("four.gguf", &["--threads", "4", "--direction", text(&saved)]),
    ] {
        let out = dir.path().join(name);
        let (code, report) =
            run(&[&[text(&base), text(&out)][..], &quick("1.0"), &words(&few), options].concat());
        assert_eq!((code, &report["outcome"]), (0, &"patched".into()));
        hashes.push(sha256_file(&out, &Silent).unwrap());
    }
    assert!(hashes.iter().all(|h| *h == hashes[0]), "{hashes:?}");
}

#[test]
fn a_saved_direction_repairs_another_quantization_of_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let (derived, other) = (first().file("broken-Q4_K_M"), first().file("broken-Q8_0"));
    let (saved, out) = (dir.path().join("d.safetensors"), dir.path().join("out.gguf"));
    let few = few_prompts(dir.path());
    assert_eq!(
        run(&[&["derive", text(&derived), "-o", text(&saved)][..], &words(&few)].concat()).0,
        0
    );
    let o = assert_cmd::Command::cargo_bin("refusal-patch")
        .unwrap()
        .args([text(&other), text(&out), "--direction", text(&saved), "--layers", "3", "--json"])
        .args(&few)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&o.stderr);
    assert!(said.contains("derived from another file"), "{said}");
    let report: Value = serde_json::from_slice(&o.stdout).unwrap();
    assert_eq!((o.status.code(), &report["outcome"]), (Some(0), &"patched".into()), "{report}");
    let rate = |i: usize| {
        report["test"][["before", "after"][i]]["harmful"]["refusal_rate"].as_f64().unwrap()
    };
    println!("refusal {:.3} -> {:.3}, strength {}", rate(0), rate(1), report["chosen"]["strength"]);
    assert!(rate(1) >= rate(0) + 0.15, "refusal is back");

    // The edit has the saved direction. Its length comes from this model.
    let model = Model::open(&derived).unwrap();
    let (directions, warning) = read_direction(&saved, &model, &Silent).unwrap();
    assert_eq!(warning, None);
    let unit = &directions.iter().find(|d| d.0 == 3).unwrap().1;
    let edits = Provenance::read(&Gguf::open(&out).unwrap()).unwrap().unwrap().edits;
    assert!(!edits.is_empty());
    for e in &edits {
        let along: f32 = e.u.iter().zip(unit).map(|(a, b)| a * b).sum();
        let length = e.u.iter().map(|a| a * a).sum::<f32>().sqrt();
        assert!(along / length > 0.9999, "{}: {}", e.tensor, along / length);
    }
}

#[test]
fn sidecars_of_another_model_or_version_and_damaged_ones_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (base, other) = (first().file("broken-Q4_K_M"), first().file("broken-Q8_0"));
    let adapter = dir.path().join("adapter.gguf");
    let few = few_prompts(dir.path());
    let (code, _) =
        run(&[&[text(&base), text(&adapter), "--emit", "lora"][..], &quick("1.0"), &words(&few)]
            .concat());
    assert_eq!(code, 0);
    let bytes = std::fs::read(&adapter).unwrap();
    let refused = |model: &Path, file: &Path, word: &str| {
        let o = assert_cmd::Command::cargo_bin("refusal-patch")
            .unwrap()
            .args(["eval", text(model), "--sidecar", text(file)])
            .output()
            .unwrap();
        let line = String::from_utf8_lossy(&o.stderr).trim().to_string();
        assert_eq!(o.status.code(), Some(1), "{line}");
        assert!(line.lines().count() == 1 && line.contains(word), "{line}");
    };
    refused(&other, &adapter, "another model");
    let cut = dir.path().join("cut.gguf");
    std::fs::write(&cut, &bytes[..bytes.len() - 64]).unwrap();
    refused(&base, &cut, "cut.gguf");
    // The version is a u32 after the type of its key.
    let key = b"refusal_patch.sidecar_version";
    let at = bytes.windows(key.len()).position(|w| w == key).unwrap() + key.len() + 4;
    let mut future = bytes.clone();
    future[at] = 9;
    let later = dir.path().join("later.gguf");
    std::fs::write(&later, future).unwrap();
    refused(&base, &later, "version 9");
    refused(&base, &base, "no sidecar");
}
