//! Writes docs/RESULTS.md from docs/results: a template, and a record for each run.
//!
//! ```text
//! cargo run --example results                          writes docs/RESULTS.md
//! cargo run --example results -- NAME OUT.report.json  keeps a run of the main job as a record
//! cargo run --example results -- NAME public ORIGINAL.json IN.json OUT.json
//!     adds what three runs of `eval --prompts FILE --json` say, by the sets in the prompts' ids
//! ```
//!
//! In the template `{{NAME WHAT SET}}` stands for a figure of the record NAME; see [`figure`].

use std::error::Error;
use std::path::{Path, PathBuf};

use serde_json::{json, Map, Value};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// What a record keeps of a run.
const KEPT: [&str; 12] = [
    "outcome",
    "model",
    "limits",
    "validation",
    "test",
    "reference",
    "p_value",
    "bytes",
    "tensors",
    "seconds",
    "stages",
    "peak_memory",
];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/results")
}

fn read(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(serde_json::from_str(&text)?)
}

/// The refused prompts of a set, by id, of `eval`'s output.
fn refused(answers: &Value, set: &str) -> Vec<(String, bool)> {
    let of_set = |id: &str| id.split('-').any(|part| part == set);
    let prompts = answers["prompts"].as_array().into_iter().flatten();
    let pairs = prompts.filter_map(|p| Some((p["id"].as_str()?.to_string(), p["refused"] == true)));
    pairs.filter(|(id, _)| of_set(id)).collect()
}

/// Counts of a set in the original, IN and OUT.
fn public(files: &[Value; 3], set: &str) -> Value {
    let [original, before, after] = files.each_ref().map(|f| refused(f, set));
    let count = |of: &[(String, bool)]| of.iter().filter(|(_, r)| *r).count();
    let pairs = || {
        let of = |id: &str| before.iter().find(|(b, _)| b == id);
        after.iter().filter_map(move |a| Some((of(&a.0)?, a)))
    };
    assert!(pairs().count() == after.len() && before.len() == after.len(), "other prompts");
    json!({
        "n": after.len(), "original": count(&original), "before": count(&before),
        "after": count(&after), "gained": pairs().filter(|(b, a)| !b.1 && a.1).count(),
        "lost": pairs().filter(|(b, a)| b.1 && !a.1).count(),
    })
}

fn keep(name: &str, rest: &[String]) -> Result<()> {
    let path = folder().join(format!("{name}.json"));
    let mut record = if path.exists() { read(&path)? } else { json!({}) };
    match rest {
        [report] => {
            let report = read(Path::new(report))?;
            let public = record["public"].take();
            let mut kept: Map<String, Value> = KEPT
                .iter()
                .filter_map(|&key| Some((key.to_string(), report.get(key)?.clone())))
                .collect();
            kept.insert("edit".into(), edit(&report["chosen"]).into());
            if !public.is_null() {
                kept.insert("public".into(), public);
            }
            record = kept.into();
        }
        [word, files @ ..] if word == "public" => {
            let files: Vec<Value> =
                files.iter().map(|f| read(Path::new(f))).collect::<Result<_>>()?;
            let files: [Value; 3] = files.try_into().map_err(|_| "expected three files")?;
            record["public"] = ["harmful", "harmless"]
                .map(|set| (set.to_string(), public(&files, set)))
                .into_iter()
                .collect::<Map<_, _>>()
                .into();
        }
        _ => return Err("see the head of examples/results.rs".into()),
    }
    std::fs::write(&path, serde_json::to_string_pretty(&record)? + "\n")?;
    Ok(())
}

/// A chosen edit in words.
fn edit(chosen: &Value) -> String {
    let words = |v: &Value| -> Vec<String> {
        let each = v.as_array().into_iter().flatten();
        each.map(|x| x.as_str().map_or_else(|| x.to_string(), str::to_string)).collect()
    };
    format!(
        "block {} {}, strength {:.2}",
        words(&chosen["layers"]).join(" + "),
        words(&chosen["writers"]).join(" + "),
        chosen["strength"].as_f64().unwrap_or(f64::NAN)
    )
}

/// A figure of a record: `rates SET`, `counts SET`, `original SET`, `public SET`, `kl`, `text`
/// (perplexity), `same` (harmless answers), `edit`, `minutes`, `memory`.
fn figure(record: &Value, what: &str, set: &str) -> Option<String> {
    let (before, after) = (&record["test"]["before"], &record["test"]["after"]);
    let percent = |v: &Value| Some(format!("{:.1}", 100.0 * v["refusal_rate"].as_f64()?));
    let public = &record["public"][set];
    Some(match what {
        "rates" => format!("{} → {} %", percent(&before[set])?, percent(&after[set])?),
        "counts" => {
            let count = |v: &Value| v[set]["refused"].as_u64();
            format!("{} → {} of {}", count(before)?, count(after)?, after[set]["n"].as_u64()?)
        }
        "original" => record["reference"]["test"][set]["refused"].as_u64()?.to_string(),
        "public" => {
            let of = |key: &str| public[key].as_u64();
            let (b, a, n, o) = (of("before")?, of("after")?, of("n")?, of("original")?);
            format!("{b} → {a} of {n} (original {o})")
        }
        "gained" => public["gained"].as_u64()?.to_string(),
        "lost" => public["lost"].as_u64()?.to_string(),
        "kl" => format!("{:.4}", after["kl"].as_f64()?),
        "text" => {
            let text = |v: &Value| Some(format!("{:.2}", v["perplexity"].as_f64()?));
            format!("{} → {}", text(before)?, text(after)?)
        }
        "same" => format!("{:.1} %", 100.0 * after["same_answers"].as_f64()?),
        "edit" => record["edit"].as_str()?.to_string(),
        "minutes" => format!("{:.0}", record["seconds"].as_f64()? / 60.0),
        "memory" => format!("{:.1} GB", record["peak_memory"].as_f64()? / 1e9),
        _ => return None,
    })
}

/// docs/RESULTS.md, from the template and the records.
pub fn results() -> Result<String> {
    let template = std::fs::read_to_string(folder().join("template.md"))?;
    let mut out = String::new();
    let mut rest = template.as_str();
    while let Some((text, after)) = rest.split_once("{{") {
        let (asked, after) = after.split_once("}}").ok_or("{{ without }}")?;
        let words: Vec<&str> = asked.split_whitespace().collect();
        let [name, what, ref set @ ..] = words[..] else {
            return Err(format!("{{{{{asked}}}}}: expected a record and a figure").into());
        };
        let record = read(&folder().join(format!("{name}.json")))?;
        let found = figure(&record, what, set.first().unwrap_or(&""));
        out += text;
        out += &found.ok_or_else(|| format!("{{{{{asked}}}}}: the record has no such figure"))?;
        rest = after;
    }
    Ok(out + rest)
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.split_first() {
        Some((name, rest)) => keep(name, rest),
        None => {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/RESULTS.md");
            Ok(std::fs::write(path, results()?)?)
        }
    }
}
