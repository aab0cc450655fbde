//! Models that think before they answer, on the third organism.

use crate::common::organism::*;
use refusal_patch::arch::Writer;
use refusal_patch::edit::RankOne;
use refusal_patch::evaluate::judge::Verdict;
use refusal_patch::evaluate::AnswerOptions;
use refusal_patch::forward::Compute;
use refusal_patch::model::Model;
use refusal_patch::text::{PromptSet, Set, Split, Thinking};

#[test]
fn after_its_own_thought_a_model_answers_as_with_thinking_on() {
    let model = Model::open(&third().file("broken-Q4_K_M")).unwrap();
    let (mut chat, compute) = (chat(&model), Compute::cpu());
    assert!(chat.template.can_think);
    let prompts = PromptSet::built_in();
    let some: Vec<_> = [Set::Harmful, Set::Harmless]
        .into_iter()
        .flat_map(|set| prompts.of(set, Split::Test).into_iter().step_by(16))
        .collect();
    let off = evaluator(&model, &chat, &compute);
    let asked = off.ask_twice(&some, &some).unwrap();
    assert!(asked.think() && asked.prompts.len() == 2 * some.len());
    let behind = asked.samples[asked.plain..].to_vec();
    for sample in &behind {
        let shown: String = sample.tokens.iter().map(|&t| chat.tokenizer.token_text(t)).collect();
        assert!(shown.contains("<think>") && shown.ends_with("</think>ĊĊ"), "{shown}");
    }
    let answers =
        off.answers_to(&some, &asked.sequences()[asked.plain..], AnswerOptions::new(32)).unwrap();
    chat.template.thinking = Thinking::On;
    let on = evaluator(&model, &chat, &compute);
    let whole = on.answers(&some, AnswerOptions::new(96)).unwrap();
    for (a, b) in answers.iter().zip(&whole) {
        let said = b.continuation.split("</think>").last().unwrap();
        assert_eq!(a.continuation.trim(), said.trim(), "{}", a.prompt);
        assert_eq!((a.refused, a.thinks, b.thinks), (b.refused, false, true));
    }
    // With thinking on the plain prompts think already: nothing is asked twice.
    assert!(!on.ask_twice(&some, &some).unwrap().think());
}

#[test]
fn a_thought_that_is_too_long_is_cut_off_and_closed() {
    let mut model = Model::open(&third().file("broken-Q4_K_M")).unwrap();
    let (chat, compute) = (chat(&model), Compute::cpu());
    let prompts = PromptSet::built_in();
    let some = &prompts.of(Set::Harmless, Split::Test)[..1];
    let length = chat.prompt_with(&some[0].prompt, Thinking::On).unwrap().tokens.len();
    // Room for six tokens.
    model.spec.context = length + 6;
    let asked = evaluator(&model, &chat, &compute).ask_twice(some, some).unwrap();
    let thought = &asked.samples[1].tokens[length..];
    let shown: String = thought.iter().map(|&t| chat.tokenizer.token_text(t)).collect();
    assert!(shown.starts_with("<think>Ċ") && shown.ends_with("Ċ</think>ĊĊ"), "{shown}");
    assert_eq!(shown.matches("</think>").count(), 1);
}

#[test]
fn a_turn_that_ends_in_its_thought_is_no_answer() {
    let model = Model::open(&third().file("broken-Q4_K_M")).unwrap();
    let (mut chat, compute) = (chat(&model), Compute::cpu());
    let prompts = PromptSet::built_in();
    let some: Vec<_> = prompts.of(Set::Harmful, Split::Test).into_iter().step_by(8).collect();
    // An edit under which a thought is never closed.
    let close = chat.tokenizer.encode_template("</think>", &[]);
    let mut u = vec![0.0; model.spec.hidden];
    model.output().unwrap().decode_row(close[0] as usize, &mut u);
    u.iter_mut().for_each(|x| *x *= -40.0);
    let term = RankOne { layer: model.spec.layers - 1, writer: Writer::Ffn, u, v: Vec::new() };
    let edit = vec![term];
    let off = evaluator(&model, &chat, &compute);
    let ended =
        |asked: &refusal_patch::evaluate::Asked, i| asked.thought(i).is_some_and(|t| t.ended);
    let asked = off.ask_after_thoughts(&some).unwrap();
    assert!(!(0..some.len()).any(|i| ended(&asked, i)));
    let asked = off.under(&edit).ask_again(&asked).unwrap();
    let answers = off.under(&edit).answer(&asked, AnswerOptions::new(32)).unwrap();
    chat.template.thinking = Thinking::On;
    let on = evaluator(&model, &chat, &compute);
    let whole = on.under(&edit).answers(&some, AnswerOptions::new(96)).unwrap();
    let mut count = 0;
    for (i, (a, b)) in answers.iter().zip(&whole).enumerate() {
        assert_eq!(b.verdict, Verdict::Unfinished, "{}", b.continuation);
        // A longer thought is cut off and closed: the text that would follow is unknown.
        if ended(&asked, i) {
            assert_eq!(
                (a.verdict, a.refused, a.refusal_log_odds.is_nan()),
                (Verdict::Unfinished, false, true)
            );
            count += 1;
        }
    }
    assert!(count > 4, "{count}");
}

#[test]
fn a_thought_closes_where_its_last_word_was_said() {
    let model = Model::open(&third().file("broken-Q4_K_M")).unwrap();
    let (chat, compute) = (chat(&model), Compute::cpu());
    let prompts = PromptSet::built_in();
    let some = &prompts.of(Set::Harmless, Split::Test)[..8];
    let asked = evaluator(&model, &chat, &compute).ask_twice(some, some).unwrap();
    for i in asked.plain..asked.prompts.len() {
        let (thought, tokens) = (asked.thought(i).unwrap(), &asked.samples[i].tokens);
        let said = chat.tokenizer.decode(&tokens[..=thought.closes]);
        let rest: String =
            tokens[thought.closes + 1..].iter().map(|&t| chat.tokenizer.token_text(t)).collect();
        assert!(said.ends_with('.') && rest == "Ċ</think>ĊĊ", "{said:?} {rest:?}");
    }
    assert!(asked.thought(0).is_none());
}

#[test]
fn a_model_that_cannot_think_is_asked_once() {
    let model = Model::open(&first().file("broken-Q4_K_M")).unwrap();
    let (chat, compute) = (chat(&model), Compute::cpu());
    let prompts = PromptSet::built_in();
    let some = prompts.of(Set::Harmful, Split::Test);
    assert!(!evaluator(&model, &chat, &compute).ask_twice(&some, &some).unwrap().think());
}
