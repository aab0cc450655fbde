//! Every command on split models: it says of the shards what it says of the whole file, and the
//! main job writes the same weights.

use std::path::{Path, PathBuf};

use crate::common::organism::*;
use crate::common::split::{shard, split, thirds};
use refusal_patch::checkpoint::{sha256_checkpoint, Checkpoint, Gguf};
use refusal_patch::output::Provenance;
use refusal_patch::progress::Silent;
use serde_json::{json, Value};

/// A model in three shards as `s-0000*-of-00003.gguf`; their paths.
fn in_shards(model: &Path, dir: &Path) -> Vec<PathBuf> {
    let whole = Gguf::open(model).unwrap();
    split(&whole, dir, "s", &thirds(&whole))
}

/// One block, one strength, and limits as wide as they go: the search is not what is tested here.
fn quick(strength: &str) -> [&str; 8] {
    ["--layers", "3", "--strength", strength, "--max-kl", "1", "--max-over-refusal", "1"]
}

/// Without what differs from run to run, and the paths.
fn bare(mut value: Value) -> Value {
    for key in ["seconds", "peak_memory", "model", "file", "output", "shards", "original"] {
        value.as_object_mut().unwrap().remove(key);
    }
    value
}

#[test]
fn what_is_read_of_shards_is_what_is_read_of_the_whole_file() {
    let dir = tempfile::tempdir().unwrap();
    let whole = root().join("tests/data/forward/qwen2.gguf");
    let shards = in_shards(&whole, dir.path());
    let (first, last) = (text(&shards[0]), text(&shards[2]));
    let prompts = dir.path().join("p.txt");
    std::fs::write(&prompts, "Hello\nHow do I pick a lock?\n").unwrap();
    let of = |command: &str, model: &str, more: &[&str]| {
        let (code, value) = run(&[&[command, model], more].concat());
        assert_eq!(code, 0, "{command} {model}");
        value
    };
    let same = |command: &str, more: &[&str]| {
        let expected = bare(of(command, text(&whole), more));
        for model in [first, last] {
            assert_eq!(bare(of(command, model, more)), expected, "{command} {model}");
        }
    };
    same("inspect", &[]);
    same("inspect", &["--prompt", "Hi"]);
    same("eval", &["--prompts", text(&prompts), "--max-new-tokens", "4"]);
    assert_eq!(of("inspect", last, &[])["shards"], 3);
    assert_eq!(of("inspect", text(&whole), &[])["shards"], 1);

    for (before, after) in [(text(&whole), first), (last, text(&whole)), (first, last)] {
        let diff = of("diff", before, &[after]);
        assert_eq!((&diff["changed"], &diff["added"]), (&json!([]), &json!([])));
        assert_eq!(diff["identical"], Gguf::open(&whole).unwrap().tensors().len());
    }
}

#[test]
fn directions_and_comparisons_of_shards_are_those_of_the_whole_file() {
    let dir = tempfile::tempdir().unwrap();
    let whole = first().file("broken-Q4_K_M");
    let shards = in_shards(&whole, dir.path());
    let few = share_of_prompts(dir.path(), 24);
    let derived = |model: &Path, name: &str| {
        let out = dir.path().join(name);
        let (code, value) =
            run(&[&["derive", text(model), "-o", text(&out)][..], &words(&few)].concat());
        assert_eq!(code, 0);
        bare(value)
    };
    assert_eq!(derived(&shards[1], "split.st"), derived(&whole, "whole.st"));
    let (code, _) =
        run(&[&["derive", text(&shards[0]), "-o", text(&shards[1]), "--force"][..], &words(&few)]
            .concat());
    assert_eq!(code, 1, "a shard is never replaced");
    assert!(Gguf::open(&shards[0]).is_ok());

    let (code, same) =
        run(&[&["compare", text(&whole), text(&shards[0])][..], &words(&few)].concat());
    assert_eq!(code, 0, "{same}");
    let healthy = first().file("healthy-Q4_K_M");
    let compared = |model: &Path| {
        let (code, value) =
            run(&[&["compare", text(&healthy), text(model)][..], &words(&few)].concat());
        (code, bare(value)["summary"].clone())
    };
    assert_eq!(compared(&shards[0]), compared(&whole));
}

