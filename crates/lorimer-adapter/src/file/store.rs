//! Adapter folders as PEFT writes them, with `lorimer.json` beside: bounded reading, atomic writing.

use crate::file::bytes::{raw_bytes, safetensors_bytes};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use lorimer_model::files::{create_folder, read_json, remove_leftovers, write_atomic, write_json};
use lorimer_model::weights::{SafetensorsFile, hex};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::file::frozen::FrozenParts;
use crate::file::mixture;
use crate::part::Part;
use crate::pruning::origin::BaseIdentity;

/// Largest `adapter_config.json` and `lorimer.json`.
const MAX_CONFIG_BYTES: u64 = 4 << 20;
/// Most tensors in one adapter.
const MAX_TENSORS: usize = 100_000;
/// Longest tensor name.
const MAX_NAME: usize = 512;

/// The file of tensors.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// PEFT's configuration.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// What only Lorimer writes; other tools ignore it.
pub const MANIFEST_FILE: &str = "lorimer.json";

/// A prompt whose log-probabilities were recorded when the adapter was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Golden {
    /// Token ids of prompt and answer.
    pub tokens: Vec<u32>,
    /// Index of the first token whose log-probability is recorded.
    pub first: usize,
    /// log p of each token from `first` on, given those before it.
    pub log_probabilities: Vec<f32>,
}

/// `lorimer.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this file's format.
    pub format: u32,
    /// `sha256:…` over configuration and tensors.
    pub content_id: String,
    /// Name in the registry.
    pub method: String,
    /// Version of Lorimer that wrote it.
    pub lorimer: String,
    /// The base it was trained on.
    pub base: Option<BaseIdentity>,
    /// The chat template it was trained with.
    pub chat_template: Option<String>,
    /// How it was trained: settings, data, steps.
    #[serde(default)]
    pub training: Value,
    /// Log-probabilities to replay.
    #[serde(default)]
    pub golden: Vec<Golden>,
    /// What stands for the frozen parts of the method that the file may leave out, by module.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub frozen: BTreeMap<String, FrozenParts>,
    /// Of a mixture of adapters: what its weights belong to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub xlora: Option<Mixture>,
}

/// What the weights of a mixture of adapters belong to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mixture {
    /// The projections, in the order of the weights.
    pub sites: Vec<String>,
    /// `sha256:…` over configuration and tensors of each expert, in the order of the weights.
    pub experts: Vec<String>,
}

/// An adapter as a file holds it.
#[derive(Clone, Debug)]
pub struct StoredAdapter {
    /// Where it was read from.
    pub path: PathBuf,
    /// `adapter_config.json`.
    pub config: Map<String, Value>,
    /// Tensors by their full names.
    pub tensors: BTreeMap<String, Tensor>,
    /// `lorimer.json`, where there is one.
    pub manifest: Option<Manifest>,
    /// The adapters that it is made of, in their order; most are made of none.
    pub parts: Vec<Part>,
}

impl StoredAdapter {
    /// Reads an adapter folder.
    ///
    /// # Errors
    ///
    /// Fails if the folder is no adapter in PEFT's form, if a file is damaged or too large, or if a tensor holds values that are not
    /// finite.
    pub fn read(folder: &Path) -> Result<Self> {
        Self::read_with(folder, SafetensorsFile::open, None, None)
    }

    /// [`Self::read`] for a folder that others may change meanwhile, with tensors of at most `limit` bytes. Adapters that it is made of must
    /// lie in the folder `root`, which is an absolute path without links. `parts`: their folders in their order, where those are not what its
    /// configuration calls them.
    ///
    /// # Errors
    ///
    /// Fails as [`Self::read`] does, if the tensors take more than `limit` bytes, and if it is made of adapters elsewhere or of another number of them.
    pub fn read_changing(folder: &Path, limit: u64, root: &Path, parts: Option<&[PathBuf]>) -> Result<Self> {
        Self::read_with(folder, |path| SafetensorsFile::read(path, limit), Some(root), parts)
    }

    fn read_with(
        folder: &Path,
        open: impl Fn(&Path) -> lorimer_model::Result<SafetensorsFile>,
        root: Option<&Path>,
        parts: Option<&[PathBuf]>,
    ) -> Result<Self> {
        let mut stored = Self::read_alone(folder, &open)?;
        let folders = match parts {
            Some(parts) if parts.len() == mixture::part_names(folder, &stored.config)?.len() => parts.to_vec(),
            Some(_) => return Err(lorimer_model::Error::invalid(folder, "changed while it was read").into()),
            None => mixture::part_folders(folder, &stored.config)?,
        };
        for (number, part) in folders.into_iter().enumerate() {
            let files = [WEIGHTS_FILE, CONFIG_FILE, MANIFEST_FILE].map(|name| part.join(name));
            let inside = |path: &Path, root: &Path| path.canonicalize().is_ok_and(|real| real.starts_with(root));
            if root.is_some_and(|root| files.iter().any(|file| file.exists() && !inside(file, root))) {
                let problem = format!("its expert {number} lies outside of the folder of adapters");
                return Err(lorimer_model::Error::invalid(folder, problem).into());
            }
            stored.parts.push(Self::read_alone(&part, &open)?.into_part()?);
        }
        Ok(stored)
    }

