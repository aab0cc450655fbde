//! A checkpoint as bytes and names: its metadata, its tensors, and where each tensor lies. Nothing
//! here decodes weights.

mod cut_short;
mod folder;
mod gguf;
mod hash;
mod map;
mod parse;
mod parts;
mod python;
mod safetensors;
mod shard;
mod sniff;
mod split;
mod value;

use std::ffi::OsStr;
use std::ops::Range;
use std::path::Path;

use gguf_rs_lib::format::GGUFTensorType;

use crate::{Error, Result};

pub use cut_short::name_files_cut_short;
pub use folder::{read_json, Folder};
pub use gguf::Gguf;
pub use hash::{hex, sha256_checkpoint, sha256_file, sha256_files, sha256_tensors};
pub use map::Map;
pub use safetensors::dtype_id;
pub use shard::Shard;
pub use split::ShardName;
pub(crate) use split::TENSORS as SPLIT_TENSORS;
pub(crate) use value::write_string;
pub use value::{Numbers, Value};

/// An open checkpoint: a GGUF file or a Hugging Face folder.
#[derive(Debug)]
pub enum Checkpoint {
    /// A GGUF file, or the shards of a split one.
    Gguf(Box<Gguf>),
    /// A Hugging Face folder.
    Folder(Folder),
}

/// A container of tensors.
pub trait Tensors: Sync {
    /// All tensors, in the file's order.
    fn tensors(&self) -> &[Tensor];
    /// The bytes of tensor `t`, which must be one of this container's.
    fn bytes(&self, t: &Tensor) -> &[u8];
}

impl Tensors for Gguf {
    fn tensors(&self) -> &[Tensor] {
        Gguf::tensors(self)
    }
    fn bytes(&self, t: &Tensor) -> &[u8] {
        Gguf::bytes(self, t)
    }
}

impl Tensors for Checkpoint {
    fn tensors(&self) -> &[Tensor] {
        Checkpoint::tensors(self)
    }
    fn bytes(&self, t: &Tensor) -> &[u8] {
        Checkpoint::bytes(self, t)
    }
}

impl Checkpoint {
    /// Opens a GGUF file (any shard of a split one opens all of it), a `.safetensors` file beside
    /// its `config.json`, or a Hugging Face folder.
    ///
    /// # Errors
    /// The errors of [`Gguf::open`] and [`Folder::open`].
    pub fn open(path: &Path) -> Result<Checkpoint> {
        let is_dir = std::fs::metadata(path).map_err(Error::io(path))?.is_dir();
        if is_dir || path.extension() == Some(OsStr::new("safetensors")) {
            return Folder::open(path).map(Checkpoint::Folder);
        }
        match (Gguf::open(path), parts::advice(path)) {
            (Ok(gguf), _) => Ok(Checkpoint::Gguf(Box::new(gguf))),
            (Err(Error::Format { .. }), Some((what, hint))) => Err(Error::unsupported(what, hint)),
            (Err(e), _) => Err(e),
        }
    }

    /// The GGUF file, if the checkpoint is one.
    pub fn gguf(&self) -> Option<&Gguf> {
        match self {
            Checkpoint::Gguf(g) => Some(g),
            Checkpoint::Folder(_) => None,
        }
    }

    /// The Hugging Face folder, if the checkpoint is one.
    pub fn folder(&self) -> Option<&Folder> {
        match self {
            Checkpoint::Gguf(_) => None,
            Checkpoint::Folder(f) => Some(f),
        }
    }

    /// The path that was opened, of a split GGUF that of its first shard.
    pub fn path(&self) -> &Path {
        match self {
            Checkpoint::Gguf(g) => g.path(),
            Checkpoint::Folder(f) => f.path(),
        }
    }

    /// The files of weights; of a folder also the path that was opened.
    pub fn paths(&self) -> Vec<&Path> {
        match self {
            Checkpoint::Gguf(g) => g.shards().iter().map(Shard::path).collect(),
            Checkpoint::Folder(f) => {
                std::iter::once(f.path()).chain(f.files().map(|(path, _)| path)).collect()
            }
        }
    }

    /// The bytes of all files of weights.
    pub fn file_len(&self) -> u64 {
        match self {
            Checkpoint::Gguf(g) => g.file_len(),
            Checkpoint::Folder(f) => f.file_len(),
        }
    }

    /// All tensors, file by file, in the order of each file.
    pub fn tensors(&self) -> &[Tensor] {
        match self {
            Checkpoint::Gguf(g) => g.tensors(),
            Checkpoint::Folder(f) => f.tensors(),
        }
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        match self {
            Checkpoint::Gguf(g) => g.tensor(name),
            Checkpoint::Folder(f) => f.tensor(name),
        }
    }

    /// The bytes of tensor `t`, which must be one of this checkpoint's.
    pub fn bytes(&self, t: &Tensor) -> &[u8] {
        match self {
            Checkpoint::Gguf(g) => g.bytes(t),
            Checkpoint::Folder(f) => f.bytes(t),
        }
    }

    /// Asks the operating system to read tensor `t` ahead.
    pub fn advise_will_need(&self, t: &Tensor) {
        match self {
            Checkpoint::Gguf(g) => g.advise_will_need(t),
            Checkpoint::Folder(f) => f.map(t).will_need(t.range()),
        }
    }

