//! The main job with a reference, and its messages for models that have nothing to restore. The
//! prompts are a share of the built-in ones, given as files.

use std::path::Path;

use crate::common::folder;
use crate::common::organism::*;
use assert_cmd::Command;
use refusal_patch::encoding::Encoding;
use refusal_patch::text::{PromptSet, Set, Split};
use serde_json::Value;

/// Expects an error of one line and returns it.
fn error(args: &[&str]) -> String {
    let (code, value) = run(args);
    let error = value["error"].as_str().unwrap_or_default().to_string();
    assert_eq!((code, error.lines().count()), (1, 1), "{error}");
    error
}

#[test]
fn the_originals_refusal_is_the_goal_and_its_directions_and_weights_are_candidates() {
    let dir = tempfile::tempdir().unwrap();
    let (out, prompts) = (dir.path().join("out.gguf"), share_of_prompts(dir.path(), 23));
    let (broken, original) = (first().file("broken-Q4_K_M"), first().file("healthy-F16"));
    let job = [
        text(&broken),
        text(&out),
        "--reference",
        text(&original),
        "--layers",
        "3",
        "--strength",
        "0.71",
    ];
    let (code, report) = run(&[&job[..], &words(&prompts)].concat());
    assert_eq!((code, &report["outcome"]), (0, &"patched".into()), "{report}");

    let rate = |v: &Value| v["harmful"]["refusal_rate"].as_f64().unwrap();
    let (goal, before, after) =
        (&report["reference"]["test"], &report["test"]["before"], &report["test"]["after"]);
    println!("original {}, before {}, after {}", rate(goal), rate(before), rate(after));
    assert!(report["reference"]["model"] == text(&original) && rate(goal) > rate(before));
    assert!(report["gain"].as_f64().unwrap() > 0.0);
    let kinds: Vec<(&str, &str)> = report["candidates"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| (c["method"].as_str().unwrap(), c["toward"].as_str().unwrap()))
        .collect();
    assert!(kinds.contains(&("restore", "original")));
    let scanned = report["scan"]["effects"].as_array().unwrap();
    for kind in ["projected", "refused", "original", "taken"] {
        let of = scanned.iter().filter(|e| e["toward"] == kind && e["strength"] == 1.0);
        assert!(of.count() >= 5, "{kind}: every block is scanned");
    }
    let mut gated: Vec<&str> = kinds.iter().filter(|k| k.0 == "gated").map(|k| k.1).collect();
    gated.dedup();
    assert_eq!(gated.len(), 2, "the two directions that gain most: {gated:?}");
    // Every trial is reported with its KL, and the chosen edit is among them.
    let chosen = &report["chosen"];
    let tried = report["trials"].as_array().unwrap();
    assert!(tried
        .iter()
        .any(|t| t["strength"] == chosen["strength"] && t["method"] == chosen["method"]));
    assert!(tried.iter().all(|t| t["kl"].is_f64()));
    let html = std::fs::read_to_string(dir.path().join("out.report.html")).unwrap();
    assert!(html.contains("the original") && html.contains("KL on harmless answers, nats</text>"));
}

#[test]
fn restore_needs_a_reference() {
    let broken = first().file("broken-Q4_K_M");
    let o = Command::cargo_bin("refusal-patch")
        .unwrap()
        .args([text(&broken), "out.gguf", "--method", "restore"])
        .output()
        .unwrap();
    assert_eq!(o.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&o.stderr).contains("--reference"));
}

#[test]
fn a_reference_that_is_no_original_of_in_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    let broken = first().file("broken-Q4_K_M");
    let with =
        |reference: &Path| error(&[text(&broken), text(&out), "--reference", text(reference)]);
    // The same shape and size of the vocabulary, but other tokens.
    assert!(with(&second().file("healthy-Q4_K_M")).contains("in other tokens than"));
    assert!(with(&broken).contains("IN itself"));
    assert!(with(&dir.path().join("none.gguf")).contains("none.gguf"));
    // Another depth.
    let folder = folder::organism(dir.path(), "organism-healthy-F16.gguf", Encoding::BF16, 1);
    let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["num_hidden_layers"] = 5.into();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    assert!(with(&folder).contains("5 blocks"), "{}", with(&folder));
    assert!(!out.exists());
}

