//! Scores candidates by the likeliest first token under each edit, many in one pass over the
//! weights.

use std::collections::HashMap;

use super::baseline::Ground;
use super::candidates::Candidate;
use super::worth::Outlook;
use crate::edit::Edit;
use crate::edit::Method;
use crate::error::Result;
use crate::evaluate::{log_odds, mass, Evaluator};
use crate::forward::{Fork, Head, Readout, Sequence};
use crate::text::Set;

/// Scores candidates on the validation prompts. A gate fires at the deciding position only, so
/// there a row for each edit is enough; other edits reach every token, which takes a run for each.
/// In thoughts gates fire, too: a row behind a thought of IN's shows less of such an edit than the
/// finalists' answers do, which come behind thoughts of their own.
pub(super) fn score(ground: &Ground, candidates: &mut [Candidate]) -> Result<()> {
    let Ground { evaluator, validation, opening, .. } = ground;
    let prompts = &validation.prompts;
    let edits: Vec<Edit> = candidates.iter().map(|c| c.edit.clone()).collect();
    let with = Evaluator { edits: &edits, ..**evaluator };
    let sequences = validation.sequences(0);
    let (gated, everywhere): (Vec<usize>, Vec<usize>) =
        (1..=edits.len()).partition(|e| candidates[e - 1].method == Method::Gated);
    #[derive(Default)]
    struct Sum {
        n: usize,
        refused: usize,
        log_odds: f64,
    }
    let mut sums: HashMap<(usize, Set), Sum> = HashMap::new();
    let mut outlooks = vec![Vec::new(); candidates.len()];
    let mut note = |edit: usize, seq: usize, read: &Readout| {
        let s = sums.entry((edit - 1, prompts[seq].set)).or_default();
        s.n += 1;
        s.refused += usize::from(read.top.first().is_some_and(|(t, _)| opening.contains(t)));
        s.log_odds += log_odds(&read.asked);
        // Sequences come in the order of the prompts.
        outlooks[edit - 1].push((prompts[seq].set, mass(&read.asked)));
    };
    if !gated.is_empty() {
        let forks: Vec<Fork> = (0..sequences.len())
            .flat_map(|seq| gated.iter().map(move |&edit| (seq, edit)))
            .map(|(seq, edit)| Fork { seq, pos: sequences[seq].tokens.len() - 1, edit })
            .collect();
        let hidden = with.runner().run(&sequences, &forks, &[], &mut ())?;
        let reads = Head::new(with.model, with.compute)?.read(&hidden, 1, |_| opening)?;
        forks.iter().zip(&reads).for_each(|(f, read)| note(f.edit, f.seq, read));
    }
    for edit in everywhere {
        let under: Vec<Sequence> =
            sequences.iter().map(|s| Sequence { edit, ..s.clone() }).collect();
        let reads = with.first_tokens(&under, 1, opening)?;
        reads.iter().enumerate().for_each(|(seq, read)| note(edit, seq, read));
    }
    for ((i, c), outlook) in candidates.iter_mut().enumerate().zip(outlooks) {
        let mean =
            |set, of: fn(&Sum) -> f64| sums.get(&(i, set)).map_or(0.0, |s| of(s) / s.n as f64);
        let share = |set| mean(set, |s| s.refused as f64);
        (c.harmful, c.harmless, c.borderline) =
            (share(Set::Harmful), share(Set::Harmless), share(Set::Borderline));
        c.log_odds = mean(Set::Harmful, |s| s.log_odds);
        c.outlook = Outlook::of(outlook);
        c.risk = (c.outlook.mean(Set::Harmless), c.outlook.mean(Set::Borderline));
    }
    Ok(())
}
