//! An open GGUF model: metadata in file order, tensors, and their bytes by memory map.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use super::{split, Entry, Shard, Tensor, Value};
use crate::{Error, Result};

/// A GGUF model (version 2 or 3) in one file or in shards, mapped read-only.
#[derive(Debug)]
pub struct Gguf {
    /// One at least.
    shards: Vec<Shard>,
    keys: HashMap<String, usize>,
    tensors: Vec<Tensor>,
    names: HashMap<String, usize>,
}

impl Gguf {
    /// Opens and checks a file. Every count and length in it is checked against the bytes that
    /// there are, so that a damaged or hostile file is one error at once. Tensors of unknown
    /// encodings are no error.
    /// Any shard of a split model opens all of it.
    ///
    /// # Errors
    /// A file that is missing or damaged; shards that don't belong together.
    pub fn open(path: &Path) -> Result<Gguf> {
        let shards = split::open(path)?;
        let tensors: Vec<Tensor> = shards.iter().flat_map(Shard::tensors).cloned().collect();
        let metadata = shards[0].metadata();
        let keys = metadata.iter().enumerate().map(|(i, e)| (e.key.clone(), i)).collect();
        let names = tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        Ok(Gguf { shards, keys, tensors, names })
    }

    /// Its files in order, those of [`Tensor::file`]: one, or the shards of a split model.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// The path of the file, of a split model that of its first shard.
    pub fn path(&self) -> &Path {
        self.shards[0].path()
    }

    /// The format's version: 2 or 3.
    pub fn version(&self) -> u32 {
        self.shards[0].version()
    }

    /// The first file's tensors begin at multiples of this, counted from [`Gguf::data_start`].
    pub fn alignment(&self) -> u64 {
        self.shards[0].alignment()
    }

    /// Where the data of the first file's tensors begin. Past the end in a file without tensors
    /// that ends with its header.
    pub fn data_start(&self) -> u64 {
        self.shards[0].data_start()
    }

    /// The size of its files together.
    pub fn file_len(&self) -> u64 {
        self.shards.iter().map(Shard::file_len).sum()
    }

    /// The metadata, in file order: of a split model those of its first shard.
    pub fn metadata(&self) -> &[Entry] {
        self.shards[0].metadata()
    }

    /// The value of a metadata key, if the file has the key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.keys.get(key).map(|&i| &self.metadata()[i].value)
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
            Error::Model(format!(
                "{}: its metadata lack general.architecture",
                self.path().display()
            ))
        })
    }

    /// The tensors, file by file in the order of each file's list.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.names.get(name).map(|&i| &self.tensors[i])
    }

    /// A tensor's bytes. The tensor must be one of this model's.
    pub fn bytes(&self, t: &Tensor) -> &[u8] {
        self.shards[t.file].raw(t.range())
    }

    /// Any bytes of the first file. The range must lie inside it.
    pub fn raw(&self, range: Range<u64>) -> &[u8] {
        self.shards[0].raw(range)
    }

    /// Where the list of tensors lies in the first file.
    pub fn tensor_infos_span(&self) -> Range<u64> {
        self.shards[0].tensor_infos_span()
    }

    /// Asks the operating system to read tensor `t` ahead.
    pub fn advise_will_need(&self, t: &Tensor) {
        self.shards[t.file].map().will_need(t.range());
    }

    /// Tells the operating system that tensor `t` isn't needed soon.
    pub fn advise_dont_need(&self, t: &Tensor) {
        self.shards[t.file].map().dont_need(t.range());
    }
}
