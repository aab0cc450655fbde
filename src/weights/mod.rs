//! A weight matrix as it is stored: rows that are decoded where they are needed, and their codes.

mod matrix;
pub mod pruned;
mod stack;

pub use matrix::{Matrix, Storage};
pub use stack::Stack;
