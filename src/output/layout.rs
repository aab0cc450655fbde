//! What the new file consists of, from its first byte to its last.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::ops::Range;

use super::parts::{Part, Patches};
use super::BLOCK;
use crate::checkpoint::{write_string, Tensor, Value};
use crate::{Error, Result};

/// The key whose value only fills the header up, so that the tensors keep their place within a
/// block.
pub(super) const PADDING_KEY: &str = "refusal_patch.padding";
/// The size of an empty padding entry: length and bytes of the key, type, length of the value.
const PADDING_LEAST: u64 = 8 + PADDING_KEY.len() as u64 + 4 + 8;

/// Data begin at a multiple of this, whatever the file's own alignment: llama.cpp maps no other
/// file.
const MAPPED: u64 = 32;

/// A run of bytes of the new file.
#[derive(Debug)]
pub(super) enum Piece<'a> {
    /// These bytes.
    Bytes(Cow<'a, [u8]>),
    /// A range of the source.
    Source(Range<u64>),
    /// So many zeros.
    Zeros(u64),
}

impl Piece<'_> {
    fn len(&self) -> u64 {
        match self {
            Piece::Bytes(b) => b.len() as u64,
            Piece::Source(r) => r.end - r.start,
            Piece::Zeros(n) => *n,
        }
    }
}

/// The new file, piece by piece.
#[derive(Debug)]
pub(super) struct Layout<'a> {
    pub pieces: Vec<Piece<'a>>,
}

impl<'a> Layout<'a> {
    /// Lays the file out.
    pub fn new(part: &Part<'a>) -> Result<Layout<'a>> {
        let pieces = match part.is_unchanged() {
            true => vec![Piece::Source(0..part.source.file_len())],
            false => pieces(part)?,
        };
        Ok(Layout { pieces: pieces.into_iter().filter(|p| p.len() > 0).collect() })
    }

    /// The new file's size.
    pub fn len(&self) -> u64 {
        self.pieces.iter().map(Piece::len).sum()
    }
}

fn pieces<'a>(part: &Part<'a>) -> Result<Vec<Piece<'a>>> {
    let mut tensors = part.source.tensors().iter();
    let same_types = tensors.all(|t| new_type(&part.patches, t) == t.type_id);
    let entries = entries(part)?;
    Ok(match same_types && part.added.is_empty() {
        true => in_place(part, entries),
        false => moved(part, entries),
    })
}

fn new_type(patches: &Patches, t: &Tensor) -> u32 {
    patches.get(t.name.as_str()).map_or(t.type_id, |p| p.type_id)
}

/// The new file's metadata entries as bytes: the source's verbatim, unless set or removed, then the
/// new ones.
fn entries<'a>(part: &Part<'a>) -> Result<Vec<Cow<'a, [u8]>>> {
    let mut set: HashMap<&str, &Value> = HashMap::new();
    for (key, value) in &part.metadata {
        if set.insert(key, value).is_some() {
            return Err(Error::Model(format!("metadata key `{key}` is set twice")));
        }
    }
    let removed: HashSet<&str> = part.remove.iter().map(String::as_str).collect();
    if set.contains_key("general.alignment") || removed.contains("general.alignment") {
        return Err(Error::Model(
            "general.alignment can't be changed: all tensors lie by it".to_string(),
        ));
    }
    let mut entries = Vec::new();
    for e in part.source.metadata() {
        if let Some(value) = set.remove(e.key.as_str()) {
            entries.push(Cow::Owned(entry(&e.key, value)));
        } else if !removed.contains(e.key.as_str()) && e.key != PADDING_KEY {
            entries.push(Cow::Borrowed(part.source.raw(e.span.clone())));
        }
    }
    let new = part.metadata.iter().filter(|(key, _)| set.contains_key(key));
    entries.extend(new.map(|(key, value)| Cow::Owned(entry(key, value))));
    Ok(entries)
}

fn entry(key: &str, value: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    write_string(key.as_bytes(), &mut out);
    value.write(&mut out);
    out
}

fn header(part: &Part, entries: &[Cow<[u8]>], infos: &[u8]) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(part.source.version().to_le_bytes());
    out.extend(((part.source.tensors().len() + part.added.len()) as u64).to_le_bytes());
    out.extend((entries.len() as u64).to_le_bytes());
    entries.iter().for_each(|e| out.extend_from_slice(e));
    out.extend(infos);
    out.resize(out.len().next_multiple_of(part.source.alignment() as usize), 0);
    out
}

