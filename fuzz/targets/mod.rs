//! What is fuzzed: everything that reads bytes of strangers, as functions of bytes. libFuzzer
//! drives them (`fuzz_targets/`), and so does a plain loop of mutations
//! (`tests/it/trust/fuzz.rs`).
//!
//! A target takes any bytes. It fails by a panic, by running long, or by taking much memory; an
//! error of the library is a fine answer. Most targets write their bytes to a file first, since the
//! library maps files. Where a target reads several files, a zero byte stands between them.

mod checkpoints;
mod sidecars;
mod texts;

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

pub use checkpoints::{config, folder, gguf, index, safetensors, vocabulary};
pub use sidecars::{adapter, direction, sidecar};
pub use texts::{encoding, prompts, template, tokenizer_json};

/// A target with its name and its seeds.
pub struct Target {
    pub name: &'static str,
    pub run: fn(&[u8]),
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// Hands the names of all targets to a macro.
macro_rules! for_targets {
    ($then:ident) => {
        $then!(
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
    };
}
#[allow(unused_imports)] // The test makes a test of each.
pub(crate) use for_targets;

macro_rules! list {
    ($($name:ident),* $(,)?) => {
        /// Every target.
        pub const TARGETS: &[Target] = &[
            $(Target { name: stringify!($name), run: $name::run, seeds: $name::seeds }),*
        ];
    };
}

for_targets!(list);

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
            assert!(spec.columns(layer, writer) < 1 << 62);
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
