//! What the decoder is, as data: one row of the table for each architecture, a [`Spec`] from the
//! checkpoint's metadata, and the names of tensors by what they do.

mod experts;
mod from_config;
mod from_gguf;
mod names;
mod role;
mod rope;
mod row;
mod spec;
mod table;

pub use experts::Experts;
pub use names::Names;
pub use role::{Role, Writer};
pub use rope::{Rope, RopeStyle};
pub use row::{Activation, Arch, Norms, QkNorm};
pub use spec::{Attends, Scales, Spec, Turn};
