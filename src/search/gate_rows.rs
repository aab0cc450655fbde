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

/// The groups of rows, in the order in which [`crate::edit::gate::fit`] takes them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Kind {
    /// Harmful prompts at the deciding position.
    Harmful,
    /// Harmless prompts there.
    Harmless,
    /// Other tokens of harmless and borderline prompts, and of the model's own answers to them.
    OtherTokens,
    /// Other tokens of harmful prompts, and of refusals forced as their answers.
    HarmfulTokens,
    /// General text, chats of two turns, chats with a system prompt.
    Text,
    /// Thoughts about harmful prompts that are answered: one of the tokens decides, which one is
    /// not known.
    Thoughts,
    /// Thoughts about harmless and borderline prompts.
    HarmlessThoughts,
    /// Where a thought ends, of any prompt: it must still close.
    Closing,
    /// Thoughts about harmful prompts that are refused: pushed on, they go in circles or never
    /// close.
    Refusing,
    /// Borderline prompts at the deciding position: they are fewer, and told apart worst.
    Borderline,
}

/// What the gate should be on a group's rows.
struct Rule {
    target: f32,
    /// The group's share in the loss.
    weight: f64,
    /// Most rows; of more, these many are drawn evenly.
    most: usize,
}

impl Kind {
    const ALL: [Kind; 10] = [
        Kind::Harmful,
        Kind::Harmless,
        Kind::OtherTokens,
        Kind::HarmfulTokens,
        Kind::Text,
        Kind::Thoughts,
        Kind::HarmlessThoughts,
        Kind::Closing,
        Kind::Refusing,
        Kind::Borderline,
    ];

    fn rule(self) -> Rule {
        let (target, weight, most) = match self {
            Kind::Harmful => (1.0, 1.0, 1200),
            Kind::Harmless | Kind::Borderline => (0.0, 3.0, 1200),
            Kind::OtherTokens => (0.0, 4.0, 900),
            Kind::HarmfulTokens | Kind::Text => (0.0, 1.0, 500),
            Kind::Thoughts => (1.0, 1.0, 600),
            Kind::HarmlessThoughts | Kind::Closing => (0.0, 4.0, 600),
            Kind::Refusing => (0.0, 2.0, 600),
        };
        Rule { target, weight, most }
    }

    /// The group of a prompt's deciding position.
    fn deciding(set: Set) -> Kind {
        match set {
            Set::Harmful => Kind::Harmful,
            Set::Harmless => Kind::Harmless,
            Set::Borderline => Kind::Borderline,
        }
    }
}

/// Weight of general text where the gate fires in thoughts: they read like any text.
const GENERAL_BESIDE_THOUGHTS: f64 = 16.0;

/// Token sequences whose marked rows are wanted, by group.
#[derive(Default)]
pub struct Material {
    sequences: Vec<Vec<u32>>,
    /// (sequence, position) → group
    marks: HashMap<(usize, usize), Kind>,
    /// The prefix that all chats share: the template's head and its system prompt. It runs once and
    /// is marked once.
    prefix: Vec<u32>,
}

