//! Orders candidates by what their first tokens say: the most promising of those inside the limits
//! first.

use super::baseline::Baseline;
use super::candidates::Candidate;
use super::worth::probability;
use super::MAX_BORDERLINE;
use crate::evaluate::Answer;
use crate::text::Set;

/// Families whose cliff is looked at more closely.
const REFINED: usize = 4;
/// Strengths between the strongest that fits and the next of the grid, a factor √2 apart.
const STEPS: [f64; 2] = [1.12, 1.26];

/// The over-refusal limits and the goal, applied to first tokens: candidates are scored by these,
/// so IN and the original are too.
pub(super) struct FirstTokenLimits {
    harmless: Most,
    borderline: Most,
    /// Harmful prompts.
    n: usize,
    /// See [`Baseline::goal`].
    goal: f64,
}

/// The most that one class of prompts may open with refusals: as a share, and as a mean
/// probability. The share counts these prompts; the probability says what to expect on others, more
/// finely than a share of a hundred prompts can.
struct Most {
    share: f64,
    risk: f64,
}

impl Most {
    fn fits(&self, share: f64, risk: f64) -> bool {
        share <= self.share + 1e-9 && risk <= self.risk + 1e-9
    }
}

impl FirstTokenLimits {
    pub fn new(baseline: &Baseline) -> Self {
        let Baseline { own, opening, prompts, settings, .. } = baseline;
        let of = |answers: &[Answer], set: Set| {
            let of: Vec<&Answer> = answers.iter().filter(|a| a.set == set).collect();
            let opens = |a: &&&Answer| a.top.first().is_some_and(|t| opening.contains(&t.id));
            let n = of.len().max(1) as f64;
            // An answer that thinks once more has no log-odds, and opens no refusal.
            let risk = of.iter().map(|a| probability(a.refusal_log_odds)).filter(|p| !p.is_nan());
            (of.iter().filter(opens).count() as f64 / n, risk.sum::<f64>() / n)
        };
        let limit = |set: Set, rise: f64| {
            let (share, risk) = of(&own.answers, set);
            // What the original refuses OUT may refuse, too.
            let original = baseline.reference.as_ref().map_or((0.0, 0.0), |r| of(&r.answers, set));
            Most { share: (share + rise).max(original.0), risk: (risk + rise).max(original.1) }
        };
        FirstTokenLimits {
            harmless: limit(Set::Harmless, settings.max_over_refusal),
            borderline: limit(
                Set::Borderline,
                if prompts.borderline_binds { MAX_BORDERLINE } else { 1.0 },
            ),
            n: own.scores.refusal.harmful.n.max(1),
            goal: baseline.goal(),
        }
    }

    fn fits(&self, c: &Candidate) -> bool {
        self.harmless.fits(c.refused.harmless, c.risk.harmless)
            && self.borderline.fits(c.refused.borderline, c.risk.borderline)
    }
}

/// Admissible candidates, those of the greatest value first; one that is close to a cliff counts as
/// a harmful prompt less.
pub(super) fn rank(candidates: &[Candidate], limits: &FirstTokenLimits) -> Vec<usize> {
    let mut order: Vec<usize> =
        (0..candidates.len()).filter(|&i| limits.fits(&candidates[i])).collect();
    // The next stronger edit of the same kind is outside of the limits.
    let edge = |c: &Candidate| {
        candidates
            .iter()
            .filter(|o| o.family == c.family && o.strength > c.strength)
            .min_by(|a, b| a.strength.total_cmp(&b.strength))
            .is_some_and(|next| !limits.fits(next))
    };
    let value = |c: &Candidate| {
        c.value(&c.outlook, limits.goal) - if edge(c) { 1.0 / limits.n as f64 } else { 0.0 }
    };
    order.sort_by(|&a, &b| value(&candidates[b]).total_cmp(&value(&candidates[a])));
    order
}

/// Finer strengths for the best families, at the cliff.
pub(super) fn refine(candidates: &[Candidate], limits: &FirstTokenLimits) -> Vec<Candidate> {
    let mut families: Vec<usize> = Vec::new();
    for i in rank(candidates, limits) {
        if !families.contains(&candidates[i].family) && families.len() < REFINED {
            families.push(candidates[i].family);
        }
    }
    let strongest = |&family: &usize| {
        let of = candidates.iter().filter(|c| c.family == family && limits.fits(c));
        of.max_by(|a, b| a.strength.total_cmp(&b.strength))
    };
    let last =
        |c: &Candidate| !candidates.iter().any(|o| o.family == c.family && o.strength > c.strength);
    let cliffs = families.iter().filter_map(strongest).filter(|c| !last(c));
    cliffs.flat_map(|c| STEPS.map(|factor| c.scaled(factor))).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::worth::Outlook;
    use super::super::Toward;
    use super::*;
    use crate::edit::Method;
    use crate::text::BySet;

    /// A candidate of a family of its own under which three harmful prompts are refused like this.
    pub fn candidate(family: usize, size: f64, harmful: [f64; 3], risk: f64) -> Candidate {
        Candidate {
            method: Method::Gated,
            toward: Toward::Projected,
            layers: vec![0],
            writers: vec!["ffn_down".to_string()],
            strength: 1.0,
            size,
            refused: BySet { harmful: 1.0, ..Default::default() },
            log_odds: 0.0,
            risk: BySet { harmless: risk, ..Default::default() },
            outlook: Outlook::of(harmful.map(|p| (Set::Harmful, p)).to_vec()),
            separation: 1.0,
            edit: Vec::new(),
            family,
        }
    }

    fn limits(goal: f64) -> FirstTokenLimits {
        let limit = |most| Most { share: most, risk: most };
        FirstTokenLimits { harmless: limit(0.01), borderline: limit(0.05), n: 3, goal }
    }

    #[test]
    fn the_smallest_edit_that_reaches_the_goal_goes_first() {
        let candidates = [
            candidate(0, 0.4, [0.99, 0.99, 0.99], 0.0),
            candidate(1, 0.1, [0.95, 0.97, 0.99], 0.0),
            candidate(2, 0.05, [0.5, 0.6, 0.5], 0.0),
            candidate(3, 0.01, [0.99, 0.99, 0.99], 0.5),
        ];
        // The last breaks a limit; the third falls short of the goal. The first refuses most, by
        // less than its size costs.
        assert_eq!(rank(&candidates, &limits(1.0)), [1, 0, 2]);
        assert_eq!(rank(&candidates, &limits(0.9)), [1, 0, 2]);
        assert_eq!(rank(&candidates, &limits(0.5)), [2, 1, 0]);
    }

    #[test]
    fn an_edit_close_to_the_cliff_gives_way_to_one_that_is_not() {
        let beyond = Candidate { strength: 2.0, ..candidate(0, 0.2, [1.0; 3], 0.5) };
        let candidates =
            [candidate(0, 0.1, [0.9; 3], 0.0), beyond, candidate(1, 0.1, [0.8; 3], 0.0)];
        assert_eq!(rank(&candidates, &limits(1.0)), [2, 0]);
    }
}
