//! A model with all that is needed to measure and to patch it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::checkpoint::Checkpoint;
use crate::compare::{compare, same_shape, Comparison, Profile};
use crate::diff::{self, Difference};
use crate::error::{Error, Result};
use crate::evaluate::{AnswerOptions, Evaluator, Rate, MAX_NEW_TOKENS};
use crate::forward::{Arithmetic, Compute, Stage};
use crate::model::Model;
use crate::progress::{Cancel, Progress, Silent};
use crate::search::{self, Derived, Outcome, Settings};
use crate::text::{
    folder_template, BySet, Chat, ChatTemplate, PromptSet, Split, Thinking, Tokenizer,
};

/// How a model is opened. The default takes everything from the checkpoint.
#[derive(Clone)]
#[non_exhaustive]
pub struct Options {
    /// A `tokenizer.json` in place of the checkpoint's tokenizer.
    pub tokenizer: Option<PathBuf>,
    /// A Jinja template in place of the checkpoint's.
    pub chat_template: Option<PathBuf>,
    /// A system prompt for every chat.
    pub system: Option<String>,
    /// Whether the model may think before it answers.
    pub thinking: Thinking,
    /// Where products run: `auto`, `cpu`, `cuda`, `cuda:N` or `metal`.
    pub device: String,
    /// Whether all products are of 32-bit floats. Otherwise those with block types of GGUF are of
    /// 8-bit integers on the CPU, as in llama.cpp.
    pub exact: bool,
    /// Bytes for activations; half of the memory that is free when absent.
    pub memory: Option<usize>,
    /// Told about progress.
    pub progress: Arc<dyn Progress>,
    /// Ends what runs.
    pub cancel: Cancel,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            tokenizer: None,
            chat_template: None,
            system: None,
            thinking: Thinking::Off,
            device: "auto".into(),
            exact: false,
            memory: None,
            progress: Arc::new(Silent),
            cancel: Cancel::default(),
        }
    }
}

/// The caller's progress, and the token that ends the run.
struct Watched {
    progress: Arc<dyn Progress>,
    cancel: Cancel,
}

impl Progress for Watched {
    fn start(&self, stage: &str, total: u64, unit: &str) {
        self.progress.start(stage, total, unit);
    }
    fn advance(&self, n: u64) {
        self.progress.advance(n);
    }
    fn finish(&self) {
        self.progress.finish();
    }
    fn note(&self, line: &str) {
        self.progress.note(line);
    }
    fn check(&self) -> Result<()> {
        self.cancel.check()?;
        self.progress.check()
    }
}

/// An open model.
pub struct Session {
    /// The checkpoint.
    pub model: Model,
    /// Its tokenizer and template.
    pub chat: Chat,
    /// What the user should know before anything is measured.
    pub notes: Vec<String>,
    compute: Compute,
    memory: usize,
    progress: Watched,
}

/// What [`Session::evaluate`] measured.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// Refusal of harmful prompts, over-refusal of the others.
    pub refusal: BySet<Rate>,
    /// Perplexity of the built-in text.
    pub perplexity: f64,
}

impl Session {
    /// Opens a GGUF file, a safetensors file or a Hugging Face folder.
    ///
    /// # Errors
    /// What [`Model::open`] says; no tokenizer or template that can be read; an unknown device.
    pub fn open(path: &Path, options: &Options) -> Result<Session> {
        let model = Model::open(path)?;
        let chat = chat(&model.file, options)?;
        let mut notes = absent(&model.file);
        match chat.template.thinking {
            Thinking::Off if chat.template.can_think => {
                notes.push("the chat template can think; it is rendered with thinking off".into());
            }
            Thinking::On if !chat.template.can_think => notes.push(
                "the chat template knows of no thinking; `thinking` on only gives room for it"
                    .into(),
            ),
            _ => {}
        }
        let cancel = options.cancel.clone();
        let arithmetic = if options.exact { Arithmetic::Exact } else { Arithmetic::Rounded };
        Ok(Session {
            model,
            chat,
            notes,
            compute: Compute::new(&options.device)?
                .with_arithmetic(arithmetic)
                .with_cancel(cancel.clone()),
            memory: options.memory.unwrap_or_else(free_memory),
            progress: Watched { progress: Arc::clone(&options.progress), cancel },
        })
    }

