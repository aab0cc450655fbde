//! The edit beside the weights, as small GGUF files that llama.cpp loads: a LoRA adapter of rank
//! one, which is the edit exactly on any quantized base, and a control vector, a constant for
//! runtimes that have only that.
//!
//! Layouts: llama.cpp `src/llama-adapter.cpp` (adapter) and `common/common.cpp` (control vector).
//! Both carry `refusal_patch.*` keys that say what they are and which file they belong to;
//! llama.cpp ignores those.

use std::path::Path;

use gguf_rs_lib::builder::GGUFBuilder;
use gguf_rs_lib::error::GGUFError;
use gguf_rs_lib::format::MetadataValue;

use super::{peft, place, Staged, Temporary, Written};
use crate::arch::Writer;
use crate::checkpoint::{sha256_checkpoint, sha256_file, Checkpoint, Gguf, Tensor, Value};
use crate::edit::{Edit, RankOne};
use crate::encoding::Encoding;
use crate::error::{Error, Result};
use crate::model::{Model, Part};
use crate::progress::{Progress, Silent};

/// Format version; a reader refuses a later one.
pub(super) const VERSION: u64 = 1;

/// What a sidecar is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// W x + u (v·x) beside every touched writer.
    Lora,
    /// A constant added to the residual stream after a block.
    ControlVector,
}

impl Kind {
    /// Its name in `refusal_patch.sidecar`.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Lora => "lora",
            Kind::ControlVector => "control-vector",
        }
    }

    fn operation(self) -> &'static str {
        match self {
            Kind::Lora => "output of the tensor += lora_b (lora_a . input), scale 1",
            Kind::ControlVector => {
                "residual stream after block N += direction.N, at every token, scale 1"
            }
        }
    }

    /// What a user types to load it.
    pub fn command(self, model: &Model, sidecar: &Path) -> String {
        let base = model.file.path();
        if let Some(folder) = model.file.folder() {
            return peft::command(folder, sidecar);
        }
        let option = match self {
            Kind::Lora => "--lora",
            Kind::ControlVector => "--control-vector",
        };
        format!("llama-cli -m {} {option} {}", quote(base), quote(sidecar))
    }
}

/// A path as a shell takes it.
pub(super) fn quote(path: &Path) -> String {
    match path.to_string_lossy() {
        p if p.chars().all(|c| c.is_alphanumeric() || "/._-+~".contains(c)) => p.into_owned(),
        p => format!("'{}'", p.replace('\'', "'\\''")),
    }
}

/// A sidecar's content.
#[derive(Clone, PartialEq, Debug)]
pub struct Sidecar {
    /// What it is.
    pub kind: Kind,
    /// The base model's `general.architecture`.
    pub architecture: String,
    /// The base file's SHA-256 in hex.
    pub base_sha256: String,
    /// The method of the edit.
    pub method: String,
    /// Its strength in units of the gap.
    pub strength: f32,
    /// The edit. Of a control vector: terms of the ffn writer without a gate.
    pub edit: Edit,
}

impl Sidecar {
    /// Writes it next to OUT, under a temporary name. `force` allows to replace an existing file.
    ///
    /// # Errors
    /// What the file system says; OUT exists or is the base itself.
    pub fn stage(&self, model: &Model, out: &Path, force: bool) -> Result<Staged> {
        if let Checkpoint::Folder(base) = &model.file {
            return peft::stage(self, base, model, out, force);
        }
        place::check_beside(&model.file, out, force)?;
        let wrong =
            |e: GGUFError| Error::Model(format!("{}: can't be written: {e}", out.display()));
        let tensors = self.tensors(model)?;
        let (mut bytes, _) =
            self.build(tensors).and_then(GGUFBuilder::build_to_bytes).map_err(wrong)?;
        // llama.cpp reads the data with its padding, after the last tensor too.
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        let total = bytes.len() as u64;
        place::check_space(out, total)?;
        let mut temp = place::temporary(out)?;
        std::io::Write::write_all(&mut *temp, &bytes)
            .and_then(|()| temp.as_file().sync_all())
            .map_err(|e| place::write_error(out, 0, total, e))?;
        let sha256 = sha256_file(temp.path(), &Silent)?;
        let temp = Temporary::File(temp);
        Ok(Staged {
            temp,
            force,
            written: Written { path: out.to_path_buf(), bytes: total, sha256 },
        })
    }

