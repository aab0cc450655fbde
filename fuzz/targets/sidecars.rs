//! Targets that read what stands beside a model: directions, control vectors, adapters.

use super::*;

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
    let columns = if kind == Kind::Lora { model.spec.columns(1, writer) } else { 0 };
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
