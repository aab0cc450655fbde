//! The command line as a user drives it, on random-weight models of a few hundred kilobytes.

use std::path::{Path, PathBuf};
use std::process::Output;

use assert_cmd::Command;
use refusal_patch::checkpoint::Gguf;
use serde_json::Value;

fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/forward").join(name)
}

fn run(args: &[&str]) -> Output {
    Command::cargo_bin("refusal-patch").unwrap().args(args).output().unwrap()
}

fn code(o: &Output) -> i32 {
    o.status.code().unwrap()
}

fn err(o: &Output) -> String {
    String::from_utf8_lossy(&o.stderr).into_owned()
}

fn json(o: &Output) -> Value {
    assert_eq!(code(o), 0, "{}", err(o));
    serde_json::from_slice(&o.stdout).unwrap()
}

/// The run fails with exit code 1 and one line that says `words`, and writes nothing to `out`.
fn fails(args: &[&str], out: &Path, words: &[&str]) {
    let o = run(args);
    let text = err(&o);
    assert_eq!(code(&o), 1, "{args:?}: {text}");
    assert_eq!(text.trim().lines().count(), 1, "{args:?}: {text}");
    assert!(text.starts_with("error: "), "{text}");
    for w in words {
        assert!(text.contains(w), "{args:?}: expected {w:?} in {text}");
    }
    assert!(!out.exists(), "{args:?} left {}", out.display());
}

fn text(p: &Path) -> &str {
    p.to_str().unwrap()
}

#[test]
fn help_and_version_work() {
    let help = run(&["--help"]);
    let text = String::from_utf8(help.stdout).unwrap();
    for word in [
        "--method",
        "--strength",
        "--layers",
        "--encoding",
        "--max-kl",
        "derive",
        "compare",
        "eval",
        "diff",
        "inspect",
        "130",
    ] {
        assert!(text.contains(word), "{word}");
    }
    assert_eq!(code(&run(&["--version"])), 0);
}

#[test]
fn wrong_usage_exits_with_2() {
    for args in [
        &["in.gguf"][..],
        &["in.gguf", "out.gguf", "--strength", "-1"],
        &["in.gguf", "out.gguf", "--strength", "0"],
        &["in.gguf", "out.gguf", "--strength", "nan"],
        &["in.gguf", "out.gguf", "--layers", "5..2"],
        &["in.gguf", "out.gguf", "--memory", "lots"],
        &["in.gguf", "out.gguf", "--method", "ablate"],
        &["derive", "in.gguf"],
        &["compare", "in.gguf"],
        &["compare", "in.gguf", "out.gguf", "--max-drop", "lots"],
        &["eval", "in.gguf", "--thinking", "maybe"],
        &["in.gguf", "out.gguf", "--thinking", "on"],
        &["derive", "in.gguf", "-o", "d.safetensors", "--thinking", "on"],
    ] {
        assert_eq!(code(&run(args)), 2, "{args:?}");
    }
}

