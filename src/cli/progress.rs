//! Progress bars on standard error.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use refusal_patch::progress::Progress;

/// A bar a stage: name, rate, time left. Without a terminal only the notes are printed.
pub struct Bars {
    bar: Mutex<Option<ProgressBar>>,
    quiet: bool,
    draw: bool,
}

impl Bars {
    pub fn new(quiet: bool) -> Bars {
        Bars { bar: Mutex::new(None), quiet, draw: !quiet && std::io::stderr().is_terminal() }
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
            return;
        }
        let template = if unit == "bytes" {
            "{msg:>16} {bar:32} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left"
        } else {
            "{msg:>16} {bar:32} {pos}/{len} {prefix}, {per_sec}, {eta} left"
        };
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::new(total)
            .with_style(style)
            .with_message(stage.to_string())
            .with_prefix(unit.to_string());
        bar.enable_steady_tick(Duration::from_millis(200));
        self.with(|b| *b = Some(bar));
    }

    fn advance(&self, n: u64) {
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
        self.with(|b| match b {
            Some(b) => b.suspend(|| eprintln!("{line}")),
            None => eprintln!("{line}"),
        });
    }
}
