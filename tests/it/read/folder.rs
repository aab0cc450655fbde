//! Hugging Face folders, sound, damaged and hostile.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::folder::*;
use refusal_patch::arch::{QkNorm, Spec, Writer};
use refusal_patch::checkpoint::{Checkpoint, Folder};
use refusal_patch::encoding::Encoding;
use refusal_patch::forward::{Compute, Head, Runner};
use refusal_patch::model::Model;
use refusal_patch::progress::Silent;
use serde_json::{json, Value};

#[track_caller]
fn refused(dir: &Path, saying: &[&str]) {
    let message = Checkpoint::open(dir).map(drop).expect_err("should be refused").to_string();
    for part in saying {
        assert!(message.contains(part), "`{message}` should say `{part}`");
    }
    assert!(message.len() < 600, "too long: {message}");
}

fn header(tensors: &[(&str, &str, &[u64], [u64; 2])]) -> String {
    let member = |(name, dtype, shape, at): &(&str, &str, &[u64], [u64; 2])| {
        format!("{name:?}:{}", json!({ "dtype": dtype, "shape": shape, "data_offsets": at }))
    };
    format!("{{{}}}", tensors.iter().map(member).collect::<Vec<_>>().join(","))
}

#[test]
fn a_damaged_or_hostile_header_is_one_clear_error() {
    let good: (&str, &str, &[u64], [u64; 2]) = ("a", "F16", &[2, 2], [0, 8]);
    let cases: Vec<(Vec<u8>, &[&str])> = vec![
        (vec![1, 2, 3], &["3 bytes", "download it again"]),
        ([&(1u64 << 63).to_le_bytes()[..], b"{}"].concat(), &["9223372036854775808", "the most"]),
        (raw(&header(&[good]), &[0; 8])[..40].to_vec(), &["its header claims", "are there"]),
        (raw("[1]", &[]), &["not a JSON object"]),
        (raw(&header(&[good]), &[0; 4]), &["tensor `a`", "bytes 0 to 8 of 4"]),
        (raw(&header(&[good]), &[0; 9]), &["its tensors end", "download it again"]),
        (raw(&header(&[good, ("b", "F16", &[2], [4, 8])]), &[0; 8]), &["tensor `b` overlaps"]),
        (
            raw(&header(&[good, ("b", "F16", &[2], [12, 16])]), &[0; 16]),
            &["tensor `b` leaves a gap"],
        ),
        (
            raw(&header(&[("a", "F16", &[3], [0, 8])]), &[0; 8]),
            &["tensor `a`", "needs 6 bytes and has 8"],
        ),
        (
            raw(&header(&[("a", "F16", &[1 << 40, 1 << 40], [0, 8])]), &[0; 8]),
            &["more than 64 bits"],
        ),
        (raw(&header(&[("a", "F16", &[4], [8, 0])]), &[0; 8]), &["bytes 8 to 0"]),
        (raw(&header(&[good, ("a", "F16", &[4], [8, 16])]), &[0; 16]), &["tensor `a`", "twice"]),
        (raw(r#"{"a":{"shape":[1],"data_offsets":[0,1]}}"#, &[0]), &["no dtype"]),
        (raw(r#"{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}"#, &[0]), &["no shape"]),
        (raw(r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0]}}"#, &[0]), &["data_offsets"]),
    ];
    for (bytes, saying) in cases {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &[("config.json", b"{}"), ("model.safetensors", &bytes)]);
        refused(dir.path(), &[&["model.safetensors"], saying].concat());
    }
}

#[test]
fn a_damaged_or_hostile_index_is_one_clear_error() {
    let shard = safetensors(&[named("a", "U8", &[1], vec![1])]);
    let index = |map: Value| json!({ "weight_map": map }).to_string();
    const OUTSIDE: &str = "don't trust this checkpoint";
    let cases: Vec<(String, &[&str])> = vec![
        (
            index(json!({ "a": "x.safetensors", "b": "y.safetensors" })),
            &["1 of the 2 files", "y.safetensors"],
        ),
        (index(json!({ "a": "../x.safetensors" })), &["tensor `a`", OUTSIDE]),
        (index(json!({ "a": "/etc/passwd" })), &[OUTSIDE]),
        (index(json!({ "a": "sub/x.safetensors" })), &[OUTSIDE]),
        (index(json!({ "a": "c:\\x.safetensors" })), &[OUTSIDE]),
        (index(json!({ "a": "" })), &[OUTSIDE]),
        (index(json!({ "a": ".." })), &[OUTSIDE]),
        (index(json!({ "a": 1 })), &["names no file for tensor `a`"]),
        ("{}".into(), &["no `weight_map`"]),
        ("{".into(), &["is not JSON"]),
    ];
    for (index, saying) in cases {
        let outer = tempfile::tempdir().unwrap();
        let dir = outer.path().join("in");
        fs::create_dir_all(dir.join("sub")).unwrap();
        write(outer.path(), &[("x.safetensors", &shard)]);
        let files: [(&str, &[u8]); 4] = [
            ("config.json", b"{}"),
            ("x.safetensors", &shard),
            ("sub/x.safetensors", &shard),
            ("model.safetensors.index.json", index.as_bytes()),
        ];
        write(&dir, &files);
        refused(&dir, &[&["model.safetensors.index.json"], saying].concat());
    }
}

#[test]
fn a_folder_without_a_checkpoint_says_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    refused(dir.path(), &["no config.json"]);
    write(dir.path(), &[("model-Q4.gguf", b"GGUF")]);
    refused(dir.path(), &["name the file inside it, such as model-Q4.gguf"]);
    write(dir.path(), &[("config.json", b"{}")]);
    refused(dir.path(), &["neither model.safetensors nor"]);
    let shard = safetensors(&[named("a", "U8", &[1], vec![1])]);
    write(dir.path(), &[("other.safetensors", &shard)]);
    refused(dir.path(), &["name a file inside it, such as other.safetensors"]);
    assert!(Checkpoint::open(&dir.path().join("other.safetensors")).is_ok());
    // The same tensor in two files: loaders differ in which they take.
    let index = json!({ "weight_map": { "a": "other.safetensors", "b": "second.safetensors" } })
        .to_string();
    let second = safetensors(&[named("a", "U8", &[1], vec![1]), named("b", "U8", &[1], vec![1])]);
    write(
        dir.path(),
        &[("second.safetensors", &second), ("model.safetensors.index.json", index.as_bytes())],
    );
    refused(dir.path(), &["tensor `a` is also in"]);
}

/// The spec that a configuration gives. Its folder holds no more than an embedding.
fn spec(config: Value) -> Result<Spec, String> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let embedding = named("model.embed_tokens.weight", "F16", &[1, 1], vec![0; 2]);
    write_weights(dir.path(), &[embedding], 1);
    Spec::from_config(&Folder::open(dir.path()).unwrap()).map_err(|e| e.to_string())
}

