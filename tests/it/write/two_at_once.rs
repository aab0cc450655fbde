//! Two runs of the program at the same time, for one OUT: one of them writes it, whole, and the
//! other one ends with an error; with `--force` both end well, and OUT is whole all the same.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use refusal_patch::checkpoint::Gguf;
use refusal_patch::model::Model;
use refusal_patch::output::Provenance;
use serde_json::Value;

use crate::common::organism::share_of_prompts;

/// A run that writes an edit of this strength.
fn start(dir: &Path, prompts: &[String], strength: &str, more: &[&str]) -> Child {
    let input = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/organism-broken-Q4_K_M.gguf");
    let mut command = Command::new(env!("CARGO_BIN_EXE_refusal-patch"));
    command.arg(input).arg(dir.join("out.gguf")).args(prompts);
    command.args(["--method", "amplify", "--layers", "3", "--max-kl", "1"]);
    command.args(["--max-over-refusal", "1", "--max-new-tokens", "4", "--threads", "1", "-q"]);
    command.args(["--strength", strength]).args(more);
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

fn ended(mut child: Child) -> (i32, String) {
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    (child.wait().unwrap().code().expect("no signal"), said)
}

/// The strength that OUT says it was written with; OUT is a whole model.
fn strength_of(out: &Path) -> f32 {
    Model::open(out).unwrap();
    let record = Provenance::read(&Gguf::open(out).unwrap()).unwrap().unwrap();
    assert!(!record.edits.is_empty());
    record.strength
}

fn names(dir: &Path) -> Vec<String> {
    let mut all: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    all.sort();
    all
}

#[test]
fn of_two_programs_that_write_one_output_one_wins_and_the_output_is_whole() {
    let (dir, place) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (dir, place) = (dir.path(), place.path());
    let prompts = share_of_prompts(dir, 22);
    let out: PathBuf = place.join("out.gguf");
    let written = ["out.gguf", "out.report.html", "out.report.json"];
    let both = ["0.5", "1.0"];

    let children = both.map(|s| start(place, &prompts, s, &[]));
    let ends: HashMap<&str, (i32, String)> = both.into_iter().zip(children.map(ended)).collect();
    let winners: Vec<&str> = both.into_iter().filter(|s| ends[s].0 == 0).collect();
    assert_eq!(winners.len(), 1, "{ends:?}");
    let loser = both.into_iter().find(|s| *s != winners[0]).unwrap();
    let (code, said) = &ends[loser];
    let errors: Vec<&str> = said.lines().filter(|l| l.starts_with("error: ")).collect();
    assert_eq!((*code, errors.len()), (1, 1), "{said}");
    assert!(
        errors[0].contains("out.gguf: has appeared while") || errors[0].contains("exists already"),
        "{said}"
    );
    assert_eq!(strength_of(&out).to_string(), winners[0].trim_end_matches(".0"));
    assert_eq!(names(place), written);
    // The report is the winner's, too.
    let report: Value =
        serde_json::from_slice(&std::fs::read(place.join("out.report.json")).unwrap()).unwrap();
    assert_eq!(report["chosen"]["strength"].as_f64(), Some(f64::from(strength_of(&out))));

    let children = both.map(|s| start(place, &prompts, s, &["--force"]));
    let ends = children.map(ended);
    assert!(ends.iter().all(|(code, _)| *code == 0), "{ends:?}");
    assert!(both.contains(&format!("{:.1}", strength_of(&out)).as_str()));
    assert_eq!(names(place), written);
    serde_json::from_slice::<Value>(&std::fs::read(place.join("out.report.json")).unwrap())
        .unwrap();
}