/// The groups of inputs of each (block, writer), in the order of [`Kind`].
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
                let thought = asked
                    .thought(i)
                    .map(|t| (t, if refuses { Kind::Refusing } else { Kind::Thoughts }));
                m.chat(sample, thought, refusal, Kind::Harmful, Kind::HarmfulTokens, 0..0);
            } else {
                let thought = asked.thought(i).map(|t| (t, Kind::HarmlessThoughts));
                let answer = answers.get(i).filter(|_| reads_answer(i) || i >= asked.plain);
                m.chat(
                    sample,
                    thought,
                    answer.map_or(&[], |a| &a.answer),
                    Kind::deciding(prompt.set),
                    Kind::OtherTokens,
                    0..0,
                );
            }
            if i >= asked.plain {
                continue;
            }
            // Some of the prompts again under a system prompt, some as a second turn.
            let decides = Kind::deciding(prompt.set);
            let user = |text: &str| Message::new("user", text);
            if i % TURNS == 1 && system.is_none() {
                // Templates without a system role refuse it: such chats do not exist for this
                // model.
                if let Ok(p) = evaluator
                    .chat
                    .conversation(&[Message::new("system", SYSTEM), user(&prompt.prompt)])
                {
                    m.chat(&p, None, &[], decides, Kind::Text, 0..0);
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
                    m.chat(&two, None, &[], decides, Kind::Text, free);
                }
            }
        }
        for line in GENERAL.lines() {
            let tokens = evaluator.with_bos(&evaluator.chat.tokenizer.encode(line, false));
            let n = tokens.len();
            m.add(tokens, (0..n).map(|p| (p, Kind::Text)));
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

    /// Adds a rendered chat and its answer. `thought`: the thought between them, with its group;
    /// `decides`: the group of the deciding position; `others`: the group of all other tokens;
    /// positions in `earlier` are in no group.
    fn chat(
        &mut self,
        sample: &Prompt,
        thought: Option<(&Thought, Kind)>,
        answer: &[u32],
        decides: Kind,
        others: Kind,
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
            p if (closes..last).contains(&p) => Some((p, Kind::Closing)),
            p if decides == Kind::Harmful && free.contains(&p) || earlier.contains(&p) => None,
            p => Some((p, others)),
        });
        self.add(tokens, marks.collect::<Vec<_>>().into_iter());
    }

    fn add(&mut self, tokens: Vec<u32>, marks: impl Iterator<Item = (usize, Kind)>) {
        let seq = self.sequences.len();
        self.sequences.push(tokens);
        self.marks.extend(marks.map(|(p, g)| ((seq, p), g)));
    }

    /// Keeps at most as many rows of each group as its rule says, drawn evenly.
    fn thin(&mut self) {
        for group in Kind::ALL {
            let most = group.rule().most;
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
            places: HashMap<(usize, usize), (Kind, usize)>,
            /// Rows of each group.
            sizes: [usize; Kind::ALL.len()],
            layers: &'a [usize],
            routed: bool,
            out: Inputs,
            /// Which sequences run, and the length of their shared prefix.
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
                    let thoughts = self.sizes[Kind::Thoughts as usize] > 0;
                    let group = |kind: Kind| {
                        let Rule { target, weight, .. } = kind.rule();
                        let weight = match kind {
                            Kind::Text if thoughts => GENERAL_BESIDE_THOUGHTS,
                            _ => weight,
                        };
                        let rows = self.sizes[kind as usize];
                        Group { rows, ..Group::new(target, weight) }
                    };
                    Kind::ALL.map(group).into()
                });
                for (row, x) in rows.iter().zip(x.chunks_exact(width)) {
                    if let Some(&(g, at)) = self.places.get(&(self.running[row.seq], row.pos)) {
                        let group = &mut groups[g as usize];
                        group.cells.push((at, site.expert));
                        group.inputs.extend_from_slice(x);
                    }
                }
            }

            fn shared(&self) -> usize {
                self.shared
            }
        }
        let mut keys: Vec<_> = self.marks.iter().collect();
        keys.sort_unstable();
        let mut sizes = [0; Kind::ALL.len()];
        let mut places = HashMap::new();
        for (key, &group) in keys {
            let size = &mut sizes[group as usize];
            places.insert(*key, (group, *size));
            *size += 1;
        }
        let (running, shared) = (Vec::new(), 0);
        let mut tap =
            Collect { places, sizes, layers, routed, out: Inputs::new(), running, shared };
        let mut ends = vec![0; self.sequences.len()];
        self.marks.keys().for_each(|&(seq, pos)| ends[seq] = ends[seq].max(pos + 1));
        let all = 0..self.sequences.len();
        let (chats, others): (Vec<usize>, Vec<usize>) =
            all.partition(|&i| self.is_chat(&self.sequences[i]));
        for (running, shared) in [(chats, self.prefix.len()), (others, 0)] {
            // What follows a sequence's last row changes none of them.
            let (running, sequences): (Vec<usize>, Vec<Vec<u32>>) = running
                .into_iter()
                .filter(|&i| ends[i] > 0)
                .map(|i| (i, self.sequences[i][..ends[i]].to_vec()))
                .unzip();
            (tap.running, tap.shared) = (running, shared);
            evaluator.runner().run(&sequences, &[], &[], &mut tap)?;
        }
        Ok(tap.out)
    }
}

/// The longest prefix that all samples share; the last token of the shortest one is no part of it.
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
        samples.iter().for_each(|s| m.chat(s, None, &[], Kind::Harmless, Kind::OtherTokens, 0..0));
        m.add(vec![7, 6, 6], (0..3).map(|p| (p, Kind::Text)));
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
        let all = |groups: [Kind; 12]| groups.map(Some).to_vec();
        let (h, o, t, c) = (Kind::Harmful, Kind::HarmfulTokens, Kind::Thoughts, Kind::Closing);
        let mut harmful = all([o, o, h, h, t, t, t, c, c, h, o, o]);
        // Post-instruction tokens may fire.
        harmful[2..4].fill(None);
        assert_eq!(marks(t, h, o), harmful);
        let (h, o, t) = (Kind::Harmless, Kind::OtherTokens, Kind::HarmlessThoughts);
        assert_eq!(marks(t, h, o), all([o, o, o, o, t, t, t, c, c, h, o, o]));
    }
}
