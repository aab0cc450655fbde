//! Prompts, tokenizer and chat template, from the checkpoint alone.

mod chat;
mod prompts;
mod template;
mod tokenizer;

pub use chat::{Chat, Message, Prompt};
pub use prompts::{read as read_prompts, PromptRecord, PromptSet, Set, Split};
pub use template::ChatTemplate;
pub use tokenizer::Tokenizer;
