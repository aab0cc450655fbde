//! Prompts as a model reads them. One that thinks before it answers decides twice: where it may not
//! think, and after a thought.

use super::judge::Verdict;
use super::{Answer, AnswerOptions, Evaluator};
use crate::error::Result;
use crate::forward::Generated;
use crate::text::{thinking, Prompt, PromptRecord, Thinking};

/// Tokens of a thought: a longer one is cut off there and closed.
pub const THOUGHT: usize = 32;

/// Prompts, each with the tokens that the model reads before its answer.
pub struct Asked<'p> {
    /// The prompts; those that are asked again after a thought come last.
    pub prompts: Vec<&'p PromptRecord>,
    /// The rendered prompts, and the thoughts where there are any.
    pub samples: Vec<Prompt>,
    /// How many are asked without a thought.
    pub plain: usize,
    /// The thoughts of the others; `None` where the model answered at once.
    pub thoughts: Vec<Option<Thought>>,
}

/// A thought between a prompt and its answer.
#[derive(Clone, Debug)]
pub struct Thought {
    /// The sample's position from which on it only closes: of the last token that says something,
    /// or of the tag that cut it off.
    pub closes: usize,
    /// Whether the model ended its turn in it: with thinking on such a prompt is never answered.
    pub ended: bool,
}

impl Asked<'_> {
    /// The tokens that are read.
    pub fn sequences(&self) -> Vec<Vec<u32>> {
        self.samples.iter().map(|s| s.tokens.clone()).collect()
    }

    /// Whether some are asked after a thought.
    pub fn think(&self) -> bool {
        self.plain < self.prompts.len()
    }

    /// Leaves those without a thought.
    pub fn forget_thoughts(&mut self) {
        self.prompts.truncate(self.plain);
        self.samples.truncate(self.plain);
        self.thoughts.clear();
    }

    /// The thought in front of a prompt's answer.
    pub fn thought(&self, prompt: usize) -> Option<&Thought> {
        self.thoughts.get(prompt.checked_sub(self.plain)?)?.as_ref()
    }
}

impl Evaluator<'_> {
    /// Prompts without a thought.
    pub fn ask<'p>(&self, prompts: &[&'p PromptRecord]) -> Result<Asked<'p>> {
        Ok(Asked {
            samples: self.samples(prompts)?,
            prompts: prompts.to_vec(),
            plain: prompts.len(),
            thoughts: Vec::new(),
        })
    }

    /// Prompts without a thought, then `again` after a thought of the model's own, if it thinks.
    pub fn ask_twice<'p>(
        &self,
        prompts: &[&'p PromptRecord],
        again: &[&'p PromptRecord],
    ) -> Result<Asked<'p>> {
        let mut asked = self.ask(prompts)?;
        let template = &self.chat.template;
        // A template that takes no chat with thinking on is no reason to stop.
        let renders =
            || again.iter().all(|p| self.chat.prompt_with(&p.prompt, Thinking::On).is_ok());
        if template.can_think && template.thinking == Thinking::Off && renders() {
            let (samples, thoughts) = self.think(again)?;
            if 2 * thoughts.iter().flatten().count() > again.len() {
                asked.prompts.extend(again);
                asked.samples.extend(samples);
                asked.thoughts = thoughts;
            }
        }
        Ok(asked)
    }

    /// The same prompts with what this model thinks.
    pub fn ask_again<'p>(&self, asked: &Asked<'p>) -> Result<Asked<'p>> {
        let (after, thoughts) = self.think(&asked.prompts[asked.plain..])?;
        let samples = [&asked.samples[..asked.plain], &after].concat();
        Ok(Asked { prompts: asked.prompts.clone(), samples, plain: asked.plain, thoughts })
    }

    /// Prompts after what this model thinks of them.
    pub fn ask_after_thoughts<'p>(&self, prompts: &[&'p PromptRecord]) -> Result<Asked<'p>> {
        let (samples, thoughts) = self.think(prompts)?;
        Ok(Asked { prompts: prompts.to_vec(), samples, plain: 0, thoughts })
    }

    /// Answers what was asked. Where the turn ended in a thought no answer came, however it would
    /// have begun after the closing tag.
    pub fn answer(&self, asked: &Asked, options: AnswerOptions) -> Result<Vec<Answer>> {
        let mut answers = self.answers_to(&asked.prompts, &asked.sequences(), options)?;
        for (i, answer) in answers.iter_mut().enumerate() {
            if asked.thought(i).is_some_and(|t| t.ended) {
                (answer.verdict, answer.refused) = (Verdict::Unfinished, false);
                (answer.thinks, answer.refusal_log_odds) = (true, f64::NAN);
            }
        }
        Ok(answers)
    }

    /// Prompts rendered with thinking on and the model's own thought after each, closed: what is
    /// generated next is the answer. The template's tokens are the sample's post-instruction
    /// positions; the thought follows them.
    fn think(&self, prompts: &[&PromptRecord]) -> Result<(Vec<Prompt>, Vec<Option<Thought>>)> {
        if prompts.is_empty() {
            return Ok(Default::default());
        }
        let mut samples: Vec<Prompt> = Vec::new();
        for p in prompts {
            samples.push(self.chat.prompt_with(&p.prompt, Thinking::On)?);
        }
        let sequences: Vec<Vec<u32>> = samples.iter().map(|s| s.tokens.clone()).collect();
        let generated = self.generate(&sequences, THOUGHT.min(self.room(&sequences)))?;
        let thoughts =
            samples.iter_mut().zip(&generated).map(|(s, g)| self.close(&mut s.tokens, g)).collect();
        Ok((samples, thoughts))
    }

    /// Appends the leading thinking block of the generated answer to the prompt tokens, closed.
    /// `None` if the answer has none.
    fn close(&self, read: &mut Vec<u32>, generated: &Generated) -> Option<Thought> {
        let (opened, answer) = (self.left_open(read), &generated.tokens[..]);
        let text = |n: usize| format!("{opened}{}", self.shown(&answer[..n]));
        let tag = thinking::begun(&text(answer.len()))?;
        let is_closed =
            |n: &usize| thinking::after(&text(*n)).is_some_and(|said| said.trim().is_empty());
        // A tag may be several tokens; line breaks follow the second one.
        let mut inside = (1..=answer.len()).skip_while(|n| !thinking::begins(&text(*n)));
        let first = inside.find(|n| thinking::after(&text(*n)).is_some());
        if let Some(first) = first.filter(is_closed) {
            let last = (first..=answer.len()).take_while(is_closed).last()?;
            let whole = text(first);
            let said = thinking::without_head(&whole[..whole.rfind(tag)?]).len();
            let content = (1..=first).find(|&n| text(n).len() >= said)?;
            let closes = read.len() + content - 1;
            read.extend(&answer[..last]);
            return Some(Thought { closes, ended: false });
        }
        // The head of the answer's message may have begun: it is written whole.
        let ends = |&t: &u32| thinking::ends(&self.chat.tokenizer.token_text(t));
        read.extend(&answer[..answer.iter().position(ends).unwrap_or(answer.len())]);
        let closes = read.len();
        read.extend(self.chat.tokenizer.encode_template(&thinking::closing(tag), &[]));
        Some(Thought { closes, ended: generated.end.is_some() })
    }
}
