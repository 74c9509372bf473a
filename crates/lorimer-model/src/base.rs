//! A base model: configuration, weights, text, in one call.

use std::path::{Path, PathBuf};

use lorimer_seam::BaseModel;
use serde_json::Value;

use crate::decoder::DecoderConfig;
use crate::error::{Error, Result};
use crate::families::Config;
use crate::files::{MAX_JSON_BYTES, read_json};
use crate::text::TextModel;
use crate::weights::gguf::Gguf;
use crate::weights::{LoadDtype, Weights};

/// How a base is opened.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// In which type the projections are kept.
    pub dtype: LoadDtype,
    /// A `tokenizer.json` that takes the place of the model's own.
    pub tokenizer: Option<PathBuf>,
}

/// A loaded base model.
pub struct Base {
    /// The frozen model; [`Self::model`] is shorter for who only reads it.
    pub model: Box<dyn BaseModel>,
    /// Its shape and constants.
    pub config: Config,
    /// Tokenizer and chat template.
    pub text: TextModel,
    /// Where it was loaded from: a Hugging Face folder or a GGUF file.
    pub path: PathBuf,
    /// Identity of the weights (see [`Weights::fingerprint`]).
    pub fingerprint: String,
}

/// Opens weights and configuration without loading the model.
///
/// # Errors
///
/// Fails if there is no model at `path`, if a file is damaged, or if the model is of a family that is not supported.
pub fn open_weights(path: &Path, dtype: LoadDtype) -> Result<(Config, Weights)> {
    if path.is_dir() {
        if let Some(gguf) = single_gguf(path)? {
            return open_weights(&gguf, dtype);
        }
        let config_path = path.join("config.json");
        let json: Value = read_json(&config_path, MAX_JSON_BYTES)?;
        let mut config = Config::from_json(&json, &config_path)?;
        let weights = Weights::from_folder(path, dtype)?;
        config.resolve(&weights);
        return Ok((config, weights));
    }
    if !path.exists() {
        return Err(Error::invalid(path, "does not exist"));
    }
    if path.extension().is_none_or(|e| e != "gguf") {
        return Err(Error::invalid(
            path,
            "a base model is a Hugging Face folder (config.json, model.safetensors) or a `.gguf` file",
        ));
    }
    let file = Gguf::open(path)?;
    let config = DecoderConfig::from_gguf(&file)?;
    Ok((Config::Decoder(config), Weights::from_gguf(file, dtype)))
}

/// The one `.gguf` file of a folder that holds no `config.json`.
fn single_gguf(folder: &Path) -> Result<Option<PathBuf>> {
    if folder.join("config.json").exists() {
        return Ok(None);
    }
    let entries = std::fs::read_dir(folder).map_err(Error::io("read", folder))?;
    let mut found: Vec<PathBuf> =
        entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "gguf")).collect();
    match found.len() {
        0 => Ok(None),
        1 => Ok(found.pop()),
        n => Err(Error::invalid(folder, format!("holds {n} GGUF files; name the one to use"))),
    }
}

impl Base {
    /// The frozen model.
    pub fn model(&self) -> &dyn BaseModel {
        self.model.as_ref()
    }

    /// Loads a base from a Hugging Face folder or a GGUF file.
    ///
    /// # Errors
    ///
    /// Fails as [`Self::prepare`] and [`Prepared::load`] do.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self> {
        Self::prepare(path, options)?.load()
    }

    /// Everything but the weights: what is needed to encode data and to plan.
    ///
    /// # Errors
    ///
    /// Fails if there is no model at `path`, if a file is damaged, if the model is of a family that is not supported, or if the tokenizer
    /// has more tokens than the model.
    pub fn prepare(path: &Path, options: &OpenOptions) -> Result<Prepared> {
        let (config, weights) = open_weights(path, options.dtype)?;
        let text = match (weights.gguf(), &options.tokenizer) {
            (Some(file), None) => TextModel::from_gguf(file)?,
            (Some(file), Some(tokenizer)) => TextModel::from_gguf_with_tokenizer(file, tokenizer)?,
            (None, None) => TextModel::from_folder(path)?,
            (None, Some(tokenizer)) => TextModel::from_folder(path)?.with_tokenizer_file(tokenizer)?,
        };
        if text.vocabulary() > config.shape().vocabulary {
            return Err(Error::invalid(
                path,
                format!(
                    "the tokenizer knows {} tokens, the model only {}; they do not belong together",
                    text.vocabulary(),
                    config.shape().vocabulary
                ),
            ));
        }
        Ok(Prepared { config, weights, text })
    }
}

/// A base whose weights have not been read yet.
pub struct Prepared {
    /// Shape and constants.
    pub config: Config,
    /// The files.
    pub weights: Weights,
    /// Tokenizer and chat template.
    pub text: TextModel,
}

impl Prepared {
    /// Reads the weights.
    ///
    /// # Errors
    ///
    /// Fails if a tensor is missing, damaged or of another shape than the configuration says.
    pub fn load(self) -> Result<Base> {
        let fingerprint = self.weights.fingerprint()?;
        let model = self.config.clone().load(&self.weights)?;
        let path = self.weights.origin().to_path_buf();
        Ok(Base { model, config: self.config, text: self.text, path, fingerprint })
    }
}
