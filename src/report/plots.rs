//! The plots, as inline SVG: 360 units wide, which is a phone's width.

use std::fmt::Write;

use super::escape;
use super::text::{p_value, percent};
use crate::evaluate::{Change, Rate};
use crate::search::{Candidate, LayerScore, Patched, Toward};
use crate::text::Set;

/// Refusal of harmful prompts by category: before above after, with the ends of the intervals.
pub fn categories(out: &mut String, changes: &[Change]) -> std::fmt::Result {
    let of: Vec<&Change> =
        changes.iter().filter(|c| c.set == Set::Harmful && !c.category.is_empty()).collect();
    if of.len() < 2 {
        return Ok(());
    }
    write!(
        out,
        "<h2>Refusal by category</h2><p class=dim>Harmful test prompts, <span \
        style='color:var(--old)'>before</span> and <span style='color:var(--new)'>after</span>; \
        the thin lines are 95 % intervals, p is McNemar's.</p><div class=plots>"
    )?;
    // Two columns where there is room.
    for half in of.chunks(of.len().div_ceil(2)) {
        let height = half.len() * 42;
        write!(
            out,
            "<figure><svg viewBox='0 0 360 {height}' role=img aria-label='refusal by category'>"
        )?;
        for (i, c) in half.iter().enumerate() {
            let y = i * 42;
            write!(
                out,
                "<text x=0 y={}>{}</text><text x=360 y={} text-anchor=end>{:.0} → {:.0} % <tspan \
                 fill-opacity='.65'>({} prompts, p {})</tspan></text>",
                y + 12,
                escape(&c.category),
                y + 12,
                100.0 * c.rates.before.refusal_rate,
                100.0 * c.rates.after.refusal_rate,
                c.rates.before.n,
                p_value(c.p_value)
            )?;
            bar(out, "old", y + 17, &c.rates.before)?;
            bar(out, "new", y + 27, &c.rates.after)?;
        }
        write!(out, "</svg></figure>")?;
    }
    write!(out, "</div>")
}

fn bar(out: &mut String, class: &str, y: usize, r: &Rate) -> std::fmt::Result {
    let x = |share: f64| 358.0 * share;
    write!(out, "<rect class=axis x=.5 y={y} width=358 height=8 />")?;
    write!(out, "<rect class={class} x=.5 y={y} width={:.1} height=8 />", x(r.refusal_rate))?;
    write!(
        out,
        "<line class=whisker x1={:.1} x2={:.1} y1={} y2={} />",
        x(r.interval.low),
        x(r.interval.high),
        y + 4,
        y + 4
    )
}

/// What harmful prompts gained against what others paid, candidate by candidate.
pub fn candidates(out: &mut String, p: &Patched) -> std::fmt::Result {
    write!(
        out,
        "<h2>The candidates</h2><p class=dim>Every edit that was scored: refusal of \
        harmful validation prompts against over-refusal, by the likeliest first token. Dashed: \
        the front that no other edit beats; ringed: the edit that was chosen. Up and to the left \
        is better.</p><div class=plots>"
    )?;
    scatter(out, p, "harmless prompts refused", |c| c.refused.harmless)?;
    scatter(out, p, "borderline prompts refused", |c| c.refused.borderline)?;
    trials(out, p)?;
    write!(out, "</div>")
}

