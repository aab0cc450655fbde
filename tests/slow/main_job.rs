//! The main job on more fixtures than the fast test has, measured here and in llama.cpp.
//! `cargo test --test it --test slow main_job -- --include-ignored --nocapture` prints the numbers
//! of docs/RESULTS.md.

use refusal_patch::forward::Compute;
use refusal_patch::model::Model;
use refusal_patch::search::{patch, Outcome, Settings, Source};
use refusal_patch::text::PromptSet;

use crate::common::main_job::repair;
use crate::common::organism::*;

#[test]
#[ignore = "minutes more"]
fn every_broken_encoding_is_repaired() {
    repair(&first(), "healthy-F16", "broken-Q8_0");
    repair(&first(), "healthy-F16", "broken-Q3_K_S");
}

#[test]
#[ignore = "minutes more"]
fn a_model_of_other_data_is_repaired_with_prompt_files_of_its_own() {
    repair(&second(), "healthy-Q4_K_M", "broken-Q4_K_M");
}

#[test]
#[ignore = "a minute more"]
fn a_random_direction_restores_nothing() {
    let model = Model::open(&first().file("broken-Q4_K_M")).unwrap();
    let (chat, compute) = (chat(&model), Compute::cpu());
    let evaluator = evaluator(&model, &chat, &compute);
    let settings = Settings { source: Source::Random(1), dry_run: true, ..Settings::default() };
    let outcome =
        patch(&evaluator, None, &PromptSet::built_in(), &settings, "out.gguf".as_ref()).unwrap();
    match outcome {
        Outcome::Patched(p) => {
            panic!(
                "{:?} -> {:?}",
                p.validation.before.refusal.harmful, p.validation.after.refusal.harmful
            )
        }
        Outcome::NotNeeded { why, .. }
        | Outcome::OutOfLimits { why, .. }
        | Outcome::NeverRefused { why, .. } => println!("{why}"),
    }
}
