//! The packings' own libraries load patched folders and find the edit there
//! (tests/data/packings/README.md says which).

use std::process::Command;

use serde_json::Value;

use crate::common::packings::*;

/// Patches folders, and the packings' own libraries find the edit (tests/data/packings/check.py).
fn checked(names: &[&str], path: Option<&str>) {
    let dir = tempfile::tempdir().unwrap();
    let python = std::env::var("REFUSAL_PATCH_PYTHON").unwrap_or("python3".into());
    let mut command = Command::new(python);
    command.arg(data("check.py"));
    if let Some(path) = path {
        command.env("PYTHONPATH", path);
    }
    for name in names {
        let out = dir.path().join(name);
        patched(name, &out);
        command.args([data(name), out]);
    }
    let o = command.output().unwrap();
    let said = String::from_utf8_lossy(&o.stdout);
    let lines: Vec<Value> = said.lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
    assert!(
        o.status.success() && lines.len() == names.len(),
        "{}",
        String::from_utf8_lossy(&o.stderr)
    );
    for (line, name) in lines.iter().zip(names) {
        println!("{line}");
        assert_eq!(line["before"], *name);
        // bitsandbytes' INT8 and FP8 blocks are rounded to the model's type there, and not in the
        // expected numbers.
        let most = if ["bnb-int8", "fp8-block"].contains(name) { 1e-3 } else { 0.0 };
        assert!(line["differs_from_expected"].as_f64().unwrap() <= most, "{line}");
        assert_eq!(line["changed"], serde_json::json!(["model.layers.0.mlp.down_proj.weight"]));
        let gain = line["gains"][0].as_f64().unwrap();
        assert!((0.98..=1.02).contains(&gain), "{line}");
        assert!(line["zeros_stay"] == true || !name.starts_with("ct-sparse"), "{line}");
    }
}

#[test]
#[ignore = "needs the libraries of check.py under REFUSAL_PATCH_PYTHON, and a minute"]
fn libraries_load_a_patched_folder_and_find_the_edit_there() {
    let names = PACKINGS.map(|p| p.0);
    checked(&names.into_iter().filter(|n| !n.starts_with("ct-sparse")).collect::<Vec<_>>(), None);
}

#[test]
#[ignore = "needs compressed-tensors 0.12.2 in the folder REFUSAL_PATCH_COMPRESSED_TENSORS_0_12"]
fn compressed_tensors_unpacks_patched_pruned_matrices() {
    let path = std::env::var("REFUSAL_PATCH_COMPRESSED_TENSORS_0_12").unwrap();
    checked(&["ct-sparse", "ct-sparse-24", "ct-sparse-24-fp8"], Some(&path));
}
