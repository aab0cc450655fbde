//! Temporary files of runs that were cut off, by a kill or a power cut: the next run deletes them.
//!
//! A run holds a lock on its temporary file or folder, which the system releases when the run ends,
//! however it ends. So a file that can be locked has no owner any more.

use std::fs;
use std::path::Path;

use super::place::folder;

/// What every temporary name begins and ends with.
pub(super) const PREFIX: &str = ".refusal-patch-";
pub(super) const SUFFIX: &str = ".tmp";
/// What was at OUT, inside of a temporary folder, while a new folder takes its place.
pub(super) const ASIDE: &str = "old";

/// Deletes the temporary files beside OUT that no run holds. The result says so, a line a file; it
/// also names what can't be deleted.
pub fn clear_leftovers(out: &Path) -> Vec<String> {
    let mut notes = Vec::new();
    for entry in fs::read_dir(folder(out)).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(PREFIX) && name.ends_with(SUFFIX) {
            notes.extend(clear(&entry.path()));
        }
    }
    notes.sort();
    notes
}

/// Deletes one of them, if it is left over.
fn clear(path: &Path) -> Option<String> {
    let shown = path.display();
    let meta = fs::symlink_metadata(path).ok().filter(|m| m.is_file() || m.is_dir())?;
    if meta.is_dir() && path.join(ASIDE).exists() {
        return Some(format!(
            "{shown}: holds what a run with `force` was about to replace; if that run is over, \
             move \
             `{ASIDE}` in it back, or delete it"
        ));
    }
    let file = lock::of(path)?;
    if !file.is_left() {
        return None;
    }
    let deleted = match meta.is_dir() {
        true => fs::remove_dir_all(path),
        false => fs::remove_file(path),
    };
    Some(match deleted {
        Ok(()) => format!("{shown}: was left by a run that was cut off; it is deleted"),
        Err(e) => {
            format!(
                "{shown}: was left by a run that was cut off and can't be deleted ({e}); delete it"
            )
        }
    })
}

#[cfg(unix)]
pub(super) mod lock {
    use std::fs::{self, File, TryLockError};
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;

    /// A lock on a temporary file or folder, held until this is dropped.
    #[derive(Debug)]
    pub(in super::super) struct Lock {
        _file: File,
        held: bool,
    }

    /// Locks what lies at a path. `None` where another run holds it, or where it is gone.
    pub(in super::super) fn of(path: &Path) -> Option<Lock> {
        let file = File::open(path).ok()?;
        let held = match file.try_lock() {
            Ok(()) => true,
            Err(TryLockError::WouldBlock) => return None,
            // A file system without locks.
            Err(TryLockError::Error(_)) => false,
        };
        // It may have been deleted, and even replaced, between the two steps.
        let id = |m: fs::Metadata| (m.dev(), m.ino());
        let same = file.metadata().ok().map(id) == fs::symlink_metadata(path).ok().map(id);
        same.then_some(Lock { _file: file, held })
    }

    impl Lock {
        /// Whether the lock proves that no run holds the file.
        pub(in super::super) fn is_left(&self) -> bool {
            self.held
        }
    }
}

/// A lock keeps others from reading here, this program's own check of the new file included. So
/// nothing is locked, and nothing is deleted.
#[cfg(not(unix))]
pub(super) mod lock {
    use std::path::Path;

    #[derive(Debug)]
    pub(in super::super) struct Lock;

    pub(in super::super) fn of(_: &Path) -> Option<Lock> {
        Some(Lock)
    }

    impl Lock {
        pub(in super::super) fn is_left(&self) -> bool {
            false
        }
    }
}
