//! Writes a patched Hugging Face folder: a copy of the input's with a few byte ranges of its
//! safetensors files replaced.
//!
//! Headers stay as they are, so a file of its own, [`RECORD`], says what was done. Its name doesn't
//! end in `.safetensors`: servers load every such file of a folder.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::layout::Piece;
use super::{copy_pieces, place, Patch, Provenance, Staged, Temporary, Written};
use crate::checkpoint::{sha256_checkpoint, Checkpoint, Folder, Tensor};
use crate::progress::Progress;
use crate::{Error, Result};

/// The record of a patch in a folder.
pub(super) const RECORD: &str = "refusal_patch.json";
/// The deepest folder in folders that is copied.
const DEEPEST: usize = 16;

/// A file to write: where it comes from, and its name in the new folder.
struct Entry {
    from: PathBuf,
    to: PathBuf,
    bytes: u64,
}

/// Writes a folder with some tensors replaced next to OUT, under a temporary name, safely on disk
/// and hashed.
///
/// # Errors
/// What the file system says; OUT exists (without `force`) or is the input; a patch that doesn't
/// fit its tensor.
pub fn stage_folder(
    folder: &Folder,
    patches: &[Patch],
    record: &Provenance,
    out: &Path,
    force: bool,
    progress: &dyn Progress,
) -> Result<Staged> {
    let mut touched: HashMap<&Path, Vec<(&Tensor, &Patch)>> = HashMap::new();
    let files: Vec<&Path> = folder.files().map(|(path, _)| path).collect();
    for p in patches {
        let wrong = |what: &str| {
            Error::Model(format!("{}: tensor `{}` {what}", folder.path().display(), p.tensor))
        };
        let t = folder.tensor(&p.tensor).ok_or_else(|| wrong("is not in the checkpoint"))?;
        if p.type_id != t.type_id || p.bytes.len() as u64 != t.len {
            return Err(wrong(
                "can't change its type or size: safetensors headers stay as they are",
            ));
        }
        let list = touched.entry(files[t.file]).or_default();
        if list.iter().any(|(other, _)| other.name == t.name) {
            return Err(wrong("is patched twice"));
        }
        list.push((t, p));
    }
    let Copied { entries, .. } = entries(folder)?;
    let total = entries.iter().map(|e| e.bytes).sum();
    check_folder(folder, out, force)?;
    place::check_space(out, total)?;
    let temp = place::temporary_folder(out)?;
    progress.start("writing", total, "bytes");
    let mut done = 0;
    for e in &entries {
        let target = temp.path().join(&e.to);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).map_err(Error::io(parent))?;
        }
        let mut pieces = Vec::new();
        let mut at = 0;
        let mut list = touched.remove(e.from.as_path()).unwrap_or_default();
        list.sort_by_key(|(t, _)| t.offset);
        for (t, p) in list {
            pieces.push(Piece::Source(at..t.offset));
            pieces.push(Piece::Bytes(p.bytes.as_slice().into()));
            at = t.range().end;
        }
        pieces.push(Piece::Source(at..e.bytes));
        let weights = folder.files().find(|(path, _)| *path == e.from);
        let open = || match weights {
            Some((path, map)) => map.reopen(path),
            None => File::open(&e.from).map_err(Error::io(&e.from)),
        };
        let new = File::create(&target).map_err(Error::io(&target))?;
        copy_pieces(&pieces, &open()?, &e.from, &new, out, (&mut done, total), progress)?;
        new.sync_all().map_err(|e| place::write_error(out, done, total, e))?;
        // A mixture of two versions of a file must not get a name.
        open()?;
    }
    progress.finish();
    place::write_whole(&temp.path().join(RECORD), (record.to_json()? + "\n").as_bytes(), false)?;
    let written = Checkpoint::open(temp.path())?;
    let sha256 = sha256_checkpoint(&written, progress)?;
    let written = Written { path: out.to_path_buf(), bytes: written.file_len(), sha256 };
    Ok(Staged { temp: Temporary::Folder(temp), force, written })
}

