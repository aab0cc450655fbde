//! Work whose course a stranger's file decides: rendering a chat template, reading a tokenizer. It
//! runs in a thread of its own with a deadline, a limit for memory and a deep stack.

use std::sync::mpsc::{channel, RecvTimeoutError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// What work may take.
#[derive(Clone, Copy)]
pub(super) struct Bounds {
    pub seconds: u64,
    /// What this process may grow by meanwhile.
    pub megabytes: u64,
}

/// Templates render in milliseconds.
pub(super) const TEMPLATE: Bounds = Bounds { seconds: 20, megabytes: 256 };
/// A tokenizer of 260,000 tokens is read in a second or two.
pub(super) const TOKENIZER: Bounds = Bounds { seconds: 120, megabytes: 2048 };
/// How often the memory is looked at.
const LOOK: Duration = Duration::from_millis(2);
/// Values that lie inside each other are written and dropped by recursion.
const STACK: usize = 128 << 20;

/// The name of the threads that work runs in.
const NAME: &str = "guarded";

/// Keeps a panic of such work from being printed: it becomes an error. For a program's start: the
/// hook for panics belongs to the whole process.
pub fn keep_guarded_panics_quiet() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if std::thread::current().name() != Some(NAME) {
            before(info);
        }
    }));
}

/// Runs work, and returns what it returns. A thread that goes beyond a limit can't be stopped, only
/// left: whoever sees the error ends the program soon.
///
/// # Errors
/// The work takes too long or too much memory, or it panics.
pub(super) fn guarded<T: Send + 'static>(
    what: &str,
    bounds: Bounds,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    let (send, done) = channel();
    let (begun, before) = (Instant::now(), own_memory());
    let builder = std::thread::Builder::new().name(NAME.into()).stack_size(STACK);
    let thread = builder.spawn(move || {
        let _ = send.send(work());
    });
    thread.map_err(|e| Error::Limit(format!("{what}: no thread can be started: {e}")))?;
    loop {
        match done.recv_timeout(LOOK) {
            Ok(result) => return Ok(result),
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::Model(format!("{what} failed: it is damaged, or hostile")))
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
        let Bounds { seconds, megabytes } = bounds;
        if begun.elapsed() > Duration::from_secs(seconds) {
            return Err(Error::Limit(format!("{what} takes longer than {seconds} s")));
        }
        if own_memory().saturating_sub(before) > megabytes << 20 {
            return Err(Error::Limit(format!("{what} takes more than {megabytes} MB")));
        }
    }
}

/// This process's memory without mapped files, where the system says; else 0.
fn own_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let mut pages = text.split(' ').skip(1).map_while(|n| n.parse::<u64>().ok());
    let (resident, shared) = (pages.next().unwrap_or(0), pages.next().unwrap_or(0));
    // Pages are of 4 KiB at least.
    resident.saturating_sub(shared) * 4096
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_that_takes_too_long_or_panics_is_an_error() {
        assert_eq!(guarded("a", TEMPLATE, || 7).unwrap(), 7);
        let endless = || std::thread::sleep(Duration::from_secs(60));
        let short = Bounds { seconds: 0, ..TEMPLATE };
        let error = guarded("a", short, endless).unwrap_err().to_string();
        assert_eq!(error, "a takes longer than 0 s");
        let error = guarded("a", TEMPLATE, || -> u8 { panic!("inside") }).unwrap_err().to_string();
        assert!(error.starts_with("a failed"), "{error}");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn work_that_takes_too_much_memory_is_an_error() {
        let greedy = || {
            let mut all: Vec<Vec<u8>> = Vec::new();
            for _ in 0..1000 {
                all.push(vec![1; 1 << 20]);
                std::thread::sleep(Duration::from_millis(1));
            }
            all.len()
        };
        let small = Bounds { megabytes: 32, ..TEMPLATE };
        let error = guarded("a", small, greedy).unwrap_err().to_string();
        assert_eq!(error, "a takes more than 32 MB");
    }
}