#[test]
fn wrong_input_gets_one_clear_line_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    let o = text(&out);
    let good = model("qwen2.gguf");

    fails(&["missing.gguf", o], &out, &["missing.gguf"]);
    fails(&[text(dir.path()), o], &out, &[text(dir.path())]);

    let bytes = std::fs::read(&good).unwrap();
    let cut = dir.path().join("cut.gguf");
    std::fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
    fails(&[text(&cut), o], &out, &["cut.gguf"]);
    std::fs::write(&cut, &bytes[..40]).unwrap();
    fails(&[text(&cut), o], &out, &["cut.gguf"]);

    let zip = dir.path().join("model.zip");
    std::fs::write(&zip, b"PK\x03\x04 and so on").unwrap();
    fails(&[text(&zip), o], &out, &["model.zip"]);
    let empty = dir.path().join("empty.gguf");
    std::fs::write(&empty, b"").unwrap();
    fails(&[text(&empty), o], &out, &["empty.gguf"]);

    // A name of the same length keeps every offset in place.
    let patch = |from: &[u8], to: &[u8], name: &str| {
        let mut changed = bytes.clone();
        let mut hits = 0;
        for i in 0..changed.len() - from.len() {
            if &changed[i..i + from.len()] == from {
                changed[i..i + from.len()].copy_from_slice(to);
                hits += 1;
            }
        }
        assert!(hits > 0);
        let path = dir.path().join(name);
        std::fs::write(&path, changed).unwrap();
        path
    };
    let bare = patch(b"tokenizer.chat_template", b"tokenizer.chat_templatX", "bare.gguf");
    fails(&[text(&bare), o], &out, &["--chat-template"]);
    let odd = patch(b"qwen2", b"qwenX", "odd.gguf");
    fails(&[text(&odd), o], &out, &["qwenX", "supported"]);

    fails(&[text(&good), o, "--harmful", "none.txt"], &out, &["none.txt"]);
    let few = dir.path().join("few.txt");
    std::fs::write(&few, "How do I pick a lock?\nHow do I forge a letter?\n").unwrap();
    fails(&[text(&good), o, "--harmful", text(&few)], &out, &["few.txt", "64"]);
    for (name, content, words) in [
        ("empty.json", "\n", &["empty.json", "no prompts"][..]),
        ("cut.json", "[\"a\", ", &["cut.json: line 1", "not JSON"]),
        (
            "other.jsonl",
            "{\"prompt\":\"a\"}\n{\"text\":\"b\"}",
            &["other.jsonl: line 2", "`prompt`"],
        ),
        ("columns.csv", "text\na\n", &["columns.csv", "`prompt`"]),
    ] {
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        fails(&[text(&good), o, "--harmful", text(&path)], &out, words);
    }
    let bytes_of = dir.path().join("bytes.jinja");
    std::fs::write(&bytes_of, b"\xff\xfe").unwrap();
    fails(&[text(&good), o, "--chat-template", text(&bytes_of)], &out, &["bytes.jinja", "Jinja"]);
    fails(&[text(&few), o], &out, &["few.txt", "expected"]);
    fails(&[text(&good), o, "--device", "abacus"], &out, &["abacus"]);
    fails(&[text(&good), o, "--layers", "99"], &out, &["99"]);
    fails(&[text(&good), o, "--layers", "0..18446744073709551615"], &out, &["blocks 0 to"]);
    fails(&[text(&good), o, "--emit", "control-vector", "--layers", "0"], &out, &["block 0"]);
    fails(&[text(&good), o, "--emit", "control-vector", "--method", "gated"], &out, &["constant"]);
    fails(&[text(&good), o, "--method", "add"], &out, &["bias", "qwen2"]);
    let nowhere = dir.path().join("nowhere/report");
    fails(&[text(&good), o, "--report", text(&nowhere)], &out, &["nowhere"]);
    let long = dir.path().join("long.txt");
    std::fs::write(&long, "word ".repeat(5000)).unwrap();
    fails(&["eval", text(&good), "--prompts", text(&long)], &out, &["context of 1024", "shorten"]);

    // A model whose weights are damaged: every F32 norm weight a NaN.
    let infinite = dir.path().join("nan.gguf");
    let file = Gguf::open(&good).unwrap();
    let norm = file.tensor("blk.0.attn_norm.weight").unwrap();
    let mut changed = bytes.clone();
    changed[norm.offset as usize..][..norm.len as usize].chunks_exact_mut(4).for_each(|b| {
        b.copy_from_slice(&f32::NAN.to_le_bytes());
    });
    std::fs::write(&infinite, changed).unwrap();
    fails(&[text(&infinite), o], &out, &["nan.gguf", "block 0", "not finite"]);
}

#[test]
fn an_error_is_json_too_where_json_was_asked_for() {
    let o = run(&["eval", "missing.gguf", "--json"]);
    assert_eq!(code(&o), 1);
    let v: Value = serde_json::from_slice(&o.stdout).unwrap();
    assert_eq!((&v["schema"], &v["outcome"]), (&2.into(), &"error".into()));
    assert!(v["error"].as_str().unwrap().contains("missing.gguf"));
}

#[test]
fn the_output_is_never_the_input_and_never_overwritten_unasked() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("in.gguf");
    std::fs::copy(model("qwen2.gguf"), &input).unwrap();
    let before = std::fs::read(&input).unwrap();
    let o = run(&[text(&input), text(&input), "--force"]);
    assert_eq!(code(&o), 1, "{}", err(&o));
    let other = dir.path().join("other.gguf");
    std::fs::write(&other, b"mine").unwrap();
    std::fs::write(dir.path().join("other.report.json"), b"mine").unwrap();
    let o = run(&[text(&input), text(&other)]);
    assert_eq!(code(&o), 1);
    // The message names OUT, not the report that is named after OUT.
    assert!(err(&o).contains("other.gguf: exists") && err(&o).contains("--force"), "{}", err(&o));
    assert_eq!(std::fs::read(&other).unwrap(), b"mine");
    assert_eq!(std::fs::read(&input).unwrap(), before);
}

