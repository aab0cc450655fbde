//! The edit beside a Hugging Face checkpoint: a PEFT folder with a LoRA adapter of rank one, F32,
//! which is the edit exactly on any packing of the base.
//!
//! `adapter_config.json` holds what PEFT knows, and nothing else: some versions refuse other keys.
//! What the adapter says about itself stands in the metadata of `adapter_model.safetensors`.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{json, Value};

use super::sidecar::{belongs, later, quote, terms, Kind, Sidecar, VERSION};
use super::transformers::{in_tree, loader};
use super::{folder::check_folder, place, Staged, Temporary, Written};
use crate::checkpoint::{read_json, sha256_file, Folder};
use crate::edit::Edit;
use crate::error::{Error, Result};
use crate::model::{Model, Part};
use crate::progress::{Progress, Silent};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// The key of the metadata that holds [`About`].
const KEY: &str = "refusal_patch";
/// Larger files are no adapters of rank one.
const LARGEST: u64 = 1 << 30;

/// What an adapter says about itself.
#[derive(Serialize, Deserialize)]
struct About {
    sidecar: String,
    sidecar_version: u64,
    version: String,
    operation: String,
    method: String,
    strength: f32,
    base_architecture: String,
    base_sha256: String,
}

/// What a user types to load it.
pub(super) fn command(base: &Folder, adapter: &Path) -> String {
    format!(
        "python -c \"import sys; from transformers import {} as M; from peft import PeftModel as \
         P; \
         P.from_pretrained(M.from_pretrained(sys.argv[1], dtype='auto'), sys.argv[2])\" {} {}",
        loader(base),
        quote(base.dir()),
        quote(adapter)
    )
}

/// Writes a sidecar's folder next to OUT, under a temporary name.
pub(super) fn stage(
    sidecar: &Sidecar,
    base: &Folder,
    model: &Model,
    out: &Path,
    force: bool,
) -> Result<Staged> {
    check_folder(base, out, force)?;
    let temp = place::temporary_folder(out)?;
    let halves = halves(model, &sidecar.edit)?;
    let names = |stacked: bool| -> Vec<&str> {
        let of = halves.iter().filter(|h| h.half == 'A' && h.target.stacked == stacked);
        of.map(|h| h.target.name.as_str()).collect()
    };
    let mut config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.dir().display().to_string(),
        "r": 1,
        "lora_alpha": 1,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "target_modules": names(false),
    });
    if !names(true).is_empty() {
        config["target_parameters"] = json!(names(true));
    }
    let about = About {
        sidecar: sidecar.kind.name().into(),
        sidecar_version: VERSION,
        version: env!("CARGO_PKG_VERSION").into(),
        operation: "output of the module += lora_B (lora_A . input), scale 1".into(),
        method: sidecar.method.clone(),
        strength: sidecar.strength,
        base_architecture: sidecar.architecture.clone(),
        base_sha256: sidecar.base_sha256.clone(),
    };
    let text = |v: &Value| serde_json::to_string_pretty(v).map_err(|e| Error::Model(e.to_string()));
    let about = serde_json::to_string(&about).map_err(|e| Error::Model(e.to_string()))?;
    let bytes = safetensors(&halves, &about);
    place::write_whole(&temp.path().join(CONFIG), (text(&config)? + "\n").as_bytes(), false)?;
    place::write_whole(&temp.path().join(WEIGHTS), &bytes, false)?;
    let sha256 = sha256_file(&temp.path().join(WEIGHTS), &Silent)?;
    let written = Written { path: out.to_path_buf(), bytes: bytes.len() as u64, sha256 };
    Ok(Staged { temp: Temporary::Folder(temp), force, written })
}

fn name(module: &str, half: char) -> String {
    format!("base_model.model.{module}.lora_{half}.weight")
}

/// What of a model an adapter's tensors belong to.
#[derive(Clone)]
struct Target {
    /// The module whose name the tensors carry.
    module: String,
    /// What the configuration names: the module, or the parameter in which experts are stacked.
    name: String,
    stacked: bool,
}

impl Target {
    fn of(part: &Part, model: &Model) -> Target {
        let module = |of: &str| of.rsplit_once('.').map_or("", |(module, _)| module).to_string();
        let parameter = |name: String| Target { module: module(&name), name, stacked: true };
        let tensor = in_tree(model, &part.tensor);
        let Some(name) = tensor.strip_suffix(".weight") else { return parameter(tensor) };
        match name.split_once(".experts.").filter(|_| model.spec.arch == "qwen2moe") {
            // transformers 5 stacks experts when it loads them. PEFT turns adapters of modules of
            // their own into adapters of the stack, but not for this architecture.
            Some((block, _)) => parameter(format!("{block}.experts.down_proj")),
            None => Target { module: name.into(), name: name.into(), stacked: false },
        }
    }
}

/// One tensor of an adapter: A is `[matrices, inputs]`, B `[outputs, matrices]`.
struct Half {
    target: Target,
    half: char,
    shape: [usize; 2],
    values: Vec<f32>,
}

