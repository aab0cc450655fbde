//! What is fuzzed: everything that reads bytes of strangers, as functions of bytes. libFuzzer
//! drives them (`fuzz_targets/`), and so does a plain loop of mutations (`tests/fuzz_smoke.rs`).
//!
//! A target takes any bytes. It fails by a panic, by running long, or by taking much memory; an
//! error of the library is a fine answer. Most targets write their bytes to a file first, since the
//! library maps files. Where a target reads several files, a zero byte stands between them.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use refusal_patch::arch::{Names, Spec, Writer};
use refusal_patch::checkpoint::{Checkpoint, Gguf, Value};
use refusal_patch::edit::RankOne;
use refusal_patch::encoding::{Encoding, Params};
use refusal_patch::model::Model;
use refusal_patch::output::{read_direction, stage, Kind, Plan, Provenance, Sidecar, TensorEdit};
use refusal_patch::progress::Silent;
use refusal_patch::text::{
    folder_template, read_prompts, Chat, ChatTemplate, Message, Set, Thinking, Tokenizer,
};
use refusal_patch::weights::Matrix;
use serde_json::json;

/// A target with its name and its seeds.
pub struct Target {
    pub name: &'static str,
    pub run: fn(&[u8]),
    pub seeds: fn() -> Vec<Vec<u8>>,
}

macro_rules! targets {
    ($($name:ident),* $(,)?) => {
        /// Every target.
        pub const TARGETS: &[Target] = &[
            $(Target { name: stringify!($name), run: $name::run, seeds: $name::seeds }),*
        ];
    };
}

targets!(
    gguf,
    vocabulary,
    safetensors,
    index,
    folder,
    config,
    tokenizer_json,
    template,
    encoding,
    prompts,
    direction,
    sidecar,
    adapter,
);

// ------------------------------------------------------------------------------- common

/// The repository.
pub fn root() -> PathBuf {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    if dir.ends_with("fuzz") {
        dir.join("..")
    } else {
        dir.to_path_buf()
    }
}

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(root().join(name)).expect("a fixture")
}

thread_local! {
    static DIR: tempfile::TempDir = tempfile::tempdir().expect("a folder for temporary files");
}

/// A folder of this thread.
fn dir(name: &str) -> PathBuf {
    let path = DIR.with(|dir| dir.path().join(name));
    std::fs::create_dir_all(&path).expect("a folder");
    path
}

/// A file with these bytes, and a hole behind them in place of tensors' data.
fn file(path: &Path, bytes: &[u8], hole: u64) {
    std::fs::write(path, bytes).expect("a file");
    if hole > 0 {
        let file = std::fs::File::options().write(true).open(path).expect("a file");
        file.set_len(bytes.len() as u64 + hole).expect("a longer file");
    }
}

/// Bytes up to the first zero byte, and those after it.
fn cut(bytes: &[u8]) -> (&[u8], &[u8]) {
    let at = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    (&bytes[..at], bytes.get(at + 1..).unwrap_or_default())
}

/// The parts of a seed with zero bytes between them.
fn joined(parts: &[&[u8]]) -> Vec<u8> {
    parts.join(&0)
}

/// A safetensors file.
fn weights(tensors: &[(&str, &str, &[usize], Vec<u8>)], about: Option<(&str, &str)>) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    if let Some((key, value)) = about {
        header.insert("__metadata__".into(), json!({ key: value }));
    }
    for (name, dtype, shape, bytes) in tensors {
        let begin = data.len();
        data.extend(bytes);
        let info = json!({ "dtype": dtype, "shape": shape, "data_offsets": [begin, data.len()] });
        header.insert(name.to_string(), info);
    }
    let header = serde_json::Value::Object(header).to_string();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}

const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 8, "intermediate_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 16,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true}"#;
const TEXTS: [&str; 5] =
    ["", "Hello, world!", "<s>a</s> \u{2581}<0x0A>\n\n  12345", "日本é", "a aa"];

