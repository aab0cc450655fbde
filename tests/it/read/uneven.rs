//! Blocks of different sizes and of shared keys and values, sound and hostile.

use std::fs;
use std::path::{Path, PathBuf};

use refusal_patch::arch::Role;
use refusal_patch::checkpoint::{Gguf, Value};
use refusal_patch::forward::{Compute, Runner};
use refusal_patch::model::Model;
use refusal_patch::output::{write, Added, Patch, Plan};
use refusal_patch::progress::Silent;
use serde_json::json;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/architectures").join(name)
}

/// The GGUF file with some changes.
fn changed(dir: &Path, name: &str, change: impl FnOnce(&mut Plan)) -> PathBuf {
    let source = Gguf::open(&fixture(name)).unwrap();
    let mut plan = Plan::new(&source);
    change(&mut plan);
    let out = dir.join("model.gguf");
    write(&plan, &out, true, &Silent).unwrap();
    out
}

#[track_caller]
fn says(path: &Path, words: &[&str]) {
    let message = Model::open(path).map(drop).expect_err("should be refused").to_string();
    for word in words.iter().chain(&[path.to_str().unwrap()]) {
        assert!(message.contains(word), "`{message}` should say `{word}`");
    }
    assert_eq!(message.lines().count(), 1);
}

fn states(model: &Model) -> Vec<f32> {
    let compute = Compute::cpu();
    let runner = Runner::new(model, &compute, None, 1 << 30, &Silent);
    runner.run(&[(1..20).collect()], &[], &[(0, 3), (0, 18)], &mut ()).unwrap()
}

#[test]
fn metadata_of_uneven_blocks_that_make_no_sense_are_one_clear_error() {
    let dir = tempfile::tempdir().unwrap();
    let cases: [(&str, Value, &[&str]); 11] = [
        ("attention.head_count_kv", Value::u32s(&[2, 2]), &["2 elements", "each of 5 blocks"]),
        ("attention.head_count_kv", Value::u32s(&[2, 2, 0, 2, 0]), &["0 key/value heads"]),
        ("attention.head_count_kv", Value::u32s(&[3, 2, 2, 2, 2]), &["3 key/value heads"]),
        // Block 3 reads those of block 1.
        ("attention.head_count_kv", Value::u32s(&[2, 4, 2, 2, 2]), &["last 2 of 5", "block 3"]),
        ("attention.shared_kv_layers", Value::u32s(&[u32::MAX]), &["none", "fits block 0"]),
        ("attention.shared_kv_layers", Value::u32s(&[3]), &["last 3 of 5 blocks", "fits block 2"]),
        ("attention.key_length_swa", Value::u32s(&[1 << 31]), &["wider or narrower than keys"]),
        ("feed_forward_length", Value::u32s(&[16, 16, 16, 16, 32]), &["blk.3.ffn", "16 x 16"]),
        (
            "embedding_length_per_layer_input",
            Value::u32s(&[u32::MAX]),
            &["blk.0.inp_gate", "4294967295"],
        ),
        ("rope.dimension_count_swa", Value::u32s(&[64]), &["rope over 64 of 8 dimensions"]),
        ("attention.sliding_window_pattern", Value::u32s(&[1; 4]), &["fewer elements than the 5"]),
    ];
    for (key, value, words) in cases {
        let key = format!("gemma4.{key}");
        says(&changed(dir.path(), "gemma4.gguf", |plan| plan.metadata.push((key, value))), words);
    }
    for bytes in [0.0f32, f32::NAN].map(f32::to_le_bytes) {
        let tensor = "blk.1.layer_output_scale.weight";
        let patch = Patch { tensor: tensor.into(), bytes: bytes.to_vec(), type_id: 0 };
        let path = changed(dir.path(), "gemma4.gguf", |plan| plan.patches.push(patch));
        says(&path, &[tensor, "expected one number other than 0"]);
    }
}

