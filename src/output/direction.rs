//! A refusal direction as a file: safetensors with unit vectors, means and scores by block, their
//! origin in the metadata.

use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

use super::place;
use crate::checkpoint::sha256_checkpoint;
use crate::direction::Direction;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::progress::Progress;

/// Format version; a reader refuses another one.
const VERSION: u32 = 2;
/// The one metadata key; a map of several would be written in another order each time.
const KEY: &str = "refusal_patch.direction";
/// Larger files are none of ours.
const LARGEST: u64 = 4 << 30;

/// Saved unit vectors: (block, `[hidden]`).
pub type Saved = Vec<(usize, Vec<f32>)>;

/// Where a direction comes from and what it means.
#[derive(Serialize, Deserialize)]
struct Origin {
    version: u32,
    tool: String,
    architecture: String,
    layers: usize,
    hidden: usize,
    model_sha256: String,
    prompts_sha256: String,
    meaning: String,
    /// By block and position.
    scores: serde_json::Value,
}

/// Writes `direction.<block>`, `mean_harmful.<block>` and `mean_harmless.<block>`, each F32
/// `[positions, hidden]`: row 0 is the deciding position, row k the k-th post-instruction token
/// before it.
///
/// # Errors
/// What the file system says; OUT exists (without `force`) or is the model itself.
pub fn write_direction(
    path: &Path,
    model: &Model,
    directions: &[Direction],
    scores: serde_json::Value,
    prompts_sha256: &str,
    force: bool,
    progress: &dyn Progress,
) -> Result<()> {
    place::check_beside(&model.file, path, force)?;
    let mut bytes: Vec<(String, Vec<u8>)> = Vec::new();
    for layer in 0..model.spec.layers {
        let rows = || directions.iter().filter(move |d| d.layer == layer);
        let raw = |v: &[f32]| v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        bytes.push((format!("direction.{layer}"), rows().flat_map(|d| raw(&d.unit)).collect()));
        bytes.push((
            format!("mean_harmful.{layer}"),
            rows().flat_map(|d| raw(&d.means.harmful)).collect(),
        ));
        bytes.push((
            format!("mean_harmless.{layer}"),
            rows().flat_map(|d| raw(&d.means.harmless)).collect(),
        ));
    }
    let shape = |b: &[u8]| vec![b.len() / 4 / model.spec.hidden, model.spec.hidden];
    let views = bytes
        .iter()
        .map(|(name, b)| Ok((name.as_str(), TensorView::new(Dtype::F32, shape(b), b)?)))
        .collect::<std::result::Result<Vec<_>, safetensors::SafeTensorError>>();
    let origin = Origin {
        version: VERSION,
        tool: format!("refusal-patch {}", env!("CARGO_PKG_VERSION")),
        architecture: model.spec.arch.clone(),
        layers: model.spec.layers,
        hidden: model.spec.hidden,
        model_sha256: sha256_checkpoint(&model.file, progress)?,
        prompts_sha256: prompts_sha256.to_string(),
        meaning: "unit vectors from harmless to harmful and the class means they come from, \
            residual stream after the block; \
                  row 0: the deciding position, row k: the k-th post-instruction token before it"
            .into(),
        scores,
    };
    let origin = serde_json::to_string(&origin).map_err(|e| Error::Model(e.to_string()))?;
    let wrong = |e: safetensors::SafeTensorError| Error::format(path, None, e.to_string());
    let metadata = HashMap::from([(KEY.to_string(), origin)]);
    let file = safetensors::serialize(views.map_err(wrong)?, Some(metadata)).map_err(wrong)?;
    place::write_whole(path, &file, force)
}

/// Reads the directions at the deciding position for a model; the second value warns when they come
/// from another file.
///
/// # Errors
/// Not such a file, another version, or one of a model with another architecture, width or depth.
pub fn read_direction(
    path: &Path,
    model: &Model,
    progress: &dyn Progress,
) -> Result<(Saved, Option<String>)> {
    let len = std::fs::metadata(path).map_err(Error::io(path))?.len();
    if len > LARGEST {
        return Err(Error::format(path, None, format!("not a direction file: it has {len} bytes")));
    }
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let wrong = |e: safetensors::SafeTensorError| {
        Error::format(path, None, format!("not a direction file: {e}"))
    };
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(wrong)?;
    let Some(text) = header.metadata().as_ref().and_then(|m| m.get(KEY)) else {
        let what = "not a direction file; `refusal-patch derive -o` writes them";
        return Err(Error::format(path, None, what));
    };
    let damaged =
        |e: serde_json::Error| Error::format(path, None, format!("its metadata is damaged: {e}"));
    let any: serde_json::Value = serde_json::from_str(text).map_err(damaged)?;
    if any["version"] != VERSION {
        return Err(Error::unsupported(
            format!("{}: direction file of version {}", path.display(), any["version"]),
            format!(
                "this program reads version {VERSION}; update it, or derive the direction again"
            ),
        ));
    }
    let origin: Origin = serde_json::from_value(any).map_err(damaged)?;
    let spec = &model.spec;
    for (key, there, here) in [
        ("architecture", origin.architecture, spec.arch.clone()),
        ("layers", origin.layers.to_string(), spec.layers.to_string()),
        ("hidden", origin.hidden.to_string(), spec.hidden.to_string()),
    ] {
        if there != here {
            return Err(Error::Model(format!(
                "{}: the direction was derived from a model with {key} {there}, this one has \
                 {here}",
                path.display(),
            )));
        }
    }
    let tensors = SafeTensors::deserialize(&bytes).map_err(wrong)?;
    let mut saved = Vec::new();
    for layer in 0..spec.layers {
        let t = tensors.tensor(&format!("direction.{layer}")).map_err(wrong)?;
        let first = t.data().chunks_exact(4).take(spec.hidden);
        let unit: Vec<f32> = first.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let length = crate::num::norm(&unit);
        if t.dtype() != Dtype::F32
            || t.shape().last() != Some(&spec.hidden)
            || unit.len() != spec.hidden
            || !(length - 1.0).abs().lt(&1e-3)
        {
            return Err(Error::format(
                path,
                None,
                format!(
                    "direction.{layer} must begin with a unit vector of {} F32 values",
                    spec.hidden
                ),
            ));
        }
        saved.push((layer, unit));
    }
    let here = sha256_checkpoint(&model.file, progress)?;
    let warning = (origin.model_sha256 != here).then(|| {
        format!(
            "{}: the direction was derived from another file than {}",
            path.display(),
            model.file.path().display()
        )
    });
    Ok((saved, warning))
}
