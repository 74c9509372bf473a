//! An error of its own for numbers that are none, so that a run which diverged is told from one that could not be made.

use std::fmt;

use candle_core::Error;

/// NaN or infinity where a number is needed: something before has diverged, or a file is damaged.
#[derive(thiserror::Error)]
#[error("{0}")]
pub struct NotFinite(String);

// candle shows what it wraps in this form.
impl fmt::Debug for NotFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl NotFinite {
    /// The error of a tensor operation that says so.
    pub fn error(message: impl Into<String>) -> Error {
        Error::WrappedContext { wrapped: Box::new(Self(message.into())), context: String::new() }
    }

    /// Whether an error is of this kind.
    pub fn is(error: &Error) -> bool {
        match error {
            Error::WrappedContext { wrapped, .. } => wrapped.is::<Self>(),
            Error::Context { inner, .. } | Error::WithPath { inner, .. } | Error::WithBacktrace { inner, .. } => {
                Self::is(inner)
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_known_under_what_candle_adds() {
        let error = NotFinite::error("a score is not a number");
        assert_eq!(error.to_string().lines().next(), Some("a score is not a number"));
        assert!(NotFinite::is(&error.bt().context("in layer 3")));
        assert!(!NotFinite::is(&Error::Msg("a score is not a number".into()).context("in layer 3")));
    }
}
