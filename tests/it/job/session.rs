//! The crate's door does what the program does, for files and folders alike.

use std::path::Path;

use refusal_patch::compare::Health;
use refusal_patch::encoding::Encoding;
use refusal_patch::search::{Outcome, Settings};
use refusal_patch::text::{PromptSet, Set, Split};
use refusal_patch::{Options, Session};

use crate::common::folder;
use crate::common::organism::first;

/// Every so many of the built-in prompts, so that each class and split keeps about `n`.
fn few(n: usize) -> PromptSet {
    let all = PromptSet::built_in();
    let mut some = all.clone();
    some.prompts.clear();
    for set in Set::ALL {
        for split in [Split::Train, Split::Validation, Split::Test] {
            let of = all.of(set, split);
            let step = (of.len() / n).max(1);
            some.prompts.extend(of.into_iter().step_by(step).cloned());
        }
    }
    some
}

fn open(path: &Path) -> Session {
    Session::open(path, &Options::default()).unwrap()
}

#[test]
fn a_session_patches_files_and_folders_and_measures_what_it_wrote() {
    let dir = tempfile::tempdir().unwrap();
    let folder = folder::organism(dir.path(), "organism-broken-Q8_0.gguf", Encoding::BF16, 2);
    let prompts = few(30);
    let settings = Settings {
        strength: Some(1.41),
        layers: Some(3..=3),
        max_over_refusal: 1.0,
        max_kl: 9.0,
        ..Settings::default()
    };
    for (input, out) in [(first().file("broken-Q8_0"), "out.gguf"), (folder, "out")] {
        let (before, out) = (open(&input), dir.path().join(out));
        let plan = Settings { dry_run: true, ..settings.clone() };
        let outcome = before.patch(&out, None, &prompts, &plan).unwrap();
        let Outcome::Patched(planned) = outcome else { panic!("{outcome:?}") };
        assert!(planned.test.is_none() && planned.out.is_none() && !out.exists());

        let outcome = before.patch(&out, None, &prompts, &settings).unwrap();
        let Outcome::Patched(patched) = outcome else { panic!("{outcome:?}") };
        let test = patched.test.as_ref().unwrap().map(|s| s.refusal.harmful.refused);
        assert!(test.after > test.before, "{test:?}");

        let after = open(&out);
        let measured = [&before, &after].map(|s| s.evaluate(&prompts).unwrap());
        let refused = [&measured[0], &measured[1]].map(|m| m.refusal.harmful.refused);
        assert_eq!(refused, [test.before, test.after], "the same numbers from outside");
        let perplexity = patched.measured().1.after.perplexity;
        assert!((measured[1].perplexity / perplexity - 1.0).abs() < 1e-6);

        let difference = before.diff(&after.model.file, &prompts).unwrap();
        let changed: Vec<&str> = difference.changed.iter().map(|c| c.tensor.as_str()).collect();
        let written: Vec<&str> = patched.tensors.iter().map(|t| t.tensor.as_str()).collect();
        assert_eq!(changed.len(), written.len());
        assert!(changed.iter().all(|t| written.contains(t)), "{changed:?} {written:?}");
    }
}

#[test]
fn a_session_compares_and_derives() {
    let prompts = few(60);
    let (healthy, broken) =
        (open(&first().file("healthy-F16")), open(&first().file("broken-Q8_0")));
    let comparison = healthy.compare(&broken, &prompts, 0.05).unwrap();
    assert_ne!(comparison.outcome, Health::Healthy);
    assert!(comparison.drop > 0.1, "{}", comparison.drop);
    let derived = healthy.derive(&prompts, &Settings::default()).unwrap();
    let layers = healthy.model.spec.layers;
    assert_eq!(derived.directions.iter().filter(|d| d.position == 0).count(), layers);
    assert!(!derived.scan.effects.is_empty());
}
