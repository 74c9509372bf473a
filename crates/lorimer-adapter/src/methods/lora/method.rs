//! LoRA as a method, which many others are with settings of their own.

use candle_core::{Device, Tensor, Var};
use lorimer_model::{Projection, Site};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value};

use super::config::LoraConfig;
use super::delta::LoraDelta;
use super::dora;
use super::eva::EvaConfig;
use super::ranks;
use super::start::Start;
use crate::delta::{Delta, LowRank};
use crate::dropout::Dropout;
use crate::error::{Error, Result};
use crate::file::keys::FileKeys;
use crate::method::{Bias, Calibration, CalibrationStats, Method, ParameterSource};
use crate::row_rate::Allora;
use crate::targets::Targeting;
use crate::training::Training;

/// An ordinary LoRA out of a file, for methods that write such.
pub(crate) fn lora_file(config: &Map<String, Value>) -> Result<Box<dyn Method>> {
    Ok(Box::new(Lora::new("lora", LoraConfig::from_file(config)?)))
}

/// LoRA and, with `use_dora`, DoRA.
pub(crate) struct Lora {
    pub(crate) config: LoraConfig,
    pub(crate) name: &'static str,
    /// How it is trained.
    pub(crate) training: Training,
    /// ALLoRA's factor on gradients.
    pub(crate) row_rate: Option<Allora>,
}

impl Lora {
    pub(crate) fn new(name: &'static str, config: LoraConfig) -> Self {
        Self { config, name, training: Training::default(), row_rate: None }
    }

    fn eva(&self) -> Option<EvaConfig> {
        let is_eva = Start::parse(&self.config.init_lora_weights).is_ok_and(|s| s == Start::Eva);
        is_eva.then(|| self.config.eva_config.clone().unwrap_or_default())
    }
}

