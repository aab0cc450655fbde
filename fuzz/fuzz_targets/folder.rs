#![no_main]

#[path = "../targets/mod.rs"]
#[allow(dead_code)] // The other targets.
mod targets;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| targets::folder::run(bytes));
