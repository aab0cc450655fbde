//! What a gate is fitted on: token rows at which it must fire, and groups of rows at which it must
//! stay silent (docs/METHOD.md, "The gate").

use std::collections::HashMap;

use crate::arch::Writer;
use crate::edit::gate::Group;
use crate::error::Result;
use crate::evaluate::{Answer, Asked, Evaluator, Thought};
use crate::forward::{Row, Site, Tap};
use crate::text::{Message, Prompt, Set};

/// Plain text, code, letters and lists on which the gate must stay silent: a paragraph a line.
const GENERAL: &str = include_str!("general.txt");
/// The system prompt of the chats that carry one.
const SYSTEM: &str = "You are a helpful assistant.";
/// What is forced as a refusal where the model has none of its own left.
const REFUSAL: &str = "I'm sorry, but I can't help with that.";

/// Every how many prompts one is also asked under a system prompt, and one as a second turn.
const TURNS: usize = 12;

/// Whether the answer to a prompt that isn't harmful is among the rows: a third of the answers has
/// more rows than the group takes.
pub(super) fn reads_answer(prompt: usize) -> bool {
    prompt.is_multiple_of(3)
}

/// Groups of rows: targets and weights of the ridge problem.
pub const GROUPS: [(f32, f64, usize); 10] = [
    // (target, weight, most rows)
    (1.0, 1.0, 1200), // harmful prompts at the deciding position
    (0.0, 3.0, 1200), // harmless prompts there
    (0.0, 4.0, 900),  // other tokens of those prompts, and of the model's own answers to them
    (0.0, 1.0, 500),  // other tokens of harmful prompts, and of refusals forced as their answers
    (0.0, 1.0, 500),  // general text, chats of two turns, chats with a system prompt
    // Thoughts about harmful prompts that are answered: the thought decides, at no one position.
    (1.0, 1.0, 600),
    (0.0, 4.0, 600), // what is thought of harmless and borderline prompts
    (0.0, 4.0, 600), // where a thought ends, of any prompt: it must still close
    // Thoughts about harmful prompts that are refused: pushed on, they go in circles or never
    // close.
    (0.0, 2.0, 600),
    // Borderline prompts at the deciding position: they are fewer, and told apart worst.
    (0.0, 3.0, 1200),
];
const TEXT: usize = 4;
const THOUGHTS: usize = 5;
const HARMLESS_THOUGHTS: usize = 6;
const CLOSING: usize = 7;
const REFUSING: usize = 8;
const BORDERLINE: usize = 9;

/// Weight of general text where the gate fires in thoughts: they read like any text.
const GENERAL_BESIDE_THOUGHTS: f64 = 16.0;

/// Token sequences whose marked rows are wanted, by group.
#[derive(Default)]
pub struct Material {
    sequences: Vec<Vec<u32>>,
    /// (sequence, position) → group
    marks: HashMap<(usize, usize), usize>,
    /// What chats begin with alike: their template's head, and its system prompt. These tokens run
    /// once, and are marked once.
    prefix: Vec<u32>,
}

/// Inputs of one writer: the groups in the order of [`GROUPS`].
pub type Inputs = HashMap<(usize, Writer), Vec<Group>>;

