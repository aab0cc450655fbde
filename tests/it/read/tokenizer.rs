//! The tokenizer gives llama.cpp's ids. tests/data/tokenizer holds the vocabularies, and
//! llama.cpp's ids of each text with each pre-tokenizer (make.py there writes them).
#![allow(clippy::single_range_in_vec_init)] // One message's text is a list of one range.

use std::collections::BTreeMap;

use crate::common::gguf::{entry, f32_array, file, strings, text, u32_entry};
use refusal_patch::checkpoint::Gguf;
use refusal_patch::text::Tokenizer;
use serde::Deserialize;
use tempfile::TempDir;

#[derive(Deserialize)]
struct Vocab {
    tokens: Vec<String>,
    types: Vec<i32>,
    merges: Vec<String>,
    #[serde(default)]
    scores: Vec<f32>,
}

#[derive(Deserialize)]
struct Golden {
    names: Vec<String>,
    facts: BTreeMap<String, Facts>,
    rows: Vec<Row>,
}

#[derive(Deserialize)]
struct Facts {
    add_bos: bool,
    ends: Vec<u32>,
}

/// llama.cpp's ids of a text: for each tokenizer's name an index into the distinct results.
#[derive(Deserialize)]
struct Row {
    text: String,
    special: bool,
    ids: Vec<Vec<u32>>,
    which: Vec<usize>,
}