/// The edits that were tried as they would be written: refusal against KL.
fn trials(out: &mut String, p: &Patched) -> std::fmt::Result {
    let of: Vec<_> =
        p.trials.iter().filter(|t| t.kl.is_finite() && t.refused.harmful.is_finite()).collect();
    if of.is_empty() {
        return Ok(());
    }
    let most = of.iter().map(|t| t.kl).fold(0.001, f64::max);
    let least = of.iter().map(|t| t.refused.harmful).fold(0.75, f64::min);
    let least = (4.0 * least).floor() / 4.0;
    // The last number under the axis must fit into the picture.
    let x = |kl: f64| 40.0 + 295.0 * (kl.max(0.0) / most).sqrt();
    let y = |share: f64| 200.0 - 185.0 * (share - least) / (1.0 - least);
    write!(
        out,
        "<figure><svg viewBox='0 0 360 240' role=img aria-label='tried edits: harmful refused \
         against KL'>"
    )?;
    shares(out, least, &y)?;
    for kl in [0.0, 0.001, 0.005, 0.02, 0.1, 0.5, 2.0].into_iter().filter(|kl| *kl <= most) {
        write!(
            out,
            "<line class=axis x1={0:.1} x2={0:.1} y1=15 y2=204 /><text class=dim x={0:.1} y=217 \
             text-anchor=middle>{kl}</text>",
            x(kl)
        )?;
    }
    write!(
        out,
        "<text class=dim x=192 y=234 text-anchor=middle>KL on harmless answers, nats</text>"
    )?;
    for t in of {
        let chosen = (t.method, t.toward, t.strength)
            == (p.chosen.method, p.chosen.toward, p.chosen.strength)
            && t.place == p.chosen.place();
        let at = format!("cx={:.1} cy={:.1}", x(t.kl), y(t.refused.harmful));
        write!(
            out,
            "<circle class={} {at} r=5><title>{}, {}, strength {:.2}: harmful {}, harmless {}, \
             borderline {}, KL {:.4}{}</title></circle>",
            match (chosen, &t.broken) {
                (true, _) => "new",
                (_, None) => "other",
                (_, Some(_)) => "old",
            },
            t.method.name(),
            escape(&t.place),
            t.strength,
            percent(t.refused.harmful),
            percent(t.refused.harmless),
            percent(t.refused.borderline),
            t.kl,
            t.broken.as_ref().map_or(String::new(), |b| format!("; {b}"))
        )?;
        if chosen {
            write!(out, "<circle class=ring {at} r=8 />")?;
        }
    }
    write!(
        out,
        "</svg><figcaption>Edits that were folded and judged by greedy answers; <span \
        style='color:var(--old)'>these</span> break a limit.</figcaption></figure>"
    )
}

/// The horizontal lines of a plot of refusal, from `least` to all.
fn shares(out: &mut String, least: f64, y: &dyn Fn(f64) -> f64) -> std::fmt::Result {
    for k in 0..=5 {
        let share = least + (1.0 - least) * f64::from(k) / 5.0;
        write!(
            out,
            "<line class=axis x1=40 x2=354 y1={0:.1} y2={0:.1} /><text class=dim x=36 y={1:.1} \
             text-anchor=end>{2:.0} %</text>",
            y(share),
            y(share) + 4.0,
            100.0 * share
        )?;
    }
    Ok(())
}

fn scatter(
    out: &mut String,
    p: &Patched,
    name: &str,
    cost: fn(&Candidate) -> f64,
) -> std::fmt::Result {
    let most = p.candidates.iter().map(cost).fold(0.05, f64::max);
    // Quarters, from the one below the least: most edits refuse most.
    let least = p.candidates.iter().map(|c| c.refused.harmful).fold(0.75, f64::min);
    let least = (4.0 * least).floor() / 4.0;
    // A root scale: the limits are a few per cent, the failures are everything.
    let x = |share: f64| 40.0 + 310.0 * (share / most).sqrt();
    let y = |share: f64| 200.0 - 185.0 * (share - least) / (1.0 - least);
    write!(
        out,
        "<figure><svg viewBox='0 0 360 240' role=img aria-label='candidates: harmful refused \
         against {name}'>"
    )?;
    shares(out, least, &y)?;
    for share in [0.0, 0.01, 0.05, 0.2, 0.5, 1.0].into_iter().filter(|s| *s <= most) {
        write!(
            out,
            "<line class=axis x1={0:.1} x2={0:.1} y1=15 y2=204 /><text class=dim x={0:.1} y=217 \
             text-anchor=middle>{1:.0} %</text>",
            x(share),
            100.0 * share
        )?;
    }
    write!(out, "<text class=dim x=192 y=234 text-anchor=middle>{name}</text>")?;
    let points: Vec<String> = front(&p.candidates, cost)
        .iter()
        .map(|c| format!("{:.1},{:.1}", x(cost(c)), y(c.refused.harmful)))
        .collect();
    write!(out, "<polyline class=front points='{}'/>", points.join(" "))?;
    for c in &p.candidates {
        let chosen = (c.family, c.strength) == (p.chosen.family, p.chosen.strength);
        let at = format!("cx={:.1} cy={:.1}", x(cost(c)), y(c.refused.harmful));
        write!(
            out,
            "<circle class={} {at} r={}><title>{}, {}, strength {:.2}: harmful {}, harmless {}, \
             borderline {}, {} of the weights' norm</title></circle>",
            if chosen { "new" } else { "other" },
            if chosen { "5" } else { "3.2" },
            c.kind(),
            escape(&c.place()),
            c.strength,
            percent(c.refused.harmful),
            percent(c.refused.harmless),
            percent(c.refused.borderline),
            percent(c.size)
        )?;
        if chosen {
            write!(out, "<circle class=ring {at} r=8 />")?;
        }
    }
    write!(out, "</svg></figure>")
}

