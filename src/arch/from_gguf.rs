//! Reads the decoder's description from GGUF metadata.

use super::block::{self, Block, Sizes, Turn};
use super::row::{Arch, QkNorm, Windows};
use super::spec::{PerLayer, Scales, Shape, Spec, WIDEST_HEAD};
use super::{rope, DeltaNet, Experts, Rope};
use crate::checkpoint::Gguf;
use crate::error::{Error, Result};

impl Spec {
    /// Reads the description from GGUF metadata. llama.cpp lists the keys in
    /// `gguf-py/gguf/constants.py`.
    ///
    /// # Errors
    /// The file isn't a model; the decoder doesn't run the architecture or the rope scaling; a key
    /// is missing or makes no sense.
    pub fn from_gguf(file: &Gguf) -> Result<Spec> {
        let path = file.path().display().to_string();
        refuse_companion(file)?;
        let name = file.arch()?;
        let arch = Arch::of_gguf(name).ok_or_else(|| Arch::unknown(&path, "architecture", name))?;
        let key = |k: &str| format!("{name}.{k}");
        let optional = |k: &str| number(file, &key(k));
        let need = |k: &str| {
            optional(k)?.filter(|&v| v > 0).ok_or_else(|| {
                Error::Model(format!(
                    "{path}: metadata key {} is missing or not a positive number",
                    key(k)
                ))
            })
        };
        let experts = Experts::from_gguf(file, name)?;
        let hidden = need("embedding_length")?;
        let heads = need("attention.head_count")?;
        let kv_heads = match arch.uneven_blocks {
            true => heads,
            false => optional("attention.head_count_kv")?.unwrap_or(heads),
        };
        let head_dim = optional("attention.key_length")?.unwrap_or(hidden / heads);
        if kv_heads == 0 || heads % kv_heads != 0 || head_dim == 0 || head_dim > WIDEST_HEAD {
            return Err(Error::Model(format!(
                "{path}: {heads} heads of {head_dim} with {kv_heads} key/value heads make no sense"
            )));
        }
        if optional("attention.value_length")?.is_some_and(|v| v != head_dim) {
            return Err(Error::unsupported(
                format!("{path}: values wider or narrower than keys"),
                "such models can't be run",
            ));
        }
        let embedding = file
            .tensor("token_embd.weight")
            .ok_or_else(|| Error::Model(format!("{path}: tensor token_embd.weight is missing")))?;
        let norm_eps = file.get_f32(&key("attention.layer_norm_rms_epsilon")).ok_or_else(|| {
            Error::Model(format!(
                "{path}: metadata key {} is missing",
                key("attention.layer_norm_rms_epsilon")
            ))
        })?;
        // The last blocks may be for multi-token prediction. They don't write to the residual
        // stream.
        let prediction = optional("nextn_predict_layers")?.unwrap_or(0);
        let layers = need("block_count")?.saturating_sub(prediction);
        if layers == 0 || layers > file.tensors().len() {
            return Err(Error::Model(format!(
                "{path}: {layers} blocks by the metadata, but the file has {} tensors in all",
                file.tensors().len()
            )));
        }
        if !(norm_eps.is_finite() && norm_eps >= 0.0) {
            return Err(Error::Model(format!("{path}: norm epsilon {norm_eps} makes no sense")));
        }
        let mut context = optional("context_length")?.unwrap_or(0);
        let rope = rope::from_gguf(file, arch, head_dim, context)?;
        if let Some(longest) = rope.longest {
            context = if context == 0 { longest } else { context.min(longest) };
        }
        let shape = Shape { layers, hidden, heads, head_dim };
        // In llama.cpp's files of most architectures all blocks have experts, or none, or all but
        // the first ones.
        let ffn = match experts.as_ref().is_some_and(|e| e.first == 0) || arch.uneven_blocks {
            true => 0,
            false => need("feed_forward_length")?,
        };
        let sizes = Sizes { head_dim, kv_heads, ffn };
        let (mut blocks, local_rope) = windows_of_gguf(file, arch, layers, sizes, &rope)?;
        if arch.uneven_blocks {
            block::uneven_by_gguf(&mut blocks, file, name)?;
        }
        block::check(&blocks, heads, &path)?;
        for (turn, rope) in [(Turn::Global, Some(&rope)), (Turn::Local, local_rope.as_ref())] {
            let width = block::turned(&blocks, turn, head_dim, &path)?;
            if let Some(dims) = rope.map(|r| r.dims).filter(|dims| *dims > width) {
                return Err(Error::Model(format!(
                    "{path}: rope over {dims} of {width} dimensions makes no sense"
                )));
            }
        }
        Ok(Spec {
            layers,
            hidden,
            heads,
            blocks,
            experts,
            delta: match arch.delta_nets {
                true => Some(DeltaNet::from_gguf(file, name, layers)?),
                false => None,
            },
            gated_attention: arch.gated_attention,
            vocab: embedding.dims.get(1).copied().unwrap_or(0) as usize,
            norm_eps,
            norm_offset: 0.0,
            norms: arch.norms,
            activation: arch.activation,
            fused_gate_up: arch.fused_gate_up,
            rope,
            local_rope,
            // The smaller of the two published models has no norms of queries and keys.
            qk_norm: match file.tensor("blk.0.attn_q_norm.weight") {
                None if arch.gguf == "glm4moe" => QkNorm::None,
                _ => arch.qk_norm,
            },
            sinks: arch.sinks,
            value_norm: arch.value_norm,
            per_layer: if arch.per_layer { per_layer(file, name)? } else { None },
            output_scale: arch.output_scale,
            scales: scales_of_gguf(file, arch, &shape)?,
            context,
            tied: file.tensor("output.weight").is_none(),
            arch: name.to_string(),
        })
    }
}

