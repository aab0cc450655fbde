//! Reads the header of a GGUF file. The bytes may be damaged or hostile.

use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;

use gguf_rs_lib::format::{GGUFValueType, MetadataValue};

use super::sniff::looks_like;
use super::{encoded_len, Entry, Numbers, Tensor, Value};
use crate::{Error, Result};

/// Size of the smallest metadata entry: an empty key and a one-byte value. A count of entries is
/// refused if the rest of the file can't hold that many of this size.
const LEAST_ENTRY: u64 = 8 + 4 + 1;
/// Size of the smallest tensor entry: an empty name and no dimensions.
const LEAST_TENSOR: u64 = 8 + 4 + 4 + 8;
/// Limits far above any model's counts, and low enough that a damaged count in a large file can't
/// take all memory.
const MOST_ENTRIES: u64 = 1 << 20;
const MOST_STRINGS: u64 = 1 << 26;
const MOST_BYTES: u64 = 1 << 30;
const MAX_DIMS: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;

/// The content of the header.
#[derive(Debug)]
pub(super) struct Header {
    pub version: u32,
    pub alignment: u64,
    pub data_start: u64,
    pub metadata: Vec<Entry>,
    pub infos: Range<u64>,
    pub tensors: Vec<Tensor>,
}

/// Reads the header. Checks that every tensor lies inside the file and that no two overlap.
pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<Header> {
    if !bytes.starts_with(b"GGUF") {
        return Err(Error::format(path, None, looks_like(bytes)));
    }
    let mut r = Reader { path, bytes, at: 4, place: "the first 24 bytes".to_string() };
    let version = r.u32()?;
    check_version(path, version)?;
    let tensor_count = r.u64()?;
    let entry_count = r.u64()?;
    r.room_for(entry_count, LEAST_ENTRY, MOST_ENTRIES, "metadata entries")?;
    let metadata = read_metadata(&mut r, entry_count)?;
    let alignment = alignment(path, &metadata)?;

    r.place = "the first 24 bytes".to_string();
    r.room_for(tensor_count, LEAST_TENSOR, MOST_ENTRIES, "tensors")?;
    let start = r.at as u64;
    let mut tensors = Vec::with_capacity(tensor_count as usize);
    let mut names = HashSet::new();
    for i in 0..tensor_count {
        r.place = format!("the entry of tensor {} of {tensor_count}", i + 1);
        let tensor = read_tensor(&mut r, alignment)?;
        if !names.insert(tensor.name.clone()) {
            return Err(r.error(format!("two tensors are named `{}`", tensor.name)));
        }
        tensors.push(tensor);
    }
    let infos = start..r.at as u64;
    // Can't overflow: a file's size is below 2^63, and an alignment below 2^32.
    let data_start = infos.end.next_multiple_of(alignment);
    place_tensors(path, &mut tensors, data_start, bytes.len() as u64)?;
    Ok(Header { version, alignment, data_start, metadata, infos, tensors })
}

fn check_version(path: &Path, version: u32) -> Result<()> {
    match version {
        2 | 3 => Ok(()),
        1 => Err(Error::unsupported(
            format!("{}: is GGUF version 1, which has been out of use since 2023", path.display()),
            "convert the model again, or download a current GGUF",
        )),
        // The lower half is zero: a small number in the other byte order.
        v if v & 0xffff == 0 && v != 0 => Err(Error::unsupported(
            format!("{}: is a big-endian GGUF file", path.display()),
            "convert it to little-endian first (gguf-py's gguf-convert-endian)",
        )),
        v => Err(Error::unsupported(
            format!("{}: is GGUF version {v}; versions 2 and 3 are known", path.display()),
            "look for a newer refusal-patch",
        )),
    }
}

