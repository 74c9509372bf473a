//! Shape and constants of a model of any family.

use std::path::Path;

use lorimer_seam::{BaseModel, ModelShape, Site};
use serde_json::Value;

use super::bert::{Bert, BertConfig};
use crate::decoder::{Decoder, DecoderConfig};
use crate::error::{Error, Result};
use crate::weights::gguf::Gguf;
use crate::weights::{LoadDtype, Weights};

/// One line of the registry.
pub struct Family {
    /// `model_type`s of `config.json`.
    pub model_types: &'static [&'static str],
    /// Reads a `config.json`; the path is for errors.
    pub read: fn(&Value, &Path) -> Result<Config>,
    /// How it stands in GGUF files, where it does.
    pub gguf: Option<GgufFamily>,
}

/// A family of decoders in GGUF files.
pub struct GgufFamily {
    /// Architectures of the files with the `model_type`s that they are here.
    pub architectures: &'static [(&'static str, &'static str)],
    /// Reads what the family has of its own, into what all decoders have in common.
    pub read: fn(&Gguf, &mut DecoderConfig) -> Result<()>,
    /// Its keys of a `config.json`, over those that all decoders have.
    pub write: fn(&DecoderConfig, &mut Value),
}

/// Shape and constants of a model.
#[derive(Clone, Debug, PartialEq)]
pub enum Config {
    /// Of a model that predicts the next token.
    Decoder(DecoderConfig),
    /// Of a model that reads whole texts and predicts nothing.
    Encoder(BertConfig),
}

impl Config {
    /// Loads every tensor, checking each shape.
    pub fn load(self, weights: &Weights) -> Result<Box<dyn BaseModel>> {
        match self {
            Self::Decoder(config) => Ok(Box::new(Decoder::load(config, weights)?)),
            Self::Encoder(config) => Ok(Box::new(Bert::load(config, weights)?)),
        }
    }

    /// Numbers of the model that do not depend on its weights.
    pub fn shape(&self) -> ModelShape {
        match self {
            Self::Decoder(config) => config.shape(),
            Self::Encoder(config) => config.shape(),
        }
    }

    /// Every projection's site in the order of the forward.
    pub fn sites(&self) -> Vec<Site> {
        match self {
            Self::Decoder(config) => config.sites(),
            Self::Encoder(config) => config.sites(),
        }
    }

    /// Whether the head is the embedding.
    pub fn tied(&self) -> bool {
        match self {
            Self::Decoder(config) => config.tied,
            Self::Encoder(_) => false,
        }
    }

    /// Whether projections of this role add a bias.
    pub fn has_bias(&self, role: &str) -> bool {
        match self {
            Self::Decoder(config) => config.has_bias(role),
            Self::Encoder(_) => true,
        }
    }

    /// Bytes that the weights would take in memory under `dtype`, found without reading them.
    pub fn planned_bytes(&self, weights: &Weights, dtype: LoadDtype) -> Result<usize> {
        match self {
            Self::Decoder(config) => config.planned_bytes(weights, dtype),
            Self::Encoder(config) => config.planned_bytes(weights, dtype),
        }
    }

    /// Finds out what `config.json` leaves to the weights.
    pub(crate) fn resolve(&mut self, weights: &Weights) {
        match self {
            // Older configurations leave `tie_word_embeddings` out where their class defaults to true.
            Self::Decoder(config) => config.tied |= !weights.has("lm_head.weight"),
            Self::Encoder(config) => config.resolve(weights),
        }
    }

    /// The decoder's; an error that says that `what` needs one where it is none.
    pub fn decoder(&self, what: &str) -> Result<&DecoderConfig> {
        match self {
            Self::Decoder(config) => Ok(config),
            Self::Encoder(config) => Err(Error::Unsupported(format!(
                "{what} needs a model that predicts tokens; a `{}` model is an encoder, which `lorimer embed` is for",
                config.shape().model_type
            ))),
        }
    }
}
