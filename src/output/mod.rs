//! Writes a patched checkpoint: the input with a few byte ranges replaced, and new metadata.
//!
//! [`stage`] writes everything under a temporary name, so that the caller can open the file and
//! measure it before [`Staged::commit`] gives it its name. Until then OUT doesn't exist, and on any
//! error or interrupt nothing is left.

mod carry;
mod direction;
mod folder;
mod layout;
mod leftovers;
mod parts;
mod peft;
mod place;
mod provenance;
mod sidecar;
mod split;
mod transformers;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tempfile::{NamedTempFile, TempDir};

use crate::checkpoint::{sha256_file, Checkpoint, Gguf, Value};
use crate::progress::Progress;
use crate::{Error, Result};
use layout::{Layout, Piece};
use parts::parts;

pub use carry::can_carry;
pub use direction::{read_direction, write_direction, Saved};
pub use folder::{check_copy, other_files, stage_folder, unpatched};
pub use leftovers::clear_leftovers;
pub use place::{preflight, preflight_beside, write_whole};
pub use provenance::{Provenance, TensorEdit};
pub use sidecar::{Kind, Sidecar};
pub use transformers::load_command;

/// What OUT is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Emit {
    /// IN with the edit folded in.
    Weights,
    /// A LoRA adapter beside IN.
    Lora,
    /// A control vector beside IN.
    ControlVector,
}

/// How much is copied between two looks at whether the user wants to stop.
const CHUNK: u64 = 64 << 20;
/// The block of the file systems that can share blocks between files instead of copying them.
const BLOCK: u64 = 4096;

/// New content for one tensor.
#[derive(Clone, Debug)]
pub struct Patch {
    /// The tensor's name.
    pub tensor: String,
    /// Its new bytes.
    pub bytes: Vec<u8>,
    /// Their encoding: the source's, or a wider one.
    pub type_id: u32,
}

/// A tensor that the source doesn't have.
#[derive(Clone, Debug)]
pub struct Added {
    /// Its name.
    pub name: String,
    /// Its shape in GGUF's order.
    pub dims: Vec<u64>,
    /// Its encoding.
    pub type_id: u32,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// What a new checkpoint is: its source, and what differs from it.
pub struct Plan<'a> {
    /// The input. Never opened for writing.
    pub source: &'a Gguf,
    /// Tensors with new content.
    pub patches: Vec<Patch>,
    /// Tensors to add after the others.
    pub added: Vec<Added>,
    /// Metadata to set: a key that the source has keeps its place, another goes to the end.
    pub metadata: Vec<(String, Value)>,
    /// Metadata keys to leave out.
    pub remove: Vec<String>,
}

impl<'a> Plan<'a> {
    /// A plan that changes nothing yet.
    pub fn new(source: &'a Gguf) -> Plan<'a> {
        Plan {
            source,
            patches: Vec::new(),
            added: Vec::new(),
            metadata: Vec::new(),
            remove: Vec::new(),
        }
    }
}

/// A file that was written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Written {
    /// Where.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Its SHA-256 in lower-case hex.
    pub sha256: String,
}

/// A complete new checkpoint that doesn't have its name yet. Dropping it deletes it.
#[derive(Debug)]
pub struct Staged {
    temp: Temporary,
    force: bool,
    written: Written,
}

#[derive(Debug)]
enum Temporary {
    File(place::Held<NamedTempFile>),
    Folder(place::Held<TempDir>),
    Shards(split::Shards),
}

impl Staged {
    /// Where it lies for now, of a split model its first shard. Close it (drop the model) before
    /// [`Staged::commit`]: Windows doesn't rename open files.
    pub fn path(&self) -> &Path {
        match &self.temp {
            Temporary::File(f) => f.path(),
            Temporary::Folder(d) => d.path(),
            Temporary::Shards(s) => s.first(),
        }
    }

    /// Gives the file its name, at once and whole; the shards of a split model theirs, all or none.
    pub fn commit(self) -> Result<Written> {
        match self.temp {
            Temporary::File(f) => place::rename_held(f, &self.written.path, self.force)?,
            Temporary::Folder(d) => place::rename_folder(d, &self.written.path, self.force)?,
            Temporary::Shards(s) => split::commit(s, self.force)?,
        }
        Ok(self.written)
    }
}

/// Writes a plan's checkpoint to OUT: [`stage`] and [`Staged::commit`]. `force` allows to replace
/// an existing file.
pub fn write(plan: &Plan, out: &Path, force: bool, progress: &dyn Progress) -> Result<Written> {
    stage(plan, out, force, progress)?.commit()
}

