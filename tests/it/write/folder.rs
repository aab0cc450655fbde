//! Writing Hugging Face folders, and adapters for them.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::folder::*;
use refusal_patch::arch::Writer;
use refusal_patch::checkpoint::{Checkpoint, Folder};
use refusal_patch::edit::{Edit, RankOne};
use refusal_patch::encoding::Encoding;
use refusal_patch::model::Model;
use refusal_patch::output::{
    stage_folder, unpatched, Kind, Patch, Provenance, Sidecar, TensorEdit,
};
use refusal_patch::progress::Silent;
use serde_json::{json, Value};

fn record() -> Provenance {
    Provenance {
        version: "0.1.0".into(),
        source_sha256: "ab".repeat(32),
        method: "gated".into(),
        layers: vec![1],
        strength: 0.5,
        before: r#"{"refusal":0.6}"#.into(),
        after: r#"{"refusal":0.9}"#.into(),
        edits: vec![TensorEdit {
            tensor: "a".into(),
            u: vec![1.0, -0.0, 0.1],
            v: vec![f32::MIN_POSITIVE; 4],
        }],
    }
}

/// A folder with weights in three files, and with the other files of a real one.
fn three(dir: &Path) -> PathBuf {
    let folder = dir.join("in");
    fs::create_dir_all(folder.join("assets")).unwrap();
    fs::create_dir_all(folder.join(".cache")).unwrap();
    write(
        &folder,
        &[("config.json", b"{}"), ("LICENSE", b"MIT"), ("assets/logo", b"x"), (".cache/y", b"y")],
    );
    let tensor = |name: &str, n: u8| named(name, "BF16", &[2, 4], vec![n; 16]);
    let list = ["a", "b", "c", "d", "e", "f"];
    let tensors: Vec<Named> = list.iter().zip(1..).map(|(name, i)| tensor(name, i)).collect();
    write_weights(&folder, &tensors, 3);
    folder
}

#[test]
fn only_files_with_touched_tensors_change_and_headers_stay_verbatim() {
    let dir = tempfile::tempdir().unwrap();
    let source = three(dir.path());
    let before = contents(&source);
    let folder = Folder::open(&source).unwrap();
    let out = dir.path().join("out");
    let patch = |name: &str| Patch { tensor: name.into(), bytes: vec![0xAB; 16], type_id: 30 };
    let patches = [patch("d"), patch("c")];
    let staged = stage_folder(&folder, &patches, &record(), &out, false, &Silent).unwrap();
    assert!(!out.exists());
    staged.commit().unwrap();
    assert_eq!(contents(&source), before, "the input is untouched");
    for (path, bytes) in &before {
        let name = path.strip_prefix(&source).unwrap();
        let new = fs::read(out.join(name));
        match name.to_str().unwrap() {
            ".cache/y" => assert!(new.is_err()),
            "model-00002-of-00003.safetensors" => {
                let data = bytes.len() - 32;
                let new = new.unwrap();
                assert_eq!(new[..data], bytes[..data]);
                assert!(new[data..].iter().all(|&b| b == 0xAB));
            }
            _ => assert_eq!(&new.unwrap(), bytes, "{}", name.display()),
        }
    }
    let written = Checkpoint::open(&out).unwrap();
    assert_eq!(Provenance::of(&written).unwrap(), Some(record()));
    assert_eq!(Provenance::of(&Checkpoint::open(&source).unwrap()).unwrap(), None);
    let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "nothing else is left: {names:?}");

    // A second patch replaces the record of the first. OUT is replaced with force only, and only if
    // it is a model.
    let again =
        |out: &Path, force| stage_folder(&folder, &[patch("a")], &record(), out, force, &Silent);
    let error = |out: &Path, force| again(out, force).map(drop).unwrap_err().to_string();
    assert!(error(&out, false).contains("`force`"));
    again(&out, true).unwrap().commit().unwrap();
    assert_eq!(
        fs::read(out.join("model-00002-of-00003.safetensors")).unwrap(),
        before_file(&before, "00002")
    );
    let other = dir.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("thesis.txt"), b"x").unwrap();
    assert!(error(&other, true).contains("replaces models only"));
    for inside in [source.clone(), source.join("out"), dir.path().to_path_buf()] {
        assert!(error(&inside, true).contains("never changed"), "{}", inside.display());
    }
    assert!(error(&dir.path().join("out.safetensors"), false).contains("name a folder"));
    assert_eq!(contents(&source), before);
}

