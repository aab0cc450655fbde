//! Where the new file goes: what must hold before, the temporary file, and its name. All that
//! differs between operating systems is here.

use std::fs;
use std::io;
use std::path::Path;

use tempfile::{NamedTempFile, TempDir, TempPath};

use super::leftovers::{lock, ASIDE, PREFIX, SUFFIX};
use crate::checkpoint::Checkpoint;
use crate::{Error, Result};

/// Checks that a file of `bytes` could be written, before hours of work: not the input itself, not
/// an existing file (unless `force`), in an existing folder with enough space.
pub fn preflight(source: &Path, out: &Path, bytes: u64, force: bool) -> Result<()> {
    check_target(source, out, force)?;
    check_space(out, bytes)
}

/// The same for a file beside a model, none of whose files it may replace.
///
/// # Errors
/// What is in the way.
pub fn preflight_beside(model: &Checkpoint, out: &Path, bytes: u64, force: bool) -> Result<()> {
    check_beside(model, out, force)?;
    check_space(out, bytes)
}

pub(super) fn check_beside(model: &Checkpoint, out: &Path, force: bool) -> Result<()> {
    model.paths().into_iter().try_for_each(|path| check_target(path, out, force))
}

/// Writes a small file, whole or not at all.
pub fn write_whole(out: &Path, bytes: &[u8], force: bool) -> Result<()> {
    let mut temp = temporary(out)?;
    io::Write::write_all(&mut *temp, bytes)
        .and_then(|()| temp.as_file().sync_all())
        .map_err(|e| write_error(out, 0, bytes.len() as u64, e))?;
    rename_held(temp, out, force)
}

/// The folder that OUT goes to.
pub(super) fn folder(out: &Path) -> &Path {
    out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// OUT has a name, and its folder exists.
fn check_place(out: &Path) -> Result<()> {
    let shown = out.display();
    if out.file_name().is_none() {
        return Err(Error::unsupported(
            format!("{shown}: names no file"),
            "give the new file a name",
        ));
    }
    let dir = folder(out);
    match fs::metadata(dir) {
        Ok(m) if m.is_dir() => {}
        Ok(_) => {
            return Err(Error::unsupported(
                format!("{}: is not a folder", dir.display()),
                "choose another place",
            ))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let what = format!("{}: the folder doesn't exist", dir.display());
            return Err(Error::unsupported(what, "create it, or choose another place"));
        }
        Err(e) => return Err(Error::io(dir)(e)),
    }
    Ok(())
}

pub(super) fn check_target(source: &Path, out: &Path, force: bool) -> Result<()> {
    check_place(out)?;
    let shown = out.display();
    // Not followed: a link to nowhere is in the way too.
    if let Err(e) = fs::symlink_metadata(out) {
        return match e.kind() {
            io::ErrorKind::NotFound => Ok(()),
            _ => Err(Error::io(out)(e)),
        };
    }
    if same_file(source, out) {
        let what = format!("{shown}: is the input itself, which is never changed");
        return Err(Error::unsupported(what, "choose another name for the output"));
    }
    match fs::metadata(out) {
        Ok(m) if m.is_dir() => {
            return Err(Error::unsupported(
                format!("{shown}: is a folder"),
                "name a file inside it",
            ))
        }
        Ok(m) if !m.is_file() => {
            return Err(Error::unsupported(
                format!("{shown}: is not a regular file"),
                "choose another name",
            ))
        }
        _ => {}
    }
    if !force {
        let what = format!("{shown}: exists already");
        return Err(Error::unsupported(what, "pass `force` to replace it, or choose another name"));
    }
    Ok(())
}

/// The same for a new folder: it lies neither in the input nor around it, and with `force` it
/// replaces nothing but a folder that is empty or holds a model.
pub(super) fn check_folder_target(source: &Path, out: &Path, force: bool) -> Result<()> {
    check_place(out)?;
    let shown = out.display();
    if let Some(ending) = out.extension().filter(|e| *e == "gguf" || *e == "safetensors") {
        let what = format!(
            "{shown}: OUT is a folder here, as IN is, and its name ends in .{}",
            ending.display()
        );
        return Err(Error::unsupported(what, "name a folder"));
    }
    let source = fs::canonicalize(source).map_err(Error::io(source))?;
    let place = fs::canonicalize(folder(out)).map_err(Error::io(folder(out)))?;
    let target = place.join(out.file_name().unwrap_or_default());
    let target = fs::canonicalize(&target).unwrap_or(target);
    if target.starts_with(&source) || source.starts_with(&target) {
        let what = format!(
            "{shown}: is the input's folder, or lies in it or around it; the input is \
                never changed"
        );
        return Err(Error::unsupported(what, "choose another place for the output"));
    }
    match fs::symlink_metadata(out) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::io(out)(e)),
        Ok(m) if !m.is_dir() => {
            return Err(Error::unsupported(
                format!("{shown}: is not a folder"),
                "choose another name",
            ))
        }
        Ok(_) => {}
    }
    if !force {
        let what = format!("{shown}: exists already");
        return Err(Error::unsupported(what, "pass `force` to replace it, or choose another name"));
    }
    let empty = fs::read_dir(out).map_err(Error::io(out))?.next().is_none();
    let model = ["config.json", "adapter_config.json"].iter().any(|n| out.join(n).is_file());
    if !empty && !model {
        let what =
            format!("{shown}: holds no model (no config.json), and `force` replaces models only");
        return Err(Error::unsupported(what, "empty it, or choose another name"));
    }
    Ok(())
}

