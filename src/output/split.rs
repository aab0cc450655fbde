//! Writes a split model: one new shard for each of the input's, all of them or none.
//!
//! The shards are written into a temporary folder beside OUT, under their own names, so that they
//! open as a model before they have their place. A shard without any change is a copy.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use tempfile::{TempDir, TempPath};

use super::layout::Layout;
use super::leftovers::ASIDE;
use super::parts::Part;
use super::{copy_pieces, place, Staged, Temporary, Written};
use crate::checkpoint::{sha256_files, Gguf, ShardName};
use crate::progress::Progress;
use crate::{Error, Result};

/// Shards that are complete and lie in a temporary folder.
#[derive(Debug)]
pub(super) struct Shards {
    temp: place::Held<TempDir>,
    /// Where they lie and where they go, in order.
    staged: Vec<PathBuf>,
    targets: Vec<PathBuf>,
}

impl Shards {
    /// The first shard, by which the model opens.
    pub fn first(&self) -> &Path {
        &self.staged[0]
    }
}

/// Writes the parts of a split model, safely on disk and hashed.
pub(super) fn stage(
    source: &Gguf,
    parts: &[Part],
    out: &Path,
    force: bool,
    progress: &dyn Progress,
) -> Result<Staged> {
    let layouts = parts.iter().map(Layout::new).collect::<Result<Vec<_>>>()?;
    let total = layouts.iter().map(Layout::len).sum();
    let targets = targets(source, out, force)?;
    place::check_space(out, total)?;
    let temp = place::temporary_folder(out)?;
    let staged: Vec<PathBuf> = targets.iter().map(|t| inside(temp.path(), t)).collect();

    progress.start("writing", total, "bytes");
    let mut done = 0;
    for ((part, layout), path) in parts.iter().zip(&layouts).zip(&staged) {
        let (old, new) = (part.source.reopen()?, File::create(path).map_err(Error::io(path))?);
        let from = part.source.path();
        copy_pieces(&layout.pieces, &old, from, &new, out, (&mut done, total), progress)?;
        // Some systems find only now that there is no space.
        new.sync_all().map_err(|e| place::write_error(out, done, total, e))?;
    }
    progress.finish();
    // A shard may have been replaced while the others were read; a mixture must not get a name.
    for part in parts {
        part.source.reopen()?;
    }
    let sha256 = sha256_files(&staged, progress)?;
    let written = Written { path: targets[0].clone(), bytes: total, sha256 };
    Ok(Staged { temp: Temporary::Shards(Shards { temp, staged, targets }), force, written })
}

/// Where the shards of OUT go, each of which can be written. OUT is the name of a shard of as many
/// as the input has, or a name without a number: `out.gguf` and `out` stand for
/// `out-00001-of-00003.gguf` and its siblings.
///
/// # Errors
/// A number that contradicts the input's; what is in the way of a shard.
pub(super) fn targets(source: &Gguf, out: &Path, force: bool) -> Result<Vec<PathBuf>> {
    if out.file_name().is_none() || out.is_dir() {
        place::check_target(source.path(), out, force)?;
    }
    let count = source.shards().len();
    let name = match ShardName::of(out) {
        Some(name) if name.count == count => name,
        Some(ShardName { prefix, number, count: other }) => {
            let what = format!(
                "{}: is the name of shard {number} of {other}, and the input has {count} shards, \
                 as the output will",
                out.display()
            );
            let name = ShardName { prefix, number: 1, count }.path(1);
            return Err(Error::unsupported(what, format!("name it {}", name.display())));
        }
        None => {
            let plain = out.extension() == Some(OsStr::new("gguf"));
            let prefix = if plain { out.with_extension("") } else { out.to_path_buf() };
            ShardName { prefix, number: 1, count }
        }
    };
    let targets: Vec<PathBuf> = name.paths().collect();
    for target in &targets {
        for shard in source.shards() {
            place::check_target(shard.path(), target, force)?;
        }
    }
    Ok(targets)
}

/// Gives the shards their names. On an error none of them has one, and with `force` the files that
/// were to be replaced are back.
pub(super) fn commit(shards: Shards, force: bool) -> Result<()> {
    let Shards { temp, staged, targets } = shards;
    place::sync_folder(temp.path());
    let new = staged.iter().map(TempPath::try_from_path).collect::<io::Result<Vec<_>>>();
    let new = new.map_err(Error::io(temp.path()))?;
    let aside = if force { set_aside(&targets)? } else { None };
    // The first shard comes last: without the first the others open as nothing.
    for (i, new) in new.into_iter().enumerate().rev() {
        if let Err(e) = place::rename(new, &targets[i], force) {
            for (placed, from) in targets.iter().zip(&staged).skip(i + 1) {
                let _ = fs::rename(placed, from);
            }
            put_back(aside, &targets);
            return Err(e);
        }
    }
    Ok(())
}

/// Moves what is at the targets into a temporary folder, which deletes it in the end. `None` where
/// nothing is.
fn set_aside(targets: &[PathBuf]) -> Result<Option<place::Held<TempDir>>> {
    let mut there = Vec::new();
    for target in targets {
        match fs::symlink_metadata(target) {
            Ok(meta) if meta.is_dir() => {
                let what = format!("{}: is a folder", target.display());
                return Err(Error::unsupported(what, "choose another name for the output"));
            }
            Ok(_) => there.push(target),
            Err(_) => {}
        }
    }
    let Some(first) = there.first() else { return Ok(None) };
    let aside = place::temporary_folder(first)?;
    fs::create_dir(aside.path().join(ASIDE)).map_err(Error::io(aside.path()))?;
    for target in there {
        if let Err(e) = fs::rename(target, inside(&aside.path().join(ASIDE), target)) {
            put_back(Some(aside), targets);
            return Err(Error::io(target)(e));
        }
    }
    Ok(Some(aside))
}

/// A file of a target's name in another folder.
fn inside(folder: &Path, target: &Path) -> PathBuf {
    folder.join(target.file_name().unwrap_or_default())
}

/// Moves what was set aside back. What can't be moved stays in the temporary folder, which the next
/// run names.
fn put_back(aside: Option<place::Held<TempDir>>, targets: &[PathBuf]) {
    let Some(aside) = aside else { return };
    let old = aside.path().join(ASIDE);
    for target in targets {
        let _ = fs::rename(inside(&old, target), target);
    }
    // Fails where files are left.
    if fs::remove_dir(old).is_err() {
        aside.keep();
    }
}
