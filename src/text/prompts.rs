//! Prompt sets: the built-in one and the user's files.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::prompt_file::read;
use super::BySet;
use crate::checkpoint::hex;
use crate::error::{Error, Result};

/// Fewest prompts of a class that a direction is derived from.
pub const FEWEST: usize = 64;

/// What a prompt is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Set {
    /// To be refused.
    Harmful,
    /// To be answered.
    Harmless,
    /// Sounds harmful, is not.
    Borderline,
}

impl Set {
    /// All, in the order in which tables show them.
    pub const ALL: [Set; 3] = [Set::Harmful, Set::Harmless, Set::Borderline];

    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Set::Harmful => "harmful",
            Set::Harmless => "harmless",
            Set::Borderline => "borderline",
        }
    }
}

/// What a prompt may be used for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// Direction and gate.
    Train,
    /// Choice.
    Validation,
    /// Reported, never acted on.
    Test,
}

/// One request.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PromptRecord {
    /// Unique in its set of files.
    pub id: String,
    /// Its class.
    pub set: Set,
    /// Its category; empty where there are none.
    #[serde(default)]
    pub category: String,
    /// Its split.
    pub split: Split,
    /// The request.
    pub prompt: String,
}

/// A list of prompts with the hash of its content.
#[derive(Clone, Debug)]
pub struct PromptSet {
    /// The prompts, in file order.
    pub prompts: Vec<PromptRecord>,
    /// Where each class came from, for the report: a path, or `built in`.
    pub sources: BySet<String>,
    /// Whether the borderline prompts belong to the same set as the harmful ones, so that their
    /// limit binds.
    pub borderline_binds: bool,
    /// What the user should know of the files.
    pub notes: Vec<String>,
}

impl PromptSet {
    /// The built-in prompts (licence and origin: fixtures/README.md).
    pub fn built_in() -> PromptSet {
        let prompts = include_str!("prompts.jsonl")
            .lines()
            .map(|line| {
                serde_json::from_str(line).expect("the built-in prompts are checked by a test")
            })
            .collect();
        let sources = BySet::of(|_| "built in".to_string());
        PromptSet { prompts, sources, borderline_binds: true, notes: Vec::new() }
    }

    /// The built-in prompts with the classes replaced that the user has files for. The built-in
    /// borderline prompts beside a user's own harmful ones are reported only.
    ///
    /// # Errors
    /// A file that can't be read or holds no prompts.
    pub fn with_files(files: BySet<Option<&Path>>) -> Result<PromptSet> {
        let mut out = PromptSet::built_in();
        for (set, path) in files.iter() {
            let Some(path) = path else { continue };
            out.prompts.retain(|p| p.set != set);
            let file = read(path, set)?;
            out.prompts.extend(file.prompts);
            out.notes.extend(file.notes);
            *out.sources.get_mut(set) = path.display().to_string();
        }
        out.borderline_binds = files.harmful.is_some() == files.borderline.is_some();
        Ok(out)
    }

    /// The prompts of a class and split.
    pub fn of(&self, set: Set, split: Split) -> Vec<&PromptRecord> {
        self.prompts.iter().filter(|p| p.set == set && p.split == split).collect()
    }

    /// The prompts of a split, class by class.
    pub fn split(&self, split: Split) -> Vec<&PromptRecord> {
        Set::ALL.into_iter().flat_map(|s| self.of(s, split)).collect()
    }

    /// # Errors
    /// A class with too few prompts to derive a direction from and to measure the result.
    pub fn enough(&self) -> Result<()> {
        for set in [Set::Harmful, Set::Harmless] {
            let n = self.prompts.iter().filter(|p| p.set == set).count();
            if n < FEWEST {
                let from = self.sources.get(set);
                return Err(Error::Limit(format!(
                    "{from}: {n} {} prompts, at least {FEWEST} are needed to derive a direction and to check it on others",
                    set.name()
                )));
            }
            for split in [Split::Train, Split::Validation, Split::Test] {
                if self.of(set, split).is_empty() {
                    return Err(Error::Limit(format!(
                        "the {} prompts have none in the {split:?} split",
                        set.name()
                    )));
                }
            }
        }
        Ok(())
    }

    /// sha256 over all prompts and their splits.
    pub fn sha256(&self) -> String {
        let mut hash = Sha256::new();
        for p in &self.prompts {
            hash.update(format!("{}\t{:?}\t{}\n", p.set.name(), p.split, p.prompt));
        }
        hex(&hash.finalize())
    }
}

/// The split of a prompt that has none of its own.
pub(super) fn split_of(prompt: &str) -> Split {
    match Sha256::digest(prompt.as_bytes())[0] {
        0..=127 => Split::Train,
        128..=178 => Split::Validation,
        _ => Split::Test,
    }
}
