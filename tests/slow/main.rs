//! The slow tests, all ignored by a plain `cargo test`.
//! `cargo test --test slow -- --include-ignored memory` runs those of one module.

#[path = "../it/common/mod.rs"]
mod common;

mod experts;
mod four_bits;
mod judge;
mod main_job;
#[cfg(target_os = "linux")]
mod memory;
mod packings;
mod results;
mod sidecar;
mod thinking;
