//! Prompts as a model reads them. One that thinks before it answers decides twice: where it may not think, and behind a thought.

use super::Evaluator;
use crate::direction::Sample;
use crate::error::Result;
use crate::forward::Sequence;
use crate::text::{thinking, PromptRecord, Thinking};

/// Tokens of a thought: a longer one is cut off there and closed.
pub const THOUGHT: usize = 32;

/// Prompts with what is read of each before the first token of an answer.
pub struct Asked<'p> {
    /// The prompts; those that are asked again behind a thought come last.
    pub prompts: Vec<&'p PromptRecord>,
    /// The rendered prompts, and the thoughts where there are any.
    pub samples: Vec<Sample>,
    /// How many are asked without a thought.
    pub plain: usize,
}

impl Asked<'_> {
    /// As sequences that run under an edit (0: none).
    pub fn sequences(&self, edit: usize) -> Vec<Sequence> {
        self.samples.iter().map(|s| Sequence { tokens: s.tokens.clone(), edit }).collect()
    }

    /// Whether any are asked behind a thought.
    pub fn think(&self) -> bool {
        self.plain < self.prompts.len()
    }

    /// Leaves those without a thought.
    pub fn forget_thoughts(&mut self) {
        self.prompts.truncate(self.plain);
        self.samples.truncate(self.plain);
    }
}

impl Evaluator<'_> {
    /// Prompts without a thought.
    pub fn ask<'p>(&self, prompts: &[&'p PromptRecord]) -> Result<Asked<'p>> {
        Ok(Asked { samples: self.samples(prompts)?, prompts: prompts.to_vec(), plain: prompts.len() })
    }

    /// Prompts without a thought, then `again` behind a thought of the model's own, where it thinks.
    pub fn ask_twice<'p>(
        &self,
        prompts: &[&'p PromptRecord],
        again: &[&'p PromptRecord],
    ) -> Result<Asked<'p>> {
        let mut asked = self.ask(prompts)?;
        let template = &self.chat.template;
        // A template that takes no chat with thinking on is no reason to stop.
        let renders = || again.iter().all(|p| self.chat.prompt_with(&p.prompt, Thinking::On).is_ok());
        if template.can_think && template.thinking == Thinking::Off && renders() {
            let (samples, thoughts) = self.think(again, 0)?;
            if 2 * thoughts > again.len() {
                asked.prompts.extend(again);
                asked.samples.extend(samples);
            }
        }
        Ok(asked)
    }

    /// The same prompts with what this model thinks under `edit`.
    pub fn ask_again<'p>(&self, asked: &Asked<'p>, edit: usize) -> Result<Asked<'p>> {
        let mut samples = asked.samples[..asked.plain].to_vec();
        samples.extend(self.think(&asked.prompts[asked.plain..], edit)?.0);
        Ok(Asked { prompts: asked.prompts.clone(), samples, plain: asked.plain })
    }

    /// Prompts behind what this model thinks of them under `edit`.
    pub fn ask_behind_thoughts<'p>(&self, prompts: &[&'p PromptRecord], edit: usize) -> Result<Asked<'p>> {
        Ok(Asked { prompts: prompts.to_vec(), samples: self.think(prompts, edit)?.0, plain: 0 })
    }

    /// Prompts rendered with thinking on and the model's own thought behind each, closed: what is generated next is the answer.
    /// The template's tokens are the sample's post-instruction positions; the thought follows them. Also how many there are.
    fn think(&self, prompts: &[&PromptRecord], edit: usize) -> Result<(Vec<Sample>, usize)> {
        let mut samples: Vec<Sample> = Vec::new();
        if prompts.is_empty() {
            return Ok((samples, 0));
        }
        for p in prompts {
            samples.push(self.chat.prompt_with(&p.prompt, Thinking::On)?.into());
        }
        let sequences: Vec<Sequence> =
            samples.iter().map(|s| Sequence { tokens: s.tokens.clone(), edit }).collect();
        let most = THOUGHT.min(self.room(&sequences));
        let thoughts: Vec<Option<Vec<u32>>> = self
            .generate(&sequences, most)?
            .iter()
            .zip(&sequences)
            .map(|(g, s)| self.closed(self.left_open(&s.tokens), &g.tokens))
            .collect();
        let count = thoughts.iter().flatten().count();
        for (sample, thought) in samples.iter_mut().zip(thoughts) {
            sample.tokens.extend(thought.into_iter().flatten());
        }
        Ok((samples, count))
    }

    /// The thought that an answer begins with, up to where what is said behind it begins. `opened`: the tag that the prompt has
    /// left open. `None`: it thinks nothing.
    fn closed(&self, opened: &str, answer: &[u32]) -> Option<Vec<u32>> {
        let text = |n: usize| format!("{opened}{}", self.shown(&answer[..n]));
        let close = thinking::begun(&text(answer.len()))?;
        let is_closed = |n: &usize| thinking::behind(&text(*n)).is_some_and(|said| said.trim().is_empty());
        // A tag may be several tokens; line breaks follow the second one.
        let mut inside = (1..=answer.len()).skip_while(|n| !thinking::begins(&text(*n)));
        let first = inside.find(|n| thinking::behind(&text(*n)).is_some());
        if let Some(first) = first.filter(is_closed) {
            let last = (first..=answer.len()).take_while(is_closed).last()?;
            return Some(answer[..last].to_vec());
        }
        let tokenizer = &self.chat.tokenizer;
        Some([answer, &tokenizer.encode_template(&format!("\n{close}\n\n"), &[])].concat())
    }
}
