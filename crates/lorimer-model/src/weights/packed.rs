//! Weights that a safetensors checkpoint keeps packed, as `quantization_config` of its `config.json` says: `lorimer-nf` (see `docs/quantize.md`),
//! bitsandbytes' NF4 and FP4, GPTQ and AWQ in 4 bits. They stay packed in memory; nothing is rounded anew.

mod affine;
mod levels;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::DType;
use lorimer_tensor::FrozenWeight;
use serde_json::{Map, Value};

use super::raw::RawTensor;
use crate::error::{Error, Result};

pub use levels::{FORMAT, NormalFloatModule, bitsandbytes_tensors, normal_float_tensors};

/// Finds a tensor of the checkpoint by its name.
pub(crate) type Find<'a, 't> = &'a (dyn Fn(&str) -> Result<Option<RawTensor<'t, DType>>> + 'a);

/// One packed weight.
pub(crate) struct PackedWeight {
    /// (outputs, inputs).
    shape: (usize, usize),
    /// Bytes that it takes in memory.
    bytes: usize,
    kind: Kind,
}

enum Kind {
    NormalFloat(NormalFloatModule),
    Bitsandbytes(levels::QuantState),
    Gptq(affine::Gptq),
    Awq(affine::Awq),
}

/// The packed weights of a checkpoint.
pub(crate) struct Packing {
    /// `quant_method` of the configuration.
    pub(crate) method: String,
    weights: BTreeMap<String, PackedWeight>,
    /// Tensors that are parts of packed weights.
    parts: BTreeSet<String>,
}

/// What reading a packing needs to know of its checkpoint.
struct Checkpoint<'a, 't> {
    /// For errors.
    path: &'a Path,
    settings: &'a Map<String, Value>,
    names: Vec<&'a str>,
    find: Find<'a, 't>,
}

impl<'t> Checkpoint<'_, 't> {
    fn invalid(&self, problem: impl Into<String>) -> Error {
        Error::invalid(self.path, problem)
    }

    /// A tensor of a type and number of dimensions; its shape and bytes.
    fn tensor(&self, name: &str, dtypes: &[DType], dimensions: usize) -> Result<(DType, Vec<usize>, &'t [u8])> {
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
    fn number(&self, keys: &[&str]) -> Result<Option<i64>> {
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

    fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.settings.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(self.invalid(format!("quantization_config's `{key}` should be true or false"))),
        }
    }

    /// Names that end so, without that end.
    fn ending(&self, end: &str) -> Vec<String> {
        self.names.iter().filter_map(|name| name.strip_suffix(end)).map(str::to_string).collect()
    }
}

impl Packing {
    /// What `quantization_config` says of the tensors `names`; `path` is for errors.
    ///
    /// # Errors
    ///
    /// Fails if the packing is of no kind that is read, or if its parts do not fit each other.
    pub(crate) fn read(config: &Value, path: &Path, names: Vec<&str>, find: Find<'_, '_>) -> Result<Option<Self>> {
        let settings = match config.get("quantization_config") {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::Object(settings)) => settings,
            Some(_) => return Err(Error::invalid(path, "`quantization_config` should be an object")),
        };
        let checkpoint = Checkpoint { path, settings, names, find };
        let method = settings.get("quant_method").and_then(Value::as_str).unwrap_or_default();
        let weights = match method {
            FORMAT => levels::normal_float(&checkpoint)?,
            "bitsandbytes" => levels::bitsandbytes(&checkpoint)?,
            "gptq" => affine::gptq(&checkpoint)?,
            "awq" => affine::awq(&checkpoint)?,
            other => {
                let shown: String = other.chars().take(40).collect();
                return Err(checkpoint.invalid(format!(
                    "the weights are packed as `{}`; {FORMAT}, bitsandbytes (4 bits), gptq and awq are read, or use the model before it was packed",
                    shown.escape_debug()
                )));
            }
        };
        if weights.is_empty() {
            return Err(checkpoint.invalid(format!("`quantization_config` says {method}, and no tensor is packed so")));
        }
        let mut parts = BTreeSet::new();
        for name in &checkpoint.names {
            let module = name.rsplit_once('.').map_or("", |(module, _)| module);
            let owner = [module.to_string(), format!("{module}.weight"), state_owner(name).to_string()];
            if !weights.contains_key(*name) && owner.iter().any(|owner| weights.contains_key(owner)) && is_part(name) {
                parts.insert(name.to_string());
            }
        }
        Ok(Some(Self { method: method.to_string(), weights, parts }))
    }

    /// Names of the packed weights.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.weights.keys().map(String::as_str)
    }

    /// Whether a tensor of the files is a part of a packed weight.
    pub(crate) fn is_part(&self, tensor: &str) -> bool {
        self.parts.contains(tensor)
    }

    /// (outputs, inputs) of a packed weight.
    pub(crate) fn shape(&self, name: &str) -> Option<(usize, usize)> {
        self.weights.get(name).map(|weight| weight.shape)
    }

    /// Bytes that a packed weight takes in memory.
    pub(crate) fn bytes(&self, name: &str) -> Option<usize> {
        self.weights.get(name).map(|weight| weight.bytes)
    }

    /// A packed weight; None where this one is not packed.
    pub(crate) fn load(&self, name: &str, path: &Path, find: Find<'_, '_>) -> Result<Option<FrozenWeight>> {
        let Some(weight) = self.weights.get(name) else { return Ok(None) };
        let settings = Map::new();
        let checkpoint = Checkpoint { path, settings: &settings, names: Vec::new(), find };
        let loaded = match &weight.kind {
            Kind::NormalFloat(module) => levels::load_normal_float(&checkpoint, name, module),
            Kind::Bitsandbytes(state) => levels::load_bitsandbytes(&checkpoint, name, state),
            Kind::Gptq(kind) => affine::load_gptq(&checkpoint, name, weight.shape, kind),
            Kind::Awq(kind) => affine::load_awq(&checkpoint, name, weight.shape, kind),
        };
        // A tensor operation's error does not say where.
        let named = |error| match error {
            Error::Tensor(e) => {
                let problem = crate::error::first_line(&e.to_string()).to_string();
                checkpoint.invalid(format!("`{}`: {problem}", name.escape_debug()))
            }
            other => other,
        };
        loaded.map(Some).map_err(named)
    }
}

/// `X.weight` of `X.weight.quant_state.bitsandbytes__nf4`.
fn state_owner(name: &str) -> &str {
    name.split_once(".quant_state.").map_or("", |(owner, _)| owner)
}

/// Whether the last part of a name is one that packings use.
fn is_part(name: &str) -> bool {
    let last = name.rsplit('.').next().unwrap_or_default();
    last.starts_with("bitsandbytes__")
        || matches!(
            last,
            "absmax"
                | "quant_map"
                | "nested_absmax"
                | "nested_quant_map"
                | "nested_offset"
                | "qweight"
                | "qzeros"
                | "scales"
                | "g_idx"
        )
}

/// Little-endian f32 of a tensor's bytes.
fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}
