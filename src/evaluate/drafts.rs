//! Answers under an edit, from drafts: most are the model's own answers, word for word. They are
//! read in one pass from the edit's first block on, and written only from where they part. The
//! result is what greedy generation gives.

use super::{predictions, Answer, AnswerOptions, Asked, Drift, Evaluator, Unedited};
use crate::error::Result;
use crate::forward::{Begun, Generated};
use crate::text::{Prompt, Set};

/// A model's own answers, and the text of the perplexity, run up to the block where edits begin.
pub struct Drafts<'u> {
    unedited: &'u Unedited,
    /// Of the harmful prompts, and of the others: either is read without the other.
    begun: [Begun; 2],
    /// By prompt: which of the two it belongs to, and its place there.
    places: Vec<(usize, usize)>,
    /// By prompt: where its answer begins.
    begins: Vec<usize>,
    text: Begun,
}

/// What an edited model says to the drafts.
pub struct Read {
    /// The likeliest tokens after each position that predicts one of an answer's tokens or what
    /// follows them.
    says: Vec<u32>,
    /// By prompt: its first in `says`; 0 of those that were not read.
    at: Vec<usize>,
    /// By prompt: the normed final state at the deciding position, `[hidden]`; empty of those that
    /// were not read.
    first: Vec<Vec<f32>>,
    /// ln p of the tokens of answers to harmless prompts, at most [`super::KL_POSITIONS`] each.
    log_probabilities: Vec<f32>,
    /// KL(IN ‖ this) there, nats.
    kl: Vec<f64>,
}

