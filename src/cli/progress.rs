//! Progress on standard error: bars on a terminal, a line a minute in a log.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use refusal_patch::progress::Progress;

/// How often a log hears of a stage that goes on.
const LOG_EVERY: Duration = Duration::from_secs(60);

/// A bar a stage: name, rate, time left. Without a terminal the notes, and a line a minute.
pub struct Bars {
    bar: Mutex<Option<ProgressBar>>,
    log: Mutex<Log>,
    quiet: bool,
    draw: bool,
}

/// The stage that a log was last told of.
struct Log {
    stage: String,
    unit: String,
    done: u64,
    total: u64,
    told: Instant,
}

impl Log {
    /// What there is to say of it now, if anything.
    fn line(&mut self, now: Instant) -> Option<String> {
        if now.duration_since(self.told) < LOG_EVERY || self.total == 0 {
            return None;
        }
        self.told = now;
        let percent = 100 * self.done / self.total;
        Some(format!("{}: {} of {} {} ({percent} %)", self.stage, self.done, self.total, self.unit))
    }
}

impl Bars {
    pub fn new(quiet: bool) -> Bars {
        let log = Log {
            stage: String::new(),
            unit: String::new(),
            done: 0,
            total: 0,
            told: Instant::now(),
        };
        let draw = !quiet && std::io::stderr().is_terminal();
        Bars { bar: Mutex::new(None), log: Mutex::new(log), quiet, draw }
    }

    fn with(&self, f: impl FnOnce(&mut Option<ProgressBar>)) {
        if let Ok(mut bar) = self.bar.lock() {
            f(&mut bar);
        }
    }
}

impl Progress for Bars {
    fn start(&self, stage: &str, total: u64, unit: &str) {
        if !self.draw {
            if let Ok(mut log) = self.log.lock() {
                (log.stage, log.unit) = (stage.to_string(), unit.to_string());
                (log.done, log.total) = (0, total);
            }
            return;
        }
        let template = if unit == "bytes" {
            "{msg:>16} {bar:32} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left"
        } else {
            "{msg:>16} {bar:32} {pos}/{len} {prefix}, {per_sec}, {eta} left"
        };
        let style =
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::new(total)
            .with_style(style)
            .with_message(stage.to_string())
            .with_prefix(unit.to_string());
        bar.enable_steady_tick(Duration::from_millis(200));
        self.with(|b| *b = Some(bar));
    }

    fn advance(&self, n: u64) {
        if !self.draw && !self.quiet {
            let line = self.log.lock().ok().and_then(|mut log| {
                log.done += n;
                log.line(Instant::now())
            });
            if let Some(line) = line {
                eprintln!("{line}");
            }
            return;
        }
        self.with(|b| {
            if let Some(b) = b {
                b.inc(n);
            }
        });
    }

    fn finish(&self) {
        self.with(|b| {
            if let Some(b) = b.take() {
                b.finish_and_clear();
            }
        });
    }

    fn note(&self, line: &str) {
        if self.quiet {
            return;
        }
        let line = super::with_flags(line);
        self.with(|b| match b {
            Some(b) => b.suspend(|| eprintln!("{line}")),
            None => eprintln!("{line}"),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_hears_of_a_long_stage_once_a_minute() {
        let begin = Instant::now();
        let mut log = Log {
            stage: "answering".into(),
            unit: "tokens".into(),
            done: 3,
            total: 12,
            told: begin,
        };
        assert_eq!(log.line(begin + LOG_EVERY / 2), None);
        let line = log.line(begin + LOG_EVERY);
        assert_eq!(line.as_deref(), Some("answering: 3 of 12 tokens (25 %)"));
        assert_eq!(log.line(begin + LOG_EVERY + LOG_EVERY / 2), None);
    }
}