/// The per-layer embeddings of a model that has them.
fn per_layer(file: &Gguf, arch: &str) -> Result<Option<PerLayer>> {
    let width = number(file, &format!("{arch}.embedding_length_per_layer_input"))?;
    let table = "per_layer_token_embd.weight";
    let Some(width) = width.filter(|&width| width > 0) else { return Ok(None) };
    let found = file.tensor(table).ok_or_else(|| {
        Error::Model(format!("{}: tensor {table} is missing", file.path().display()))
    })?;
    Ok(Some(PerLayer { width, vocab: found.dims.get(1).copied().unwrap_or(0) as usize }))
}

/// The blocks, all of the same sizes, and the rotary embedding of blocks with windows, if they have
/// one of their own. llama.cpp decides both by architecture (`src/models/*.cpp`).
fn windows_of_gguf(
    file: &Gguf,
    arch: &Arch,
    layers: usize,
    sizes: Sizes,
    rope: &Rope,
) -> Result<(Vec<Block>, Option<Rope>)> {
    let key = |k: &str| format!("{}.{k}", arch.gguf);
    let Windows::AllBut(every) = arch.windows else {
        let mut all = block::blocks(arch, layers, sizes, None, |_| false, false);
        // In Granite's files this key switches rotary embedding off. In other files it doesn't.
        let off = file.get_bool(&key("rope.scaling.finetuned")) == Some(false);
        if off && arch.gguf == "granite" {
            all.iter_mut().for_each(|block| block.turn = Turn::Still);
        }
        return Ok((all, None));
    };
    let window = number(file, &key("attention.sliding_window"))?;
    let window = match arch.gguf {
        "gemma2" => Some(window.unwrap_or(4096)),
        // Only the 32B model, with 64 blocks, has windows. llama.cpp doesn't read the key for the
        // others.
        "exaone4" if layers == 64 => Some(window.unwrap_or(4096)),
        "exaone4" => None,
        _ => window,
    };
    let window = window.filter(|&w| w > 0);
    let pattern = key("attention.sliding_window_pattern");
    let listed = file.get_bools(&pattern).or_else(|| {
        let numbers = file.get_u32s(&pattern)?;
        Some(numbers.into_iter().map(|n| n != 0).collect())
    });
    if listed.as_ref().is_some_and(|l| l.len() < layers) {
        return Err(Error::Model(format!(
            "{}: metadata key {pattern} has fewer elements than the {layers} blocks",
            file.path().display()
        )));
    }
    let every = file.get_u32(&pattern).map_or(every, |v| v as usize);
    let slides = |layer: usize| match &listed {
        Some(list) => list[layer],
        None => every == 0 || !(layer + 1).is_multiple_of(every),
    };
    let base = file.get_f32(&key("rope.freq_base_swa"));
    let local = match arch.gguf {
        // The rotary embedding of blocks with windows is never scaled in these architectures.
        "gemma3" | "gemma4" | "olmo2" => {
            let own = if arch.gguf == "olmo2" { rope.theta } else { 10000.0 };
            let theta = base.unwrap_or(own);
            let dims = number(file, &key("rope.dimension_count_swa"))?.unwrap_or(rope.dims);
            if dims % 2 != 0 || dims > WIDEST_HEAD {
                return Err(Error::Model(format!(
                    "{}: rope over {dims} dimensions makes no sense",
                    file.path().display()
                )));
            }
            Some(Rope { theta, dims, scale: 1.0, factors: None, magnitude: 1.0, ..rope.clone() })
        }
        _ => base.map(|theta| Rope { theta, ..rope.clone() }),
    };
    let local = local.filter(|_| window.is_some());
    Ok((block::blocks(arch, layers, sizes, window, slides, local.is_some()), local))
}

