//! Errors as Python sees them.

use pyo3::create_exception;
use pyo3::exceptions::PyException;
use pyo3::prelude::*;

create_exception!(lorimer, Error, PyException, "What could not be done, in the sentence that the command line prints.");
create_exception!(
    lorimer,
    Interrupted,
    Error,
    "A run that was stopped from outside; `train(resume=True)` goes on where it was."
);

/// An error as Python sees it: its first line.
pub fn sentence(error: &anyhow::Error) -> PyErr {
    let text = format!("{error:#}");
    Error::new_err(text.lines().next().unwrap_or_default().to_string())
}

/// What Python wants to raise.
pub fn raised(error: impl Into<anyhow::Error>) -> PyErr {
    sentence(&error.into())
}
