//! The decoder's description from a Hugging Face `config.json`.

use std::f64::consts::TAU;

use serde_json::Value;

use super::experts::Experts;
use super::spec::{Rope, RopeStyle, Spec};
use crate::checkpoint::Folder;
use crate::error::{Error, Result};

/// Values of `model_type` that the decoder runs, with the architecture's name in GGUF.
const SUPPORTED: [(&str, &str); 7] = [
    ("llama", "llama"),
    ("mistral", "llama"),
    ("qwen2", "qwen2"),
    ("qwen3", "qwen3"),
    ("mixtral", "llama"),
    ("qwen2_moe", "qwen2moe"),
    ("qwen3_moe", "qwen3moe"),
];

impl Spec {
    /// Reads the description from `config.json`; of a multimodal model from its `text_config`.
    ///
    /// # Errors
    /// An architecture, an activation or a rope scaling that the decoder does not run; a key that is missing or makes no sense.
    pub fn from_config(folder: &Folder) -> Result<Spec> {
        let c = folder.text_config();
        let path = folder.dir().join("config.json").display().to_string();
        let kind = c["model_type"].as_str().unwrap_or("missing");
        let Some((_, arch)) = SUPPORTED.iter().find(|(k, _)| *k == kind) else {
            return Err(Error::unsupported(
                format!("{path}: model_type {kind} can't be run"),
                format!("supported: {}", SUPPORTED.map(|s| s.0).join(", ")),
            ));
        };
        let number = |key: &str| count(c, key);
        let need = |key: &str| needed(c, key, &path);
        let act = c["hidden_act"].as_str().unwrap_or("silu");
        if act != "silu" {
            let what = format!("{path}: hidden_act {act} can't be run");
            return Err(Error::unsupported(what, "supported: silu"));
        }
        let hidden = need("hidden_size")?;
        let heads = need("num_attention_heads")?;
        // Of these architectures only llama has as many key/value heads as heads when the file doesn't say.
        let kv_heads = match kind {
            "llama" => number("num_key_value_heads").unwrap_or(heads),
            _ => need("num_key_value_heads")?,
        };
        let head_dim = match (number("head_dim"), kind) {
            (Some(n), _) => n,
            (None, "qwen3") => 128,
            (None, _) => hidden / heads,
        };
        if heads % kv_heads != 0 || head_dim == 0 || head_dim % 2 != 0 {
            return Err(Error::Model(format!(
                "{path}: {heads} heads of {head_dim} with {kv_heads} key/value heads make no sense"
            )));
        }
        let norm_eps = float(c, "rms_norm_eps", &path)?.unwrap_or(1e-6) as f32;
        let mut context = number("max_position_embeddings").unwrap_or(0);
        // Shorter texts than the window see all of it; longer ones are refused.
        let always = ["mistral", "mixtral"].contains(&kind);
        let window = number("sliding_window").filter(|_| always || c["use_sliding_window"] == true);
        if let Some(window) = window {
            context = if context == 0 { window } else { context.min(window) };
        }
        let rope = rope(c, &path, head_dim)?;
        if !(norm_eps.is_finite() && norm_eps >= 0.0) {
            return Err(Error::Model(format!("{path}: rms_norm_eps {norm_eps} makes no sense")));
        }
        let layers = need("num_hidden_layers")?;
        let experts = Experts::from_config(c, kind, &path)?;
        let dense = experts.as_ref().is_none_or(|e| e.every > 1 || !e.dense.is_empty());
        let tied = |v: &Value| v["tie_word_embeddings"].as_bool();
        Ok(Spec {
            arch: arch.to_string(),
            layers,
            hidden,
            heads,
            kv_heads,
            head_dim,
            ffn: if dense { need("intermediate_size")? } else { 0 },
            experts,
            vocab: need("vocab_size")?,
            norm_eps,
            rope,
            qk_norm: kind.starts_with("qwen3"),
            context,
            tied: tied(c).or(tied(folder.config())).unwrap_or(false),
        })
    }
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
            format!("{path} leaves `{key}` out; add it, as the model's class in transformers has it")
        }
        Some(found) => format!("{path}: `{key}` is {found}, expected a positive whole number; correct it"),
    };
    count(c, key).ok_or_else(|| Error::Model(why()))
}

/// A number, where the key is there.
fn float(c: &Value, key: &str, path: &str) -> Result<Option<f64>> {
    let wrong =
        |found: &Value| Error::Model(format!("{path}: `{key}` is {found}, expected a number; correct it"));
    match &c[key] {
        Value::Null => Ok(None),
        found => found.as_f64().map(Some).ok_or_else(|| wrong(found)),
    }
}

/// `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (4).
fn rope(c: &Value, path: &str, head_dim: usize) -> Result<Rope> {
    let scaling = [&c["rope_parameters"], &c["rope_scaling"]].into_iter().find(|v| v.is_object());
    let get = |key: &str| scaling.and_then(|s| s[key].as_f64());
    let either = |key: &str| -> Result<Option<f64>> {
        Ok(scaling.map_or(Ok(None), |s| float(s, key, path))?.or(float(c, key, path)?))
    };
    let theta = either("rope_theta")?.unwrap_or(10000.0);
    let share = either("partial_rotary_factor")?.unwrap_or(1.0);
    let dims = (head_dim as f64 * share) as usize;
    let sound = theta.is_finite() && theta > 0.0 && dims > 0 && dims <= head_dim && dims.is_multiple_of(2);
    if !sound {
        return Err(Error::Model(format!(
            "{path}: a rope base of {theta} over {dims} of {head_dim} dimensions makes no sense"
        )));
    }
    let need = |key: &str| {
        get(key).filter(|v| v.is_finite() && *v > 0.0).ok_or_else(|| {
            Error::Model(format!("{path}: the rope scaling's `{key}` is missing or not a positive number"))
        })
    };
    let kind = scaling.and_then(|s| s["rope_type"].as_str().or(s["type"].as_str())).unwrap_or("default");
    let (mut scale, mut factors) = (1.0, None);
    match kind {
        // Dynamic scaling begins behind the context that the model was trained for.
        "default" | "dynamic" => {}
        "linear" => scale = 1.0 / need("factor")?,
        "llama3" => {
            let (factor, low, high) = (need("factor")?, need("low_freq_factor")?, need("high_freq_factor")?);
            let context = need("original_max_position_embeddings")?;
            let of = |i: usize| {
                let wavelength = TAU * theta.powf(2.0 * i as f64 / dims as f64);
                let divisor = if wavelength < context / high {
                    1.0
                } else if wavelength > context / low {
                    factor
                } else {
                    let smooth = (context / wavelength - low) / (high - low);
                    1.0 / ((1.0 - smooth) / factor + smooth)
                };
                divisor as f32
            };
            factors = Some((0..dims / 2).map(of).collect());
        }
        other => {
            return Err(Error::unsupported(
                format!("{path}: rope scaling {other:?} can't be run"),
                "supported: default, linear, dynamic and llama3",
            ))
        }
    }
    Ok(Rope { theta: theta as f32, dims, style: RopeStyle::Neox, scale: scale as f32, factors })
}
