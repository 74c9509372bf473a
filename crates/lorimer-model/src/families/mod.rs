//! The families of models, one file each, and the one registry that `config.json` is looked up in.

use std::path::Path;

use lorimer_seam::{BaseModel, ModelShape, Site};
use serde_json::Value;

use crate::decoder::{Decoder, DecoderConfig};
use crate::error::{Error, Result};
use crate::weights::{LoadDtype, Weights};

pub mod llama;

/// One line of the registry.
pub struct Family {
    /// `model_type`s of `config.json`.
    pub model_types: &'static [&'static str],
    /// Reads a `config.json`; the path is for errors.
    pub read: fn(&Value, &Path) -> Result<Config>,
}

/// Every family.
pub const FAMILIES: &[Family] = &[llama::FAMILY];

/// Shape and constants of a model.
#[derive(Clone, Debug, PartialEq)]
pub enum Config {
    /// Of a model that predicts the next token.
    Decoder(DecoderConfig),
}

impl Config {
    /// Reads what transformers 4 or 5 wrote; `path` is for errors.
    pub fn from_json(json: &Value, path: &Path) -> Result<Self> {
        let model_type = json.get("model_type").and_then(Value::as_str).unwrap_or_default();
        match FAMILIES.iter().find(|family| family.model_types.contains(&model_type)) {
            Some(family) => (family.read)(json, path),
            None => {
                let shown: String = model_type.chars().take(40).collect();
                let known: Vec<_> = FAMILIES.iter().flat_map(|family| family.model_types).copied().collect();
                Err(Error::invalid(path, format!("model_type `{shown}` is not one of {}", known.join(", "))))
            }
        }
    }

    /// Loads every tensor, checking each shape.
    pub fn load(self, weights: &Weights) -> Result<Box<dyn BaseModel>> {
        match self {
            Self::Decoder(config) => Ok(Box::new(Decoder::load(config, weights)?)),
        }
    }

    /// Numbers of the model that do not depend on its weights.
    pub fn shape(&self) -> ModelShape {
        match self {
            Self::Decoder(config) => config.shape(),
        }
    }

    /// Every projection's site in the order of the forward.
    pub fn sites(&self) -> Vec<Site> {
        match self {
            Self::Decoder(config) => config.sites(),
        }
    }

    /// Whether projections of this role add a bias.
    pub fn has_bias(&self, role: &str) -> bool {
        match self {
            Self::Decoder(config) => config.has_bias(role),
        }
    }

    /// Bytes that the weights would take in memory under `dtype`, found without reading them.
    pub fn planned_bytes(&self, weights: &Weights, dtype: LoadDtype) -> Result<usize> {
        match self {
            Self::Decoder(config) => config.planned_bytes(weights, dtype),
        }
    }

    /// The decoder's; an error that says what needs one where it is none.
    pub fn decoder(&self, what: &str) -> Result<&DecoderConfig> {
        match self {
            Self::Decoder(config) => Ok(config),
        }
    }
}
