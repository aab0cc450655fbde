//! An open GGUF file: metadata in file order, tensors, and their bytes by memory map.

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
    /// Opens and checks a file. Every count and length in it is checked against the bytes that
    /// there are, so that a damaged or hostile file is one error at once. Tensors of unknown
    /// encodings are no error.
    pub fn open(path: &Path) -> Result<Gguf> {
        let map = Map::open(path)?;
        let header = parse(path, map.bytes())?;
        let keys = header.metadata.iter().enumerate().map(|(i, e)| (e.key.clone(), i)).collect();
        let names = header.tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        let gguf = Gguf { path: path.to_path_buf(), map, header, keys, names };
        match gguf.get("split.count").and_then(Value::as_u64) {
            Some(count) if count > 1 => Err(Error::unsupported(
                format!("{}: is one of {count} parts of a split model", path.display()),
                "merge them first: llama-gguf-split --merge FIRST-PART OUT",
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

    /// Tensors begin at multiples of this, counted from [`Gguf::data_start`].
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

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.keys.get(key).map(|&i| &self.header.metadata[i].value)
    }

    /// A string that is UTF-8.
    pub fn get_str(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }

    /// An integer, whatever its width and sign in the file.
    pub fn get_u32(&self, key: &str) -> Option<u32> {
        self.get(key)?.as_u64()?.try_into().ok()
    }

    /// An integer, whatever its width and sign in the file.
    pub fn get_u64(&self, key: &str) -> Option<u64> {
        self.get(key)?.as_u64()
    }

    /// A float, of either width in the file.
    pub fn get_f32(&self, key: &str) -> Option<f32> {
        self.get(key)?.as_f64().map(|x| x as f32)
    }

    /// A boolean.
    pub fn get_bool(&self, key: &str) -> Option<bool> {
        self.get(key)?.as_bool()
    }

    /// An array of strings, as bytes: token texts needn't be UTF-8.
    pub fn get_strings(&self, key: &str) -> Option<&[Vec<u8>]> {
        self.get(key)?.as_strings()
    }

    /// An array of integers.
    pub fn get_u32s(&self, key: &str) -> Option<Vec<u32>> {
        self.get(key)?.to_u32s()
    }

    /// An array of floats.
    pub fn get_f32s(&self, key: &str) -> Option<Vec<f32>> {
        self.get(key)?.to_f32s()
    }

    /// An array of booleans.
    pub fn get_bools(&self, key: &str) -> Option<Vec<bool>> {
        self.get(key)?.to_bools()
    }

    /// The architecture's name, which prefixes its keys.
    pub fn arch(&self) -> Result<&str> {
        self.get_str("general.architecture").ok_or_else(|| {
            Error::Model(format!("{}: its metadata lack general.architecture", self.path.display()))
        })
    }

    /// The tensors, in the order of the file's list.
    pub fn tensors(&self) -> &[Tensor] {
        &self.header.tensors
    }

    /// The tensor of a name.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.names.get(name).map(|&i| &self.header.tensors[i])
    }

    /// A tensor's bytes. The tensor must be one of this file's.
    pub fn bytes(&self, t: &Tensor) -> &[u8] {
        self.raw(t.range())
    }

    /// Any bytes of the file. The range must lie inside it.
    pub fn raw(&self, range: Range<u64>) -> &[u8] {
        &self.map.bytes()[range.start as usize..range.end as usize]
    }

    /// Where the list of tensors lies in the file.
    pub fn tensor_infos_span(&self) -> Range<u64> {
        self.header.infos.clone()
    }

    /// Asks the system to read a tensor ahead.
    pub fn advise_will_need(&self, t: &Tensor) {
        self.map.will_need(t.range());
    }

    /// Tells the system that a tensor isn't needed soon.
    pub fn advise_dont_need(&self, t: &Tensor) {
        self.map.dont_need(t.range());
    }

    /// Opens the file again for reading, if it is still the one that was parsed.
    pub fn reopen(&self) -> Result<File> {
        self.map.reopen(&self.path)
    }
}