/// Everything that is read of a checkpoint before it runs.
fn look(file: &Checkpoint) {
    let mut all = 0;
    for t in file.tensors() {
        assert_eq!(file.bytes(t).len() as u64, t.len, "{}", t.name);
        all += t.type_name().len() + t.elements().count_ones() as usize;
    }
    assert!(all < usize::MAX);
    if let Checkpoint::Gguf(g) = file {
        look_at_metadata(g);
    }
    let _ = Provenance::of(file);
    let Ok(spec) = Spec::of(file) else { return };
    let names = Names::of(file);
    for layer in 0..spec.layers {
        for &writer in spec.writers(layer) {
            assert!(spec.columns(writer) < 1 << 62);
            names.module(writer.role(), layer);
        }
        assert!(!spec.roles(layer).is_empty());
        if let Some(rope) = spec.rope_of(layer).filter(|_| layer < 4) {
            let (cos, sin) = rope.table(2);
            assert_eq!(cos.len(), sin.len());
        }
    }
}

/// Metadata are written as they were read.
fn look_at_metadata(g: &Gguf) {
    for e in g.metadata() {
        let v = &e.value;
        let _ = (v.as_str(), v.as_u64(), v.as_i64(), v.as_f64(), v.as_bool(), v.type_name());
        let _ =
            (v.to_u32s(), v.to_i64s(), v.to_f32s(), v.to_bools(), v.as_strings().map(<[_]>::len));
        let mut again = Vec::new();
        Value::from(e.key.as_str()).write(&mut again);
        // Without the type, which keys don't have.
        again.drain(..4);
        v.write(&mut again);
        // A boolean of 7 reads as true; nothing else may change.
        if v.as_bool().is_none() {
            assert!(again == g.raw(e.span.clone()), "{}", e.key);
        }
    }
}

/// Opens a model, and reads and steps the first rows of what a patch could touch.
fn open(path: &Path) {
    let Ok(model) = Model::open(path) else { return };
    for layer in 0..model.spec.layers.min(2) {
        for &writer in model.spec.writers(layer) {
            let Ok(parts) = model.parts(layer, writer) else { continue };
            for part in parts.iter().take(2) {
                step(&part.stack.get(0));
            }
        }
    }
    let _ = model.embedding().map(|m| m.decode_row(0, &mut vec![0.0; m.cols]));
}

/// Codes go back to where they came from, and say what is decoded.
fn step(w: &Matrix) {
    let mut row = vec![0.0; w.cols];
    for i in [0, w.rows / 2, w.rows - 1] {
        w.decode_row(i, &mut row);
        if !w.encoding.has_codes() || w.bytes.len() > 1 << 20 {
            continue;
        }
        let (mut codes, mut params) = (vec![0; w.cols], vec![Params::default(); w.cols]);
        w.unpack(i, 0..w.cols, &mut codes, &mut params);
        let mut bytes = w.bytes.to_vec();
        w.pack(&mut bytes, i, 0..w.cols, &codes);
        assert!(bytes == w.bytes, "{}", w.encoding.name());
        let (low, high) = w.encoding.code_range();
        for (x, p) in row.iter().zip(&params) {
            assert!((low..=high).contains(&w.encoding.nearest(*p, *x)));
        }
    }
}

fn encode(tokenizer: &Tokenizer) {
    for text in TEXTS {
        for special in [false, true] {
            let ids = tokenizer.encode(text, special);
            tokenizer.decode(&ids);
            ids.iter().for_each(|id| drop((tokenizer.token_text(*id), tokenizer.is_end(*id))));
        }
    }
    tokenizer.decode(&[0, 1, u32::MAX, 2]);
    let _ = (tokenizer.bos(), tokenizer.eos(), tokenizer.add_bos(), tokenizer.fault());
}

fn messages() -> Vec<Message> {
    let of = |role, text| Message::new(role, text);
    vec![of("system", "Be brief."), of("user", " Hi <s> "), of("assistant", "Yes"), of("user", "a")]
}

