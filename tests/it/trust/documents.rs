//! Documents that a command writes are what the command would write now.

#[allow(dead_code)] // its command line
#[path = "../../../examples/results.rs"]
mod results;

#[test]
fn the_results_are_what_the_records_say() {
    let written = include_str!("../../../docs/RESULTS.md");
    assert!(written == results::results().unwrap(), "cargo run --example results");
}
