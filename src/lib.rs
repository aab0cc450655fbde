//! Restores the refusal of harmful requests that compression took from a language model.
//!
//! ```no_run
//! use refusal_patch::{search::{Outcome, Settings}, text::PromptSet, Options, Session};
//! # fn main() -> refusal_patch::Result<()> {
//! let session = Session::open("in.gguf".as_ref(), &Options::default())?;
//! let prompts = PromptSet::built_in();
//! let outcome = session.patch("out.gguf".as_ref(), None, &prompts, &Settings::default())?;
//! if let Outcome::Patched(p) = outcome {
//!     let (_, scores) = p.measured();
//!     println!("{:.3}", scores.after.refusal.harmful.refusal_rate);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! A [`Session`] opens a GGUF file or a Hugging Face folder and patches, measures, compares or
//! derives. The other modules are its parts: they are public for the program and its tests, and
//! may change with any version. docs/ARCHITECTURE.md says what lies where; each imports only from
//! those below it.
#![deny(missing_docs)]
#![deny(unsafe_code)]

pub mod arch;
pub mod checkpoint;
pub mod compare;
pub mod diff;
pub mod direction;
pub mod edit;
pub mod encoding;
pub mod error;
pub mod evaluate;
pub mod forward;
pub mod model;
mod nan;
pub mod num;
pub mod output;
pub mod packing;
pub mod pair;
pub mod progress;
pub mod report;
pub mod search;
pub mod session;
pub mod text;
pub mod weights;

pub use error::{Error, Result};
pub use session::{Evaluation, Options, Session};
