//! Counting with doubt.

use serde::Serialize;

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

/// Share of true losses that a verdict should find.
pub const POWER: f64 = 0.8;
/// The p-value below which a change counts: not chance alone.
pub const SIGNIFICANT: f64 = 0.05;
/// More prompts than these are never asked for.
const MOST_PROMPTS: usize = 1 << 17;

/// What a paired comparison of so many prompts could have shown.
///
/// The background is what changed sides without a loss: as many prompts each way as went the rarer
/// way. A loss of δ comes on top of it: a prompt is lost with the probability background + δ and
/// gained with that of the background (Connor 1987, with the exact test in place of the normal
/// approximation).
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Power {
    /// Prompts.
    pub n: usize,
    /// Share of the prompts that changes sides each way without a loss.
    pub background: f64,
    /// The smallest true loss, as a share of the prompts, that the exact McNemar test (p < 0.05)
    /// finds in 80 % of all comparisons; none where not even a loss of all that was refused is
    /// found so often.
    pub smallest_loss: Option<f64>,
    /// The loss that may be, as a share.
    pub max_drop: f64,
    /// The fewest prompts that show a loss of `max_drop`; none where no number of prompts does.
    pub needed: Option<usize>,
}

impl Power {
    /// Of `n` prompts of which the original refused `refused`, `gained` and `lost` changed sides.
    pub fn of(n: usize, refused: usize, gained: usize, lost: usize, max_drop: f64) -> Power {
        let background = gained.min(lost) as f64 / n.max(1) as f64;
        Power {
            n,
            background,
            smallest_loss: smallest_loss(n, refused, background),
            max_drop,
            needed: prompts_needed(max_drop, background),
        }
    }

    /// The same in words.
    pub fn words(&self) -> String {
        let points = |share: f64| format!("{:.1} points", 100.0 * share);
        let n = self.n;
        let shown = match self.smallest_loss {
            Some(loss) => format!(
                "{n} prompts show a loss of {} or more in {:.0} % of all comparisons",
                points(loss),
                100.0 * POWER
            ),
            None => format!("{n} prompts are too few to show any loss"),
        };
        let max = points(self.max_drop);
        match self.needed {
            _ if !self.is_too_low() => shown,
            Some(needed) => format!("{shown}; to show one of {max}, {needed} prompts are needed"),
            None => format!("{shown}; no number of prompts shows one of {max}"),
        }
    }

    /// Whether the prompts are too few to show a loss of `max_drop`.
    pub fn is_too_low(&self) -> bool {
        self.smallest_loss.is_none_or(|loss| loss > self.max_drop + 1e-9)
    }
}

/// How often the exact two-sided McNemar test (p < 0.05) finds a loss of a share of `n` prompts
/// where another share, the background, changes sides each way.
pub fn power(n: usize, loss: f64, background: f64) -> f64 {
    let up = background.clamp(0.0, 1.0);
    let down = (background + loss).clamp(0.0, 1.0 - up);
    let log_factorial = log_factorials(n);
    let binomial = |n: usize, k: usize, p: f64| -> f64 {
        match (p <= 0.0, p >= 1.0) {
            (true, _) => f64::from(u8::from(k == 0)),
            (_, true) => f64::from(u8::from(k == n)),
            _ => {
                let choose = log_factorial[n] - log_factorial[k] - log_factorial[n - k];
                (choose + k as f64 * p.ln() + (n - k) as f64 * (-p).ln_1p()).exp()
            }
        }
    };
    let mut total = 0.0;
    let mut least = 0;
    for gained in 0..=n {
        let weight = binomial(n, gained, up);
        if weight < 1e-12 {
            // Past the bulk, or not there yet.
            if gained as f64 > up * n as f64 {
                break;
            }
            continue;
        }
        // The fewest losses that count, which grow with the gains.
        while least <= n - gained && (least <= gained || mcnemar(gained, least) >= SIGNIFICANT) {
            least += 1;
        }
        let rest = n - gained;
        let share = if up < 1.0 { (down / (1.0 - up)).min(1.0) } else { 0.0 };
        let found: f64 = match (least as f64) < share * rest as f64 {
            true => 1.0 - (0..least.min(rest + 1)).map(|k| binomial(rest, k, share)).sum::<f64>(),
            false => (least..=rest).map(|k| binomial(rest, k, share)).sum(),
        };
        total += weight * found;
    }
    total.clamp(0.0, 1.0)
}

