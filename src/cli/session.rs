//! What every command that runs a model sets up, with its notes on standard error.

use std::path::Path;
use std::sync::Arc;

use refusal_patch::text::{read_prompts, BySet, PromptRecord, PromptSet, Set, Thinking};
use refusal_patch::{Options, Result, Session};

use super::args::{RunArgs, ThinkingArg};
use super::progress::Bars;

/// Opens a model as the user asked.
pub fn open(path: &Path, run: &RunArgs) -> Result<Session> {
    let session = Session::open(path, &options(run))?;
    session.model.warnings.iter().for_each(|w| super::warn(w));
    say(&session.notes);
    Ok(session)
}

/// The user's options.
pub fn options(run: &RunArgs) -> Options {
    let mut options = Options::default();
    options.tokenizer = run.tokenizer.clone();
    options.chat_template = run.chat_template.clone();
    options.system = run.system.clone();
    options.thinking = match run.thinking {
        ThinkingArg::Off => Thinking::Off,
        ThinkingArg::On => Thinking::On,
    };
    options.device = run.device.clone();
    options.exact = run.exact;
    options.memory = run.memory;
    options.progress = Arc::new(Bars::new(run.quiet || run.json));
    options.cancel = run.cancel.clone();
    options
}

/// The built-in prompts, or the user's.
pub fn prompts(run: &RunArgs) -> Result<PromptSet> {
    let set = PromptSet::with_files(BySet {
        harmful: run.harmful.as_deref(),
        harmless: run.harmless.as_deref(),
        borderline: run.borderline.as_deref(),
    })?;
    say(&set.notes);
    Ok(set)
}

/// The prompts of a file for one command.
pub fn own_prompts(path: &Path) -> Result<Vec<PromptRecord>> {
    let file = read_prompts(path, Set::Harmless)?;
    say(&file.notes);
    Ok(file.prompts)
}

/// Tells the user what isn't an error.
pub fn say(notes: &[String]) {
    notes.iter().for_each(|n| super::note(n));
}

/// The most memory that this process has had, where the system says.
pub fn peak_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let kib: u64 = text
        .lines()
        .find_map(|l| l.strip_prefix("VmHWM:"))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()?;
    Some(kib * 1024)
}