fn read_metadata(r: &mut Reader, count: u64) -> Result<Vec<Entry>> {
    let mut entries = Vec::with_capacity(count as usize);
    let mut keys = HashSet::new();
    for i in 0..count {
        r.place = format!("metadata entry {} of {count}", i + 1);
        let start = r.at as u64;
        let key = r.name("key")?;
        r.place = format!("metadata entry {} of {count} (`{key}`)", i + 1);
        let value = r.value()?;
        if !keys.insert(key.clone()) {
            return Err(r.error(format!("two metadata entries have the key `{key}`")));
        }
        entries.push(Entry { key, value, span: start..r.at as u64 });
    }
    Ok(entries)
}

fn alignment(path: &Path, metadata: &[Entry]) -> Result<u64> {
    let Some(entry) = metadata.iter().find(|e| e.key == "general.alignment") else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    match &entry.value {
        Value::Scalar(MetadataValue::U32(a)) if a.is_power_of_two() => Ok(u64::from(*a)),
        Value::Scalar(MetadataValue::U32(a)) => {
            let what = format!("general.alignment is {a}; it must be a power of two");
            Err(Error::format(path, entry.span.start, what))
        }
        other => {
            let what =
                format!("general.alignment is of type {}; it must be u32", other.type_name());
            Err(Error::format(path, entry.span.start, what))
        }
    }
}

/// Reads one entry of the tensor list. [`place_tensors`] completes it: the offset still counts from
/// the start of the data section, and the length of an unknown encoding is `u64::MAX`.
fn read_tensor(r: &mut Reader, alignment: u64) -> Result<Tensor> {
    let name = r.name("tensor name")?;
    r.place = format!("the entry of tensor `{name}`");
    let n_dims = r.u32()?;
    if n_dims > MAX_DIMS {
        return Err(r.error(format!(
            "tensor `{name}` has {n_dims} dimensions; at most {MAX_DIMS} are allowed"
        )));
    }
    let dims = (0..n_dims).map(|_| r.u64()).collect::<Result<Vec<u64>>>()?;
    let type_id = r.u32()?;
    let offset = r.u64()?;
    let len = encoded_len(type_id, &dims).map_err(|e| r.error(format!("tensor `{name}`: {e}")))?;
    if offset % alignment != 0 {
        return Err(r.error(format!(
            "tensor `{name}` has offset {offset}, which is not a multiple of the alignment \
             {alignment}"
        )));
    }
    Ok(Tensor { name, dims, type_id, file: 0, offset, len: len.unwrap_or(u64::MAX) })
}

/// Makes offsets count from the start of the file, and sets the lengths of unknown encodings.
/// Checks that every tensor ends inside the file and that no two overlap.
fn place_tensors(
    path: &Path,
    tensors: &mut [Tensor],
    data_start: u64,
    file_len: u64,
) -> Result<()> {
    let mut missing: Option<(u64, String)> = None;
    for t in tensors.iter_mut() {
        let start = t.offset.checked_add(data_start);
        // A tensor of an unknown encoding has at least one byte, unless it has no elements.
        let least = if t.len == u64::MAX { t.elements().min(1) } else { t.len };
        let Some((start, end)) = start.and_then(|s| Some((s, s.checked_add(least)?))) else {
            let what = format!(
                "tensor `{}` has the impossible offset {} and length {}",
                t.name, t.offset, least
            );
            return Err(Error::format(path, None, what));
        };
        t.offset = start;
        if end > file_len && missing.as_ref().is_none_or(|(e, _)| end > *e) {
            missing = Some((end, t.name.clone()));
        }
    }
    if let Some((end, name)) = missing {
        let what = format!(
            "is cut short: tensor `{name}` ends at byte {end} and the file at {file_len}, so {} \
             bytes are missing; download it again",
            end - file_len
        );
        return Err(Error::format(path, None, what));
    }

    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|&i| (tensors[i].offset, tensors[i].len));
    for (k, &i) in order.iter().enumerate() {
        let next = order.get(k + 1).copied();
        let limit = next.map_or(file_len, |n| tensors[n].offset);
        let t = &mut tensors[i];
        if t.len == u64::MAX {
            t.len = if t.elements() == 0 { 0 } else { limit - t.offset };
        }
        let empty_but_should_not_be = t.len == 0 && t.elements() != 0;
        if t.range().end > limit.max(t.offset) || empty_but_should_not_be {
            let (a, at) = (t.name.clone(), t.offset);
            let b = next.map_or("the end of the file", |n| tensors[n].name.as_str());
            return Err(Error::format(path, at, format!("tensors `{a}` and `{b}` overlap")));
        }
    }
    Ok(())
}

