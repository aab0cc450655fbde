//! What can't be used says why, and blames the right thing; what can be used is no error.

mod common;
#[path = "common/folder.rs"]
mod folder;

use std::fs;
use std::path::{Path, PathBuf};

use common::{file, text};
use folder::{organism, safetensors, tensors_of};
use refusal_patch::checkpoint::{Gguf, Value};
use refusal_patch::encoding::Encoding;
use refusal_patch::model::Model;
use refusal_patch::output::write;
use serde_json::json;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

/// The organism as a folder in two files.
fn two_files(dir: &Path) -> PathBuf {
    organism(dir, "organism-broken-Q8_0.gguf", Encoding::F16, 2)
}

#[track_caller]
fn says(result: Result<Model, refusal_patch::Error>, words: &[&str]) {
    let message = result.err().expect("should be refused").to_string();
    for w in words {
        assert!(message.contains(w), "`{message}` should say `{w}`");
    }
}

/// Changes a JSON file of a folder.
fn edit(path: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

#[test]
fn a_name_in_the_index_that_no_file_has_matters_only_where_the_decoder_needs_it() {
    let dir = tempfile::tempdir().unwrap();
    let folder = two_files(dir.path());
    let index = folder.join("model.safetensors.index.json");
    let last = "model-00002-of-00002.safetensors";
    edit(&index, |v| {
        for name in ["mtp.fc.weight", "model.layers.6.eh_proj.weight", "vision.patch.bias"] {
            v["weight_map"][name] = last.into();
        }
    });
    let model = Model::open(&folder).unwrap();
    let absent = model.file.folder().unwrap().absent();
    assert_eq!(absent.len(), 3);
    assert!(absent.contains(&("mtp.fc.weight".into(), last.into())));

    // One that it needs, and one that lies in another file than the index says.
    let file = Gguf::open(&fixture("organism-broken-Q8_0.gguf")).unwrap();
    let mut second = tensors_of(&file, Encoding::F16);
    second.drain(..second.len().div_ceil(2));
    let kept = fs::read(folder.join(last)).unwrap();
    let gone = second.iter().position(|t| t.name.ends_with("mlp.up_proj.weight")).unwrap();
    let needed = second.remove(gone).name;
    fs::write(folder.join(last), safetensors(&second)).unwrap();
    says(Model::open(&folder), &["the index says", &needed, last, "where it is not; download both"]);
    fs::write(folder.join(last), kept).unwrap();
    edit(&index, |v| {
        let map = v["weight_map"].as_object_mut().unwrap();
        let name = "model.embed_tokens.weight";
        let other = if map[name] == last { last.replace("00002-of", "00001-of") } else { last.into() };
        map.insert(name.into(), other.into());
    });
    says(Model::open(&folder), &["model.safetensors.index.json", "where it is not: it is in"]);
}

#[test]
fn a_configuration_with_pythons_literals_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let folder = two_files(dir.path());
    let config = folder.join("config.json");
    let plain = fs::read_to_string(&config).unwrap();
    let with = |text: &str| fs::write(&config, plain.replacen('{', &format!("{{ {text},"), 1)).unwrap();
    with("\"time_step_limit\": [0.0, Infinity], \"router_jitter_noise\": NaN, \"note\": \"NaN, -Infinity\"");
    let model = Model::open(&folder).unwrap();
    assert_eq!(model.file.folder().unwrap().config()["note"], "NaN, -Infinity");
    with("\"min_value\": -Infinity");
    assert!(Model::open(&folder).is_ok());
    // Where the decoder needs a number it isn't one.
    fs::write(&config, plain.replace("\"rms_norm_eps\":", "\"rms_norm_eps\": NaN, \"x\":")).unwrap();
    says(Model::open(&folder), &["config.json", "`rms_norm_eps` is \"NaN\"", "expected a number"]);
    fs::write(&config, format!("\u{feff}{plain}")).unwrap();
    says(Model::open(&folder), &["config.json", "byte order mark"]);
    with("\"a\": Nope");
    says(Model::open(&folder), &["config.json", "is not JSON", "line 1"]);
}

#[test]
fn a_key_that_the_configuration_leaves_out_is_to_be_added() {
    let dir = tempfile::tempdir().unwrap();
    let folder = two_files(dir.path());
    let config = folder.join("config.json");
    let plain = fs::read(&config).unwrap();
    for key in ["hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "vocab_size"]
    {
        edit(&config, |v| drop(v.as_object_mut().unwrap().remove(key)));
        says(Model::open(&folder), &[&format!("config.json leaves `{key}` out; add it")]);
        edit(&config, |v| v[key] = json!(-1));
        says(Model::open(&folder), &[&format!("config.json: `{key}` is -1, expected a positive")]);
        fs::write(&config, &plain).unwrap();
    }
}
