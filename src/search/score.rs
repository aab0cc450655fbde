//! Scores candidates by the likeliest first token under each edit, many in one pass over the
//! weights.

use std::collections::HashMap;

use super::baseline::Baseline;
use super::candidates::Candidate;
use super::worth::Outlook;
use crate::edit::{Edit, Method};
use crate::error::Result;
use crate::evaluate::{log_odds, mass};
use crate::forward::{Fork, Head, Readout};
use crate::text::{BySet, Set};

/// Scores candidates on the validation prompts. A gate fires at the deciding position only, so
/// there a row for each edit is enough; other edits reach every token, which takes a run for each.
/// In thoughts gates fire, too: a row after a thought of IN's shows less of such an edit than a
/// trial does, whose answers come after thoughts of their own.
pub(super) fn score(baseline: &Baseline, candidates: &mut [Candidate]) -> Result<()> {
    let Baseline { evaluator, validation, opening, .. } = baseline;
    let prompts = &validation.prompts;
    let edits: Vec<Edit> = candidates.iter().map(|c| c.edit.clone()).collect();
    let sequences = validation.sequences();
    let (gated, everywhere): (Vec<usize>, Vec<usize>) =
        (0..edits.len()).partition(|&i| candidates[i].method == Method::Gated);
    #[derive(Default)]
    struct Sum {
        n: usize,
        refused: usize,
        log_odds: f64,
    }
    let mut sums: HashMap<(usize, Set), Sum> = HashMap::new();
    let mut outlooks = vec![Vec::new(); candidates.len()];
    let mut note = |edit: usize, seq: usize, read: &Readout| {
        let s = sums.entry((edit, prompts[seq].set)).or_default();
        s.n += 1;
        s.refused += usize::from(read.top.first().is_some_and(|(t, _)| opening.contains(t)));
        s.log_odds += log_odds(&read.asked);
        // Sequences come in the order of the prompts.
        outlooks[edit].push((prompts[seq].set, mass(&read.asked)));
    };
    if !gated.is_empty() {
        let rows = (0..sequences.len()).flat_map(|seq| gated.iter().map(move |&i| (seq, i)));
        let rows: Vec<(usize, usize)> = rows.collect();
        let fork = |&(seq, i): &(usize, usize)| {
            let pos = sequences[seq].len() - 1;
            Fork { seq, pos, edit: &edits[i] }
        };
        let forks: Vec<Fork> = rows.iter().map(fork).collect();
        let hidden = evaluator.runner().run(&sequences, &forks, &[], &mut ())?;
        let reads = Head::new(evaluator.model, evaluator.compute)?.read(&hidden, 1, |_| opening)?;
        rows.iter().zip(&reads).for_each(|(&(seq, i), read)| note(i, seq, read));
    }
    for edit in everywhere {
        let reads = evaluator.under(&edits[edit]).first_tokens(&sequences, 1, opening)?;
        reads.iter().enumerate().for_each(|(seq, read)| note(edit, seq, read));
    }
    for ((i, c), outlook) in candidates.iter_mut().enumerate().zip(outlooks) {
        let mean =
            |set, of: fn(&Sum) -> f64| sums.get(&(i, set)).map_or(0.0, |s| of(s) / s.n as f64);
        c.refused = BySet::of(|set| mean(set, |s| s.refused as f64));
        c.log_odds = mean(Set::Harmful, |s| s.log_odds);
        c.outlook = Outlook::of(outlook);
        c.risk = BySet::of(|set| c.outlook.mean(set));
    }
    Ok(())
}
