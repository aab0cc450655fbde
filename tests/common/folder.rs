//! Hugging Face folders for tests: written by hand, or made of the GGUF fixtures.
#![allow(dead_code)] // Each test file uses its part.

use std::path::{Path, PathBuf};

use refusal_patch::checkpoint::Gguf;
use refusal_patch::encoding::Encoding;
use serde_json::{json, Map, Value};

/// A tensor as a header has it.
pub struct Named {
    pub name: String,
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

pub fn named(name: &str, dtype: &'static str, shape: &[usize], bytes: Vec<u8>) -> Named {
    Named { name: name.into(), dtype, shape: shape.to_vec(), bytes }
}

pub fn raw(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

pub fn safetensors(tensors: &[Named]) -> Vec<u8> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut data = Vec::new();
    for t in tensors {
        let begin = data.len();
        data.extend(&t.bytes);
        let info = json!({ "dtype": t.dtype, "shape": t.shape, "data_offsets": [begin, data.len()] });
        assert!(header.insert(t.name.clone(), info).is_none());
    }
    raw(&Value::Object(header).to_string(), &data)
}

/// Writes a folder's weights, in `shards` files with an index where there are several.
pub fn write_weights(dir: &Path, tensors: &[Named], shards: usize) {
    if shards == 1 {
        return std::fs::write(dir.join("model.safetensors"), safetensors(tensors)).unwrap();
    }
    let mut map = Map::new();
    for (i, part) in tensors.chunks(tensors.len().div_ceil(shards)).enumerate() {
        let file = format!("model-{:05}-of-{shards:05}.safetensors", i + 1);
        part.iter().for_each(|t| drop(map.insert(t.name.clone(), file.clone().into())));
        std::fs::write(dir.join(file), safetensors(part)).unwrap();
    }
    let index = json!({ "metadata": { "total_size": 0 }, "weight_map": map });
    std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

/// The weights of a GGUF under the names and in the order of rows that transformers has, matrices as `encoding`.
pub fn tensors_of(file: &Gguf, encoding: Encoding) -> Vec<Named> {
    let arch = file.arch().unwrap();
    let count = |key: &str| file.get_u32(&format!("{arch}.attention.{key}")).unwrap() as usize;
    let (heads, kv) = (count("head_count"), count("head_count_kv"));
    let mut out = Vec::new();
    for t in file.tensors() {
        let Some(name) = hugging_face(&t.name) else { continue };
        let mut values = vec![0.0f32; t.elements() as usize];
        Encoding::from_ggml(t.type_id).unwrap().decode(file.bytes(t), &mut values);
        let shape: Vec<usize> = t.dims.iter().rev().map(|&d| d as usize).collect();
        // GGUF's llama pairs rope dimensions (2i, 2i + 1), Hugging Face (i, i + half).
        let heads = match (arch, t.name.rsplit('.').nth(1)) {
            ("llama", Some("attn_q")) => Some(heads),
            ("llama", Some("attn_k")) => Some(kv),
            _ => None,
        };
        if let Some(size) = heads.map(|n| shape[0] / n) {
            let (width, half) = (values.len() / shape[0], size / 2);
            let row = |r: usize| r / size * size + 2 * (r % size % half) + r % size / half;
            values = (0..shape[0]).flat_map(|r| values[row(r) * width..][..width].to_vec()).collect();
        }
        let encoding = if shape.len() == 1 { Encoding::F32 } else { encoding };
        let mut bytes = vec![0; encoding.bytes_for(values.len())];
        encoding.encode(&values, &mut bytes);
        out.push(Named { name, dtype: encoding.name(), shape, bytes });
    }
    out
}

fn hugging_face(name: &str) -> Option<String> {
    match name {
        "token_embd.weight" => return Some("model.embed_tokens.weight".into()),
        "output_norm.weight" => return Some("model.norm.weight".into()),
        "output.weight" => return Some("lm_head.weight".into()),
        _ => {}
    }
    let mut parts = name.strip_prefix("blk.")?.split('.');
    let (layer, role, end) = (parts.next()?, parts.next()?, parts.next()?);
    let module = match role {
        "attn_norm" => "input_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "attn_output" => "self_attn.o_proj",
        "ffn_norm" => "post_attention_layernorm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        other => panic!("{other}"),
    };
    Some(format!("model.layers.{layer}.{module}.{end}"))
}

/// `config.json` of a GGUF's model; `more` adds keys.
pub fn config_of(file: &Gguf, kind: &str, more: Value) -> Value {
    let arch = file.arch().unwrap();
    let n = |key: &str| file.get_u32(&format!("{arch}.{key}")).unwrap();
    let mut config = json!({
        "model_type": kind,
        "hidden_size": n("embedding_length"),
        "intermediate_size": n("feed_forward_length"),
        "num_hidden_layers": n("block_count"),
        "num_attention_heads": n("attention.head_count"),
        "num_key_value_heads": n("attention.head_count_kv"),
        "rms_norm_eps": file.get_f32(&format!("{arch}.attention.layer_norm_rms_epsilon")).unwrap(),
        "max_position_embeddings": n("context_length"),
        "vocab_size": file.tensor("token_embd.weight").unwrap().dims[1],
        "tie_word_embeddings": file.tensor("output.weight").is_none(),
        "hidden_act": "silu",
    });
    if let Some(dim) = file.get_u32(&format!("{arch}.attention.key_length")) {
        config["head_dim"] = dim.into();
    }
    if let Some(theta) = file.get_f32(&format!("{arch}.rope.freq_base")) {
        config["rope_theta"] = theta.into();
    }
    more.as_object().unwrap().iter().for_each(|(k, v)| config[k] = v.clone());
    config
}

/// Tokenizer, template and configuration of the organism, without weights.
pub fn organism_files(dir: &Path) {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/organism-hf");
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.join(path.file_name().unwrap())).unwrap();
    }
}

/// An organism of `fixtures/` as a folder `DIR/in`.
pub fn organism(dir: &Path, gguf: &str, encoding: Encoding, shards: usize) -> PathBuf {
    let file = Gguf::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(gguf)).unwrap();
    let folder = dir.join("in");
    std::fs::create_dir(&folder).unwrap();
    organism_files(&folder);
    write_weights(&folder, &tensors_of(&file, encoding), shards);
    folder
}
