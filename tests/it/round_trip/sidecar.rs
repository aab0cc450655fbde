//! The edit beside the weights does in llama.cpp what it does here.

use std::path::Path;

use crate::common::organism::*;
use refusal_patch::checkpoint::{sha256_file, Gguf};
use refusal_patch::model::Model;
use refusal_patch::output::{read_direction, Provenance};
use refusal_patch::progress::Silent;
use serde_json::{json, Value};

/// One block, one strength, and limits as wide as they go: the search is not what is tested here.
fn quick(strength: &str) -> [&str; 8] {
    ["--layers", "3", "--strength", strength, "--max-kl", "1", "--max-over-refusal", "1"]
}

/// Prompt and answer tokens of what `eval` saw: the first `most` prompts of a set.
fn forced(eval: &Value, model: &Path, set: &str, most: usize) -> Vec<Value> {
    let chat = chat(&Model::open(model).unwrap());
    let of = eval["prompts"].as_array().unwrap().iter().filter(|p| p["set"] == set).take(most);
    of.map(|p| {
        json!([p["tokens"], chat.tokenizer.encode(p["continuation"].as_str().unwrap(), false)])
    })
    .collect()
}

/// The adapter beside the base against the folded file, in llama.cpp: refusals, and
/// log-probabilities to within `most`.
fn adapter_and_fold_agree(kind: &str, strength: &str, most: f64) {
    let dir = tempfile::tempdir().unwrap();
    let base = first().file(kind);
    let (folded, adapter) = (dir.path().join("folded.gguf"), dir.path().join("adapter.gguf"));
    let few = few_prompts(dir.path());
    let (code, weights) =
        run(&[&[text(&base), text(&folded)][..], &quick(strength), &words(&few)].concat());
    assert_eq!((code, &weights["outcome"]), (0, &"patched".into()));
    let (code, lora) = run(&[
        &[text(&base), text(&adapter), "--emit", "lora"][..],
        &quick(strength),
        &words(&few),
    ]
    .concat());
    assert_eq!((code, &lora["outcome"]), (0, &"patched".into()));
    assert!(lora["load"].as_str().unwrap().contains("--lora"), "{}", lora["load"]);
    for key in ["layers", "writers", "strength"] {
        assert_eq!(lora["chosen"][key], weights["chosen"][key], "the same edit");
    }

    let (_, eval) = run(&["eval", text(&folded)]);
    let (_, beside) = run(&["eval", text(&base), "--sidecar", text(&adapter)]);
    let rate = |v: &Value| v["summary"]["harmful"]["refusal_rate"].as_f64().unwrap();
    println!(
        "{kind}: refusal of the folded file {:.3}, with the adapter {:.3}",
        rate(&eval),
        rate(&beside)
    );
    assert!((rate(&eval) - rate(&beside)).abs() <= 0.02);

    let Some(theirs) = llama_cpp(&folded, &eval, dir.path(), &[]) else { return };
    let with = llama_cpp(&base, &eval, dir.path(), &["--lora", text(&adapter)]).unwrap();
    println!("  llama.cpp: {theirs:?} folded, {with:?} with the adapter");
    assert!((theirs.0 - with.0).abs() <= 0.02 && (theirs.1 - with.1).abs() <= 0.02);

    let texts =
        [forced(&eval, &base, "harmful", 40), forced(&eval, &base, "harmless", 40)].concat();
    let logprobs = |model: &Path, lora: Option<&Path>| -> Vec<f64> {
        let answer =
            ask(json!({ "model": model, "lora": lora, "forced": texts }), dir.path()).unwrap();
        let rows =
            answer["logprobs"].as_array().unwrap().iter().flat_map(|r| r.as_array().unwrap());
        rows.map(|x| x.as_f64().unwrap()).collect()
    };
    let (plain, fold, lora) =
        (logprobs(&base, None), logprobs(&folded, None), logprobs(&base, Some(&adapter)));
    let apart = |a: &[f64], b: &[f64]| {
        assert_eq!(a.len(), b.len());
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f64>() / a.len() as f64
    };
    println!(
        "  mean |Δ logprob| over {} tokens: fold and adapter {:.4}, base and adapter {:.4}",
        fold.len(),
        apart(&fold, &lora),
        apart(&plain, &lora)
    );
    assert!(apart(&fold, &lora) <= most);
    assert!(apart(&plain, &lora) > 4.0 * apart(&fold, &lora), "the adapter does something");
}

