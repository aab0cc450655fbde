//! Adapters of every encoding, and a control vector, do in llama.cpp what they do here.

use std::path::Path;

use refusal_patch::checkpoint::Gguf;
use refusal_patch::model::Model;
use serde_json::{json, Value};

use crate::common::organism::*;
use crate::common::sidecar::{adapter_and_fold_agree, forced};

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
            eval["summary"][set]["refused"], report["test"]["after"][set]["refused"],
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
        let watch = prompts.is_empty() || vector.is_some();
        let mut all =
            json!({ "model": base, "control_vector": vector, "forced": one, "watch": watch });
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
