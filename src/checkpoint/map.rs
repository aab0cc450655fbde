//! A file as a slice of memory.
#![allow(unsafe_code)]

use std::fs::{File, Metadata};
use std::ops::Range;
use std::path::Path;

use memmap2::Mmap;

use super::cut_short::Watched;
use crate::{Error, Result};

/// A file, mapped read-only.
#[derive(Debug)]
pub struct Map {
    // Before the map: fields are dropped in order.
    _watched: Watched,
    mmap: Mmap,
    opened: Metadata,
}

impl Map {
    /// Maps a regular file that isn't empty.
    pub fn open(path: &Path) -> Result<Map> {
        // Looked at before opening, which on a pipe would wait for a writer.
        let kind = std::fs::metadata(path).map_err(Error::io(path))?;
        if kind.is_dir() {
            return Err(Error::format(path, None, "is a folder; name the file inside it"));
        }
        if !kind.is_file() {
            let what = "is not a regular file; a checkpoint is read by mapping it, which needs one";
            return Err(Error::format(path, None, what));
        }
        let file = File::open(path).map_err(Error::io(path))?;
        let opened = file.metadata().map_err(Error::io(path))?;
        if opened.len() == 0 {
            return Err(Error::format(path, None, "is empty (0 bytes); download it again"));
        }
        // SAFETY: the map is private to this type, read-only, and hands out only `&[u8]`. What
        // can't be ruled out is another process that writes to or truncates the file meanwhile:
        // bytes would change under the slice, or a read past the new end would end this process
        // (cut_short.rs says why). No portable lock prevents it, every program that maps model
        // files lives with it, and nothing here depends for memory safety on the bytes' values.
        let mmap = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        Ok(Map { _watched: Watched::new(&mmap, path), mmap, opened })
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        &self.mmap
    }

    /// Asks the system to read a range ahead. Advice: nothing depends on it, errors are ignored.
    pub fn will_need(&self, range: Range<u64>) {
        #[cfg(unix)]
        if let Some((at, len)) = self.clamp(range) {
            let _ = self.mmap.advise_range(memmap2::Advice::WillNeed, at, len);
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    /// Tells the system that a range isn't needed soon, so that it counts no longer as this
    /// process's memory.
    pub fn dont_need(&self, range: Range<u64>) {
        #[cfg(unix)]
        if let Some((at, len)) = self.clamp(range) {
            // SAFETY: on a shared file mapping (which `Mmap::map` makes) the pages are dropped and
            // read from the file again at the next access, so slices that cover them stay valid and
            // see the same bytes.
            let _ = unsafe {
                self.mmap.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, at, len)
            };
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    #[cfg(unix)]
    fn clamp(&self, range: Range<u64>) -> Option<(usize, usize)> {
        let len = self.mmap.len() as u64;
        let (start, end) = (range.start.min(len), range.end.min(len));
        (start < end).then(|| (start as usize, (end - start) as usize))
    }

    /// Opens the file again for reading (with a cursor of its own) and makes sure that it's still
    /// the one mapped.
    pub fn reopen(&self, path: &Path) -> Result<File> {
        let file = File::open(path).map_err(Error::io(path))?;
        let now = file.metadata().map_err(Error::io(path))?;
        let unchanged = same_file(&now, &self.opened)
            && now.len() == self.opened.len()
            && now.modified().ok() == self.opened.modified().ok();
        if !unchanged {
            return Err(Error::format(
                path,
                None,
                "was changed or replaced while it was in use; start again",
            ));
        }
        Ok(file)
    }
}

#[cfg(unix)]
fn same_file(a: &Metadata, b: &Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

#[cfg(not(unix))]
fn same_file(_: &Metadata, _: &Metadata) -> bool {
    true // An open map keeps other systems from replacing the file.
}
