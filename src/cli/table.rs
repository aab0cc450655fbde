//! Aligned columns.

/// Rows of cells as text: the first column to the left, the others to the right, a rule under the first row.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
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
            out += &format!("{}\n", "-".repeat(widths.iter().sum::<usize>() + 2 * columns.saturating_sub(1)));
        }
    }
    out
}

/// Cells from anything printable.
macro_rules! cells {
    ($($x:expr),* $(,)?) => { vec![$($x.to_string()),*] };
}
pub(crate) use cells;

/// A share in per cent.
pub fn percent(x: f64) -> String {
    format!("{:.1} %", 100.0 * x)
}

/// Bytes for people.
pub fn bytes(n: u64) -> String {
    match n {
        0..=9_999 => format!("{n} B"),
        10_000..=9_999_999 => format!("{:.1} kB", n as f64 / 1e3),
        10_000_000..=9_999_999_999 => format!("{:.1} MB", n as f64 / 1e6),
        _ => format!("{:.1} GB", n as f64 / 1e9),
    }
}
