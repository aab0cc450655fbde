//! Gates and strengths, and folding an edit into an encoding.

pub mod fold;
pub mod gate;
pub mod sparse;
pub mod stack;
