//! The HTML: one file, no network, light and dark, fit for a phone and for paper.

use std::fmt::Write;

use super::text::{p_value, percent};
use super::{card, escape, examples, file_name, plots, Opening, RunReport};
use crate::evaluate::stats::SIGNIFICANT;
use crate::evaluate::{judge::Verdict, Rate, Scores, THOUGHT};
use crate::forward::Stage;
use crate::output::Emit;
use crate::pair::Pair;
use crate::search::{Patched, LEAST_GAIN};
use crate::text::Set;

const STYLE: &str = include_str!("style.css");

/// Renders the report of a patch.
pub fn html(p: &Patched, run: &RunReport) -> String {
    let mut out = String::new();
    // Writing to a string can't fail.
    let _ = render(&mut out, p, run);
    out
}

fn render(out: &mut String, p: &Patched, run: &RunReport) -> std::fmt::Result {
    let (split, Pair { before: a, after: b }) = p.measured();
    let name = escape(file_name(&run.model));
    write!(
        out,
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport \
         content='width=device-width,initial-scale=1'><title>refusal-patch: \
         {name}</title><style>{STYLE}</style></head><body>"
    )?;
    verdict(out, p, a, b)?;
    write!(
        out,
        "<p class=dim>{name} · {} · {}, {}, strength {:.2} · {split} prompts, greedy answers</p>",
        what(p.emit),
        p.chosen.kind(),
        escape(&p.chosen.place()),
        p.chosen.strength
    )?;
    cards(out, a, b)?;
    if let Some(warning) = &p.warning {
        write!(out, "<p class=warn>{}</p>", escape(warning))?;
    }
    if p.chosen.edit.iter().all(|t| t.v.is_empty()) {
        write!(
            out,
            "<p>A constant touches harmless requests too: {} of their answers changed.</p>",
            percent(1.0 - b.same_answers)
        )?;
    }
    if let Some(load) = &p.load {
        write!(out, "<h2>Load it</h2><pre>{}</pre>", escape(load))?;
    }
    before_after(out, p, split, a, b)?;
    plots::categories(out, &p.changes)?;
    plots::candidates(out, p)?;
    plots::scan(out, p)?;
    plots::layers(out, p)?;
    tensors(out, p)?;
    answers(out, p)?;
    write!(
        out,
        "<div class=screen><h2>For the model card</h2><details><summary>Markdown to \
         paste</summary><pre>{}</pre></details></div>",
        escape(&card::model_card(p, run))
    )?;
    provenance(out, p, run)?;
    write!(out, "</body></html>")
}

fn verdict(out: &mut String, p: &Patched, a: &Scores, b: &Scores) -> std::fmt::Result {
    let (before, after) = (a.refusal.harmful.refusal_rate, b.refusal.harmful.refusal_rate);
    let whole = p.changes.iter().find(|c| c.set == Set::Harmful && c.category.is_empty());
    let sure = whole.is_none_or(|c| c.p_value < SIGNIFICANT);
    let head = match after - before {
        _ if p.warning.is_some() => "Refusal partly restored",
        gain if gain >= LEAST_GAIN && sure => "Refusal restored",
        _ => "Refusal hardly changed",
    };
    write!(
        out,
        "<h1>{head}: of 100 harmful requests {:.0} were refused, now {:.0} are</h1>",
        100.0 * before,
        100.0 * after
    )?;
    let chance = match whole {
        None => "Nothing was written.".to_string(),
        Some(c) if sure => {
            format!("That is more than chance (paired McNemar p = {}).", p_value(c.p_value))
        }
        Some(c) => format!("That may be chance (paired McNemar p = {}).", p_value(c.p_value)),
    };
    let harm = |s: &Scores| s.refusal.harmless.refusal_rate;
    let rise = 100.0 * (harm(b) - harm(a));
    write!(
        out,
        "<p>{chance} Of harmless requests {} are refused ({}); {} of their answers are word for \
         word the same.</p>",
        percent(harm(b)),
        if rise.abs() < 0.05 { "as before".to_string() } else { format!("{rise:+.1} points") },
        percent(b.same_answers)
    )
}

