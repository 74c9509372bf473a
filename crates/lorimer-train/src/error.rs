//! Errors of this crate.

use std::path::{Path, PathBuf};

use lorimer_model::error::first_line;
use lorimer_tensor::NotFinite;

/// Why data could not be read or a run could not go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or model problem.
    #[error(transparent)]
    Model(#[from] lorimer_model::Error),
    /// An adapter problem.
    #[error(transparent)]
    Adapter(lorimer_adapter::Error),
    /// A row of data that cannot be used.
    #[error("`{}` {place}: {problem}", path.display())]
    Row {
        /// The data file.
        path: PathBuf,
        /// `line 3` or `row 3`.
        place: String,
        /// What was found and what was expected.
        problem: String,
    },
    /// A data file that cannot be used.
    #[error("`{}`: {problem}", path.display())]
    Data {
        /// The data file.
        path: PathBuf,
        /// What was found and what was expected.
        problem: String,
    },
    /// Settings that cannot be.
    #[error("{0}")]
    Settings(String),
    /// Training that came to nothing: a number that is none (a loss, a gradient, a score, an entry of a matrix that is decomposed), or an adapter
    /// of which nothing is left.
    #[error("{0}")]
    Diverged(String),
    /// A tensor operation that failed.
    #[error("{}", first_line(&.0.to_string()))]
    Tensor(candle_core::Error),
}

/// This crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        match NotFinite::is(&error) {
            true => Self::Diverged(first_line(&error.to_string()).to_string()),
            false => Self::Tensor(error),
        }
    }
}

impl From<lorimer_adapter::Error> for Error {
    fn from(error: lorimer_adapter::Error) -> Self {
        match error {
            lorimer_adapter::Error::Tensor(error) => error.into(),
            error => Self::Adapter(error),
        }
    }
}

impl Error {
    pub(crate) fn data(path: &Path, problem: impl Into<String>) -> Self {
        Self::Data { path: path.to_path_buf(), problem: problem.into() }
    }
}