#[test]
fn an_adapter_does_what_the_folded_file_does() {
    adapter_and_fold_agree("broken-Q4_K_M", "1.0", 0.05);
}

#[test]
#[ignore = "two minutes more"]
fn adapters_agree_with_folds_in_every_encoding() {
    adapter_and_fold_agree("broken-Q8_0", "1.0", 0.02);
    // A healthy model is nearer to the limits.
    adapter_and_fold_agree("healthy-F16", "0.71", 0.01);
}

#[test]
#[ignore = "two minutes more"]
fn a_control_vector_moves_the_residual_stream_by_what_was_asked() {
    let dir = tempfile::tempdir().unwrap();
    let base = first().file("broken-Q4_K_M");
    let out = dir.path().join("vector.gguf");
    let (code, report) = run(&[text(&base), text(&out), "--emit", "control-vector"]);
    assert_eq!((code, &report["outcome"]), (0, &"patched".into()), "{report}");
    assert!(report["load"].as_str().unwrap().contains("--control-vector"));
    let layer = report["chosen"]["layers"][0].as_u64().unwrap();
    let file = Gguf::open(&out).unwrap();
    let tensor = file.tensor(&format!("direction.{layer}")).unwrap();
    let asked: Vec<f32> = file
        .bytes(tensor)
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect();

    let (_, eval) = run(&["eval", text(&base), "--sidecar", text(&out)]);
    for set in ["harmful", "harmless", "borderline"] {
        assert_eq!(
            eval["summary"][set]["refused"], report["test"][1][set]["refused"],
            "the reported rates"
        );
    }
    let chat = chat(&Model::open(&base).unwrap());
    let prompts: Vec<&Value> =
        eval["prompts"].as_array().unwrap().iter().map(|p| &p["tokens"]).collect();
    let one = forced(&eval, &base, "harmless", 1);
    let end: Vec<u32> = (0..16).filter(|&t| chat.tokenizer.is_end(t)).collect();
    let request = |vector: Option<&Path>, prompts: &[&Value]| {
        let more = json!({ "max_new_tokens": 32, "end": end, "prompts": prompts });
        let mut all = json!({ "model": base, "control_vector": vector, "forced": one, "watch": prompts.is_empty() || vector.is_some() });
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        ask(all, dir.path())
    };
    let Some(plain) = request(None, &[]) else { return };
    let steered = request(Some(&out), &prompts).unwrap();
    let stream = |v: &Value| -> Vec<f64> {
        let values = v["residual"][layer.to_string()].as_array().unwrap();
        values.iter().map(|x| x.as_f64().unwrap()).collect()
    };
    let worst = stream(&plain)
        .iter()
        .zip(stream(&steered))
        .zip(&asked)
        .map(|((a, b), u)| (b - a - f64::from(*u)).abs())
        .fold(0.0, f64::max);
    println!("block {layer}: moved as asked to within {worst:.1e}");
    assert!(worst < 1e-4);
    let texts: Vec<String> = steered["answers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|a| {
            let ids: Vec<u32> =
                a.as_array().unwrap().iter().map(|t| t.as_u64().unwrap() as u32).collect();
            chat.tokenizer.decode(&ids)
        })
        .collect();
    let theirs = rates(&eval, &texts.iter().map(String::as_str).collect::<Vec<_>>());
    let ours = |set: &str| eval["summary"][set]["refusal_rate"].as_f64().unwrap();
    println!("  here {:.3} {:.3}, llama.cpp {theirs:.3?}", ours("harmful"), ours("harmless"));
    assert!(
        (ours("harmful") - theirs.0).abs() <= 0.03 && (ours("harmless") - theirs.1).abs() <= 0.03
    );
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
    let rate = |i: usize| report["test"][i]["harmful"]["refusal_rate"].as_f64().unwrap();
    println!("refusal {:.3} -> {:.3}, strength {}", rate(0), rate(1), report["chosen"]["strength"]);
    assert!(rate(1) >= rate(0) + 0.15, "refusal is back");

    // What is written is the saved direction, only its length is this model's.
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
    // The version is a u32 behind its key's type.
    let key = b"refusal_patch.sidecar_version";
    let at = bytes.windows(key.len()).position(|w| w == key).unwrap() + key.len() + 4;
    let mut future = bytes.clone();
    future[at] = 9;
    let later = dir.path().join("later.gguf");
    std::fs::write(&later, future).unwrap();
    refused(&base, &later, "version 9");
    refused(&base, &base, "no sidecar");
}
