//! The decoder's description. One forward pass reads it; architectures differ by its values only.

use super::experts::Experts;
use super::Writer;
use crate::checkpoint::{Checkpoint, Gguf};
use crate::error::{Error, Result};

/// Which dimensions of a head rotate together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RopeStyle {
    /// (2i, 2i + 1): GGUF's llama.
    Interleaved,
    /// (i, i + dims / 2): qwen2, qwen3 and every Hugging Face checkpoint.
    Neox,
}

/// Rotary position embedding.
#[derive(Clone, Debug)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f32,
    /// How many dimensions of a head rotate.
    pub dims: usize,
    /// Pairing.
    pub style: RopeStyle,
    /// Positions are multiplied by this (1 / factor of linear scaling).
    pub scale: f32,
    /// Divides each frequency, `[dims / 2]`: Llama 3.x scaling, stored as `rope_freqs.weight`.
    pub factors: Option<Vec<f32>>,
}

/// What the decoder is.
#[derive(Clone, Debug)]
pub struct Spec {
    /// The architecture as GGUF names it.
    pub arch: String,
    /// Blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of the feed-forward layer, where a block has one; else 0.
    pub ffn: usize,
    /// What stands in place of the feed-forward layer, in models with experts.
    pub experts: Option<Experts>,
    /// Tokens.
    pub vocab: usize,
    /// Epsilon of the RMS norms.
    pub norm_eps: f32,
    /// Rotary embedding.
    pub rope: Rope,
    /// Queries and keys are normalised per head (qwen3).
    pub qk_norm: bool,
    /// Longest context the model was trained for; 0 when the file does not say.
    pub context: usize,
    /// The output matrix is the token embedding.
    pub tied: bool,
}

/// Architectures that the decoder runs.
pub const SUPPORTED: [&str; 5] = ["llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe"];

impl Spec {
    /// Reads the description of either kind of checkpoint.
    ///
    /// # Errors
    /// What [`Spec::from_gguf`] and [`Spec::from_config`] say.
    pub fn of(file: &Checkpoint) -> Result<Spec> {
        match file {
            Checkpoint::Gguf(g) => Spec::from_gguf(g),
            Checkpoint::Folder(f) => Spec::from_config(f),
        }
    }

    /// Reads the description from GGUF metadata (names: llama.cpp `gguf-py/gguf/constants.py`).
    ///
    /// # Errors
    /// An architecture or a rope scaling that the decoder does not run; a key that is missing or makes no sense.
    pub fn from_gguf(file: &Gguf) -> Result<Spec> {
        let path = file.path().display().to_string();
        no_model(file)?;
        let arch = file.arch()?.to_string();
        if !SUPPORTED.contains(&arch.as_str()) {
            return Err(Error::unsupported(
                format!("{path}: architecture {arch} can't be run"),
                format!("supported: {}", SUPPORTED.join(", ")),
            ));
        }
        let key = |k: &str| format!("{arch}.{k}");
        let optional = |k: &str| number(file, &key(k));
        let need = |k: &str| {
            optional(k)?.filter(|&v| v > 0).ok_or_else(|| {
                Error::Model(format!("{path}: metadata key {} is missing or not a positive number", key(k)))
            })
        };
        let experts = Experts::from_gguf(file, &arch)?;
        let hidden = need("embedding_length")?;
        let heads = need("attention.head_count")?;
        let kv_heads = optional("attention.head_count_kv")?.unwrap_or(heads);
        let head_dim = optional("attention.key_length")?.unwrap_or(hidden / heads);
        if kv_heads == 0 || heads % kv_heads != 0 || head_dim == 0 {
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
        let layers = need("block_count")?;
        if layers > file.tensors().len() {
            return Err(Error::Model(format!(
                "{path}: {layers} blocks by the metadata, but the file has {} tensors in all",
                file.tensors().len()
            )));
        }
        let theta = file.get_f32(&key("rope.freq_base")).unwrap_or(10000.0);
        if !(norm_eps.is_finite() && norm_eps >= 0.0 && theta.is_finite() && theta > 0.0) {
            return Err(Error::Model(format!(
                "{path}: norm epsilon {norm_eps} and rope base {theta} make no sense; expected positive numbers"
            )));
        }
        let dims = optional("rope.dimension_count")?.unwrap_or(head_dim);
        if dims > head_dim || dims % 2 != 0 {
            return Err(Error::Model(format!(
                "{path}: rope over {dims} of {head_dim} dimensions makes no sense"
            )));
        }
        let qk_norm = arch == "qwen3" || arch == "qwen3moe";
        let style = if arch == "llama" { RopeStyle::Interleaved } else { RopeStyle::Neox };
        let rope = Rope {
            theta,
            dims,
            style,
            scale: rope_scale(file, &arch)?,
            // llama.cpp reads them for llama only.
            factors: if arch == "llama" { rope_factors(file, dims)? } else { None },
        };
        Ok(Spec {
            layers,
            hidden,
            heads,
            kv_heads,
            head_dim,
            // llama.cpp has no file with both kinds of block for these architectures.
            ffn: if experts.is_some() { 0 } else { need("feed_forward_length")? },
            experts,
            vocab: embedding.dims.get(1).copied().unwrap_or(0) as usize,
            norm_eps,
            rope,
            qk_norm,
            context: optional("context_length")?.unwrap_or(0),
            tied: file.tensor("output.weight").is_none(),
            arch,
        })
    }

    /// Whether a block routes its tokens to experts.
    pub fn is_sparse(&self, layer: usize) -> bool {
        self.experts.as_ref().is_some_and(|e| e.are_in(layer))
    }

    /// The writers of a block, in the order in which it runs them.
    pub fn writers(&self, layer: usize) -> &'static [Writer] {
        match &self.experts {
            Some(e) if self.is_sparse(layer) && e.shared > 0 => {
                &[Writer::Attention, Writer::Shared, Writer::Experts]
            }
            Some(_) if self.is_sparse(layer) => &[Writer::Attention, Writer::Experts],
            _ => &[Writer::Attention, Writer::Ffn],
        }
    }

