//! Reads the decoder's description from a Hugging Face `config.json`.

use serde_json::Value;

use super::block::{self, Block, Sizes, Turn};
use super::delta::DeltaNet;
use super::experts::Experts;
use super::rope;
use super::row::{Activation, Arch, QkNorm, Windows};
use super::spec::{PerLayer, Scales, Shape, Spec, WIDEST_HEAD};
use crate::checkpoint::Folder;
use crate::error::{Error, Result};

/// More blocks than any model has: a number without bound would size an allocation.
const MOST_BLOCKS: usize = 1 << 12;

impl Spec {
    /// Reads the description from `config.json`, or from its `text_config` if the model is
    /// multimodal.
    ///
    /// # Errors
    /// The decoder doesn't run the architecture, the activation or the rope scaling; a key is
    /// missing or makes no sense.
    pub fn from_config(folder: &Folder) -> Result<Spec> {
        let path = folder.dir().join("config.json").display().to_string();
        let kind = folder.text_config()["model_type"].as_str().unwrap_or("missing");
        let arch =
            Arch::of_model_type(kind).ok_or_else(|| Arch::unknown(&path, "model_type", kind))?;
        let c = &with_defaults(folder.text_config(), arch);
        let number = |key: &str| count(c, key);
        let need = |key: &str| needed(c, key, &path);
        let act = c["hidden_activation"].as_str().or(c["hidden_act"].as_str());
        let names = arch.activation.names();
        if let Some(act) = act.filter(|a| !names.contains(a)) {
            let what = format!("{path}: hidden_act {act} can't be run");
            return Err(Error::unsupported(what, format!("supported: {}", names[0])));
        }
        let bidirectional = &c["use_bidirectional_attention"];
        if *bidirectional == true || *bidirectional == "all" {
            let what = format!("{path}: attention to later tokens can't be run");
            return Err(Error::unsupported(
                what,
                "use a model that writes answers, not embeddings",
            ));
        }
        if !c["clip_qkv"].is_null() {
            let what = format!("{path}: clip_qkv {} can't be run", c["clip_qkv"]);
            return Err(Error::unsupported(what, "supported: null"));
        }
        // The only numbers that llama.cpp runs.
        for (key, expected) in [("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)] {
            let other = float(c, key, &path)?.filter(|x| *x != expected);
            if let Some(other) = other.filter(|_| arch.activation == Activation::ClampedSwiglu) {
                let what = format!("{path}: {key} {other} can't be run");
                return Err(Error::unsupported(what, format!("supported: {expected}")));
            }
        }
        let hidden = need("hidden_size")?;
        let heads = need("num_attention_heads")?;
        // The classes of these models default to as many key/value heads as query heads. For the
        // others, the file must give the number.
        let kv_heads = match kind {
            "llama" | "phi3" | "olmo2" | "olmo3" | "granite" | "minicpm" | "olmoe" => {
                number("num_key_value_heads").unwrap_or(heads)
            }
            _ => need("num_key_value_heads")?,
        };
        let head_dim = match (number("head_dim"), kind) {
            (Some(n), _) => n,
            (None, "qwen3") => 128,
            (None, _) => hidden / heads,
        };
        if heads % kv_heads != 0 || head_dim == 0 || head_dim % 2 != 0 || head_dim > WIDEST_HEAD {
            return Err(Error::Model(format!(
                "{path}: {heads} heads of {head_dim} with {kv_heads} key/value heads make no sense"
            )));
        }
        let norm_eps = float(c, "rms_norm_eps", &path)?.unwrap_or(1e-6) as f32;
        if !(norm_eps.is_finite() && norm_eps >= 0.0) {
            return Err(Error::Model(format!("{path}: rms_norm_eps {norm_eps} makes no sense")));
        }
        let layers = need("num_hidden_layers")?;
        if layers > MOST_BLOCKS {
            return Err(Error::Model(format!(
                "{path}: num_hidden_layers is {layers}; expected at most {MOST_BLOCKS}"
            )));
        }
        let experts = Experts::from_config(c, kind, &path)?;
        let dense =
            experts.as_ref().is_none_or(|e| e.every > 1 || e.first > 0 || !e.dense.is_empty());
        let dense = dense || experts.as_ref().is_some_and(|e| e.parallel);
        let ffn = if dense { need("intermediate_size")? } else { 0 };
        let mut blocks = windows(c, arch, layers, Sizes { head_dim, kv_heads, ffn }, &path)?;
        if arch.uneven_blocks {
            block::uneven_by_config(&mut blocks, c, &path)?;
        }
        block::check(&blocks, heads, &path)?;
        let global = block::turned(&blocks, Turn::Global, head_dim, &path)?;
        let rope = rope::from_config(c, &path, arch, global, "full_attention")?;
        let local_rope = match blocks.iter().any(|b| b.turn == Turn::Local) {
            true => {
                let width = block::turned(&blocks, Turn::Local, head_dim, &path)?;
                Some(rope::from_config(c, &path, arch, width, "sliding_attention")?)
            }
            false => None,
        };
        // A window in every block limits the context: a text within the window has full attention,
        // and a longer text is refused.
        let always = ["mistral", "mixtral", "phi3", "ministral3"].contains(&kind);
        let one_window =
            arch.windows == Windows::Uniform && (always || c["use_sliding_window"] == true);
        let window = number("sliding_window").filter(|_| one_window);
        let known = number("max_position_embeddings");
        let context = [known, window, rope.longest].into_iter().flatten().min().unwrap_or(0);
        let shape = Shape { layers, hidden, heads, head_dim };
        let tied = |v: &Value| v["tie_word_embeddings"].as_bool();
        // What a multimodal model's outer configuration says goes before the default of the text
        // model's class.
        let is_tied = tied(folder.text_config()).or(tied(folder.config())).or(tied(c));
        Ok(Spec {
            arch: arch.gguf.to_string(),
            layers,
            hidden,
            heads,
            blocks,
            experts,
            delta: match arch.delta_nets {
                true => Some(DeltaNet::from_config(c, &path, layers)?),
                false => None,
            },
            gated_attention: arch.gated_attention,
            vocab: need("vocab_size")?,
            norm_eps,
            norm_offset: if arch.norms_minus_one { 1.0 } else { 0.0 },
            norms: arch.norms,
            activation: arch.activation,
            fused_gate_up: arch.fused_gate_up,
            rope,
            local_rope,
            qk_norm: match kind {
                "glm4_moe" if c["use_qk_norm"] != true => QkNorm::None,
                _ => arch.qk_norm,
            },
            sinks: arch.sinks,
            value_norm: arch.value_norm,
            per_layer: if arch.per_layer { per_layer(c, kind, &path)? } else { None },
            output_scale: arch.output_scale,
            scales: scales(c, arch, &shape, &path)?,
            context,
            tied: is_tied.unwrap_or(false),
        })
    }
}

/// The configuration, completed with the defaults of the model's class in transformers.
fn with_defaults(c: &Value, arch: &Arch) -> Value {
    let mut all = c.clone();
    let defaults: Value = serde_json::from_str(arch.defaults).unwrap_or_default();
    for (key, value) in defaults.as_object().into_iter().flatten() {
        if c.get(key).is_none() {
            all[key] = value.clone();
        }
    }
    all
}

/// The per-layer embeddings of a model that has them.
fn per_layer(c: &Value, kind: &str, path: &str) -> Result<Option<PerLayer>> {
    let key = "hidden_size_per_layer_input";
    match c.get(key) {
        None if kind == "gemma4_unified_text" => return Ok(None),
        Some(Value::Null) => return Ok(None),
        Some(Value::Number(n)) if n.as_u64() == Some(0) => return Ok(None),
        _ => {}
    }
    let vocab = needed(c, "vocab_size_per_layer_input", path)?;
    Ok(Some(PerLayer { width: needed(c, key, path)?, vocab }))
}

/// The blocks, all of the same sizes.
fn windows(c: &Value, arch: &Arch, layers: usize, sizes: Sizes, path: &str) -> Result<Vec<Block>> {
    let Windows::AllBut(every) = arch.windows else {
        let mut all = block::blocks(arch, layers, sizes, None, |_| false, false);
        // Despite the name of the key, 1 stands for a block with rotary embedding and 0 for one
        // without.
        let listed = c["no_rope_layers"].as_array().filter(|_| arch.rope_free_every > 0);
        for (block, has_rope) in all.iter_mut().zip(listed.into_iter().flatten()) {
            block.turn = if *has_rope == 0 { Turn::Still } else { Turn::Global };
        }
        return Ok(all);
    };
    let window = count(c, "sliding_window");
    let every = c["sliding_window_pattern"].as_u64().map_or(every, |n| n as usize);
    let listed = c["layer_types"].as_array();
    if listed.is_some_and(|l| l.len() < layers) {
        return Err(Error::Model(format!(
            "{path}: `layer_types` has fewer elements than the {layers} blocks"
        )));
    }
    if let Some(other) = listed
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .find(|kind| !["full_attention", "sliding_attention"].contains(kind))
    {
        let what = format!("{path}: layer_types names {other}, which can't be run");
        return Err(Error::unsupported(what, "supported: full_attention, sliding_attention"));
    }
    let slides = |layer: usize| match listed {
        // Whatever the list says, transformers has the last block of Gemma 4 attend to all tokens.
        _ if arch.gguf == "gemma4" && layer + 1 == layers => false,
        Some(list) => list[layer] == "sliding_attention",
        None => every == 0 || !(layer + 1).is_multiple_of(every),
    };
    let kind = "sliding_attention";
    let has_own_rope = c["rope_parameters"][kind].is_object()
        || c["rope_local_base_freq"].is_number()
        || (arch.gguf == "olmo2" && c["rope_scaling"].is_object());
    Ok(block::blocks(arch, layers, sizes, window, slides, has_own_rope))
}

fn scales(c: &Value, arch: &Arch, shape: &Shape, path: &str) -> Result<Scales> {
    let mut scales = shape.scales(arch);
    // A factor or cap of 0 counts as missing.
    let nonzero = |key: &str| -> Result<Option<f32>> {
        Ok(float(c, key, path)?.filter(|v| *v != 0.0).map(|v| v as f32))
    };
    let query = nonzero("query_pre_attn_scalar")?.filter(|_| !arch.unscaled_attention);
    if let Some(query) = query {
        scales.attention = 1.0 / query.sqrt();
    }
    if arch.gguf == "granite" {
        let or_one = |key: &str| -> Result<f32> { Ok(nonzero(key)?.unwrap_or(1.0)) };
        scales.embedding = or_one("embedding_multiplier")?;
        scales.residual = or_one("residual_multiplier")?;
        scales.attention = or_one("attention_multiplier")?;
        scales.logits = 1.0 / or_one("logits_scaling")?;
    }
    if arch.gguf == "minicpm" {
        scales.embedding = nonzero("scale_emb")?.unwrap_or(1.0);
        scales.residual = nonzero("scale_depth")?.unwrap_or(1.0) / (shape.layers as f32).sqrt();
        // The width that the output matrix was tuned at.
        let base = needed(c, "dim_model_base", path)?;
        scales.logits = base as f32 / shape.hidden as f32;
    }
    scales.logit_cap = nonzero("final_logit_softcapping")?;
    // Gemma 3's class has this key but never reads it.
    scales.attention_cap = nonzero("attn_logit_softcapping")?.filter(|_| arch.gguf == "gemma2");
    scales.checked(path)
}

/// The positive whole number under a key (below 2^31); `None` if the key holds no such number.
pub(super) fn count(c: &Value, key: &str) -> Option<usize> {
    c[key].as_u64().filter(|&v| v > 0 && v < 1 << 31).map(|v| v as usize)
}

/// The positive whole number under a key that must exist.
///
/// # Errors
/// The key is missing, or holds no such number. A file may leave out a number that equals the
/// default of the model's class; this decoder doesn't know all of these defaults.
pub(super) fn needed(c: &Value, key: &str, path: &str) -> Result<usize> {
    let why = || match c.get(key) {
        None => {
            format!(
                "{path} leaves `{key}` out; add it, as the model's class in transformers has it"
            )
        }
        Some(found) => {
            format!("{path}: `{key}` is {found}, expected a positive whole number; correct it")
        }
    };
    count(c, key).ok_or_else(|| Error::Model(why()))
}

/// The number under a key; `None` if the key is missing or null.
///
/// # Errors
/// The key holds something other than a number.
pub(super) fn float(c: &Value, key: &str, path: &str) -> Result<Option<f64>> {
    let wrong = |found: &Value| {
        Error::Model(format!("{path}: `{key}` is {found}, expected a number; correct it"))
    };
    match &c[key] {
        Value::Null => Ok(None),
        found => found.as_f64().map(Some).ok_or_else(|| wrong(found)),
    }
}
