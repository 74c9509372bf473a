//! `lorimer quantize`: a model in few bits, and an adapter that begins as the best repair.
//!
//! LQ-LoRA (Guo et al. 2024, arXiv:2311.12023): every projection is decomposed under each configuration of a grid ([`decompose`]), the configurations are
//! shared out under one budget of bits ([`allocate`]), the error perhaps weighted by Fisher information. LoftQ (Li et al. 2024, arXiv:2310.08659) is
//! the same with one configuration for all, and plain NormalFloat without the low-rank change.
//!
//! What is found of a matrix is kept in a folder beside the output (`<output>.partial`), so that an interrupted run goes on; the output gets its name when
//! it is whole.

pub mod allocate;
pub mod decompose;
mod fisher;
mod output;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Tensor};
use lorimer_adapter::algebra::folder::refuse_own_folder;
use lorimer_adapter::file::bytes::safetensors_bytes;
use lorimer_model::files::{MAX_JSON_BYTES, create_folder, read_json, write_atomic, write_json};
use lorimer_model::weights::packed::{NormalFloatModule, bitsandbytes_tensors, normal_float_tensors};
use lorimer_model::weights::{SafetensorsFile, hex};
use lorimer_model::{Base, Config, Site, TextModel, Weights};
use lorimer_tensor::storage::levels::ScaleType;
use lorimer_tensor::storage::normal_float::NfConfig;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use self::allocate::{Choice, allocate};
use self::decompose::{Begin, Decomposed, Steps, Weighting, decompose};
use crate::data::encode::{Example, rows_hash};
use crate::error::{Error, Result};

/// A step that lowers the error by less than this part of it is a decomposition's last.
const TOLERANCE: f64 = 5e-3;

/// How a model is quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Configurations under a budget, and an adapter that repairs.
    LqLora,
    /// One configuration, and an adapter that repairs.
    Loftq,
    /// One configuration, no adapter.
    Nf,
}

/// Configurations that LQ-LoRA chooses from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Grid {
    /// Thirteen, from 2.06 to 8.13 bits.
    Small,
    /// The paper's 432.
    Paper,
}

impl Grid {
    /// Its configurations.
    pub fn configs(self) -> Vec<NfConfig> {
        match self {
            Self::Small => {
                let all = [2, 3, 4, 8].map(|bits| {
                    [(4, 64), (8, 64), (4, 32), (4, 16)].map(|(scale_bits, block)| NfConfig {
                        bits,
                        scale_bits,
                        scale_type: ScaleType::Bf16,
                        block,
                        scale_block: 256,
                    })
                });
                all.into_iter().flatten().filter(|c| c.bits < 8 || (c.scale_bits, c.block) == (8, 64)).collect()
            }
            Self::Paper => {
                let mut all = Vec::new();
                for bits in [2, 3, 4, 8] {
                    for scale_bits in [2, 3, 4, 8] {
                        for scale_type in [ScaleType::Bf16, ScaleType::F16, ScaleType::F32] {
                            for block in [16, 32, 64] {
                                for scale_block in [16, 64, 256] {
                                    all.push(NfConfig { bits, scale_bits, scale_type, block, scale_block });
                                }
                            }
                        }
                    }
                }
                all
            }
        }
    }
}

/// How the weights are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// Lorimer's own.
    LorimerNf,
    /// bitsandbytes' NF4 with double quantisation, which transformers loads.
    Bitsandbytes,
}

/// What `lorimer quantize` is told.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct QuantizeSettings {
    /// How.
    pub method: Method,
    /// Bits a weight: a budget for LQ-LoRA, 2, 3, 4 or 8 otherwise.
    pub bits: f64,
    /// Rank of the adapter; 0 with [`Method::Nf`].
    pub rank: usize,
    /// α of the adapter.
    pub alpha: f64,
    /// Configurations to choose from.
    pub grid: Grid,
    /// Most steps of a decomposition.
    pub steps: usize,
    /// Seed of the randomised SVD.
    pub seed: u64,
    /// How the weights are written.
    pub format: Format,
}

impl QuantizeSettings {
    /// Refuses what does not go together.
    ///
    /// # Errors
    ///
    /// Fails if a setting is out of its range or does not go with another.
    pub fn check(&self) -> Result<()> {
        let fail = |text: String| Err(Error::Settings(text));
        let whole = [2.0, 3.0, 4.0, 8.0].contains(&self.bits);
        if self.method == Method::LqLora && !(self.bits > 0.0 && self.bits <= 16.0) {
            return fail(format!("--bits {} should be between the grid's fewest, about 2.1, and 16", self.bits));
        }
        if self.method != Method::LqLora && !whole {
            return fail(format!(
                "--bits {} should be 2, 3, 4 or 8; a budget between is for --method lq-lora",
                self.bits
            ));
        }
        match (self.method, self.rank) {
            (Method::Nf, 0) => {}
            (Method::Nf, _) => return fail("`nf` has no low-rank change; leave --rank out".into()),
            (_, 0) => {
                return fail("--rank should be at least 1; `--method nf` quantises without a low-rank change".into());
            }
            _ => {}
        }
        if !(self.alpha.is_finite() && self.alpha > 0.0) {
            return fail(format!("--alpha {} should be a number above 0", self.alpha));
        }
        if !(1..=1000).contains(&self.steps) {
            return fail(format!("--steps {} should be between 1 and 1000", self.steps));
        }
        if self.format == Format::Bitsandbytes && (self.method, self.bits) != (Method::Nf, 4.0) {
            return fail("bitsandbytes has NF4 only: `--format bitsandbytes` goes with `--method nf --bits 4`".into());
        }
        Ok(())
    }