/// The header of a GGUF fixture.
fn header(name: &str) -> Vec<u8> {
    let start = Gguf::open(&root().join(name)).expect("a fixture").data_start();
    fixture(name)[..start as usize].to_vec()
}

const SMALL: &str = "fixtures/architectures/gemma.gguf";
const WITH_TOKENIZER: &str = "tests/data/forward/llama-k-quants.gguf";
const HOLE: u64 = 512 << 10;

// ------------------------------------------------------------------------------ targets

/// A GGUF header; a hole stands for the data.
pub mod gguf {
    use super::*;

    pub fn run(bytes: &[u8]) {
        let path = dir("gguf").join("in.gguf");
        file(&path, bytes, HOLE);
        let Ok(checkpoint) = Checkpoint::open(&path) else { return };
        look(&checkpoint);
        open(&path);
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let mut all: Vec<Vec<u8>> = std::fs::read_dir(root().join("fixtures/architectures"))
            .into_iter()
            .flatten()
            .filter_map(|e| e.ok()?.file_name().into_string().ok())
            .filter(|name| name.ends_with(".gguf"))
            .map(|name| header(&format!("fixtures/architectures/{name}")))
            .collect();
        all.sort();
        all.push(header("tests/data/forward/qwen2moe.gguf"));
        all.push(patched());
        all
    }

    /// A header with the record of a patch.
    fn patched() -> Vec<u8> {
        let (source, out) = (root().join(SMALL), dir("gguf").join("patched.gguf"));
        let _ = std::fs::remove_file(&out);
        let source = Gguf::open(&source).expect("a fixture");
        let edit = TensorEdit { tensor: "a".into(), u: vec![1.0; 3], v: vec![0.5; 2] };
        let record = Provenance {
            version: "0.1.0".into(),
            source_sha256: "ab".repeat(32),
            method: "gated".into(),
            layers: vec![0],
            strength: 1.0,
            before: "{}".into(),
            after: "{}".into(),
            edits: vec![edit],
        };
        let mut plan = Plan::new(&source);
        record.apply(&mut plan);
        let staged = stage(&plan, &out, false, &Silent).expect("a patched file");
        staged.commit().expect("a patched file");
        let start = Gguf::open(&out).expect("a patched file").data_start();
        std::fs::read(&out).expect("a patched file")[..start as usize].to_vec()
    }
}

/// The tokenizer in a GGUF header.
pub mod vocabulary {
    use super::*;

    pub fn run(bytes: &[u8]) {
        let path = dir("vocabulary").join("in.gguf");
        file(&path, bytes, HOLE);
        let Ok(gguf) = Gguf::open(&path) else { return };
        if let Ok(tokenizer) = Tokenizer::from_gguf(&gguf) {
            encode(&tokenizer);
        }
    }

    /// A header that only has a vocabulary.
    fn header_of(model: &str, pre: &str, list: &serde_json::Value) -> Vec<u8> {
        let strings = |key: &str| -> Vec<Vec<u8>> {
            let all = list[key].as_array().expect("a list");
            all.iter().take(400).map(|t| t.as_str().unwrap_or("").as_bytes().to_vec()).collect()
        };
        let tokens = strings("tokens");
        let types: Vec<u32> =
            (0..tokens.len()).map(|i| list["types"][i].as_u64().unwrap_or(1) as u32).collect();
        let scores: Vec<f32> =
            (0..tokens.len()).map(|i| list["scores"][i].as_f64().unwrap_or(0.0) as f32).collect();
        let entries = [
            ("tokenizer.ggml.model", Value::from(model)),
            ("tokenizer.ggml.pre", Value::from(pre)),
            ("tokenizer.ggml.tokens", Value::Strings(tokens)),
            ("tokenizer.ggml.token_type", Value::u32s(&types)),
            ("tokenizer.ggml.scores", Value::f32s(&scores)),
            ("tokenizer.ggml.merges", Value::Strings(strings("merges"))),
            ("tokenizer.ggml.eos_token_id", Value::from(2u32)),
        ];
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend(0u64.to_le_bytes());
        out.extend((entries.len() as u64).to_le_bytes());
        for (key, value) in &entries {
            out.extend((key.len() as u64).to_le_bytes());
            out.extend(key.as_bytes());
            value.write(&mut out);
        }
        out
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let read = |name: &str| serde_json::from_slice(&fixture(name)).expect("a vocabulary");
        let (bpe, spm) =
            (read("tests/data/tokenizer/bpe.json"), read("tests/data/tokenizer/spm.json"));
        vec![
            header_of("gpt2", "llama-bpe", &bpe),
            header_of("gpt2", "qwen2", &bpe),
            header_of("gpt2", "deepseek-llm", &bpe),
            header_of("llama", "default", &spm),
            header_of("gemma4", "gemma4", &spm),
        ]
    }
}

