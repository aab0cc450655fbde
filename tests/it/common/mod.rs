//! Helpers of the test binaries `it` and `slow`.
#![allow(dead_code)] // Each binary uses a part of them.

pub mod experts;
pub mod folder;
pub mod gguf;
pub mod main_job;
pub mod organism;
pub mod packings;
pub mod random;
pub mod record;
pub mod sidecar;
pub mod split;

use std::process::Command;

/// Names the test that [`alone`] runs by itself.
const ALONE: &str = "REFUSAL_PATCH_TEST_ALONE";

/// The test binary as a command that runs one test, ignored or not.
pub fn only<F: Fn()>(_test: F) -> Command {
    // The name of the function's type is its path; libtest leaves out the name of the binary.
    let path = std::any::type_name::<F>();
    let (_binary, test) = path.split_once("::").unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--include-ignored", "--nocapture"]);
    command
}

/// For a test that changes the state of its process, which all tests of a binary share. Runs the
/// test in a process of its own and returns false; returns true inside of that process.
pub fn alone<F: Fn()>(test: F) -> bool {
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let output = only(test).env(ALONE, "1").output().unwrap();
    let [out, err] =
        [output.stdout, output.stderr].map(|b| String::from_utf8_lossy(&b).into_owned());
    assert!(output.status.success() && out.contains("1 passed"), "{out}{err}");
    false
}
