//! The binary's half: arguments, progress bars, tables, exit codes. One function a command.

mod args;
mod compare;
mod diff;
mod inspect;
mod measure;
mod patch;
mod progress;
mod session;
mod table;

use std::io::Write;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use refusal_patch::{Error, Result};

use args::{Cli, Command, ThinkingArg};

pub fn main() -> ExitCode {
    let cli = Cli::parse();
    refusal_patch::checkpoint::name_files_cut_short();
    refusal_patch::text::keep_guarded_panics_quiet();
    let run = match &cli.command {
        None => &cli.patch.run,
        Some(Command::Derive(a)) => &a.run,
        Some(Command::Eval(a)) => &a.run,
        Some(Command::Compare(a)) => &a.run,
        Some(Command::Diff(a)) => &a.run,
        Some(Command::Inspect(a)) => &a.run,
    };
    // The first Ctrl-C lets the run clean up, the second one ends it at once.
    let (cancel, mut asked) = (run.cancel.clone(), false);
    let handler = move || {
        if std::mem::replace(&mut asked, true) {
            std::process::exit(130);
        }
        cancel.cancel();
    };
    if let Err(e) = ctrlc::set_handler(handler) {
        warn(&format!("Ctrl-C can't be caught: {e}"));
    }
    if run.thinking == ThinkingArg::On && matches!(&cli.command, None | Some(Command::Derive(_))) {
        let what = "--thinking on is for measuring: the direction and the choice of an edit rest \
                    on the first token of an answer, and in front of a thinking block there is \
                    none. Patch with thinking off, then measure: eval --thinking on";
        Cli::command().error(ErrorKind::ArgumentConflict, what).exit();
    }
    if let Some(n) = run.threads {
        // candle asks this variable, rayon the builder; no thread that reads it runs yet.
        std::env::set_var("RAYON_NUM_THREADS", n.to_string());
        let _ = rayon::ThreadPoolBuilder::new().num_threads(n.into()).build_global();
    }
    let json = run.json;
    let result = match cli.command {
        None => patch::run(cli.patch),
        Some(Command::Derive(a)) => measure::derive(a),
        Some(Command::Eval(a)) => measure::eval(a),
        Some(Command::Compare(a)) => compare::run(a),
        Some(Command::Diff(a)) => diff::run(a),
        Some(Command::Inspect(a)) => inspect::run(a),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(Error::Interrupted) => {
            eprintln!("interrupted: nothing was written");
            ExitCode::from(130)
        }
        Err(e) => {
            let message = with_flags(&e.to_string());
            eprintln!("error: {message}");
            if json {
                print_json(serde_json::json!({ "outcome": "error", "error": message }));
            }
            ExitCode::from(if matches!(e, Error::Gate(_)) { 3 } else { 1 })
        }
    }
}

/// The settings that messages of the library name.
const NAMED: [&str; 11] = [
    "chat_template",
    "tokenizer",
    "thinking",
    "reference",
    "method",
    "emit",
    "encoding",
    "force",
    "device",
    "memory",
    "sidecar",
];

/// A message of the library with the flags of this binary: the library names a setting by its
/// field, as in `chat_template`, and here the setting is `--chat-template`.
fn with_flags(message: &str) -> String {
    NAMED.iter().fold(message.to_string(), |text, id| {
        text.replace(&format!("`{id}`"), &format!("--{}", id.replace('_', "-")))
    })
}

fn warn(message: &str) {
    eprintln!("warning: {}", with_flags(message));
}

fn note(message: &str) {
    eprintln!("note: {}", with_flags(message));
}

/// Prints to standard output; a closed pipe is no error.
fn print(text: &str) {
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
}

/// Prints a JSON object with the schema number in front.
fn print_json(value: serde_json::Value) {
    let mut object = serde_json::Map::new();
    object.insert("schema".into(), refusal_patch::report::SCHEMA.into());
    if let serde_json::Value::Object(fields) = value {
        object.extend(fields);
    }
    print(&format!("{}\n", serde_json::Value::Object(object)));
}

fn json<T: serde::Serialize>(value: &T) -> Result<serde_json::Value> {
    serde_json::to_value(value)
        .map_err(|e| Error::Model(format!("the result can't be written as JSON: {e}")))
}