fn plain() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 1,
        "max_position_embeddings": 8192,
    })
}

fn with(more: Value) -> Value {
    let mut config = plain();
    more.as_object().unwrap().iter().for_each(|(k, v)| config[k] = v.clone());
    config
}

#[test]
fn every_dialect_of_a_configuration_means_the_same() {
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    });
    let old = spec(with(json!({ "rope_theta": 5e5, "rope_scaling": llama3 }))).unwrap();
    let mut both = llama3.clone();
    both["rope_theta"] = 5e5.into();
    let new = spec(with(json!({ "rope_parameters": both }))).unwrap();
    let nested = spec(
        json!({ "model_type": "llava", "text_config": with(json!({ "rope_parameters": both })) }),
    )
    .unwrap();
    let reference = format!("{old:?}");
    assert_eq!(format!("{new:?}"), reference);
    assert_eq!(format!("{nested:?}"), reference);
    assert_eq!((old.rope.theta, old.blocks[0].head_dim, old.arch.as_str()), (5e5, 16, "llama"));
    assert!(old.rope.factors.unwrap()[7] == 8.0);
    let older = spec(with(json!({ "rope_scaling": { "type": "linear", "factor": 4.0 } }))).unwrap();
    assert_eq!((older.rope.scale, older.rope.theta), (0.25, 10000.0));
    let dim =
        spec(with(json!({ "model_type": "mistral", "head_dim": 32, "sliding_window": 4096 })))
            .unwrap();
    assert_eq!((dim.blocks[0].head_dim, dim.context, dim.arch.as_str()), (32, 4096, "llama"));
    assert_eq!(
        spec(with(json!({ "sliding_window": 4096, "model_type": "qwen2" }))).unwrap().context,
        8192
    );
    assert!(spec(with(json!({ "tie_word_embeddings": true }))).unwrap().tied && !old.tied);
}