/// Whether two paths lead to one file, over symbolic and hard links.
#[cfg(unix)]
fn same_file(a: &Path, b: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let id = |p| fs::metadata(p).ok().map(|m: fs::Metadata| (m.dev(), m.ino()));
    id(a).is_some() && id(a) == id(b)
}

/// Whether two paths lead to one file, over symbolic links. A hard link goes unnoticed, which does
/// no harm: the rename replaces that name and leaves the input's content alone.
#[cfg(not(unix))]
fn same_file(a: &Path, b: &Path) -> bool {
    fs::canonicalize(a).is_ok_and(|a| fs::canonicalize(b).is_ok_and(|b| a == b))
}

/// Checks for free space. A file system that doesn't tell is believed to have it.
pub(super) fn check_space(out: &Path, needed: u64) -> Result<()> {
    let dir = folder(out);
    match fs4::statvfs(dir) {
        Ok(s) if s.total_space() > 0 && s.available_space() < needed => Err(Error::Limit(format!(
            "{}: the new file needs {} and {} are free; free some space, or choose another place",
            dir.display(),
            size(needed),
            size(s.available_space())
        ))),
        _ => Ok(()),
    }
}

/// A size for people, and exact.
fn size(bytes: u64) -> String {
    match bytes {
        0..10_000_000 => format!("{bytes} bytes"),
        10_000_000..10_000_000_000 => format!("{} MB ({bytes} bytes)", bytes / 1_000_000),
        _ => format!("{} GB ({bytes} bytes)", bytes / 1_000_000_000),
    }
}

/// A temporary file or folder that other runs leave alone, since this one holds a lock on it.
#[derive(Debug)]
pub(super) struct Held<T> {
    // Dropped, and so deleted, before the lock.
    temp: T,
    _lock: Option<lock::Lock>,
}

impl<T> std::ops::Deref for Held<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.temp
    }
}

impl<T> std::ops::DerefMut for Held<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.temp
    }
}

impl<T: AsRef<Path>> Held<T> {
    /// Another run may take a new file for a leftover before it's locked. Then there is another
    /// one.
    fn new(create: impl Fn() -> io::Result<T>) -> io::Result<Held<T>> {
        for _ in 0..8 {
            let temp = create()?;
            if let Some(lock) = lock::of(temp.as_ref()) {
                return Ok(Held { temp, _lock: Some(lock) });
            }
        }
        Ok(Held { temp: create()?, _lock: None })
    }
}

impl Held<TempDir> {
    /// Leaves the folder where it is.
    pub(super) fn keep(self) {
        let _ = self.temp.keep();
    }
}