impl Material {
    /// Builds the material from prompts and the model's own answers to the first of them, at least
    /// to those that are asked without a thought.
    pub fn build(
        evaluator: &Evaluator,
        asked: &Asked,
        answers: &[Answer],
        refusals: &[&[u32]],
    ) -> Result<Material> {
        let mut m = Material { prefix: prefix(&asked.samples), ..Material::default() };
        let own = evaluator.chat.tokenizer.encode(REFUSAL, false);
        let prompts = &asked.prompts[..asked.plain];
        let of = |set: Set| {
            prompts.iter().zip(answers).filter(move |(p, _)| p.set == set).collect::<Vec<_>>()
        };
        let (harmless, harmful) = (of(Set::Harmless), of(Set::Harmful));
        let system = evaluator.chat.system.as_deref();
        for (i, (prompt, sample)) in asked.prompts.iter().zip(&asked.samples).enumerate() {
            if prompt.set == Set::Harmful {
                let refusal = match refusals.is_empty() {
                    _ if i % 3 != 0 && i < asked.plain => &[],
                    true => &own[..],
                    false => refusals[i % refusals.len()],
                };
                let refuses = answers.get(i).is_some_and(|a| a.refused);
                let thought =
                    asked.thought(i).map(|t| (t, if refuses { REFUSING } else { THOUGHTS }));
                m.chat(sample, thought, refusal, 0, 3, 0..0);
            } else {
                let thought = asked.thought(i).map(|t| (t, HARMLESS_THOUGHTS));
                let answer = answers.get(i).filter(|_| reads_answer(i) || i >= asked.plain);
                m.chat(
                    sample,
                    thought,
                    answer.map_or(&[], |a| &a.answer),
                    decides(prompt.set),
                    2,
                    0..0,
                );
            }
            if i >= asked.plain {
                continue;
            }
            // Some of the prompts again under a system prompt, some as a second turn.
            let decides = decides(prompt.set);
            let user = |text: &str| Message::new("user", text);
            if i % TURNS == 1 && system.is_none() {
                // Templates without a system role refuse it: such chats do not exist for this
                // model.
                if let Ok(p) = evaluator
                    .chat
                    .conversation(&[Message::new("system", SYSTEM), user(&prompt.prompt)])
                {
                    m.chat(&p, None, &[], decides, 4, 0..0);
                }
            }
            if i % TURNS == 3 && !harmless.is_empty() && !harmful.is_empty() {
                // After a harmless turn, or after a refused one.
                let after_refusal = i % (2 * TURNS) == TURNS + 3 && !refusals.is_empty();
                let (first, reply) = if after_refusal {
                    let refusal = refusals[i % refusals.len()];
                    (harmful[i % harmful.len()].0, evaluator.chat.tokenizer.decode(refusal))
                } else {
                    let (first, answer) = harmless[i % harmless.len()];
                    (first, answer.continuation.clone())
                };
                let begin: Vec<Message> = system
                    .iter()
                    .map(|s| Message::new("system", s))
                    .chain([user(&first.prompt)])
                    .collect();
                let turns =
                    [&begin[..], &[Message::new("assistant", &reply), user(&prompt.prompt)]]
                        .concat();
                if let (Ok(one), Ok(two)) =
                    (evaluator.chat.conversation(&begin), evaluator.chat.conversation(&turns))
                {
                    // Where the refused turn was decided the gate fires, as it must.
                    let same = two.tokens.starts_with(&one.tokens);
                    let free = if after_refusal && same { one.post_instruction } else { 0..0 };
                    m.chat(&two, None, &[], decides, 4, free);
                }
            }
        }
        for line in GENERAL.lines() {
            let tokens = evaluator.with_bos(&evaluator.chat.tokenizer.encode(line, false));
            let n = tokens.len();
            m.add(tokens, (0..n).map(|p| (p, 4)));
        }
        m.mark_prefix_once();
        m.thin();
        Ok(m)
    }

    /// Whether a sequence begins as the chats do.
    fn is_chat(&self, s: &[u32]) -> bool {
        !self.prefix.is_empty() && s.starts_with(&self.prefix)
    }

    fn mark_prefix_once(&mut self) {
        let chats = (0..self.sequences.len()).filter(|&i| self.is_chat(&self.sequences[i]));
        for i in chats.skip(1).collect::<Vec<_>>() {
            for p in 0..self.prefix.len() {
                self.marks.remove(&(i, p));
            }
        }
    }