#[test]
fn keys_and_values_that_nothing_reads_may_lie_in_a_file() {
    // As in published files, whose last blocks have projections from training.
    let dir = tempfile::tempdir().unwrap();
    let bytes: Vec<u8> = [0.5f32; 256].into_iter().flat_map(f32::to_le_bytes).collect();
    let add = |plan: &mut Plan, layer: usize, name: &str, dims: Vec<u64>| {
        let n = 4 * dims.iter().product::<u64>() as usize;
        let (name, bytes) = (format!("blk.{layer}.{name}.weight"), bytes[..n].to_vec());
        plan.added.push(Added { name, dims, type_id: 0, bytes });
    };
    let path = changed(dir.path(), "gemma4.gguf", |plan| {
        add(plan, 3, "attn_k", vec![16, 16]);
        add(plan, 3, "attn_v", vec![16, 16]);
        add(plan, 3, "attn_k_norm", vec![8]);
    });
    let (plain, more) =
        (Model::open(&fixture("gemma4.gguf")).unwrap(), Model::open(&path).unwrap());
    assert_eq!((more.spec.blocks[3].shares, more.spec.blocks[4].shares), (Some(1), Some(2)));
    assert!(
        !more.spec.roles(3).contains(&Role::AttnK) && more.spec.roles(2).contains(&Role::AttnK)
    );
    assert_eq!(states(&more), states(&plain));
    // Queries, keys and values in one tensor have no place there.
    let path = changed(dir.path(), "gemma4.gguf", |plan| add(plan, 3, "attn_qkv", vec![16, 16]));
    says(&path, &["blk.3.attn_qkv.weight can't be applied"]);
}

#[test]
fn a_file_may_leave_out_the_factors_of_blocks_and_of_experts() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    // Renamed to what nothing reads.
    let mut bytes = fs::read(fixture("gemma4-moe.gguf")).unwrap();
    for (name, other) in [
        ("blk.1.layer_output_scale", "blk.9.layer_output_scale"),
        ("blk.0.ffn_down_exps.scale", "blk.9.ffn_down_exps.scale"),
    ] {
        let at = bytes.windows(name.len()).position(|w| w == name.as_bytes()).unwrap();
        bytes[at..at + name.len()].copy_from_slice(other.as_bytes());
    }
    fs::write(&path, bytes).unwrap();
    let (plain, less) =
        (Model::open(&fixture("gemma4-moe.gguf")).unwrap(), Model::open(&path).unwrap());
    assert!(less.output_scale(1).unwrap() == 1.0 && plain.output_scale(1).unwrap() != 1.0);
    assert_eq!(less.expert_scales(0).unwrap(), None);
    assert_eq!(plain.expert_scales(0).unwrap().unwrap().len(), 5);
    assert_ne!(states(&less), states(&plain));
}

#[test]
fn a_configuration_of_uneven_blocks_that_makes_no_sense_is_one_clear_error() {
    let dir = tempfile::tempdir().unwrap();
    let [wide, full] = [16, 12].map(|width| json!({ "head_dim": width }));
    let uneven = json!({ "0": wide, "2": full, "4": full });
    let cases: [(&str, &str, serde_json::Value, &[&str]); 12] = [
        ("gemma4", "per_layer_config", json!({ "9": {} }), &["`per_layer_config` has \"9\""]),
        ("gemma4", "per_layer_config", json!({ "2": { "head_dim": -1 } }), &["`head_dim` is -1"]),
        ("gemma4", "per_layer_config", uneven, &["of 16 and of 8"]),
        ("gemma4", "num_kv_shared_layers", json!(5), &["fits block 0"]),
        ("gemma4", "use_double_wide_mlp", json!(false), &["layers.3.mlp", "asks for 16 x 16"]),
        ("gemma4", "hidden_size_per_layer_input", json!("a"), &["`hidden_size_per_layer_input`"]),
        ("gemma4", "vocab_size_per_layer_input", json!(1 << 30), &["embed_tokens_per_layer"]),
        ("gemma4", "use_bidirectional_attention", json!("all"), &["later tokens"]),
        ("gemma4-moe", "global_head_dim", json!(8), &["self_attn", "asks for"]),
        ("gemma4-moe", "attention_k_eq_v", json!(false), &["self_attn", "asks for"]),
        ("gemma4-moe", "enable_moe_block", json!(false), &["layers.0.", "can't be applied"]),
        ("gemma4-moe", "num_experts", json!(4), &["asks for"]),
    ];
    for (name, key, value, words) in cases {
        let source = fixture(name);
        let text = fs::read(source.join("config.json")).unwrap();
        let mut config: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let wrapped = config["text_config"].is_object();
        let own = if wrapped { &mut config["text_config"] } else { &mut config };
        own[key] = value;
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let weights = dir.path().join("model.safetensors");
        fs::copy(source.join("model.safetensors"), weights).unwrap();
        says(dir.path(), words);
    }
}
