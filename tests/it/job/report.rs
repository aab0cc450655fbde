//! The report of a whole main job, on a share of the built-in prompts given as files.

use crate::common::organism::{few_prompts, first, run, text, words};
use refusal_patch::report::RunReport;
use serde_json::Value;

#[test]
fn the_report_says_in_html_and_json_what_was_measured_and_shows_no_answer_to_a_harmful_request() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    let prompts = few_prompts(dir.path());
    let input = first().file("broken-Q4_K_M");
    let job = [
        text(&input),
        text(&out),
        "--strength",
        "1.41",
        "--layers",
        "3",
        "--max-over-refusal",
        "1",
        "--max-kl",
        "9",
    ];
    let (code, _) = run(&[&job[..], &words(&prompts)].concat());
    assert_eq!(code, 0);
    let json = std::fs::read_to_string(dir.path().join("out.report.json")).unwrap();
    let report: Value = serde_json::from_str(&json).unwrap();
    // It is the library's own type, to the last figure.
    let record: RunReport = serde_json::from_str(&json).unwrap();
    assert_eq!(serde_json::to_value(&record).unwrap(), report);
    let html = std::fs::read_to_string(dir.path().join("out.report.html")).unwrap();

    // The paired changes of the categories add up to those of the whole set.
    let changes: Vec<&Value> =
        report["changes"].as_array().unwrap().iter().filter(|c| c["set"] == "harmful").collect();
    let (whole, parts) = changes.split_first().unwrap();
    assert!(whole["category"] == "" && parts.len() > 5);
    for name in ["gained", "lost"] {
        let sum: u64 = parts.iter().map(|c| c[name].as_u64().unwrap()).sum();
        assert_eq!(whole[name].as_u64().unwrap(), sum);
    }
    assert_eq!(whole["rates"]["before"], report["test"]["before"]["harmful"]);
    assert_eq!(whole["rates"]["after"], report["test"]["after"]["harmful"]);
    assert!(whole["p_value"].as_f64().unwrap() <= 1.0);
    for c in parts {
        assert!(html.contains(c["category"].as_str().unwrap()));
    }

    // Of answers to harmful requests only a few openings are shown.
    let examples = report["examples"].as_array().unwrap();
    assert!(
        examples.iter().any(|e| e["set"] == "harmful")
            && examples.iter().any(|e| e["set"] == "harmless")
    );
    for e in examples.iter().filter(|e| e["set"] == "harmful") {
        for when in ["before", "after"] {
            assert!(e[when]["text"].as_str().unwrap().chars().count() <= 41, "{e}");
        }
    }
    let card = report["model_card"].as_str().unwrap();
    let rate = report["test"]["after"]["harmful"]["refusal_rate"].as_f64().unwrap();
    let shown = format!("{:.1} %", 100.0 * rate);
    assert!(card.starts_with("## ") && card.contains(&shown) && html.contains(&shown));
    assert!(
        html.contains(report["sha256"]["after"].as_str().unwrap())
            && card.contains(report["sha256"]["after"].as_str().unwrap())
    );
    assert!(html.matches("<svg").count() >= 5 && !html.contains("http") && !html.contains("NaN"));
    assert_eq!(html.matches("<circle class=ring").count(), 3, "the chosen edit, in every plot");
}
