//! Builds GGUF files by hand, byte by byte, so that the tests don't trust the code that they test.

use std::path::{Path, PathBuf};

pub fn string(s: &[u8]) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s].concat()
}

/// A key with a typed value: `content` is what follows the type.
pub fn entry(key: &str, kind: u32, content: &[u8]) -> Vec<u8> {
    [&string(key.as_bytes())[..], &kind.to_le_bytes(), content].concat()
}

pub fn text(key: &str, value: &str) -> Vec<u8> {
    entry(key, 8, &string(value.as_bytes()))
}

pub fn u32_entry(key: &str, value: u32) -> Vec<u8> {
    entry(key, 4, &value.to_le_bytes())
}

pub fn strings(key: &str, values: &[&[u8]]) -> Vec<u8> {
    let mut content = [&8u32.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
    values.iter().for_each(|v| content.extend(string(v)));
    entry(key, 9, &content)
}

pub fn f32_array(key: &str, values: &[f32]) -> Vec<u8> {
    let mut content = [&6u32.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
    values.iter().for_each(|v| content.extend(v.to_le_bytes()));
    entry(key, 9, &content)
}

pub fn info(name: &[u8], dims: &[u64], type_id: u32, offset: u64) -> Vec<u8> {
    let mut out = string(name);
    out.extend((dims.len() as u32).to_le_bytes());
    dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
    out.extend(type_id.to_le_bytes());
    out.extend(offset.to_le_bytes());
    out
}

pub fn header(version: u32, tensors: u64, entries: u64) -> Vec<u8> {
    [b"GGUF", &version.to_le_bytes()[..], &tensors.to_le_bytes(), &entries.to_le_bytes()].concat()
}

pub struct TestTensor {
    pub name: &'static str,
    pub dims: Vec<u64>,
    pub type_id: u32,
    pub bytes: Vec<u8>,
}

pub fn tensor(name: &'static str, dims: &[u64], type_id: u32, len: usize) -> TestTensor {
    let bytes = (0..len).map(|i| (i * 7 + name.len() * 31) as u8).collect();
    TestTensor { name, dims: dims.to_vec(), type_id, bytes }
}

/// A whole file: entries as given, tensors one after another at multiples of `alignment`.
pub fn file(
    version: u32,
    alignment: usize,
    entries: &[Vec<u8>],
    tensors: &[TestTensor],
) -> Vec<u8> {
    let mut out = header(version, tensors.len() as u64, entries.len() as u64);
    out.extend(entries.concat());
    let mut data = Vec::new();
    for t in tensors {
        out.extend(info(t.name.as_bytes(), &t.dims, t.type_id, data.len() as u64));
        data.extend(&t.bytes);
        data.resize(data.len().next_multiple_of(alignment), 0);
    }
    out.resize(out.len().next_multiple_of(alignment), 0);
    out.extend(data);
    out
}

/// A small model with oddities of real files that strict readers refuse: a hyphenated key, a token
/// that isn't UTF-8, tensors of unknown types.
pub fn model(version: u32) -> Vec<u8> {
    let entries = [
        text("general.architecture", "gpt-oss"),
        u32_entry("gpt-oss.block_count", 2),
        strings("tokenizer.ggml.tokens", &[b"a", b"\xff\xfe", "é".as_bytes(), b""]),
        f32_array("tokenizer.ggml.scores", &[0.0, -1.5, f32::NAN, 3.0]),
        entry("general.tags", 9, &strings("", &[b"chat"])[12..]),
        entry("gpt-oss.float", 6, &1.5f32.to_le_bytes()),
        entry("gpt-oss.flag", 7, &[1]),
        entry("gpt-oss.wide", 10, &7u64.to_le_bytes()),
        entry("gpt-oss.signed", 5, &(-3i32).to_le_bytes()),
    ];
    let tensors = [
        tensor("token_embd.weight", &[64, 4], 0, 1024),
        tensor("blk.0.ffn_down.weight", &[256, 3], 12, 432),
        tensor("blk.0.mystery.weight", &[11, 3], 77, 41),
        tensor("blk.0.attn_output.weight", &[32, 2], 8, 68),
        tensor("output.weight", &[5], 99, 23),
    ];
    file(version, 32, &entries, &tensors)
}

/// A folder for a test, with a file in it.
pub fn saved(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("in.gguf");
    std::fs::write(&path, bytes).unwrap();
    (dir, path)
}

/// The names in a folder, sorted.
pub fn listing(dir: &Path) -> Vec<String> {
    let name = |e: std::io::Result<std::fs::DirEntry>| {
        e.unwrap().file_name().to_string_lossy().into_owned()
    };
    let mut names: Vec<String> = std::fs::read_dir(dir).unwrap().map(name).collect();
    names.sort();
    names
}
