//! SHA-256 of files and of tensors. `diff` compares them to prove that nothing else has changed.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::{Checkpoint, Tensors};
use crate::progress::Progress;
use crate::{Error, Result};

/// Bytes that are hashed between two checks for Ctrl-C: some milliseconds of work.
const CHUNK: usize = 4 << 20;

/// The SHA-256 of a whole file, in lower-case hex.
///
/// # Errors
/// The file can't be read; `Interrupted`.
pub fn sha256_file(path: &Path, progress: &dyn Progress) -> Result<String> {
    sha256_files(&[path], progress)
}

/// The SHA-256 of files one after the other, as `cat FILES | sha256sum` prints it.
///
/// # Errors
/// What the file system says; `Interrupted`.
pub fn sha256_files(paths: &[impl AsRef<Path>], progress: &dyn Progress) -> Result<String> {
    let len = |p: &Path| std::fs::metadata(p).map(|m| m.len()).map_err(Error::io(p));
    let total = paths.iter().map(|p| len(p.as_ref())).sum::<Result<u64>>()?;
    progress.start("hashing", total, "bytes");
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    for path in paths {
        let mut file = File::open(path).map_err(Error::io(path))?;
        loop {
            progress.check()?;
            let n = file.read(&mut buffer).map_err(Error::io(path))?;
            if n == 0 {
                break;
            }
            hasher.update(&buffer[..n]);
            progress.advance(n as u64);
        }
    }
    progress.finish();
    Ok(hex(&hasher.finalize()))
}

/// What names a checkpoint: the SHA-256 of its file, of a split GGUF that of its shards one after
/// the other (`cat NAME-*-of-00003.gguf | sha256sum`, whatever their names), of a folder with
/// several safetensors files that of the lines which `sha256sum` prints for them in order.
///
/// # Errors
/// A file can't be read; `Interrupted`.
pub fn sha256_checkpoint(file: &Checkpoint, progress: &dyn Progress) -> Result<String> {
    let Checkpoint::Folder(folder) = file else { return sha256_files(&file.paths(), progress) };
    let mut lines = Vec::new();
    for (path, _) in folder.files() {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        lines.push((sha256_file(path, progress)?, name));
    }
    if let [(only, _)] = &lines[..] {
        return Ok(only.clone());
    }
    let text: String = lines.iter().map(|(sha256, name)| format!("{sha256}  {name}\n")).collect();
    Ok(hex(&Sha256::digest(text)))
}

/// The SHA-256 of each tensor's bytes, in the order of [`Tensors::tensors`]. Runs on all cores.
///
/// # Errors
/// `Interrupted`.
pub fn sha256_tensors(file: &impl Tensors, progress: &dyn Progress) -> Result<Vec<[u8; 32]>> {
    progress.start("hashing", file.tensors().iter().map(|t| t.len).sum(), "bytes");
    let hash = |t: &super::Tensor| {
        let mut hasher = Sha256::new();
        for chunk in file.bytes(t).chunks(CHUNK) {
            progress.check()?;
            hasher.update(chunk);
            progress.advance(chunk.len() as u64);
        }
        Ok(hasher.finalize().into())
    };
    let hashes = file.tensors().par_iter().map(hash).collect();
    progress.finish();
    hashes
}

/// Bytes in lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