/// The candidates that no other one beats in both, by cost.
fn front(candidates: &[Candidate], cost: fn(&Candidate) -> f64) -> Vec<&Candidate> {
    let mut sorted: Vec<&Candidate> = candidates.iter().collect();
    sorted.sort_by(|a, b| {
        cost(a).total_cmp(&cost(b)).then(b.refused.harmful.total_cmp(&a.refused.harmful))
    });
    let mut best = f64::NEG_INFINITY;
    sorted.retain(|c| {
        let better = c.refused.harmful > best;
        best = best.max(c.refused.harmful);
        better
    });
    sorted
}

/// What writing along each direction after a block gains.
pub fn scan(out: &mut String, p: &Patched) -> std::fmt::Result {
    let mut kinds: Vec<Toward> = Vec::new();
    for e in &p.scan.effects {
        if !kinds.contains(&e.toward) {
            kinds.push(e.toward);
        }
    }
    if kinds.is_empty() {
        return Ok(());
    }
    write!(
        out,
        "<h2>Where writing makes the model refuse</h2><p class=dim>Each direction is \
        added after one block where the model decides, without a gate: points by which the mean \
        probability of a first token that opens a refusal rises on harmful training prompts, the \
        mean of additions of half a gap, a gap and two. Shaded: the blocks that were \
        edited.</p><div class=plots>"
    )?;
    let blocks = p.scan.effects.iter().map(|e| e.layer + 1).max().unwrap_or(1);
    let gains = |t: Toward| -> Vec<(usize, f64)> {
        let known =
            (0..blocks).filter(|&l| p.scan.effects.iter().any(|e| e.layer == l && e.toward == t));
        known.map(|l| (l, p.scan.gain(l, t, p.emit))).collect()
    };
    let most = kinds.iter().flat_map(|&t| gains(t)).map(|g| g.1).fold(0.01, f64::max);
    let x = |layer: usize| 34.0 + 320.0 * (layer as f64 + 0.5) / blocks as f64;
    let y = |gain: f64| 150.0 - 130.0 * (gain / most).clamp(-0.1, 1.0);
    for toward in kinds {
        write!(out, "<figure><svg viewBox='0 0 360 190' role=img aria-label='gain by block'>")?;
        for &layer in &p.chosen.layers {
            let (at, wide) = (x(layer) - 160.0 / blocks as f64, 320.0 / blocks as f64);
            write!(out, "<rect class=band x={at:.1} y=15 width={wide:.1} height=135 />")?;
        }
        for layer in (0..blocks).step_by(blocks.div_ceil(12)) {
            write!(
                out,
                "<text class=dim x={:.1} y=170 text-anchor=middle>{layer}</text>",
                x(layer)
            )?;
        }
        for gain in [0.0, most] {
            let (at, points) = (y(gain), 100.0 * gain);
            write!(
                out,
                "<line class=axis x1=34 x2=354 y1={at} y2={at} /><text class=dim x=30 \
                y={} text-anchor=end>{points:.0}</text>",
                at + 4.0
            )?;
        }
        let points: Vec<String> =
            gains(toward).iter().map(|&(l, g)| format!("{:.1},{:.1}", x(l), y(g))).collect();
        let words = toward.words();
        write!(
            out,
            "<polyline class=linenew points='{}'/><text class=dim x=194 y=186 \
            text-anchor=middle>block</text></svg><figcaption>{words}</figcaption></figure>",
            points.join(" ")
        )?;
    }
    write!(out, "</div>")
}

