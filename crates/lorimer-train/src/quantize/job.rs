//! What is quantised, what is kept of it meanwhile, and what became of it.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Tensor};
use lorimer_adapter::file::bytes::safetensors_bytes;
use lorimer_model::files::{MAX_JSON_BYTES, create_folder, read_json, write_atomic, write_json};
use lorimer_model::weights::packed::NormalFloatModule;
use lorimer_model::{Base, Config, Site, TextModel, Weights};
use serde::{Deserialize, Serialize};

use super::settings::QuantizeSettings;
use crate::data::encode::Example;
use crate::error::{Error, Result};

/// The rows that Fisher information or the inputs of projections are from, and the model that they are of.
pub struct CalibrationData<'a> {
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
    /// What weights the error, if anything does: by Fisher information, or with [`super::Method::Gptq`] by the inputs.
    pub calibration: Option<CalibrationData<'a>>,
    /// The folder to write; must not exist.
    pub output: &'a Path,
    /// Where the base is written expanded again, before the folder gets its name; must not exist either.
    pub dense: Option<&'a Path>,
    /// Where errors under each configuration are kept for other budgets; None for beside the output, while the run lasts.
    pub cache: Option<PathBuf>,
    /// Set from outside to stop after the matrix.
    pub stop: &'a AtomicBool,
}

impl Quantize<'_> {
    /// A matrix in f32.
    pub(super) fn weight(&self, site: &Site) -> Result<Tensor> {
        Ok(self.weights.weight(&site.weight_path(), (site.outputs, site.inputs))?.dense(DType::F32)?)
    }

    /// Makes every matrix that is not there yet; false where `stop` was set.
    pub(super) fn each_matrix(
        &self,
        sites: &[Site],
        partial: &Partial,
        progress: &mut impl FnMut(Stage, usize, usize),
        make: impl Fn(usize, &Site) -> Result<()>,
    ) -> Result<bool> {
        for (i, site) in sites.iter().enumerate() {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(false);
            }
            progress(Stage::Decompose, i, sites.len());
            if !partial.report(i).is_file() {
                make(i, site)?;
            }
        }
        Ok(true)
    }
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

/// How the weights of a module are kept that have scales and zero points of groups.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupedModule {
    /// (outputs, inputs).
    pub shape: (usize, usize),
    /// Bits of a weight.
    pub num_bits: usize,
    /// Inputs of a group.
    pub group_size: usize,
    /// Whether zero points are 8 throughout.
    pub sym: bool,
}

/// How the weights of a module are kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ModuleConfig {
    /// As NormalFloat.
    NormalFloat(NormalFloatModule),
    /// With scales and zero points of groups.
    Grouped(GroupedModule),
}

/// One matrix of the result.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ModuleReport {
    /// Path of the module.
    pub module: String,
    /// Its configuration.
    #[serde(flatten)]
    pub config: ModuleConfig,
    /// Bits a weight.
    pub bits: f64,
    /// ‖√F ⊙ (W − Q − L1 L2)‖ / ‖√F ⊙ W‖; with [`super::Method::Gptq`] ‖(W − Q) X‖ / ‖W X‖ over the inputs X of the rows.
    pub error: f64,
    /// The same of Q = quant(W), each weight the nearest, without a low-rank change.
    pub plain: f64,
    /// Steps of the decomposition.
    pub steps: usize,
    /// The squared error; with [`super::Method::Gptq`] the mean over the inputs.
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
    /// Pairs of matrix and configuration, and of these such that blocks do not divide, so that the last is shorter; None of groups, which divide.
    pub pairs: Option<(usize, usize)>,
    /// Each matrix.
    pub modules: Vec<ModuleReport>,
}

/// Names of L1 and L2 among the tensors that are kept of a matrix.
pub(super) const FACTORS: [&str; 2] = ["left", "right"];

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

    /// Keeps what was made of a matrix; it counts once its report is there.
    pub(super) fn keep(&self, matrix: usize, tensors: Vec<(String, Tensor)>, report: &ModuleReport) -> Result<()> {
        write_atomic(&self.tensors(matrix), &safetensors_bytes(&tensors.into_iter().collect())?)?;
        Ok(write_json(&self.report(matrix), report)?)
    }
}