fn data<T: for<'d> Deserialize<'d>>(name: &str) -> T {
    let path = format!("{}/tests/data/tokenizer/{name}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn i32_array(key: &str, values: &[i32]) -> Vec<u8> {
    let head = [&5u32.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
    let values: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    entry(key, 9, &[head, values].concat())
}

fn flag(key: &str, value: bool) -> Vec<u8> {
    entry(key, 7, &[value as u8])
}

fn token_list(tokens: &[impl AsRef<[u8]>]) -> Vec<u8> {
    strings("tokenizer.ggml.tokens", &tokens.iter().map(AsRef::as_ref).collect::<Vec<_>>())
}

fn merge_list(merges: &[impl AsRef<[u8]>]) -> Vec<u8> {
    strings("tokenizer.ggml.merges", &merges.iter().map(AsRef::as_ref).collect::<Vec<_>>())
}

fn types(types: &[i32]) -> Vec<u8> {
    i32_array("tokenizer.ggml.token_type", types)
}

/// The tokenizer of a file with these entries.
fn open(entries: &[Vec<u8>]) -> Result<Tokenizer, String> {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("model.gguf");
    let head = [text("general.architecture", "llama")];
    std::fs::write(&path, file(3, 32, &[&head[..], entries].concat(), &[])).unwrap();
    Tokenizer::from_gguf(&Gguf::open(&path).unwrap()).map_err(|e| e.to_string())
}

/// Whether a vocabulary is spelled as SentencePiece does.
fn is_raw(name: &str) -> bool {
    ["gemma4", "sarvam-moe", "spm", "spm-no-prefix"].contains(&name)
}

fn build(name: &str) -> Tokenizer {
    let spm = name.starts_with("spm");
    let vocab: Vocab = data(if is_raw(name) { "spm.json" } else { "bpe.json" });
    let mut entries = vec![token_list(&vocab.tokens), types(&vocab.types)];
    if spm {
        entries.push(text("tokenizer.ggml.model", "llama"));
        entries.push(f32_array("tokenizer.ggml.scores", &vocab.scores));
        if name == "spm-no-prefix" {
            entries.push(flag("tokenizer.ggml.add_space_prefix", false));
        }
    } else {
        entries
            .push(text("tokenizer.ggml.model", if name == "gemma4" { "gemma4" } else { "gpt2" }));
        entries.push(text("tokenizer.ggml.pre", name));
        let eos = vocab.tokens.iter().position(|t| t == "<|endoftext|>").unwrap() as u32;
        entries.push(u32_entry("tokenizer.ggml.eos_token_id", eos));
        entries.push(merge_list(&vocab.merges));
    }
    open(&entries).unwrap()
}

/// A tokenizer with a few bytes as tokens, then `more`.
fn small(pre: &str, more: &[&str], kinds: &[i32], merges: &[&str]) -> Tokenizer {
    let mut tokens: Vec<String> = (b'!'..=b'~').map(|b| char::from(b).to_string()).collect();
    tokens.extend(["\u{120}".to_string(), "\u{10a}".to_string()]);
    let mut all = vec![1; tokens.len()];
    tokens.extend(more.iter().map(|t| t.to_string()));
    all.extend(kinds);
    open(&[
        text("tokenizer.ggml.model", "gpt2"),
        text("tokenizer.ggml.pre", pre),
        token_list(&tokens),
        types(&all),
        merge_list(merges),
    ])
    .unwrap()
}

const MORE: u32 = 94 + 2; // the first of `more` in `small`

#[test]
fn ids_are_those_of_llama_cpp_for_every_text_and_pre_tokenizer() {
    let golden: Golden = data("golden.json");
    assert!(golden.names.len() >= 70 && golden.rows.len() >= 150);
    let mut wrong = Vec::new();
    for (n, name) in golden.names.iter().enumerate() {
        let tokenizer = build(name);
        let vocab: Vocab = data(if is_raw(name) { "spm.json" } else { "bpe.json" });
        let control = |id: &u32| vocab.types[*id as usize] == 3;
        for row in &golden.rows {
            let expected = &row.ids[row.which[n]];
            let got = tokenizer.encode(&row.text, row.special);
            // In llama.cpp a whole word, or merges, can become a control token. Not here: the text
            // is the user's.
            if !row.special && expected.iter().any(control) {
                assert!(!got.iter().any(control), "{name} {:?}", row.text);
                continue;
            }
            if got != *expected {
                wrong.push(format!(
                    "{name} {:?} {}\n  {got:?}\n  {expected:?}",
                    row.text, row.special
                ));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{} differ:\n{}",
        wrong.len(),
        wrong[..wrong.len().min(20)].join("\n")
    );
}

#[test]
fn glm_5_cuts_words_like_llama_3() {
    let golden: Golden = data("golden.json");
    let [glm, llama] = ["glm5", "llama-bpe"].map(build);
    for row in &golden.rows {
        assert_eq!(
            glm.encode(&row.text, row.special),
            llama.encode(&row.text, row.special),
            "{:?}",
            row.text
        );
    }
}

#[test]
fn beginning_and_end_tokens_are_those_of_llama_cpp() {
    let golden: Golden = data("golden.json");
    for (name, facts) in &golden.facts {
        let tokenizer = build(name);
        assert_eq!(tokenizer.add_bos(), facts.add_bos, "{name}");
        let ends: Vec<u32> = (0..3000).filter(|&i| tokenizer.is_end(i)).collect();
        assert_eq!(ends, facts.ends, "{name}");
    }
}

#[test]
fn decoding_gives_the_text_back() {
    let golden: Golden = data("golden.json");
    for name in &golden.names {
        let tokenizer = build(name);
        for row in golden.rows.iter().filter(|r| !r.special && !r.text.contains('\u{2581}')) {
            assert_eq!(tokenizer.decode(&tokenizer.encode(&row.text, false)), row.text, "{name}");
        }
    }
}

#[test]
fn control_tokens_are_never_parsed_in_user_text() {
    let golden: Golden = data("golden.json");
    for name in &golden.names {
        let tokenizer = build(name);
        let vocab: Vocab = data(if is_raw(name) { "spm.json" } else { "bpe.json" });
        // llama.cpp takes this one for a control token by its name alone.
        let end = vocab.tokens.iter().position(|t| t == "<|im_end|>").unwrap() as u32;
        let control = |id: &u32| vocab.types[*id as usize] == 3 || *id == end;
        for token in vocab.tokens.iter().zip(0..).filter(|(_, i)| control(i)).map(|(t, _)| t) {
            for text in [
                token.to_string(),
                format!("a{token}b"),
                format!("{token}{token}"),
                format!(" {token}\n"),
            ] {
                assert!(!tokenizer.encode(&text, false).iter().any(control), "{name} {text:?}");
                let template = format!("<|im_start|>{text}<|im_end|>");
                let start = "<|im_start|>".len();
                let ids = tokenizer.encode_template(&template, &[start..start + text.len()]);
                let special = ids.iter().filter(|id| control(id)).count();
                assert_eq!(special, 2, "{name} {text:?}: {ids:?}");
                assert!(tokenizer.encode(&text, true).iter().any(control), "{name} {text:?}");
            }
        }
    }
}

#[test]
fn a_control_token_that_reaches_into_user_text_is_not_one() {
    let t = small("qwen2", &["<user>", "<user>x"], &[3, 3], &[]);
    assert_eq!(t.encode("<user>x", true), [MORE + 1]);
    assert_eq!(
        t.encode_template("<user>x", &[6..7]),
        [[MORE].to_vec(), t.encode("x", false)].concat()
    );
    assert_eq!(t.encode_template("<user>x", &[6..6, 7..7]), [MORE + 1]);
    assert_eq!(t.encode_template("<user>x", &[3..4]), t.encode("<user>x", false));
}

#[test]
fn user_defined_tokens_are_found_in_any_text() {
    let t = small("llama-bpe", &["<think>", "  ", "</s>"], &[4, 4, 1], &[]);
    assert_eq!(t.encode("a<think>  b", false), [64, MORE, MORE + 1, 65]);
    assert_eq!(t.encode_template("a<think>b", &[0..9]), [64, MORE, 65]);
    assert_eq!(t.decode(&[64, MORE, MORE + 1, 65]), "a<think>  b");
}

#[test]
fn tokens_that_llama_cpp_knows_by_name_end_an_answer_whatever_their_type() {
    let t = small("qwen2", &["<|im_end|>", "<|end|>", "<|file_sep|>"], &[1, 4, 3], &[]);
    assert!((MORE..MORE + 3).all(|id| t.is_end(id)) && !t.is_end(0));
    assert_eq!(t.encode("<|im_end|>", true), [MORE]);
    // Beside the next two tokens <|end|> ends a message, not the answer.
    let t = small("gpt-4o", &["<|end|>", "<|return|>", "<|call|>", "<|channel|>"], &[3; 4], &[]);
    assert!(!t.is_end(MORE) && t.is_end(MORE + 1) && t.is_end(MORE + 2));
    assert_eq!(t.decode(&[MORE, 64, MORE + 1, MORE + 3]), "<|end|>a<|channel|>");
    assert_eq!(t.encode("<|channel|>", true), [MORE + 3]);
    assert!(!t.encode("<|channel|>", false).contains(&(MORE + 3)));
}

#[test]
fn an_unknown_tokenizer_is_an_error_that_says_what_to_do() {
    let gpt2 = |pre: &[Vec<u8>]| {
        let entries =
            [text("tokenizer.ggml.model", "gpt2"), token_list(&["a"]), merge_list(&["a a"])];
        open(&[&entries[..], pre].concat()).err().unwrap()
    };
    for (error, found) in [
        (gpt2(&[text("tokenizer.ggml.pre", "qwen99")]), "\"qwen99\""),
        (gpt2(&[]), "tokenizer.ggml.pre is missing"),
        (gpt2(&[text("tokenizer.ggml.pre", "")]), "\"\""),
        (open(&[text("tokenizer.ggml.model", "t5")]).err().unwrap(), "\"t5\""),
        (open(&[]).err().unwrap(), "tokenizer.ggml.model is missing"),
        (
            open(&[text("tokenizer.ggml.model", "llama")]).err().unwrap(),
            "tokenizer.ggml.tokens is missing",
        ),
    ] {
        for part in [found, "model.gguf: ", "`tokenizer` tokenizer.json"] {
            assert!(error.contains(part), "{error}");
        }
    }
    assert!(gpt2(&[text("tokenizer.ggml.pre", "x")]).contains("llama-bpe, "));
    assert!(open(&[text("tokenizer.ggml.model", "bert")])
        .err()
        .unwrap()
        .contains("gpt2, gemma4, llama"));
}

#[test]
fn lists_that_are_too_short_are_errors() {
    let spm = |more: Vec<u8>| {
        open(&[text("tokenizer.ggml.model", "llama"), token_list(&["<unk>", "a", "b"]), more])
    };
    assert!(spm(types(&[2, 1])).err().unwrap().contains("3 integers"));
    assert!(spm(f32_array("tokenizer.ggml.scores", &[0.0])).err().unwrap().contains("3 numbers"));
    assert!(spm(text("tokenizer.ggml.scores", "no")).is_err());
    assert!(spm(i32_array("tokenizer.ggml.scores", &[0, -1, -2])).is_ok());
}

#[test]
fn odd_vocabularies_work_as_far_as_they_go() {
    // Empty tokens, tokens that aren't UTF-8, two alike, ids out of range, no types.
    let bytes: &[&[u8]] = &[b"a", b"b", b"", b"\xff\xfe", b"ab", b"ab", b"c"];
    let t = open(&[
        text("tokenizer.ggml.model", "gpt2"),
        text("tokenizer.ggml.pre", "qwen2"),
        token_list(bytes),
        // Merges whose result or whose parts are no tokens.
        merge_list(&[&b"c c"[..], b"x y", b"a b", b"ab c", b"\xff \xfe", b"", b" ", b"abc"]),
        u32_entry("tokenizer.ggml.bos_token_id", 7),
        u32_entry("tokenizer.ggml.eos_token_id", 4_000_000_000),
    ])
    .unwrap();
    assert_eq!(t.encode("ab", false), [5]);
    assert_eq!(t.encode("abc cc?", true), [0, 1, 6, 6, 6]);
    assert_eq!((t.bos(), t.eos(), t.add_bos()), (None, None, false));
    assert_eq!(t.decode(&[0, 99, u32::MAX, 3, 1]), "a\u{fffd}\u{fffd}b");
    assert_eq!((t.token_text(2).as_str(), t.token_text(99).as_str()), ("[EMPTY_2]", ""));
    assert!(!t.is_end(99));
    // Without scores all pairs are alike: merge from the left. Without byte tokens: the unknown
    // token.
    let t = open(&[
        text("tokenizer.ggml.model", "llama"),
        token_list(&["<unk>", "a", "aa", "\u{2581}"]),
    ])
    .unwrap();
    assert_eq!(t.encode("aaa\u{e9}", false), [3, 2, 1, 0, 0]);
    assert_eq!((t.bos(), t.eos(), t.add_bos()), (Some(1), Some(2), true));
    // An empty vocabulary.
    let t = open(&[text("tokenizer.ggml.model", "llama"), token_list(&[""; 0])]).unwrap();
    assert!(t.encode("abc", true).is_empty() && t.bos().is_none() && t.decode(&[0]).is_empty());
}

#[test]
fn the_files_setting_of_bos_counts_except_for_gemma_4() {
    for (model, pre, expected) in
        [("gpt2", "llama-bpe", false), ("llama", "", false), ("gemma4", "", true)]
    {
        let t = open(&[
            text("tokenizer.ggml.model", model),
            text("tokenizer.ggml.pre", pre),
            token_list(&["a", "b"]),
            merge_list(&["a b"]),
            flag("tokenizer.ggml.add_bos_token", false),
        ]);
        assert_eq!(t.unwrap().add_bos(), expected, "{model}");
    }
}

#[test]
fn phi_3_tokens_take_the_blanks_after_them_along() {
    let vocab = ["<unk>", "<s>", "</s>", "<|user|>", "\u{2581}", "h", "\u{2581}h", "<0x0A>"];
    let phi = |name: &str| {
        open(&[
            text("general.name", name),
            text("tokenizer.ggml.model", "llama"),
            token_list(&vocab),
            types(&[2, 3, 3, 3, 1, 1, 1, 6]),
            f32_array("tokenizer.ggml.scores", &[0.0; 8]),
        ])
        .unwrap()
    };
    assert_eq!(phi("Phi 3").encode("<|user|>\n h", true), [3, 4, 7, 6]);
    assert_eq!(phi("Phi-3 mini").encode("<|user|>\n h", true), [3, 6]);
    assert_eq!(phi("Phi-3 mini").encode("<s>\nh", true), [1, 4, 7, 5]);
}

/// The tokenizer of a tokenizer.json, for a file that names token 0 as the beginning.
fn from_json(json: serde_json::Value) -> Tokenizer {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("tokenizer.json");
    std::fs::write(&path, json.to_string()).unwrap();
    let model = folder.path().join("model.gguf");
    let entries =
        [text("tokenizer.ggml.model", "llama"), u32_entry("tokenizer.ggml.bos_token_id", 0)];
    std::fs::write(&model, file(3, 32, &entries, &[])).unwrap();
    Tokenizer::from_json(&path, &Gguf::open(&model).unwrap()).unwrap()
}

#[test]
fn tokenizer_json_follows_the_same_rules() {
    let t = from_json(serde_json::json!({
        "version": "1.0",
        "added_tokens": [
            {"id": 2, "content": "<|im_end|>", "special": true, "single_word": false,
             "lstrip": false, "rstrip": false, "normalized": false},
            {"id": 3, "content": "<think>", "special": false, "single_word": false,
             "lstrip": false, "rstrip": false, "normalized": false},
        ],
        "model": {"type": "BPE", "vocab": {"a": 0, "<": 1}, "merges": []},
    }));
    assert_eq!(t.encode("a<|im_end|>a<think>", true), [0, 2, 0, 3]);
    assert_eq!(t.encode("a<|im_end|>", false), [0, 1]);
    assert_eq!(t.encode_template("a<|im_end|>a<|im_end|>", &[0..11]), [0, 1, 0, 2]);
    assert_eq!(t.decode(&[0, 2, 3, 99]), "a <think>");
    assert!(t.is_end(2) && !t.is_end(3) && t.add_bos() && t.bos() == Some(0));
    assert_eq!((t.token_text(3).as_str(), t.token_text(99).as_str()), ("<think>", ""));
}

#[test]
fn a_tokenizer_json_puts_its_blank_only_in_front_of_the_whole_text() {
    for (scheme, after) in [("first", 0), ("always", 1), ("never", 0)] {
        for nested in [false, true] {
            let metaspace = serde_json::json!(
                {"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": scheme,
                 "split": false}
            );
            let pre = serde_json::json!({"type": "Sequence", "pretokenizers": [metaspace.clone()]});
            let t = from_json(serde_json::json!({
                "version": "1.0",
                "added_tokens": [
                    {"id": 3, "content": "</s>", "special": true, "single_word": false,
                     "lstrip": false, "rstrip": false, "normalized": false},
                ],
                "pre_tokenizer": if nested { pre } else { metaspace },
                "model": {"type": "BPE", "vocab": {"a": 0, "\u{2581}a": 1, "\u{2581}": 2},
                          "merges": ["\u{2581} a"]},
            }));
            let first = if scheme == "never" { 0 } else { 1 };
            assert_eq!(t.encode("a</s>a", true), [first, 3, after], "{scheme} {nested}");
            assert_eq!(t.encode("</s>a", true), [3, after], "{scheme} {nested}");
        }
    }
}

#[test]
fn long_texts_take_no_time() {
    let t = build("qwen2");
    let spm = build("spm");
    let text = "<|im_start|>".repeat(20_000)
        + &"a".repeat(20_000)
        + &" \n".repeat(20_000)
        + &"12".repeat(20_000);
    for t in [t, spm] {
        assert_eq!(
            t.encode(&text, true).iter().filter(|&&i| t.token_text(i) == "<|im_start|>").count(),
            20_000
        );
        assert_eq!(t.decode(&t.encode(&text, false)), text);
    }
}
