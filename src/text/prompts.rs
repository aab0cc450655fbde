//! Prompt sets: the built-in one and the user's files.

use std::collections::HashSet;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::error::Category;
use sha2::{Digest, Sha256};

use crate::checkpoint::hex;
use crate::error::{Error, Result};

/// Fewest prompts of a class that a direction is derived from.
pub const FEWEST: usize = 64;

/// What a prompt is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
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
    pub sources: Vec<(Set, String)>,
    /// Whether the borderline prompts belong to the same set as the harmful ones, so that their limit binds.
    pub borderline_binds: bool,
}

/// A line of a user's file.
#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Text(String),
    Record { id: Option<String>, prompt: String, category: Option<String>, split: Option<Split> },
}

impl PromptSet {
    /// The built-in prompts (licence and origin: fixtures/README.md).
    pub fn built_in() -> PromptSet {
        let prompts = include_str!("prompts.jsonl")
            .lines()
            .map(|line| serde_json::from_str(line).expect("the built-in prompts are checked by a test"))
            .collect();
        let sources =
            [Set::Harmful, Set::Harmless, Set::Borderline].map(|s| (s, "built in".to_string())).to_vec();
        PromptSet { prompts, sources, borderline_binds: true }
    }

    /// The built-in prompts with the classes replaced that the user has files for. The built-in borderline prompts beside
    /// a user's own harmful ones are reported only.
    ///
    /// # Errors
    /// A file that can't be read or holds no prompts.
    pub fn with_files(
        harmful: Option<&Path>,
        harmless: Option<&Path>,
        borderline: Option<&Path>,
    ) -> Result<PromptSet> {
        let mut out = PromptSet::built_in();
        for (set, path) in [(Set::Harmful, harmful), (Set::Harmless, harmless), (Set::Borderline, borderline)]
        {
            let Some(path) = path else { continue };
            out.prompts.retain(|p| p.set != set);
            out.prompts.extend(read(path, set)?);
            out.sources
                .iter_mut()
                .filter(|(s, _)| *s == set)
                .for_each(|(_, from)| *from = path.display().to_string());
        }
        out.borderline_binds = harmful.is_some() == borderline.is_some();
        Ok(out)
    }

    /// The prompts of a class and split.
    pub fn of(&self, set: Set, split: Split) -> Vec<&PromptRecord> {
        self.prompts.iter().filter(|p| p.set == set && p.split == split).collect()
    }

    /// The prompts of a split, class by class.
    pub fn split(&self, split: Split) -> Vec<&PromptRecord> {
        [Set::Harmful, Set::Harmless, Set::Borderline].into_iter().flat_map(|s| self.of(s, split)).collect()
    }

    /// # Errors
    /// A class with too few prompts to derive a direction from and to measure the result.
    pub fn enough(&self) -> Result<()> {
        for set in [Set::Harmful, Set::Harmless] {
            let n = self.prompts.iter().filter(|p| p.set == set).count();
            if n < FEWEST {
                let from = self.sources.iter().find(|(s, _)| *s == set).map_or("", |(_, f)| f);
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

/// Reads a file of one class: `.txt`, `.json`, `.jsonl` or `.csv`. Without a split of its own a prompt is put by the
/// sha256 of its text: half train, a fifth validation, the rest test.
pub fn read(path: &Path, set: Set) -> Result<Vec<PromptRecord>> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        Error::format(path, e.utf8_error().valid_up_to() as u64, "not UTF-8 text; expected prompts")
    })?;
    let text = text.trim_start_matches('\u{feff}');
    // `line`: of the file, where one line was parsed alone.
    let json = |line: Option<usize>| {
        move |e: serde_json::Error| {
            let at = line.unwrap_or(e.line());
            let what = match e.classify() {
                // The text is JSON, but no prompt.
                Category::Data => "expected strings, or objects with `prompt`, and if wanted with `id`, `category` and `split` \
                                   (train, validation or test)".to_string(),
                _ => {
                    let text = e.to_string();
                    let why = text.split(" at line ").next().unwrap_or_default();
                    format!("not JSON: {why} (column {})", e.column())
                }
            };
            Error::format(path, None, format!("line {at}: {what}"))
        }
    };
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
    let lines: Vec<Line> = match extension.as_str() {
        _ if text.trim().is_empty() => Vec::new(),
        "json" => serde_json::from_str(text).map_err(json(None))?,
        "jsonl" => text
            .lines()
            .enumerate()
            .filter(|(_, l)| !l.trim().is_empty())
            .map(|(i, l)| serde_json::from_str(l).map_err(json(Some(i + 1))))
            .collect::<Result<_>>()?,
        "csv" => {
            let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(text.as_bytes());
            let bad = |e: csv::Error| Error::format(path, None, format!("not a table: {e}"));
            let header = reader.headers().map_err(bad)?.clone();
            let column = |name: &str| header.iter().position(|h| h.trim().eq_ignore_ascii_case(name));
            let at = column("prompt").ok_or_else(|| {
                Error::format(
                    path,
                    None,
                    format!("no column `prompt` among {:?}", header.iter().collect::<Vec<_>>()),
                )
            })?;
            let (id, category, split) = (column("id"), column("category"), column("split"));
            let mut lines = Vec::new();
            for row in reader.records() {
                let row = row.map_err(bad)?;
                let split = match split.and_then(|i| row.get(i)).map(str::trim).filter(|s| !s.is_empty()) {
                    None => None,
                    Some(name) => Some(serde_json::from_value(name.into()).map_err(|_| {
                        let what = format!("split {name:?}; expected train, validation or test");
                        Error::format(path, None, what)
                    })?),
                };
                let cell = |i: Option<usize>| i.and_then(|i| row.get(i)).map(str::to_string);
                lines.push(Line::Record {
                    id: cell(id),
                    prompt: row.get(at).unwrap_or_default().to_string(),
                    category: cell(category),
                    split,
                });
            }
            lines
        }
        _ => text.lines().map(|l| Line::Text(l.to_string())).collect(),
    };
    let mut seen = HashSet::new();
    let mut out = Vec::new();
    for (i, line) in lines.into_iter().enumerate() {
        let (id, prompt, category, split) = match line {
            Line::Text(prompt) => (None, prompt, None, None),
            Line::Record { id, prompt, category, split } => (id, prompt, category, split),
        };
        let prompt = prompt.trim().to_string();
        if prompt.is_empty() || !seen.insert(prompt.clone()) {
            continue;
        }
        out.push(PromptRecord {
            id: id.unwrap_or_else(|| format!("{}-{}", set.name(), i + 1)),
            set,
            category: category.unwrap_or_default(),
            split: split.unwrap_or_else(|| split_of(&prompt)),
            prompt,
        });
    }
    if out.is_empty() {
        return Err(Error::format(
            path,
            None,
            "no prompts in it; expected a prompt a line, or .json, .jsonl, .csv",
        ));
    }
    Ok(out)
}

fn split_of(prompt: &str) -> Split {
    match Sha256::digest(prompt.as_bytes())[0] {
        0..=127 => Split::Train,
        128..=178 => Split::Validation,
        _ => Split::Test,
    }
}
