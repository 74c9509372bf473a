//! Weights that a safetensors checkpoint keeps packed, as `quantization_config` of its `config.json` says: `lorimer-nf` (see `docs/quantize.md`),
//! bitsandbytes' NF4 and FP4, GPTQ and AWQ in 4 bits. They stay packed in memory; nothing is rounded anew.

mod affine;
mod checkpoint;
mod levels;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use lorimer_tensor::FrozenWeight;
use serde_json::{Map, Value};

use self::checkpoint::{Checkpoint, Find, Packed};
use crate::error::{Error, Result};
use crate::weights::file::SafetensorsFile;

pub use affine::{GptqFormat, awq_tensors, gptq_tensors};
pub use levels::{FORMAT, NormalFloatModule, bitsandbytes_tensors, normal_float_tensors};

enum Kind {
    NormalFloat(NormalFloatModule),
    Bitsandbytes(levels::QuantState),
    Gptq(affine::Gptq),
    Awq(affine::Awq),
}

impl<K> Packed<K> {
    fn of(self, kind: fn(K) -> Kind) -> Packed<Kind> {
        Packed { shape: self.shape, bytes: self.bytes, kind: kind(self.kind) }
    }
}

/// Weights of one kind, by name.
fn all<K>(found: BTreeMap<String, Packed<K>>, kind: fn(K) -> Kind) -> BTreeMap<String, Packed<Kind>> {
    found.into_iter().map(|(name, packed)| (name, packed.of(kind))).collect()
}

/// The packed weights of a checkpoint.
pub(crate) struct Packing {
    /// `quant_method` of the configuration.
    pub(crate) method: String,
    weights: BTreeMap<String, Packed<Kind>>,
    /// Tensors that are parts of packed weights.
    parts: BTreeSet<String>,
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
            FORMAT => all(levels::normal_float(&checkpoint)?, Kind::NormalFloat),
            "bitsandbytes" => all(levels::bitsandbytes(&checkpoint)?, Kind::Bitsandbytes),
            "gptq" => all(affine::gptq(&checkpoint)?, Kind::Gptq),
            "awq" => all(affine::awq(&checkpoint)?, Kind::Awq),
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

/// A packed weight of a file, as a checkpoint with this `quantization_config` has it.
///
/// # Errors
///
/// Fails if the packing is of no kind that is read, if its parts do not fit each other, or if there is no such weight.
pub fn packed_weight(file: &SafetensorsFile, quantization_config: &Value, name: &str) -> Result<FrozenWeight> {
    let config = Value::Object(Map::from_iter([("quantization_config".to_string(), quantization_config.clone())]));
    let names = file.names();
    let find: Find<'_, '_> = &|name| file.tensor(name);
    let packing = Packing::read(&config, &file.path, names.iter().map(String::as_str).collect(), find)?;
    let found = packing.map_or(Ok(None), |packing| packing.load(name, &file.path, find))?;
    found.ok_or_else(|| Error::invalid(&file.path, format!("has no packed weight `{}`", name.escape_debug())))
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
