//! A value for each class of prompts.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Set;

/// A value for each class of prompts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BySet<T> {
    /// Of harmful prompts.
    pub harmful: T,
    /// Of harmless prompts.
    pub harmless: T,
    /// Of borderline prompts.
    pub borderline: T,
}

impl<T> BySet<T> {
    /// What `f` gives for each class.
    pub fn of(mut f: impl FnMut(Set) -> T) -> BySet<T> {
        let [harmful, harmless, borderline] = Set::ALL.map(&mut f);
        BySet { harmful, harmless, borderline }
    }

    /// A class's value.
    pub fn get(&self, set: Set) -> &T {
        match set {
            Set::Harmful => &self.harmful,
            Set::Harmless => &self.harmless,
            Set::Borderline => &self.borderline,
        }
    }

    /// A class's value, to be changed.
    pub fn get_mut(&mut self, set: Set) -> &mut T {
        match set {
            Set::Harmful => &mut self.harmful,
            Set::Harmless => &mut self.harmless,
            Set::Borderline => &mut self.borderline,
        }
    }

    /// What `f` makes of each value.
    pub fn map<U>(&self, mut f: impl FnMut(&T) -> U) -> BySet<U> {
        BySet::of(|set| f(self.get(set)))
    }

    /// The values with their classes.
    pub fn iter(&self) -> impl Iterator<Item = (Set, &T)> {
        Set::ALL.into_iter().map(|set| (set, self.get(set)))
    }
}