/// A safetensors file beside a fixed configuration.
pub mod safetensors {
    use super::*;

    pub fn run(bytes: &[u8]) {
        let dir = dir("safetensors");
        file(&dir.join("config.json"), CONFIG.as_bytes(), 0);
        file(&dir.join("model.safetensors"), bytes, 0);
        let Ok(checkpoint) = Checkpoint::open(&dir) else { return };
        look(&checkpoint);
        open(&dir);
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let [a, b] = [(8, 16), (16, 8)].map(|(m, n)| vec![m, n]);
        let bytes = |shape: &[usize], size: usize| vec![7; shape.iter().product::<usize>() * size];
        vec![
            weights(&[], None),
            weights(
                &[
                    ("model.layers.0.mlp.down_proj.weight", "F16", &a, bytes(&a, 2)),
                    ("model.layers.0.mlp.up_proj.weight", "BF16", &b, bytes(&b, 2)),
                    ("model.norm.weight", "F32", &[8], bytes(&[8], 4)),
                    ("other", "F4", &[2, 4], vec![0; 4]),
                    ("none", "I64", &[0, 3], Vec::new()),
                ],
                Some(("format", "pt")),
            ),
        ]
    }
}

/// The index of a folder of two files.
pub mod index {
    use super::*;

    pub fn run(bytes: &[u8]) {
        let dir = dir("index");
        file(&dir.join("config.json"), CONFIG.as_bytes(), 0);
        for name in ["a", "b"] {
            let one = weights(&[(name, "U8", &[4], vec![1; 4])], None);
            file(&dir.join(format!("{name}.safetensors")), &one, 0);
        }
        file(&dir.join("model.safetensors.index.json"), bytes, 0);
        if let Ok(checkpoint) = Checkpoint::open(&dir) {
            look(&checkpoint);
        }
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let map = json!({ "a": "a.safetensors", "b": "b.safetensors", "c": "b.safetensors" });
        let all = json!({ "metadata": { "total_size": 8 }, "weight_map": map });
        let out = json!({ "weight_map": { "a": "../../../etc/passwd" } });
        vec![all.to_string().into_bytes(), out.to_string().into_bytes()]
    }
}

/// A configuration and its weights: every packing.
pub mod folder {
    use super::*;

    pub fn run(bytes: &[u8]) {
        let dir = dir("folder");
        let (config, weights) = cut(bytes);
        file(&dir.join("config.json"), config, 0);
        file(&dir.join("model.safetensors"), weights, 0);
        let Ok(checkpoint) = Checkpoint::open(&dir) else { return };
        look(&checkpoint);
        open(&dir);
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        for place in ["tests/data/packings", "fixtures/architectures"] {
            let entries = std::fs::read_dir(root().join(place)).into_iter().flatten().flatten();
            let mut dirs: Vec<PathBuf> = entries.map(|e| e.path()).collect();
            dirs.sort();
            for dir in dirs {
                let [config, weights] =
                    ["config.json", "model.safetensors"].map(|n| std::fs::read(dir.join(n)));
                if let (Ok(config), Ok(weights)) = (config, weights) {
                    all.push(joined(&[&config, &weights]));
                }
            }
        }
        all
    }
}

