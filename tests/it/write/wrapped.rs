//! Language models that are a part of another model: adapters and printed commands use the names of
//! transformers.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::folder::{organism, safetensors, tensors_of};
use refusal_patch::arch::Writer;
use refusal_patch::checkpoint::{sha256_checkpoint, Folder, Gguf};
use refusal_patch::edit::RankOne;
use refusal_patch::encoding::Encoding;
use refusal_patch::model::Model;
use refusal_patch::output::{load_command, Kind, Sidecar};
use refusal_patch::progress::Silent;
use safetensors::SafeTensors;
use serde_json::{json, Value};

/// The organism with another prefix of its tensors' names, and with keys of config.json changed.
/// `part` puts the configuration of the language model into `text_config`.
fn wrapped(dir: &Path, prefix: &str, part: bool, keys: &Value) -> PathBuf {
    let gguf = "organism-broken-Q8_0.gguf";
    let path = organism(dir, gguf, Encoding::F16, 1);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(gguf);
    let mut tensors = tensors_of(&Gguf::open(&source).unwrap(), Encoding::F16);
    for t in &mut tensors {
        t.name = t.name.replacen("model.", prefix, 1);
    }
    fs::write(path.join("model.safetensors"), safetensors(&tensors)).unwrap();
    let config = path.join("config.json");
    let mut text: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    text.as_object_mut().unwrap().remove("architectures");
    let mut whole = if part { json!({ "text_config": text }) } else { text };
    keys.as_object().unwrap().iter().for_each(|(k, v)| whole[k] = v.clone());
    fs::write(&config, whole.to_string()).unwrap();
    path
}

/// The modules that a folder's adapter names in its configuration and in its weights, and the
/// command that loads the adapter.
fn modules(path: &Path) -> (Vec<String>, Vec<String>, String) {
    let model = Model::open(path).unwrap();
    let s = &model.spec;
    let (layer, u) = (2, vec![0.5; s.hidden]);
    let edit = vec![RankOne { layer, writer: Writer::Ffn, u, v: vec![1.0; s.blocks[layer].ffn] }];
    let base_sha256 = sha256_checkpoint(&model.file, &Silent).unwrap();
    let (kind, architecture) = (Kind::Lora, "llama".to_string());
    let sidecar =
        Sidecar { kind, architecture, base_sha256, method: "gated".into(), strength: 1.0, edit };
    let outer = tempfile::tempdir().unwrap();
    let out = outer.path().join("adapter");
    sidecar.stage(&model, &out, false).unwrap().commit().unwrap();
    assert_eq!(Sidecar::read(&out, &model, &Silent).unwrap(), sidecar);
    let config: Value =
        serde_json::from_slice(&fs::read(out.join("adapter_config.json")).unwrap()).unwrap();
    let weights = fs::read(out.join("adapter_model.safetensors")).unwrap();
    let mut names: Vec<String> =
        SafeTensors::deserialize(&weights).unwrap().names().iter().map(|n| n.to_string()).collect();
    names.sort();
    let named = config["target_modules"].as_array().unwrap().iter();
    (named.map(|n| n.as_str().unwrap().into()).collect(), names, Kind::Lora.command(&model, &out))
}

#[test]
fn an_adapter_names_the_modules_and_the_class_that_transformers_has() {
    let of = |class: &str| json!({ "architectures": [class] });
    let (llava, mistral) = ("LlavaForConditionalGeneration", "Mistral3ForConditionalGeneration");
    let (sound, plain) = ("Qwen2AudioForConditionalGeneration", "AutoModelForCausalLM");
    for (prefix, part, keys, tree, class) in [
        ("language_model.model.", true, of(llava), "model.language_model.", llava),
        ("model.language_model.", true, of(llava), "model.language_model.", llava),
        ("model.", true, of(mistral), "model.language_model.", mistral),
        ("language_model.model.", true, of(sound), "model.language_model.", sound),
        ("model.", false, of("LlamaForCausalLM"), "model.", plain),
        ("", false, of("LlamaModel"), "model.", plain),
        // A plain decoder, though its configuration has such a part.
        ("model.", true, of("LlamaForCausalLM"), "model.", plain),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = wrapped(dir.path(), prefix, part, &keys);
        let (config, weights, command) = modules(&path);
        let module = format!("{tree}layers.2.mlp.down_proj");
        assert_eq!(config, [module.as_str()], "{prefix} {keys}");
        assert_eq!(
            weights,
            ["A", "B"].map(|h| format!("base_model.model.{module}.lora_{h}.weight"))
        );
        let import = format!("from transformers import {class} as M;");
        assert!(command.contains(&import), "{command}");
        let load = load_command(&Folder::open(&path).unwrap(), "OUT".as_ref());
        assert!(load.contains(&import) && load.ends_with(" OUT"), "{load}");
    }
}

#[test]
fn a_class_that_transformers_lacks_or_that_is_no_name_is_in_no_command() {
    let class = "FancyForConditionalGeneration";
    for keys in [
        json!({}),
        json!({ "architectures": ["Fancy; import os"] }),
        json!({ "architectures": ["\"; rm -r x; \""] }),
        json!({ "architectures": [class], "auto_map": { "AutoModel": "modeling_fancy.Fancy" } }),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = wrapped(dir.path(), "language_model.model.", true, &keys);
        let load = load_command(&Folder::open(&path).unwrap(), "OUT".as_ref());
        assert!(load.contains("import AutoModelForImageTextToText as M;"), "{load}");
    }
}

#[test]
fn the_command_for_a_single_file_names_its_folder() {
    let dir = tempfile::tempdir().unwrap();
    let path =
        wrapped(dir.path(), "model.", false, &json!({ "architectures": ["LlamaForCausalLM"] }));
    let (_, _, command) = modules(&path.join("model.safetensors"));
    assert!(command.contains(&format!(" {} ", path.display())), "{command}");
    assert!(!command.contains("model.safetensors"), "{command}");
}
