//! The norm and the factor between a writer's matrix and the residual stream.

use super::Model;
use crate::arch::Writer;
use crate::error::Result;

/// Ridge of the division by a norm's weights, as a share of their mean square. It keeps small
/// weights from blowing up the result.
const RIDGE: f64 = 0.01;

/// The map from a writer's product y = W x to what is added to the residual stream: factor · w ⊙ y
/// / rms(y) with a norm of weight w, and factor · y without a norm.
#[derive(Clone, Debug)]
pub struct PostNorm {
    /// The norm's weight w, `[hidden]`.
    norm: Option<Vec<f32>>,
    /// Factor of the residual stream, [`Scales::residual`](crate::arch::Scales::residual).
    factor: f32,
}

impl Model {
    /// The norm and factor after a writer. `None` if its product is added to the residual stream
    /// unchanged.
    ///
    /// # Errors
    /// The norm's weight is missing or can't be read.
    pub fn post_norm(&self, layer: usize, writer: Writer) -> Result<Option<PostNorm>> {
        let (after, factor) = (self.spec.norms.after(), self.spec.scales.residual);
        if !after && factor == 1.0 {
            return Ok(None);
        }
        let norm = if after { Some(self.norm(writer.post_norm(), layer)?) } else { None };
        Ok(Some(PostNorm { norm, factor }))
    }
}

impl PostNorm {
    /// Whether there is a norm. With a norm, scaling the product doesn't change what is added to
    /// the residual stream.
    pub fn has_norm(&self) -> bool {
        self.norm.is_some()
    }

    /// The direction along which a product is read: factor · w ⊙ `unit`. The dot product of this
    /// direction with y, divided by rms(y) if there is a norm, is what y adds along `unit` in the
    /// residual stream.
    pub fn read_direction(&self, unit: &[f32]) -> Vec<f32> {
        let weight = |i: usize| self.norm.as_ref().map_or(1.0, |w| w[i]);
        unit.iter().enumerate().map(|(i, r)| r * weight(i) * self.factor).collect()
    }

    /// The vector that, added to a product of root mean square `rms`, adds `unit` to the residual
    /// stream. It is the ridge solution rms / factor · w ⊙ `unit` / (w² + ε), with ε = `RIDGE` ·
    /// mean(w²), or `unit` / factor without a norm. With a norm it holds only if the addition
    /// changes the product's length little: the norm fixes the length of its output, so that more
    /// of one direction is less of all others.
    pub fn write_direction(&self, unit: &[f32], rms: f64) -> Vec<f32> {
        let factor = f64::from(self.factor);
        let Some(norm) = &self.norm else {
            return unit.iter().map(|r| (f64::from(*r) / factor) as f32).collect();
        };
        let squares = norm.iter().map(|w| f64::from(*w) * f64::from(*w));
        let ridge = RIDGE * squares.sum::<f64>() / norm.len().max(1) as f64;
        let divide = |(r, w): (&f32, &f32)| {
            let (r, w) = (f64::from(*r), f64::from(*w));
            (rms / factor * r * w / (w * w + ridge)) as f32
        };
        unit.iter().zip(norm).map(divide).collect()
    }
}