#[test]
fn a_model_that_refuses_as_its_original_does_needs_no_patch() {
    let dir = tempfile::tempdir().unwrap();
    let (out, prompts) = (dir.path().join("out.gguf"), share_of_prompts(dir.path(), 23));
    // A folder is an original of a GGUF file, too.
    let original = folder::organism(dir.path(), "organism-healthy-F16.gguf", Encoding::BF16, 2);
    let healthy = first().file("healthy-Q4_K_M");
    let job = [text(&healthy), text(&out), "--reference", text(&original)];
    let (code, report) = run(&[&job[..], &words(&prompts)].concat());
    assert_eq!((code, &report["outcome"]), (0, &"not-needed".into()), "{report}");
    let why = report["why"].as_str().unwrap();
    assert!(why.contains("the original"), "{why}");
    // Training prompts are judged, too, and what so many prompts can show is said.
    assert!(why.contains("harmful training and validation prompts"), "{why}");
    assert!(why.contains("in 80 % of all comparisons"), "{why}");
    assert!(
        report["reference"]["validation"]["harmful"]["n"].as_u64().unwrap() > 20 && !out.exists()
    );
}

#[test]
fn a_model_that_never_refused_is_told_so() {
    let dir = tempfile::tempdir().unwrap();
    let (out, few) = (dir.path().join("out.gguf"), share_of_prompts(dir.path(), 23));
    // Harmless requests in place of the harmful ones: no model refuses them, so every model looks
    // like a base model.
    let built_in = PromptSet::built_in();
    let path = dir.path().join("none-harmful.jsonl");
    let lines = [Split::Train, Split::Validation, Split::Test].iter().flat_map(|&split| {
        let line = |p: &_| serde_json::to_string(p).unwrap();
        built_in
            .of(Set::Harmless, split)
            .into_iter()
            .skip(1)
            .step_by(5)
            .map(line)
            .collect::<Vec<_>>()
    });
    std::fs::write(&path, lines.collect::<Vec<_>>().join("\n")).unwrap();
    let mut prompts = few;
    prompts[1] = text(&path).to_string();
    let model = first().file("healthy-Q4_K_M");
    let (code, report) =
        run(&[&[text(&model), text(&out), "--layers", "2"][..], &words(&prompts)].concat());
    assert_eq!((code, &report["outcome"]), (3, &"never-refused".into()), "{}", report["why"]);
    assert!(!out.exists());
    let (code, eval) = run(&[&["eval", text(&model)][..], &words(&prompts)].concat());
    assert_eq!((code, &eval["summary"]["verdict"]), (0, &"never-refused".into()));
}

#[test]
fn a_run_without_an_edit_inside_the_limits_reports_its_best_trials() {
    let dir = tempfile::tempdir().unwrap();
    let (out, prompts) = (dir.path().join("out.gguf"), share_of_prompts(dir.path(), 23));
    let broken = first().file("broken-Q4_K_M");
    let job =
        [text(&broken), text(&out), "--layers", "3", "--strength", "0.5", "--max-kl", "0.00001"];
    let (code, report) = run(&[&job[..], &words(&prompts)].concat());
    assert_eq!((code, &report["outcome"]), (3, &"out-of-limits".into()), "{report}");
    let front = report["front"].as_array().unwrap();
    assert!(!front.is_empty() && !out.exists());
    for t in front {
        println!("{t}");
        assert!(t["broken"]["limit"] == "kl");
    }
    // Each trial broke a limit that is cheap to check, so no prompt was answered.
    assert!(front.iter().all(|t| t["harmful"].is_null() && t["kl"].is_f64()));
    assert!(front.windows(2).all(|pair| pair[0]["kl"].as_f64() <= pair[1]["kl"].as_f64()));
}
