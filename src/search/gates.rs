//! The gates of the writers that may be edited, fitted once for whatever direction they will open to.

use std::collections::HashMap;

use super::ground::Ground;
use super::material::{Inputs, Material};
use crate::edit::gate::{fit, Gate};
use crate::error::Result;
use crate::evaluate::Evaluator;
use crate::model::Writer;
use crate::text::{Set, Split};

/// Fitted gates by block and writer; a writer whose inputs do not tell the prompts apart has none.
#[derive(Default)]
pub(super) struct Gates {
    fitted: HashMap<(usize, Writer), Gate>,
}

impl Gates {
    /// Fits the gates of all writers of some blocks. The writers' inputs of a few blocks at a time are held, as many as fit
    /// into half of the memory, each group at the price of another pass over the weights.
    pub fn fit(ground: &Ground, layers: &[usize]) -> Result<Gates> {
        let (evaluator, prompts) = (ground.evaluator, ground.prompts);
        let train = prompts.split(Split::Train);
        let answers = evaluator.answers(&train, 0, ground.settings.max_new_tokens, &[])?;
        let refusals = answers.iter().filter(|a| a.refused && a.set == Set::Harmful);
        let forced: Vec<&[u32]> = refusals.take(64).map(|a| &a.answer[..]).collect();
        let material = Material::build(evaluator, &train, &answers, &forced)?;
        let held_out = Material::build(evaluator, &ground.validation, &ground.base.answers, &forced)?;
        let spec = &evaluator.model.spec;
        let bytes =
            (material.rows() + held_out.rows()) * (spec.widest_ffn() + spec.heads * spec.head_dim) * 4;
        let at_once = (evaluator.memory / 2 / bytes.max(1)).max(1);
        let mut gates = Gates::default();
        for group in layers.chunks(at_once) {
            gates.add(evaluator, &material.inputs(evaluator, group)?, &held_out.inputs(evaluator, group)?)?;
        }
        Ok(gates)
    }

    fn add(&mut self, evaluator: &Evaluator, train: &Inputs, held_out: &Inputs) -> Result<()> {
        for (key, a) in train {
            crate::progress::check()?;
            let Some(b) = held_out.get(key) else { continue };
            if let Some(gate) = fit(a, b, evaluator.model.spec.columns(key.1))? {
                self.fitted.insert(*key, gate);
            }
        }
        Ok(())
    }

    /// The gate of a writer.
    pub fn get(&self, layer: usize, writer: Writer) -> Option<&Gate> {
        self.fitted.get(&(layer, writer))
    }
}
