//! What a run costs, counted where it is spent: tokens through the blocks and rows through the
//! output matrix, stage by stage.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Mutex;
use std::time::Instant;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One stage of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Stage {
    /// What was done, in words. Stages of one name are one entry.
    pub name: String,
    /// Seconds that it took.
    pub seconds: f64,
    /// Tokens that went through all blocks; one that went through half of them counts half.
    pub tokens: f64,
    /// Rows that the output matrix read.
    pub reads: u64,
}

/// A run's stages so far, and what the current one costs.
pub struct Work {
    since: Mutex<Instant>,
    /// Rows through one block, times `SHARE` over the number of blocks.
    tokens: AtomicU64,
    reads: AtomicU64,
    stages: Mutex<Vec<Stage>>,
}

/// Fixed-point unit: fractions of a token.
const SHARE: u64 = 1 << 20;

impl Default for Work {
    fn default() -> Work {
        Work {
            since: Mutex::new(Instant::now()),
            tokens: AtomicU64::new(0),
            reads: AtomicU64::new(0),
            stages: Mutex::new(Vec::new()),
        }
    }
}

impl Work {
    /// `rows` went through one of a model's `blocks`.
    pub(super) fn block(&self, rows: usize, blocks: usize) {
        let share = rows as u64 * SHARE / blocks.max(1) as u64;
        self.tokens.fetch_add(share, Ordering::Relaxed);
    }

    /// The output matrix read `rows`.
    pub(super) fn read(&self, rows: usize) {
        self.reads.fetch_add(rows as u64, Ordering::Relaxed);
    }

    /// Forgets what was counted: a run begins.
    pub fn begin(&self) {
        self.end("");
        lock(&self.stages).clear();
    }

    /// Ends the current stage, which gets a name; the next one begins.
    pub fn end(&self, name: &str) {
        let now = Instant::now();
        let seconds = now.duration_since(std::mem::replace(&mut lock(&self.since), now));
        let tokens = self.tokens.swap(0, Ordering::Relaxed) as f64 / SHARE as f64;
        let reads = self.reads.swap(0, Ordering::Relaxed);
        let mut stages = lock(&self.stages);
        let at = stages.iter().position(|s| s.name == name).unwrap_or_else(|| {
            stages.push(Stage { name: name.into(), seconds: 0.0, tokens: 0.0, reads: 0 });
            stages.len() - 1
        });
        stages[at].seconds += seconds.as_secs_f64();
        stages[at].tokens += tokens;
        stages[at].reads += reads;
    }

    /// The stages that ended.
    pub fn stages(&self) -> Vec<Stage> {
        lock(&self.stages).clone()
    }
}

/// A lock whose owner panicked still holds numbers.
fn lock<T>(of: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    of.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_counts_what_was_done_since_the_last_one_and_adds_to_its_name() {
        let work = Work::default();
        work.read(7);
        work.begin();
        (0..24).for_each(|_| work.block(10, 24));
        work.read(3);
        work.end("answers");
        work.block(10, 2);
        work.end("trials");
        work.read(4);
        work.end("answers");
        let of = |s: &Stage| (s.name.clone(), s.tokens.round(), s.reads);
        let all: Vec<_> = work.stages().iter().map(of).collect();
        assert_eq!(all, [("answers".to_string(), 10.0, 7), ("trials".to_string(), 5.0, 0)]);
    }
}
