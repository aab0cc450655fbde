//! Reads files of prompts. The text of a prompt reaches the model unchanged; where a file is in
//! doubt, reading it is an error that names the line.

mod entry;
mod table;

use std::collections::HashMap;
use std::path::Path;

use serde_json::error::Category;
use serde_json::Value;

use self::entry::{check, Entry, CATEGORY, CONTEXT, EXPECTED, ID, PROMPT};
use super::prompts::{split_of, PromptRecord, Set};
use crate::error::{Error, Result};

/// The known endings of file names, for error messages.
const ENDINGS: &str =
    ".txt (a prompt a line), .json (an array), .jsonl or .ndjson (a prompt a line), .csv, .tsv";

/// The content of a file of prompts.
#[derive(Clone, Debug)]
pub struct PromptFile {
    /// The prompts, in file order, each once.
    pub prompts: Vec<PromptRecord>,
    /// A message to the user about repeated prompts, if there are any.
    pub notes: Vec<String>,
}

/// Reads a file of prompts of one class. The ending of the name gives the format: `.txt`, `.json`,
/// `.jsonl` or `.ndjson`, `.csv` or `.tsv`. Lines of a `.txt` are trimmed; strings and cells are
/// not. A table has a header. Its prompts are in the column `prompt`, or else `forbidden_prompt`,
/// `goal` or `behavior`, in any case; the same names hold for the fields of objects. A prompt
/// without a split gets one by the sha256 of its text: half training, a fifth validation, the rest
/// test.
///
/// # Errors
/// A file that can't be read, has an unknown ending or holds no prompts; a malformed line.
pub fn read(path: &Path, set: Set) -> Result<PromptFile> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let kind = Kind::of(path)?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        let line = 1 + e.as_bytes()[..at].iter().filter(|&&b| b == b'\n').count();
        let what =
            format!("line {line}: not UTF-8 text; expected prompts in UTF-8, save the file so");
        Error::format(path, at as u64, what)
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let wrong =
        |(line, what): (usize, String)| Error::format(path, None, format!("line {line}: {what}"));
    let entries: Vec<(usize, Entry)> = match kind {
        _ if text.trim().is_empty() => Vec::new(),
        Kind::Text => numbered(text).map(|(at, line)| (at, Entry::text(line.trim()))).collect(),
        Kind::Json => json_entries(text).map_err(wrong)?,
        Kind::Lines => numbered(text)
            .map(|(at, line)| {
                let read = serde_json::from_str(line).map(|entry| (at, entry));
                read.map_err(|e| wrong((at, explain(&e))))
            })
            .collect::<Result<_>>()?,
        Kind::Table(separator) => table_entries(text, separator).map_err(wrong)?,
    };
    if entries.is_empty() {
        return Err(Error::format(path, None, format!("no prompts in it; expected {ENDINGS}")));
    }
    let mut seen: HashMap<String, usize> = HashMap::new();
    let mut twice = Vec::new();
    let mut prompts = Vec::new();
    for (i, (at, entry)) in entries.into_iter().enumerate() {
        if entry.prompt.trim().is_empty() {
            return Err(wrong((at, "the prompt is empty; expected text, or no such line".into())));
        }
        if let Some(first) = seen.get(&entry.prompt) {
            twice.push((at, *first));
            continue;
        }
        seen.insert(entry.prompt.clone(), at);
        prompts.push(PromptRecord {
            id: entry.id.unwrap_or_else(|| format!("{}-{}", set.name(), i + 1)),
            set,
            category: entry.category.unwrap_or_default(),
            split: entry.split.unwrap_or_else(|| split_of(&entry.prompt)),
            prompt: entry.prompt,
        });
    }
    let note = twice.first().map(|(at, first)| {
        let (shown, n) = (path.display(), twice.len());
        let place = if kind == Kind::Json { "prompt" } else { "line" };
        format!(
            "{shown}: {n} prompts are there twice ({place} {at} repeats {first}); each counts once"
        )
    });
    Ok(PromptFile { prompts, notes: note.into_iter().collect() })
}

/// The format of a file.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// A prompt a line.
    Text,
    /// A JSON array.
    Json,
    /// A JSON value a line.
    Lines,
    /// A table with this separator.
    Table(char),
}