/// How well each block tells harmful from harmless prompts, and how the template's positions share
/// in it.
pub fn layers(out: &mut String, p: &Patched) -> std::fmt::Result {
    let own: Vec<&LayerScore> = p.layers.iter().filter(|l| l.position == 0).collect();
    if own.is_empty() {
        return Ok(());
    }
    write!(
        out,
        "<h2>Where the model tells harmful from harmless requests</h2><p class=dim>First: \
        validation prompts projected on each block's direction at the deciding position. Second: \
        how far harmful and harmless training prompts are apart at every position that the chat \
        template adds (0 decides), relative to the largest gap. Shaded or framed: the blocks that \
        were edited.</p><div class=plots>"
    )?;
    let n = own.len() as f64;
    let (left, wide) = (34.0, 320.0);
    let x = |i: f64| left + wide * (i + 0.5) / n;
    let step = own.len().div_ceil(12).max(1);
    let edited = |layer: usize| p.chosen.layers.contains(&layer);
    write!(out, "<figure><svg viewBox='0 0 360 190' role=img aria-label='separation by block'>")?;
    for (i, l) in own.iter().enumerate() {
        if edited(l.layer) {
            write!(
                out,
                "<rect class=band x={:.1} y=15 width={:.1} height=135 />",
                x(i as f64 - 0.5),
                wide / n
            )?;
        }
        if i % step == 0 {
            write!(
                out,
                "<text class=dim x={:.1} y=166 text-anchor=middle>{}</text>",
                x(i as f64),
                l.layer
            )?;
        }
    }
    for share in [0.0, 0.5, 1.0] {
        let y = 150.0 - 130.0 * share;
        write!(
            out,
            "<line class=axis x1=34 x2=354 y1={y} y2={y} /><text class=dim x=30 y={} \
            text-anchor=end>{share}</text>",
            y + 4.0
        )?;
    }
    let most = own.iter().map(|l| l.fisher).fold(f64::MIN_POSITIVE, f64::max);
    for (class, f) in [
        ("linenew", &(|l: &LayerScore| l.auc) as &dyn Fn(&LayerScore) -> f64),
        ("lineold", &|l| l.fisher / most),
    ] {
        let points: Vec<String> = own
            .iter()
            .enumerate()
            .map(|(i, l)| format!("{:.1},{:.1}", x(i as f64), 150.0 - 130.0 * f(l).clamp(0.0, 1.0)))
            .collect();
        write!(out, "<polyline class={class} points='{}'/>", points.join(" "))?;
    }
    write!(
        out,
        "<text class=dim x=194 y=184 \
        text-anchor=middle>block</text></svg><figcaption><span style='color:var(--new)'>area \
        under the ROC curve</span>, <span style='color:var(--old)'>Fisher ratio</span> (1 = \
        {most:.1})</figcaption></figure>"
    )?;
    heatmap(out, p, own.len(), &edited)?;
    write!(out, "</div>")
}

fn heatmap(
    out: &mut String,
    p: &Patched,
    blocks: usize,
    edited: &dyn Fn(usize) -> bool,
) -> std::fmt::Result {
    let positions = p.layers.iter().map(|l| l.position.unsigned_abs() + 1).max().unwrap_or(1);
    let most = p.layers.iter().map(|l| l.gap).fold(f64::MIN_POSITIVE, f64::max);
    let (wide, high) = (320.0 / blocks as f64, (135.0 / positions as f64).min(34.0));
    let bottom = 15.0 + high * positions as f64;
    write!(
        out,
        "<figure><svg viewBox='0 0 360 {:.0}' role=img aria-label='gap by block and position'>",
        bottom + 40.0
    )?;
    for l in &p.layers {
        let (row, share) = (l.position.unsigned_abs() as f64, l.gap / most);
        let (x, y) = (34.0 + wide * l.layer as f64, 15.0 + high * row);
        write!(
            out,
            "<rect class=new x={x:.1} y={y:.1} width={:.1} height={:.1} \
             fill-opacity='{:.2}'><title>block {}, position {}: gap {:.2}, halves agree \
             {:.2}</title></rect>",
            (wide - 1.0).max(0.5),
            (high - 1.0).max(0.5),
            0.03 + 0.6 * share.clamp(0.0, 1.0),
            l.layer,
            l.position,
            l.gap,
            l.split_half
        )?;
        if blocks <= 12 && positions <= 6 {
            write!(
                out,
                "<text x={:.1} y={:.1} text-anchor=middle>{share:.2}</text>",
                x + wide / 2.0,
                y + high / 2.0 + 4.0
            )?;
        }
        if l.position == 0 && edited(l.layer) {
            write!(
                out,
                "<rect class=ring x={x:.1} y={y:.1} width={:.1} height={:.1} />",
                wide - 1.0,
                high - 1.0
            )?;
        }
        let step = blocks.div_ceil(12).max(1);
        if l.position == 0 && l.layer % step == 0 {
            write!(
                out,
                "<text class=dim x={:.1} y={:.1} text-anchor=middle>{}</text>",
                x + wide / 2.0,
                bottom + 14.0,
                l.layer
            )?;
        }
    }
    for row in (0..positions).step_by(positions.div_ceil(10).max(1)) {
        let y = 15.0 + high * (row as f64 + 0.5) + 4.0;
        write!(
            out,
            "<text class=dim x=30 y={y:.1} text-anchor=end>{}{row}</text>",
            if row > 0 { "−" } else { "" }
        )?;
    }
    write!(
        out,
        "<text class=dim x=194 y={:.1} \
        text-anchor=middle>block</text></svg><figcaption>gap by position; 1 = \
        {most:.2}</figcaption></figure>",
        bottom + 32.0
    )
}
