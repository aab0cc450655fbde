//! The library's error type: one variant for each kind of cause.

use std::path::{Path, PathBuf};

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, where, and what the user can do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused: a missing file, no permission, no space left.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder that was accessed.
        path: PathBuf,
        /// The system's own error.
        source: std::io::Error,
    },
    /// The file's bytes break the rules of its format.
    #[error("{}: {what}{}", path.display(), at(*offset))]
    Format {
        /// The file.
        path: PathBuf,
        /// Byte offset in the file, if one is known.
        offset: Option<u64>,
        /// What was found, and what was expected.
        what: String,
    },
    /// The file is valid, but it needs a feature that this program lacks.
    #[error("{what}; {hint}")]
    Unsupported {
        /// What is not supported.
        what: String,
        /// What to do instead.
        hint: String,
    },
    /// The model contradicts itself: a tensor is missing, or has a shape that the metadata rule
    /// out.
    #[error("{0}")]
    Model(String),
    /// A limit of this machine, or a limit that the user set, was reached.
    #[error("{0}")]
    Limit(String),
    /// No edit restores refusal within the limits (exit code 3).
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
    /// Wraps an I/O error together with the path that was accessed.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, source }
    }

    /// A format error, at a byte offset if one is known.
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

    /// An [`Error::Unsupported`]: what is not supported, and what to do instead.
    pub fn unsupported(what: impl Into<String>, hint: impl Into<String>) -> Error {
        Error::Unsupported { what: what.into(), hint: hint.into() }
    }
}