/// A configuration beside weights that have nothing but names.
pub mod config {
    use super::*;

    pub fn run(bytes: &[u8]) {
        let dir = dir("config");
        file(&dir.join("config.json"), bytes, 0);
        let path = dir.join("model.safetensors");
        if !path.exists() {
            let names: Vec<String> = (0..100).map(|i| format!("model.layers.{i}.a")).collect();
            let empty = |n: &'static str, i: usize| (names[i].as_str(), n, &[0][..], Vec::new());
            let all: Vec<_> = (0..100).map(|i| empty("F16", i)).collect();
            file(&path, &weights(&all, None), 0);
        }
        let Ok(checkpoint) = Checkpoint::open(&dir) else { return };
        look(&checkpoint);
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let mut all: Vec<Vec<u8>> = folder::seeds().iter().map(|s| cut(s).0.to_vec()).collect();
        all.push(CONFIG.as_bytes().to_vec());
        all
    }
}

/// A `tokenizer.json`, and the `tokenizer_config.json` and `added_tokens.json` beside it.
pub mod tokenizer_json {
    use super::*;

    pub fn run(bytes: &[u8]) {
        let dir = dir("tokenizer_json");
        let (own, rest) = cut(bytes);
        let (config, added) = cut(rest);
        for (name, bytes) in [("tokenizer_config.json", config), ("added_tokens.json", added)] {
            let path = dir.join(name);
            match bytes.is_empty() {
                true => drop(std::fs::remove_file(path)),
                false => file(&path, bytes, 0),
            }
        }
        file(&dir.join("tokenizer.json"), own, 0);
        file(&dir.join("config.json"), CONFIG.as_bytes(), 0);
        file(&dir.join("generation_config.json"), br#"{"eos_token_id": 1}"#, 0);
        file(&dir.join("model.safetensors"), &weights(&[], None), 0);
        let Ok(Checkpoint::Folder(folder)) = Checkpoint::open(&dir) else { return };
        let _ = folder_template(&folder);
        if let Ok(tokenizer) = Tokenizer::from_folder(&folder, None) {
            encode(&tokenizer);
        }
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        Vec::new()
    }
}

thread_local! {
    /// A chat whose template is replaced again and again.
    static CHAT: RefCell<Option<Chat>> = const { RefCell::new(None) };
}

/// A chat template.
pub mod template {
    use super::*;

    pub fn run(bytes: &[u8]) {
        let source = String::from_utf8_lossy(bytes);
        let Ok(template) = ChatTemplate::new(&source, "<s>", "</s>") else { return };
        let (all, one) = (messages(), [Message::new("user", "Hi")]);
        for (messages, thinking) in [(&all[..], Thinking::Off), (&one, Thinking::On)] {
            let _ = template.render(messages, true, thinking);
        }
        CHAT.with_borrow_mut(|chat| {
            let chat = chat.get_or_insert_with(|| {
                let file = Gguf::open(&root().join(WITH_TOKENIZER)).expect("a fixture");
                let tokenizer = Tokenizer::from_gguf(&file).expect("a fixture");
                let template = ChatTemplate::new("", "", "").expect("a template");
                Chat { tokenizer, template, system: None }
            });
            chat.template = template;
            for prompt in [chat.prompt("Hi <s>"), chat.conversation(&all)].into_iter().flatten() {
                assert!(!prompt.post_instruction.is_empty());
                assert!(prompt.post_instruction.end <= prompt.tokens.len());
            }
        });
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        Vec::new()
    }
}

/// A byte that says which encoding, and blocks of it.
pub mod encoding {
    use super::*;

    fn same(a: f32, b: f32) -> bool {
        a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
    }

