//! A checkpoint whose weights are packed, as its readers see it.

use std::path::Path;

use candle_core::DType;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::weights::raw::RawTensor;

/// Finds a tensor of the checkpoint by its name.
pub(crate) type Find<'a, 't> = &'a (dyn Fn(&str) -> Result<Option<RawTensor<'t, DType>>> + 'a);

/// One packed weight.
pub(super) struct Packed<K> {
    /// (outputs, inputs).
    pub(super) shape: (usize, usize),
    /// Bytes that it takes in memory.
    pub(super) bytes: usize,
    /// How it is packed.
    pub(super) kind: K,
}

/// What reading a packing needs to know of its checkpoint.
pub(super) struct Checkpoint<'a, 't> {
    /// For errors.
    pub(super) path: &'a Path,
    pub(super) settings: &'a Map<String, Value>,
    pub(super) names: Vec<&'a str>,
    pub(super) find: Find<'a, 't>,
}

impl<'t> Checkpoint<'_, 't> {
    pub(super) fn invalid(&self, problem: impl Into<String>) -> Error {
        Error::invalid(self.path, problem)
    }

    /// A tensor of a type and number of dimensions; its shape and bytes.
    pub(super) fn tensor(
        &self,
        name: &str,
        dtypes: &[DType],
        dimensions: usize,
    ) -> Result<(DType, Vec<usize>, &'t [u8])> {
        let missing = || self.invalid(format!("tensor `{}` is missing", name.escape_debug()));
        let (dtype, shape, bytes) = (self.find)(name)?.ok_or_else(missing)?;
        if !dtypes.contains(&dtype) || shape.len() != dimensions {
            let wanted: Vec<&str> = dtypes.iter().map(|d| d.as_str()).collect();
            return Err(self.invalid(format!(
                "tensor `{}` is {} of shape {shape:?}; {} with {dimensions} dimensions was expected",
                name.escape_debug(),
                dtype.as_str(),
                wanted.join(" or ")
            )));
        }
        Ok((dtype, shape, bytes))
    }

    /// A whole number of the settings, under one of its names.
    pub(super) fn number(&self, keys: &[&str]) -> Result<Option<i64>> {
        for key in keys {
            match self.settings.get(*key) {
                None | Some(Value::Null) => {}
                Some(v) => {
                    let problem = || self.invalid(format!("quantization_config's `{key}` should be a whole number"));
                    return v.as_i64().map(Some).ok_or_else(problem);
                }
            }
        }
        Ok(None)
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.settings.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(self.invalid(format!("quantization_config's `{key}` should be true or false"))),
        }
    }

    /// Names that end so, without that end.
    pub(super) fn ending(&self, end: &str) -> Vec<String> {
        self.names.iter().filter_map(|name| name.strip_suffix(end)).map(str::to_string).collect()
    }
}

/// Little-endian f32 of a tensor's bytes.
pub(super) fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}