    /// An adapter of experts has a row of a and a column of b for each: llama.cpp takes
    /// those of the experts that a token is sent to.
    fn tensors(&self, model: &Model) -> Result<Vec<Named>> {
        let mut all = Vec::new();
        for t in &self.edit {
            let m = t.u.len() as u64;
            if self.kind == Kind::ControlVector {
                all.push((format!("direction.{}", t.layer), vec![m], t.u.clone()));
                continue;
            }
            for part in model.parts(t.layer, t.writer)? {
                let (n, count) = (part.stack.shape().1 as u64, part.stack.len());
                let more: Vec<u64> = if count > 1 { vec![count as u64] } else { Vec::new() };
                let a = part.gate(&t.v).to_vec();
                all.push((format!("{}.lora_a", part.tensor), [&[n, 1], &more[..]].concat(), a));
                all.push((
                    format!("{}.lora_b", part.tensor),
                    [&[1, m], &more[..]].concat(),
                    t.u.repeat(count),
                ));
            }
        }
        Ok(all)
    }

    fn build(&self, tensors: Vec<Named>) -> std::result::Result<GGUFBuilder, GGUFError> {
        let text = |s: &str| MetadataValue::String(s.to_string());
        let mut layers: Vec<String> = self.edit.iter().map(|t| t.layer.to_string()).collect();
        layers.dedup();
        let mut b = GGUFBuilder::new()
            .add_metadata("refusal_patch.sidecar", text(self.kind.name()))
            .add_metadata("refusal_patch.sidecar_version", MetadataValue::U32(VERSION as u32))
            .add_metadata("refusal_patch.version", text(env!("CARGO_PKG_VERSION")))
            .add_metadata("refusal_patch.operation", text(self.kind.operation()))
            .add_metadata("refusal_patch.blocks", text(&layers.join(",")))
            .add_metadata("refusal_patch.method", text(&self.method))
            .add_metadata("refusal_patch.strength", MetadataValue::F32(self.strength))
            .add_metadata("refusal_patch.base_architecture", text(&self.architecture))
            .add_metadata("refusal_patch.base_sha256", text(&self.base_sha256));
        match self.kind {
            Kind::Lora => {
                b = b
                    .add_metadata("general.type", text("adapter"))
                    .add_metadata("general.architecture", text(&self.architecture))
                    .add_metadata("adapter.type", text("lora"))
                    // llama.cpp scales by alpha / rank.
                    .add_metadata("adapter.lora.alpha", MetadataValue::F32(1.0));
            }
            Kind::ControlVector => {
                b = b
                    .add_metadata("general.architecture", text("controlvector"))
                    .add_metadata("controlvector.model_hint", text(&self.architecture))
                    .add_metadata(
                        "controlvector.layer_count",
                        MetadataValue::I32(self.edit.len() as i32),
                    );
            }
        }
        for (name, dims, values) in tensors {
            b = b.add_f32_tensor(name, dims, values)?;
        }
        Ok(b)
    }

    /// Reads a sidecar for a model.
    ///
    /// # Errors
    /// Not a sidecar of this program, a later version, a damaged one, or one of another model.
    pub fn read(path: &Path, model: &Model, progress: &dyn Progress) -> Result<Sidecar> {
        if model.file.folder().is_some() {
            return peft::read(path, model, progress);
        }
        let file = Gguf::open(path)?;
        let bad = |what: String| Error::format(path, None, what);
        let text = |key: &str| file.get_str(&format!("refusal_patch.{key}")).map(str::to_string);
        let need = |key: &str| {
            text(key).ok_or_else(|| bad(format!("its key `refusal_patch.{key}` is missing")))
        };
        let kind = match text("sidecar").as_deref() {
            Some("lora") => Kind::Lora,
            Some("control-vector") => Kind::ControlVector,
            Some(other) => return Err(later(path, &format!("kind {other:?}"))),
            None => {
                return Err(bad(
                    "is no sidecar of this program; `emit` lora and `emit` control-vector \
                     write them"
                        .into(),
                ))
            }
        };
        match file.get("refusal_patch.sidecar_version").and_then(Value::as_u64) {
            Some(VERSION) => {}
            other => {
                return Err(later(
                    path,
                    &format!("version {}", other.map_or("none".into(), |v| v.to_string())),
                ))
            }
        }
        let (architecture, base_sha256) = (need("base_architecture")?, need("base_sha256")?);
        belongs(path, &architecture, &base_sha256, model, progress)?;
        let (edit, used) = match kind {
            Kind::Lora => {
                let (edit, parts) = terms(path, model, &|part| lora(&file, part))?;
                (edit, 2 * parts)
            }
            Kind::ControlVector => {
                let edit = control_vector(&file, model)?;
                let n = edit.len();
                (edit, n)
            }
        };
        if edit.is_empty() || file.tensors().len() != used {
            return Err(bad(format!(
                "holds {} tensors, of which {} terms can be used",
                file.tensors().len(),
                edit.len()
            )));
        }
        let strength =
            file.get("refusal_patch.strength").and_then(Value::as_f64).unwrap_or(f64::NAN) as f32;
        Ok(Sidecar { kind, architecture, base_sha256, method: need("method")?, strength, edit })
    }
}