/// Files of weights that a copy takes over unpatched: other forms of the same model.
pub fn unpatched(folder: &Folder) -> Result<Vec<String>> {
    let is_weights = |e: &Entry| {
        let ending = e.to.extension().and_then(|x| x.to_str()).unwrap_or_default();
        ["safetensors", "bin", "pt", "pth", "gguf", "onnx", "h5", "msgpack"].contains(&ending)
            && !folder.files().any(|(path, _)| path == e.from)
    };
    Ok(entries(folder)?
        .entries
        .iter()
        .filter(|e| is_weights(e))
        .map(|e| e.to.display().to_string())
        .collect())
}

/// Names of the files of a folder that hold no weights of the checkpoint and no record of a patch.
///
/// # Errors
/// What the file system says.
pub fn other_files(folder: &Folder) -> Result<Vec<(String, PathBuf)>> {
    let other = |e: &Entry| !folder.files().any(|(path, _)| path == e.from);
    let named = entries(folder)?
        .entries
        .into_iter()
        .filter(other)
        .map(|e| (e.to.display().to_string(), e.from));
    Ok(named.collect())
}

/// What a copy of a folder consists of.
#[derive(Default)]
struct Copied {
    entries: Vec<Entry>,
    /// Links to nowhere, which it leaves out.
    dead: Vec<PathBuf>,
}

/// What a patched folder will consist of, before hours of work: the bytes of its files, each of
/// which can be read, and what the user should know of it.
///
/// # Errors
/// A file that can't be read, or a folder that can't be copied.
pub fn check_copy(folder: &Folder) -> Result<(u64, Vec<String>)> {
    let Copied { entries, dead } = entries(folder)?;
    for e in &entries {
        File::open(&e.from).map_err(Error::io(&e.from))?;
    }
    if let Some((path, _)) =
        folder.files().find(|(path, _)| !entries.iter().any(|e| e.from == *path))
    {
        let what = format!("{}: would not be copied", path.display());
        return Err(Error::unsupported(what, "name the model's folder in place of the file"));
    }
    let note = |p: &PathBuf| format!("{}: is a link to nowhere, so OUT won't have it", p.display());
    Ok((entries.iter().map(|e| e.bytes).sum(), dead.iter().map(note).collect()))
}

/// Everything that a copy takes over. Of a single file: itself, under the name that loaders look
/// for, and what is beside it.
fn entries(folder: &Folder) -> Result<Copied> {
    let mut copied = Copied::default();
    walk(folder.dir(), Path::new(""), 0, &mut copied)?;
    let all = &mut copied.entries;
    if folder.path() != folder.dir() {
        all.retain(|e| {
            let name = e.to.to_string_lossy();
            e.from == folder.path()
                || !(name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json"))
        });
        for e in all.iter_mut().filter(|e| e.from == folder.path()) {
            e.to = "model.safetensors".into();
        }
    }
    all.sort_by(|a, b| a.to.cmp(&b.to));
    copied.dead.sort();
    Ok(copied)
}

fn walk(dir: &Path, inside: &Path, depth: usize, all: &mut Copied) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(Error::io(dir))? {
        let entry = entry.map_err(Error::io(dir))?;
        let (from, to) = (entry.path(), inside.join(entry.file_name()));
        // Links are followed: a downloaded folder consists of them.
        let meta = match fs::metadata(&from) {
            Ok(meta) => meta,
            // A file that was never downloaded, or deleted since. The model's own files are open by
            // now.
            Err(e) if e.kind() == ErrorKind::NotFound && fs::symlink_metadata(&from).is_ok() => {
                all.dead.push(from);
                continue;
            }
            Err(e) => return Err(Error::io(&from)(e)),
        };
        if meta.is_dir() {
            // The records of git and of downloads belong to the folder that they are in.
            if entry.file_name().to_string_lossy().starts_with('.') {
                continue;
            }
            if depth == DEEPEST {
                let what = format!("folders more than {DEEPEST} deep");
                return Err(Error::unsupported(
                    format!("{}: {what}", from.display()),
                    "move the model's own files into a folder of their own",
                ));
            }
            walk(&from, &to, depth + 1, all)?;
        } else if meta.is_file() && to != Path::new(RECORD) {
            all.entries.push(Entry { from, to, bytes: meta.len() });
        }
    }
    Ok(())
}

/// What must hold for a new folder, besides what holds for a file: it lies neither in the input nor
/// around it, and with `force` replaces nothing but a model.
pub(super) fn check_folder(folder: &Folder, out: &Path, force: bool) -> Result<()> {
    place::check_folder_target(folder.dir(), out, force)
}
