//! From settings to a folder.

use std::path::PathBuf;
use std::sync::atomic::Ordering;

use candle_core::Tensor;
use lorimer_adapter::algebra::folder::refuse_own_folder;
use lorimer_model::Site;
use lorimer_model::files::{MAX_JSON_BYTES, create_folder, read_json, write_json};
use lorimer_model::weights::packed::{NormalFloatModule, bitsandbytes_tensors, normal_float_tensors};
use lorimer_model::weights::{SafetensorsFile, hex};
use lorimer_tensor::storage::normal_float::NfConfig;
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::allocate::{Choice, allocate};
use super::decompose::{self, Begin, Decomposed, Steps, Weighting, decompose};
use super::job::{CalibrationData, FACTORS, ModuleConfig, ModuleReport, Partial, Quantize, Report, Stage};
use super::settings::{Format, Method};
use super::{fisher, grouped, output};
use crate::data::encode::rows_hash;
use crate::error::{Error, Result};

/// Version of what is kept of a run.
const VERSION: u32 = 1;
/// A step that lowers the error by less than this part of it is a decomposition's last.
const TOLERANCE: f64 = 5e-3;

/// Weights of matrices.
fn weights(sites: &[Site]) -> u64 {
    sites.iter().map(|site| (site.outputs * site.inputs) as u64).sum()
}