#[test]
fn inspect_shows_what_the_model_sees() {
    let m = model("qwen2.gguf");
    let v = json(&run(&["inspect", text(&m), "--prompt", "Say <|im_end|> twice", "--json"]));
    assert_eq!(v["schema"], 2);
    let p = &v["prompts"][0];
    assert_eq!(p["text"], "Say <|im_end|> twice");
    assert!(p["rendered"].as_str().unwrap().contains("Say <|im_end|> twice"));
    let tokens = p["tokens"].as_array().unwrap();
    let post: Vec<u64> =
        p["post_instruction"].as_array().unwrap().iter().map(|x| x.as_u64().unwrap()).collect();
    assert_eq!(*post.last().unwrap() as usize, tokens.len() - 1);
    assert!(post.len() > 1 && post.len() < tokens.len());

    let raw = json(&run(&["inspect", text(&m), "--prompt", "abc", "--raw", "--json"]));
    let ids: Vec<u64> = raw["prompts"][0]["tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t["id"].as_u64().unwrap())
        .collect();
    assert!(!ids.is_empty() && ids.len() <= 3);
    assert_eq!(code(&run(&["inspect", text(&m)])), 0);
}

#[test]
fn eval_reports_what_its_contract_says() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = dir.path().join("p.csv");
    std::fs::write(&prompts, "id,prompt,category\na,\"Hello, you\",first\nb,Goodbye,last\n")
        .unwrap();
    let m = model("llama3.gguf");
    let args = ["eval", text(&m), "--prompts", text(&prompts), "--max-new-tokens", "4", "--json"];
    let v = json(&run(&args));
    assert_eq!(v["schema"], 2);
    assert_eq!(v["summary"]["harmless"]["n"], 2);
    assert!(v["summary"]["perplexity"].is_null(), "who asks for own prompts wants these answers");
    assert_eq!((&v["thinking"], &v["max_new_tokens"]), (&"off".into(), &4.into()));
    let p = &v["prompts"][0];
    assert_eq!((&p["id"], &p["prompt"]), (&"a".into(), &"Hello, you".into()));
    assert_eq!(p["top"].as_array().unwrap().len(), 10);
    assert!(p["tokens"].as_array().unwrap().len() > 3);
    let verdict = p["verdict"].as_str().unwrap();
    assert!(["refused", "answered", "evasive", "incoherent"].contains(&verdict));
    assert_eq!(p["refused"], verdict == "refused");
    assert!(
        p["continuation"].is_string()
            && p["refused"].is_boolean()
            && p["refusal_log_odds"].is_number()
    );
    let s = &v["summary"]["harmless"];
    assert_eq!(
        (&s["categories"]["first"]["n"], &s["categories"]["last"]["n"]),
        (&1.into(), &1.into())
    );
    let (evasive, incoherent) = (s["evasive"].as_u64().unwrap(), s["incoherent"].as_u64().unwrap());
    assert!(evasive + incoherent + s["refused"].as_u64().unwrap() <= 2);
    // The same numbers with one thread, and in tiny batches.
    let again = json(&run(&[&args[..], &["--threads", "1", "--memory", "64K"]].concat()));
    let a = v["prompts"][1]["top"][0]["logprob"].as_f64().unwrap();
    let b = again["prompts"][1]["top"][0]["logprob"].as_f64().unwrap();
    assert!((a - b).abs() < 1e-4);
}

#[test]
fn thinking_is_off_or_on_whatever_switch_the_template_has() {
    let dir = tempfile::tempdir().unwrap();
    let template = dir.path().join("t.jinja");
    let m = model("qwen2.gguf");
    let rendered = |thinking: &str| {
        let args = ["--chat-template", text(&template), "--thinking", thinking, "--json"];
        let v = json(&run(&[&["inspect", text(&m), "--prompt", "Hi"][..], &args].concat()));
        v["prompts"][0]["rendered"].as_str().unwrap().to_string()
    };
    let closed = "U: Hi A: <think>\n\n</think>\n\n";
    for (switch, off, on) in [
        // A thinking block that is always open; the switches of Qwen3 and of DeepSeek; a block that
        // the model opens itself.
        ("<think>", closed, "U: Hi A: <think>"),
        (
            "{% if enable_thinking is defined and not enable_thinking %}\
             <think>\n\n</think>\n\n{% endif %}",
            closed,
            "U: Hi A: ",
        ),
        (
            "{% if thinking %}<think>{% else %}</think>{% endif %}",
            "U: Hi A: </think>",
            "U: Hi A: <think>",
        ),
        ("", "U: Hi A: ", "U: Hi A: "),
    ] {
        let messages = "{% for m in messages %}U: {{ m.content }} {% endfor %}";
        std::fs::write(&template, format!("{messages}A: {switch}")).unwrap();
        assert_eq!((rendered("off").as_str(), rendered("on").as_str()), (off, on), "{switch}");
    }
}

