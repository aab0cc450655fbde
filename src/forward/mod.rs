//! The layer-streamed decoder: all prompts at once as packed rows without padding, one layer's
//! tiles in memory at a time, activations tapped on the way, candidate edits as rank-one terms.

pub mod attention;
mod begun;
mod block;
mod cache;
mod delta;
mod experts;
mod head;
mod matmul;
mod per_layer;
mod product;
mod runner;
mod work;

pub use begun::Begun;
pub use head::{Head, Readout};
pub use matmul::Compute;
pub use product::Arithmetic;
pub use runner::{Fork, Generated, Row, Runner, Site, Tap};
pub use work::{Stage, Work};
