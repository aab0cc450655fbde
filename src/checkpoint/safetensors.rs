//! Reads the header of a safetensors file. The file holds the header's length in eight bytes, the
//! header as a JSON object of tensors, and the tensors' bytes without gaps.

use std::fmt;
use std::path::Path;

use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;

use super::Tensor;
use crate::{Error, Result};

/// Size limit of the header. No real model's header comes near it, and other readers have the same
/// limit.
const LONGEST_HEADER: u64 = 100_000_000;

/// Element types: name, number for [`Tensor::type_id`], bits of an element. A type that GGUF has
/// too keeps GGUF's number.
const DTYPES: [(&str, u32, u64); 21] = [
    ("F32", 0, 32),
    ("F16", 1, 16),
    ("BF16", 30, 16),
    ("I8", 24, 8),
    ("I16", 25, 16),
    ("I32", 26, 32),
    ("I64", 27, 64),
    ("F64", 28, 64),
    ("U8", OWN, 8),
    ("BOOL", OWN + 1, 8),
    ("U16", OWN + 2, 16),
    ("U32", OWN + 3, 32),
    ("U64", OWN + 4, 64),
    ("F8_E4M3", OWN + 5, 8),
    ("F8_E5M2", OWN + 6, 8),
    ("F8_E8M0", OWN + 7, 8),
    ("F4", OWN + 8, 4),
    ("F6_E2M3", OWN + 9, 6),
    ("F6_E3M2", OWN + 10, 6),
    ("C64", OWN + 11, 64),
    ("F8_E4M3FNUZ", OWN + 12, 8),
];
/// The first number of the types that GGUF doesn't have. GGUF's own numbers are far below.
const OWN: u32 = 0x5AFE_0000;
/// The number of every element type that isn't in the table.
const UNKNOWN: u32 = OWN + 0xFFFF;

/// The name of an element type that only safetensors has, by its number.
pub(super) fn dtype_name(type_id: u32) -> Option<&'static str> {
    match type_id {
        UNKNOWN => Some("an unknown type"),
        id if id >= OWN => DTYPES.iter().find(|d| d.1 == id).map(|d| d.0),
        _ => None,
    }
}

/// The number of an element type, by its name in the header. Unknown names share one number.
pub fn dtype_id(name: &str) -> u32 {
    DTYPES.iter().find(|d| d.0 == name).map_or(UNKNOWN, |d| d.1)
}

/// A JSON object's members in order. A repeated name is kept, to be refused: readers differ in
/// which of the two they take.
struct Members(Vec<(String, Value)>);

impl<'de> serde::Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Members, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Members;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Members, A::Error> {
                let mut all = Vec::new();
                while let Some(member) = map.next_entry()? {
                    all.push(member);
                }
                Ok(Members(all))
            }
        }
        d.deserialize_map(Collect)
    }
}

/// Reads the tensors of one file, in the order of their bytes. `file` is the file's index for
/// [`Tensor::file`].
///
/// # Errors
/// The header is no JSON object of tensors, two tensors have one name, or the tensors don't fill
/// the file exactly.
pub(super) fn parse(path: &Path, bytes: &[u8], file: usize) -> Result<Vec<Tensor>> {
    let size = bytes.len() as u64;
    let wrong = |at: u64, what: String| Error::format(path, at, what);
    let Some((len, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(wrong(
            0,
            format!("has {size} bytes, too few for a safetensors header; download it again"),
        ));
    };
    let len = u64::from_le_bytes(*len);
    if len > LONGEST_HEADER {
        return Err(wrong(
            0,
            format!(
                "its header claims {len} bytes, {LONGEST_HEADER} is the most; this is not a \
                 safetensors file, or a damaged one"
            ),
        ));
    }
    let Some((header, data)) = rest.split_at_checked(len as usize) else {
        let have = rest.len();
        return Err(wrong(
            0,
            format!("its header claims {len} bytes and {have} are there; download it again"),
        ));
    };
    let Members(members) = serde_json::from_slice(header).map_err(|e| {
        wrong(8, format!("its header is not a JSON object of tensors: {e}; download it again"))
    })?;
    let mut tensors = Vec::with_capacity(members.len());
    for (name, value) in members {
        if name == "__metadata__" {
            continue;
        }
        let entry = tensor(&name, &value, data.len() as u64, len + 8, file);
        tensors.push(entry.map_err(|e| wrong(8, e))?);
    }
    tensors.sort_by(|a, b| a.offset.cmp(&b.offset).then(a.len.cmp(&b.len)));
    let mut at = len + 8;
    for t in &tensors {
        if t.offset != at {
            let (name, begins) = (&t.name, t.offset);
            let how = if begins < at {
                "overlaps the tensor before it"
            } else {
                "leaves a gap after the tensor before it"
            };
            return Err(wrong(
                begins,
                format!("tensor `{name}` {how}, which ends at byte {at}; download it again"),
            ));
        }
        at += t.len;
    }
    if at != size {
        return Err(wrong(
            at,
            format!("its tensors end at byte {at}, the file has {size}; download it again"),
        ));
    }
    let mut names: Vec<&str> = tensors.iter().map(|t| t.name.as_str()).collect();
    names.sort_unstable();
    match names.windows(2).find(|w| w[0] == w[1]) {
        Some(w) => Err(wrong(
            8,
            format!("tensor `{}` is in the header twice; download the file again", w[0]),
        )),
        None => Ok(tensors),
    }
}

/// Reads one member of the header. `data`: size in bytes of the data section, which begins at byte
/// `start` of the file.
///
/// # Errors
/// What is wrong with the member.
fn tensor(name: &str, value: &Value, data: u64, start: u64, file: usize) -> Result<Tensor, String> {
    let wrong = |what: &str| format!("tensor `{name}` {what}; download the file again");
    let numbers = |key: &str| -> Option<Vec<u64>> {
        value[key].as_array()?.iter().map(Value::as_u64).collect()
    };
    let dtype = value["dtype"].as_str().ok_or_else(|| wrong("has no dtype"))?;
    let mut dims = numbers("shape").ok_or_else(|| wrong("has no shape of whole numbers"))?;
    let Some(&[begin, end]) = numbers("data_offsets").as_deref() else {
        return Err(wrong("has no data_offsets of two whole numbers"));
    };
    if begin > end || end > data {
        return Err(wrong(&format!("claims bytes {begin} to {end} of {data}")));
    }
    let elements = dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
    let type_id = dtype_id(dtype);
    let bits = DTYPES.iter().find(|d| d.0 == dtype).map(|d| d.2);
    if let Some(bits) = bits {
        let expected = elements.and_then(|n| n.checked_mul(bits)).map(|n| n.div_ceil(8));
        if expected != Some(end - begin) {
            let needs = expected.map_or("more than 64 bits can count".into(), |n| n.to_string());
            return Err(wrong(&format!(
                "{dtype} {dims:?} needs {needs} bytes and has {}",
                end - begin
            )));
        }
    } else if elements.is_none() {
        return Err(wrong(&format!(
            "has a shape {dims:?} of more elements than 64 bits can count"
        )));
    }
    dims.reverse();
    Ok(Tensor {
        name: name.to_string(),
        dims,
        type_id,
        file,
        offset: start + begin,
        len: end - begin,
    })
}
