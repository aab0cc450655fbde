//! The report: one self-contained HTML file that a person understands in a minute, and a model-card
//! section. What is in it is in the report's JSON, too.

mod card;
mod html;
mod plots;
mod run;
pub mod text;

pub use card::model_card;
pub use html::html;
pub use run::{json_schema, LimitsUsed, PromptsUsed, ReportPaths, RunFacts, RunReport, SCHEMA};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::evaluate::{judge::Verdict, Answer};
use crate::search::Patched;
use crate::text::Set;

/// Most characters of an answer to a harmful prompt that any report shows: its opening says whether
/// it refuses.
pub const HARMFUL_SHOWN: usize = 40;
/// Most characters of other answers.
const SHOWN: usize = 160;

/// A prompt with the openings of its answers.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Example {
    /// Its set.
    pub set: Set,
    /// The request.
    pub prompt: String,
    /// The answer before the edit.
    pub before: Opening,
    /// The answer after it.
    pub after: Opening,
}

/// How an answer begins.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Opening {
    /// Its first characters.
    pub text: String,
    /// The class of the whole answer.
    pub verdict: Verdict,
}

/// A few test prompts: harmful ones that are refused now, those that are still answered, and
/// harmless ones with the answers that changed first.
pub fn examples(p: &Patched) -> Vec<Example> {
    let pairs = || p.answers.before.iter().zip(&p.answers.after);
    let harmful = |wanted: fn(bool, bool) -> bool| {
        pairs().filter(move |(x, y)| x.set == Set::Harmful && wanted(x.refused, y.refused))
    };
    let others = |set: Set, changed: bool| {
        pairs().filter(move |(x, y)| x.set == set && (x.continuation != y.continuation) == changed)
    };
    let example = |(x, y): (&Answer, &Answer)| Example {
        set: x.set,
        prompt: x.prompt.clone(),
        before: opening(x),
        after: opening(y),
    };
    harmful(|before, after| !before && after)
        .take(4)
        .chain(harmful(|_, after| !after).take(1))
        .chain(others(Set::Harmless, true).take(2))
        .chain(others(Set::Harmless, false).take(1))
        .chain(others(Set::Borderline, false).take(1))
        .map(example)
        .collect()
}

fn opening(a: &Answer) -> Opening {
    let most = if a.set == Set::Harmful { HARMFUL_SHOWN } else { SHOWN };
    let cut: String = a.continuation.chars().take(most).collect();
    let text = if cut.len() < a.continuation.len() { cut + "…" } else { cut };
    Opening { text, verdict: a.verdict }
}

/// Text that may stand in HTML, between tags and in quoted attributes.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
        .replace('\'', "&#39;")
}