/// A new file in OUT's folder (a rename doesn't cross file systems), with the permissions that any
/// program's new file would have. It is deleted when it's dropped.
pub(super) fn temporary(out: &Path) -> Result<Held<NamedTempFile>> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(PREFIX).suffix(SUFFIX);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    Held::new(|| builder.tempfile_in(folder(out))).map_err(Error::io(folder(out)))
}

/// A new folder beside OUT, deleted with all that is in it when it's dropped.
pub(super) fn temporary_folder(out: &Path) -> Result<Held<TempDir>> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(PREFIX).suffix(SUFFIX);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
    Held::new(|| builder.tempdir_in(folder(out))).map_err(Error::io(folder(out)))
}

/// What a failed write means to the user.
pub(super) fn write_error(out: &Path, done: u64, total: u64, e: io::Error) -> Error {
    let why = match e.kind() {
        io::ErrorKind::StorageFull => "no space is left on the device",
        io::ErrorKind::QuotaExceeded => "the user's disk quota is used up",
        io::ErrorKind::FileTooLarge => "the file system doesn't take files of this size",
        _ => return Error::io(out)(e),
    };
    Error::Limit(format!(
        "{}: {why} (after {done} of {}); nothing was left behind",
        out.display(),
        size(total)
    ))
}

/// Gives a finished file its name, as [`rename`] does.
pub(super) fn rename_held(held: Held<NamedTempFile>, out: &Path, force: bool) -> Result<()> {
    let Held { temp, _lock } = held;
    rename(temp.into_temp_path(), out, force)
}

/// Gives a finished file its name. With `force` it replaces a file of that name; if the name is a
/// symbolic link, the link is replaced, not the file that it leads to.
pub(super) fn rename(temp: TempPath, out: &Path, force: bool) -> Result<()> {
    let persisted = if force {
        temp.persist(out)
    } else {
        temp.persist_noclobber(out).or_else(|failed| match failed.error.kind() {
            io::ErrorKind::AlreadyExists => Err(failed),
            // FAT and some network file systems can't rename without replacing; so look, then
            // rename.
            _ if fs::symlink_metadata(out).is_err() => failed.path.persist(out),
            _ => Err(failed),
        })
    };
    persisted.map_err(|failed| match failed.error.kind() {
        io::ErrorKind::AlreadyExists => Error::unsupported(
            format!("{}: has appeared while the output was being made", out.display()),
            "pass `force` to replace it, or choose another name",
        ),
        _ => Error::io(out)(failed.error),
    })?;
    sync_folder(folder(out));
    Ok(())
}

/// Gives a finished folder its name. With `force` a folder of that name is set aside first, and
/// deleted afterwards.
pub(super) fn rename_folder(held: Held<TempDir>, out: &Path, force: bool) -> Result<()> {
    let Held { temp, _lock } = held;
    sync_folder(temp.path());
    let old = match fs::symlink_metadata(out) {
        Err(_) => None,
        Ok(_) if !force => {
            return Err(Error::unsupported(
                format!("{}: has appeared while the output was being made", out.display()),
                "pass `force` to replace it, or choose another name",
            ))
        }
        Ok(_) => {
            let aside = temporary_folder(out)?;
            fs::rename(out, aside.path().join(ASIDE)).map_err(Error::io(out))?;
            Some(aside)
        }
    };
    if let Err(e) = fs::rename(temp.path(), out) {
        if let Some(aside) = &old {
            let _ = fs::rename(aside.path().join(ASIDE), out);
        }
        return Err(Error::io(out)(e));
    }
    // Its place is empty now: there is nothing to delete.
    let _ = temp.keep();
    sync_folder(folder(out));
    Ok(())
}

/// Makes the new name survive a power cut. The file is complete and named by now, so a file system
/// that can't do this is no reason to fail.
pub(super) fn sync_folder(dir: &Path) {
    #[cfg(unix)]
    if let Ok(dir) = fs::File::open(dir) {
        let _ = dir.sync_all();
    }
    #[cfg(not(unix))]
    let _ = dir;
}
