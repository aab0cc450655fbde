//! The gates of the writers that may be edited. A gate does not depend on the direction, so one fit
//! serves all.

use std::collections::HashMap;

use super::baseline::Baseline;
use super::gate_rows::{Inputs, Material};
use super::lengths::{lengths, Lengths};
use super::training::Training;
use crate::arch::Writer;
use crate::edit::gate::{fit, Gate};
use crate::error::Result;
use crate::evaluate::Evaluator;
use crate::text::Set;
use crate::weights::pruned::dead_columns;

/// Fitted gates by block and writer; a writer whose inputs do not tell the prompts apart has none.
#[derive(Default)]
pub(super) struct Gates {
    fitted: HashMap<(usize, Writer), Gate>,
    /// What they are fitted on, and what the ridge is chosen on.
    material: Option<(Material, Material)>,
    lengths: Lengths,
}

impl Gates {
    /// Fits the gates of the writers of some blocks: of their routed experts where `routed`, else
    /// of the other writers. Blocks are taken in groups whose inputs fit into half of the memory;
    /// each group costs a pass over the weights.
    pub fn fit(
        &mut self,
        baseline: &Baseline,
        training: &Training,
        layers: &[usize],
        routed: bool,
    ) -> Result<()> {
        let (train, held_out) = match self.material.take() {
            Some(m) => m,
            None => material(baseline, training)?,
        };
        let spec = &baseline.evaluator.model.spec;
        let width = match (&spec.experts, routed) {
            (Some(e), true) => e.used * e.ffn,
            _ => spec.widest_ffn() + spec.widest_heads(),
        };
        let bytes = train.rows().max(held_out.rows()) * width * 4;
        let at_once = (baseline.evaluator.memory / 2 / bytes.max(1)).max(1);
        for group in layers.chunks(at_once) {
            let mut fits = HashMap::new();
            for (key, of) in self.read(baseline.evaluator, &train, group, routed)? {
                baseline.evaluator.progress.check()?;
                let parts = match (key.1, &spec.experts) {
                    (Writer::Experts, Some(e)) => e.count,
                    _ => 1,
                };
                if let Some(all) = fit(&of, spec.columns(key.0, key.1) / parts, parts)? {
                    fits.insert(key, all);
                }
            }
            for (key, of) in self.read(baseline.evaluator, &held_out, group, routed)? {
                if let Some(gate) = fits.get(&key).and_then(|all| all.choose(&of)) {
                    self.fitted.insert(key, gate);
                }
            }
        }
        self.material = Some((train, held_out));
        self.lengths.extend(lengths(baseline, layers)?);
        Ok(())
    }

    /// The writers' inputs, of a folder without those that a gate can't use.
    fn read(
        &self,
        evaluator: &Evaluator,
        m: &Material,
        layers: &[usize],
        routed: bool,
    ) -> Result<Inputs> {
        let mut inputs = m.inputs(evaluator, layers, routed)?;
        if evaluator.model.file.folder().is_none() {
            return Ok(inputs);
        }
        for (key, groups) in &mut inputs {
            for part in evaluator.model.parts(key.0, key.1)? {
                let dead: Vec<Vec<usize>> = part.stack.iter().map(|w| dead_columns(&w)).collect();
                groups.iter_mut().for_each(|g| g.silence(part.first, &dead));
            }
        }
        Ok(inputs)
    }

    /// What the norms behind a writer divide its product by where its gate opens; 1 where no norm
    /// follows.
    pub fn length(&self, layer: usize, writer: Writer) -> f64 {
        self.lengths.get(&(layer, writer)).copied().unwrap_or(1.0)
    }

    /// The gate of a writer.
    pub fn get(&self, layer: usize, writer: Writer) -> Option<&Gate> {
        self.fitted.get(&(layer, writer))
    }
}

/// Rows of the training prompts, and of the validation prompts.
fn material(baseline: &Baseline, training: &Training) -> Result<(Material, Material)> {
    let evaluator = baseline.evaluator;
    let Training { asked, answers } = training;
    let refusals = answers[..asked.plain].iter().filter(|a| a.refused && a.set == Set::Harmful);
    let forced: Vec<&[u32]> = refusals.take(64).map(|a| &a.answer[..]).collect();
    let fit = Material::build(evaluator, asked, answers, &forced)?;
    Ok((fit, Material::build(evaluator, &baseline.validation, &baseline.own.answers, &forced)?))
}