/// The file's name without its folders.
fn file_name(path: &str) -> &str {
    path.rsplit(['/', '\\']).next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::Writer;
    use crate::edit::{Method, RankOne};
    use crate::evaluate::{judge::judge, Change, Scores};
    use crate::forward::Stage;
    use crate::output::Emit;
    use crate::pair::Pair;
    use crate::search::{
        Broken, Candidate, Effect, LayerScore, Limit, Outcome, Scan, Settings, Stored,
        TensorReport, Toward, Trial,
    };
    use crate::text::{BySet, PromptSet};

    const HOSTILE: &str = "<script>alert('x')</script> & \"more\"";
    const SECRET: &str =
        "Sure, here is how it is done in full detail: first the one thing, then the other.";

    fn answer(set: Set, prompt: &str, text: &str) -> Answer {
        let verdict = judge(text);
        Answer {
            id: String::new(),
            set,
            category: format!("{HOSTILE} {}", prompt.len() % 3),
            prompt: prompt.into(),
            read: Vec::new(),
            refusal_log_odds: 0.0,
            thinks: false,
            top: Vec::new(),
            continuation: text.into(),
            verdict,
            refused: verdict == Verdict::Refused,
            answer: Vec::new(),
            first: Vec::new(),
        }
    }

    fn candidate(strength: f64) -> Candidate {
        Candidate {
            method: Method::Gated,
            toward: Toward::Projected,
            layers: vec![1],
            writers: vec!["ffn_down".into()],
            strength,
            size: 0.1 * strength,
            refused: BySet {
                harmful: 0.5 + 0.1 * strength,
                harmless: 0.01 * strength,
                borderline: 0.0,
            },
            log_odds: 0.0,
            risk: BySet { harmful: 0.5, harmless: 0.01, borderline: 0.02 },
            outlook: Default::default(),
            separation: 3.0,
            edit: vec![RankOne { layer: 1, writer: Writer::Ffn, u: vec![1.0], v: vec![1.0] }],
            family: 0,
        }
    }

    fn patched() -> Patched {
        let no = "I'm sorry, but I can't help with that, whoever asks me and however it is put.";
        let before = vec![
            answer(Set::Harmful, HOSTILE, SECRET),
            answer(Set::Harmful, "b", no),
            answer(Set::Harmful, "abc", SECRET),
            answer(Set::Harmless, "c", HOSTILE),
        ];
        let mut after = before.clone();
        after[0] = answer(Set::Harmful, HOSTILE, no);
        let scores = |answers: &[Answer]| Scores {
            refusal: BySet::over(answers),
            kl: 0.0123,
            answer_perplexity: 1.0,
            perplexity: 20.0,
            same_answers: 1.0,
        };
        let effect = |layer, strength, harmful| Effect {
            layer,
            toward: Toward::Projected,
            strength,
            refusal: BySet { harmful, harmless: 0.0, borderline: 0.1 },
        };
        let layer = |layer, position| LayerScore {
            layer,
            position,
            gap: 1.0,
            auc: if position == 0 { 0.9 } else { f64::NAN },
            fisher: if position == 0 { 2.0 } else { f64::NAN },
            split_half: 0.8,
        };
        Patched {
            emit: Emit::Weights,
            load: None,
            warning: None,
            out: Some("out.gguf".into()),
            sha256: Pair::new("aa".into(), "bb".into()),
            bytes: Pair::new(10, 20),
            chosen: candidate(2.0),
            candidates: vec![candidate(1.0), candidate(2.0), candidate(3.0)],
            trials: vec![Trial {
                method: Method::Gated,
                toward: Toward::Projected,
                place: HOSTILE.into(),
                strength: 1.0,
                refused: BySet { harmful: f64::NAN, ..Default::default() },
                kl: f64::NAN,
                broken: Some(Broken { limit: Limit::Kl, value: f64::NAN, bound: 0.02 }),
            }],
            tensors: vec![TensorReport {
                tensor: HOSTILE.into(),
                encoding: Pair::new("Q4_K".into(), "Q8_0".into()),
                asked: 1.0,
                achieved: Stored {
                    achieved: 0.999,
                    residue: 0.0,
                    size: 0.1,
                    codes_moved: 5,
                    elements: 50,
                    bytes_changed: 7,
                    sparsity: Pair::new(0.0, 0.0),
                },
            }],
            thinking: None,
            validation: Pair::new(scores(&before), scores(&after)),
            test: Some(Pair::new(scores(&before), scores(&after))),
            reference: None,
            changes: Change::all(&before, &after),
            gain: 0.25,
            p_value: 0.01,
            layers: vec![layer(0, 0), layer(0, -1), layer(1, 0), layer(1, -1)],
            scan: Scan {
                base: Some(effect(0, 0.0, 0.2)),
                effects: vec![effect(0, 1.0, 0.2), effect(1, 1.0, 0.6)],
            },
            answers: Pair::new(before, after),
        }
    }

    fn with_run<T>(f: impl FnOnce(&RunReport) -> T) -> T {
        let mut prompts = PromptSet::built_in();
        prompts.sources.harmful = HOSTILE.to_string();
        let facts = RunFacts {
            model: format!("folder/{HOSTILE}|.gguf"),
            device: "cpu".into(),
            seconds: 12.0,
            stages: vec![Stage { name: "trials".into(), seconds: 9.0, tokens: 5e3, reads: 700 }],
            peak_memory: Some(5_000_000),
        };
        let outcome = Outcome::Patched(Box::new(patched()));
        let mut run = RunReport::new(outcome, &prompts, &Settings::default(), facts);
        run.prompts.sha256 = "cc".into();
        f(&run)
    }

    #[test]
    fn the_schema_in_the_documents_is_that_of_the_record() {
        let written = include_str!("../../docs/report.schema.json");
        assert!(written == json_schema(), "cargo run --example schema > docs/report.schema.json");
    }

    #[test]
    fn the_record_is_read_back_as_it_was_written() {
        with_run(|run| {
            let text = serde_json::to_string(run).unwrap();
            let read: RunReport = serde_json::from_str(&text).unwrap();
            assert_eq!(serde_json::to_string(&read).unwrap(), text);
            assert_eq!(read.schema, SCHEMA);
        });
    }

    #[test]
    fn the_report_stands_alone_and_escapes_what_it_was_given() {
        let html = with_run(|run| html(&patched(), run));
        for foreign in ["<script", "http:", "https:", "src=", "href=", "@import", "url("] {
            assert!(!html.contains(foreign), "{foreign}");
        }
        assert!(html.contains("&lt;script&gt;"));
        for tag in ["svg", "div", "figure", "table", "details", "pre", "body", "p", "h2"] {
            let opened = html.matches(&format!("<{tag}>")).count()
                + html.matches(&format!("<{tag} ")).count();
            assert_eq!(opened, html.matches(&format!("</{tag}>")).count(), "{tag}");
        }
        // Three candidates in each of two plots, one of them ringed.
        assert_eq!(
            (
                html.matches("<circle class=other").count(),
                html.matches("<circle class=ring").count()
            ),
            (4, 2)
        );
        for word in [
            "Before and after",
            "33.3 %",
            "66.7 %",
            "Q4_K → Q8_0",
            "99.9 %",
            "prefers-color-scheme:dark",
            "@media print",
        ] {
            assert!(html.contains(word), "{word}");
        }
        assert!(!html.contains("NaN") && !html.contains("inf "));
    }

    #[test]
    fn answers_to_harmful_prompts_are_cut_to_their_opening() {
        let p = patched();
        let shown = SECRET.chars().take(HARMFUL_SHOWN).collect::<String>();
        let more = SECRET.chars().take(HARMFUL_SHOWN + 1).collect::<String>();
        let json = serde_json::to_string(&examples(&p)).unwrap();
        for text in
            [with_run(|run| html(&p, run)), with_run(|run| model_card(&p, run)), json.clone()]
        {
            assert!(!text.contains(&more));
        }
        assert!(json.contains(&shown) && json.contains("refused") && json.contains("answered"));
        assert!(
            !serde_json::to_string(&p).unwrap().contains(&shown),
            "the outcome itself carries no answers"
        );
    }

    #[test]
    fn a_model_that_thinks_has_its_rates_with_thinking_on_beside_the_others() {
        let mut p = patched();
        let without = with_run(|run| [html(&p, run), model_card(&p, run)]);
        assert!(without.iter().all(|text| !text.contains("with thinking")));
        // The other way round, so that these rows are not those.
        p.thinking = Some(Pair::new(
            p.validation.after.refusal.clone(),
            p.validation.before.refusal.clone(),
        ));
        let [html, card] = with_run(|run| [html(&p, run), model_card(&p, run)]);
        assert!(card.contains(
            "| harmful requests refused, with thinking | 66.7 % (21–94 %) | 33.3 % (6–79 %) | |"
        ));
        for class in ["harmful", "harmless", "borderline"] {
            assert!(
                html.contains(&format!("<tr><td>{class} refused, with thinking<td>")),
                "{class}"
            );
        }
        assert!(html.contains("cut off after 32 tokens"));
    }

    #[test]
    fn the_model_card_is_a_section_with_the_numbers() {
        let card = with_run(|run| model_card(&patched(), run));
        assert!(card.starts_with("## "));
        let rows: Vec<&str> = card.lines().filter(|l| l.starts_with('|')).collect();
        assert!(rows.len() >= 8 && rows.iter().all(|r| r.matches('|').count() == 5), "{card}");
        assert!(
            card.contains(
                "| harmful requests refused | 33.3 % (6–79 %) | 66.7 % (21–94 %) | 1.000 |"
            ),
            "{card}"
        );
        for word in ["`aa`", "`bb`", "`cc`", "0.0123"] {
            assert!(card.contains(word), "{word}");
        }
    }
}
