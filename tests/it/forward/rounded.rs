//! Products in 8-bit integers beside exact ones, on trained models.

use crate::common::organism::*;
use refusal_patch::evaluate::{Answer, AnswerOptions};
use refusal_patch::forward::{Arithmetic, Compute, Row, Runner, Tap};
use refusal_patch::model::Model;
use refusal_patch::num::cosine;
use refusal_patch::progress::Silent;
use refusal_patch::text::{PromptRecord, PromptSet, Set, Split};

/// Sums of the residual stream at the deciding position, by block: of the first sequences, and of
/// the others.
struct Sums {
    last: Vec<usize>,
    first: usize,
    by_block: Vec<[Vec<f64>; 2]>,
}

impl Tap for Sums {
    fn residual(&mut self, layer: usize, rows: &[Row], x: &[f32], width: usize) {
        self.by_block.resize(layer + 1, [vec![0.0; width], vec![0.0; width]]);
        for (row, x) in rows.iter().zip(x.chunks_exact(width)) {
            if row.pos == self.last[row.seq] {
                let sum = &mut self.by_block[layer][usize::from(row.seq >= self.first)];
                sum.iter_mut().zip(x).for_each(|(sum, &x)| *sum += f64::from(x));
            }
        }
    }
}

/// By block: the difference of means of harmful and harmless prompts. Then the answers.
fn measured(kind: &str, arithmetic: Arithmetic) -> (Vec<Vec<f64>>, Vec<Answer>) {
    let model = Model::open(&first().file(kind)).unwrap();
    let (chat, compute) = (chat(&model), Compute::cpu().with_arithmetic(arithmetic));
    let evaluator = evaluator(&model, &chat, &compute);
    let prompts = PromptSet::built_in();
    let harmful = prompts.of(Set::Harmful, Split::Validation);
    let harmless = prompts.of(Set::Harmless, Split::Validation);
    let all: Vec<&PromptRecord> = [harmful.clone(), harmless.clone()].concat();
    let tokens = |p: &&PromptRecord| chat.prompt(&p.prompt).unwrap().tokens;
    let sequences: Vec<Vec<u32>> = all.iter().map(tokens).collect();
    let last = sequences.iter().map(|s| s.len() - 1).collect();
    let mut sums = Sums { last, first: harmful.len(), by_block: Vec::new() };
    let runner = Runner::new(&model, &compute, None, 1 << 30, &Silent);
    runner.run(&sequences, &[], &[], &mut sums).unwrap();
    let difference = |[a, b]: &[Vec<f64>; 2]| {
        let (m, n) = (harmful.len() as f64, harmless.len() as f64);
        a.iter().zip(b).map(|(a, b)| a / m - b / n).collect()
    };
    let directions = sums.by_block.iter().map(difference).collect();
    (directions, evaluator.answers(&all, AnswerOptions::new(32)).unwrap())
}

#[test]
fn products_in_integers_keep_directions_and_refusals() {
    for kind in ["broken-Q4_K_M", "broken-Q3_K_S"] {
        let (exact, exactly) = measured(kind, Arithmetic::Exact);
        let (rounded, roundly) = measured(kind, Arithmetic::Rounded);
        assert_ne!(exact, rounded, "{kind}: the arithmetic makes a difference");
        let length = |d: &[f64]| d.iter().map(|x| x * x).sum::<f64>().sqrt();
        let longest = exact.iter().map(|d| length(d)).fold(0.0, f64::max);
        for (block, (a, b)) in exact.iter().zip(&rounded).enumerate() {
            let (cosine, share) = (cosine(a, b), length(a) / longest);
            println!("{kind} block {block}: cosine {cosine:.6}, {share:.2} of the longest");
            // Where the classes hardly differ yet, rounding is a larger part of the difference.
            let least = if share > 0.1 { 0.9999 } else { 0.998 };
            assert!(cosine >= least, "{kind} block {block}: {cosine}");
        }
        let other = exactly.iter().zip(&roundly).filter(|(a, b)| a.refused != b.refused).count();
        println!("{kind}: {other} of {} answers are judged otherwise", exactly.len());
        assert!(other * 100 <= 3 * exactly.len(), "{kind}: {other} of {}", exactly.len());
    }
}
