//! The description of the decoder, as data: a table with one row per architecture, a [`Spec`] that
//! is read from a checkpoint's metadata, and the names of tensors by role.

mod block;
mod delta;
mod experts;
mod from_config;
mod from_gguf;
mod names;
mod role;
mod rope;
mod row;
mod spec;
mod table;

pub use block::{Block, Turn};
pub use delta::DeltaNet;
pub use experts::Experts;
pub use names::Names;
pub use role::{Role, Writer};
pub use rope::{Growth, Rope, RopeStyle};
pub use row::{Activation, Arch, NormNames, Norms, QkNorm};
pub use spec::{PerLayer, Scales, Spec};