    pub fn run(bytes: &[u8]) {
        let [first, rest @ ..] = bytes else { return };
        let e = Encoding::ALL[usize::from(*first) % Encoding::ALL.len()];
        let blocks = (rest.len() / e.block_bytes()).min(8);
        let (bytes, n) = (&rest[..blocks * e.block_bytes()], blocks * e.block_len());
        let mut decoded = vec![0.0; n];
        e.decode(bytes, &mut decoded);
        if !e.has_codes() {
            return;
        }
        let (mut codes, mut params) = (vec![0; n], vec![Params::default(); n]);
        e.unpack(bytes, &mut codes, &mut params);
        for ((&code, &p), &x) in codes.iter().zip(&params).zip(&decoded) {
            assert!(same(e.value(p, code), x), "{}: {p:?} {code}: {x}", e.name());
        }
        let mut again = bytes.to_vec();
        e.pack(&mut again, &codes);
        assert_eq!(again, bytes, "{}", e.name());
        let (low, high) = e.code_range();
        for by in [1, -1] {
            let moved: Vec<i32> =
                codes.iter().map(|c| c.saturating_add(by).clamp(low, high)).collect();
            e.pack(&mut again, &moved);
            let (mut found, mut unmoved) = (vec![0; n], vec![Params::default(); n]);
            e.unpack(&again, &mut found, &mut unmoved);
            assert_eq!(found, moved, "{}", e.name());
            let bits = |p: &Params| (p.scale.to_bits(), p.offset.to_bits());
            assert!(params.iter().map(bits).eq(unmoved.iter().map(bits)), "{}", e.name());
            e.decode(&again, &mut decoded);
            for ((&code, &p), &x) in moved.iter().zip(&params).zip(&decoded) {
                assert!(same(e.value(p, code), x), "{}: {p:?} {code}: {x}", e.name());
            }
        }
        for (&p, &x) in params.iter().zip(&decoded) {
            for x in [x, -x, 0.0, f32::INFINITY, f32::NAN, f32::MIN_POSITIVE] {
                assert!((low..=high).contains(&e.nearest(p, x)), "{}: {p:?} {x}", e.name());
            }
        }
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let of = |(i, e): (usize, &Encoding)| {
            let name = format!("fixtures/codecs/{}.bin", e.name());
            let bytes = std::fs::read(root().join(name)).ok()?;
            let most = bytes.len().min(2 * e.block_bytes());
            Some([&[i as u8][..], &bytes[..most]].concat())
        };
        Encoding::ALL.iter().enumerate().filter_map(of).collect()
    }
}

/// A byte that says which ending, and a file of prompts.
pub mod prompts {
    use super::*;

    const ENDINGS: [&str; 7] = ["txt", "json", "jsonl", "ndjson", "csv", "tsv", "none"];

    pub fn run(bytes: &[u8]) {
        let [first, rest @ ..] = bytes else { return };
        let ending = ENDINGS[usize::from(*first) % ENDINGS.len()];
        let path = dir("prompts").join(format!("in.{ending}"));
        file(&path, rest, 0);
        if let Ok(read) = read_prompts(&path, Set::Harmful) {
            assert!(!read.prompts.is_empty());
            assert!(read.prompts.iter().all(|p| !p.prompt.trim().is_empty()));
        }
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let of = |ending: u8, text: &str| [&[ending], text.as_bytes()].concat();
        vec![
            of(0, "\u{feff}one\n two \r\n\nthree"),
            of(1, r#"["a", {"prompt": "b", "id": 1, "category": "x", "split": "test"}]"#),
            of(2, "\"a\"\n{\"prompt\": \"b\", \"split\": \"train\"}\n{\"goal\": \"c\"}\n"),
            of(3, "{\"Behavior\": \"b\", \"ContextString\": \"c\"}"),
            of(4, "id,prompt,category\r\n1,\"a, \"\"b\"\"\nc\",x\r\n2,d,\r\n"),
            of(4, "prompt\na, b\n\"c\"\n"),
            of(5, "prompt\tsplit\na\ttest\n\"b\tc\"\t\n"),
        ]
    }
}

/// The model that direction files and sidecars belong to.
fn small_model() -> &'static Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL.get_or_init(|| Model::open(&root().join(SMALL)).expect("a fixture"))
}

/// Of the same architecture, a folder.
fn small_folder() -> &'static Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL.get_or_init(|| {
        Model::open(&root().join("fixtures/architectures/gemma")).expect("a fixture")
    })
}