fn halves(model: &Model, edit: &Edit) -> Result<Vec<Half>> {
    let mut all = Vec::new();
    for t in edit {
        // What one target takes together: how many matrices, and their gates.
        let mut groups: Vec<(Target, usize, Vec<f32>)> = Vec::new();
        for part in model.parts(t.layer, t.writer)? {
            let (target, n, v) = (Target::of(&part, model), part.stack.len(), part.gate(&t.v));
            match groups.last_mut() {
                Some((last, count, gates)) if last.module == target.module => {
                    *count += n;
                    gates.extend(v);
                }
                _ => groups.push((target, n, v.to_vec())),
            }
        }
        for (target, n, v) in groups {
            let b = t.u.iter().flat_map(|u| std::iter::repeat_n(*u, n)).collect();
            all.push(Half {
                target: target.clone(),
                half: 'A',
                shape: [n, v.len() / n],
                values: v,
            });
            all.push(Half { target, half: 'B', shape: [t.u.len(), n], values: b });
        }
    }
    Ok(all)
}

/// F32 tensors in the order of the edit.
fn safetensors(halves: &[Half], about: &str) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), json!({ KEY: about }));
    let mut data: Vec<u8> = Vec::new();
    for h in halves {
        let begin = data.len();
        data.extend(h.values.iter().flat_map(|x| x.to_le_bytes()));
        let info = json!({ "dtype": "F32", "shape": h.shape, "data_offsets": [begin, data.len()] });
        header.insert(name(&h.target.module, h.half), info);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat()
}

/// Reads an adapter for a model.
pub(super) fn read(path: &Path, model: &Model, progress: &dyn Progress) -> Result<Sidecar> {
    let file = path.join(WEIGHTS);
    if !path.is_dir() || !file.exists() || !path.join(CONFIG).exists() {
        let what =
            format!("is no adapter folder ({CONFIG} and {WEIGHTS}); `emit` lora writes them");
        return Err(Error::format(path, None, what));
    }
    let bad = |what: String| Error::format(&file, None, what);
    let config = read_json(&path.join(CONFIG))?;
    let scale = config["lora_alpha"].as_f64().zip(config["r"].as_f64()).map(|(a, r)| a / r);
    if config["peft_type"] != "LORA" || config["r"] != 1 || scale != Some(1.0) {
        return Err(Error::format(
            path.join(CONFIG),
            None,
            "is no LoRA of rank 1 and alpha 1, as `emit` lora writes",
        ));
    }
    let len = fs::metadata(&file).map_err(Error::io(&file))?.len();
    if len > LARGEST {
        return Err(bad(format!(
            "has {len} bytes, an adapter of rank one has less than {LARGEST}"
        )));
    }
    let bytes = fs::read(&file).map_err(Error::io(&file))?;
    let damaged = |e: safetensors::SafeTensorError| {
        bad(format!("is no safetensors file: {e}; download it again"))
    };
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).map_err(damaged)?;
    let about = header
        .metadata()
        .as_ref()
        .and_then(|m| m.get(KEY))
        .ok_or_else(|| bad("is no sidecar of this program; `emit` lora writes them".into()))?;
    let any: Value = serde_json::from_str(about)
        .map_err(|e| bad(format!("what it says about itself is damaged: {e}")))?;
    if any["sidecar_version"] != VERSION {
        return Err(later(path, &format!("version {}", any["sidecar_version"])));
    }
    let about: About = serde_json::from_value(any)
        .map_err(|e| bad(format!("what it says about itself is damaged: {e}")))?;
    belongs(path, &about.base_architecture, &about.base_sha256, model, progress)?;
    let tensors = safetensors::SafeTensors::deserialize(&bytes).map_err(damaged)?;
    let vector = |name: &str, n: usize| -> Result<Vec<f32>> {
        let t = tensors.tensor(name).map_err(damaged)?;
        let x: Vec<f32> = t
            .data()
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect();
        if t.dtype() != safetensors::Dtype::F32 || x.len() != n || !x.iter().all(|x| x.is_finite())
        {
            return Err(bad(format!(
                "tensor {name} must be {n} finite F32 numbers, as the model's tensor asks for"
            )));
        }
        Ok(x)
    };
    let used = std::cell::RefCell::new(std::collections::HashSet::new());
    let find = |part: &Part| {
        let target = Target::of(part, model);
        let names = ['A', 'B'].map(|half| name(&target.module, half));
        if tensors.tensor(&names[1]).is_err() {
            return Ok(None);
        }
        let ((rows, cols), n) = (part.stack.shape(), part.stack.len());
        let (all, first) = match (&model.spec.experts, target.stacked) {
            (Some(experts), true) => (experts.count, part.first),
            _ => (n, 0),
        };
        let (a, b) = (vector(&names[0], cols * all)?, vector(&names[1], rows * all)?);
        used.borrow_mut().extend(names);
        let column = |e: usize| b.iter().skip(e).step_by(all).copied().collect::<Vec<_>>();
        Ok(Some((
            (first..first + n).flat_map(column).collect(),
            a[first * cols..(first + n) * cols].to_vec(),
        )))
    };
    let (edit, _) = terms(&file, model, &find)?;
    if edit.is_empty() || tensors.len() != used.borrow().len() {
        return Err(bad(format!(
            "holds {} tensors, of which {} terms can be used",
            tensors.len(),
            edit.len()
        )));
    }
    Ok(Sidecar {
        kind: Kind::Lora,
        architecture: about.base_architecture,
        base_sha256: about.base_sha256,
        method: about.method,
        strength: about.strength,
        edit,
    })
}
