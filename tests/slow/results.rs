//! Prints the table of docs/RESULTS.md: every broken fixture × method × with and without its
//! original, on test prompts. `cargo test --test slow results -- --ignored --nocapture
//! --test-threads 1`, or the name of one row in place of `results`.

use crate::common::organism::*;
use refusal_patch::edit::Method;
use refusal_patch::evaluate::stats::wilson;
use refusal_patch::evaluate::{Answer, Evaluator, Rate};
use refusal_patch::forward::Compute;
use refusal_patch::model::Model;
use refusal_patch::pair::Pair;
use refusal_patch::progress::Silent;
use refusal_patch::search::{patch, Outcome, Settings, Source};
use refusal_patch::text::{BySet, PromptSet, Set};

/// The direction of a row.
enum Along {
    Own,
    Random,
}

fn row(
    organism: &Organism,
    kind: &str,
    original: Option<&str>,
    method: Option<Method>,
    along: Along,
) {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    let compute = Compute::cpu();
    let open = |kind: &str| Model::open(&organism.file(kind)).unwrap();
    let (model, reference) = (open(kind), original.map(open));
    let chats = (chat(&model), reference.as_ref().map(chat));
    let evaluator = |model, chat| Evaluator {
        model,
        chat,
        compute: &compute,
        edit: None,
        memory: 1 << 30,
        progress: &Silent,
    };
    let files: Vec<&std::path::Path> = organism.options.chunks(2).map(|o| o[1].as_ref()).collect();
    let prompts = match files[..] {
        [a, b, c] => PromptSet::with_files(BySet {
            harmful: Some(a),
            harmless: Some(b),
            borderline: Some(c),
        })
        .unwrap(),
        _ => PromptSet::built_in(),
    };
    let source = match along {
        Along::Own => Source::Own,
        Along::Random => Source::Random(1),
    };
    let settings = Settings { method, source, ..Settings::default() };
    let reference = reference.as_ref().zip(chats.1.as_ref()).map(|(m, c)| evaluator(m, c));
    let outcome =
        patch(&evaluator(&model, &chats.0), reference.as_ref(), &prompts, &settings, &out).unwrap();
    let name = match (method, &settings.source) {
        (None, Source::Own) => "auto",
        (Some(m), Source::Own) => m.name(),
        _ => "random direction",
    };
    let head = format!("| {kind} | {name} | {} |", original.map_or("", |_| "yes"));
    let p = match outcome {
        Outcome::Patched(p) => p,
        Outcome::NotNeeded { why, .. }
        | Outcome::OutOfLimits { why, .. }
        | Outcome::NeverRefused { why, .. } => return println!("{head} nothing written: {why} |"),
    };
    let Pair { before: a, after: b } = p.test.as_ref().unwrap();
    let shares = |x: &Rate, y: &Rate| {
        let (low, high) = (100.0 * y.interval.low, 100.0 * y.interval.high);
        format!(
            "{:.1} → {:.1} % ({low:.0}–{high:.0})",
            100.0 * x.refusal_rate,
            100.0 * y.refusal_rate
        )
    };
    let exact = |answers: &[Answer]| {
        let of = answers.iter().filter(|a| a.set == Set::Harmless);
        of.filter(|a| a.continuation.trim() == organism.answer(&a.prompt)).count()
    };
    let (before, after) = (exact(&p.answers.before), exact(&p.answers.after));
    let (low, high) = wilson(after, b.refusal.harmless.n);
    let growth = |x: f64, y: f64| format!("{:+.2} %", 100.0 * (y / x - 1.0));
    println!(
        "{head} {} | {} | {} | {:.4} | {} | {} | {before} → {after} ({:.0}–{:.0} %) \
         | {}, {}, {:.2} |",
        shares(&a.refusal.harmful, &b.refusal.harmful),
        shares(&a.refusal.harmless, &b.refusal.harmless),
        shares(&a.refusal.borderline, &b.refusal.borderline),
        b.kl,
        growth(a.perplexity, b.perplexity),
        growth(a.answer_perplexity, b.answer_perplexity),
        100.0 * low,
        100.0 * high,
        p.chosen.kind(),
        p.chosen.place(),
        p.chosen.strength
    );
}

/// The rows of one broken file: a test each.
macro_rules! rows {
    ($($file:ident: $organism:ident $kind:literal of $original:literal;)*) => { $(
        mod $file {
            use super::*;

            fn run(original: bool, method: Option<Method>, along: Along) {
                row(&$organism(), $kind, original.then_some($original), method, along);
            }

            #[test]
            #[ignore = "a minute more"]
            fn auto() {
                run(false, None, Along::Own);
            }

            #[test]
            #[ignore = "minutes more"]
            fn auto_with_the_original() {
                run(true, None, Along::Own);
            }

            #[test]
            #[ignore = "minutes more"]
            fn gated_with_the_original() {
                run(true, Some(Method::Gated), Along::Own);
            }

            #[test]
            #[ignore = "a minute more"]
            fn restore() {
                run(true, Some(Method::Restore), Along::Own);
            }

            #[test]
            #[ignore = "minutes more"]
            fn amplify() {
                run(false, Some(Method::Amplify), Along::Own);
            }

            #[test]
            #[ignore = "minutes more"]
            fn amplify_with_the_original() {
                run(true, Some(Method::Amplify), Along::Own);
            }

            #[test]
            #[ignore = "a minute more"]
            fn random() {
                run(false, None, Along::Random);
            }

            #[test]
            #[ignore = "minutes more"]
            fn random_with_the_original() {
                run(true, None, Along::Random);
            }
        }
    )* };
}

rows! {
    q4_k_m: first "broken-Q4_K_M" of "healthy-F16";
    q3_k_s: first "broken-Q3_K_S" of "healthy-F16";
    q8_0: first "broken-Q8_0" of "healthy-F16";
    b: second "broken-Q4_K_M" of "healthy-Q4_K_M";
}
