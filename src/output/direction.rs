//! A refusal direction as a file: safetensors with a unit vector a block and its origin in the metadata.

use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::checkpoint::sha256_file;
use crate::direction::Direction;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::progress::Progress;

/// Format version; a reader refuses a later one.
const VERSION: &str = "1";

/// Saved unit vectors: (block, `[hidden]`, gap).
pub type Saved = Vec<(usize, Vec<f32>, f64)>;

/// Writes the directions at the deciding position, tensors `direction.<block>`, F32 `[hidden]`.
pub fn write_direction(
    path: &Path,
    model: &Model,
    directions: &[Direction],
    scores: &str,
    prompts_sha256: &str,
    progress: &dyn Progress,
) -> Result<()> {
    let deciding: Vec<&Direction> = directions.iter().filter(|d| d.position == 0).collect();
    let bytes: Vec<(String, Vec<u8>)> = deciding
        .iter()
        .map(|d| (format!("direction.{}", d.layer), d.unit.iter().flat_map(|x| x.to_le_bytes()).collect()))
        .collect();
    let views = bytes
        .iter()
        .map(|(name, b)| Ok((name.as_str(), TensorView::new(Dtype::F32, vec![b.len() / 4], b)?)))
        .collect::<std::result::Result<Vec<_>, safetensors::SafeTensorError>>();
    let gaps: Vec<f64> = deciding.iter().map(|d| d.gap).collect();
    let text = |v: &dyn std::fmt::Display| v.to_string();
    let metadata = HashMap::from([
        ("refusal_patch.direction".to_string(), VERSION.to_string()),
        ("version".to_string(), env!("CARGO_PKG_VERSION").to_string()),
        ("architecture".to_string(), model.spec.arch.clone()),
        ("layers".to_string(), text(&model.spec.layers)),
        ("hidden".to_string(), text(&model.spec.hidden)),
        ("model_sha256".to_string(), sha256_file(model.file.path(), progress)?),
        ("prompts_sha256".to_string(), prompts_sha256.to_string()),
        ("gaps".to_string(), format!("{gaps:?}")),
        ("scores".to_string(), scores.to_string()),
        (
            "meaning".to_string(),
            "unit vectors from harmless to harmful, residual stream after the block, deciding position"
                .into(),
        ),
    ]);
    let wrong = |e: safetensors::SafeTensorError| Error::format(path, None, e.to_string());
    let file = safetensors::serialize(views.map_err(wrong)?, Some(metadata)).map_err(wrong)?;
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut temp = tempfile::Builder::new().tempfile_in(folder).map_err(Error::io(path))?;
    std::io::Write::write_all(&mut temp, &file).map_err(Error::io(path))?;
    temp.persist(path).map_err(|e| Error::io(path)(e.error))?;
    Ok(())
}

/// Reads directions for a model; the second value warns when they come from another file.
///
/// # Errors
/// Not such a file, a later version, or one of a model with another architecture, width or depth.
pub fn read_direction(path: &Path, model: &Model) -> Result<(Saved, Option<String>)> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let wrong =
        |e: safetensors::SafeTensorError| Error::format(path, None, format!("not a direction file: {e}"));
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(wrong)?;
    let none = HashMap::new();
    let meta = header.metadata().as_ref().unwrap_or(&none);
    let get = |key: &str| meta.get(key).map_or("", String::as_str);
    match get("refusal_patch.direction") {
        VERSION => {}
        "" => {
            return Err(Error::format(
                path,
                None,
                "not a direction file; `refusal-patch derive -o` writes them",
            ))
        }
        later => {
            return Err(Error::unsupported(
                format!("{}: direction file of version {later}", path.display()),
                format!("this program reads version {VERSION}; update it"),
            ))
        }
    }
    let spec = &model.spec;
    for (key, here) in [
        ("architecture", spec.arch.clone()),
        ("layers", spec.layers.to_string()),
        ("hidden", spec.hidden.to_string()),
    ] {
        if get(key) != here {
            return Err(Error::Model(format!(
                "{}: the direction was derived from a model with {key} {}, this one has {here}",
                path.display(),
                get(key)
            )));
        }
    }
    let gaps: Vec<f64> = serde_json::from_str(get("gaps")).unwrap_or_default();
    let tensors = SafeTensors::deserialize(&bytes).map_err(wrong)?;
    let mut saved = Vec::new();
    for layer in 0..spec.layers {
        let t = tensors.tensor(&format!("direction.{layer}")).map_err(wrong)?;
        let unit: Vec<f32> =
            t.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let length = crate::edit::fold::norm(&unit);
        let gap = gaps.get(layer).copied().unwrap_or(f64::NAN);
        if t.dtype() != Dtype::F32
            || unit.len() != spec.hidden
            || !(length - 1.0).abs().lt(&1e-3)
            || gap.is_nan()
            || gap <= 0.0
        {
            return Err(Error::format(
                path,
                None,
                format!(
                    "direction.{layer} must be a unit vector of {} F32 values with a gap above 0",
                    spec.hidden
                ),
            ));
        }
        saved.push((layer, unit, gap));
    }
    let here = sha256_file(model.file.path(), &crate::progress::Silent)?;
    let warning = (get("model_sha256") != here).then(|| {
        format!(
            "{}: the direction was derived from another file than {}",
            path.display(),
            model.file.path().display()
        )
    });
    Ok((saved, warning))
}
