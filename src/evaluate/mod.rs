//! Refusal, over-refusal, divergence and perplexity of a checkpoint.

mod asked;
mod drafts;
pub mod energy;
pub mod judge;
mod rates;
mod scores;
pub mod stats;
mod words;

pub use asked::{Asked, Thought, THOUGHT};
pub use drafts::{Drafts, Read as DraftRead};
pub use rates::{categories, Change, Interval, Rate, NEVER};
pub use scores::{Drift, Scores, Unedited};

use serde::Serialize;

use crate::edit::Edit;
use crate::error::{Error, Result};
use crate::forward::{Compute, Generated, Head, Readout, Runner};
use crate::model::Model;
use crate::progress::Progress;
use crate::text::{thinking, Chat, Prompt, PromptRecord, Set, Thinking};

/// New tokens per answer, greedy.
pub const MAX_NEW_TOKENS: usize = 32;
/// Positions of an answer that the divergence is averaged over.
pub const KL_POSITIONS: usize = 32;
/// How many times more often a token must open refusals than answers to harmless prompts where it
/// opens these, too.
const CLEARLY: f64 = 4.0;
/// The built-in text that perplexity is measured on.
pub const PERPLEXITY_TEXT: &str = include_str!("perplexity.txt");
/// Tokens per window of that text.
const WINDOW: usize = 256;

/// A model ready to be measured.
#[derive(Clone, Copy)]
pub struct Evaluator<'a> {
    /// The checkpoint.
    pub model: &'a Model,
    /// Its tokenizer and template.
    pub chat: &'a Chat,
    /// Where products run.
    pub compute: &'a Compute,
    /// The edit that it runs under, on every token.
    pub edit: Option<&'a Edit>,
    /// Bytes for activations.
    pub memory: usize,
    /// Told about progress.
    pub progress: &'a dyn Progress,
}

/// How prompts are answered.
#[derive(Clone, Copy, Debug)]
pub struct AnswerOptions<'o> {
    /// Most new tokens.
    pub max_new: usize,
    /// The refusal tokens of the log-odds.
    pub opening: &'o [u32],
}

impl AnswerOptions<'_> {
    /// Without log-odds, for which [`Evaluator::read_refusals`] is asked later.
    pub fn new(max_new: usize) -> AnswerOptions<'static> {
        AnswerOptions { max_new, opening: &[] }
    }
}

/// One prompt's outcome.
#[derive(Clone, Debug, Serialize)]
pub struct Answer {
    /// The prompt's id.
    pub id: String,
    /// `harmful`, `harmless` or `borderline`.
    pub set: Set,
    /// Its category, where the prompt set has them.
    pub category: String,
    /// The request.
    pub prompt: String,
    /// What the model read.
    #[serde(skip)]
    pub read: Vec<u32>,
    /// ln(p / (1 − p)), p the mass of the tokens that open a refusal at the first answer position;
    /// no number (`null` in JSON) where the model thinks first.
    pub refusal_log_odds: f64,
    /// Whether the first token opens no answer but thinking: with thinking on, or where a block is
    /// opened all the same.
    pub thinks: bool,
    /// The ten likeliest first tokens.
    pub top: Vec<TopToken>,
    /// The greedy answer.
    pub continuation: String,
    /// Its class, by [`judge::judge`].
    pub verdict: judge::Verdict,
    /// Whether that is a refusal: what every rate counts.
    pub refused: bool,
    /// The answer's tokens.
    #[serde(skip)]
    pub answer: Vec<u32>,
    /// The normed final state that the first of them was read from.
    #[serde(skip)]
    pub first: Vec<f32>,
}

/// A token and its log-probability.
#[derive(Clone, Debug, Serialize)]
pub struct TopToken {
    /// Token id.
    pub id: u32,
    /// Its text.
    pub token: String,
    /// ln p.
    pub logprob: f32,
}

