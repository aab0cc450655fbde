//! The library reports its progress and asks whether to go on; the binary draws and answers.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use crate::{Error, Result};

/// Receives the stages of a long run. Every method has a default that does nothing.
pub trait Progress: Send + Sync {
    /// A stage begins; `total` is its number of steps, in `unit`s.
    fn start(&self, _stage: &str, _total: u64, _unit: &str) {}
    /// `n` more steps of the current stage are done.
    fn advance(&self, _n: u64) {}
    /// The stage is over.
    fn finish(&self) {}
    /// A line worth reading, outside of the bars.
    fn note(&self, _line: &str) {}
    /// Whether to go on; long loops ask at every step.
    ///
    /// # Errors
    /// `Interrupted`, where the user wants the run to end.
    fn check(&self) -> Result<()> {
        Ok(())
    }
}

/// Reports nothing, and goes on.
pub struct Silent;
impl Progress for Silent {}

/// Ends one run at its next step. All clones are the same token.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Asks the run to end; a Ctrl-C handler may call this.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether to go on.
    ///
    /// # Errors
    /// `Interrupted` once [`Cancel::cancel`] was called.
    pub fn check(&self) -> Result<()> {
        match self.0.load(Ordering::Relaxed) {
            true => Err(Error::Interrupted),
            false => Ok(()),
        }
    }
}