/// ln k! for every k up to `n`.
fn log_factorials(n: usize) -> Vec<f64> {
    let mut all = vec![0.0; n + 1];
    for k in 1..=n {
        all[k] = all[k - 1] + (k as f64).ln();
    }
    all
}

/// The smallest loss that [`power`] puts at [`POWER`]: at most what was refused.
fn smallest_loss(n: usize, refused: usize, background: f64) -> Option<f64> {
    let most = refused.min(n) as f64 / n.max(1) as f64 - background;
    if most <= 0.0 || power(n, most, background) < POWER {
        return None;
    }
    let (mut low, mut high) = (0.0, most);
    while high - low > 1e-4 {
        let middle = (low + high) / 2.0;
        match power(n, middle, background) < POWER {
            true => low = middle,
            false => high = middle,
        }
    }
    Some(high)
}

/// The fewest prompts of which a loss is found with [`POWER`].
fn prompts_needed(loss: f64, background: f64) -> Option<usize> {
    if loss <= 0.0 {
        return None;
    }
    let enough = |n: usize| power(n, loss, background) >= POWER;
    let mut high = 8;
    while !enough(high) {
        high *= 2;
        if high > MOST_PROMPTS {
            return None;
        }
    }
    let mut low = high / 2;
    while high - low > 1 {
        let middle = low.midpoint(high);
        match enough(middle) {
            true => high = middle,
            false => low = middle,
        }
    }
    Some(high)
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

    /// The share of simulated comparisons in which the test finds a loss.
    fn simulated(n: usize, loss: f64, background: f64, times: usize) -> f64 {
        let mut state = 7u64;
        let mut uniform = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / (1u64 << 53) as f64
        };
        let mut found = 0;
        for _ in 0..times {
            let (mut gained, mut lost) = (0, 0);
            for _ in 0..n {
                match uniform() {
                    u if u < background => gained += 1,
                    u if u < 2.0 * background + loss => lost += 1,
                    _ => {}
                }
            }
            found += usize::from(lost > gained && mcnemar(gained, lost) < 0.05);
        }
        found as f64 / times as f64
    }

    #[test]
    fn power_is_what_simulated_comparisons_have() {
        for (n, loss, background) in
            [(60, 0.2, 0.0), (112, 0.1, 0.03), (112, 0.05, 0.03), (300, 0.08, 0.1), (40, 0.5, 0.2)]
        {
            let (exact, seen) =
                (power(n, loss, background), simulated(n, loss, background, 20_000));
            assert!((exact - seen).abs() < 0.012, "{n} {loss} {background}: {exact} {seen}");
        }
        // Six losses and no gain are the least that counts.
        assert_eq!((power(5, 1.0, 0.0), power(6, 1.0, 0.0)), (0.0, 1.0));
        assert!(power(112, 0.0, 0.05) < 0.025, "one side of a test at 5 %");
    }

    #[test]
    fn the_smallest_loss_is_found_in_four_of_five_comparisons() {
        for (n, refused, gained, lost) in [(112, 100, 0, 0), (112, 100, 4, 9), (500, 400, 20, 20)] {
            let p = Power::of(n, refused, gained, lost, 0.05);
            let loss = p.smallest_loss.unwrap();
            let seen = simulated(n, loss, p.background, 20_000);
            assert!((0.788..0.82).contains(&seen), "{p:?}: {seen}");
            let needed = p.needed.unwrap();
            assert_eq!(p.is_too_low(), needed > n, "{p:?}");
            assert!(simulated(needed, 0.05, p.background, 20_000) > 0.788, "{p:?}");
            assert!(power(needed - 1, 0.05, p.background) < POWER, "{p:?}");
        }
    }

    #[test]
    fn prompts_that_can_show_nothing_say_so() {
        let few = Power::of(5, 5, 0, 0, 0.05);
        assert_eq!(few.smallest_loss, None);
        assert!(few.words().starts_with("5 prompts are too few to show any loss; to show"));
        let hardly_refused = Power::of(200, 4, 0, 0, 0.05);
        assert_eq!(hardly_refused.smallest_loss, None, "four refusals can't be six losses");
        let none = Power::of(112, 100, 0, 0, 0.0);
        assert!(none.words().ends_with("no number of prompts shows one of 0.0 points"));
        let many = Power::of(2000, 1900, 10, 10, 0.05);
        assert!(!many.is_too_low() && !many.words().contains("needed"), "{}", many.words());
    }
}
