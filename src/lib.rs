//! Restores the refusal of harmful requests that compression took from a language model.
#![deny(missing_docs)]
#![deny(unsafe_code)]

pub mod checkpoint;
pub mod direction;
pub mod edit;
pub mod encoding;
pub mod error;
pub mod evaluate;
pub mod forward;
pub mod model;
pub mod output;
pub mod progress;
pub mod report;
pub mod search;
pub mod text;

pub use error::{Error, Result};
