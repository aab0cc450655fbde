//! Numbers that may be missing: NaN is `null` in JSON. For `#[serde(with = "crate::nan")]`.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Writes a number, or `null`.
///
/// # Errors
/// The serializer's.
pub fn serialize<S: Serializer>(x: &f64, s: S) -> Result<S::Ok, S::Error> {
    Some(*x).filter(|x| x.is_finite()).serialize(s)
}

/// Reads a number, or NaN for `null`.
///
/// # Errors
/// The deserializer's.
pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(d)?.unwrap_or(f64::NAN))
}

/// The same for a number of each class of prompts.
pub mod by_set {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use crate::text::BySet;

    /// Writes three numbers, `null` for those that are missing.
    ///
    /// # Errors
    /// The serializer's.
    pub fn serialize<S: Serializer>(x: &BySet<f64>, s: S) -> Result<S::Ok, S::Error> {
        x.map(|x| Some(*x).filter(|x| x.is_finite())).serialize(s)
    }

    /// Reads three numbers, NaN for `null`.
    ///
    /// # Errors
    /// The deserializer's.
    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<BySet<f64>, D::Error> {
        Ok(BySet::<Option<f64>>::deserialize(d)?.map(|x| x.unwrap_or(f64::NAN)))
    }
}
