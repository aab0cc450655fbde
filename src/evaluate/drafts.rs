//! Answers under an edit, from drafts: most are the model's own answers, word for word. They are
//! read in one pass from the edit's first block on, and written only from where they part. The
//! result is what greedy generation gives.

use super::{Answer, AnswerOptions, Asked, Evaluator, KL_POSITIONS};
use crate::error::Result;
use crate::forward::{Begun, Generated};
use crate::text::{Prompt, Set};

/// A model's own answers, run up to the block where edits begin.
pub struct Drafts {
    /// Of the harmful prompts, and of the others: either is read without the other.
    begun: [Begun; 2],
    /// By prompt: which of the two it belongs to, and its place there.
    places: Vec<(usize, usize)>,
    /// By prompt: where its answer begins.
    begins: Vec<usize>,
    /// By prompt: the answer.
    answers: Vec<Vec<u32>>,
}

/// What an edited model says to the drafts.
pub struct Read {
    /// Normed final states at the positions that predict each answer's tokens and what follows
    /// them, `[positions, hidden]`.
    states: Vec<f32>,
    /// By prompt: its first state; 0 of those that were not read.
    first: Vec<usize>,
}

impl Drafts {
    /// The drafts of prompts that are asked without a thought. `answers`: the model's own; `layer`:
    /// no edit begins before.
    pub fn new(
        evaluator: &Evaluator,
        asked: &Asked,
        answers: &[&[u32]],
        layer: usize,
    ) -> Result<Drafts> {
        let samples = &asked.samples[..asked.plain];
        let whole = |(s, a): (&Prompt, &&[u32])| [s.tokens.as_slice(), a].concat();
        let mut sequences = [Vec::new(), Vec::new()];
        let mut places = Vec::new();
        for ((prompt, sample), answer) in asked.prompts.iter().zip(samples).zip(answers) {
            let part = usize::from(prompt.set != Set::Harmful);
            places.push((part, sequences[part].len()));
            sequences[part].push(whole((sample, answer)));
        }
        let [harmful, others] = sequences;
        Ok(Drafts {
            begun: [
                evaluator.runner().begin(harmful, layer)?,
                evaluator.runner().begin(others, layer)?,
            ],
            places,
            begins: samples.iter().map(|s| s.tokens.len()).collect(),
            answers: answers.iter().map(|a| a.to_vec()).collect(),
        })
    }

    /// The first block that an edit may touch.
    pub fn layer(&self) -> usize {
        self.begun[0].layer()
    }

    /// Reads the drafts of some prompts under the evaluator's edit: cheap where all are harmful, or
    /// none.
    pub fn read(&self, evaluator: &Evaluator, prompts: &[usize]) -> Result<Read> {
        let mut read = Read { states: Vec::new(), first: vec![0; self.answers.len()] };
        let d = evaluator.model.spec.hidden;
        for (part, begun) in self.begun.iter().enumerate() {
            let mut wanted = Vec::new();
            for &i in prompts.iter().filter(|&&i| self.places[i].0 == part) {
                read.first[i] = read.states.len() / d + wanted.len();
                let begin = self.begins[i];
                wanted
                    .extend((0..=self.answers[i].len()).map(|k| (self.places[i].1, begin + k - 1)));
            }
            if !wanted.is_empty() {
                read.states.extend(evaluator.runner().resume(begun, &wanted)?);
            }
        }
        Ok(read)
    }

    /// Of some prompts the states that predict the first tokens of their answers, as
    /// [`Evaluator::answer_states`] has them.
    pub fn answer_states(&self, read: &Read, prompts: &[usize], hidden: usize) -> Vec<f32> {
        let of = |&i: &usize| {
            let n = self.answers[i].len().min(KL_POSITIONS);
            &read.states[read.first[i] * hidden..(read.first[i] + n) * hidden]
        };
        prompts.iter().flat_map(of).copied().collect()
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
        let (d, tokenizer) = (evaluator.model.spec.hidden, &evaluator.chat.tokenizer);
        let states_of = |i: usize| {
            &read.states[read.first[i] * d..(read.first[i] + self.answers[i].len() + 1) * d]
        };
        let states: Vec<f32> = prompts.iter().flat_map(|&i| states_of(i)).copied().collect();
        let says = evaluator.read_head(&states, 1, |_| &[])?;
        let mut says = says.iter().map(|r| r.top.first().map_or(0, |t| t.0));
        let mut out = Vec::new();
        // What has to be written: the prompt's place in `out`, with its beginning.
        let (mut open, mut begun): (Vec<usize>, Vec<Vec<u32>>) = (Vec::new(), Vec::new());
        for &i in prompts {
            let draft = &self.answers[i];
            let said: Vec<u32> = says.by_ref().take(draft.len() + 1).collect();
            let same = said.iter().zip(draft).take_while(|(a, b)| a == b).count();
            let mut answer = Generated {
                tokens: draft[..same].to_vec(),
                end: None,
                first: states_of(i)[..d].to_vec(),
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
