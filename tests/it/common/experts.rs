//! An organism with experts: each is the trained feed-forward layer with small changes. A random
//! router chooses among them.

use std::path::{Path, PathBuf};

use refusal_patch::checkpoint::{Gguf, Tensor};
use refusal_patch::encoding::{Encoding, Params};
use serde_json::{json, Value};

use super::folder;
use super::gguf::{header, info, u32_entry};
use super::organism::{ask, first};
use super::random::Random;

pub const COUNT: usize = 4;

struct New {
    name: String,
    dims: Vec<u64>,
    type_id: u32,
    bytes: Vec<u8>,
}

/// Writes `out`: the model `source` with four experts, of which two are used. The experts keep its
/// encodings and differ by a few codes, or with `f16` are F16 and differ by noise.
pub fn upcycled(source: &Path, out: PathBuf, f16: bool) -> PathBuf {
    let source = Gguf::open(source).unwrap();
    let mut entries: Vec<Vec<u8>> =
        source.metadata().iter().map(|e| source.raw(e.span.clone()).to_vec()).collect();
    entries.push(u32_entry("llama.expert_count", COUNT as u32));
    entries.push(u32_entry("llama.expert_used_count", 2));
    let mut tensors: Vec<New> = Vec::new();
    let mut random = Random(7);
    for t in source.tensors() {
        let role = ["ffn_gate", "ffn_up", "ffn_down"]
            .iter()
            .find(|r| t.name.ends_with(&format!(".{r}.weight")));
        let Some(role) = role else {
            let (type_id, bytes) = match t.dims.len() {
                2 if f16 => (1, as_f16(&source, t, |x| x)),
                _ => (t.type_id, source.bytes(t).to_vec()),
            };
            tensors.push(New { name: t.name.clone(), dims: t.dims.clone(), type_id, bytes });
            continue;
        };
        let mut bytes = Vec::new();
        for _ in 0..COUNT {
            bytes.extend(match f16 {
                true => as_f16(&source, t, |x| x * (1.0 + 0.05 * random.uniform())),
                false => moved(&source, t, &mut random),
            });
        }
        let dims = [&t.dims[..], &[COUNT as u64]].concat();
        let name = t.name.replace(role, &format!("{role}_exps"));
        tensors.push(New { name, dims, type_id: if f16 { 1 } else { t.type_id }, bytes });
        if *role == "ffn_gate" {
            let router: Vec<u8> = (0..t.dims[0] as usize * COUNT)
                .flat_map(|_| (0.15 * random.uniform()).to_le_bytes())
                .collect();
            let name = t.name.replace("ffn_gate", "ffn_gate_inp");
            tensors.push(New {
                name,
                dims: vec![t.dims[0], COUNT as u64],
                type_id: 0,
                bytes: router,
            });
        }
    }
    let mut file = header(3, tensors.len() as u64, entries.len() as u64);
    file.extend(entries.concat());
    let mut data = Vec::new();
    for t in &tensors {
        file.extend(info(t.name.as_bytes(), &t.dims, t.type_id, data.len() as u64));
        data.extend(&t.bytes);
        data.resize(data.len().next_multiple_of(32), 0);
    }
    file.resize(file.len().next_multiple_of(32), 0);
    file.extend(data);
    std::fs::write(&out, file).unwrap();
    out
}

fn as_f16(source: &Gguf, t: &Tensor, mut change: impl FnMut(f32) -> f32) -> Vec<u8> {
    let mut values = vec![0.0f32; t.elements() as usize];
    Encoding::from_ggml(t.type_id).unwrap().decode(source.bytes(t), &mut values);
    values.iter_mut().for_each(|x| *x = change(*x));
    let mut bytes = vec![0; 2 * values.len()];
    Encoding::F16.encode(&values, &mut bytes);
    bytes
}

/// A tensor's bytes with one code in fifty moved by a step.
fn moved(source: &Gguf, t: &Tensor, random: &mut Random) -> Vec<u8> {
    let encoding = Encoding::from_ggml(t.type_id).unwrap();
    let mut bytes = source.bytes(t).to_vec();
    let n = t.elements() as usize;
    let (mut codes, mut params) = (vec![0i32; n], vec![Params::default(); n]);
    encoding.unpack(&bytes, &mut codes, &mut params);
    let (low, high) = encoding.code_range();
    for code in &mut codes {
        let draw = random.next();
        if draw.is_multiple_of(50) {
            *code = (*code + if draw & 1024 == 0 { 1 } else { -1 }).clamp(low, high);
        }
    }
    encoding.pack(&mut bytes, &codes);
    bytes
}

/// Log-probabilities in llama.cpp of the tokens of some texts; `None` without the client.
pub fn logprobs(model: &Path, lora: Option<&Path>, texts: &Value, dir: &Path) -> Option<Vec<f64>> {
    let answer = ask(json!({ "model": model, "lora": lora, "forced": texts }), dir)?;
    let rows = answer["logprobs"].as_array().unwrap().iter().flat_map(|r| r.as_array().unwrap());
    Some(rows.map(|x| x.as_f64().unwrap()).collect())
}

/// An organism with experts as a Hugging Face folder, experts apart or stacked.
pub fn as_folder(dir: &Path, stack: bool) -> PathBuf {
    let file =
        Gguf::open(&upcycled(&first().file("broken-Q8_0"), dir.join("f16.gguf"), true)).unwrap();
    let input = dir.join("in");
    std::fs::create_dir(&input).unwrap();
    folder::organism_files(&input);
    let path = input.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let more = json!({
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"],
        "num_local_experts": COUNT, "num_experts_per_tok": 2, "sliding_window": null,
    });
    more.as_object().unwrap().iter().for_each(|(k, v)| config[k] = v.clone());
    std::fs::write(&path, config.to_string()).unwrap();
    let tensors = folder::tensors_of(&file, Encoding::BF16);
    folder::write_weights(&input, &if stack { folder::stacked(tensors) } else { tensors }, 1);
    input
}