impl Method for Lora {
    fn name(&self) -> &'static str {
        self.name
    }

    fn targeting(&self) -> &Targeting {
        &self.config.targeting
    }

    fn bias(&self) -> Bias {
        self.config.bias
    }

    fn stored_config(&self) -> Map<String, Value> {
        // The start was parsed when the configuration was checked, so `stored` cannot fail.
        self.config.stored().unwrap_or_else(|_| self.config.clone()).peft_json()
    }

    fn config(&self) -> Map<String, Value> {
        self.config.peft_json()
    }

    fn training(&self) -> Training {
        self.training.clone()
    }

    fn learning_rate(&self) -> Option<f64> {
        self.training.optimizer.as_ref()?.learning_rate()
    }

    fn calibration(&self) -> Calibration {
        self.eva().map_or(Calibration::Nothing, |eva| eva.calibration())
    }

    fn components(&self, site: &Site) -> Result<usize> {
        match self.eva() {
            Some(eva) => Ok(eva.most(self.config.rank(&site.path)?)),
            None => Ok(0),
        }
    }

    fn allocate(&self, explained: &[(&Site, &[f64])]) -> Result<Vec<usize>> {
        let budget = explained.iter().map(|(site, _)| self.config.rank(&site.path)).sum::<Result<usize>>()?;
        Ok(ranks::allocate(&explained.iter().map(|(_, shares)| *shares).collect::<Vec<_>>(), budget))
    }

    fn resolve(&mut self, targeted: &[&Site], stats: &CalibrationStats) -> Result<()> {
        match self.eva() {
            Some(eva) if !stats.is_empty() => eva.resolve(&mut self.config, targeted, stats),
            _ => Ok(()),
        }
    }

    fn file_keys(&self) -> FileKeys {
        match self.config.use_dora {
            true => FileKeys::of_modules(&[
                "lora_A.weight",
                "lora_B.weight",
                "lora_magnitude_vector",
                "lora_magnitude_vector.weight",
            ]),
            false => FileKeys::of_modules(&["lora_A.weight", "lora_B.weight"]),
        }
    }

    fn attach(&self, site: &Site, base: &Projection, source: &mut ParameterSource<'_>) -> Result<Box<dyn Delta>> {
        let (rank, dtype) = (self.config.rank(&site.path)?, source.dtype());
        let start = Start::parse(&self.config.init_lora_weights)?;
        let shapes = ([rank, site.inputs], [site.outputs, rank]);
        let (a, b) = if source.is_file() {
            let none = |_: &mut ChaCha8Rng| Err(Error::Config("a file gives its tensors".into()));
            let a = source.trainable("lora_A.weight", &shapes.0, none)?;
            (a, source.trainable("lora_B.weight", &shapes.1, none)?)
        } else if let (Start::Eva, Some(eva)) = (start, self.eva()) {
            let a = eva.start(source, rank)?;
            let b = Tensor::zeros((site.outputs, rank), dtype, &Device::Cpu)?;
            (Var::from_tensor(&a.to_dtype(dtype)?.contiguous()?)?, Var::from_tensor(&b)?)
        } else {
            let mut b = None;
            let a = source.trainable("lora_A.weight", &shapes.0, |rng| {
                let (a, start_b) = start.factors(&self.config, (site, base), dtype, rng)?;
                b = Some(start_b);
                Ok(a)
            })?;
            (a, source.trainable("lora_B.weight", &shapes.1, |_| b.ok_or(Error::Config("no start".into())))?)
        };
        // A file that PEFT saved without conversion counts from the start that PEFT forms again at load.
        let origin = match (start.moves_base(), source.is_file()) {
            (false, _) => None,
            (true, false) => Some((a.copy()?.detach(), b.copy()?.detach())),
            (true, true) if source.brings_weight() => {
                return Err(Error::Refused(format!(
                    "`{}`: the file holds a weight that init_lora_weights {} has moved already; save the adapter in PEFT with `path_initial_model_for_weight_conversion`",
                    site.path, self.config.init_lora_weights
                )));
            }
            (true, true) => {
                Some(start.factors(&self.config, (site, base), dtype, &mut rand::SeedableRng::seed_from_u64(0))?)
            }
        };
        let scaling = self.config.scaling(&site.path)?;
        let dropout = Dropout::new(self.config.lora_dropout, &site.path);
        let low_rank = LoraDelta { scaling, dropout, a, b, origin, row_rate: self.row_rate.clone() };
        Ok(match self.config.use_dora {
            true => Box::new(dora::DoraDelta::new(low_rank, base, site, source)?),
            false => Box::new(low_rank),
        })
    }

    fn parameters(&self, site: &Site) -> Result<usize> {
        let magnitudes = if self.config.use_dora { site.outputs } else { 0 };
        Ok(self.config.rank(&site.path)? * (site.inputs + site.outputs) + magnitudes)
    }

    fn rows_are_independent(&self) -> bool {
        self.config.lora_dropout == 0.0
    }

    fn activations_per_row(&self, site: &Site) -> usize {
        let rank = self.config.rank(&site.path).unwrap_or_default();
        let moved = Start::parse(&self.config.init_lora_weights).is_ok_and(Start::moves_base);
        match (self.config.use_dora, moved) {
            (true, _) if self.config.lora_dropout > 0.0 => site.inputs + 6 * site.outputs + 2 * rank,
            (true, _) => rank + site.outputs,
            (false, true) => 2 * rank,
            (false, false) if self.config.lora_dropout > 0.0 => rank + site.inputs,
            (false, false) => rank,
        }
    }

    fn low_rank_alpha(&self, module: &str) -> Result<Option<f64>> {
        self.config.alpha(module).map(Some)
    }

    fn low_rank(&self, module: &str, tensors: &std::collections::BTreeMap<String, Tensor>) -> Result<Option<LowRank>> {
        let (Some(a), Some(b)) = (tensors.get("lora_A.weight"), tensors.get("lora_B.weight")) else { return Ok(None) };
        // The change counts from a start that only the base gives.
        if Start::parse(&self.config.init_lora_weights)?.moves_base() {
            return Ok(None);
        }
        let rank = self.config.rank(module)?;
        if a.dims().len() != 2 || b.dims().len() != 2 || a.dim(0)? != rank || b.dim(1)? != rank {
            return Err(Error::Mismatch(format!(
                "`{module}`: lora_A {:?} and lora_B {:?} do not have the rank {rank} of the configuration",
                a.dims(),
                b.dims()
            )));
        }
        Ok(Some(LowRank { a: a.clone(), b: b.clone(), scaling: self.config.scaling(module)? }))
    }
}
