//! Errors of this crate.

use std::path::{Path, PathBuf};

use lorimer_model::error::first_line;

/// Why data could not be read or a run could not go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or model problem.
    #[error(transparent)]
    Model(#[from] lorimer_model::Error),
    /// An adapter problem.
    #[error(transparent)]
    Adapter(#[from] lorimer_adapter::Error),
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
    /// Training that ran away: a loss or a gradient that is no finite number.
    #[error("{0}")]
    Diverged(String),
    /// A tensor operation that failed.
    #[error("{}", first_line(&.0.to_string()))]
    Tensor(#[from] candle_core::Error),
}

/// This crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn data(path: &Path, problem: impl Into<String>) -> Self {
        Self::Data { path: path.to_path_buf(), problem: problem.into() }
    }
}
