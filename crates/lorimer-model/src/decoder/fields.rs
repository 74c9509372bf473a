//! Typed look-ups in a `config.json`.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Typed look-ups in a JSON object with errors that name the key.
pub(crate) struct Fields<'a> {
    pub path: &'a Path,
    pub map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The fields of a configuration.
    pub fn of(json: &'a Value, path: &'a Path) -> Result<Self> {
        let map = json.as_object().ok_or_else(|| Error::invalid(path, "should hold a JSON object"))?;
        Ok(Self { path, map })
    }

    /// A text, short enough to be shown.
    pub fn text(&self, key: &str) -> Option<String> {
        self.map.get(key).and_then(Value::as_str).map(short_str)
    }

    /// Refuses another value than `known` of a key that is a text.
    pub fn only(&self, key: &str, known: &str) -> Result<()> {
        match self.text(key) {
            Some(other) if other != known => {
                Err(Error::invalid(self.path, format!("{key} `{other}` is not `{known}`")))
            }
            _ => Ok(()),
        }
    }

    pub fn optional<T>(&self, key: &str, kind: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => read(value)
                .map(Some)
                .ok_or_else(|| Error::invalid(self.path, format!("`{key}` should be {kind}, found {}", short(value)))),
        }
    }
    pub fn size(&self, key: &str) -> Result<Option<usize>> {
        self.optional(key, "a positive whole number", |v| {
            v.as_u64().filter(|&n| n > 0 && n < (1 << 32)).map(|n| n as usize)
        })
    }
    /// A whole number that may be zero.
    pub fn count(&self, key: &str) -> Result<Option<usize>> {
        self.optional(key, "a whole number", |v| v.as_u64().filter(|&n| n < (1 << 32)).map(|n| n as usize))
    }
    pub fn needed(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| Error::invalid(self.path, format!("has no `{key}`")))
    }
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.optional(key, "a finite number", |v| v.as_f64().filter(|n| n.is_finite()))
    }
    pub fn flag(&self, key: &str) -> Result<bool> {
        Ok(self.optional(key, "true or false", Value::as_bool)?.unwrap_or(false))
    }
}

pub(crate) fn short(value: &Value) -> String {
    let mut text: String = value.to_string().chars().take(60).collect();
    if text.len() < value.to_string().len() {
        text.push('…');
    }
    text
}

pub(crate) fn short_str(text: &str) -> String {
    text.chars().take(40).collect()
}