impl<'u> Drafts<'u> {
    /// The drafts of prompts that are asked without a thought. `unedited`: the model's own answers;
    /// `layer`: the first block that an edit may touch.
    pub fn new(
        evaluator: &Evaluator,
        asked: &Asked,
        unedited: &'u Unedited,
        layer: usize,
    ) -> Result<Drafts<'u>> {
        let samples = &asked.samples[..asked.plain];
        let whole = |(s, a): (&Prompt, &Answer)| [s.tokens.as_slice(), &a.answer].concat();
        let mut sequences = [Vec::new(), Vec::new()];
        let mut places = Vec::new();
        for ((prompt, sample), answer) in asked.prompts.iter().zip(samples).zip(&unedited.answers) {
            let part = usize::from(prompt.set != Set::Harmful);
            places.push((part, sequences[part].len()));
            sequences[part].push(whole((sample, answer)));
        }
        let [harmful, others] = sequences;
        let runner = evaluator.runner();
        Ok(Drafts {
            unedited,
            begun: [runner.begin(harmful, layer)?, runner.begin(others, layer)?],
            places,
            begins: samples.iter().map(|s| s.tokens.len()).collect(),
            text: runner.begin(evaluator.text(), layer)?,
        })
    }

    /// The same drafts, run on to `layer` by the unedited evaluator: for edits that begin there.
    pub fn advanced(&self, evaluator: &Evaluator, layer: usize) -> Result<Drafts<'u>> {
        let runner = evaluator.runner();
        let [harmful, others] = &self.begun;
        Ok(Drafts {
            unedited: self.unedited,
            begun: [runner.advance(harmful, layer)?, runner.advance(others, layer)?],
            places: self.places.clone(),
            begins: self.begins.clone(),
            text: runner.advance(&self.text, layer)?,
        })
    }

    /// The block that is to run next.
    pub fn layer(&self) -> usize {
        self.text.layer()
    }

    /// Bytes of the states.
    pub fn bytes(&self) -> usize {
        self.begun.iter().chain([&self.text]).map(Begun::bytes).sum()
    }

    /// Reads the drafts of some prompts under the evaluator's edit: cheap where all are harmful, or
    /// none. The output matrix must be that of the drafts' model.
    pub fn read(&self, evaluator: &Evaluator, prompts: &[usize]) -> Result<Read> {
        let d = evaluator.model.spec.hidden;
        let answers = &self.unedited.answers;
        let mut at = vec![0; answers.len()];
        let (mut states, mut order) = (Vec::new(), Vec::new());
        for (part, begun) in self.begun.iter().enumerate() {
            let mut wanted = Vec::new();
            for &i in prompts.iter().filter(|&&i| self.places[i].0 == part) {
                at[i] = states.len() / d + wanted.len();
                order.push(i);
                let (begin, n) = (self.begins[i], answers[i].answer.len());
                wanted.extend((0..=n).map(|k| (self.places[i].1, begin + k - 1)));
            }
            if !wanted.is_empty() {
                states.extend(evaluator.runner().resume(begun, &wanted)?);
            }
        }
        // The token that a state should predict, and IN's state beside, where divergence counts.
        let mut next: Vec<&[u32]> = vec![&[]; states.len() / d];
        let mut beside = Vec::new();
        for i in order {
            let Some(own) = self.unedited.states_of(i, d) else { continue };
            for (k, state) in own.chunks_exact(d).enumerate() {
                next[at[i] + k] = &answers[i].answer[k..k + 1];
                beside.push((at[i] + k, state));
            }
        }
        let (reads, kl) = evaluator.read_beside(&states, 1, |row| next[row], &beside)?;
        let mut first = vec![Vec::new(); answers.len()];
        for &i in prompts {
            first[i] = states[at[i] * d..(at[i] + 1) * d].to_vec();
        }
        Ok(Read {
            says: reads.iter().map(|r| r.top.first().map_or(0, |t| t.0)).collect(),
            at,
            first,
            log_probabilities: beside.iter().map(|&(row, _)| reads[row].asked[0]).collect(),
            kl,
        })
    }

    /// What [`Unedited::drift`] measures, from a reading of all prompts that are not harmful.
    pub fn drift(&self, evaluator: &Evaluator, read: &Read) -> Result<Drift> {
        Ok(Drift::new(&read.kl, &read.log_probabilities, self.perplexity(evaluator)?))
    }

    /// Perplexity of the built-in text, as [`Evaluator::perplexity`].
    fn perplexity(&self, evaluator: &Evaluator) -> Result<f64> {
        let (wanted, next) = predictions(self.text.sequences());
        evaluator.perplexity_of(&evaluator.runner().resume(&self.text, &wanted)?, &next)
    }

    /// The answers to some prompts, in at most `max_new` tokens, which none of the drafts may
    /// exceed.
    pub fn generate(
        &self,
        evaluator: &Evaluator,
        asked: &Asked,
        read: &Read,
        prompts: &[usize],
        max_new: usize,
    ) -> Result<Vec<Generated>> {
        let tokenizer = &evaluator.chat.tokenizer;
        let mut out = Vec::new();
        // What has to be written: the prompt's place in `out`, with its beginning.
        let (mut open, mut begun): (Vec<usize>, Vec<Vec<u32>>) = (Vec::new(), Vec::new());
        for &i in prompts {
            let draft = &self.unedited.answers[i].answer;
            let said = &read.says[read.at[i]..=read.at[i] + draft.len()];
            let same = said.iter().zip(draft).take_while(|(a, b)| a == b).count();
            let mut answer = Generated {
                tokens: draft[..same].to_vec(),
                end: None,
                first: read.first[i].clone(),
            };
            if same < max_new {
                if tokenizer.is_end(said[same]) {
                    answer.end = Some(said[same]);
                } else {
                    answer.tokens.push(said[same]);
                    if same + 1 < max_new {
                        open.push(out.len());
                        begun.push([asked.samples[i].tokens.as_slice(), &answer.tokens].concat());
                    }
                }
            }
            out.push(answer);
        }
        let left = open.iter().map(|&at| max_new - out[at].tokens.len()).max().unwrap_or(0);
        let rest = if begun.is_empty() { Vec::new() } else { evaluator.generate(&begun, left)? };
        for (at, more) in open.into_iter().zip(rest) {
            let answer = &mut out[at];
            let room = max_new - answer.tokens.len();
            answer.end = more.end.filter(|_| more.tokens.len() < room);
            answer.tokens.extend(more.tokens.iter().take(room));
        }
        Ok(out)
    }
}

impl Evaluator<'_> {
    /// As [`Evaluator::answer`], of some of the prompts, from drafts.
    pub fn answer_from(
        &self,
        asked: &Asked,
        drafts: &Drafts,
        read: &Read,
        prompts: &[usize],
        options: AnswerOptions,
    ) -> Result<Vec<Answer>> {
        let generated = drafts.generate(self, asked, read, prompts, options.max_new)?;
        let records: Vec<_> = prompts.iter().map(|&i| asked.prompts[i]).collect();
        let tokens = prompts.iter().map(|&i| asked.samples[i].tokens.clone());
        self.judged(&records, &tokens.collect::<Vec<_>>(), generated, options.opening)
    }
}