/// What the main job writes of the whole file and of its shards, in `dir`.
fn both_written(dir: &Path, few: &[String]) -> (PathBuf, Vec<PathBuf>, Vec<PathBuf>) {
    let whole = first().file("broken-Q4_K_M");
    let shards = in_shards(&whole, dir);
    let job = |input: &Path, out: &Path| {
        let (code, report) =
            run(&[&[text(input), text(out)][..], &quick("1.0"), &words(few)].concat());
        assert_eq!((code, &report["outcome"]), (0, &"patched".into()), "{report}");
        report
    };
    let one = dir.join("one.gguf");
    let (a, b) = (job(&whole, &one), job(&shards[0], &dir.join("many.gguf")));
    let out: Vec<PathBuf> = (1..=3).map(|i| shard(dir, "many", i, 3)).collect();
    assert_eq!(b["out"], text(&out[0]));
    assert_eq!(a["chosen"], b["chosen"]);
    assert_eq!(a["test"], b["test"], "measured on what was written");
    for end in ["many.report.html", "many.report.json"] {
        assert!(dir.join(end).exists(), "{end}");
    }
    let hash = |p: &Path| sha256_checkpoint(&Checkpoint::open(p).unwrap(), &Silent).unwrap();
    assert_eq!(b["sha256"], json!({ "before": hash(&shards[0]), "after": hash(&out[0]) }));
    (one, shards, out)
}

#[test]
fn the_main_job_writes_the_same_weights_in_shards_and_llama_cpp_loads_them() {
    let dir = tempfile::tempdir().unwrap();
    let few = share_of_prompts(dir.path(), 24);
    let (one, shards, out) = both_written(dir.path(), &few);
    let (a, b) = (Gguf::open(&one).unwrap(), Gguf::open(&out[0]).unwrap());
    assert_eq!(a.tensors().len(), b.tensors().len());
    for (x, y) in a.tensors().iter().zip(b.tensors()) {
        assert_eq!((&x.name, &x.dims, x.type_id), (&y.name, &y.dims, y.type_id));
        assert!(a.bytes(x) == b.bytes(y), "{}", x.name);
    }
    let source = Gguf::open(&shards[0]).unwrap();
    let edits = Provenance::read(&b).unwrap().unwrap().edits;
    let changed: Vec<usize> =
        edits.iter().map(|e| source.tensor(&e.tensor).unwrap().file).collect();
    for (i, (old, new)) in shards.iter().zip(&out).enumerate() {
        let same = std::fs::read(old).unwrap() == std::fs::read(new).unwrap();
        assert_eq!(same, i > 0 && !changed.contains(&i), "shard {i}");
    }

    let (_, diff) = run(&["diff", text(&shards[2]), text(&out[1])]);
    assert_eq!(diff["changed"].as_array().unwrap().len(), edits.len());
    let (code, again) =
        run(&[&[text(&shards[0]), text(&out[0])][..], &quick("1.0"), &words(&few)].concat());
    assert_eq!(code, 1, "{again}");
    assert!(again["error"].as_str().unwrap().contains("exists already"), "{again}");
    llama_cpp_agrees(dir.path(), &one, &out[0], &few);
}

#[test]
fn the_edit_beside_shards_is_one_file_that_belongs_to_them() {
    let dir = tempfile::tempdir().unwrap();
    let few = share_of_prompts(dir.path(), 24);
    let shards = in_shards(&first().file("broken-Q4_K_M"), dir.path());
    for (kind, strength) in [("lora", "1.0"), ("control-vector", "0.05")] {
        let out = dir.path().join(format!("{kind}.gguf"));
        let emit = [text(&shards[1]), text(&out), "--emit", kind];
        let (code, report) = run(&[&emit[..], &quick(strength), &words(&few)].concat());
        assert_eq!((code, &report["outcome"]), (0, &"patched".into()), "{report}");
        let load = report["load"].as_str().unwrap();
        assert!(load.contains(text(&shards[0])) && load.contains(text(&out)), "{load}");
        let beside = ["eval", text(&shards[2]), "--sidecar", text(&out)];
        let (code, eval) = run(&[&beside[..], &words(&few)].concat());
        assert_eq!(code, 0);
        let rate = &eval["summary"]["harmful"]["refused"];
        assert_eq!(*rate, report["test"]["after"]["harmful"]["refused"]);
    }
}

/// Whether llama.cpp, where it is at hand, gives the same tokens from the whole file as from the
/// shards.
fn llama_cpp_agrees(dir: &Path, whole: &Path, first_shard: &Path, few: &[String]) {
    if client().is_none() {
        return;
    }
    let (_, eval) = run(&[&["eval", text(first_shard)][..], &words(few)].concat());
    let prompts: Vec<&Value> =
        eval["prompts"].as_array().unwrap().iter().map(|p| &p["tokens"]).collect();
    assert!(prompts.len() > 40);
    let answers = |model: &Path| {
        let request = json!({ "model": model, "forced": [], "prompts": prompts,
            "max_new_tokens": 24, "end": [], "watch": false });
        ask(request, dir).unwrap()["answers"].clone()
    };
    let (a, b) = (answers(whole), answers(first_shard));
    assert_eq!(a.as_array().unwrap().len(), prompts.len());
    assert_eq!(a, b);
}