impl<'a> Evaluator<'a> {
    /// A forward pass over this evaluator's model.
    pub fn runner(&self) -> Runner<'a> {
        Runner::new(self.model, self.compute, self.edit, self.memory, self.progress)
    }

    /// The same model under an edit.
    pub fn under<'b>(&self, edit: &'b Edit) -> Evaluator<'b>
    where
        'a: 'b,
    {
        Evaluator { edit: Some(edit), ..*self }
    }

    /// What the output matrix makes of final hidden states: as [`Head::read`].
    ///
    /// # Errors
    /// Numbers that are not finite, with the tensor that they come from.
    pub fn read_head<'p>(
        &self,
        states: &[f32],
        k: usize,
        asked: impl Fn(usize) -> &'p [u32],
    ) -> Result<Vec<Readout>> {
        Ok(self.read_beside(states, k, asked, &[])?.0)
    }

    /// As [`Evaluator::read_head`], with divergences: as [`Head::read_beside`].
    ///
    /// # Errors
    /// Numbers that are not finite, with the tensor that they come from.
    pub fn read_beside<'p>(
        &self,
        states: &[f32],
        k: usize,
        asked: impl Fn(usize) -> &'p [u32],
        beside: &[(usize, &[f32])],
    ) -> Result<(Vec<Readout>, Vec<f64>)> {
        let (reads, kl) =
            Head::new(self.model, self.compute)?.read_beside(states, k, asked, beside)?;
        match reads.iter().all(|r| r.log_sum.is_finite()) {
            true => Ok((reads, kl)),
            false => Err(self.model.output_damaged()?),
        }
    }

    /// Renders and tokenizes prompts.
    pub fn samples(&self, prompts: &[&PromptRecord]) -> Result<Vec<Prompt>> {
        prompts.iter().map(|p| self.sample(&p.prompt)).collect()
    }

    /// Renders and tokenizes one request.
    pub fn sample(&self, request: &str) -> Result<Prompt> {
        self.chat.prompt(request)
    }

    /// Checks that the model answers at once, without thinking first.
    ///
    /// # Errors
    /// Most of them think first.
    pub fn answers_at_once(&self, answers: &[Answer]) -> Result<()> {
        if !mostly_think(answers) {
            return Ok(());
        }
        Err(Error::Model(format!(
            "{}: most answers open a thinking block with thinking off, so their first tokens say \
             nothing about refusal; give a template that closes the block with `chat_template`",
            self.model.file.path().display()
        )))
    }

    /// First tokens of refusals under this tokenizer, after this template: those of the listed
    /// openings and of the refusals in `answers`, without tokens that carry over 5 % of the mass on
    /// average where harmless prompts are answered and not refused (a token that opens everything
    /// says nothing), unless refusals give them four times as much.
    ///
    /// # Errors
    /// Most of the answers think first.
    pub fn refusal_tokens(&self, answers: &[Answer]) -> Result<Vec<u32>> {
        self.answers_at_once(answers)?;
        let mut found: Vec<u32> = Vec::new();
        for opening in judge::OPENINGS {
            for text in [opening.to_string(), format!(" {opening}")] {
                let tokens = self.chat.tokenizer.encode(&text, false);
                found.extend(tokens.first());
            }
        }
        found.extend(answers.iter().filter(|a| a.refused).filter_map(|a| a.answer.first()));
        found.sort_unstable();
        found.dedup();
        let harmless: Vec<&Answer> =
            answers.iter().filter(|a| a.set == Set::Harmless && !a.refused).collect();
        if harmless.is_empty() {
            return Ok(found);
        }
        let masses = |of: &[&Answer]| -> Result<Vec<f64>> {
            let states: Vec<f32> = of.iter().flat_map(|a| a.first.iter().copied()).collect();
            let reads = self.read_head(&states, 0, |_| &found)?;
            let mean = |k: usize| {
                reads.iter().map(|r| f64::from(r.asked[k]).exp()).sum::<f64>()
                    / reads.len().max(1) as f64
            };
            Ok((0..found.len()).map(mean).collect())
        };
        let refused: Vec<&Answer> = answers
            .iter()
            .filter(|a| a.refused && a.first.len() == self.model.spec.hidden)
            .collect();
        let (answered, refused) = (masses(&harmless)?, masses(&refused)?);
        let says = |k: usize| answered[k] <= 0.05 || refused[k] >= CLEARLY * answered[k];
        Ok((0..found.len()).filter(|&k| says(k)).map(|k| found[k]).collect())
    }

    /// Fills in the log-odds of answers that were given before it was known which tokens open a
    /// refusal.
    pub fn read_openings(&self, answers: &mut [Answer], opening: &[u32]) -> Result<()> {
        let states: Vec<f32> = answers.iter().flat_map(|a| a.first.iter().copied()).collect();
        let reads = self.read_head(&states, 0, |_| opening)?;
        for (answer, read) in answers.iter_mut().zip(reads) {
            answer.refusal_log_odds = if answer.thinks { f64::NAN } else { log_odds(&read.asked) };
        }
        Ok(())
    }

    /// Derives from answers which tokens open a refusal, and fills in their log-odds, unless most
    /// of them think first.
    pub fn read_refusals(&self, answers: &mut [Answer]) -> Result<()> {
        let opening =
            if mostly_think(answers) { Vec::new() } else { self.refusal_tokens(answers)? };
        self.read_openings(answers, &opening)
    }

    /// Reads the first answer position of each sequence.
    pub fn first_tokens(
        &self,
        sequences: &[Vec<u32>],
        top: usize,
        asked: &[u32],
    ) -> Result<Vec<Readout>> {
        let wanted: Vec<(usize, usize)> =
            sequences.iter().enumerate().map(|(i, s)| (i, s.len().saturating_sub(1))).collect();
        let hidden = self.runner().run(sequences, &[], &wanted, &mut ())?;
        self.read_head(&hidden, top, |_| asked)
    }

    /// Greedy continuations of sequences.
    pub fn generate(&self, sequences: &[Vec<u32>], max_new: usize) -> Result<Vec<Generated>> {
        let tokenizer = &self.chat.tokenizer;
        self.runner().generate(sequences, max_new, &|t| tokenizer.is_end(t))
    }

    /// Answers every prompt; with thinking on in no more tokens than the model's context has room
    /// for.
    pub fn answers(
        &self,
        prompts: &[&PromptRecord],
        options: AnswerOptions,
    ) -> Result<Vec<Answer>> {
        self.answer(&self.ask(prompts)?, options)
    }

    /// As [`Evaluator::answers`], for prompts that are rendered already.
    pub fn answers_to(
        &self,
        prompts: &[&PromptRecord],
        sequences: &[Vec<u32>],
        options: AnswerOptions,
    ) -> Result<Vec<Answer>> {
        let think = self.chat.template.thinking == Thinking::On;
        let AnswerOptions { max_new, opening } = options;
        let max_new = if think { max_new.min(self.room(sequences)) } else { max_new };
        let generated = self.generate(sequences, max_new)?;
        self.judged(prompts, sequences, generated, opening)
    }

    /// Judges generated answers.
    pub fn judged(
        &self,
        prompts: &[&PromptRecord],
        sequences: &[Vec<u32>],
        generated: Vec<Generated>,
        opening: &[u32],
    ) -> Result<Vec<Answer>> {
        let think = self.chat.template.thinking == Thinking::On;
        let states: Vec<f32> = generated.iter().flat_map(|g| g.first.iter().copied()).collect();
        let reads = self.read_head(&states, 10, |_| opening)?;
        let tokenizer = &self.chat.tokenizer;
        Ok(prompts
            .iter()
            .zip(sequences)
            .zip(reads.iter().zip(generated))
            .map(|((p, s), (read, g))| {
                let continuation = self.shown(&g.tokens);
                let opened = self.left_open(s);
                let verdict = judge::judge(&format!("{opened}{continuation}"));
                let thinks = think || !opened.is_empty() || thinking::begins(&continuation);
                Answer {
                    id: p.id.clone(),
                    set: p.set,
                    category: p.category.clone(),
                    prompt: p.prompt.clone(),
                    read: s.clone(),
                    refusal_log_odds: if thinks { f64::NAN } else { log_odds(&read.asked) },
                    thinks,
                    top: read
                        .top
                        .iter()
                        .map(|&(id, logprob)| TopToken {
                            id,
                            token: tokenizer.token_text(id),
                            logprob,
                        })
                        .collect(),
                    verdict,
                    refused: verdict == judge::Verdict::Refused,
                    continuation,
                    answer: g.tokens,
                    first: g.first,
                }
            })
            .collect())
    }

    /// New tokens that the model's context has room for after the longest of these, at least one.
    fn room(&self, sequences: &[Vec<u32>]) -> usize {
        let longest = sequences.iter().map(Vec::len).max().unwrap_or(0);
        match self.model.spec.context {
            0 => usize::MAX,
            n => n.saturating_sub(longest).max(1),
        }
    }

    /// The text of an answer, with the tags of thinking blocks where they are tokens that other
    /// texts don't show.
    fn shown(&self, tokens: &[u32]) -> String {
        let tokenizer = &self.chat.tokenizer;
        let tag = |&t: &u32| Some(tokenizer.token_text(t)).filter(|text| thinking::is_tag(text));
        let mut out = String::new();
        for part in tokens.split_inclusive(|t| tag(t).is_some()) {
            let last = part.last().and_then(tag);
            out += &tokenizer.decode(&part[..part.len() - usize::from(last.is_some())]);
            out += &last.unwrap_or_default();
        }
        out
    }

    /// The tag of the thinking block that these tokens leave open at their end, or nothing.
    fn left_open(&self, tokens: &[u32]) -> &'static str {
        // Tags are one token or a few, with a line break after them.
        let tail = &tokens[tokens.len().saturating_sub(12)..];
        thinking::left_open(&self.shown(tail)).map_or("", |(open, _)| open)
    }

    /// Final hidden states over the model's own answers: the positions that predict them, at most
    /// [`KL_POSITIONS`] each. `forced`: (prompt tokens, answer tokens).
    pub fn answer_states(&self, forced: &[(Vec<u32>, Vec<u32>)]) -> Result<(Vec<f32>, Vec<u32>)> {
        let sequences: Vec<Vec<u32>> =
            forced.iter().map(|(p, a)| [p.as_slice(), a].concat()).collect();
        let mut wanted = Vec::new();
        let mut next = Vec::new();
        for (i, (p, a)) in forced.iter().enumerate() {
            for (k, &token) in a.iter().take(KL_POSITIONS).enumerate() {
                wanted.push((i, p.len() + k - 1));
                next.push(token);
            }
        }
        Ok((self.runner().run(&sequences, &[], &wanted, &mut ())?, next))
    }

    /// Perplexity of given next tokens under given hidden states.
    pub fn perplexity_of(&self, states: &[f32], next: &[u32]) -> Result<f64> {
        let reads = self.read_head(states, 0, |i| &next[i..i + 1])?;
        Ok(perplexity(&reads.iter().map(|r| r.asked[0]).collect::<Vec<_>>()))
    }

    /// Perplexity of the built-in text, in windows of 256 tokens, without a template.
    pub fn perplexity(&self) -> Result<f64> {
        let sequences = self.text();
        let (wanted, next) = predictions(&sequences);
        let states = self.runner().run(&sequences, &[], &wanted, &mut ())?;
        self.perplexity_of(&states, &next)
    }

    /// The windows of the built-in text.
    fn text(&self) -> Vec<Vec<u32>> {
        let tokens = self.chat.tokenizer.encode(PERPLEXITY_TEXT, false);
        tokens.chunks(WINDOW).filter(|w| w.len() > 1).map(|w| self.with_bos(w)).collect()
    }

    /// A stretch of plain text as the model reads it.
    pub fn with_bos(&self, tokens: &[u32]) -> Vec<u32> {
        let tokenizer = &self.chat.tokenizer;
        let bos = if tokenizer.add_bos() { tokenizer.bos() } else { None };
        bos.into_iter().chain(tokens.iter().copied()).collect()
    }
}

