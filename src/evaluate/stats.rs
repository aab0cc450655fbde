//! Counting with doubt.

/// The Wilson score interval of `k` out of `n` at 95 %.
pub fn wilson(k: usize, n: usize) -> (f64, f64) {
    if n == 0 {
        return (0.0, 1.0);
    }
    let (n, z) = (n as f64, 1.959_964);
    let p = k as f64 / n;
    let centre = p + z * z / (2.0 * n);
    let half = z * (p * (1.0 - p) / n + z * z / (4.0 * n * n)).sqrt();
    let scale = 1.0 + z * z / n;
    (((centre - half) / scale).max(0.0), ((centre + half) / scale).min(1.0))
}

/// The exact two-sided McNemar test: the odds that `gained` and `lost` differ this much by chance,
/// where of the pairs that changed `gained` went one way and `lost` the other.
pub fn mcnemar(gained: usize, lost: usize) -> f64 {
    let n = gained + lost;
    let k = gained.min(lost);
    // Σ_{i ≤ k} C(n, i) / 2^n, summed in logarithms.
    let mut log_choose = 0.0f64;
    let mut sum = 0.0f64;
    for i in 0..=k {
        if i > 0 {
            log_choose += ((n - i + 1) as f64).ln() - (i as f64).ln();
        }
        sum += (log_choose - n as f64 * std::f64::consts::LN_2).exp();
    }
    (2.0 * sum).min(1.0)
}

/// Standard error of the difference of two shares of the same `n` prompts, of which `gained` and
/// `lost` changed sides; of a prompt at least.
pub fn paired_error(gained: usize, lost: usize, n: usize) -> f64 {
    let (g, l, n) = (gained as f64, lost as f64, n.max(1) as f64);
    (g + l - (g - l) * (g - l) / n).max(0.0).sqrt().max(1.0) / n
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_of_a_paired_difference_counts_who_changed_sides() {
        assert_eq!(paired_error(0, 0, 100), 0.01, "a prompt at least");
        assert!((paired_error(8, 8, 100) - 0.04).abs() < 1e-12, "√16 of 100");
        assert!(paired_error(16, 0, 100) < paired_error(8, 8, 100));
        assert!(paired_error(3, 1, 0).is_finite());
    }

    #[test]
    fn the_wilson_interval_is_the_textbook_one() {
        let (low, high) = wilson(90, 100);
        assert!((low - 0.8256).abs() < 1e-3 && (high - 0.9448).abs() < 1e-3, "{low} {high}");
        assert_eq!(wilson(0, 0), (0.0, 1.0));
        assert_eq!(wilson(0, 10).0, 0.0);
    }

    #[test]
    fn mcnemar_is_the_exact_binomial_test() {
        assert!((mcnemar(0, 5) - 0.0625).abs() < 1e-12);
        assert!((mcnemar(10, 2) - 0.038_574).abs() < 1e-5);
        assert_eq!(mcnemar(0, 0), 1.0);
        assert_eq!(mcnemar(4, 4), 1.0);
    }
}
