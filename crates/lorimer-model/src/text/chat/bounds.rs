//! What templates are refused for.

use minijinja::{Error, ErrorKind};

/// Widest field of a format, in digits of its width.
const MAX_WIDTH_DIGITS: usize = 4;

/// Deepest nesting of a value that is assigned, printed or written as JSON.
pub(super) const MAX_DEPTH: usize = 200;
/// Longest indentation of `tojson`, in bytes.
pub(super) const MAX_INDENT: usize = 64;

/// An error of an operation, with a message.
pub(super) fn refuse(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// Refuses a text to be formatted in which a field is very wide.
pub(super) fn check_widths(text: &str) -> Result<(), Error> {
    let wide = |part: &str| part.len() > MAX_WIDTH_DIGITS && part.trim_start_matches('0').len() > MAX_WIDTH_DIGITS;
    match text.split(|c: char| !c.is_ascii_digit()).find(|part| wide(part)) {
        Some(part) if text.contains(['%', '{']) => Err(refuse(format!("the field of a format has a width of {part}"))),
        _ => Ok(()),
    }
}