fn what(emit: Emit) -> &'static str {
    match emit {
        Emit::Weights => "folded into the weights",
        Emit::Lora => "LoRA adapter beside the model",
        Emit::ControlVector => "control vector beside the model",
    }
}

fn cards(out: &mut String, a: &Scores, b: &Scores) -> std::fmt::Result {
    write!(out, "<div class=cards>")?;
    for (set, x) in a.refusal.iter() {
        let class = if set == Set::Harmful { "main" } else { "" };
        write!(
            out,
            "<div class='{class}'><b>{:.1} → {:.1} %</b><span>{} refused</span></div>",
            100.0 * x.refusal_rate,
            100.0 * b.refusal.get(set).refusal_rate,
            set.name()
        )?;
    }
    write!(out, "<div><b>{:.4}</b><span>KL on harmless answers, nats</span></div></div>", b.kl)
}

fn before_after(
    out: &mut String,
    p: &Patched,
    split: &str,
    a: &Scores,
    b: &Scores,
) -> std::fmt::Result {
    write!(
        out,
        "<h2>Before and after</h2><div class=scroll><table><tr><th>{split} \
         prompts<th>before<th>after<th>p{}",
        if p.reference.is_some() { "<th>the original" } else { "" }
    )?;
    let original = p.original();
    for set in Set::ALL {
        let (name, x, y) = (set.name(), a.refusal.get(set), b.refusal.get(set));
        let change = p.changes.iter().find(|c| c.set == set && c.category.is_empty());
        let chance = change.map_or(String::new(), |c| p_value(c.p_value));
        let goal = original.map_or(String::new(), |o| format!("<td>{}", rate(o.get(set))));
        write!(out, "<tr><td>{name} refused<td>{}<td>{}<td>{chance}{goal}", rate(x), rate(y))?;
    }
    let blank = if original.is_some() { "<td>" } else { "" };
    for set in Set::ALL.into_iter().filter(|_| p.thinking.is_some()) {
        let Some(cells) = p.thinking.as_ref().map(|t| t.map(|r| rate(r.get(set)))) else {
            continue;
        };
        let Pair { before, after } = cells;
        let name = set.name();
        write!(out, "<tr><td>{name} refused, with thinking<td>{before}<td>{after}<td>{blank}")?;
    }
    let odds = |r: &Rate| format!("{:+.1}", r.mean_log_odds);
    for (name, x, y) in [
        ("log-odds, harmful", odds(&a.refusal.harmful), odds(&b.refusal.harmful)),
        ("log-odds, harmless", odds(&a.refusal.harmless), odds(&b.refusal.harmless)),
        ("incoherent answers", incoherent(a), incoherent(b)),
        ("KL on harmless answers, nats", "0".into(), format!("{:.4}", b.kl)),
        (
            "perplexity, own harmless answers",
            format!("{:.4}", a.answer_perplexity),
            format!("{:.4}", b.answer_perplexity),
        ),
        (
            "perplexity, built-in text",
            format!("{:.2}", a.perplexity),
            format!("{:.2}", b.perplexity),
        ),
        ("harmless answers unchanged", String::new(), percent(b.same_answers)),
    ] {
        write!(out, "<tr><td>{name}<td>{x}<td>{y}<td>{blank}")?;
    }
    write!(
        out,
        "</table></div><p class=dim>Below the rates: prompts, and 95 % Wilson intervals. \
        p: how often chance alone would change as much (paired exact McNemar test).</p>"
    )?;
    match &p.thinking {
        Some(_) => write!(
            out,
            "<p class=dim>With thinking: after thoughts of the model's own, \
            cut off after {THOUGHT} tokens; all else is with thinking off.</p>"
        ),
        None => Ok(()),
    }
}

fn incoherent(s: &Scores) -> String {
    let (k, n) = s.refusal.iter().fold((0, 0), |(k, n), (_, r)| (k + r.incoherent, n + r.n));
    format!("{k} of {n}")
}

fn rate(r: &Rate) -> String {
    format!(
        "{} <small><span>{}/{},</span> <span>{:.0}–{:.0} %</span></small>",
        percent(r.refusal_rate),
        r.refused,
        r.n,
        100.0 * r.interval.low,
        100.0 * r.interval.high
    )
}

