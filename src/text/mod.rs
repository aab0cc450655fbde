//! Prompt sets, and the tokenizer and the chat template that a checkpoint carries.

mod added;
mod bpe;
mod by_set;
mod chat;
mod date;
mod guard;
mod hub;
mod merge;
mod pre;
mod prompt_file;
mod prompts;
mod source;
mod special;
mod split;
mod spm;
mod template;
pub mod thinking;
mod tokenizer;
mod vocab;

pub use by_set::BySet;
pub use chat::{Chat, Message, Prompt};
pub use guard::keep_guarded_panics_quiet;
pub use hub::folder_template;
pub use prompt_file::{read as read_prompts, PromptFile};
pub use prompts::{PromptRecord, PromptSet, Set, Split};
pub use template::ChatTemplate;
pub use thinking::Thinking;
pub use tokenizer::Tokenizer;
