//! Orders candidates by what their first tokens say: the most promising of those inside the limits first.

use super::candidates::Candidate;
use super::fit::Baseline;
use super::MAX_BORDERLINE;
use crate::evaluate::Answer;
use crate::text::Set;

/// Families whose cliff is looked at more closely.
const REFINED: usize = 4;
/// Strengths between the strongest that fits and the next of the grid, a factor √2 apart.
const STEPS: [f64; 2] = [1.12, 1.26];

/// The over-refusal limits for shares of first tokens: candidates are scored by these, so IN is too.
pub(super) struct FirstTokenLimits {
    /// Shares in IN, and what they may rise by.
    harmless: (f64, f64),
    borderline: (f64, f64),
    /// One harmful prompt, as a share.
    one: f64,
}

impl FirstTokenLimits {
    pub fn new(base: &Baseline, opening: &[u32], borderline_binds: bool, max_over_refusal: f64) -> Self {
        let share = |set: Set| {
            let of: Vec<&Answer> = base.answers.iter().filter(|a| a.set == set).collect();
            let opens = |a: &&&Answer| a.top.first().is_some_and(|t| opening.contains(&t.id));
            of.iter().filter(opens).count() as f64 / of.len().max(1) as f64
        };
        FirstTokenLimits {
            harmless: (share(Set::Harmless), max_over_refusal),
            borderline: (share(Set::Borderline), if borderline_binds { MAX_BORDERLINE } else { 1.0 }),
            one: 1.0 / base.scores.harmful.n.max(1) as f64,
        }
    }

    fn fits(&self, c: &Candidate) -> bool {
        c.harmless <= self.harmless.0 + self.harmless.1 + 1e-9
            && c.borderline <= self.borderline.0 + self.borderline.1 + 1e-9
    }

    /// What the use of the allowance costs.
    fn price(&self, c: &Candidate) -> f64 {
        price(c.harmless - self.harmless.0, c.borderline - self.borderline.0)
    }
}

/// What over-refusal costs in shares of harmful prompts: the limits say what may be, not what is free.
pub(super) fn price(harmless_rise: f64, borderline_rise: f64) -> f64 {
    2.0 * harmless_rise.max(0.0) + 0.5 * borderline_rise.max(0.0)
}

/// Admissible candidates, the most promising first: those that reach (nearly) the best refusal with the smallest edit.
pub(super) fn rank(candidates: &[Candidate], limits: &FirstTokenLimits) -> Vec<usize> {
    let mut order: Vec<usize> = (0..candidates.len()).filter(|&i| limits.fits(&candidates[i])).collect();
    let worth = |c: &Candidate| c.harmful - limits.price(c);
    let best = order.iter().map(|&i| worth(&candidates[i])).fold(f64::NEG_INFINITY, f64::max);
    // Close to a cliff: the next stronger edit of the same kind is outside of the limits.
    let edge = |c: &Candidate| {
        candidates
            .iter()
            .filter(|o| o.family == c.family && o.strength > c.strength)
            .min_by(|a, b| a.strength.total_cmp(&b.strength))
            .is_some_and(|next| !limits.fits(next))
    };
    let loss = |i: usize| {
        let c = &candidates[i];
        // A prompt more or less is noise.
        let short = (best - worth(c) - limits.one).max(0.0);
        // An edit as large as the weights themselves needs another encoding and moves everything.
        let bulk = 0.1 * (c.size - 0.3).max(0.0);
        short + bulk + if edge(c) { limits.one } else { 0.0 }
    };
    order.sort_by(|&a, &b| {
        loss(a).total_cmp(&loss(b)).then(candidates[a].size.total_cmp(&candidates[b].size))
    });
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
    let last = |c: &Candidate| !candidates.iter().any(|o| o.family == c.family && o.strength > c.strength);
    let cliffs = families.iter().filter_map(strongest).filter(|c| !last(c));
    cliffs.flat_map(|c| STEPS.map(|factor| c.scaled(factor))).collect()
}
