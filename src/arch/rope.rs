//! Rotary position embedding, and its scaling to longer contexts.

use std::f64::consts::TAU;

use serde_json::Value;

use super::from_config::float;
use super::row::Arch;
use crate::checkpoint::Gguf;
use crate::error::{Error, Result};

/// Which two dimensions of a head rotate together as pair i.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RopeStyle {
    /// (2i, 2i + 1): the style of `llama` and some other architectures in GGUF.
    Interleaved,
    /// (i, i + dims / 2): the style of most architectures in GGUF, and of nearly all Hugging Face
    /// folders.
    Neox,
}

/// A query at position p is multiplied by 1 + beta · ln(1 + ⌊p / length⌋).
#[derive(Clone, Copy, Debug)]
pub struct Growth {
    /// The factor of the logarithm.
    pub beta: f32,
    /// Positions until the first step.
    pub length: usize,
}

/// Rotary position embedding.
#[derive(Clone, Debug)]
pub struct Rope {
    /// The base of the frequencies.
    pub theta: f32,
    /// How many dimensions of a head rotate.
    pub dims: usize,
    /// Which dimensions rotate together.
    pub style: RopeStyle,
    /// Positions are multiplied by this: 1 / factor of linear scaling.
    pub scale: f32,
    /// Divisors of the frequencies, `[dims / 2]`: those of Llama 3.x (`rope_freqs.weight` in GGUF),
    /// the short factors of LongRoPE, or YaRN's. A pair whose divisor has no bound doesn't rotate.
    pub factors: Option<Vec<f32>>,
    /// Cosines and sines are multiplied by this (YaRN, LongRoPE).
    pub magnitude: f32,
    /// How queries grow with the position.
    pub growth: Option<Growth>,
    /// The longest text for which the factors are right, if it is shorter than the model's context.
    pub longest: Option<usize>,
}

impl Rope {
    /// Cosines and sines for the positions below `positions`, each `[positions, dims / 2]`.
    pub fn table(&self, positions: usize) -> (Vec<f32>, Vec<f32>) {
        let half = self.dims / 2;
        let freqs: Vec<f64> = (0..half)
            .map(|i| {
                let f = f64::from(self.theta).powf(-2.0 * i as f64 / self.dims as f64);
                f * f64::from(self.scale) / self.factors.as_ref().map_or(1.0, |v| f64::from(v[i]))
            })
            .collect();
        let angles = (0..positions).flat_map(|p| freqs.iter().map(move |f| p as f64 * f));
        let m = self.magnitude;
        angles.map(|a| (a.cos() as f32 * m, a.sin() as f32 * m)).unzip()
    }

    /// The factor of a query at a position.
    pub fn growth_at(&self, position: usize) -> f32 {
        self.growth.map_or(1.0, |Growth { beta, length }| {
            1.0 + beta * (1.0 + (position / length.max(1)) as f32).ln()
        })
    }

    /// A rotary embedding without scaling.
    fn plain(theta: f64, dims: usize, style: RopeStyle) -> Rope {
        let (theta, scale, magnitude) = (theta as f32, 1.0, 1.0);
        Rope { theta, dims, style, scale, factors: None, magnitude, growth: None, longest: None }
    }

    /// Sets the factors of YaRN: high frequencies are kept, low ones are divided by `yarn.factor`,
    /// and those in between change gradually from one to the other.
    fn apply_yarn(&mut self, yarn: &Yarn) {
        let (dims, base) = (self.dims as f64, f64::from(self.theta));
        // The index, a real number, of the pair that makes `n` full turns over the original
        // context.
        let pair = |n: f64| dims * (yarn.context / (n * TAU)).ln() / (2.0 * base.ln());
        let (low, high) = match yarn.truncate {
            true => (pair(yarn.fast).floor(), pair(yarn.slow).ceil()),
            false => (pair(yarn.fast), pair(yarn.slow)),
        };
        let (low, high) = (low.max(0.0), high.min(dims - 1.0));
        let factor_of = |i: usize| {
            let divided = ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
            (1.0 / (divided / yarn.factor + 1.0 - divided)) as f32
        };
        self.factors = Some((0..self.dims / 2).map(factor_of).collect());
    }
}

