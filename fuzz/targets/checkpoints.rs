//! Targets that read checkpoints: headers, an index, configurations.

use super::*;

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