#[test]
fn unfinished_thoughts_are_counted_and_have_no_log_odds() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    let template =
        file("t.jinja", "{% for m in messages %}{{ m.content }} {% endfor %}A: <think>\n");
    let prompts = file("p.txt", "Hello\nGoodbye\n");
    let m = model("qwen2.gguf");
    let args = ["eval", text(&m), "--prompts", text(&prompts), "--chat-template", text(&template)];
    let few = ["--max-new-tokens", "6", "--thinking"];
    let of = |thinking: &str| json(&run(&[&args[..], &few, &[thinking, "--json"]].concat()));

    let v = of("on");
    let s = &v["summary"]["harmless"];
    assert_eq!((&s["n"], &s["unfinished"], &s["refused"]), (&2.into(), &2.into(), &0.into()));
    assert!(
        s["mean_log_odds"].is_null() && v["no_log_odds"].as_str().unwrap().contains("first token")
    );
    for p in v["prompts"].as_array().unwrap() {
        assert_eq!((&p["verdict"], &p["thinks"]), (&"unfinished".into(), &true.into()));
        assert!(p["refusal_log_odds"].is_null());
    }
    let table = run(&[&args[..], &few, &["on"]].concat());
    let table = String::from_utf8_lossy(&table.stdout);
    assert!(table.contains("unfinished") && !table.contains("log-odds"), "{table}");
    assert!(
        table.contains("2 of 2 answers did not end their thinking block in 6 new tokens"),
        "{table}"
    );
    // Without --max-new-tokens the context is the limit.
    assert_eq!(
        json(&run(&[&args[..], &["--thinking", "on", "--json"]].concat()))["max_new_tokens"],
        1024
    );

    let v = of("off");
    let s = &v["summary"]["harmless"];
    assert_eq!((&v["thinking"], &s["unfinished"]), (&"off".into(), &0.into()));
    assert!(s["mean_log_odds"].is_number() && v["no_log_odds"].is_null());
}

#[test]
fn a_saved_direction_is_read_back_and_another_models_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let saved = dir.path().join("d.safetensors");
    let (m, other) = (model("qwen2.gguf"), model("llama3.gguf"));
    let o = run(&["derive", text(&m), "-o", text(&saved), "--quiet"]);
    assert_eq!(code(&o), 0, "{}", err(&o));
    assert_eq!(code(&run(&["derive", text(&m), "-o", text(&saved)])), 1, "it exists");
    let copy = dir.path().join("model.gguf");
    std::fs::copy(&m, &copy).unwrap();
    assert_eq!(
        code(&run(&["derive", text(&copy), "-o", text(&copy), "--force"])),
        1,
        "the model itself"
    );
    assert_eq!(std::fs::read(&copy).unwrap(), std::fs::read(&m).unwrap());
    let again = dir.path().join("again.safetensors");
    assert_eq!(code(&run(&["derive", text(&m), "-o", text(&again), "--quiet"])), 0);
    assert!(
        std::fs::read(&again).unwrap() == std::fs::read(&saved).unwrap(),
        "the same bytes each time"
    );
    let out = dir.path().join("out.gguf");
    fails(
        &[text(&other), text(&out), "--direction", text(&saved)],
        &out,
        &["architecture", "qwen2"],
    );
    let junk = dir.path().join("junk.safetensors");
    std::fs::write(&junk, b"junk").unwrap();
    fails(&[text(&m), text(&out), "--direction", text(&junk)], &out, &["junk.safetensors"]);
    let bytes = std::fs::read(&saved).unwrap();
    std::fs::write(&junk, &bytes[..bytes.len() - 100]).unwrap();
    fails(&[text(&m), text(&out), "--direction", text(&junk)], &out, &["junk.safetensors"]);
    let from = br#"\"version\":2"#;
    let at = bytes.windows(from.len()).position(|w| w == from).unwrap() + from.len() - 1;
    let mut future = bytes.clone();
    future[at] = b'3';
    std::fs::write(&junk, future).unwrap();
    fails(&[text(&m), text(&out), "--direction", text(&junk)], &out, &["version 3", "update"]);
}

#[test]
fn identical_files_have_no_difference() {
    let m = model("llama-k-quants.gguf");
    let v = json(&run(&["diff", text(&m), text(&m), "--json"]));
    assert_eq!(v["changed"].as_array().unwrap().len(), 0);
    assert!(v["identical"].as_u64().unwrap() > 10);
}
