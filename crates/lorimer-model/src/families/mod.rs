//! The families of models, one file each, and the one registry that `config.json` is looked up in.

use std::path::Path;

use serde_json::Value;

use crate::decoder::DecoderConfig;
use crate::error::{Error, Result};

pub mod bert;
pub mod config;
pub mod llama;

pub use config::{Config, Family};

/// Every family.
pub const FAMILIES: &[Family] = &[
    llama::FAMILY,
    Family { model_types: &["bert"], read: |json, path| Ok(Config::Encoder(bert::BertConfig::from_json(json, path)?)) },
];

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
}

impl DecoderConfig {
    /// A decoder's `config.json`, of whatever family; `path` is for errors.
    pub fn from_json(json: &Value, path: &Path) -> Result<Self> {
        Ok(Config::from_json(json, path)?.decoder("this")?.clone())
    }
}
