//! Errors of this crate.

use lorimer_model::error::first_line;

/// Why an adapter could not be made, read, written or used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or model problem.
    #[error(transparent)]
    Model(#[from] lorimer_model::Error),
    /// A configuration that cannot be: which key, what was found, what was expected.
    #[error("{0}")]
    Config(String),
    /// An adapter file that does not fit: which tensor, what was found, what was expected.
    #[error("{0}")]
    Mismatch(String),
    /// What a method cannot do, and why.
    #[error("{0}")]
    Refused(String),
    /// A tensor operation that failed.
    #[error("{}", first_line(&.0.to_string()))]
    Tensor(#[from] candle_core::Error),
}

/// This crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;
