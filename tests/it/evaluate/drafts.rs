//! Answers under an edit that take the model's own answers as drafts equal greedy generation.

use crate::common::organism::{self, first};
use refusal_patch::arch::Writer;
use refusal_patch::edit::{Edit, RankOne};
use refusal_patch::evaluate::{AnswerOptions, Drafts, Unedited};
use refusal_patch::forward::Compute;
use refusal_patch::model::Model;
use refusal_patch::text::{PromptRecord, PromptSet, Set, Split};

#[test]
fn answers_from_drafts_are_those_of_greedy_generation() {
    let model = Model::open(&first().file("broken-Q4_K_M")).unwrap();
    let chat = organism::chat(&model);
    let compute = Compute::cpu();
    // A constant that changes some answers and leaves the others as they are.
    let d = model.spec.hidden;
    let u: Vec<f32> = (0..d).map(|i| ((i * 37 % 19) as f32 - 9.0) * 0.05).collect();
    let edit: Edit = vec![RankOne { layer: 3, writer: Writer::Ffn, u, v: Vec::new() }];
    let evaluator = organism::evaluator(&model, &chat, &compute);
    let built_in = PromptSet::built_in();
    let of =
        |set| built_in.of(set, Split::Test).into_iter().step_by(9).collect::<Vec<&PromptRecord>>();
    let prompts = [of(Set::Harmful), of(Set::Harmless)].concat();
    let asked = evaluator.ask(&prompts).unwrap();
    let options = AnswerOptions::new(16);
    let own = evaluator.answer(&asked, options).unwrap();
    let unedited = Unedited::take(&evaluator, own.clone()).unwrap();
    let drafts = Drafts::new(&evaluator, &asked, &unedited, 3).unwrap();
    let all: Vec<usize> = (0..prompts.len()).collect();
    let mut same = 0;
    for edited in [false, true] {
        let evaluator = if edited { evaluator.under(&edit) } else { evaluator };
        let read = drafts.read(&evaluator, &all).unwrap();
        let found = evaluator.answer_from(&asked, &drafts, &read, &all, options).unwrap();
        let expected = evaluator.answer(&asked, options).unwrap();
        // Divergence and perplexity are those of whole passes, to the last bit.
        let drift = drafts.drift(&evaluator, &read).unwrap();
        let whole = unedited.drift(&evaluator).unwrap();
        assert_eq!(format!("{drift:?}"), format!("{whole:?}"));
        assert_eq!(edited, drift.kl > 0.0);
        for ((found, expected), own) in found.iter().zip(&expected).zip(&own) {
            assert_eq!(found.answer, expected.answer, "edited {edited}: {}", found.prompt);
            assert_eq!(found.continuation, expected.continuation);
            let worst = found.first.iter().zip(&expected.first).map(|(a, b)| (a - b).abs());
            assert!(worst.fold(0.0, f32::max) < 1e-3);
            same += usize::from(edited && found.answer == own.answer);
        }
    }
    assert!(
        (1..prompts.len()).contains(&same),
        "{same} of {} answers are unchanged",
        prompts.len()
    );
}
