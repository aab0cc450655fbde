//! Per-layer embeddings: what each block reads of a token beside the residual stream (transformers
//! `models/gemma4/modeling_gemma4.py`).

use rayon::prelude::*;

use super::block::rms_norm;
use super::runner::Runner;
use crate::arch::{PerLayer, Role};
use crate::error::Result;

/// The per-layer inputs of a pass's rows.
#[derive(Default)]
pub(super) struct Beside {
    /// `[tokens, layers * width]`; empty in models without per-layer embeddings.
    all: Vec<f32>,
    /// The token of each row: its own, or of a fork its parent's.
    of: Vec<usize>,
}

impl Beside {
    /// A fork reads what its parent reads.
    pub fn fork(&mut self, parent: usize) {
        self.of.push(self.of[parent]);
    }
}

impl Runner<'_> {
    /// The per-layer inputs of tokens. `embedded`: their scaled embeddings, `[tokens, hidden]`.
    pub(super) fn beside(&self, tokens: &[u32], embedded: &[f32]) -> Result<Beside> {
        let of = (0..tokens.len()).collect();
        let spec = &self.model.spec;
        let Some(PerLayer { width, .. }) = spec.per_layer else {
            return Ok(Beside { all: Vec::new(), of });
        };
        let [table, projection] = self.model.per_layer()?;
        let mut all = self.compute.matmul(embedded, tokens.len(), &projection)?;
        let root = 1.0 / (spec.hidden as f32).sqrt();
        all.par_iter_mut().for_each(|x| *x *= root);
        let mut all = rms_norm(&all, &self.model.per_layer_norm()?, spec.norm_eps);
        let (scale, half) = ((width as f32).sqrt(), std::f32::consts::FRAC_1_SQRT_2);
        let mut row = vec![0.0f32; table.cols];
        for (token, all) in tokens.iter().zip(all.chunks_exact_mut(table.cols)) {
            self.token(*token, &table, &mut row)?;
            all.iter_mut().zip(&row).for_each(|(a, x)| *a = (*a + scale * x) * half);
        }
        Ok(Beside { all, of })
    }

    /// Adds to the residual stream what block `layer` lets in of its per-layer inputs.
    pub(super) fn add_per_layer(
        &self,
        layer: usize,
        beside: &Beside,
        hidden: &mut [f32],
    ) -> Result<()> {
        let spec = &self.model.spec;
        let Some(PerLayer { width, .. }) = spec.per_layer else { return Ok(()) };
        let n = beside.of.len();
        let input: Vec<f32> = beside
            .of
            .iter()
            .flat_map(|token| &beside.all[(token * spec.layers + layer) * width..][..width])
            .copied()
            .collect();
        let mut gate = self.project(Role::PerLayerGate, layer, hidden, n)?;
        spec.activation.gate(&mut gate, &input);
        let y = self.project(Role::PerLayerOutput, layer, &gate, n)?;
        let y = rms_norm(&y, &self.model.norm(Role::PerLayerNorm, layer)?, spec.norm_eps);
        hidden.par_iter_mut().zip(&y).for_each(|(h, y)| *h += y);
        Ok(())
    }
}
