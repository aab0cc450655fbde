//! Aligned columns.

use refusal_patch::evaluate::{Change, Rate};
pub use refusal_patch::report::text::{bytes, p_value, percent};

/// Cells from anything printable.
macro_rules! cells {
    ($($x:expr),* $(,)?) => { vec![$($x.to_string()),*] };
}
pub(crate) use cells;

/// Rows of cells as text: the first column to the left, the others to the right, a rule under the
/// first row.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| {
        rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut out = String::new();
    for (i, row) in rows.iter().enumerate() {
        for (c, &w) in widths.iter().enumerate() {
            let cell = row.get(c).map_or("", String::as_str);
            let pad = " ".repeat(w - cell.chars().count());
            out += &if c == 0 { format!("{cell}{pad}") } else { format!("  {pad}{cell}") };
        }
        out = out.trim_end().to_string() + "\n";
        if i == 0 {
            out += &format!(
                "{}\n",
                "-".repeat(widths.iter().sum::<usize>() + 2 * columns.saturating_sub(1))
            );
        }
    }
    out
}

/// A rate with its Wilson interval.
pub fn rate(r: &Rate) -> String {
    format!(
        "{} ({}/{}, {:.0}-{:.0} %)",
        percent(r.refusal_rate),
        r.refused,
        r.n,
        100.0 * r.interval.low,
        100.0 * r.interval.high
    )
}

/// Rates before and after with what changed and whether that may be chance. Empty without changes.
pub fn changes<'a>(
    title: &str,
    names: (&str, &str),
    changes: impl Iterator<Item = &'a Change>,
) -> String {
    let mut rows = vec![cells![title, names.0, names.1, "gained", "lost", "McNemar p"]];
    for c in changes {
        rows.push(cells![
            if c.category.is_empty() { c.set.name() } else { &c.category },
            rate(&c.rates.before),
            rate(&c.rates.after),
            c.gained,
            c.lost,
            p_value(c.p_value)
        ]);
    }
    if rows.len() == 1 {
        return String::new();
    }
    table(&rows)
}
