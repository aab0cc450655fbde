//! An adapter beside its base against the folded file.

use std::path::Path;

use refusal_patch::model::Model;
use serde_json::{json, Value};

use super::organism::*;

/// One block, one strength, the widest limits: these tests are not about the search.
pub fn quick(strength: &str) -> [&str; 8] {
    ["--layers", "3", "--strength", strength, "--max-kl", "1", "--max-over-refusal", "1"]
}

/// The tokens of prompt and answer that `eval` reports, for the first `most` prompts of a set.
pub fn forced(eval: &Value, model: &Path, set: &str, most: usize) -> Vec<Value> {
    let chat = chat(&Model::open(model).unwrap());
    let of = eval["prompts"].as_array().unwrap().iter().filter(|p| p["set"] == set).take(most);
    of.map(|p| {
        json!([p["tokens"], chat.tokenizer.encode(p["continuation"].as_str().unwrap(), false)])
    })
    .collect()
}

/// The adapter beside its base and the folded file have the same refusal rates, and in llama.cpp
/// the same log-probabilities to within `most` on average.
pub fn adapter_and_fold_agree(kind: &str, strength: &str, most: f64) {
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