/// Writes a plan's checkpoint next to OUT, under a temporary name, safely on disk and hashed. A
/// split model becomes as many shards: OUT names one of them (`out-00001-of-00003.gguf`) or stands
/// for all (`out.gguf`, `out`).
pub fn stage(plan: &Plan, out: &Path, force: bool, progress: &dyn Progress) -> Result<Staged> {
    let parts = parts(plan)?;
    let [part] = &parts[..] else {
        return split::stage(plan.source, &parts, out, force, progress);
    };
    let layout = Layout::new(part)?;
    let total = layout.len();
    let path = part.source.path();
    place::check_target(path, out, force)?;
    place::check_space(out, total)?;
    let source = part.source.reopen()?;
    let temp = place::temporary(out)?;

    progress.start("writing", total, "bytes");
    let mut done = 0;
    copy_pieces(&layout.pieces, &source, path, temp.as_file(), out, (&mut done, total), progress)?;
    // Some systems find only now that there is no space.
    temp.as_file().sync_all().map_err(|e| place::write_error(out, done, total, e))?;
    progress.finish();
    // The source may have been replaced while it was read; a mixture of two files must not get a
    // name.
    part.source.reopen()?;
    let sha256 = sha256_file(temp.path(), progress)?;
    let temp = Temporary::File(temp);
    Ok(Staged { temp, force, written: Written { path: out.to_path_buf(), bytes: total, sha256 } })
}

/// Checks that OUT could be written for a checkpoint, before hours of work: a file or shards for a
/// GGUF, a folder for a folder, a file for what is beside a GGUF.
///
/// # Errors
/// What is in the way.
pub fn preflight_checkpoint(
    source: &Checkpoint,
    emit: Emit,
    out: &Path,
    bytes: u64,
    force: bool,
) -> Result<()> {
    match source {
        Checkpoint::Gguf(g) if emit == Emit::Weights && g.shards().len() > 1 => {
            split::targets(g, out, force)?;
        }
        Checkpoint::Gguf(_) => place::check_beside(source, out, force)?,
        Checkpoint::Folder(f) => folder::check_folder(f, out, force)?,
    }
    place::check_space(out, bytes)
}

/// Writes pieces of `source` (at `path`) and new bytes one after the other. The last pair: bytes of
/// OUT that are done, and all.
fn copy_pieces(
    pieces: &[Piece],
    source: &File,
    path: &Path,
    target: &File,
    out: &Path,
    (done, total): (&mut u64, u64),
    progress: &dyn Progress,
) -> Result<()> {
    for piece in pieces {
        copy_piece(piece, source, target, done, progress).map_err(|e| match e {
            Copy::Interrupted => Error::Interrupted,
            Copy::Read(e) => Error::io(path)(e),
            Copy::Write(e) => place::write_error(out, *done, total, e),
        })?;
    }
    Ok(())
}

/// Why a copy stopped.
enum Copy {
    Interrupted,
    Read(io::Error),
    Write(io::Error),
}

fn copy_piece(
    piece: &Piece,
    mut source: &File,
    mut target: &File,
    done: &mut u64,
    progress: &dyn Progress,
) -> Result<(), Copy> {
    let mut advance = |n: u64| {
        *done += n;
        progress.advance(n);
    };
    match piece {
        Piece::Bytes(bytes) => {
            for chunk in bytes.chunks(CHUNK as usize) {
                progress.check().map_err(|_| Copy::Interrupted)?;
                target.write_all(chunk).map_err(Copy::Write)?;
                advance(chunk.len() as u64);
            }
        }
        Piece::Zeros(n) => {
            io::copy(&mut io::repeat(0).take(*n), &mut target).map_err(Copy::Write)?;
            advance(*n);
        }
        Piece::Source(range) => {
            source.seek(SeekFrom::Start(range.start)).map_err(Copy::Read)?;
            let mut at = range.start;
            while at < range.end {
                progress.check().map_err(|_| Copy::Interrupted)?;
                // First up to a block's edge, then whole blocks: the system can share those between
                // the files.
                let step = if at % BLOCK == 0 { CHUNK } else { BLOCK - at % BLOCK };
                let n = step.min(range.end - at);
                // From file to file: on Linux this is copy_file_range, which shares blocks where it
                // can.
                let copied = io::copy(&mut source.take(n), &mut target).map_err(Copy::Write)?;
                if copied != n {
                    return Err(Copy::Read(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the file has shrunk",
                    )));
                }
                at += n;
                advance(n);
            }
        }
    }
    Ok(())
}