impl Kind {
    fn of(path: &Path) -> Result<Kind> {
        let ending = path.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
        Ok(match ending.as_str() {
            "txt" => Kind::Text,
            "json" => Kind::Json,
            "jsonl" | "ndjson" => Kind::Lines,
            "csv" => Kind::Table(','),
            "tsv" => Kind::Table('\t'),
            _ => {
                let found = match ending.as_str() {
                    "" => "its name has no ending".to_string(),
                    other => format!("its name ends in .{other}"),
                };
                let what =
                    format!("{}: {found}, so it isn't known how to read prompts", path.display());
                return Err(Error::unsupported(what, format!("expected {ENDINGS}")));
            }
        })
    }
}

/// The lines that are not blank, with their numbers from 1.
fn numbered(text: &str) -> impl Iterator<Item = (usize, &str)> {
    (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty())
}

/// The entries of a JSON array, numbered from 1, since their lines are not known.
fn json_entries(text: &str) -> Result<Vec<(usize, Entry)>, (usize, String)> {
    if !text.trim_start().starts_with('[') {
        let found: String = text.trim_start().chars().take(12).collect();
        let what = "expected an array of prompts, `[...]` (a prompt a line is .jsonl)";
        // Text that isn't JSON gets the message of the JSON parser.
        return Err(match serde_json::from_str::<Value>(text) {
            Err(e) if e.classify() != Category::Data && e.line() == 1 => (1, explain(&e)),
            _ => (1, format!("it begins with {found:?}; {what}")),
        });
    }
    let list: Vec<Entry> = serde_json::from_str(text).map_err(|e| (e.line(), explain(&e)))?;
    Ok((1..).zip(list).collect())
}

/// The message of a JSON error, without the line.
fn explain(e: &serde_json::Error) -> String {
    let text = e.to_string();
    let why = text.rsplit_once(" at line ").map_or(text.as_str(), |(why, _)| why);
    match e.classify() {
        Category::Data => why.to_string(),
        _ => format!("not JSON: {why} (column {})", e.column()),
    }
}

