//! Splits GGUF files by hand, as llama.cpp's `llama-gguf-split` does, so that the tests don't trust
//! the code that they test. Needs `common` beside it.
#![allow(dead_code)] // Each test file uses its part.

use std::path::{Path, PathBuf};

use refusal_patch::checkpoint::Gguf;

use super::gguf::{entry, header, info};

/// `name-00002-of-00003.gguf` in a folder; `number` counts from 1.
pub fn shard(dir: &Path, name: &str, number: usize, count: usize) -> PathBuf {
    dir.join(format!("{name}-{number:05}-of-{count:05}.gguf"))
}

/// The bytes of the shards of a model; `counts`: how many tensors each of them gets.
pub fn shards(model: &Gguf, counts: &[usize]) -> Vec<Vec<u8>> {
    assert_eq!(counts.iter().sum::<usize>(), model.tensors().len());
    let mut rest = model.tensors();
    let mut all = Vec::new();
    for (number, &n) in counts.iter().enumerate() {
        let (own, more) = rest.split_at(n);
        rest = more;
        let of_model = model.metadata().iter().filter(|_| number == 0);
        let mut entries: Vec<Vec<u8>> =
            of_model.map(|e| model.raw(e.span.clone()).into()).collect();
        entries.push(entry("split.no", 2, &(number as u16).to_le_bytes()));
        entries.push(entry("split.count", 2, &(counts.len() as u16).to_le_bytes()));
        let total = model.tensors().len() as i32;
        entries.push(entry("split.tensors.count", 5, &total.to_le_bytes()));
        // Only the first shard can have another alignment than the default one.
        let alignment = if number == 0 { model.alignment() as usize } else { 32 };
        let mut out = header(model.version(), n as u64, entries.len() as u64);
        out.extend(entries.concat());
        let mut data = Vec::new();
        for t in own {
            out.extend(info(t.name.as_bytes(), &t.dims, t.type_id, data.len() as u64));
            data.extend(model.bytes(t));
            data.resize(data.len().next_multiple_of(alignment), 0);
        }
        out.resize(out.len().next_multiple_of(alignment), 0);
        out.extend(data);
        all.push(out);
    }
    all
}

/// Writes the shards of a model to a folder; their paths.
pub fn split(model: &Gguf, dir: &Path, name: &str, counts: &[usize]) -> Vec<PathBuf> {
    let write = |(i, bytes): (usize, Vec<u8>)| {
        let path = shard(dir, name, i + 1, counts.len());
        std::fs::write(&path, bytes).unwrap();
        path
    };
    shards(model, counts).into_iter().enumerate().map(write).collect()
}

/// Three shards of about as many tensors each.
pub fn thirds(model: &Gguf) -> [usize; 3] {
    let n = model.tensors().len();
    [n / 3, n / 3, n - 2 * (n / 3)]
}
