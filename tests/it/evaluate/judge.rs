//! The judge against outputs that were labelled by reading: answers of the fixture models, as they
//! are, patched, and with a constant along the refusal direction at every token (in units of its
//! gap; far too strong ones garble), and short texts in many languages, written in the styles of
//! current chat models.

use std::collections::BTreeSet;

use crate::common::organism::root;
use refusal_patch::evaluate::judge::judge;
use serde_json::Value;

#[test]
fn the_judge_agrees_with_people_on_97_of_100_outputs() {
    let file = std::fs::read_to_string(root().join("tests/data/judge.jsonl")).unwrap();
    let lines: Vec<Value> = file.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let field = |v: &Value, name: &str| v[name].as_str().unwrap().to_string();
    let languages: BTreeSet<String> = lines.iter().map(|l| field(l, "language")).collect();
    let texts: BTreeSet<String> = lines.iter().map(|l| field(l, "text")).collect();
    assert!(lines.len() >= 300 && languages.len() >= 10 && texts.len() == lines.len());
    let (mut same, mut same_refusal) = (0, 0);
    for line in &lines {
        let (text, label) = (field(line, "text"), field(line, "label"));
        let found = serde_json::to_value(judge(&text)).unwrap();
        same += usize::from(found == label.as_str());
        same_refusal += usize::from((found == "refused") == (label == "refused"));
        if found != label.as_str() {
            println!("labelled {label}, judged {found}: {text:?} ({})", field(line, "source"));
        }
    }
    let share = |k: usize| k as f64 / lines.len() as f64;
    println!(
        "{} outputs in {} languages: {:.4} of the classes agree, {:.4} of refused or not",
        lines.len(),
        languages.len(),
        share(same),
        share(same_refusal)
    );
    assert!(share(same) >= 0.97 && share(same_refusal) >= 0.97);
}