/// The entries of a table, with the lines of their rows.
fn table_entries(text: &str, separator: char) -> Result<Vec<(usize, Entry)>, (usize, String)> {
    let mut rows = table::rows(text, separator)?.into_iter();
    let Some(header) = rows.next() else { return Ok(Vec::new()) };
    let names: Vec<String> = header.cells.iter().map(|c| c.trim().to_lowercase()).collect();
    let found =
        || header.cells.iter().map(|c| format!("`{}`", c.trim())).collect::<Vec<_>>().join(", ");
    for name in PROMPT.iter().chain(&CATEGORY).chain(&ID).chain(&[CONTEXT.0, "split"]) {
        if names.iter().filter(|n| n == name).count() > 1 {
            return Err((header.line, format!("two columns are named `{name}`; expected one")));
        }
    }
    if !names.iter().any(|n| PROMPT.contains(&n.as_str())) {
        let what = format!("no column `prompt` among {}, by the separator {separator:?}", found());
        return Err((header.line, format!("{what}; {EXPECTED}")));
    }
    rows.map(|row| {
        let (n, expected) = (row.cells.len(), names.len());
        if n != expected {
            let what = format!(
                "{n} cells, expected {expected} ({}); a cell that holds a {separator:?} or a \
                 line's end must stand between double quotes",
                found()
            );
            return Err((row.line, what));
        }
        let cells = row.cells.into_iter().map(Value::String);
        // An empty cell counts as no field, except that an empty prompt is an error later on.
        let is_given = |(name, cell): &(String, Value)| {
            PROMPT.contains(&name.as_str()) || cell.as_str().is_some_and(|c| !c.trim().is_empty())
        };
        let fields: Vec<(String, Value)> =
            names.iter().cloned().zip(cells).filter(is_given).collect();
        let checked = fields.iter().try_for_each(|(name, cell)| check(name, cell));
        let entry = checked.and_then(|()| Entry::of(&fields));
        entry.map(|entry| (row.line, entry)).map_err(|e| (row.line, e))
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::super::Split;
    use super::*;

    fn open(name: &str, content: &str) -> Result<PromptFile, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        read(&path, Set::Harmful).map_err(|e| e.to_string())
    }

    fn texts(name: &str, content: &str) -> Vec<String> {
        open(name, content).unwrap().prompts.into_iter().map(|p| p.prompt).collect()
    }

    /// Asserts that reading each content fails, and that the error has all words of its list.
    fn fails(cases: &[(&str, &str, &[&str])]) {
        for (name, content, words) in cases {
            let error = open(name, content).unwrap_err();
            for w in words.iter().chain([name]) {
                assert!(error.contains(w), "{content:?}: expected {w:?} in {error}");
            }
        }
    }

    #[test]
    fn a_file_is_read_by_its_ending_and_an_unknown_one_is_an_error() {
        let lines = "{\"prompt\": \"Hello, you\"}\n\n\"Good\\tbye\"\n";
        for name in ["a.jsonl", "a.ndjson", "a.NDJSON"] {
            assert_eq!(texts(name, lines), ["Hello, you", "Good\tbye"]);
        }
        assert_eq!(
            texts("a.txt", "\u{feff}{\"a\": 1}\r\n\n Hello, you \n"),
            ["{\"a\": 1}", "Hello, you"]
        );
        assert_eq!(texts("a.json", "[\"a\", {\"prompt\": \"b\"}]"), ["a", "b"]);
        assert_eq!(
            texts("a.tsv", "id\tprompt\n1\tHello, you\n2\t\"a\tb\"\n"),
            ["Hello, you", "a\tb"]
        );
        let endings: &[&str] = &[".txt", ".json", ".jsonl", ".ndjson", ".csv", ".tsv"];
        for (name, found) in
            [("a.jsonlines", "in .jsonlines"), ("a.xlsx", "in .xlsx"), ("prompts", "no ending")]
        {
            fails(&[(name, lines, endings), (name, lines, &[found])]);
        }
    }

    #[test]
    fn published_tables_are_read_as_they_are() {
        for (header, row, prompt, id, category) in [
            ("goal,target", "Write a poem,\"Sure, here\"", "Write a poem", "harmful-1", ""),
            ("Goal,Target,Behavior,Category", "Ask,Sure,Poem,Art", "Ask", "harmful-1", "Art"),
            (
                "Index,Goal,Target,Behavior,Category,Source",
                "0,Ask,Sure,Poem,Art,Me",
                "Ask",
                "harmful-1",
                "Art",
            ),
            (
                "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID",
                "Ask,standard,art,\"a, b\",,ask_1",
                "Ask",
                "ask_1",
                "art",
            ),
            (
                "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID",
                "Who is it?,contextual,art,,\"A text\nof two lines\",ask_2",
                "A text\nof two lines\n\n---\n\nWho is it?",
                "ask_2",
                "art",
            ),
            (
                "id,prompt,type,label,focus,note",
                "v2-1,How?,homonyms,safe,kill,",
                "How?",
                "v2-1",
                "homonyms",
            ),
            ("prompt,category", "\"How, then?\",deception", "How, then?", "harmful-1", "deception"),
            ("category,source,forbidden_prompt", "Art,me,How?", "How?", "harmful-1", "Art"),
        ] {
            let file = open("a.csv", &format!("{header}\r\n{row}\r\n")).unwrap();
            let p = &file.prompts[0];
            let found = (file.prompts.len(), p.prompt.as_str(), p.id.as_str(), p.category.as_str());
            assert_eq!(found, (1, prompt, id, category), "{header}");
        }
        assert_eq!(texts("a.jsonl", "{\"Behavior\": \"b\", \"Goal\": \"a\"}"), ["a"]);
    }

    #[test]
    fn a_comma_never_cuts_a_prompt() {
        // In a table of one column the text after a comma can only belong to the prompt.
        assert_eq!(
            texts("a.csv", "prompt\nBake bread, quickly\n\"a, b\"\n"),
            ["Bake bread, quickly", "a, b"]
        );
        fails(&[
            (
                "a.csv",
                "id,prompt\n1,Hello\n2,Bake bread, quickly\n",
                &["line 3", "3 cells, expected 2", "`prompt`", "quotes"],
            ),
            ("a.tsv", "prompt\tcategory\na\tb\tc\n", &["line 2", "3 cells, expected 2"]),
            ("a.csv", "prompt,category\n\nBroken\nline,x\n", &["line 3", "1 cells, expected 2"]),
            ("a.csv", "prompt,category\n\"a,b\nc,d\n", &["line 2", "nothing closes"]),
            ("a.csv", "prompt\n\"Hello\", she said\n", &["line 2", "2 cells, expected 1"]),
            ("a.csv", "id;prompt\n1;Hello\n", &["line 1", "`id;prompt`", "expected `prompt`"]),
            ("a.csv", "prompt,Prompt\na,b\n", &["line 1", "two columns", "`prompt`"]),
            ("a.csv", "id,prompt\n7,\n", &["line 2", "empty"]),
        ]);
    }

    #[test]
    fn strings_and_cells_are_taken_as_they_are() {
        assert_eq!(texts("a.json", "[\" a\\n\", {\"prompt\": \"a\"}]"), [" a\n", "a"]);
        assert_eq!(texts("a.csv", "category,prompt\nx,\" a \"\ny, a\n"), [" a ", " a"]);
    }

    #[test]
    fn ids_may_be_numbers_and_splits_have_their_names() {
        let file = open(
            "a.jsonl",
            "{\"id\": 0, \"prompt\": \"a\", \"split\": \"Test\"}\n\
             {\"id\": 1.5, \"prompt\": \"b\"}\n",
        );
        let prompts = file.unwrap().prompts;
        assert_eq!((prompts[0].id.as_str(), prompts[1].id.as_str()), ("0", "1.5"));
        assert_eq!(prompts[0].split, Split::Test);
        let names: &[&str] = &["train, validation or test"];
        fails(&[
            (
                "a.jsonl",
                "\"a\"\n{\"prompt\": \"b\", \"split\": \"val\"}",
                &["line 2", "`split` is \"val\""],
            ),
            (
                "a.json",
                "[\n{\"prompt\": \"b\",\n\"split\": \"dev\"}]",
                &["line 3", "`split` is \"dev\""],
            ),
            ("a.csv", "prompt,split\na,train\nb,val\n", &["line 3", "`split` is \"val\""]),
            ("a.jsonl", "{\"prompt\": \"b\", \"split\": 1}", names),
            ("a.csv", "prompt,split\nb,dev\n", names),
        ]);
    }

    #[test]
    fn an_error_names_line_found_and_expected() {
        fails(&[
            ("a.jsonl", "\"a\"\n{\"text\": \"b\"}", &["line 2", "`text`", "expected `prompt`"]),
            (
                "a.jsonl",
                "{\"prompt\": [\"b\"]}",
                &["line 1", "`prompt` is [\"b\"]", "expected a string"],
            ),
            ("a.jsonl", "{\"prompt\": null}", &["line 1", "`prompt` is null"]),
            (
                "a.jsonl",
                "{\"prompt\": \"b\", \"id\": true}",
                &["line 1", "`id` is true", "a string or a number"],
            ),
            (
                "a.jsonl",
                "{\"prompt\": \"b\", \"prompt\": \"c\"}",
                &["line 1", "`prompt` is there twice"],
            ),
            ("a.jsonl", "\"a\"\n7", &["line 2", "`7`", "expected a string, or an object"]),
            ("a.json", "{\"prompts\": []}", &["line 1", "expected an array"]),
            ("a.json", "[\"a\",\n\n[1]]", &["line 3", "expected a string, or an object"]),
            ("a.json", "[\"a\",\n\"b\"", &["line 2", "not JSON"]),
            ("a.json", "[\"a\", \"\"]", &["empty"]),
            ("a.txt", "\n\n", &["no prompts"]),
            ("a.csv", "prompt\n", &["no prompts"]),
        ]);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        std::fs::write(&path, b"a\nb\n\xffc").unwrap();
        let error = read(&path, Set::Harmful).unwrap_err().to_string();
        assert!(error.contains("line 3") && error.contains("UTF-8"), "{error}");
    }

    #[test]
    fn a_prompt_that_is_there_twice_counts_once_and_the_user_is_told() {
        let file = open("a.txt", "a\nb\n\na\nb\n").unwrap();
        assert_eq!(file.prompts.len(), 2);
        assert!(
            file.notes[0].contains("a.txt: 2 prompts are there twice (line 4 repeats 1)"),
            "{:?}",
            file.notes
        );
        assert!(open("a.txt", "a\nb\n").unwrap().notes.is_empty());
    }
}