/// No tensor changes its size: a new header, then the source's data with the patched ranges
/// replaced.
fn in_place<'a>(part: &Part<'a>, mut entries: Vec<Cow<[u8]>>) -> Vec<Piece<'a>> {
    let source = part.source;
    let infos = source.raw(source.tensor_infos_span());
    let mut head = header(part, &entries, infos);
    // Where IN's data begin at a place that can't be mapped, at one that can.
    let place =
        if source.data_start().is_multiple_of(MAPPED) { source.data_start() % BLOCK } else { 0 };
    if head.len() as u64 % BLOCK != place {
        head = padded(part, &mut entries, infos, place);
    }
    let mut pieces = vec![Piece::Bytes(Cow::Owned(head))];
    let mut at = source.data_start();
    let mut tensors: Vec<&Tensor> = source.tensors().iter().collect();
    tensors.sort_by_key(|t| t.offset);
    for t in tensors {
        if let Some(patch) = part.patches.get(t.name.as_str()) {
            pieces.push(Piece::Source(at..t.offset));
            pieces.push(Piece::Bytes(Cow::Borrowed(&patch.bytes)));
            at = t.range().end;
        }
    }
    // A file without tensors may end before its data would begin.
    pieces.push(Piece::Source(at..source.file_len().max(at)));
    pieces
}

/// A header that ends at this place within a block.
fn padded(part: &Part, entries: &mut Vec<Cow<[u8]>>, infos: &[u8], place: u64) -> Vec<u8> {
    let unpadded = 24 + entries.iter().map(|e| e.len()).sum::<usize>() + infos.len();
    entries.push(Cow::Owned(padding(unpadded as u64, place)));
    header(part, entries, infos)
}

/// An entry of spaces that moves the end of a header of `unpadded` bytes to the same place within a
/// block as `data_start`. That is a multiple of the alignment, so that no other padding follows.
fn padding(unpadded: u64, data_start: u64) -> Vec<u8> {
    let least = unpadded + PADDING_LEAST;
    let spaces = (data_start + BLOCK - least % BLOCK) % BLOCK;
    entry(PADDING_KEY, &Value::String(vec![b' '; spaces as usize]))
}

/// Some tensor changes its size or is new: offsets are computed anew, without gaps, in the order of
/// the list, as llama.cpp demands.
fn moved<'a>(part: &Part<'a>, mut entries: Vec<Cow<[u8]>>) -> Vec<Piece<'a>> {
    let source = part.source;
    let old = source.tensors().iter().map(|t| {
        let piece = match part.patches.get(t.name.as_str()) {
            Some(p) => Piece::Bytes(Cow::Borrowed(p.bytes.as_slice())),
            None => Piece::Source(t.range()),
        };
        (&t.name, &t.dims, new_type(&part.patches, t), piece)
    });
    let new = part
        .added
        .iter()
        .map(|a| (&a.name, &a.dims, a.type_id, Piece::Bytes(Cow::Borrowed(a.bytes.as_slice()))));
    let mut infos = Vec::new();
    let mut data = Vec::new();
    let mut offset = 0u64;
    for (name, dims, type_id, piece) in old.chain(new) {
        write_string(name.as_bytes(), &mut infos);
        infos.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|d| infos.extend(d.to_le_bytes()));
        infos.extend(type_id.to_le_bytes());
        infos.extend(offset.to_le_bytes());
        let len = piece.len();
        let padded = len.next_multiple_of(source.alignment());
        data.push(piece);
        data.push(Piece::Zeros(padded - len));
        offset += padded;
    }
    let mut head = header(part, &entries, &infos);
    if !(head.len() as u64).is_multiple_of(MAPPED) {
        head = padded(part, &mut entries, &infos, 0);
    }
    let mut pieces = vec![Piece::Bytes(Cow::Owned(head))];
    pieces.extend(data);
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_moves_the_data_to_the_same_place_within_a_block() {
        for unpadded in [24, 4000, 4054, 4095, 4096, 123_457] {
            for data_start in [32, 4064, 4096, 5_947_840] {
                let end = unpadded + padding(unpadded, data_start).len() as u64;
                assert_eq!(end % BLOCK, data_start % BLOCK, "{unpadded} {data_start}");
                assert!(end - unpadded < BLOCK + PADDING_LEAST);
            }
        }
    }
}
