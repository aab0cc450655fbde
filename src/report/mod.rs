//! The report: one self-contained HTML file that a person understands in a minute.

use std::fmt::Write;

use crate::evaluate::{Answer, Rate};
use crate::search::Patched;
use crate::text::Set;

const STYLE: &str = "
:root{color-scheme:light dark;--ink:#1b1f24;--dim:#667;--line:#d5d9df;--back:#fff;--old:#c2703d;--new:#2f7d5b}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--dim:#9aa3ad;--line:#3a4048;--back:#15181c;--old:#e09a6a;--new:#62c094}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);max-width:52rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.1rem;margin-top:2rem}p.dim,small{color:var(--dim)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}td,th{border-bottom:1px solid var(--line);padding:.3rem .5rem;text-align:right}
td:first-child,th:first-child{text-align:left}.scroll{overflow-x:auto}svg{max-width:100%;height:auto}svg text{fill:var(--ink);font-size:11px}
.old{fill:var(--old)}.new{fill:var(--new)}.axis{stroke:var(--line)}.line{stroke:var(--new);fill:none;stroke-width:2}.hollow{fill:none;stroke:var(--old)}
blockquote{margin:.3rem 0 1rem;padding-left:.8rem;border-left:3px solid var(--line)}code{word-break:break-all}
@media print{body{margin:0;max-width:none}}";

/// Renders the report of a written patch.
pub fn html(p: &Patched, model: &str, seconds: f64) -> String {
    let mut out = String::new();
    // Writing to a string can't fail.
    let _ = render(&mut out, p, model, seconds);
    out
}

fn render(out: &mut String, p: &Patched, model: &str, seconds: f64) -> std::fmt::Result {
    let (split, (a, b)) = p.test.as_ref().map_or(("validation", &p.validation), |t| ("test", t));
    write!(out, "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>")?;
    write!(out, "<title>refusal-patch: {}</title><style>{STYLE}</style>", escape(model))?;
    write!(
        out,
        "<h1>Refusal restored: {:.1} % → {:.1} %</h1><p class=dim>{} · {split} prompts · {}, strength {:.2} · {seconds:.0} s</p>",
        100.0 * a.harmful.refusal_rate,
        100.0 * b.harmful.refusal_rate,
        escape(model),
        p.chosen.place(),
        p.chosen.strength
    )?;
    write!(out, "<div class=scroll><table><tr><th>{split} prompts<th>before<th>after")?;
    for (name, x, y) in [
        ("Refusal of harmful requests", &a.harmful, &b.harmful),
        ("Refusal of harmless requests", &a.harmless, &b.harmless),
        ("Refusal of borderline requests", &a.borderline, &b.borderline),
    ] {
        write!(out, "<tr><td>{name}<td>{}<td>{}", rate(x), rate(y))?;
    }
    write!(out, "<tr><td>KL on harmless answers, nats<td>0<td>{:.4}", b.kl)?;
    write!(
        out,
        "<tr><td>Perplexity of its own harmless answers<td>{:.4}<td>{:.4}",
        a.answer_perplexity, b.answer_perplexity
    )?;
    write!(out, "<tr><td>Perplexity of the built-in text<td>{:.2}<td>{:.2}", a.perplexity, b.perplexity)?;
    write!(out, "<tr><td>Harmless answers unchanged<td><td>{:.1} %</table></div>", 100.0 * b.same_answers)?;

    if let Some(warning) = &p.warning {
        write!(out, "<p><b>{}</b></p>", escape(warning))?;
    }
    if let Some(load) = &p.load {
        write!(out, "<h2>Load it</h2><p><code>{}</code></p>", escape(load))?;
    }
    if p.chosen.edit.iter().all(|t| t.v.is_empty()) {
        write!(
            out,
            "<p>A constant touches harmless requests too: {:.1} % of their answers changed.</p>",
            100.0 * (1.0 - b.same_answers)
        )?;
    }

    categories(out, p)?;
    layers(out, p)?;
    scatter(out, p)?;

    if !p.tensors.is_empty() {
        tensors(out, p)?;
    }
    write!(out, "<h2>Examples</h2>")?;
    let pairs = p.answers.0.iter().zip(&p.answers.1);
    let turned = pairs.clone().filter(|(x, y)| x.set == Set::Harmful && !x.refused && y.refused).take(4);
    let kept = pairs.filter(|(x, _)| x.set != Set::Harmful).take(4);
    for (x, y) in turned.chain(kept) {
        write!(
            out,
            "<p><b>{}</b> <small>({})</small><blockquote>before: {}<br>after: {}</blockquote>",
            escape(&x.prompt),
            x.set.name(),
            escape(&opening(x)),
            escape(&opening(y))
        )?;
    }
    write!(
        out,
        "<h2>Provenance</h2><p>refusal-patch {}<br>IN sha256 <code>{}</code>, {} bytes<br>OUT sha256 <code>{}</code>, {} bytes</p></html>",
        env!("CARGO_PKG_VERSION"),
        p.sha256.0,
        p.bytes.0,
        p.sha256.1,
        p.bytes.1
    )
}

fn tensors(out: &mut String, p: &Patched) -> std::fmt::Result {
    write!(out, "<h2>What was changed</h2><div class=scroll><table><tr><th>tensor<th>encoding<th>edit stored<th>codes moved<th>bytes changed")?;
    for t in &p.tensors {
        write!(
            out,
            "<tr><td>{}<td>{} → {}<td>{:.1} %<td>{:.1} %<td>{}",
            escape(&t.tensor),
            t.encoding.0,
            t.encoding.1,
            100.0 * t.achieved.achieved,
            100.0 * t.achieved.codes_moved as f64 / t.achieved.elements.max(1) as f64,
            t.achieved.bytes_changed
        )?;
    }
    write!(out, "</table></div>")
}

/// Answers to harmful prompts are cut to their opening.
fn opening(a: &Answer) -> String {
    let most = if a.set == Set::Harmful { 48 } else { 160 };
    let cut: String = a.continuation.chars().take(most).collect();
    if cut.len() < a.continuation.len() {
        cut + "…"
    } else {
        cut
    }
}

fn rate(r: &Rate) -> String {
    format!(
        "{:.1} % <small>({}/{}, {:.0}–{:.0})</small>",
        100.0 * r.refusal_rate,
        r.refused,
        r.n,
        100.0 * r.interval.0,
        100.0 * r.interval.1
    )
}

fn categories(out: &mut String, p: &Patched) -> std::fmt::Result {
    let mut names: Vec<&str> =
        p.answers.0.iter().filter(|a| a.set == Set::Harmful).map(|a| a.category.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    if names.len() < 2 {
        return Ok(());
    }
    let share = |answers: &[Answer], c: &str| {
        let of: Vec<&Answer> = answers.iter().filter(|a| a.set == Set::Harmful && a.category == c).collect();
        of.iter().filter(|a| a.refused).count() as f64 / of.len().max(1) as f64
    };
    let height = names.len() * 30 + 10;
    write!(out, "<h2>Refusal by category, before and after</h2><svg viewBox='0 0 640 {height}' role=img aria-label='refusal by category'>")?;
    for (i, c) in names.iter().enumerate() {
        let y = i * 30;
        let (x, z) = (share(&p.answers.0, c), share(&p.answers.1, c));
        write!(out, "<text x=0 y={} dy=4>{}</text>", y + 14, escape(c))?;
        write!(out, "<rect class=old x=130 y={} width={:.1} height=9 /><rect class=new x=130 y={} width={:.1} height=9 />", y + 3, 440.0 * x, y + 14, 440.0 * z)?;
        write!(out, "<text x=578 y={} dy=4>{:.0} → {:.0} %</text>", y + 14, 100.0 * x, 100.0 * z)?;
    }
    write!(out, "</svg>")
}

fn layers(out: &mut String, p: &Patched) -> std::fmt::Result {
    let own: Vec<_> = p.layers.iter().filter(|l| l.position == 0).collect();
    let last = own.len().saturating_sub(1).max(1) as f64;
    let most = own.iter().map(|l| l.gap).fold(f64::MIN_POSITIVE, f64::max);
    let points = |f: &dyn Fn(usize) -> f64| {
        (0..own.len())
            .map(|i| format!("{:.1},{:.1}", 40.0 + 560.0 * i as f64 / last, 150.0 - 130.0 * f(i)))
            .collect::<Vec<_>>()
            .join(" ")
    };
    write!(out, "<h2>Where the model tells harmful from harmless requests</h2><svg viewBox='0 0 640 180' role=img aria-label='separation by block'>")?;
    write!(
        out,
        "<line class=axis x1=40 y1=150 x2=600 y2=150 /><polyline class=line points='{}'/>",
        points(&|i| own[i].auc)
    )?;
    write!(
        out,
        "<polyline class=line style='stroke:var(--old)' points='{}'/>",
        points(&|i| own[i].gap / most)
    )?;
    for (i, l) in own.iter().enumerate().step_by(own.len().div_ceil(16).max(1)) {
        write!(
            out,
            "<text x={:.1} y=166 text-anchor=middle>{}</text>",
            40.0 + 560.0 * i as f64 / last,
            l.layer
        )?;
    }
    write!(out, "<text x=40 y=12>green: AUC on validation prompts (0 to 1); brown: gap, relative to {most:.2}</text></svg>")
}

fn scatter(out: &mut String, p: &Patched) -> std::fmt::Result {
    let most = p.candidates.iter().map(|c| c.size).fold(f64::MIN_POSITIVE, f64::max);
    // Candidates are scored by first tokens, which refuse a little more or less than texts: the mildest is the measure.
    let least = p.candidates.iter().map(|c| c.harmless).fold(1.0, f64::min);
    write!(out, "<h2>Candidates: size of the edit against refusal (first token, validation)</h2><svg viewBox='0 0 640 240' role=img aria-label='candidates'>")?;
    write!(
        out,
        "<line class=axis x1=40 y1=210 x2=620 y2=210 /><line class=axis x1=40 y1=10 x2=40 y2=210 />"
    )?;
    for c in &p.candidates {
        let ok = c.harmless <= least + 0.01 + 1e-9;
        let chosen = (c.family, c.strength) == (p.chosen.family, p.chosen.strength);
        write!(
            out,
            "<circle class={} cx={:.1} cy={:.1} r={}><title>{}, strength {:.2}: harmful {:.1} %, harmless {:.1} %</title></circle>",
            if ok { "new" } else { "hollow" },
            40.0 + 570.0 * (c.size / most).sqrt(),
            210.0 - 195.0 * c.harmful,
            if chosen { 8 } else { 4 },
            c.place(),
            c.strength,
            100.0 * c.harmful,
            100.0 * c.harmless
        )?;
    }
    write!(
        out,
        "<text x=40 y=230>0</text><text x=600 y=230 text-anchor=end>{:.0} % of the weights' norm (root scale)</text>",
        100.0 * most
    )?;
    write!(out, "<text x=50 y=14>100 % refused; hollow: refuses harmless prompts; large: chosen</text></svg>")
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
        .replace('\'', "&#39;")
}
