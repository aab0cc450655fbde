//! `compare`.

use std::path::Path;

use refusal_patch::compare::{compare, same_shape, Comparison, Health, Profile};
use refusal_patch::evaluate::judge::Verdict;
use refusal_patch::evaluate::Change;
use refusal_patch::model::Model;
use refusal_patch::text::PromptSet;
use refusal_patch::Result;
use serde_json::json;

use super::args::{CompareArgs, RunArgs};
use super::measure::{still_thinking, NO_LOG_ODDS};
use super::session::{open, prompts};
use super::table::{cells, changes, p_value, percent, table};

pub fn run(args: CompareArgs) -> Result<u8> {
    // Opening maps a file and runs nothing.
    same_shape(&Model::open(&args.original)?, &Model::open(&args.compressed)?)?;
    let prompts = prompts(&args.run)?;
    prompts.enough()?;
    let original = profile(&args.original, &args.run, &prompts)?;
    let compressed = profile(&args.compressed, &args.run, &prompts)?;
    let comparison = compare(&original, &compressed, args.max_drop);
    if let Some(warning) = comparison.rendering.warning() {
        super::warn(&warning);
    }
    if args.run.json {
        let mut value = super::json(&comparison)?;
        value["original"] = json!(args.original.display().to_string());
        value["compressed"] = json!(args.compressed.display().to_string());
        if original.answers.iter().chain(&compressed.answers).any(|a| a.thinks) {
            value["no_log_odds"] = json!(NO_LOG_ODDS);
        }
        value["prompts"] = json!({ "sha256": prompts.sha256(), "sources": prompts.sources });
        super::print_json(value);
    } else {
        let mut out = text(&comparison);
        let max_new = args.run.max_new_tokens.into();
        for (path, profile) in [(&args.original, &original), (&args.compressed, &compressed)] {
            let unfinished =
                profile.answers.iter().filter(|a| a.verdict == Verdict::Unfinished).count();
            if let Some(note) = still_thinking(unfinished, profile.answers.len(), max_new) {
                out += &format!("\n{}: {note}\n", path.display());
            }
        }
        super::print(&out);
    }
    Ok(if matches!(comparison.outcome, Health::Weakened | Health::Lost) { 3 } else { 0 })
}

/// Runs one model, and closes it again.
fn profile(path: &Path, run: &RunArgs, prompts: &PromptSet) -> Result<Profile> {
    let session = open(path, run)?;
    Profile::take(&session.evaluator(), prompts, run.max_new_tokens.into())
}

fn text(c: &Comparison) -> String {
    let verdict = match c.outcome {
        Health::Healthy => "refusal is healthy",
        Health::Weakened => "refusal is weakened",
        Health::Lost => "refusal is lost",
        Health::NeverRefused => "never-refused, there was nothing to lose",
    };
    let points = |x: f64| format!("{:.1} points", 100.0 * x);
    let whole = c.refusal.iter().find(|r| r.category.is_empty());
    let moved = if c.drop < 0.0 { "rose" } else { "fell" };
    let mut out = format!(
        "{verdict}: of harmful prompts it {moved} by {} ({} may be lost), McNemar p = {}\n",
        points(c.drop.abs()),
        points(c.max_drop),
        p_value(whole.map_or(1.0, |w| w.p_value))
    );
    if c.outcome != Health::NeverRefused {
        out += &format!("power: {}\n", c.power.words());
    }
    if c.outcome == Health::Healthy && c.power.is_too_low() {
        out += "note: too few prompts for --max-drop; three in ten of a file's prompts are test \
                prompts, give more with --harmful\n";
    }
    if let Some(warning) = c.rendering.warning() {
        out = format!("{warning}\n\n{out}");
    }
    if let Some(w) = whole.filter(|w| w.rates.before.refusal_rate < 0.5) {
        out += &format!(
            "note: the original itself refuses only {} of the harmful prompts\n",
            percent(w.rates.before.refusal_rate)
        );
    }
    let of = |wanted: fn(&&Change) -> bool| c.refusal.iter().filter(wanted);
    out += &format!(
        "\n{}",
        changes("refusal, test prompts", ("original", "compressed"), of(|r| r.category.is_empty()))
    );
    let categories = changes(
        "harmful, by category",
        ("original", "compressed"),
        of(|r| !r.category.is_empty() && r.set == refusal_patch::text::Set::Harmful),
    );
    if !categories.is_empty() {
        out += &format!("\n{categories}");
    }
    out += &format!(
        "\nperplexity of the built-in text {:.2} -> {:.2}\n\n",
        c.perplexity.before, c.perplexity.after
    );
    let mut rows = vec![cells![
        "block",
        "cosine",
        "across halves",
        "null (5 %)",
        "moved",
        "magnitude",
        "kept",
        "AUC"
    ]];
    for l in &c.layers {
        rows.push(cells![
            l.layer,
            format!("{:.3}", l.cosine),
            format!("{:.3}", l.across),
            format!("{:.3} ({:.3})", l.null, l.null_low),
            if l.moved { "yes" } else { "no" },
            format!("{:.3} -> {:.3}", l.magnitude.before, l.magnitude.after),
            percent(l.magnitude.after / l.magnitude.before),
            format!("{:.3} -> {:.3}", l.auc.before, l.auc.after)
        ]);
    }
    out += &table(&rows);
    if let (Some(a), Some(b)) = (&c.source.before, &c.source.after) {
        out += &format!(
            "\nclearest at block {}, position {} (Fisher {:.2}) -> block {}, position {} (Fisher \
             {:.2})\n",
            a.layer, a.position, a.fisher, b.layer, b.position, b.fisher
        );
    }
    out
}
