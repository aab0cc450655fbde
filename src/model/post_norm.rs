//! What stands between a writer's matrix and the residual stream.

use super::Model;
use crate::arch::{Role, Writer};
use crate::error::Result;

/// Share of a norm's mean squared weight that bounds what is made of its smallest ones.
const LEAST: f64 = 0.01;

/// The residual stream gets factor · w ⊙ y / rms(y) of a product y; without a norm factor · y.
#[derive(Clone, Debug)]
pub struct Behind {
    norm: Option<Vec<f32>>,
    factor: f32,
}

impl Model {
    /// What stands behind a writer; `None`: nothing, its product is added as it is.
    ///
    /// # Errors
    /// A norm's weight that can't be read.
    pub fn behind(&self, layer: usize, writer: Writer) -> Result<Option<Behind>> {
        let (after, factor) = (self.spec.norms.after(), self.spec.scales.residual);
        if !after && factor == 1.0 {
            return Ok(None);
        }
        let role = match writer {
            Writer::Attention => Role::AttnPostNorm,
            _ => Role::FfnPostNorm,
        };
        let norm = if after { Some(self.norm(role, layer)?) } else { None };
        Ok(Some(Behind { norm, factor }))
    }
}

impl Behind {
    /// Whether it is a norm: then what is added depends on the length of the product.
    pub fn is_norm(&self) -> bool {
        self.norm.is_some()
    }

    /// The direction of the product that is seen along `unit` in the residual stream.
    pub fn seen(&self, unit: &[f32]) -> Vec<f32> {
        let weight = |i: usize| self.norm.as_ref().map_or(1.0, |w| w[i]);
        unit.iter().enumerate().map(|(i, r)| r * weight(i) * self.factor).collect()
    }

    /// What must be added to a product of root mean square `rms` to add `unit` to the residual
    /// stream, as long as it changes that length little: the norm fixes the length of what is
    /// added, so that more of one direction is less of all others.
    pub fn written(&self, unit: &[f32], rms: f64) -> Vec<f32> {
        let factor = f64::from(self.factor);
        let Some(norm) = &self.norm else {
            return unit.iter().map(|r| (f64::from(*r) / factor) as f32).collect();
        };
        let squares = norm.iter().map(|w| f64::from(*w) * f64::from(*w));
        let least = LEAST * squares.sum::<f64>() / norm.len().max(1) as f64;
        let of = |(r, w): (&f32, &f32)| {
            let (r, w) = (f64::from(*r), f64::from(*w));
            (rms / factor * r * w / (w * w + least)) as f32
        };
        unit.iter().zip(norm).map(of).collect()
    }
}
