//! Restores the refusal of harmful requests that compression took from a language model.
#![deny(missing_docs)]

pub mod error;
pub mod progress;

pub use error::{Error, Result};