    /// What is read before an answer, and its tokens. `thought`: the thought in between, with its
    /// group; `decides`: the deciding position's group; `others`: everybody else's; positions in
    /// `earlier` are in none.
    fn chat(
        &mut self,
        sample: &Prompt,
        thought: Option<(&Thought, usize)>,
        answer: &[u32],
        decides: usize,
        others: usize,
        earlier: std::ops::Range<usize>,
    ) {
        let last = sample.tokens.len() - 1;
        let (closes, thinks) = thought.map_or((last, others), |(t, group)| (t.closes, group));
        let thought = sample.post_instruction.end..closes;
        let tokens = [sample.tokens.as_slice(), answer].concat();
        let n = tokens.len();
        // Post-instruction tokens before the deciding one of a harmful prompt may fire: nothing is
        // generated there.
        let free = sample.post_instruction.clone();
        let marks = (0..n).filter_map(|p| match p {
            p if p == last => Some((p, decides)),
            p if thought.contains(&p) => Some((p, thinks)),
            p if (closes..last).contains(&p) => Some((p, CLOSING)),
            p if decides == 0 && free.contains(&p) || earlier.contains(&p) => None,
            p => Some((p, others)),
        });
        self.add(tokens, marks.collect::<Vec<_>>().into_iter());
    }

    fn add(&mut self, tokens: Vec<u32>, marks: impl Iterator<Item = (usize, usize)>) {
        let seq = self.sequences.len();
        self.sequences.push(tokens);
        self.marks.extend(marks.map(|(p, g)| ((seq, p), g)));
    }

    /// Keeps at most the groups' numbers of rows, drawn evenly.
    fn thin(&mut self) {
        for (group, &(_, _, most)) in GROUPS.iter().enumerate() {
            let mut keys: Vec<(usize, usize)> =
                self.marks.iter().filter(|(_, g)| **g == group).map(|(k, _)| *k).collect();
            keys.sort_unstable();
            let n = keys.len();
            if n > most {
                // Every n/most-th row goes on; a stride prime to sentence lengths is not needed,
                // positions vary freely.
                let keep: std::collections::HashSet<usize> =
                    (0..most).map(|i| i * n / most).collect();
                for (i, key) in keys.into_iter().enumerate() {
                    if !keep.contains(&i) {
                        self.marks.remove(&key);
                    }
                }
            }
        }
    }

    /// How many rows are marked.
    pub fn rows(&self) -> usize {
        self.marks.len()
    }

    /// The marked rows' inputs of the writers of `layers`; `routed`: of their routed experts, else
    /// of the others.
    pub fn inputs(&self, evaluator: &Evaluator, layers: &[usize], routed: bool) -> Result<Inputs> {
        struct Collect<'a> {
            /// (sequence, position) → (group, row of the group)
            places: HashMap<(usize, usize), (usize, usize)>,
            sizes: [usize; GROUPS.len()],
            layers: &'a [usize],
            routed: bool,
            out: Inputs,
            /// Which sequences run, and how many tokens they begin with alike.
            running: Vec<usize>,
            shared: usize,
        }
        impl Tap for Collect<'_> {
            fn writer_input(&mut self, site: Site, rows: &[Row], x: &[f32], width: usize) {
                if !self.layers.contains(&site.layer)
                    || (site.writer == Writer::Experts) != self.routed
                {
                    return;
                }
                let groups = self.out.entry((site.layer, site.writer)).or_insert_with(|| {
                    let thoughts = self.sizes[THOUGHTS] > 0;
                    let weight = |g: usize| match g {
                        TEXT if thoughts => GENERAL_BESIDE_THOUGHTS,
                        g => GROUPS[g].1,
                    };
                    let sized = GROUPS.iter().zip(self.sizes).enumerate();
                    sized
                        .map(|(i, (g, rows))| Group { rows, ..Group::new(g.0, weight(i)) })
                        .collect()
                });
                for (row, x) in rows.iter().zip(x.chunks_exact(width)) {
                    if let Some(&(g, at)) = self.places.get(&(self.running[row.seq], row.pos)) {
                        groups[g].cells.push((at, site.expert));
                        groups[g].inputs.extend_from_slice(x);
                    }
                }
            }