    /// Length of a writer's gate: the columns of its matrix, of experts those of all of them side by side.
    pub fn columns(&self, writer: Writer) -> usize {
        match writer {
            Writer::Attention => self.heads * self.head_dim,
            Writer::Ffn => self.ffn,
            Writer::Shared => self.experts.as_ref().map_or(0, |e| e.shared),
            Writer::Experts => self.experts.as_ref().map_or(0, |e| e.count * e.ffn),
        }
    }

    /// Width of the widest feed-forward layer, shared or single expert.
    pub fn widest_ffn(&self) -> usize {
        self.experts.as_ref().map_or(0, |e| e.ffn.max(e.shared)).max(self.ffn)
    }

    /// cos and sin of every position below `positions`, each `[positions, rope.dims / 2]`.
    pub fn rope_table(&self, positions: usize) -> (Vec<f32>, Vec<f32>) {
        let half = self.rope.dims / 2;
        let freqs: Vec<f64> = (0..half)
            .map(|i| {
                let f = f64::from(self.rope.theta).powf(-2.0 * i as f64 / self.rope.dims as f64);
                f * f64::from(self.rope.scale) / self.rope.factors.as_ref().map_or(1.0, |v| f64::from(v[i]))
            })
            .collect();
        let angles = (0..positions).flat_map(|p| freqs.iter().map(move |f| p as f64 * f));
        angles.map(|a| (a.cos() as f32, a.sin() as f32)).unzip()
    }
}

/// A whole number, or an array of one for each block, as files of pruned models have, where all of
/// them are equal.
///
/// # Errors
/// Blocks of different sizes.
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

/// That a file is a model, not what goes beside one.
fn no_model(file: &Gguf) -> Result<()> {
    let kind = file.get_str("general.type").unwrap_or("model");
    let (what, hint) = match (kind, file.get_str("general.architecture")) {
        ("adapter", _) => {
            let kind = file.get_str("adapter.type").unwrap_or("lora");
            let kind = if kind == "lora" { "LoRA" } else { kind };
            let hint = "give the model that it is for; `eval MODEL --sidecar ADAPTER` measures one \
                        that --emit lora wrote";
            (format!("a {kind} adapter"), hint)
        }
        (_, Some("controlvector")) => {
            let hint = "give the model that it is for; `eval MODEL --sidecar VECTOR` measures one \
                        that --emit control-vector wrote";
            ("a control vector".to_string(), hint)
        }
        ("mmproj" | "imatrix", _) => (format!("of the type {kind}"), "give the model's own file"),
        _ => return Ok(()),
    };
    Err(Error::unsupported(format!("{}: is {what}, not a model", file.path().display()), hint))
}

fn rope_scale(file: &Gguf, arch: &str) -> Result<f32> {
    let number = |key: &str| file.get_f32(&format!("{arch}.rope.{key}"));
    // The older key, the default type, and that 0 means no scaling, as in llama.cpp (src/llama-model.cpp).
    let factor = number("scaling.factor").or_else(|| number("scale_linear")).unwrap_or(0.0);
    match file.get_str(&format!("{arch}.rope.scaling.type")).unwrap_or("linear") {
        "none" => Ok(1.0),
        "linear" if factor == 0.0 => Ok(1.0),
        "linear" if factor > 0.0 => Ok(1.0 / factor),
        other => Err(Error::unsupported(
            format!("{}: rope scaling {other:?} (factor {factor}) can't be run", file.path().display()),
            "supported: none, linear, and the Llama 3.x factors in rope_freqs.weight",
        )),
    }
}

fn rope_factors(file: &Gguf, dims: usize) -> Result<Option<Vec<f32>>> {
    let Some(t) = file.tensor("rope_freqs.weight") else { return Ok(None) };
    let values: Vec<f32> =
        file.bytes(t).chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    if t.type_id != 0 || values.len() != dims / 2 || values.iter().any(|f| !f.is_finite() || *f <= 0.0) {
        return Err(Error::Model(format!(
            "{}: rope_freqs.weight must hold {} positive F32 factors",
            file.path().display(),
            dims / 2
        )));
    }
    Ok(Some(values))
}