fn scales_of_gguf(file: &Gguf, arch: &Arch, shape: &Shape) -> Result<Scales> {
    let number = |k: &str| file.get_f32(&format!("{}.{k}", arch.gguf));
    let mut scales = shape.scales(arch);
    let by_hidden = 1.0 / ((shape.hidden / shape.heads) as f32).sqrt();
    match (arch.gguf, shape.layers) {
        // The 27B models scale attention by hidden / heads, which isn't the width of a head.
        ("gemma2", 46) | ("gemma3", 62) => scales.attention = by_hidden,
        _ => {}
    }
    // A factor or cap of 0 counts as missing.
    let nonzero = |k: &str| number(k).filter(|c| *c != 0.0);
    match arch.gguf {
        "gemma2" => {
            let (attention, logits) = ("attn_logit_softcapping", "final_logit_softcapping");
            scales.attention_cap = Some(nonzero(attention).unwrap_or(50.0));
            scales.logit_cap = Some(nonzero(logits).unwrap_or(30.0));
        }
        "gemma3" | "gemma4" => scales.logit_cap = nonzero("final_logit_softcapping"),
        "minicpm" => {
            let need = |k: &str| {
                nonzero(k).ok_or_else(|| {
                    Error::Model(format!(
                        "{}: metadata key minicpm.{k} is missing; convert the model anew",
                        file.path().display()
                    ))
                })
            };
            scales.embedding = need("embedding_scale")?;
            scales.residual = need("residual_scale")?;
            scales.logits = 1.0 / need("logit_scale")?;
        }
        "granite" => {
            scales.embedding = nonzero("embedding_scale").unwrap_or(1.0);
            scales.residual = nonzero("residual_scale").unwrap_or(1.0);
            scales.attention = nonzero("attention.scale").unwrap_or(scales.attention);
            let logits = number("logit_scale").ok_or_else(|| {
                Error::Model(format!(
                    "{}: metadata key granite.logit_scale is missing",
                    file.path().display()
                ))
            })?;
            scales.logits = 1.0 / logits;
        }
        _ => {}
    }
    scales.checked(&file.path().display().to_string())
}

/// The whole number under a key; `None` if the key holds none. Files of pruned models hold an array
/// with one number for each block: its number, if all are equal.
///
/// # Errors
/// The numbers of the blocks differ.
pub(super) fn number(file: &Gguf, key: &str) -> Result<Option<usize>> {
    let Some(all) = file.get_u32s(key) else { return Ok(file.get_u32(key).map(|v| v as usize)) };
    match (all.iter().min(), all.iter().max()) {
        (Some(least), Some(most)) if least != most => Err(Error::unsupported(
            format!(
                "{}: metadata key {key} holds one number for each block, {least} to {most}; blocks \
                 of different sizes can't be run",
                file.path().display()
            ),
            "use a model whose blocks are alike",
        )),
        (least, _) => Ok(least.map(|&v| v as usize)),
    }
}

/// The whole number of each block under a key, which holds one for each or one for all; `None` if
/// the key holds none.
///
/// # Errors
/// There are fewer numbers than blocks.
pub(super) fn numbers(file: &Gguf, key: &str, layers: usize) -> Result<Option<Vec<usize>>> {
    let Some(all) = file.get_u32s(key) else {
        return Ok(file.get_u32(key).map(|v| vec![v as usize; layers]));
    };
    if all.len() < layers {
        return Err(Error::Model(format!(
            "{}: metadata key {key} has {} elements, expected one for each of {layers} blocks",
            file.path().display(),
            all.len()
        )));
    }
    Ok(Some(all.into_iter().take(layers).map(|v| v as usize).collect()))
}

/// Refuses a file that belongs to a model but isn't one: an adapter, a control vector, a projector
/// or an importance matrix.
fn refuse_companion(file: &Gguf) -> Result<()> {
    let kind = file.get_str("general.type").unwrap_or("model");
    let (what, hint) = match (kind, file.get_str("general.architecture")) {
        ("adapter", _) => {
            let kind = file.get_str("adapter.type").unwrap_or("lora");
            let kind = if kind == "lora" { "LoRA" } else { kind };
            (
                format!("a {kind} adapter"),
                "give the model that it is for; `eval` takes this file as its `sidecar`",
            )
        }
        (_, Some("controlvector")) => {
            let hint = "give the model that it is for; `eval` takes this file as its `sidecar`";
            ("a control vector".to_string(), hint)
        }
        ("mmproj" | "imatrix", _) => (format!("of the type {kind}"), "give the model's own file"),
        _ => return Ok(()),
    };
    Err(Error::unsupported(format!("{}: is {what}, not a model", file.path().display()), hint))
}