    /// Tells the operating system that tensor `t` isn't needed soon.
    pub fn advise_dont_need(&self, t: &Tensor) {
        match self {
            Checkpoint::Gguf(g) => g.advise_dont_need(t),
            Checkpoint::Folder(f) => f.map(t).dont_need(t.range()),
        }
    }
}

/// One tensor of a checkpoint.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tensor {
    /// The name, as the file spells it.
    pub name: String,
    /// The shape in GGUF's order: `dims[0]` is the length of a row (input features), `dims[1]` the
    /// number of rows (output features).
    pub dims: Vec<u64>,
    /// The number of the encoding: `enum ggml_type` in GGUF, the result of [`dtype_id`] in
    /// safetensors. This program may not know the encoding.
    pub type_id: u32,
    /// Index of the file that holds the tensor, among the checkpoint's files. 0 in a checkpoint of
    /// one file.
    pub file: usize,
    /// Where the tensor's bytes begin, counted from the start of that file.
    pub offset: u64,
    /// Number of bytes. For an unknown encoding of GGUF: up to the next tensor, or to the end of
    /// the file.
    pub len: u64,
}

impl Tensor {
    /// Number of elements. The product can't overflow: the readers refuse such shapes.
    pub fn elements(&self) -> u64 {
        self.dims.iter().product()
    }

    /// The encoding's name; `type 77` for an unknown encoding of that number.
    pub fn type_name(&self) -> String {
        type_name(self.type_id)
    }

    /// The range of the file that holds the tensor's bytes.
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.len
    }
}

/// One metadata entry.
#[derive(Clone, PartialEq, Debug)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// The value.
    pub value: Value,
    /// The range of the file that holds the whole entry: key, type and value.
    pub span: Range<u64>,
}

/// The name of an encoding; `type 77` for an unknown encoding of that number.
pub fn type_name(type_id: u32) -> String {
    if let Some(name) = safetensors::dtype_name(type_id) {
        return name.to_string();
    }
    GGUFTensorType::from_u32(type_id)
        .map_or_else(|_| format!("type {type_id}"), |t| t.name().to_string())
}

/// Elements and bytes of an encoding's block. `None` for an encoding that GGUF doesn't have.
pub fn block(type_id: u32) -> Option<(u64, u64)> {
    let t = GGUFTensorType::from_u32(type_id).ok()?;
    Some((t.block_size() as u64, t.block_size_bytes()? as u64))
}

/// The size in bytes of a tensor of shape `dims`. `Ok(None)` for an unknown encoding.
///
/// # Errors
/// The element or byte count overflows, or a row isn't a whole number of blocks. The message
/// doesn't name the tensor.
pub fn encoded_len(type_id: u32, dims: &[u64]) -> Result<Option<u64>, String> {
    let elements = dims
        .iter()
        .try_fold(1u64, |n, &d| n.checked_mul(d))
        .filter(|&n| n <= i64::MAX as u64)
        .ok_or_else(|| format!("shape {dims:?} has more elements than 64 bits can count"))?;
    let Some((block_len, block_bytes)) = block(type_id) else { return Ok(None) };
    let row = dims.first().copied().unwrap_or(1);
    if row % block_len != 0 {
        let name = type_name(type_id);
        return Err(format!(
            "rows of {row} elements can't be divided into {name}'s blocks of {block_len}"
        ));
    }
    (elements / block_len)
        .checked_mul(block_bytes)
        .map(Some)
        .ok_or_else(|| format!("shape {dims:?} has more bytes than 64 bits can count"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_sizes_equal_those_of_llama_cpp() {
        // (type id, elements, bytes) of llama.cpp's ggml-common.h.
        let table = [
            (0, 1, 4),
            (1, 1, 2),
            (2, 32, 18),
            (3, 32, 20),
            (6, 32, 22),
            (7, 32, 24),
            (8, 32, 34),
            (10, 256, 84),
            (11, 256, 110),
            (12, 256, 144),
            (13, 256, 176),
            (14, 256, 210),
            (16, 256, 66),
            (17, 256, 74),
            (18, 256, 98),
            (19, 256, 50),
            (20, 32, 18),
            (21, 256, 110),
            (22, 256, 82),
            (23, 256, 136),
            (24, 1, 1),
            (25, 1, 2),
            (26, 1, 4),
            (27, 1, 8),
            (28, 1, 8),
            (29, 256, 56),
            (30, 1, 2),
            (34, 256, 54),
            (35, 256, 66),
            (39, 32, 17),
            (40, 64, 36),
            (41, 128, 18),
            (42, 64, 18),
        ];
        for (id, elements, bytes) in table {
            assert_eq!(block(id), Some((elements, bytes)), "type {id}");
        }
        for removed in [4, 5, 31, 32, 33, 36, 37, 38, 43, u32::MAX] {
            assert_eq!(block(removed), None, "type {removed}");
        }
    }

    #[test]
    fn a_shape_that_overflows_is_refused() {
        assert!(encoded_len(0, &[u64::MAX, 2]).is_err());
        assert!(encoded_len(28, &[1 << 62]).is_err());
        assert!(encoded_len(12, &[255]).is_err());
        assert_eq!(encoded_len(12, &[512, 3]), Ok(Some(864)));
        assert_eq!(encoded_len(0, &[]), Ok(Some(4)));
        assert_eq!(encoded_len(99, &[7]), Ok(None));
    }
}