fn before_file(all: &[(PathBuf, Vec<u8>)], part: &str) -> Vec<u8> {
    all.iter()
        .find(|(p, _)| p.to_str().unwrap().contains(&format!("model-{part}")))
        .unwrap()
        .1
        .clone()
}

#[test]
fn a_patch_that_does_not_fit_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let folder = Folder::open(&three(dir.path())).unwrap();
    let out = dir.path().join("out");
    for (tensor, len, type_id) in [("a", 15, 30), ("a", 16, 1), ("z", 16, 30)] {
        let patch = Patch { tensor: tensor.into(), bytes: vec![0; len], type_id };
        assert!(stage_folder(&folder, &[patch], &record(), &out, false, &Silent).is_err());
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_single_file_is_written_as_a_folder_and_other_weights_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let source = three(dir.path());
    fs::rename(source.join("model-00001-of-00003.safetensors"), source.join("one.safetensors"))
        .unwrap();
    let folder = Folder::open(&source.join("one.safetensors")).unwrap();
    let out = dir.path().join("out");
    stage_folder(&folder, &[], &record(), &out, false, &Silent).unwrap().commit().unwrap();
    let same = fs::read(out.join("model.safetensors")).unwrap()
        == fs::read(source.join("one.safetensors")).unwrap();
    assert!(
        same && out.join("LICENSE").exists()
            && !out.join("model-00002-of-00003.safetensors").exists()
    );
    assert!(Checkpoint::open(&out).is_ok());
    fs::write(out.join("pytorch_model.bin"), b"x").unwrap();
    assert_eq!(unpatched(&Folder::open(&out).unwrap()).unwrap(), ["pytorch_model.bin"]);
}

#[test]
fn an_adapter_is_read_back_as_it_was_written_and_no_other_models_is() {
    let dir = tempfile::tempdir().unwrap();
    let folder = organism(dir.path(), "organism-broken-Q4_K_M.gguf", Encoding::BF16, 2);
    let model = Model::open(&folder).unwrap();
    let s = &model.spec;
    let term = |layer, writer, n| RankOne {
        layer,
        writer,
        u: vec![0.25; s.hidden],
        v: (0..n).map(|i| i as f32).collect(),
    };
    let edit: Edit = [(1, Writer::Attention), (3, Writer::Ffn)]
        .map(|(l, w)| term(l, w, s.columns(l, w)))
        .to_vec();
    let base_sha256 = refusal_patch::checkpoint::sha256_checkpoint(&model.file, &Silent).unwrap();
    let sidecar = Sidecar {
        kind: Kind::Lora,
        architecture: "llama".into(),
        base_sha256,
        method: "gated".into(),
        strength: 1.5,
        edit,
    };
    let out = dir.path().join("adapter");
    sidecar.stage(&model, &out, false).unwrap().commit().unwrap();
    assert_eq!(Sidecar::read(&out, &model, &Silent).unwrap(), sidecar);
    let config: Value =
        serde_json::from_slice(&fs::read(out.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(
        config["target_modules"],
        json!(["model.layers.1.self_attn.o_proj", "model.layers.3.mlp.down_proj"])
    );

    let error = || Sidecar::read(&out, &model, &Silent).unwrap_err().to_string();
    let file = out.join("adapter_model.safetensors");
    let good = fs::read(&file).unwrap();
    let change = |from: &str, to: &str| {
        let (header, data) =
            good.split_at(8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize);
        let header = String::from_utf8(header[8..].to_vec()).unwrap();
        assert!(header.contains(from));
        fs::write(&file, raw(&header.replace(from, to), data)).unwrap();
    };
    change("sidecar_version\\\":1", "sidecar_version\\\":9");
    assert!(error().contains("version 9"));
    change(&sidecar.base_sha256, &"0".repeat(64));
    assert!(error().contains("belongs to another model"));
    change("layers.1.", "layers.9.");
    assert!(error().contains("4 tensors, of which 1 terms"));
    change("layers.3.mlp.down_proj.lora_A", "layers.3.mlp.down_proj.lora_C");
    assert!(error().contains("lora_A"));
    fs::write(&file, &good[..good.len() - 4]).unwrap();
    assert!(error().contains("download it again"));
    fs::remove_file(&file).unwrap();
    assert!(error().contains("is no adapter folder"));
}
