//! The norms and the factors between a writer's matrix and the residual stream.

use super::Model;
use crate::arch::Writer;
use crate::error::Result;

/// Ridge of the division by a norm's weights, as a share of their mean square. It keeps small
/// weights from blowing up the result.
const RIDGE: f64 = 0.01;

/// The map from a writer's product y = W x to what is added to the residual stream: factor · w ⊙ y
/// / rms(y) with a norm of weight w, and factor · y without a norm. Of two norms, one behind the
/// other, w is the product of the weights, and rms(y) the product of what the norms divide by.
#[derive(Clone, Debug)]
pub struct PostNorm {
    /// The norm's weight w, `[hidden]`.
    norm: Option<Vec<f32>>,
    /// [`Scales::residual`](crate::arch::Scales::residual), times the factor of the whole stream
    /// at the block's end.
    factor: f32,
}

impl Model {
    /// The norms and factors after a writer. `None` if its product is added to the residual stream
    /// unchanged.
    ///
    /// # Errors
    /// A norm's weight is missing or can't be read.
    pub fn post_norm(&self, layer: usize, writer: Writer) -> Result<Option<PostNorm>> {
        let factor = self.spec.scales.residual * self.output_scale(layer)?;
        let mut norm: Option<Vec<f32>> = None;
        for role in self.spec.post_norms(layer, writer) {
            let mut weight = self.norm(*role, layer)?;
            if let Some(inner) = norm {
                weight.iter_mut().zip(inner).for_each(|(w, inner)| *w *= inner);
            }
            norm = Some(weight);
        }
        if norm.is_none() && factor == 1.0 {
            return Ok(None);
        }
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
    /// residual stream after the block.
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