#[test]
fn what_a_configuration_leaves_out_is_as_its_class_has_it() {
    // All that Gemma 3 4B's file says of its text model.
    let text = json!({
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
        "num_hidden_layers": 34, "rope_scaling": { "factor": 8.0, "rope_type": "linear" },
        "sliding_window": 1024,
    });
    let s = spec(json!({ "model_type": "gemma3", "text_config": text })).unwrap();
    assert_eq!(
        (s.heads, s.blocks[0].kv_heads, s.blocks[0].head_dim, s.vocab, s.tied),
        (8, 4, 256, 262_208, true)
    );
    let local = s.local_rope.as_ref().unwrap();
    assert_eq!((s.rope.theta, s.rope.scale, local.theta, local.scale), (1e6, 0.125, 1e4, 1.0));
    let sees_all = (0..34).filter(|&l| s.blocks[l].window.is_none()).collect::<Vec<_>>();
    assert_eq!(sees_all, [5, 11, 17, 23, 29]);
    assert_eq!(s.blocks[0].window, Some(1024));
    assert_eq!((s.scales.embedding, s.scales.attention), (2560f32.sqrt(), 0.0625));
    // Phi-3's older name of its rope, and the context that its short factors are for.
    let (short, long) = (vec![1.5; 8], vec![9.0; 8]);
    let factors = json!({ "type": "su", "short_factor": short, "long_factor": long });
    let phi = spec(with(json!({
        "model_type": "phi3", "max_position_embeddings": 131_072, "rope_scaling": factors,
    })))
    .unwrap();
    assert_eq!((phi.context, phi.rope.factors.as_ref().unwrap()[7]), (4096, 1.5));
    assert!((phi.rope.magnitude - (1.0f32 + 32f32.ln() / 4096f32.ln()).sqrt()).abs() < 1e-6);
    // Granite's factors default to 1, and so does that of attention.
    let granite = spec(with(json!({ "model_type": "granite", "logits_scaling": 4.0 }))).unwrap();
    assert_eq!((granite.scales.attention, granite.scales.logits), (1.0, 0.25));
}

#[test]
fn a_configuration_that_cannot_be_run_is_an_error() {
    for (config, saying) in [
        (with(json!({ "model_type": "mamba" })), "supported: llama, mistral"),
        (with(json!({ "hidden_act": "gelu" })), "hidden_act gelu"),
        (
            with(json!({ "rope_scaling": { "rope_type": "ntk", "factor": 4.0 } })),
            "\"ntk\" can't be run",
        ),
        (
            with(json!({ "model_type": "gpt_oss", "swiglu_limit": 5.0 })),
            "swiglu_limit 5 can't be run",
        ),
        (with(glm(json!({ "n_group": 8 }))), "in 8 groups can't be run"),
        (with(glm(json!({ "routed_scaling_factor": -1.0 }))), "a factor of -1 make no sense"),
        (with(glm(json!({ "moe_intermediate_size": 0 }))), "`moe_intermediate_size` is 0"),
        (with(json!({ "model_type": "deepseek_v3" })), "deepseek_v3 can't be run: it has latent"),
        (with(json!({ "model_type": "exaone4", "layer_types": ["chunked"] })), "fewer elements"),
        (
            with(json!({ "model_type": "exaone4", "layer_types": ["full_attention", "chunked"] })),
            "layer_types names chunked",
        ),
        (
            with(json!({
                "model_type": "phi3", "rope_scaling": { "type": "su", "short_factor": [1.0] },
            })),
            "`short_factor` must hold 8",
        ),
        (
            with(json!({ "model_type": "gemma2", "use_bidirectional_attention": true })),
            "later tokens",
        ),
        (with(json!({ "rope_scaling": { "rope_type": "linear" } })), "`factor`"),
        (with(json!({ "hidden_size": -1 })), "`hidden_size` is -1"),
        (with(json!({ "num_hidden_layers": 1u64 << 40 })), "num_hidden_layers"),
        (with(json!({ "num_key_value_heads": 3 })), "make no sense"),
        (with(json!({ "rope_theta": -1.0 })), "makes no sense"),
        (json!([]), "model_type missing"),
    ] {
        let e = spec(config).unwrap_err();
        assert!(e.contains(saying), "`{e}` should say `{saying}`");
    }
}

