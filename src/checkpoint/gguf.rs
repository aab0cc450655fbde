//! An open GGUF file: its metadata in file order, its tensors, and their memory-mapped bytes.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::parse::{parse, Header};
use super::{Entry, Map, Tensor, Value};
use crate::{Error, Result};

/// A GGUF file (version 2 or 3), mapped read-only.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    map: Map,
    header: Header,
    keys: HashMap<String, usize>,
    names: HashMap<String, usize>,
}

impl Gguf {
    /// Opens a file, and checks every count and length in its header against the file's size, so
    /// that a damaged or hostile file fails here and not later. A tensor of an unknown encoding is
    /// allowed.
    ///
    /// # Errors
    /// The file can't be read; its header is damaged; it is one part of a split model.
    pub fn open(path: &Path) -> Result<Gguf> {
        let map = Map::open(path)?;
        let header = parse(path, map.bytes())?;
        let keys = header.metadata.iter().enumerate().map(|(i, e)| (e.key.clone(), i)).collect();
        let names = header.tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        let gguf = Gguf { path: path.to_path_buf(), map, header, keys, names };
        match gguf.get("split.count").and_then(Value::as_u64) {
            Some(count) if count > 1 => Err(Error::unsupported(
                format!("{}: is one of {count} parts of a split model", path.display()),
                "merge the parts first: llama-gguf-split --merge FIRST-PART OUT",
            )),
            _ => Ok(gguf),
        }
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The format's version: 2 or 3.
    pub fn version(&self) -> u32 {
        self.header.version
    }

    /// The alignment in bytes: tensors begin at multiples of it, counted from [`Gguf::data_start`].
    pub fn alignment(&self) -> u64 {
        self.header.alignment
    }

    /// Byte offset of the data section. Lies past the end of a file that has no tensors and ends
    /// with its header.
    pub fn data_start(&self) -> u64 {
        self.header.data_start
    }

    /// The file's size in bytes.
    pub fn file_len(&self) -> u64 {
        self.map.bytes().len() as u64
    }

    /// The metadata, in file order.
    pub fn metadata(&self) -> &[Entry] {
        &self.header.metadata
    }

    /// The value of a metadata key, if the file has the key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.keys.get(key).map(|&i| &self.header.metadata[i].value)
    }

    /// The string under a key; `None` if the key is missing, or its value isn't a UTF-8 string.
    pub fn get_str(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }

    /// The integer under a key, of any width and sign in the file; `None` if it doesn't fit.
    pub fn get_u32(&self, key: &str) -> Option<u32> {
        self.get(key)?.as_u64()?.try_into().ok()
    }

    /// The integer under a key, of any width and sign in the file; `None` if it doesn't fit.
    pub fn get_u64(&self, key: &str) -> Option<u64> {
        self.get(key)?.as_u64()
    }

    /// The float under a key, of either width in the file.
    pub fn get_f32(&self, key: &str) -> Option<f32> {
        self.get(key)?.as_f64().map(|x| x as f32)
    }

    /// The boolean under a key.
    pub fn get_bool(&self, key: &str) -> Option<bool> {
        self.get(key)?.as_bool()
    }

    /// The array of strings under a key, as bytes: the text of a token needn't be UTF-8.
    pub fn get_strings(&self, key: &str) -> Option<&[Vec<u8>]> {
        self.get(key)?.as_strings()
    }

    /// The array of integers under a key; `None` if one of them doesn't fit.
    pub fn get_u32s(&self, key: &str) -> Option<Vec<u32>> {
        self.get(key)?.to_u32s()
    }

    /// The array of floats under a key.
    pub fn get_f32s(&self, key: &str) -> Option<Vec<f32>> {
        self.get(key)?.to_f32s()
    }

    /// The array of booleans under a key.
    pub fn get_bools(&self, key: &str) -> Option<Vec<bool>> {
        self.get(key)?.to_bools()
    }

    /// The architecture's name, `general.architecture`. The architecture's own keys begin with it.
    ///
    /// # Errors
    /// The key is missing, or isn't a UTF-8 string.
    pub fn arch(&self) -> Result<&str> {
        self.get_str("general.architecture").ok_or_else(|| {
            Error::Model(format!("{}: its metadata lack general.architecture", self.path.display()))
        })
    }

    /// All tensors, in the order of the file's tensor list.
    pub fn tensors(&self) -> &[Tensor] {
        &self.header.tensors
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.names.get(name).map(|&i| &self.header.tensors[i])
    }

    /// The bytes of tensor `t`, which must be one of this file's.
    pub fn bytes(&self, t: &Tensor) -> &[u8] {
        self.raw(t.range())
    }

    /// The bytes of a range of the file, which must lie inside the file.
    pub fn raw(&self, range: Range<u64>) -> &[u8] {
        &self.map.bytes()[range.start as usize..range.end as usize]
    }

    /// The range of the file that holds the tensor list.
    pub fn tensor_infos_span(&self) -> Range<u64> {
        self.header.infos.clone()
    }

    /// Asks the operating system to read tensor `t` ahead.
    pub fn advise_will_need(&self, t: &Tensor) {
        self.map.will_need(t.range());
    }

    /// Tells the operating system that tensor `t` isn't needed soon.
    pub fn advise_dont_need(&self, t: &Tensor) {
        self.map.dont_need(t.range());
    }

    /// Opens the file again for reading, with a cursor of its own.
    ///
    /// # Errors
    /// The file can't be opened, or was changed or replaced since it was parsed.
    pub fn reopen(&self) -> Result<File> {
        self.map.reopen(&self.path)
    }
}
