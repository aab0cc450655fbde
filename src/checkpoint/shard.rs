//! One GGUF file, mapped: a whole model, or a shard of a split one.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::parse::{parse, Header};
use super::{Entry, Map, Tensor, Value};
use crate::Result;

/// One GGUF file (version 2 or 3), mapped read-only.
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    map: Map,
    header: Header,
}

impl Shard {
    /// Opens and checks a file. [`super::Gguf::open`] says what is checked.
    pub(super) fn open(path: &Path) -> Result<Shard> {
        let map = Map::open(path)?;
        let header = parse(path, map.bytes())?;
        Ok(Shard { path: path.to_path_buf(), map, header })
    }

    /// Says which of a model's files it is: [`Tensor::file`] of its tensors.
    pub(super) fn number(&mut self, file: usize) {
        self.header.tensors.iter_mut().for_each(|t| t.file = file);
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The format's version: 2 or 3.
    pub fn version(&self) -> u32 {
        self.header.version
    }

    /// Tensors begin at multiples of this, counted from [`Shard::data_start`].
    pub fn alignment(&self) -> u64 {
        self.header.alignment
    }

    /// Where the tensors' data begin. Past the end in a file without tensors that ends with its
    /// header.
    pub fn data_start(&self) -> u64 {
        self.header.data_start
    }

    /// The file's size.
    pub fn file_len(&self) -> u64 {
        self.map.bytes().len() as u64
    }

    /// The metadata, in file order.
    pub fn metadata(&self) -> &[Entry] {
        &self.header.metadata
    }

    /// The value of a key, found by looking at every entry.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata().iter().find(|e| e.key == key).map(|e| &e.value)
    }

    /// The file's own tensors, in the order of its list.
    pub fn tensors(&self) -> &[Tensor] {
        &self.header.tensors
    }

    /// Any bytes of the file. The range must lie inside it.
    pub fn raw(&self, range: Range<u64>) -> &[u8] {
        &self.map.bytes()[range.start as usize..range.end as usize]
    }

    /// Where the list of tensors lies in the file.
    pub fn tensor_infos_span(&self) -> Range<u64> {
        self.header.infos.clone()
    }

    /// The map, for advice on reading.
    pub(super) fn map(&self) -> &Map {
        &self.map
    }

    /// Opens the file again for reading, if the file is still the one that was parsed.
    pub fn reopen(&self) -> Result<File> {
        self.map.reopen(&self.path)
    }
}