/// A random model as a folder with weights in two files.
fn random(dir: &Path, name: &str, kind: &str, rope: Value) -> PathBuf {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/forward");
    let file = refusal_patch::checkpoint::Gguf::open(&data.join(format!("{name}.gguf"))).unwrap();
    let folder = dir.join(name);
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("config.json"), config_of(&file, kind, rope).to_string()).unwrap();
    write_weights(&folder, &tensors_of(&file, Encoding::F32), 2);
    folder
}

#[test]
fn every_architecture_agrees_with_transformers() {
    let dir = tempfile::tempdir().unwrap();
    let llama3 = json!({
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 512,
    });
    for (name, kind, rope) in [
        ("llama3", "llama", json!({ "rope_parameters": llama3 })),
        ("llama-linear", "llama", json!({ "rope_scaling": { "type": "linear", "factor": 2.0 } })),
        ("mistral", "mistral", json!({})),
        ("qwen2", "qwen2", json!({})),
        ("qwen3", "qwen3", json!({})),
    ] {
        let model = Model::open(&random(dir.path(), name, kind, rope)).unwrap();
        let worst = against_transformers(&model, name);
        assert!(worst < 1e-3, "{name}: {worst}");
    }
}

/// A random model with experts as a folder, its experts apart or stacked.
fn with_experts(dir: &Path, name: &str, kind: &str, stack: bool, more: Value) -> PathBuf {
    let folder = random(dir, name, kind, more);
    if stack {
        let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/forward");
        let file =
            refusal_patch::checkpoint::Gguf::open(&data.join(format!("{name}.gguf"))).unwrap();
        write_weights(&folder, &stacked(tensors_of(&file, Encoding::F32)), 1);
    }
    folder
}

#[test]
fn experts_apart_or_stacked_agree_with_transformers() {
    for (name, kind) in
        [("mixtral", "mixtral"), ("qwen2moe", "qwen2_moe"), ("qwen3moe", "qwen3_moe")]
    {
        for stack in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let model =
                Model::open(&with_experts(dir.path(), name, kind, stack, json!({}))).unwrap();
            let parts = model.parts(1, Writer::Experts).unwrap();
            assert_eq!(parts.len() == 1, stack, "{name}");
            let worst = against_transformers(&model, name);
            assert!(worst < 1e-4, "{name}: {worst}");
        }
    }
}

#[test]
fn experts_that_do_not_fit_the_configuration_are_one_clear_error() {
    let refused = |stack: bool, more: Value, saying: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        let folder = with_experts(dir.path(), "qwen2moe", "qwen2_moe", stack, more);
        let e = Model::open(&folder).map(drop).unwrap_err().to_string();
        assert!(saying.iter().all(|s| e.contains(s)) && e.lines().count() == 1, "{e}");
    };
    refused(true, json!({ "num_experts": 1u64 << 31 }), &["`num_experts` is 2147483648"]);
    refused(
        false,
        json!({ "num_experts": (1u64 << 31) - 1 }),
        &["mlp.gate.weight is 6 x 64", "2147483647 x 64"],
    );
    refused(true, json!({ "num_experts_per_tok": 7 }), &["7 of 6 experts"]);
    refused(true, json!({ "num_experts_per_tok": null }), &["`num_experts_per_tok` is null"]);
    refused(
        false,
        json!({ "moe_intermediate_size": 41 }),
        &["experts.0.gate_proj.weight is 40 x 64", "41 x 64"],
    );
    refused(
        true,
        json!({ "moe_intermediate_size": 41 }),
        &["experts.gate_up_proj is 6 x 80 x 64", "6 x 82 x 64"],
    );
    refused(
        true,
        json!({ "shared_expert_intermediate_size": 9 }),
        &["shared_expert.gate_proj.weight is 72 x 64"],
    );
    refused(true, json!({ "mlp_only_layers": [1] }), &["layers.1.mlp.gate_proj.weight is missing"]);
}