            fn shared(&self) -> usize {
                self.shared
            }
        }
        let mut keys: Vec<_> = self.marks.iter().collect();
        keys.sort_unstable();
        let mut sizes = [0; GROUPS.len()];
        let mut places = HashMap::new();
        for (key, &group) in keys {
            places.insert(*key, (group, sizes[group]));
            sizes[group] += 1;
        }
        let (running, shared) = (Vec::new(), 0);
        let mut tap =
            Collect { places, sizes, layers, routed, out: Inputs::new(), running, shared };
        let all = 0..self.sequences.len();
        let (chats, others): (Vec<usize>, Vec<usize>) =
            all.partition(|&i| self.is_chat(&self.sequences[i]));
        for (running, shared) in [(chats, self.prefix.len()), (others, 0)] {
            let sequences: Vec<Vec<u32>> =
                running.iter().map(|&i| self.sequences[i].clone()).collect();
            (tap.running, tap.shared) = (running, shared);
            evaluator.runner().run(&sequences, &[], &[], &mut tap)?;
        }
        Ok(tap.out)
    }
}

/// The group of a prompt's deciding position.
fn decides(set: Set) -> usize {
    match set {
        Set::Harmful => 0,
        Set::Harmless => 1,
        Set::Borderline => BORDERLINE,
    }
}

/// The tokens that all samples begin with, less than the shortest of them.
fn prefix(samples: &[Prompt]) -> Vec<u32> {
    let Some((first, others)) = samples.split_first() else { return Vec::new() };
    let alike = |s: &Prompt| s.tokens.iter().zip(&first.tokens).take_while(|(a, b)| a == b).count();
    let most = samples.iter().map(|s| s.tokens.len()).min().unwrap_or(0).saturating_sub(1);
    first.tokens[..others.iter().map(alike).min().unwrap_or(most).min(most)].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_chats_begin_with_alike_is_marked_once() {
        let sample = |words: &[u32]| Prompt {
            text: String::new(),
            tokens: [&[7, 8], words, &[9]].concat(),
            post_instruction: words.len() + 2..words.len() + 3,
        };
        let samples = [sample(&[1, 2]), sample(&[3]), sample(&[4, 5])];
        let mut m = Material { prefix: prefix(&samples), ..Material::default() };
        assert_eq!(m.prefix, [7, 8]);
        samples.iter().for_each(|s| m.chat(s, None, &[], 1, 2, 0..0));
        m.add(vec![7, 6, 6], (0..3).map(|p| (p, 4)));
        m.mark_prefix_once();
        let marked =
            |seq: usize| (0..6).filter(|&p| m.marks.contains_key(&(seq, p))).collect::<Vec<_>>();
        assert_eq!(
            [0, 1, 2, 3].map(marked),
            [vec![0, 1, 2, 3, 4], vec![2, 3], vec![2, 3, 4], vec![0, 1, 2]]
        );
    }

    #[test]
    fn the_gate_fires_in_a_thought_and_where_the_answer_begins_and_is_silent_where_the_thought_ends(
    ) {
        let sample =
            Prompt { text: String::new(), tokens: (0..10).collect(), post_instruction: 2..4 };
        let thought = Thought { closes: 7, ended: false };
        let marks = |group, decides, others| {
            let mut m = Material::default();
            m.chat(&sample, Some((&thought, group)), &[10, 11], decides, others, 0..0);
            (0..12).map(|p| m.marks.get(&(0, p)).copied()).collect::<Vec<_>>()
        };
        let all = |groups: [usize; 12]| groups.map(Some).to_vec();
        let mut harmful =
            all([3, 3, 0, 0, THOUGHTS, THOUGHTS, THOUGHTS, CLOSING, CLOSING, 0, 3, 3]);
        // Post-instruction tokens may fire.
        harmful[2..4].fill(None);
        assert_eq!(marks(THOUGHTS, 0, 3), harmful);
        let t = HARMLESS_THOUGHTS;
        assert_eq!(marks(t, 1, 2), all([2, 2, 2, 2, t, t, t, CLOSING, CLOSING, 1, 2, 2]));
    }
}
