//! One error type for the library: a variant for each kind of actor that caused it.

use std::path::{Path, PathBuf};

/// The library's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, where, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused: file missing, no permission, no space.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder concerned.
        path: PathBuf,
        /// The system's own error.
        source: std::io::Error,
    },
    /// The file's bytes are not what its format says.
    #[error("{}: {what}{}", path.display(), at(*offset))]
    Format {
        /// The file.
        path: PathBuf,
        /// Byte offset in the file, where one is known.
        offset: Option<u64>,
        /// What was found, and what was expected.
        what: String,
    },
    /// The file is in order, but this program can't do what it needs.
    #[error("{what}; {hint}")]
    Unsupported {
        /// What is not supported.
        what: String,
        /// What to do instead.
        hint: String,
    },
    /// The model contradicts itself: a missing tensor, a shape that its metadata does not allow.
    #[error("{0}")]
    Model(String),
    /// A limit of this machine or one that the user set.
    #[error("{0}")]
    Limit(String),
    /// A gate failed (exit code 3): no edit restores refusal inside the limits.
    #[error("{0}")]
    Gate(String),
    /// The user pressed Ctrl-C (exit code 130).
    #[error("interrupted")]
    Interrupted,
}

fn at(offset: Option<u64>) -> String {
    offset.map_or(String::new(), |o| format!(" (at byte {o})"))
}

impl Error {
    /// Wraps an I/O error with the path that it concerns.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, source }
    }

    /// A format error at an offset.
    pub fn format(
        path: impl AsRef<Path>,
        offset: impl Into<Option<u64>>,
        what: impl Into<String>,
    ) -> Error {
        Error::Format {
            path: path.as_ref().to_path_buf(),
            offset: offset.into(),
            what: what.into(),
        }
    }

    /// Something that this program can't do, with what to do instead.
    pub fn unsupported(what: impl Into<String>, hint: impl Into<String>) -> Error {
        Error::Unsupported { what: what.into(), hint: hint.into() }
    }
}
