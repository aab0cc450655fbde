//! Two of a kind: before an edit or a compression, and after.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The same thing twice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Pair<T> {
    /// Of IN, or of the original.
    pub before: T,
    /// Of OUT, or of the compressed model.
    pub after: T,
}

impl<T> Pair<T> {
    /// Both.
    pub fn new(before: T, after: T) -> Pair<T> {
        Pair { before, after }
    }

    /// What `f` makes of each.
    pub fn map<U>(&self, mut f: impl FnMut(&T) -> U) -> Pair<U> {
        Pair { before: f(&self.before), after: f(&self.after) }
    }
}
