//! `compare` says when its two models read different prompts, and what its prompts could show.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Runs `compare` with short answers; standard output and standard error of a run without `--json`
/// follow its JSON.
fn compare(original: &Path, compressed: &Path) -> (Value, String, String) {
    let run = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_refusal-patch"));
        command.arg("compare").args([original, compressed]).args(["--max-new-tokens", "4", "-q"]);
        command.args(more).output().unwrap()
    };
    let (json, plain) = (run(&["--json"]), run(&[]));
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (serde_json::from_slice(&json.stdout).unwrap(), text(&plain.stdout), text(&plain.stderr))
}

fn healthy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/organism-healthy-Q4_K_M.gguf")
}

#[test]
fn a_changed_template_is_said_before_anything_else() {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = std::fs::read(healthy()).unwrap();
    // The line's end behind a role becomes a tab; the metadata keep their length.
    let (old, new) = (br"'|>\n' + message", br"'|>\t' + message");
    let at = bytes.windows(old.len()).position(|w| w == old).unwrap();
    bytes[at..at + new.len()].copy_from_slice(new);
    let changed = dir.path().join("changed.gguf");
    std::fs::write(&changed, bytes).unwrap();

    let (json, text, said) = compare(&healthy(), &changed);
    let r = &json["rendering"];
    assert_eq!(r["texts_differ"], r["prompts"]);
    assert_ne!(r["sha256"]["before"]["texts"], r["sha256"]["after"]["texts"]);
    assert!(r["first"]["shown"]["after"].as_str().unwrap().contains("|>\t"), "{r}");
    assert!(text.starts_with("THE TWO MODELS READ DIFFERENT PROMPTS"), "{text}");
    assert!(said.contains("warning: THE TWO MODELS READ DIFFERENT PROMPTS"), "{said}");

    let (json, text, said) = compare(&healthy(), &healthy());
    let r = &json["rendering"];
    assert_eq!((&r["texts_differ"], &r["tokens_differ"]), (&0.into(), &0.into()));
    assert_eq!((&r["sha256"]["before"], &r["first"]), (&r["sha256"]["after"], &Value::Null));
    assert!(text.starts_with("refusal is healthy") && !said.contains("DIFFERENT"), "{text}{said}");
    // Nothing changed sides, so the loss that shows is the least for so many prompts.
    let power = &json["power"];
    let (n, loss) = (power["n"].as_f64().unwrap(), power["smallest_loss"].as_f64().unwrap());
    assert_eq!(power["background"], 0.0);
    assert!((6.0..12.0).contains(&(n * loss)), "{power}");
    let line = text.lines().find(|l| l.starts_with("power: ")).unwrap();
    assert!(
        line.contains(&format!("{n} prompts show a loss of {:.1} points", 100.0 * loss)),
        "{line}"
    );
}