/// Perplexity of tokens with these log-probabilities.
fn perplexity(log_probabilities: &[f32]) -> f64 {
    let sum = log_probabilities.iter().map(|&x| -f64::from(x)).sum::<f64>();
    (sum / log_probabilities.len().max(1) as f64).exp()
}

/// The positions of texts that predict one of their tokens, and these tokens.
fn predictions(sequences: &[Vec<u32>]) -> (Vec<(usize, usize)>, Vec<u32>) {
    let of =
        |(i, s): (usize, &Vec<u32>)| (1..s.len()).map(|p| ((i, p - 1), s[p])).collect::<Vec<_>>();
    sequences.iter().enumerate().flat_map(of).unzip()
}

/// Whether the first tokens of most of these open no answer.
fn mostly_think(answers: &[Answer]) -> bool {
    answers.iter().filter(|a| a.thinks).count() * 2 > answers.len()
}

/// ln(p / (1 − p)) of the summed mass of tokens with these log-probabilities.
pub fn log_odds(logprobs: &[f32]) -> f64 {
    let p = mass(logprobs).clamp(1e-12, 1.0 - 1e-12);
    (p / (1.0 - p)).ln()
}

/// The summed probability of tokens with these log-probabilities.
pub fn mass(logprobs: &[f32]) -> f64 {
    logprobs.iter().map(|&x| f64::from(x).exp()).sum()
}
