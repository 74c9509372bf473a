//! Errors of this crate: each one sentence with what was found, where, and what was expected.

use std::path::{Path, PathBuf};

/// Why a model, tokenizer or file could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {action} `{}`: {reason}", path.display())]
    Io {
        /// `read`, `write`, `rename` …
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason. Not the error's `source`: the message has it, and who prints the chain would say it twice.
        reason: std::io::Error,
    },
    /// A file is damaged or is not what it should be.
    #[error("`{}`: {problem}", path.display())]
    Invalid {
        /// The file or folder.
        path: PathBuf,
        /// What was found and what was expected.
        problem: String,
    },
    /// A model that this program has no code for, or a request that the model cannot fulfil.
    #[error("{0}")]
    Unsupported(String),
    /// Messages or tools of a conversation that cannot be used.
    #[error(transparent)]
    Messages(#[from] crate::text::messages::Refused),
    /// A sequence that is longer than the model is made for.
    #[error(transparent)]
    TooLong(#[from] lorimer_seam::TooLong),
    /// A download that failed.
    #[error("{0}")]
    Network(String),
    /// A tensor operation that failed.
    #[error("{}", first_line(&.0.to_string()))]
    Tensor(#[from] candle_core::Error),
}

/// This crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An [`Error::Io`], for `map_err`.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |reason| Self::Io { action, path, reason }
    }

    /// An [`Error::Invalid`].
    pub fn invalid(path: &Path, problem: impl Into<String>) -> Self {
        Self::Invalid { path: path.to_path_buf(), problem: problem.into() }
    }
}

/// The first line of a message (candle appends backtraces to its own).
pub fn first_line(message: &str) -> &str {
    message.lines().next().unwrap_or_default()
}
