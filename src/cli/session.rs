//! What every command that runs a model sets up.

use std::path::Path;

use refusal_patch::checkpoint::Checkpoint;
use refusal_patch::evaluate::Evaluator;
use refusal_patch::forward::Compute;
use refusal_patch::model::Model;
use refusal_patch::text::{
    folder_template, read_prompts, Chat, ChatTemplate, PromptRecord, PromptSet, Set, Thinking,
    Tokenizer,
};
use refusal_patch::{Error, Result};

use super::args::{RunArgs, ThinkingArg};
use super::progress::Bars;

/// A model with everything around it.
pub struct Session {
    pub model: Model,
    pub chat: Chat,
    compute: Compute,
    memory: usize,
    pub bars: Bars,
}

impl Session {
    pub fn open(path: &Path, run: &RunArgs) -> Result<Session> {
        let model = Model::open(path)?;
        model.warnings.iter().for_each(|w| eprintln!("warning: {w}"));
        say(&absent(&model.file));
        let chat = chat(&model.file, run)?;
        let bars = Bars::new(run.quiet || run.json);
        let compute = Compute::new(&run.device)?;
        let session =
            Session { model, chat, compute, memory: run.memory.unwrap_or_else(free_memory), bars };
        let template = &session.chat.template;
        match template.thinking {
            Thinking::Off if template.can_think => {
                eprintln!("note: the chat template can think; it is rendered with thinking off");
            }
            Thinking::On if !template.can_think => {
                eprintln!(
                    "note: the chat template knows of no thinking; --thinking on only gives room for it"
                );
            }
            _ => {}
        }
        Ok(session)
    }

    pub fn evaluator(&self) -> Evaluator<'_> {
        Evaluator {
            model: &self.model,
            chat: &self.chat,
            compute: &self.compute,
            edits: &[],
            memory: self.memory,
            progress: &self.bars,
        }
    }
}

/// What to say of tensors that a folder's index names and no file has.
fn absent(file: &Checkpoint) -> Vec<String> {
    let list = file.folder().map_or(&[][..], |f| f.absent());
    let note = list.first().map(|(name, place)| {
        let more =
            if list.len() > 1 { format!(" and {} more", list.len() - 1) } else { String::new() };
        format!(
            "{}: its index names tensor `{name}`{more}, which {place} does not have; the decoder \
             does not need it",
            file.path().display()
        )
    });
    note.into_iter().collect()
}

/// The checkpoint's tokenizer, or the user's.
pub fn tokenizer(file: &Checkpoint, run: &RunArgs) -> Result<Tokenizer> {
    match (file, &run.tokenizer) {
        (Checkpoint::Folder(f), path) => Tokenizer::from_folder(f, path.as_deref()),
        (Checkpoint::Gguf(g), Some(path)) => Tokenizer::from_json(path, g),
        (Checkpoint::Gguf(g), None) => Tokenizer::from_gguf(g),
    }
}

/// The checkpoint's own chat template.
pub fn template(file: &Checkpoint) -> Result<Option<String>> {
    match file {
        Checkpoint::Folder(f) => folder_template(f),
        Checkpoint::Gguf(g) => Ok(g.get_str("tokenizer.chat_template").map(str::to_string)),
    }
}

/// The checkpoint's tokenizer and template, or the user's.
pub fn chat(file: &Checkpoint, run: &RunArgs) -> Result<Chat> {
    let tokenizer = tokenizer(file, run)?;
    let source = match &run.chat_template {
        Some(path) => {
            let bytes = std::fs::read(path).map_err(Error::io(path))?;
            String::from_utf8(bytes).map_err(|e| {
                let at = e.utf8_error().valid_up_to() as u64;
                Error::format(path, at, "not UTF-8 text; expected a Jinja chat template")
            })?
        }
        None => template(file)?.ok_or_else(|| {
            Error::unsupported(
                format!("{}: has no chat template", file.path().display()),
                "give one with --chat-template FILE (Jinja, as in the model's tokenizer_config.json)",
            )
        })?,
    };
    let text = |id: Option<u32>| id.map(|t| tokenizer.token_text(t)).unwrap_or_default();
    let mut template = ChatTemplate::new(&source, &text(tokenizer.bos()), &text(tokenizer.eos()))?;
    template.thinking = match run.thinking {
        ThinkingArg::Off => Thinking::Off,
        ThinkingArg::On => Thinking::On,
    };
    Ok(Chat { tokenizer, template, system: run.system.clone() })
}

pub fn prompts(run: &RunArgs) -> Result<PromptSet> {
    let files = [&run.harmful, &run.harmless, &run.borderline].map(|f| f.as_deref());
    let set = PromptSet::with_files(files[0], files[1], files[2])?;
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
    notes.iter().for_each(|n| eprintln!("note: {n}"));
}

/// Half of the memory that is available, at most 2 GiB, or 1 GiB where the system does not say. A
/// power of two: batches, and with them the last bits of sums, are the same from run to run.
fn free_memory() -> usize {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let kib: Option<usize> =
        line.and_then(|l| l.split_whitespace().next()).and_then(|n| n.parse().ok());
    let half = kib.map_or(1 << 30, |k| k * 512).clamp(1 << 20, 2 << 30);
    1 << half.ilog2()
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