/// An edit of a block, and what its file says of it.
fn small_sidecar(model: &Model, kind: Kind) -> Sidecar {
    let writer = Writer::Ffn;
    let columns = if kind == Kind::Lora { model.spec.columns(writer) } else { 0 };
    let (u, v) = (vec![0.5; model.spec.hidden], vec![0.25; columns]);
    let sha = refusal_patch::checkpoint::sha256_checkpoint(&model.file, &Silent);
    Sidecar {
        kind,
        architecture: model.spec.arch.clone(),
        base_sha256: sha.expect("a hash"),
        method: "gated".into(),
        strength: 1.0,
        edit: vec![RankOne { layer: 1, writer, u, v }],
    }
}

/// A file of directions.
pub mod direction {
    use super::*;

    pub fn run(bytes: &[u8]) {
        let path = dir("direction").join("in.safetensors");
        file(&path, bytes, 0);
        if let Ok((saved, _)) = read_direction(&path, small_model(), &Silent) {
            assert_eq!(saved.len(), small_model().spec.layers);
            assert!(saved.iter().all(|(_, v)| v.len() == small_model().spec.hidden));
        }
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let spec = &small_model().spec;
        let about = json!({
            "version": 2, "tool": "", "architecture": spec.arch, "layers": spec.layers,
            "hidden": spec.hidden, "model_sha256": "", "prompts_sha256": "", "meaning": "",
            "scores": [],
        });
        let names: Vec<String> = (0..spec.layers).map(|l| format!("direction.{l}")).collect();
        let unit: Vec<u8> = (0..spec.hidden)
            .flat_map(|i| (if i == 3 { 1.0f32 } else { 0.0 }).to_le_bytes())
            .collect();
        let shape = [1, spec.hidden];
        let all: Vec<_> =
            names.iter().map(|n| (n.as_str(), "F32", &shape[..], unit.clone())).collect();
        vec![weights(&all, Some(("refusal_patch.direction", &about.to_string())))]
    }
}

/// An adapter or a control vector as a GGUF file.
pub mod sidecar {
    use super::*;

    pub fn run(bytes: &[u8]) {
        let path = dir("sidecar").join("in.gguf");
        file(&path, bytes, 0);
        if let Ok(sidecar) = Sidecar::read(&path, small_model(), &Silent) {
            assert!(!sidecar.edit.is_empty());
            assert!(sidecar.edit.iter().all(|t| t.u.len() == small_model().spec.hidden));
        }
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let of = |kind: Kind| {
            let out = dir("sidecar").join(format!("{}.gguf", kind.name()));
            let _ = std::fs::remove_file(&out);
            let staged = small_sidecar(small_model(), kind).stage(small_model(), &out, false);
            staged.and_then(|s| s.commit()).expect("a sidecar");
            std::fs::read(&out).expect("a sidecar")
        };
        vec![of(Kind::Lora), of(Kind::ControlVector)]
    }
}

/// An adapter as a folder: its configuration and its weights.
pub mod adapter {
    use super::*;

    pub fn run(bytes: &[u8]) {
        let dir = dir("adapter");
        let (config, weights) = cut(bytes);
        file(&dir.join("adapter_config.json"), config, 0);
        file(&dir.join("adapter_model.safetensors"), weights, 0);
        if let Ok(sidecar) = Sidecar::read(&dir, small_folder(), &Silent) {
            assert!(!sidecar.edit.is_empty());
        }
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let out = dir("adapters").join("out");
        let _ = std::fs::remove_dir_all(&out);
        let staged = small_sidecar(small_folder(), Kind::Lora).stage(small_folder(), &out, false);
        staged.and_then(|s| s.commit()).expect("an adapter");
        let [config, weights] = ["adapter_config.json", "adapter_model.safetensors"]
            .map(|n| std::fs::read(out.join(n)).expect("an adapter"));
        vec![joined(&[&config, &weights])]
    }
}
