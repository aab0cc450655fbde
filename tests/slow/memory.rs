//! A folder of 3 GB is read and patched in the memory of one of its layers.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::Duration;

use crate::common::{folder, only};
use refusal_patch::arch::Writer;
use refusal_patch::checkpoint::{sha256_tensors, Checkpoint};
use refusal_patch::edit::fold::{achieved, fold};
use refusal_patch::forward::{Compute, Row, Runner, Site, Tap};
use refusal_patch::model::Model;
use refusal_patch::output::{stage_folder, Patch, Provenance, TensorEdit};
use refusal_patch::progress::Silent;
use serde_json::{json, Map};

const HIDDEN: usize = 2048;
const FFN: usize = 8192;
const LAYERS: usize = 22;
const VOCAB: usize = 2048;
/// Bytes of a layer in BF16.
const LAYER_BYTES: usize = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN);
/// Bytes that the forward pass may keep.
const ACTIVATIONS: usize = 64 << 20;
const PATCHED: usize = 11;

/// Writes a shard of random BF16 weights of a transformer's size. The same million repeats.
fn shard(path: &Path, tensors: &[(String, Vec<usize>)]) {
    let mut header = Map::new();
    let mut at = 0;
    for (name, shape) in tensors {
        let end = at + 2 * shape.iter().product::<usize>();
        header.insert(
            name.clone(),
            json!({ "dtype": "BF16", "shape": shape, "data_offsets": [at, end] }),
        );
        at = end;
    }
    let mut out = BufWriter::new(File::create(path).unwrap());
    out.write_all(&folder::raw(&serde_json::Value::Object(header).to_string(), &[])).unwrap();
    let mut state = path.to_string_lossy().len() as u64;
    let mut random = Vec::with_capacity(2 << 20);
    for _ in 0..1 << 20 {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let x = ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * 0.03;
        random.extend(((x.to_bits() >> 16) as u16).to_le_bytes());
    }
    while at > 0 {
        let n = at.min(random.len());
        out.write_all(&random[..n]).unwrap();
        at -= n;
    }
    out.flush().unwrap();
}

