//! The slow tests, all ignored by a plain `cargo test`.
//! `cargo test --test slow -- --include-ignored memory` runs those of one module.

#[path = "../it/common/mod.rs"]
mod common;

#[cfg(target_os = "linux")]
mod memory;
mod results;