/// A cursor over the header. It never passes the end of the file: its error names the part of the
/// header that is cut short.
struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
    /// The part of the header that is being read, for error messages.
    place: String,
}

impl<'a> Reader<'a> {
    fn error(&self, what: String) -> Error {
        Error::format(self.path, self.at as u64, what)
    }

    fn remaining(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    fn take(&mut self, n: u64) -> Result<&'a [u8]> {
        if n > self.remaining() {
            return Err(self.error(format!(
                "the header ends too soon: {} needs {n} bytes more and the file has {}; \
                 it is cut short or damaged, download it again",
                self.place,
                self.remaining()
            )));
        }
        let taken = &self.bytes[self.at..self.at + n as usize];
        self.at += n as usize;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn string(&mut self) -> Result<&'a [u8]> {
        let len = self.u64()?;
        self.room_for(len, 1, MOST_BYTES, "bytes of text")?;
        self.take(len)
    }

    /// Reads a key or a tensor name. Both are looked up by name, so they must be UTF-8, unlike
    /// values.
    fn name(&mut self, what: &str) -> Result<String> {
        let bytes = self.string()?;
        match std::str::from_utf8(bytes) {
            Ok(s) => Ok(s.to_string()),
            Err(_) => Err(self.error(format!("the {what} of {} is not UTF-8 text", self.place))),
        }
    }

    /// Checks a count before memory is allocated for it: `count` items of at least `least` bytes
    /// must fit into the rest of the file, and `count` must not exceed `most`.
    fn room_for(&self, count: u64, least: u64, most: u64, what: &str) -> Result<()> {
        let fits = count.checked_mul(least).is_some_and(|n| n <= self.remaining());
        if fits && count <= most {
            return Ok(());
        }
        let why = match fits {
            false => format!("which the {} bytes left can't hold", self.remaining()),
            true => format!("more than the {most} that any model needs"),
        };
        Err(self.error(format!(
            "according to {}, {count} {what} follow, {why}; the file is damaged, download it again",
            self.place
        )))
    }

    fn kind(&mut self) -> Result<GGUFValueType> {
        let id = self.u32()?;
        GGUFValueType::from_u32(id)
            .map_err(|_| self.error(format!("{} has the unknown value type {id}", self.place)))
    }

    fn value(&mut self) -> Result<Value> {
        match self.kind()? {
            GGUFValueType::String => Ok(Value::String(self.string()?.to_vec())),
            GGUFValueType::Array => self.array_value(),
            kind => {
                // Every other kind has a fixed size.
                let mut bytes = self.take(kind.size_in_bytes().unwrap_or(1) as u64)?;
                MetadataValue::read_from(&mut bytes, kind)
                    .map(Value::Scalar)
                    .map_err(|e| self.error(format!("{}: {e}", self.place)))
            }
        }
    }

    fn array_value(&mut self) -> Result<Value> {
        let kind = self.kind()?;
        let count = self.u64()?;
        match (kind, kind.size_in_bytes()) {
            (GGUFValueType::String, _) => {
                self.room_for(count, 8, MOST_STRINGS, "strings")?;
                let mut strings = Vec::with_capacity(count as usize);
                for _ in 0..count {
                    strings.push(self.string()?.to_vec());
                }
                Ok(Value::Strings(strings))
            }
            (_, Some(size)) => {
                self.room_for(count, size as u64, MOST_BYTES / size as u64, "numbers")?;
                Ok(Value::Numbers(Numbers::new(kind, self.take(count * size as u64)?.to_vec())))
            }
            (_, None) => Err(self.error(format!(
                "{} holds arrays inside an array, which GGUF readers refuse",
                self.place
            ))),
        }
    }
}
