//! What can go wrong while serving.

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong while serving.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The pool cannot be made as asked.
    #[error("{0}")]
    Pool(String),
    /// A request that cannot be served as it is.
    #[error("{0}")]
    Request(String),
    /// An adapter that cannot be served.
    #[error(transparent)]
    Adapter(#[from] lorimer_adapter::Error),
    /// The model.
    #[error(transparent)]
    Model(#[from] lorimer_model::Error),
    /// A computation.
    #[error("the computation failed: {0}")]
    Tensor(#[from] candle_core::Error),
}
