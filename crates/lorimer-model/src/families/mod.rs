//! The families of models, one file each, and the one registry that `config.json` is looked up in.

use std::path::Path;

use serde_json::Value;

use crate::decoder::DecoderConfig;
use crate::error::{Error, Result};
use crate::weights::gguf::Gguf;

pub mod bert;
pub mod config;
pub mod gemma;
pub mod llama;
pub mod phi;

pub use config::{Config, Family, GgufFamily};

/// Every family.
pub const FAMILIES: &[Family] = &[
    llama::FAMILY,
    gemma::FAMILY,
    phi::FAMILY,
    Family {
        model_types: &["bert"],
        read: |json, path| Ok(Config::Encoder(bert::BertConfig::from_json(json, path)?)),
        gguf: None,
    },
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

/// The families that GGUF files hold.
fn in_gguf() -> impl Iterator<Item = &'static GgufFamily> {
    FAMILIES.iter().filter_map(|family| family.gguf.as_ref())
}

impl DecoderConfig {
    /// The configuration of the decoder in a GGUF file.
    pub fn from_gguf(file: &Gguf) -> Result<Self> {
        let known =
            || in_gguf().flat_map(|family| family.architectures.iter().map(move |(name, own)| (family, *name, *own)));
        let Some((family, architecture, model_type)) = known().find(|(_, name, _)| *name == file.architecture()) else {
            let other: String = file.architecture().chars().take(40).collect();
            let known: Vec<_> = known().map(|(_, name, _)| name).collect();
            let problem = format!("architecture `{other}` is not one of {}", known.join(", "));
            return Err(Error::invalid(&file.path, problem));
        };
        let mut config = Self::common_of_gguf(file, architecture, model_type)?;
        (family.read)(file, &mut config)?;
        config.checked(&file.path)
    }

    /// The name of its architecture in GGUF files.
    pub fn architecture(&self) -> &str {
        let mut all = in_gguf().flat_map(|family| family.architectures);
        match all.find(|(_, model_type)| *model_type == self.model_type) {
            Some((architecture, _)) => architecture,
            // llama.cpp has Mistral as a Llama.
            None => "llama",
        }
    }

    /// The configuration as transformers reads it, of a decoder that was read from GGUF. `dtype` is the name for `torch_dtype`.
    pub fn to_json(&self, dtype: &str) -> Value {
        let mut json = self.common_json(dtype);
        let own = in_gguf().find(|family| family.architectures.iter().any(|(_, name)| *name == self.model_type));
        if let Some(family) = own {
            (family.write)(self, &mut json);
        }
        json
    }

    /// A decoder's `config.json`, of whatever family; `path` is for errors.
    pub fn from_json(json: &Value, path: &Path) -> Result<Self> {
        Ok(Config::from_json(json, path)?.decoder("this")?.clone())
    }
}