    /// What measures this model.
    pub fn evaluator(&self) -> Evaluator<'_> {
        Evaluator {
            model: &self.model,
            chat: &self.chat,
            compute: &self.compute,
            edit: None,
            memory: self.memory,
            progress: &self.progress,
        }
    }

    /// Whom to tell about progress, and whom to ask whether to go on.
    pub fn progress(&self) -> &dyn Progress {
        &self.progress
    }

    /// Restores refusal: chooses an edit and writes OUT. `original`: the model before compression,
    /// where it is at hand; it runs on this session's device.
    ///
    /// # Errors
    /// What any step says; nothing is left at `out` then.
    pub fn patch(
        &self,
        out: &Path,
        original: Option<&Session>,
        prompts: &PromptSet,
        settings: &Settings,
    ) -> Result<Outcome> {
        // On one device, so that its work counts as this run's.
        let compute = &self.compute;
        let reference = original.map(|o| Evaluator { compute, ..o.evaluator() });
        search::patch(&self.evaluator(), reference.as_ref(), prompts, settings, out)
    }

    /// The stages of the last [`Session::patch`], with what each took.
    pub fn stages(&self) -> Vec<Stage> {
        self.compute.work().stages()
    }

    /// Refusal on test prompts, and perplexity.
    ///
    /// # Errors
    /// What the forward pass says.
    pub fn evaluate(&self, prompts: &PromptSet) -> Result<Evaluation> {
        let evaluator = self.evaluator();
        let options = AnswerOptions::new(MAX_NEW_TOKENS);
        let answers = evaluator.answers(&prompts.split(Split::Test), options)?;
        Ok(Evaluation { refusal: BySet::over(&answers), perplexity: evaluator.perplexity()? })
    }

    /// What compression did to refusal. `max_drop`: the loss, as a share, that counts as lost.
    ///
    /// # Errors
    /// `compressed` has another shape; what the forward pass says.
    pub fn compare(
        &self,
        compressed: &Session,
        prompts: &PromptSet,
        max_drop: f64,
    ) -> Result<Comparison> {
        same_shape(&self.model, &compressed.model)?;
        prompts.enough()?;
        let profile = |s: &Session| Profile::take(&s.evaluator(), prompts, MAX_NEW_TOKENS);
        Ok(compare(&profile(self)?, &profile(compressed)?, max_drop))
    }

    /// This model and another version of it, tensor by tensor.
    ///
    /// # Errors
    /// What [`diff::diff`] says.
    pub fn diff(&self, after: &Checkpoint, prompts: &PromptSet) -> Result<Difference> {
        diff::diff(&self.model.file, after, Some(self), prompts, self.progress())
    }

    /// The refusal direction of every block, with what writing along it does.
    ///
    /// # Errors
    /// Too few prompts; what the forward pass says.
    pub fn derive(&self, prompts: &PromptSet, settings: &Settings) -> Result<Derived> {
        search::derive(&self.evaluator(), prompts, settings)
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
pub fn tokenizer(file: &Checkpoint, options: &Options) -> Result<Tokenizer> {
    match (file, &options.tokenizer) {
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
pub fn chat(file: &Checkpoint, options: &Options) -> Result<Chat> {
    let tokenizer = tokenizer(file, options)?;
    let source = match &options.chat_template {
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
                "give one with `chat_template` FILE (Jinja, as in the model's \
                 tokenizer_config.json)",
            )
        })?,
    };
    let text = |id: Option<u32>| id.map(|t| tokenizer.token_text(t)).unwrap_or_default();
    let mut template = ChatTemplate::new(&source, &text(tokenizer.bos()), &text(tokenizer.eos()))?;
    template.thinking = options.thinking;
    Ok(Chat { tokenizer, template, system: options.system.clone() })
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
