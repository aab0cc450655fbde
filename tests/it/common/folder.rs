//! Hugging Face folders for tests: written by hand, or made of the GGUF fixtures.

use std::path::{Path, PathBuf};

use refusal_patch::checkpoint::Gguf;
use refusal_patch::encoding::Encoding;
use serde_json::{json, Map, Value};

/// A tensor of a safetensors file.
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
        let info =
            json!({ "dtype": t.dtype, "shape": t.shape, "data_offsets": [begin, data.len()] });
        assert!(header.insert(t.name.clone(), info).is_none());
    }
    raw(&Value::Object(header).to_string(), &data)
}

/// Writes a folder's weights in `shards` files, with an index if there are several.
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

/// All files under a folder with their bytes.
pub fn contents(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => all.extend(contents(&path)),
            false => all.push((path.clone(), std::fs::read(&path).unwrap())),
        }
    }
    all.sort();
    all
}

/// The weights of a GGUF with the names and the order of rows of transformers, matrices in
/// `encoding`.
pub fn tensors_of(file: &Gguf, encoding: Encoding) -> Vec<Named> {
    let arch = file.arch().unwrap();
    let count = |key: &str| file.get_u32(&format!("{arch}.attention.{key}")).unwrap() as usize;
    let (heads, kv) = (count("head_count"), count("head_count_kv"));
    let mut out = Vec::new();
    for t in file.tensors() {
        let Some(name) = hugging_face(&t.name) else { continue };
        let mut values = vec![0.0f32; t.elements() as usize];
        Encoding::from_ggml(t.type_id).unwrap().decode(file.bytes(t), &mut values);
        let mut shape: Vec<usize> = t.dims.iter().rev().map(|&d| d as usize).collect();
        let name = if arch == "llama" { mixtral(&name) } else { name };
        if shape.len() == 3 {
            // Every expert is a module of its own.
            for (e, values) in values.chunks(shape[1] * shape[2]).enumerate() {
                let mut bytes = vec![0; encoding.bytes_for(values.len())];
                encoding.encode(values, &mut bytes);
                let name = name.replace(".experts.", &format!(".experts.{e}."));
                out.push(Named { name, dtype: encoding.name(), shape: shape[1..].to_vec(), bytes });
            }
            continue;
        }
        if name.ends_with("shared_expert_gate.weight") {
            shape.insert(0, 1);
        }
        // GGUF's llama pairs rope dimensions (2i, 2i + 1), Hugging Face (i, i + half).
        let heads = match (arch, t.name.rsplit('.').nth(1)) {
            ("llama", Some("attn_q")) => Some(heads),
            ("llama", Some("attn_k")) => Some(kv),
            _ => None,
        };
        if let Some(size) = heads.map(|n| shape[0] / n) {
            let (width, half) = (values.len() / shape[0], size / 2);
            let row = |r: usize| r / size * size + 2 * (r % size % half) + r % size / half;
            values =
                (0..shape[0]).flat_map(|r| values[row(r) * width..][..width].to_vec()).collect();
        }
        // Routers stay F32.
        let small = shape.len() == 1 || t.name.contains("ffn_gate_inp");
        let encoding = if small { Encoding::F32 } else { encoding };
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
        "ffn_gate_inp" => "mlp.gate",
        "ffn_gate_exps" => "mlp.experts.gate_proj",
        "ffn_up_exps" => "mlp.experts.up_proj",
        "ffn_down_exps" => "mlp.experts.down_proj",
        "ffn_gate_inp_shexp" => "mlp.shared_expert_gate",
        "ffn_gate_shexp" => "mlp.shared_expert.gate_proj",
        "ffn_up_shexp" => "mlp.shared_expert.up_proj",
        "ffn_down_shexp" => "mlp.shared_expert.down_proj",
        other => panic!("{other}"),
    };
    Some(format!("model.layers.{layer}.{module}.{end}"))
}

fn mixtral(name: &str) -> String {
    let name = if name.contains("mlp.gate.") {
        name.replace("mlp.gate.", "block_sparse_moe.gate.")
    } else {
        name.into()
    };
    let short = [("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")];
    match short.iter().find(|(long, _)| name.contains(&format!("mlp.experts.{long}"))) {
        Some((long, short)) => {
            name.replace("mlp.experts", "block_sparse_moe.experts").replace(long, short)
        }
        None => name,
    }
}

/// Stacks experts that are modules of their own, as transformers 5 does: one parameter for gate and
/// up of all experts, one for down.
pub fn stacked(tensors: Vec<Named>) -> Vec<Named> {
    let mut out: Vec<Named> = Vec::new();
    let mut groups: Vec<(String, Vec<Named>)> = Vec::new();
    for t in tensors {
        match t.name.split_once(".experts.") {
            Some((block, _)) => match groups.iter_mut().find(|(b, _)| b == block) {
                Some((_, group)) => group.push(t),
                None => groups.push((block.into(), vec![t])),
            },
            None => out.push(t),
        }
    }
    for (block, group) in groups {
        let of = |ends: [&str; 2]| -> Vec<&Named> {
            group
                .iter()
                .filter(|t| ends.iter().any(|e| t.name.ends_with(&format!(".{e}.weight"))))
                .collect()
        };
        let (gate, up, down) =
            (of(["gate_proj", "w1"]), of(["up_proj", "w3"]), of(["down_proj", "w2"]));
        let both = gate
            .iter()
            .zip(&up)
            .flat_map(|(g, u)| [&g.bytes[..], &u.bytes])
            .collect::<Vec<_>>()
            .concat();
        let block = block.replace("block_sparse_moe", "mlp");
        let (n, [rows, cols]) = (gate.len(), [gate[0].shape[0], gate[0].shape[1]]);
        out.push(named(
            &format!("{block}.experts.gate_up_proj"),
            gate[0].dtype,
            &[n, 2 * rows, cols],
            both,
        ));
        let all = down.iter().flat_map(|t| t.bytes.clone()).collect();
        out.push(named(
            &format!("{block}.experts.down_proj"),
            gate[0].dtype,
            &[n, cols, rows],
            all,
        ));
    }
    out.iter_mut().for_each(|t| t.name = t.name.replace("block_sparse_moe", "mlp"));
    out
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
    let experts = |key: &str| file.get_u32(&format!("{arch}.expert_{key}"));
    if let (Some(count), Some(used)) = (experts("count"), experts("used_count")) {
        config[if arch == "llama" { "num_local_experts" } else { "num_experts" }] = count.into();
        config["num_experts_per_tok"] = used.into();
        config["norm_topk_prob"] = (arch == "qwen3moe").into();
        for (name, key) in
            [("moe", "feed_forward_length"), ("shared_expert", "shared_feed_forward_length")]
        {
            if let Some(n) = experts(key) {
                config[format!("{name}_intermediate_size")] = n.into();
            }
        }
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
    let file =
        Gguf::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(gguf)).unwrap();
    let folder = dir.join("in");
    std::fs::create_dir(&folder).unwrap();
    organism_files(&folder);
    write_weights(&folder, &tensors_of(&file, encoding), shards);
    folder
}

/// Writes small files into a folder.
pub fn write(dir: &Path, files: &[(&str, &[u8])]) {
    for (name, bytes) in files {
        std::fs::write(dir.join(name), bytes).unwrap();
    }
}