/// Refuses another model's sidecar.
pub(super) fn belongs(
    path: &Path,
    architecture: &str,
    base_sha256: &str,
    model: &Model,
    progress: &dyn Progress,
) -> Result<()> {
    if architecture != model.spec.arch || base_sha256 != sha256_checkpoint(&model.file, progress)? {
        return Err(Error::Model(format!(
            "{}: belongs to another model (architecture {architecture}, sha256 {base_sha256}) \
             than {}",
            path.display(),
            model.file.path().display()
        )));
    }
    Ok(())
}

pub(super) fn later(path: &Path, what: &str) -> Error {
    Error::unsupported(
        format!("{}: sidecar of {what}", path.display()),
        format!("this program reads version {VERSION}; update it"),
    )
}

/// A tensor's name, its shape in GGUF's order, its values.
type Named = (String, Vec<u64>, Vec<f32>);

/// A part's u, once for each of its matrices, and v.
pub(super) type Vectors = (Vec<f32>, Vec<f32>);

/// All terms of a LoRA adapter, and how many parts they have. `find` gives those of a part.
pub(super) fn terms(
    path: &Path,
    model: &Model,
    find: &dyn Fn(&Part) -> Result<Option<Vectors>>,
) -> Result<(Edit, usize)> {
    let bad = |what: String| Error::format(path, None, what);
    let (mut edit, mut used) = (Edit::new(), 0);
    for layer in 0..model.spec.layers {
        for &writer in model.spec.writers(layer) {
            let parts = model.parts(layer, writer)?;
            let (mut us, mut v) = (Vec::new(), Vec::new());
            let mut found = 0;
            for part in &parts {
                let Some((b, a)) = find(part)? else { continue };
                let (rows, cols) = part.stack.shape();
                let n = part.stack.len();
                if (b.len(), a.len()) != (rows * n, cols * n) {
                    return Err(bad(format!(
                        "its vectors of block {layer} have {} and {} elements, the model's tensor \
                         {} is {n} x {rows} x {cols}",
                        b.len(),
                        a.len(),
                        part.tensor
                    )));
                }
                us.extend(b);
                v.extend(a);
                found += 1;
            }
            if found == 0 {
                continue;
            }
            let u = us[..model.spec.hidden].to_vec();
            if found < parts.len() || us.chunks_exact(u.len()).any(|other| other != u) {
                return Err(bad(format!(
                    "its terms of the experts of block {layer} don't belong together; write it \
                     again with `emit` lora"
                )));
            }
            used += found;
            edit.push(RankOne { layer, writer, u, v });
        }
    }
    Ok((edit, used))
}

fn lora(file: &Gguf, part: &Part) -> Result<Option<Vectors>> {
    let half = |h: &str| file.tensor(&format!("{}.lora_{h}", part.tensor));
    match (half("b"), half("a")) {
        (Some(b), Some(a)) => Ok(Some((vector(file, b)?, vector(file, a)?))),
        _ => Ok(None),
    }
}

/// A control vector's terms: constants, without a gate.
fn control_vector(file: &Gguf, model: &Model) -> Result<Edit> {
    let mut edit = Edit::new();
    for layer in 0..model.spec.layers {
        let Some(t) = file.tensor(&format!("direction.{layer}")) else { continue };
        let u = vector(file, t)?;
        if u.len() != model.spec.hidden {
            let what = format!(
                "tensor {} has {} elements, the model's width is {}",
                t.name,
                u.len(),
                model.spec.hidden
            );
            return Err(Error::format(file.path(), t.offset, what));
        }
        edit.push(RankOne { layer, writer: Writer::Ffn, u, v: Vec::new() });
    }
    Ok(edit)
}

fn vector(file: &Gguf, t: &Tensor) -> Result<Vec<f32>> {
    if t.type_id != Encoding::F32.ggml_id() {
        return Err(Error::format(file.path(), t.offset, format!("tensor {} must be F32", t.name)));
    }
    let bytes = file.bytes(t).chunks_exact(4);
    let x: Vec<f32> = bytes.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    match x.iter().all(|x| x.is_finite()) {
        true => Ok(x),
        false => {
            Err(Error::format(file.path(), t.offset, format!("tensor {} is not finite", t.name)))
        }
    }
}