/// Bits that a matrix takes under a configuration, its offset with them.
fn bits(config: &NfConfig, site: &Site) -> u64 {
    config.bytes(site.outputs * site.inputs) as u64 * 8 + 32
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
        let bound = match self.settings.groups {
            Some(groups) => self.round(&sites, groups, &partial, &mut progress)?.then_some(None),
            None => self.normal_float(&sites, &partial, &mut progress)?,
        };
        let Some(bound) = bound else { return Ok(None) };
        progress(Stage::Decompose, sites.len(), sites.len());
        let report = |i: usize| Ok(read_json::<ModuleReport>(&partial.report(i), MAX_JSON_BYTES)?);
        let modules = (0..sites.len()).map(report).collect::<Result<Vec<_>>>()?;
        let bytes: u64 = modules.iter().map(|m| m.bytes).sum();
        let (configs, numbers) = (self.settings.configs(), weights(&sites));
        let divided = |c: &NfConfig| sites.iter().filter(|s| !c.divides(s.outputs * s.inputs)).count();
        let pairs = (sites.len() * configs.len(), configs.iter().map(divided).sum());
        let report = Report {
            output: self.output.to_path_buf(),
            settings: self.settings,
            bits: bytes as f64 * 8.0 / numbers.max(1) as f64,
            numbers,
            bytes,
            error: modules.iter().map(|m| m.squared).sum(),
            bound,
            pairs: self.settings.groups.is_none().then_some(pairs),
            modules,
        };
        if self.stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        output::write(self, &sites, &partial, &report)?;
        Ok(Some(report))
    }

    /// Puts every matrix into NormalFloat: the bound of the allocation, where there is one; None where `stop` was set.
    fn normal_float(
        &self,
        sites: &[Site],
        partial: &Partial,
        progress: &mut impl FnMut(Stage, usize, usize),
    ) -> Result<Option<Option<f64>>> {
        if let Some(CalibrationData { base, rows }) = &self.calibration {
            let progress = |done, total| progress(Stage::Fisher, done, total);
            if !fisher::compute(base.model(), rows, &partial.folder, self.stop, progress)? {
                return Ok(None);
            }
        }
        let configs = self.settings.configs();
        let mut bound = None;
        let mut chosen = vec![0; sites.len()];
        if configs.len() > 1 {
            let Some(choices) = self.choices(sites, &configs, partial, progress)? else { return Ok(None) };
            let found = allocate(&choices, self.budget(weights(sites)))?;
            (chosen, bound) = (found.chosen, Some(found.bound));
        }
        let matrix = |i: usize, site: &Site| self.matrix(i, site, &configs[chosen[i]], partial);
        Ok(self.each_matrix(sites, partial, progress, matrix)?.then_some(bound))
    }

    /// The matrices to quantise: all projections but the head.
    fn check(&self) -> Result<Vec<Site>> {
        self.settings.check()?;
        if self.settings.method == Method::Gptq && self.calibration.is_none() {
            return Err(Error::Settings("`gptq` rounds by the inputs that rows give".into()));
        }
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
        if let Some(groups) = self.settings.groups {
            grouped::check(&sites, groups)?;
        }
        let (configs, numbers) = (self.settings.configs(), weights(&sites));
        let fewest = |site: &Site| configs.iter().map(|config| bits(config, site)).min().unwrap_or(0);
        let least: u64 = sites.iter().map(fewest).sum();
        if configs.len() > 1 && least > self.budget(numbers) {
            let least = (least as f64 / numbers.max(1) as f64 * 1000.0).ceil() / 1000.0;
            let asked = self.settings.bits;
            return Err(Error::Settings(format!(
                "--bits {asked} is less than the {least} bits a weight that the smallest configurations take; raise --bits"
            )));
        }
        Ok(sites)
    }

    /// The budget in bits for so many weights.
    fn budget(&self, numbers: u64) -> u64 {
        (self.settings.bits * numbers as f64) as u64
    }

    /// What decides the result, as a hash.
    fn identity(&self) -> Result<String> {
        self.hash(&self.settings)
    }

    fn hash(&self, settings: &impl serde::Serialize) -> Result<String> {
        let rows = self.calibration.as_ref().map(|data| rows_hash(&data.rows));
        let key = (VERSION, settings, self.weights.fingerprint()?, rows);
        let key = serde_json::to_vec(&key).map_err(|e| Error::Settings(e.to_string()))?;
        Ok(hex(&Sha256::digest(key)))
    }

    /// Where errors under each configuration are kept: they do not depend on the budget.
    fn errors_folder(&self, partial: &Partial) -> Result<PathBuf> {
        let s = &self.settings;
        let folder = match &self.cache {
            Some(cache) => cache.join(self.hash(&(s.method, s.rank, s.grid, s.steps, s.seed))?),
            None => partial.folder.join("errors"),
        };
        create_folder(&folder)?;
        Ok(folder)
    }

    /// A matrix in f32, what weights its error, and what errors are multiplied by.
    fn load(&self, site: &Site, partial: &Partial) -> Result<(Tensor, Option<Weighting>, f64)> {
        let w = self.weight(site)?;
        if self.calibration.is_none() {
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
        let folder = self.errors_folder(partial)?;
        let mut all = Vec::new();
        for (i, site) in sites.iter().enumerate() {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            progress(Stage::Errors, i, sites.len());
            let file = folder.join(format!("{i}.json"));
            // What cannot be read is computed again.
            let kept: Option<Vec<f64>> = file.is_file().then(|| read_json(&file, MAX_JSON_BYTES).ok()).flatten();
            let costs = match kept.filter(|kept| kept.len() == configs.len()) {
                Some(kept) => kept,
                None => {
                    let (w, weighting, factor) = self.load(site, partial)?;
                    let cost = |config: &NfConfig| -> Result<f64> {
                        Ok(decompose(&w, config, self.steps(), weighting.as_ref())?.error * factor)
                    };
                    let costs = configs.par_iter().map(cost).collect::<Result<Vec<_>>>()?;
                    write_json(&file, &costs)?;
                    costs
                }
            };
            let bits = configs.iter().map(|config| bits(config, site));
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
        let values = w.flatten_all()?.to_vec1::<f32>()?;
        let whole = decompose::squared(&values, weighting.as_ref());
        let name = site.weight_path();
        let shape = (site.outputs, site.inputs);
        let (mut tensors, bytes) = match self.settings.format {
            Format::Bitsandbytes => {
                (bitsandbytes_tensors(&name, &values, shape)?, lorimer_tensor::storage::nf4::bytes(shape))
            }
            _ => (normal_float_tensors(&name, &quantised)?, quantised.bytes()),
        };
        if let Some((left, right)) = factors {
            tensors.extend(FACTORS.map(str::to_string).into_iter().zip([left, right]));
        }
        let relative = |error: f64| if whole > 0.0 { (error / whole).sqrt() } else { 0.0 };
        let report = ModuleReport {
            module: site.path.clone(),
            config: ModuleConfig::NormalFloat(NormalFloatModule::of(shape, config)),
            bits: bytes as f64 * 8.0 / (shape.0 * shape.1).max(1) as f64,
            error: relative(error),
            plain: relative(plain),
            steps: steps.len(),
            squared: error,
            bytes: bytes as u64,
        };
        partial.keep(number, tensors, &report)
    }
}
