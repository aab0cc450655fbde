//! The decoder's description from a Hugging Face `config.json`.

use serde_json::Value;

use super::experts::Experts;
use super::rope::{self, Rope};
use super::row::{Arch, Windows};
use super::spec::{self, Attends, Scales, Shape, Spec, Turn, WIDEST_HEAD};
use crate::checkpoint::Folder;
use crate::error::{Error, Result};

impl Spec {
    /// Reads the description from `config.json`; of a multimodal model from its `text_config`.
    ///
    /// # Errors
    /// An architecture, an activation or a rope scaling that the decoder does not run; a key that
    /// is missing or makes no sense.
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
        if c["use_bidirectional_attention"] == true {
            let what = format!("{path}: attention to later tokens can't be run");
            return Err(Error::unsupported(
                what,
                "use a model that writes answers, not embeddings",
            ));
        }
        let hidden = need("hidden_size")?;
        let heads = need("num_attention_heads")?;
        // Of these architectures only some have as many key/value heads as heads when the file
        // doesn't say.
        let kv_heads = match kind {
            "llama" | "phi3" | "olmo2" | "olmo3" | "granite" => {
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
        let rope = rope::from_config(c, &path, arch, head_dim, "full_attention")?;
        // Shorter texts than the window see all of it; longer ones are refused.
        let always = ["mistral", "mixtral", "phi3", "ministral3"].contains(&kind);
        let one_window =
            arch.windows == Windows::Uniform && (always || c["use_sliding_window"] == true);
        let window = number("sliding_window").filter(|_| one_window);
        let known = number("max_position_embeddings");
        let context = [known, window, rope.longest].into_iter().flatten().min().unwrap_or(0);
        if !(norm_eps.is_finite() && norm_eps >= 0.0) {
            return Err(Error::Model(format!("{path}: rms_norm_eps {norm_eps} makes no sense")));
        }
        let layers = need("num_hidden_layers")?;
        let tensors = folder.tensors().len();
        if layers > tensors {
            return Err(Error::Model(format!(
                "{path}: {layers} blocks, but the checkpoint has {tensors} tensors in all"
            )));
        }
        let experts = Experts::from_config(c, kind, &path)?;
        let dense = experts.as_ref().is_none_or(|e| e.every > 1 || !e.dense.is_empty());
        let (attends, local_rope) = windows(c, arch, layers, head_dim, &path)?;
        let shape = Shape { layers, hidden, heads, head_dim };
        let tied = |v: &Value| v["tie_word_embeddings"].as_bool();
        // A wrapper's own word goes before the default of the text model's class.
        let said = tied(folder.text_config()).or(tied(folder.config())).or(tied(c));
        Ok(Spec {
            arch: arch.gguf.to_string(),
            layers,
            hidden,
            heads,
            kv_heads,
            head_dim,
            ffn: if dense { need("intermediate_size")? } else { 0 },
            experts,
            vocab: need("vocab_size")?,
            norm_eps,
            norm_offset: if arch.norms_minus_one { 1.0 } else { 0.0 },
            norms: arch.norms,
            activation: arch.activation,
            fused_gate_up: arch.fused_gate_up,
            rope,
            local_rope,
            attends,
            qk_norm: arch.qk_norm,
            scales: scales(c, arch, &shape, &path)?,
            context,
            tied: said.unwrap_or(false),
        })
    }
}

/// The configuration, with what the model's class takes for keys that are left out.
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

/// Windows, and the rotary embedding of the blocks that have one.
fn windows(
    c: &Value,
    arch: &Arch,
    layers: usize,
    head_dim: usize,
    path: &str,
) -> Result<(Vec<Attends>, Option<Rope>)> {
    let Windows::AllBut(every) = arch.windows else {
        let mut all = spec::attends(arch, layers, None, |_| false, false);
        // The list of blocks that rotate, where a file has one.
        let listed = c["no_rope_layers"].as_array().filter(|_| arch.rope_free_every > 0);
        for (block, turns) in all.iter_mut().zip(listed.into_iter().flatten()) {
            block.turn = if *turns == 0 { Turn::Still } else { Turn::Global };
        }
        return Ok((all, None));
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
        Some(list) => list[layer] == "sliding_attention",
        None => every == 0 || !(layer + 1).is_multiple_of(every),
    };
    let kind = "sliding_attention";
    let own = c["rope_parameters"][kind].is_object()
        || c["rope_local_base_freq"].is_number()
        || (arch.gguf == "olmo2" && c["rope_scaling"].is_object());
    let local = match window {
        Some(_) if own => Some(rope::from_config(c, path, arch, head_dim, kind)?),
        _ => None,
    };
    Ok((spec::attends(arch, layers, window, slides, local.is_some()), local))
}

fn scales(c: &Value, arch: &Arch, shape: &Shape, path: &str) -> Result<Scales> {
    let mut scales = shape.scales(arch);
    let cap = |key: &str| -> Result<Option<f32>> {
        Ok(float(c, key, path)?.filter(|v| *v != 0.0).map(|v| v as f32))
    };
    if let Some(query) = cap("query_pre_attn_scalar")? {
        scales.attention = 1.0 / query.sqrt();
    }
    if arch.gguf == "granite" {
        let or_one = |key: &str| -> Result<f32> { Ok(cap(key)?.unwrap_or(1.0)) };
        scales.embedding = or_one("embedding_multiplier")?;
        scales.residual = or_one("residual_multiplier")?;
        scales.attention = or_one("attention_multiplier")?;
        scales.logits = 1.0 / or_one("logits_scaling")?;
    }
    scales.logit_cap = cap("final_logit_softcapping")?;
    // Gemma 3's class has the key and never reads it.
    scales.attention_cap = cap("attn_logit_softcapping")?.filter(|_| arch.gguf == "gemma2");
    scales.checked(path)
}

/// A positive whole number, where there is one.
pub(super) fn count(c: &Value, key: &str) -> Option<usize> {
    c[key].as_u64().filter(|&v| v > 0 && v < 1 << 31).map(|v| v as usize)
}

/// A positive whole number that must be there.
///
/// # Errors
/// It isn't: files may leave out what equals a library's default, and this decoder has no defaults
/// for widths.
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

/// A number, where the key is there.
///
/// # Errors
/// It is none.
pub(super) fn float(c: &Value, key: &str, path: &str) -> Result<Option<f64>> {
    let wrong = |found: &Value| {
        Error::Model(format!("{path}: `{key}` is {found}, expected a number; correct it"))
    };
    match &c[key] {
        Value::Null => Ok(None),
        found => found.as_f64().map(Some).ok_or_else(|| wrong(found)),
    }
}
