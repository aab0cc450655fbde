//! `compare` on the trained fixtures: what compression did to refusal, by exit code.

use std::path::{Path, PathBuf};
use std::process::Output;

use assert_cmd::Command;
use serde_json::Value;

fn organism(kind: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fixtures/organism-{kind}.gguf"))
}

fn compare(original: &Path, compressed: &Path, more: &[&str]) -> (i32, Output) {
    let o = Command::cargo_bin("refusal-patch")
        .unwrap()
        .arg("compare")
        .args([original, compressed])
        .args(more)
        .output();
    let o = o.unwrap();
    (o.status.code().unwrap(), o)
}

fn json(o: &Output) -> Value {
    serde_json::from_slice(&o.stdout)
        .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&o.stderr)))
}

#[test]
fn a_model_that_lost_refusal_to_pruning_is_weakened_and_fails_the_gate() {
    let (code, o) = compare(&organism("healthy-Q4_K_M"), &organism("broken-Q4_K_M"), &["--json"]);
    let v = json(&o);
    assert_eq!((code, &v["schema"], &v["outcome"]), (3, &2.into(), &"weakened".into()));
    let number = |v: &Value| v.as_f64().unwrap();
    let whole = &v["refusal"][0];
    assert_eq!((&whole["set"], &whole["category"]), (&"harmful".into(), &"".into()));
    let (before, after) = (
        number(&whole["rates"]["before"]["refusal_rate"]),
        number(&whole["rates"]["after"]["refusal_rate"]),
    );
    assert!((number(&v["drop"]) - (before - after)).abs() < 1e-12 && number(&v["drop"]) > 0.2);
    assert!(number(&whole["p_value"]) < 0.05);
    assert!(
        number(&whole["lost"]) - number(&whole["gained"])
            > 0.2 * number(&whole["rates"]["before"]["n"])
    );
    for rate in [&whole["rates"]["before"], &whole["rates"]["after"]] {
        let (low, high) = (number(&rate["interval"]["low"]), number(&rate["interval"]["high"]));
        assert!(low < number(&rate["refusal_rate"]) && number(&rate["refusal_rate"]) < high);
    }
    let categories =
        v["refusal"].as_array().unwrap().iter().filter(|c| c["category"] != "").count();
    assert!(categories >= 2, "categories are reported apart");
    for l in v["layers"].as_array().unwrap() {
        println!("{l}");
        for name in ["cosine", "across", "null", "null_low"] {
            assert!((-1.0..=1.0).contains(&number(&l[name])), "{name} of {l}");
        }
        // Halves are noisier than the whole, and the lowest twentieth is below the mean.
        assert!(
            number(&l["across"]) <= number(&l["cosine"]) + 1e-9
                && number(&l["null_low"]) <= number(&l["null"])
        );
    }
    // Pruning took magnitude along the direction (Chhabra & Khalili 2025; docs/METHOD.md).
    let source = v["source"]["before"]["layer"].as_u64().unwrap() as usize;
    let magnitude = &v["layers"][source]["magnitude"];
    assert!(number(&magnitude["after"]) < number(&magnitude["before"]), "{magnitude}");
}

#[test]
fn a_model_that_was_only_quantized_is_healthy() {
    let (code, o) = compare(&organism("healthy-F16"), &organism("healthy-Q4_K_M"), &[]);
    let text = String::from_utf8_lossy(&o.stdout);
    println!("{text}");
    assert_eq!(code, 0);
    assert!(text.starts_with("refusal is healthy"), "{text}");
    for word in [
        "original",
        "compressed",
        "McNemar p",
        "borderline",
        "across halves",
        "magnitude",
        "clearest at",
    ] {
        assert!(text.contains(word), "{word}");
    }
}

#[test]
fn a_file_that_is_no_version_of_the_original_gets_one_clear_error() {
    let other =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/forward/llama-k-quants.gguf");
    let (code, o) = compare(&organism("healthy-Q4_K_M"), &other, &[]);
    let text = String::from_utf8_lossy(&o.stderr);
    assert_eq!((code, text.trim().lines().count()), (1, 1), "{text}");
    for word in ["llama-k-quants.gguf", "healthy-Q4_K_M.gguf", "width", "same model"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    let (code, o) = compare(Path::new("missing.gguf"), &other, &[]);
    assert_eq!(code, 1);
    assert!(String::from_utf8_lossy(&o.stderr).contains("missing.gguf"));
}
