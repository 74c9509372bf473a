//! Arguments of filters, by place or by name.

use minijinja::Error;
use minijinja::value::{Kwargs, Value};

/// An argument by its place or its name.
pub(super) fn argument(given: Option<Value>, named: &Kwargs, name: &str) -> Result<Option<Value>, Error> {
    if named.has(name) { named.get(name) } else { Ok(given) }
}