/// The parameters of YaRN.
struct Yarn {
    /// Divisor of the low frequencies.
    factor: f64,
    /// The original context: the one before scaling.
    context: f64,
    /// A frequency with more turns than this over the original context is kept.
    fast: f64,
    /// A frequency with fewer turns than this over the original context is divided by `factor`.
    slow: f64,
    /// Whether the range of pairs in between is widened to whole indices.
    truncate: bool,
}

/// YaRN's attention factor, 1 + 0.1 m ln(factor); 1 if the context isn't extended.
fn yarn_magnitude(factor: f64, m: f64) -> f64 {
    if factor <= 1.0 {
        1.0
    } else {
        1.0 + 0.1 * m * factor.ln()
    }
}

/// Reads GGUF metadata as llama.cpp does (`src/llama-model.cpp`, `src/llama-context.cpp`).
/// `context`: the model's context, which YaRN takes for the original one if the file doesn't give
/// that.
///
/// # Errors
/// The decoder doesn't run the scaling; a number is missing or makes no sense.
pub(super) fn from_gguf(file: &Gguf, arch: &Arch, head_dim: usize, context: usize) -> Result<Rope> {
    let path = file.path().display().to_string();
    let number = |key: &str| file.get_f32(&format!("{}.rope.{key}", arch.gguf)).map(f64::from);
    let whole = |key: &str| super::from_gguf::number(file, &format!("{}.rope.{key}", arch.gguf));
    let theta = number("freq_base").unwrap_or(10000.0);
    if !(theta.is_finite() && theta > 0.0) {
        return Err(Error::Model(format!(
            "{path}: rope base {theta} makes no sense; expected a positive number"
        )));
    }
    let dims = whole("dimension_count")?.unwrap_or(head_dim);
    if dims > head_dim || dims % 2 != 0 {
        return Err(Error::Model(format!(
            "{path}: rope over {dims} of {head_dim} dimensions makes no sense"
        )));
    }
    // A model with `dimension_sections` has positions along several axes. In text these positions
    // are equal, and the model rotates as Neox.
    let sections = file.get(&format!("{}.rope.dimension_sections", arch.gguf)).is_some();
    let style = if sections { RopeStyle::Neox } else { arch.rope };
    let mut rope = Rope::plain(theta, dims, style);
    let original = whole("scaling.original_context_length")?;
    // As in llama.cpp: `scale_linear` is an older key, a missing factor or a factor of 0 means no
    // scaling, and the default type is linear.
    let factor = number("scaling.factor").or_else(|| number("scale_linear")).unwrap_or(0.0);
    let scaling = file.get_str(&format!("{}.rope.scaling.type", arch.gguf)).unwrap_or("linear");
    rope.magnitude = number("scaling.attn_factor").unwrap_or(1.0) as f32;
    match scaling {
        "none" => {}
        "linear" | "longrope" if factor == 0.0 => {}
        "linear" | "longrope" if factor > 0.0 => rope.scale = 1.0 / factor as f32,
        "yarn" if factor > 0.0 => {
            let known = original.unwrap_or(context);
            if known == 0 {
                return Err(Error::Model(format!(
                    "{path}: rope scaling yarn needs metadata key \
                     {}.rope.scaling.original_context_length, which is missing",
                    arch.gguf
                )));
            }
            // llama.cpp reads these keys for some architectures only. Files of the others lack
            // them.
            let fast = number("scaling.yarn_beta_fast").unwrap_or(32.0);
            let slow = number("scaling.yarn_beta_slow").unwrap_or(1.0);
            let context = known as f64;
            rope.apply_yarn(&Yarn { factor, context, fast, slow, truncate: true });
            let all = number("scaling.yarn_log_multiplier").unwrap_or(0.0);
            let divisor = if all == 0.0 { 1.0 } else { yarn_magnitude(factor, all) };
            rope.magnitude *= (yarn_magnitude(factor, 1.0) / divisor) as f32;
        }
        other => {
            return Err(Error::unsupported(
                format!("{path}: rope scaling {other:?} (factor {factor}) can't be run"),
                "supported: none, linear, yarn, longrope, and the Llama 3.x factors in \
                 rope_freqs.weight",
            ))
        }
    }
    if arch.rope_freqs {
        if let Some(factors) = factors(file, "rope_freqs.weight", dims)? {
            rope.factors = Some(match rope.factors {
                Some(own) => own.iter().zip(&factors).map(|(a, b)| a * b).collect(),
                None => factors,
            });
        }
    }
    // LongRoPE has short and long factors. For a text that fits into the original context,
    // llama.cpp and transformers both use the short ones.
    if let Some(short) = factors(file, "rope_factors_short.weight", dims)? {
        rope.factors = Some(short);
        rope.longest = original;
    }
    let temperature = file.get_f32(&format!("{}.attention.temperature_scale", arch.gguf));
    let length = original.unwrap_or(context);
    rope.growth = temperature.filter(|t| *t != 0.0).map(|beta| Growth { beta, length });
    Ok(rope)
}

