//! Restores the refusal of harmful requests that compression took from a language model.
//!
//! ```no_run
//! use refusal_patch::{Options, Outcome, PromptSet, Session, Settings};
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
//! derives. What is listed here is the public API. The modules are public for the program and its
//! tests alone and may change with any version; docs/ARCHITECTURE.md says what lies
//! where. Each module imports only from those below it.
#![deny(missing_docs)]
#![deny(unsafe_code)]

#[doc(hidden)]
pub mod arch;
#[doc(hidden)]
pub mod checkpoint;
#[doc(hidden)]
pub mod compare;
#[doc(hidden)]
pub mod diff;
#[doc(hidden)]
pub mod direction;
#[doc(hidden)]
pub mod edit;
#[doc(hidden)]
pub mod encoding;
#[doc(hidden)]
pub mod error;
#[doc(hidden)]
pub mod evaluate;
#[doc(hidden)]
pub mod forward;
#[doc(hidden)]
pub mod model;
mod nan;
#[doc(hidden)]
pub mod num;
#[doc(hidden)]
pub mod output;
#[doc(hidden)]
pub mod packing;
#[doc(hidden)]
pub mod pair;
#[doc(hidden)]
pub mod progress;
#[doc(hidden)]
pub mod report;
#[doc(hidden)]
pub mod search;
#[doc(hidden)]
pub mod session;
#[doc(hidden)]
pub mod text;
#[doc(hidden)]
pub mod weights;

pub use checkpoint::Checkpoint;
pub use compare::{Comparison, Health};
pub use diff::{ChangedTensor, Difference};
pub use edit::{Edit, Method, RankOne};
pub use error::{Error, Result};
pub use evaluate::{Answer, Change, Interval, Rate, Scores};
pub use forward::Stage;
pub use model::Model;
pub use output::Emit;
pub use pair::Pair;
pub use progress::{Cancel, Progress, Silent};
pub use report::{RunFacts, RunReport};
pub use search::{
    Broken, Candidate, Derived, EncodingChoice, LayerScore, Limit, Original, Outcome, Patched,
    Scan, Settings, Source, TensorReport, Trial,
};
pub use session::{Evaluation, Options, Session};
pub use text::{BySet, Chat, PromptRecord, PromptSet, Set, Split, Thinking};