    fn configs(&self) -> Vec<NfConfig> {
        match self.method {
            Method::LqLora => self.grid.configs(),
            _ => vec![NfConfig::plain(self.bits as usize)],
        }
    }
}

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
struct Partial {
    folder: PathBuf,
}

impl Partial {
    /// Opens or makes it; one that belongs to other settings is refused.
    fn open(output: &Path, identity: &str) -> Result<Self> {
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
        create_folder(&folder.join("errors"))?;
        create_folder(&folder.join("matrices"))?;
        write_json(&file, &identity)?;
        Ok(Self { folder })
    }

    fn errors(&self, matrix: usize) -> PathBuf {
        self.folder.join(format!("errors/{matrix}.json"))
    }

    fn report(&self, matrix: usize) -> PathBuf {
        self.folder.join(format!("matrices/{matrix}.json"))
    }

    fn tensors(&self, matrix: usize) -> PathBuf {
        self.folder.join(format!("matrices/{matrix}.safetensors"))
    }
}

impl Quantize<'_> {
    /// Does it; None where `stop` was set, and then the same call goes on.
    ///
    /// # Errors
    ///
    /// Fails if the settings do not go together or with the base, if the output exists or is the base itself, or if a file cannot be read or written.
    pub fn run(&self, mut progress: impl FnMut(Stage, usize, usize)) -> Result<Option<Report>> {
        let sites = self.check()?;
        let partial = Partial::open(self.output, &self.identity()?)?;
        if let Some(fisher) = &self.fisher {
            let progress = |done, total| progress(Stage::Fisher, done, total);
            if !fisher::compute(fisher.base.model(), &fisher.rows, &partial.folder, self.stop, progress)? {
                return Ok(None);
            }
        }
        let configs = self.settings.configs();
        let numbers: u64 = sites.iter().map(|site| (site.outputs * site.inputs) as u64).sum();
        let mut bound = None;
        let mut chosen = vec![0; sites.len()];
        if configs.len() > 1 {
            let Some(choices) = self.choices(&sites, &configs, &partial, &mut progress)? else { return Ok(None) };
            let found = allocate(&choices, (self.settings.bits * numbers as f64) as u64)?;
            (chosen, bound) = (found.chosen, Some(found.bound));
        }
        for (i, site) in sites.iter().enumerate() {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            progress(Stage::Decompose, i, sites.len());
            if !partial.report(i).is_file() {
                self.matrix(i, site, &configs[chosen[i]], &partial)?;
            }
        }
        progress(Stage::Decompose, sites.len(), sites.len());
        let report = |i: usize| Ok(read_json::<ModuleReport>(&partial.report(i), MAX_JSON_BYTES)?);
        let modules = (0..sites.len()).map(report).collect::<Result<Vec<_>>>()?;
        let bytes: u64 = modules.iter().map(|m| m.bytes).sum();
        let divided = |c: &NfConfig| sites.iter().filter(|s| !c.divides(s.outputs * s.inputs)).count();
        let report = Report {
            output: self.output.to_path_buf(),
            settings: self.settings,
            bits: bytes as f64 * 8.0 / numbers.max(1) as f64,
            numbers,
            bytes,
            error: modules.iter().map(|m| m.squared).sum(),
            bound,
            pairs: (sites.len() * configs.len(), configs.iter().map(divided).sum()),
            modules,
        };
        output::write(self, &sites, &partial, &report)?;
        Ok(Some(report))
    }

    /// The matrices to quantise: all projections but the head.
    fn check(&self) -> Result<Vec<Site>> {
        self.settings.check()?;
        self.config.decoder("`lorimer quantize`")?;
        if let Some(packing) = self.weights.packing() {
            let base = self.weights.origin().display();
            return Err(Error::Settings(format!(
                "`{base}` is packed already, as {packing}; quantise the model that it was"
            )));
        }
        refuse_own_folder(self.weights.origin(), self.output)?;
        if self.output.file_name().is_none() {
            return Err(Error::Settings(format!("`{}` is no name for a new folder", self.output.display())));
        }
        if self.output.exists() {
            return Err(Error::Settings(format!("`{}` exists; choose another --output", self.output.display())));
        }
        let sites: Vec<Site> = self.config.sites().into_iter().filter(|site| !site.is_head).collect();
        if let Some(site) = sites.iter().find(|s| s.outputs.min(s.inputs) < self.settings.rank) {
            return Err(Error::Settings(format!(
                "rank {} is more than `{}` ({}, {}) has",
                self.settings.rank, site.path, site.outputs, site.inputs
            )));
        }
        Ok(sites)
    }

    /// What decides the result.
    fn identity(&self) -> Result<String> {
        let rows = self.fisher.as_ref().map(|fisher| rows_hash(&fisher.rows));
        let key = (1, &self.settings, self.weights.fingerprint()?, rows);
        let key = serde_json::to_vec(&key).map_err(|e| Error::Settings(e.to_string()))?;
        Ok(hex(&Sha256::digest(key)))
    }

    /// A matrix in f32, what weights its error, and what errors are multiplied by.
    fn load(&self, site: &Site, partial: &Partial) -> Result<(Tensor, Option<Weighting>, f64)> {
        let w = self.weights.weight(&site.weight_path(), (site.outputs, site.inputs))?.dense(DType::F32)?;
        if self.fisher.is_none() {
            return Ok((w, None, 1.0));
        }
        let file = SafetensorsFile::open(&partial.folder.join("fisher.safetensors"))?;
        let missing = || Error::Settings(format!("the Fisher information lacks `{}`", site.path));
        let weighting = Weighting::new(&file.load(&site.path)?.ok_or_else(missing)?)?;
        let factor = if weighting.is_some() { 1.0 } else { 0.0 };
        Ok((w, weighting, factor))
    }

    fn steps(&self) -> Steps {
        let begin = if self.settings.method == Method::LqLora { Begin::LowRank } else { Begin::Quantised };
        Steps {
            rank: self.settings.rank,
            most: self.settings.steps,
            tolerance: TOLERANCE,
            begin,
            seed: self.settings.seed,
        }
    }

    /// Bits and error of every matrix under every configuration; None where `stop` was set.
    fn choices(
        &self,
        sites: &[Site],
        configs: &[NfConfig],
        partial: &Partial,
        progress: &mut impl FnMut(Stage, usize, usize),
    ) -> Result<Option<Vec<Vec<Choice>>>> {
        let mut all = Vec::new();
        for (i, site) in sites.iter().enumerate() {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            progress(Stage::Errors, i, sites.len());
            let file = partial.errors(i);
            let costs: Vec<f64> = match file.is_file() {
                true => read_json(&file, MAX_JSON_BYTES)?,
                false => {
                    let (w, weighting, factor) = self.load(site, partial)?;
                    let cost = |config: &NfConfig| -> Result<f64> {
                        Ok(decompose(&w, config, self.steps(), weighting.as_ref())?.error * factor)
                    };
                    let costs = configs.par_iter().map(cost).collect::<Result<Vec<_>>>()?;
                    write_json(&file, &costs)?;
                    costs
                }
            };
            let count = site.outputs * site.inputs;
            let bits = configs.iter().map(|config| config.bytes(count) as u64 * 8 + 32);
            all.push(bits.zip(costs).map(|(bits, cost)| Choice { bits, cost }).collect());
        }
        progress(Stage::Errors, sites.len(), sites.len());
        Ok(Some(all))
    }

    /// Decomposes a matrix under its configuration and keeps the result.
    fn matrix(&self, number: usize, site: &Site, config: &NfConfig, partial: &Partial) -> Result<()> {
        let (w, weighting, _) = self.load(site, partial)?;
        let Decomposed { quantised, factors, error, plain, steps } =
            decompose(&w, config, self.steps(), weighting.as_ref())?;
        let whole = decompose::squared(&w, weighting.as_ref())?;
        let name = site.weight_path();
        let shape = (site.outputs, site.inputs);
        let (mut tensors, bytes) = match self.settings.format {
            Format::LorimerNf => (normal_float_tensors(&name, &quantised)?, quantised.bytes()),
            Format::Bitsandbytes => {
                let values = w.flatten_all()?.to_vec1::<f32>()?;
                (bitsandbytes_tensors(&name, &values, shape)?, lorimer_tensor::storage::nf4::bytes(shape))
            }
        };
        if let Some((left, right)) = factors {
            tensors.extend([("left".to_string(), left), ("right".to_string(), right)]);
        }
        write_atomic(&partial.tensors(number), &safetensors_bytes(&tensors.into_iter().collect())?)?;
        let relative = |error: f64| if whole > 0.0 { (error / whole).sqrt() } else { 0.0 };
        let report = ModuleReport {
            module: site.path.clone(),
            config: NormalFloatModule::of(shape, config),
            bits: bytes as f64 * 8.0 / (shape.0 * shape.1).max(1) as f64,
            error: relative(error),
            plain: relative(plain),
            steps: steps.len(),
            squared: error,
            bytes: bytes as u64,
        };
        write_json(&partial.report(number), &report)?;
        Ok(())
    }
}
