//! Restores the refusal of harmful requests that compression took from a language model.
//!
//! The pipeline, module by module; each imports only from those above it:
//!
//! 1. [`checkpoint`] maps a GGUF file or a Hugging Face folder: metadata in order, tensors as
//!   names, shapes and byte ranges. Nothing is decoded.
//! 2. [`encoding`] turns a tensor's bytes into numbers, and opens blocks into codes that can move
//!   one step at a time.
//! 3. [`model`] describes the decoder as data ([`model::Spec`]) and resolves a tensor's role to its
//!   name.
//! 4. [`text`] holds the prompts, the tokenizer and the chat template: from a request to the tokens
//!   that the model reads.
//! 5. [`forward`] runs all prompts at once through one layer after the other, edits as rank-one
//!   terms beside the weights.
//! 6. [`direction`] takes the difference of means of harmful and harmless prompts at every block
//!   and position.
//! 7. [`edit`] fits the gate that decides when an edit fires, and folds an edit into quantization
//!   codes.
//! 8. [`output`] writes the new checkpoint, a LoRA adapter, a control vector or a direction file,
//!   whole or not at all.
//! 9. [`evaluate`] measures a checkpoint: refusal, over-refusal, divergence, perplexity.
//! 10. [`compare`] says what compression did to refusal, from the profiles of an original and its
//!   compressed version.
//! 11. [`search`] chooses the smallest edit that brings refusal back inside the limits, and
//!   measures what was written.
//! 12. [`report`] draws the report.
//!
//! The main job in a dozen lines:
//!
//! ```no_run
//! use refusal_patch::{evaluate::Evaluator, forward::Compute, model::Model, progress::Silent, search, text::*};
//! # fn main() -> refusal_patch::Result<()> {
//! let model = Model::open("in.gguf".as_ref())?;
//! let file = model.file.gguf().expect("a GGUF file");
//! let tokenizer = Tokenizer::from_gguf(file)?;
//! let template = ChatTemplate::new(file.get_str("tokenizer.chat_template").unwrap_or(""), "", "")?;
//! let chat = Chat { tokenizer, template, system: None };
//! let compute = Compute::new("auto")?;
//! let evaluator = Evaluator {
//!     model: &model, chat: &chat, compute: &compute, edits: &[], memory: 1 << 30, progress: &Silent,
//! };
//! let settings = search::Settings::default();
//! let outcome = search::patch(&evaluator, None, &PromptSet::built_in(), &settings, Some("out.gguf".as_ref()), false)?;
//! # drop(outcome); Ok(())
//! # }
//! ```
#![deny(missing_docs)]
#![deny(unsafe_code)]

pub mod arch;
pub mod checkpoint;
pub mod compare;
pub mod direction;
pub mod edit;
pub mod encoding;
pub mod error;
pub mod evaluate;
pub mod forward;
pub mod model;
pub mod num;
pub mod output;
pub mod packing;
pub mod progress;
pub mod report;
pub mod search;
pub mod text;
pub mod weights;

pub use error::{Error, Result};