/// The factors in a tensor, `[dims / 2]`; `None` if the file has no such tensor.
fn factors(file: &Gguf, name: &str, dims: usize) -> Result<Option<Vec<f32>>> {
    let Some(t) = file.tensor(name) else { return Ok(None) };
    let values: Vec<f32> = file
        .bytes(t)
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect();
    let sound = |f: &f32| f.is_finite() && *f > 0.0;
    if t.type_id != 0 || values.len() != dims / 2 || !values.iter().all(sound) {
        return Err(Error::Model(format!(
            "{}: {name} must hold {} positive F32 factors",
            file.path().display(),
            dims / 2
        )));
    }
    Ok(Some(values))
}

/// Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (transformers 4).
/// `kind`: `full_attention` or `sliding_attention`, the kind of block, for models in which the
/// kinds have parameters of their own.
///
/// # Errors
/// The decoder doesn't run the scaling; a key is missing or makes no sense.
pub(super) fn from_config(
    c: &Value,
    path: &str,
    arch: &Arch,
    head_dim: usize,
    kind: &str,
) -> Result<Rope> {
    let sliding = kind == "sliding_attention";
    let scaling = match &c["rope_parameters"] {
        v if v[kind].is_object() => Some(&v[kind]),
        v if v.is_object() => Some(v),
        // `rope_scaling` doesn't apply to blocks with windows.
        _ => Some(&c["rope_scaling"]).filter(|v| v.is_object() && !sliding),
    };
    let get = |key: &str| scaling.and_then(|s| s[key].as_f64());
    let either = |key: &str| -> Result<Option<f64>> {
        Ok(scaling.map_or(Ok(None), |s| float(s, key, path))?.or(float(c, key, path)?))
    };
    let local = if sliding { float(c, "rope_local_base_freq", path)? } else { None };
    let theta = scaling.map_or(Ok(None), |s| float(s, "rope_theta", path))?.or(local);
    let theta = theta.or(float(c, "rope_theta", path)?).unwrap_or(10000.0);
    let share = either("partial_rotary_factor")?.unwrap_or(1.0);
    let named = scaling.and_then(|s| s["rope_type"].as_str().or(s["type"].as_str()));
    let proportional = named == Some("proportional");
    let dims = if proportional { head_dim } else { (head_dim as f64 * share) as usize };
    let sound =
        theta.is_finite() && theta > 0.0 && dims > 0 && dims <= head_dim && dims.is_multiple_of(2);
    if !sound {
        return Err(Error::Model(format!(
            "{path}: a rope base of {theta} over {dims} of {head_dim} dimensions makes no sense"
        )));
    }
    let positive = |v: &f64| v.is_finite() && *v > 0.0;
    let need = |key: &str| {
        get(key).filter(positive).ok_or_else(|| {
            Error::Model(format!(
                "{path}: the rope scaling's `{key}` is missing or not a positive number"
            ))
        })
    };
    let original = "original_max_position_embeddings";
    // Early Phi-3 files have other names for longrope.
    let long = scaling.is_some_and(|s| s["short_factor"].is_array());
    let rope_type = if long { "longrope" } else { named.unwrap_or("default") };
    let mut rope = Rope::plain(theta, dims, arch.folder_rope);
    match rope_type {
        // Dynamic scaling begins after the context that the model was trained for. The three
        // positions of mrope are equal in text.
        "default" | "dynamic" | "mrope" => {}
        "linear" => rope.scale = (1.0 / need("factor")?) as f32,
        // The frequencies are those of all pairs, but only the first pairs rotate.
        "proportional" => {
            let turning = (head_dim as f64 * share / 2.0) as usize;
            let factor = get("factor").filter(positive).unwrap_or(1.0) as f32;
            let of = |pair| if pair < turning { factor } else { f32::INFINITY };
            rope.factors = Some((0..dims / 2).map(of).collect());
        }
        "llama3" => {
            let (factor, low, high) =
                (need("factor")?, need("low_freq_factor")?, need("high_freq_factor")?);
            let context = need(original)?;
            let factor_of = |i: usize| {
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
            rope.factors = Some((0..dims / 2).map(factor_of).collect());
        }
        "yarn" => {
            let most = float(c, "max_position_embeddings", path)?;
            let context = get(original).or(most).filter(positive);
            let context = context.map_or_else(|| need(original), Ok)?;
            let factor = get("factor").or(most.map(|m| m / context)).filter(positive);
            let factor = factor.map_or_else(|| need("factor"), Ok)?;
            let or = |key: &str, default: f64| get(key).filter(positive).unwrap_or(default);
            let (fast, slow) = (or("beta_fast", 32.0), or("beta_slow", 1.0));
            let truncate = scaling.is_none_or(|s| s["truncate"] != false);
            rope.apply_yarn(&Yarn { factor, context, fast, slow, truncate });
            let both = get("mscale").zip(get("mscale_all_dim")).filter(|b| b.0 * b.1 != 0.0);
            rope.magnitude = match (get("attention_factor"), both) {
                (Some(given), _) => given,
                (_, Some((m, all))) => yarn_magnitude(factor, m) / yarn_magnitude(factor, all),
                _ => yarn_magnitude(factor, 1.0),
            } as f32;
            let beta = get("llama_4_scaling_beta").filter(|b| *b != 0.0);
            rope.growth = beta.map(|b| Growth { beta: b as f32, length: context as usize });
        }
        "longrope" => {
            // The key of the model goes before the same key of the rope scaling.
            let own = float(c, original, path)?.filter(positive);
            let context = own.map_or_else(|| need(original), Ok)?;
            let most = float(c, "max_position_embeddings", path)?.unwrap_or(context);
            let factor = get("factor").unwrap_or(most / context);
            let computed = (1.0 + factor.max(1.0).ln() / context.ln()).sqrt();
            rope.magnitude = get("attention_factor").unwrap_or(computed) as f32;
            let short = scaling.and_then(|s| s["short_factor"].as_array());
            let short: Option<Vec<f32>> = short.and_then(|list| {
                list.iter().map(|v| v.as_f64().filter(positive).map(|x| x as f32)).collect()
            });
            let fits = short.filter(|list| list.len() == dims / 2).ok_or_else(|| {
                Error::Model(format!(
                    "{path}: the rope scaling's `short_factor` must hold {} positive numbers",
                    dims / 2
                ))
            })?;
            rope.factors = Some(fits);
            rope.longest = Some(context as usize);
        }
        other => {
            return Err(Error::unsupported(
                format!("{path}: rope scaling {other:?} can't be run"),
                "supported: default, linear, dynamic, proportional, llama3, yarn and longrope",
            ))
        }
    }
    Ok(rope)
}