fn tensors(out: &mut String, p: &Patched) -> std::fmt::Result {
    if p.tensors.is_empty() {
        return Ok(());
    }
    write!(
        out,
        "<h2>What was changed</h2><p class=dim>All other tensors are byte for byte the \
        same; metadata says what was done.</p><div class=scroll><table><tr><th>tensor<th>strength \
        asked<th>stored<th>encoding<th>edit / weights<th>codes moved<th>bytes changed"
    )?;
    for t in &p.tensors {
        let encoding = if t.encoding.before == t.encoding.after {
            t.encoding.before.to_string()
        } else {
            format!("{} → {}", t.encoding.before, t.encoding.after)
        };
        write!(
            out,
            "<tr><td><code>{}</code><td>{:.2}<td>{}<td>{encoding}<td>{}<td>{}<td>{}",
            escape(&t.tensor),
            t.asked,
            percent(t.achieved.achieved),
            percent(t.achieved.size),
            percent(t.achieved.codes_moved as f64 / t.achieved.elements.max(1) as f64),
            t.achieved.bytes_changed
        )?;
    }
    write!(out, "</table></div>")
}

fn answers(out: &mut String, p: &Patched) -> std::fmt::Result {
    let examples = examples(p);
    if examples.is_empty() {
        return Ok(());
    }
    write!(
        out,
        "<h2>Examples</h2><p class=dim>Test prompts. Answers to harmful ones are cut to their \
         opening.</p>"
    )?;
    for e in &examples {
        let set = if e.set == Set::Harmful { "" } else { e.set.name() };
        write!(out, "<div class=pair><b>{}</b> <small>{set}</small>", escape(&e.prompt))?;
        for (when, Opening { text, verdict }) in [("before", &e.before), ("after", &e.after)] {
            write!(
                out,
                "<p><span class=tag>{when}</span><span>{} <small>{}</small></span></p>",
                escape(text),
                class(*verdict)
            )?;
        }
        write!(out, "</div>")?;
    }
    Ok(())
}

fn class(v: Verdict) -> &'static str {
    match v {
        Verdict::Refused => "refused",
        Verdict::Answered => "answered",
        Verdict::Evasive => "evasive",
        Verdict::Incoherent => "incoherent",
        Verdict::Unfinished => "unfinished",
    }
}

fn provenance(out: &mut String, p: &Patched, run: &RunReport) -> std::fmt::Result {
    write!(out, "<h2>Provenance</h2><dl>")?;
    let mut item = |name: &str, value: String| write!(out, "<dt>{name}<dd>{}", escape(&value));
    item("program", format!("refusal-patch {}", env!("CARGO_PKG_VERSION")))?;
    item("IN", format!("{}, {} bytes, sha256 {}", run.model, p.bytes.before, p.sha256.before))?;
    if let Some(o) = &p.reference {
        item("original", o.model.clone())?;
    }
    if let Some(path) = &p.out {
        item(
            "OUT",
            format!("{}, {} bytes, sha256 {}", path.display(), p.bytes.after, p.sha256.after),
        )?;
    }
    let s = run.limits;
    item(
        "limits",
        format!(
            "KL {} nats, over-refusal of harmless prompts +{:.1} points, method {}",
            s.max_kl,
            100.0 * s.max_over_refusal,
            p.chosen.method.name()
        ),
    )?;
    let sources: Vec<String> =
        run.prompts.sources.iter().map(|(set, from)| format!("{} {from}", set.name())).collect();
    item("prompts", format!("{}; sha256 {}", sources.join(", "), run.prompts.sha256))?;
    let memory = run
        .peak_memory
        .map_or(String::new(), |m| format!(", at most {} MB of memory", m / 1_000_000));
    item(
        "run",
        format!(
            "{:.0} s on {}{memory}, {} new tokens an answer",
            run.seconds, run.device, run.max_new_tokens
        ),
    )?;
    let stage = |s: &Stage| format!("{} {:.0} s ({:.0} tokens)", s.name, s.seconds, s.tokens);
    item("stages", run.stages.iter().map(stage).collect::<Vec<_>>().join(", "))?;
    write!(out, "</dl>")
}
