//! What is quantised, what is kept of it meanwhile, and what became of it.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use lorimer_model::files::{MAX_JSON_BYTES, create_folder, read_json, write_json};
use lorimer_model::weights::packed::NormalFloatModule;
use lorimer_model::{Base, Config, TextModel, Weights};
use serde::{Deserialize, Serialize};

use super::settings::QuantizeSettings;
use crate::data::encode::Example;
use crate::error::{Error, Result};

/// The rows that Fisher information is from, and the model that it is of.
pub struct FisherData<'a> {
    /// The loaded base.
    pub base: &'a Base,
    /// Its rows.
    pub rows: Vec<&'a Example>,
}

/// What is quantised.
pub struct Quantize<'a> {
    /// The base's shape.
    pub config: &'a Config,
    /// Its files.
    pub weights: &'a Weights,
    /// Its tokenizer and chat template.
    pub text: &'a TextModel,
    /// Hub id or path of the base.
    pub base_name: &'a str,
    /// How.
    pub settings: QuantizeSettings,
    /// What weights the error, if anything does.
    pub fisher: Option<FisherData<'a>>,
    /// The folder to write; must not exist.
    pub output: &'a Path,
    /// Where errors under each configuration are kept for other budgets; None for beside the output, while the run lasts.
    pub cache: Option<PathBuf>,
    /// Set from outside to stop after the matrix.
    pub stop: &'a AtomicBool,
}

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Gradients for Fisher information.
    Fisher,
    /// Errors of each matrix under each configuration.
    Errors,
    /// Matrices under the configurations that they got.
    Decompose,
}

/// One matrix of the result.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ModuleReport {
    /// Path of the module.
    pub module: String,
    /// Its configuration.
    #[serde(flatten)]
    pub config: NormalFloatModule,
    /// Bits a weight.
    pub bits: f64,
    /// ‖√F ⊙ (W − Q − L1 L2)‖ / ‖√F ⊙ W‖.
    pub error: f64,
    /// The same of Q = quant(W) without a low-rank change.
    pub plain: f64,
    /// Steps of the decomposition.
    pub steps: usize,
    /// The squared error.
    pub squared: f64,
    /// Bytes of the packed weight.
    pub bytes: u64,
}

/// What became of it all.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The folder.
    pub output: PathBuf,
    /// How.
    pub settings: QuantizeSettings,
    /// Bits a weight over all quantised matrices.
    pub bits: f64,
    /// Weights in them.
    pub numbers: u64,
    /// Bytes that they take.
    pub bytes: u64,
    /// Σ of squared errors.
    pub error: f64,
    /// No choice from the grid within the budget has a smaller one; None without a budget.
    pub bound: Option<f64>,
    /// Pairs of matrix and configuration, and of these such that blocks do not divide, so that the last is shorter.
    pub pairs: (usize, usize),
    /// Each matrix.
    pub modules: Vec<ModuleReport>,
}

/// The folder of what was found so far.
pub(super) struct Partial {
    pub(super) folder: PathBuf,
}

impl Partial {
    /// Opens or makes it; one that belongs to other settings is refused.
    pub(super) fn open(output: &Path, identity: &str) -> Result<Self> {
        let mut name = output.file_name().unwrap_or_default().to_os_string();
        name.push(".partial");
        let folder = output.with_file_name(name);
        let file = folder.join("identity.json");
        if folder.exists() {
            let known: Option<String> = file.is_file().then(|| read_json(&file, MAX_JSON_BYTES)).transpose()?;
            if known.as_deref() != Some(identity) {
                return Err(Error::Settings(format!(
                    "`{}` holds a run with other settings, data or base; remove it or choose another --output",
                    folder.display()
                )));
            }
        }
        create_folder(&folder.join("matrices"))?;
        write_json(&file, &identity)?;
        Ok(Self { folder })
    }

    pub(super) fn report(&self, matrix: usize) -> PathBuf {
        self.folder.join(format!("matrices/{matrix}.json"))
    }

    pub(super) fn tensors(&self, matrix: usize) -> PathBuf {
        self.folder.join(format!("matrices/{matrix}.safetensors"))
    }
}
