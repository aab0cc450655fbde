//! The library reports its progress; the binary draws it.

use std::sync::atomic::{AtomicBool, Ordering};

/// Receives the stages of a long run. Every method has a default that does nothing.
pub trait Progress: Sync {
    /// A stage begins; `total` is its number of steps, in `unit`s.
    fn start(&self, _stage: &str, _total: u64, _unit: &str) {}
    /// `n` more steps of the current stage are done.
    fn advance(&self, _n: u64) {}
    /// The stage is over.
    fn finish(&self) {}
    /// A line worth reading, outside of the bars.
    fn note(&self, _line: &str) {}
}

/// Reports nothing.
pub struct Silent;
impl Progress for Silent {}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Asks every running loop to stop at its next step (called by the Ctrl-C handler).
pub fn interrupt() {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// `Err(Interrupted)` once [`interrupt`] was called; long loops ask at every layer and tile.
pub fn check() -> crate::Result<()> {
    if INTERRUPTED.load(Ordering::Relaxed) {
        return Err(crate::Error::Interrupted);
    }
    Ok(())
}
