//! Weight matrices in stored form. Rows are decoded on demand, and single codes can be read and
//! overwritten.

mod matrix;
pub mod pruned;
mod stack;

pub use matrix::{Matrix, Storage};
pub use stack::Stack;
