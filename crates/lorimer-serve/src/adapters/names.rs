//! Names of adapters, and why the store refuses.

use serde::Serialize;

/// Longest name.
pub const MAX_NAME: usize = 200;

/// Why the store refuses. The names are stable codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// There is no adapter of that name.
    AdapterNotFound,
    /// A name that cannot be one.
    InvalidName,
    /// A path that leaves the root.
    PathRefused,
    /// The name is taken.
    AdapterExists,
    /// The name does not stand for the content that was expected.
    ContentChanged,
    /// The files are damaged, do not fit the base, or change nothing.
    AdapterInvalid,
    /// More bytes, ranks or names than allowed.
    LimitExceeded,
    /// The store could not write.
    StoreFailed,
}

/// A refusal of the store.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct StoreError {
    /// What kind.
    pub code: Code,
    /// One sentence.
    pub message: String,
}

pub(crate) fn refuse<T>(code: Code, message: impl Into<String>) -> Result<T, StoreError> {
    Err(StoreError { code, message: message.into() })
}

/// Names are path-like: parts of letters, digits, `.`, `_`, `-`, `@` apart by `/`, none of which begins with a dot.
///
/// # Errors
///
/// Fails with [`Code::InvalidName`] if it is another, or longer than [`MAX_NAME`].
pub fn check_name(name: &str) -> Result<(), StoreError> {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '@'))
    };
    if name.len() > MAX_NAME || !name.split('/').all(part) {
        let shown: String = name.chars().take(60).flat_map(char::escape_debug).collect();
        let message = format!(
            "`{shown}` is no name of an adapter: at most {MAX_NAME} letters, digits, `.`, `_`, `-`, `@`, with `/` between parts that do not begin with a dot"
        );
        return refuse(Code::InvalidName, message);
    }
    Ok(())
}