fn glm(more: Value) -> Value {
    let mut all = json!({
        "model_type": "glm4_moe", "num_hidden_layers": 3, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_shared_experts": 2,
        "routed_scaling_factor": 2.5,
    });
    more.as_object().unwrap().iter().for_each(|(k, v)| all[k] = v.clone());
    all
}

#[test]
fn the_first_blocks_of_glm_have_no_experts_and_its_small_model_no_norms_of_queries() {
    let s = spec(with(glm(json!({})))).unwrap();
    let e = s.experts.as_ref().unwrap();
    assert_eq!((e.shared, e.scale, e.normalised, e.sigmoid), (16, 2.5, true, true));
    assert_eq!(s.qk_norm, QkNorm::None);
    assert_eq!(s.writers(0), [Writer::Attention, Writer::Ffn]);
    assert_eq!(s.writers(1), [Writer::Attention, Writer::Shared, Writer::Experts]);
    let other =
        spec(with(glm(json!({ "use_qk_norm": true, "first_k_dense_replace": 3 })))).unwrap();
    assert_eq!(other.qk_norm, QkNorm::Head);
    assert!((0..3).all(|layer| !other.is_sparse(layer)));
}

#[test]
fn blocks_without_experts_are_read_from_the_configuration() {
    let more = json!({
        "model_type": "qwen3_moe", "num_hidden_layers": 6, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 8, "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
    });
    let s = spec(with(more)).unwrap();
    assert_eq!((0..6).filter(|&l| s.is_sparse(l)).collect::<Vec<_>>(), [1, 5]);
    assert_eq!((s.writers(0), s.blocks[0].ffn), (&[Writer::Attention, Writer::Ffn][..], 96));
    assert_eq!(s.writers(1), [Writer::Attention, Writer::Experts]);
}

/// The largest difference from transformers' log-probabilities of its ten likeliest tokens, at
/// every position.
fn against_transformers(model: &Model, name: &str) -> f32 {
    let data =
        Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/data/forward/{name}.json"));
    let golden: Value = serde_json::from_slice(&fs::read(data).unwrap()).unwrap();
    let list = |v: &Value| v.as_array().unwrap().clone();
    let mut worst = 0.0f32;
    for (ids, expected) in list(&golden["sequences"]).iter().zip(list(&golden["transformers"])) {
        let tokens: Vec<u32> = list(ids).iter().map(|t| t.as_u64().unwrap() as u32).collect();
        let wanted: Vec<(usize, usize)> = (0..tokens.len()).map(|p| (0, p)).collect();
        let compute = Compute::cpu();
        let hidden = Runner::new(model, &compute, None, 1 << 30, &Silent)
            .run(&[tokens], &[], &wanted, &mut ())
            .unwrap();
        let expected: Vec<Vec<Value>> = list(&expected).iter().map(list).collect();
        let ids: Vec<Vec<u32>> = expected
            .iter()
            .map(|p| p.iter().map(|t| t[0].as_u64().unwrap() as u32).collect())
            .collect();
        let reads = Head::new(model, &compute).unwrap().read(&hidden, 1, |i| &ids[i]).unwrap();
        for (read, expected) in reads.iter().zip(&expected) {
            for (found, t) in read.asked.iter().zip(expected) {
                worst = worst.max((found - t[1].as_f64().unwrap() as f32).abs());
            }
        }
    }
    println!("{name}: {worst:.1e}");
    worst
}

#[test]
fn a_configuration_that_disagrees_with_the_shapes_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let folder = random(dir.path(), "qwen2", "qwen2", json!({ "intermediate_size": 77 }));
    let e = Model::open(&folder).map(drop).unwrap_err().to_string();
    assert!(e.contains("config.json asks for 77"), "{e}");
    let file = folder.join("config.json");
    let config = fs::read_to_string(&file)
        .unwrap()
        .replace("\"num_hidden_layers\":", "\"num_hidden_layers\":1");
    fs::write(&file, config).unwrap();
    let e = Model::open(&folder).map(drop).unwrap_err().to_string();
    assert!(e.contains("is missing") || e.contains("asks for 77"), "{e}");
}