/// A llama with a shard for every two layers.
fn large(dir: &Path) {
    fs::create_dir(dir).unwrap();
    let name = |layer: usize, part: &str| format!("model.layers.{layer}.{part}.weight");
    let layer = |i: usize| {
        let square = ["q_proj", "k_proj", "v_proj", "o_proj"]
            .map(|p| (format!("self_attn.{p}"), vec![HIDDEN, HIDDEN]));
        let wide = ["gate_proj", "up_proj"].map(|p| (format!("mlp.{p}"), vec![FFN, HIDDEN]));
        let norms =
            ["input_layernorm", "post_attention_layernorm"].map(|p| (p.to_string(), vec![HIDDEN]));
        let down = [("mlp.down_proj".to_string(), vec![HIDDEN, FFN])];
        let all = square.into_iter().chain(wide).chain(norms).chain(down);
        all.map(move |(part, shape)| (name(i, &part), shape)).collect::<Vec<_>>()
    };
    let mut shards = vec![vec![
        ("model.embed_tokens.weight".to_string(), vec![VOCAB, HIDDEN]),
        ("model.norm.weight".to_string(), vec![HIDDEN]),
    ]];
    shards.extend((0..LAYERS).step_by(2).map(|i| [layer(i), layer(i + 1)].concat()));
    let mut map = Map::new();
    for (i, tensors) in shards.iter().enumerate() {
        let file = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        tensors.iter().for_each(|(t, _)| drop(map.insert(t.clone(), file.clone().into())));
        shard(&dir.join(file), tensors);
    }
    let index = json!({ "metadata": { "total_size": 0 }, "weight_map": map });
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    let config = json!({
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": LAYERS, "num_attention_heads": 16, "num_key_value_heads": 16,
        "rms_norm_eps": 1e-5, "vocab_size": VOCAB, "max_position_embeddings": 256,
        "tie_word_embeddings": true,
    });
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

/// The work whose memory is measured: runs all layers over some prompts, folds an edit into one
/// writer, writes the folder.
fn run_and_patch(dir: &Path) {
    let model = Model::open(&dir.join("in")).unwrap();
    let compute = Compute::cpu();
    struct Input(Vec<f32>);
    impl Tap for Input {
        fn writer_input(&mut self, site: Site, _: &[Row], x: &[f32], width: usize) {
            if (site.layer, site.writer) == (PATCHED, Writer::Ffn) {
                self.0 = x[..width].to_vec();
            }
        }
    }
    let mut input = Input(Vec::new());
    let prompts: Vec<_> =
        (0..4).map(|p| (0..16).map(|i| 100 * p + i).collect::<Vec<u32>>()).collect();
    let runner = Runner::new(&model, &compute, None, ACTIVATIONS, &Silent);
    let hidden = runner.run(&prompts, &[], &[(0, 15), (3, 15)], &mut input).unwrap();
    assert!(hidden.iter().all(|x| x.is_finite()));

    let (tensor, w) = model.writer(PATCHED, Writer::Ffn).unwrap();
    let size = input.0.iter().map(|x| x * x).sum::<f32>().sqrt();
    let v: Vec<f32> = input.0.iter().map(|x| x / size).collect();
    let u: Vec<f32> = hidden[..HIDDEN].iter().map(|x| x * 0.05).collect();
    let bytes = fold(&w, &u, &v).unwrap();
    let type_id = model.file.tensor(&tensor).unwrap().type_id;
    let edits = vec![TensorEdit { tensor: tensor.clone(), u, v }];
    let record = Provenance {
        version: "0".into(),
        source_sha256: String::new(),
        method: "gated".into(),
        layers: vec![PATCHED as u32],
        strength: 1.0,
        before: "{}".into(),
        after: "{}".into(),
        edits,
    };
    let folder = model.file.folder().unwrap();
    let patch = Patch { tensor, bytes, type_id };
    let out = dir.join("out");
    stage_folder(folder, &[patch], &record, &out, false, &Silent).unwrap().commit().unwrap();
}

#[test]
#[ignore = "writes 6 GB"]
fn a_folder_is_patched_in_the_memory_of_a_layer_and_other_shards_stay() {
    // Memory is counted by process: the work runs in one of its own.
    if let Some(dir) = std::env::var_os("REFUSAL_PATCH_MEMORY_TEST") {
        return run_and_patch(dir.as_ref());
    }
    let dir = tempfile::tempdir().unwrap();
    large(&dir.path().join("in"));
    let mut child = only(a_folder_is_patched_in_the_memory_of_a_layer_and_other_shards_stay)
        .env("REFUSAL_PATCH_MEMORY_TEST", dir.path())
        .spawn()
        .unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    let end = loop {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|l| l.strip_prefix("RssAnon:"));
        let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<usize>().ok());
        peak = peak.max(kib.unwrap_or(0) * 1024);
        match child.try_wait().unwrap() {
            Some(end) => break end,
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    assert!(end.success());
    let [a, b] = ["in", "out"].map(|n| Model::open(&dir.path().join(n)).unwrap());
    let total: u64 = a.file.tensors().iter().map(|t| t.len).sum();
    println!("{total} bytes, a layer {LAYER_BYTES}, peak of anonymous memory {peak}");
    assert!(total > 2_900_000_000);
    assert!(peak < LAYER_BYTES + ACTIVATIONS, "{peak} bytes, a layer has {LAYER_BYTES}");

    // Every tensor but one is the same, and so is every shard but the one that holds it.
    let [x, y] = [&a.file, &b.file].map(|f: &Checkpoint| sha256_tensors(f, &Silent).unwrap());
    let (tensor, w) = a.writer(PATCHED, Writer::Ffn).unwrap();
    let patched = a.file.tensor(&tensor).unwrap();
    for (t, (x, y)) in a.file.tensors().iter().zip(x.iter().zip(&y)) {
        assert_eq!(x != y, t.name == tensor, "{}", t.name);
    }
    let files =
        |m: &Model| m.file.folder().unwrap().files().map(|f| f.0.to_path_buf()).collect::<Vec<_>>();
    for (i, (x, y)) in files(&a).iter().zip(&files(&b)).enumerate() {
        let same = fs::read(x).unwrap() == fs::read(y).unwrap();
        assert_eq!(same, i != patched.file, "{}", y.display());
    }
    let record: serde_json::Value =
        serde_json::from_slice(&fs::read(dir.path().join("out/refusal_patch.json")).unwrap())
            .unwrap();
    let of = |key: &str| -> Vec<f32> {
        serde_json::from_value(record["edits"][0][key].clone()).unwrap()
    };
    let stored = achieved(&w, &b.writer(PATCHED, Writer::Ffn).unwrap().1, &of("u"), &of("v"));
    println!("{stored:?}");
    assert!((0.98..=1.02).contains(&stored.gain), "{stored:?}");
}