    /// Without what it is made of.
    fn read_alone(folder: &Path, open: impl Fn(&Path) -> lorimer_model::Result<SafetensorsFile>) -> Result<Self> {
        if mixture::is_authors(folder) {
            let config = read_json(&folder.join(mixture::AUTHORS_CONFIG), MAX_CONFIG_BYTES)?;
            let tensors = read_tensors(&open(&mixture::authors_weights(folder)?)?)?;
            let (config, tensors) = mixture::from_authors(folder, config, tensors)?;
            return Ok(Self { path: folder.to_path_buf(), config, tensors, manifest: None, parts: Vec::new() });
        }
        let (mut config, manifest) = read_settings(folder)?;
        let mut tensors = read_tensors(&open(&folder.join(WEIGHTS_FILE))?)?;
        crate::file::dialects::lora_xs::from_authors(&mut config, &mut tensors);
        Ok(Self { path: folder.to_path_buf(), config, tensors, manifest, parts: Vec::new() })
    }

    /// An adapter out of PEFT's configuration and the bytes of its safetensors file; its path is empty.
    ///
    /// # Errors
    ///
    /// Fails if the bytes are no such file, if a tensor holds values that are not finite, or if the adapter is made of others.
    pub fn from_bytes(mut config: Map<String, Value>, bytes: Vec<u8>) -> Result<Self> {
        let mut tensors = read_tensors(&SafetensorsFile::from_bytes("the adapter's bytes", bytes)?)?;
        if mixture::is_mixture(&config) {
            return Err(Error::Refused("an adapter made of others is read from its folder".into()));
        }
        crate::file::dialects::flylora::from_authors(&mut config);
        crate::file::dialects::lora_xs::from_authors(&mut config, &mut tensors);
        Ok(Self { path: PathBuf::new(), config, tensors, manifest: None, parts: Vec::new() })
    }

    /// The adapter as one that another is made of.
    ///
    /// # Errors
    ///
    /// Fails if a tensor is of a type that adapter files do not hold.
    pub fn into_part(self) -> Result<Part> {
        let content_id = self.content_id()?;
        let path = self.path.canonicalize().unwrap_or(self.path);
        let base = self.manifest.and_then(|manifest| manifest.base);
        Ok(Part { path, config: self.config, tensors: self.tensors, content_id, base })
    }

    /// Refuses an adapter made of others, where one weight a projection is wanted. `what`: `merged`.
    pub(crate) fn refuse_mixture(&self, what: &str) -> Result<()> {
        match mixture::is_mixture(&self.config) {
            false => Ok(()),
            true => Err(Error::Refused(format!(
                "`{}` mixes other adapters token by token, which no fixed weight does, so it cannot be {what}",
                self.path.display()
            ))),
        }
    }

    /// Identity of configuration and tensors: `sha256:…`.
    ///
    /// # Errors
    ///
    /// Fails if a tensor is of a type that adapter files do not hold.
    pub fn content_id(&self) -> Result<String> {
        let mut hash = ContentHash::new(&self.config, &self.parts);
        for (name, tensor) in &self.tensors {
            hash.tensor(name, tensor.dtype(), tensor.dims(), &raw_bytes(tensor)?);
        }
        Ok(hash.finish())
    }

    /// The tensors as a safetensors file.
    ///
    /// # Errors
    ///
    /// Fails if a tensor is of a type that adapter files do not hold.
    pub fn tensor_bytes(&self) -> Result<Vec<u8>> {
        safetensors_bytes(&self.tensors)
    }

    /// Writes the folder: tensors first, then configuration and card, `lorimer.json` last; each file atomically.
    ///
    /// # Errors
    ///
    /// Fails if a tensor is of a type that adapter files do not hold, or if a file cannot be written.
    pub fn write(&self, folder: &Path, card: Option<&str>) -> Result<()> {
        create_folder(folder)?;
        remove_leftovers(folder);
        write_atomic(&folder.join(WEIGHTS_FILE), &self.tensor_bytes()?)?;
        write_json(&folder.join(CONFIG_FILE), &mixture::with_relative_parts(&self.config, folder, &self.parts))?;
        if let Some(card) = card {
            write_atomic(&folder.join("README.md"), card.as_bytes())?;
        }
        if let Some(manifest) = &self.manifest {
            write_json(&folder.join(MANIFEST_FILE), manifest)?;
        }
        Ok(())
    }
}

