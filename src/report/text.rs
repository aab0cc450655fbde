//! Numbers for people: the words of tables, reports and cards.

/// A share in per cent; NaN: not asked.
pub fn percent(x: f64) -> String {
    if x.is_nan() {
        return "not asked".into();
    }
    format!("{:.1} %", 100.0 * x)
}

/// A p-value.
pub fn p_value(p: f64) -> String {
    if p < 0.001 {
        format!("{p:.1e}")
    } else {
        format!("{p:.3}")
    }
}

/// A number of bytes.
pub fn bytes(n: u64) -> String {
    match n {
        0..=9_999 => format!("{n} B"),
        10_000..=9_999_999 => format!("{:.1} kB", n as f64 / 1e3),
        10_000_000..=9_999_999_999 => format!("{:.1} MB", n as f64 / 1e6),
        _ => format!("{:.1} GB", n as f64 / 1e9),
    }
}
