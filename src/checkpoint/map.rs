//! A file as a read-only slice of memory.
#![allow(unsafe_code)]

use std::fs::{File, Metadata};
use std::ops::Range;
use std::path::Path;

use memmap2::Mmap;

use super::cut_short::Watched;
use crate::{Error, Result};

/// A file that is mapped read-only.
#[derive(Debug)]
pub struct Map {
    // Stands before the map, because fields are dropped in order.
    _watched: Watched,
    mmap: Mmap,
    opened: Metadata,
}

impl Map {
    /// Maps a regular file that isn't empty.
    ///
    /// # Errors
    /// The file can't be opened or mapped, is empty, or isn't a regular file.
    pub fn open(path: &Path) -> Result<Map> {
        // Checked before the file is opened: opening a pipe would wait for a writer.
        let kind = std::fs::metadata(path).map_err(Error::io(path))?;
        if kind.is_dir() {
            return Err(Error::format(path, None, "is a folder; name the file inside it"));
        }
        if !kind.is_file() {
            let what = "is not a regular file; only a regular file can be mapped to read it";
            return Err(Error::format(path, None, what));
        }
        let file = File::open(path).map_err(Error::io(path))?;
        let opened = file.metadata().map_err(Error::io(path))?;
        if opened.len() == 0 {
            return Err(Error::format(path, None, "is empty (0 bytes); download it again"));
        }
        // SAFETY: the map is private to this type, read-only, and hands out only `&[u8]`. Another
        // process may still write to the file or truncate it. Then bytes change under the slice, or
        // a read past the new end ends this process (cut_short.rs explains how). No portable lock
        // prevents this, and every program that maps model files has the same gap. Memory safety
        // here never depends on the values of the bytes.
        let mmap = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        Ok(Map { _watched: Watched::new(&mmap, path), mmap, opened })
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        &self.mmap
    }

    /// Asks the operating system to read a range ahead. Errors are ignored: nothing depends on this
    /// advice.
    pub fn will_need(&self, range: Range<u64>) {
        #[cfg(unix)]
        if let Some((at, len)) = self.clamp(range) {
            let _ = self.mmap.advise_range(memmap2::Advice::WillNeed, at, len);
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    /// Tells the operating system that a range isn't needed soon. Its pages then no longer count as
    /// this process's memory.
    pub fn dont_need(&self, range: Range<u64>) {
        #[cfg(unix)]
        if let Some((at, len)) = self.clamp(range) {
            // SAFETY: `Mmap::map` makes a shared file mapping. Its dropped pages are read from the
            // file again at the next access, so slices that cover them stay valid and see the same
            // bytes.
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

    /// Opens the file again for reading, with a cursor of its own.
    ///
    /// # Errors
    /// The file can't be opened, or was changed or replaced since it was mapped.
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
    true // Off Unix, a file can't be replaced while a map of it is open.
}