/// [`StoredAdapter::content_id`] of tensors that come one after another, in the order of their names.
pub(crate) struct ContentHash(Sha256);

impl ContentHash {
    pub(crate) fn new(config: &Map<String, Value>, parts: &[Part]) -> Self {
        let mut hash = Sha256::new();
        // The name of the base differs from machine to machine and is not content, as paths of parts are not.
        let place = |key: &str| key == "base_model_name_or_path" || (key == mixture::PARTS && !parts.is_empty());
        let config: BTreeMap<_, _> = config.iter().filter(|(k, _)| !place(k)).collect();
        hash.update(serde_json::to_vec(&config).unwrap_or_default());
        for part in parts {
            hash.update(format!("|part {}|", part.content_id).as_bytes());
        }
        Self(hash)
    }

    pub(crate) fn tensor(&mut self, name: &str, dtype: DType, dims: &[usize], bytes: &[u8]) {
        self.0.update(format!("|{name}|{}|{dims:?}|", dtype.as_str()).as_bytes());
        self.0.update(bytes);
    }

    pub(crate) fn finish(self) -> String {
        format!("sha256:{}", hex(&self.0.finalize()))
    }
}

/// What the configuration of a folder calls the adapters that its adapter is made of, in their order; most are made of none.
///
/// # Errors
///
/// Fails if the folder is no adapter in PEFT's form, or if they are not numbered.
pub fn part_names(folder: &Path) -> Result<Vec<String>> {
    mixture::part_names(folder, &read_settings(folder)?.0)
}

/// The folders of the adapters that a folder's adapter is made of, in their order.
///
/// # Errors
///
/// Fails as [`part_names`] does, or if one is not there.
pub fn part_folders(folder: &Path) -> Result<Vec<PathBuf>> {
    mixture::part_folders(folder, &read_settings(folder)?.0)
}

/// `adapter_config.json` and, where there is one, `lorimer.json` of a folder that has tensors beside them.
pub(crate) fn read_settings(folder: &Path) -> Result<(Map<String, Value>, Option<Manifest>)> {
    let invalid = |problem: &str| Err(lorimer_model::Error::invalid(folder, problem).into());
    if !folder.is_dir() {
        return invalid(
            "an adapter is a folder with adapter_config.json and adapter_model.safetensors; there is none here",
        );
    }
    if !folder.join(CONFIG_FILE).is_file() {
        return invalid("is no adapter folder: it has no adapter_config.json");
    }
    let mut config: Map<String, Value> = read_json(&folder.join(CONFIG_FILE), MAX_CONFIG_BYTES)?;
    crate::file::dialects::flylora::from_authors(&mut config);
    if config.get("fan_in_fan_out") == Some(&Value::Bool(true)) {
        tracing::warn!(
            "`{}` sets fan_in_fan_out, which is for layers that the base does not have; it is taken as false, as PEFT takes it",
            folder.display()
        );
    }
    if !folder.join(WEIGHTS_FILE).is_file() {
        return invalid(match folder.join("adapter_model.bin").exists() {
            true => "holds adapter_model.bin, a pickle that could run code; save it again as safetensors",
            false => "has no adapter_model.safetensors",
        });
    }
    let manifest_path = folder.join(MANIFEST_FILE);
    let manifest = match manifest_path.is_file() {
        true => Some(read_json(&manifest_path, MAX_CONFIG_BYTES)?),
        false => None,
    };
    Ok((config, manifest))
}

/// The names of a file's tensors: not too many, each plain and of a bounded length.
pub(crate) fn checked_names(file: &SafetensorsFile) -> Result<Vec<String>> {
    let path = file.path.as_path();
    let names = file.names();
    if names.len() > MAX_TENSORS {
        let problem = format!("{} tensors, at most {MAX_TENSORS} are read", names.len());
        return Err(lorimer_model::Error::invalid(path, problem).into());
    }
    if let Some(name) = names.iter().find(|name| name.len() > MAX_NAME || name.chars().any(char::is_control)) {
        let shown: String = name.chars().take(60).collect();
        let problem = format!("tensor name `{}…` is too long or not plain", shown.escape_debug());
        return Err(lorimer_model::Error::invalid(path, problem).into());
    }
    Ok(names)
}

/// Refuses a tensor with values that are not finite.
pub(crate) fn check_finite(path: &Path, name: &str, tensor: &Tensor) -> Result<()> {
    let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    match values.iter().all(|v| v.is_finite()) {
        true => Ok(()),
        false => {
            Err(lorimer_model::Error::invalid(path, format!("tensor `{name}` holds values that are not finite")).into())
        }
    }
}

fn read_tensors(file: &SafetensorsFile) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    for name in checked_names(file)? {
        if let Some(tensor) = file.load(&name)? {
            check_finite(&file.path, &name, &tensor)?;
            tensors.insert(name, tensor);
        }
    }
    Ok(tensors)
}
