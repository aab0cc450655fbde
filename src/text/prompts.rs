//! Prompt sets: the built-in one and the user's files.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::prompt_file::read;
use super::BySet;
use crate::checkpoint::hex;
use crate::error::{Error, Result};

/// The least number of harmful, and of harmless, prompts from which a direction is derived.
pub const FEWEST: usize = 64;

/// The class of a prompt.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Set {
    /// The model should refuse the prompt.
    Harmful,
    /// The model should answer the prompt.
    Harmless,
    /// The prompt sounds harmful but is not: the model should answer it.
    Borderline,
}

impl Set {
    /// All, in the order in which tables show them.
    pub const ALL: [Set; 3] = [Set::Harmful, Set::Harmless, Set::Borderline];

    /// The name of the class in files.
    pub fn name(self) -> &'static str {
        match self {
            Set::Harmful => "harmful",
            Set::Harmless => "harmless",
            Set::Borderline => "borderline",
        }
    }
}

/// The use of a prompt in a run.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// The direction and the gates are fitted on these prompts.
    Train,
    /// The edit is chosen on these prompts.
    Validation,
    /// The result is reported on these prompts; no choice depends on them.
    Test,
}

/// One request.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PromptRecord {
    /// An id, unique in the prompt set.
    pub id: String,
    /// The class of the prompt.
    pub set: Set,
    /// The category; empty if the file has none.
    #[serde(default)]
    pub category: String,
    /// The split of the prompt.
    pub split: Split,
    /// The text of the request.
    pub prompt: String,
}

/// The prompts of a run, with their sources.
#[derive(Clone, Debug)]
pub struct PromptSet {
    /// The prompts; those of one file are in file order.
    pub prompts: Vec<PromptRecord>,
    /// The source of each class, for the report: a path, or `built in`.
    pub sources: BySet<String>,
    /// Whether the limit on refused borderline prompts binds: harmful and borderline prompts must
    /// both be built in or both be the user's.
    pub borderline_binds: bool,
    /// Messages to the user about the files, such as repeated prompts.
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

    /// The built-in prompts, with each class replaced for which the user gives a file. Built-in
    /// borderline prompts are only reported if the harmful prompts are the user's.
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

    /// The prompts of a split: harmful, then harmless, then borderline.
    pub fn split(&self, split: Split) -> Vec<&PromptRecord> {
        Set::ALL.into_iter().flat_map(|s| self.of(s, split)).collect()
    }

    /// Checks that the harmful and the harmless prompts suffice to derive a direction and to
    /// measure the result.
    ///
    /// # Errors
    /// `Limit` if one of these classes has fewer than 64 prompts or an empty split.
    pub fn enough(&self) -> Result<()> {
        for set in [Set::Harmful, Set::Harmless] {
            let n = self.prompts.iter().filter(|p| p.set == set).count();
            if n < FEWEST {
                let from = self.sources.get(set);
                return Err(Error::Limit(format!(
                    "{from}: {n} {} prompts, at least {FEWEST} are needed to derive a direction \
                     and to check it on others",
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

    /// sha256 over the class, split and text of all prompts, in hexadecimal.
    pub fn sha256(&self) -> String {
        let mut hash = Sha256::new();
        for p in &self.prompts {
            hash.update(format!("{}\t{:?}\t{}\n", p.set.name(), p.split, p.prompt));
        }
        hex(&hash.finalize())
    }
}

/// The split of a prompt whose file names none. The first byte of the text's sha256 decides: half
/// of all prompts go to training, a fifth to validation, the rest to the test.
pub(super) fn split_of(prompt: &str) -> Split {
    match Sha256::digest(prompt.as_bytes())[0] {
        0..=127 => Split::Train,
        128..=178 => Split::Validation,
        _ => Split::Test,
    }
}
