//! # SoRA: a gate decides the rank while training
//!
//! Ding et al. 2023, *Sparse Low-rank Adaptation of Pre-trained Language Models*, EMNLP, arXiv 2311.11696, eq. 4 to 8:
//! `y = W x + (α/r) · B (g ⊙ (A x))` with a gate g (r), A (r, inputs), B (outputs, r). After the optimiser's step on g comes the proximal step of λ‖g‖₁:
//! `g ← sign(g) · max(|g| − ξ, 0)`. At the end ranks with g = 0 are dropped and g is folded into A: an ordinary LoRA with a rank a module.
//!
//! Settings, with the reference code's as defaults where it and the paper differ:
//!
//! - `xi`: ξ; unless given, 0.375 times the gates' highest rate, as the reference's script has it (3e-4 at 8e-4);
//! - `update`: `masked`, the code's three updates one after the other (|g| > ξ loses ξ, what is then below ξ is closed: in effect all below 2ξ
//!   is), or `soft`, the equation above;
//! - `threshold`: `constant` (the code's), or `lr_scaled`: ξ falls with the rate (the paper's η_t·λ);
//! - `gate_lr`: the gates' own highest rate, which is `--lr` unless given;
//! - `penalty`: λ of a further term λ · Σ|g| / p of the loss, p the number of all gates (the reference's scripts take 10 without stages, 1e-3 with them);
//! - `gate`: `normal` (N(0, 1), the code's) or `ones`;
//! - `stages` > 1 raises ξ from `xi_min` to `xi` over equal parts of the run, and saves an adapter after each in `stages/`. `schedule`: `linear`;
//!   `log_linear`, the logarithms of equal steps between e^`xi_min` and e^`xi`; `exp_linear`, equal steps of the logarithm;
//! - `random_keep`: a control, to tell what the gates know: no threshold, but gates drawn by lot from the seed are closed one after the other until
//!   that share is left.
//!
//! A gate that nothing holds open loses ξ a step, so that a run of T steps closes what begins below T · ξ, whatever the task is. Compare with
//! `random_keep` at the same share before you say that gates chose.
//!
//! Weight decay acts on A and B only. AdamW's momentum may bring a gate back from zero until the end; the ranks are counted after the last step.
//!
//! Trainable parameters of a projection: `r · (inputs + outputs) + r`.
//!
//! Meant for: finding out which modules need rank, in one run. Step time is LoRA's.
//!
//! ```
//! use lorimer_adapter::example::project;
//! // r = 1, α = 1, g = 2: ΔW x = B · 2 · (A x), x = (1, 2).
//! let parameters: &[(&str, &[f64])] = &[("lora_A", &[1., 1.]), ("lora_B", &[1., 3.]), ("gate", &[2.])];
//! let y = project("sora", r#"{"r": 1, "lora_alpha": 1}"#, &[&[0., 0.], &[0., 0.]], parameters, &[1., 2.]);
//! assert_eq!(y, [6.0, 18.0]);
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Result as TensorResult, Tensor, Var};
use lorimer_model::{Projection, Site};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::entry::{Entry, Served};
use super::lora::{FLAGS, Lora, LoraConfig, Start, lora_file};
use super::random::normal;
use crate::delta::{Change, Delta};
use crate::dropout::Dropout;
use crate::error::{Error, Result};
use crate::file::keys::FileKeys;
use crate::method::{Bias, Method, ParameterSource};
use crate::parameter::{Named, Parameter, Role};
use crate::settings::{configure, split_off};
use crate::step::{Step, site_seed};
use crate::targets::Targeting;
use crate::training::callback::gates;
use crate::training::{Callback, CallbackKind, RunShape, Training};

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "sora",
    title: "LoRA whose ranks are thinned out in training",
    paper: "arXiv 2311.11696",
    kind: "control",
    variants: &[],
    peft_type: "LORA",
    mergeable: true,
    served: Served::Batched,
    lr: 8e-4,
    parts: &[],
    flags: FLAGS,
    source: include_str!("sora.rs"),
    laws: &[(r#"{"r": 4}"#, 0.0), (r#"{"r": 3, "gate": "ones", "use_rslora": true, "lora_dropout": 0.2}"#, 0.0)],
    build: |settings| {
        let mut settings = settings.clone();
        let own: SoraConfig = configure("sora", &split_off::<SoraConfig>(&mut settings))?;
        let lora = LoraConfig::given("sora", &settings)?;
        let patterns = !lora.rank_pattern.is_empty() || !lora.alpha_pattern.is_empty();
        if lora.use_dora || patterns || Start::parse(&lora.init_lora_weights)?.moves_base() {
            return Err(Error::Config(
                "`sora` takes one rank, LoRA's own form and a start that leaves the base".into(),
            ));
        }
        own.check()?;
        Ok(Box::new(Sora { lora: Lora::new("sora", lora), own }))
    },
    // Its files are ordinary LoRAs.
    recognises: |_| false,
    from_file: lora_file,
};

/// ξ over the gates' highest rate, where ξ is not given: the reference's script takes 3e-4 at 8e-4.
pub const XI_OF_RATE: f64 = 0.375;

/// SoRA's settings beside LoRA's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SoraConfig {
    /// ξ; `null`: 0.375 times the gates' highest rate.
    pub xi: Option<f64>,
    /// What becomes of a gate after each step.
    pub update: Update,
    /// Whether ξ falls with the learning rate.
    pub threshold: Threshold,
    /// The gates' highest learning rate; `null`: that of A and B.
    pub gate_lr: Option<f64>,
    /// How gates begin.
    pub gate: GateStart,
    /// λ of λ · Σ|g| / p in the loss, p the number of all gates.
    pub penalty: f64,
    /// Stages of the sparsifying schedule; 1: none.
    pub stages: usize,
    /// ξ of the first stage.
    pub xi_min: f64,
    /// How ξ rises from stage to stage.
    pub schedule: Rise,
    /// A control: share of the gates that stay when the others are closed by lot, in place of the threshold.
    pub random_keep: Option<f64>,
}

/// Whether ξ falls with the learning rate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Threshold {
    /// ξ.
    #[default]
    Constant,
    /// ξ · η_t / η_peak.
    LrScaled,
}

/// How gates begin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateStart {
    /// N(0, 1).
    #[default]
    Normal,
    /// One.
    Ones,
}

/// How ξ rises from a to b.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rise {
    /// By equal steps.
    #[default]
    Linear,
    /// The logarithms of equal steps between e^a and e^b: nearly `linear` where both are small.
    LogLinear,
    /// Equal steps of the logarithm: slowly first.
    ExpLinear,
}

impl Default for SoraConfig {
    fn default() -> Self {
        Self {
            xi: None,
            update: Update::Masked,
            threshold: Threshold::Constant,
            gate_lr: None,
            gate: GateStart::Normal,
            penalty: 1e-3,
            stages: 1,
            xi_min: 0.0,
            schedule: Rise::Linear,
            random_keep: None,
        }
    }
}

impl SoraConfig {
    fn check(&self) -> Result<()> {
        let fail = |text: &str| Err(Error::Config(text.into()));
        if ![self.xi.unwrap_or(0.0), self.penalty, self.xi_min].iter().all(|v| v.is_finite() && *v >= 0.0) {
            return fail("xi, xi_min and penalty should be numbers of at least 0");
        }
        if self.gate_lr.is_some_and(|rate| !(rate.is_finite() && rate > 0.0)) {
            return fail("gate_lr should be above 0");
        }
        if self.random_keep.is_some_and(|share| !(share > 0.0 && share <= 1.0)) {
            return fail("random_keep should be above 0 and at most 1");
        }
        if self.stages == 0 || self.stages > 1000 {
            return Err(Error::Config(format!("stages = {} should be between 1 and 1000", self.stages)));
        }
        if self.stages == 1 {
            return Ok(());
        }
        let Some(xi) = self.xi else { return fail("stages raise ξ from xi_min to xi; say xi too") };
        if self.threshold == Threshold::LrScaled {
            return fail("stages raise ξ, which threshold = lr_scaled would lower again; use constant");
        }
        if self.random_keep.is_some() {
            return fail("stages raise ξ, of which random_keep makes no use; leave one of them out");
        }
        if self.xi_min > xi || (self.schedule == Rise::ExpLinear && self.xi_min == 0.0) {
            return fail("xi_min should be at most xi, and above 0 with schedule = exp_linear");
        }
        if xi > 100.0 {
            return fail("xi should be at most 100 with stages");
        }
        Ok(())
    }

    /// ξ of each stage; where it is not given, as a multiple of the gates' highest rate.
    pub fn thresholds(&self) -> Vec<f64> {
        let high = self.xi.unwrap_or(XI_OF_RATE);
        if self.stages == 1 {
            return vec![high];
        }
        let between = |low: f64, high: f64| {
            (0..self.stages).map(move |i| low + (high - low) * i as f64 / (self.stages - 1) as f64)
        };
        match self.schedule {
            Rise::Linear => between(self.xi_min, high).collect(),
            Rise::LogLinear => between(self.xi_min.exp(), high.exp()).map(f64::ln).collect(),
            Rise::ExpLinear => between(self.xi_min.ln(), high.ln()).map(f64::exp).collect(),
        }
    }
}

struct Sora {
    lora: Lora,
    own: SoraConfig,
}

impl Method for Sora {
    fn name(&self) -> &'static str {
        "sora"
    }

    fn targeting(&self) -> &Targeting {
        self.lora.targeting()
    }

    fn bias(&self) -> Bias {
        self.lora.bias()
    }

    fn stored_config(&self) -> Map<String, Value> {
        self.lora.stored_config()
    }

    fn config(&self) -> Map<String, Value> {
        let mut config = self.lora.config();
        if let Ok(Value::Object(own)) = serde_json::to_value(&self.own) {
            config.extend(own);
        }
        config
    }

    fn training(&self) -> Training {
        let callback = SoftThreshold {
            stages: self.own.thresholds(),
            of_rate: self.own.xi.is_none(),
            lr_scaled: self.own.threshold == Threshold::LrScaled,
            update: self.own.update,
            gate_lr: self.own.gate_lr,
            penalty: self.own.penalty,
            random_keep: self.own.random_keep,
        };
        Training { callback: Some(Arc::new(callback)), ..Default::default() }
    }

    /// The ranks that are left, with α so that its ratio to the rank stays.
    fn describe(&self, config: &mut Map<String, Value>, modules: &BTreeMap<String, Vec<(&'static str, Tensor)>>) {
        let c = &self.lora.config;
        let (mut ranks, mut alphas, mut kept) = (Map::new(), Map::new(), Vec::new());
        for (path, tensors) in modules {
            let Some(rank) = tensors.first().and_then(|(_, a)| a.dims().first().copied()) else { continue };
            kept.push(path.clone());
            if rank != c.r {
                let share = rank as f64 / c.r as f64;
                ranks.insert(path.clone(), json!(rank));
                alphas.insert(path.clone(), json!(c.lora_alpha * if c.use_rslora { share.sqrt() } else { share }));
            }
        }
        if kept.len() < modules.len() {
            config.insert("target_modules".into(), json!(kept));
            config.insert("exclude_modules".into(), Value::Null);
            config.insert("layers_to_transform".into(), Value::Null);
        }
        config.insert("rank_pattern".into(), Value::Object(ranks));
        config.insert("alpha_pattern".into(), Value::Object(alphas));
    }

    fn file_keys(&self) -> FileKeys {
        self.lora.file_keys()
    }

    fn attach(&self, site: &Site, base: &Projection, source: &mut ParameterSource<'_>) -> Result<Box<dyn Delta>> {
        let (config, dtype) = (&self.lora.config, source.dtype());
        let start = Start::parse(&config.init_lora_weights)?;
        let (mut b, mut gate) = (None, Tensor::ones(config.r, dtype, &Device::Cpu)?);
        let a = source.trainable("lora_A.weight", &[config.r, site.inputs], |rng| {
            let (a, zero) = start.factors(config, (site, base), dtype, rng)?;
            b = Some(zero);
            if self.own.gate == GateStart::Normal {
                gate = normal((1, config.r), rng)?.flatten_all()?.to_dtype(dtype)?;
            }
            Ok(a)
        })?;
        let b = source
            .trainable("lora_B.weight", &[site.outputs, config.r], |_| b.ok_or(Error::Config("no start".into())))?;
        let dropout = Dropout::new(config.lora_dropout, &site.path);
        let scaling = config.scaling(&site.path)?;
        Ok(Box::new(SoraDelta { a, b, gate: Var::from_tensor(&gate)?, scaling, dropout }))
    }

    fn parameters(&self, site: &Site) -> Result<usize> {
        Ok(self.lora.parameters(site)? + self.lora.config.r)
    }

    fn rows_are_independent(&self) -> bool {
        self.lora.rows_are_independent()
    }

    fn activations_per_row(&self, site: &Site) -> usize {
        self.lora.activations_per_row(site)
    }
}

struct SoraDelta {
    a: Var,
    b: Var,
    /// g (r).
    gate: Var,
    scaling: f64,
    dropout: Dropout,
}

impl Delta for SoraDelta {
    fn change(&self, _base: &Projection, _rows: usize, _step: &Step) -> TensorResult<Change> {
        let a = self.a.broadcast_mul(&self.gate.unsqueeze(1)?)?;
        Ok(Change::low_rank(a, self.b.as_tensor().clone(), self.scaling))
    }

    fn dropout(&self) -> Option<&Dropout> {
        Some(&self.dropout)
    }

    fn parameters(&self) -> Vec<Parameter<'_>> {
        vec![
            Parameter::new("lora_A", &self.a, Role::A),
            Parameter::new("lora_B", &self.b, Role::B),
            Parameter::new("gate", &self.gate, Role::Gate),
        ]
    }

    fn stored(&self) -> TensorResult<Vec<(&'static str, Tensor)>> {
        let gate = self.gate.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let kept: Vec<u32> = (0..gate.len()).filter(|&i| gate[i] != 0.0).map(|i| i as u32).collect();
        if kept.is_empty() {
            return Ok(Vec::new());
        }
        let kept = Tensor::from_slice(&kept, kept.len(), &Device::Cpu)?;
        let a = self.a.detach().broadcast_mul(&self.gate.detach().unsqueeze(1)?)?.index_select(&kept, 0)?;
        Ok(vec![("lora_A.weight", a), ("lora_B.weight", self.b.detach().index_select(&kept, 1)?)])
    }
}

/// How gates are thinned out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SoftThreshold {
    /// The threshold ξ of each stage.
    pub stages: Vec<f64>,
    /// Whether these are multiples of the gates' highest learning rate.
    pub of_rate: bool,
    /// Whether ξ is multiplied by the learning rate over its peak (the paper's), or stays (the reference code's).
    pub lr_scaled: bool,
    /// What becomes of a gate after each step.
    pub update: Update,
    /// The gates' highest learning rate; None: the run's.
    pub gate_lr: Option<f64>,
    /// λ of λ · Σ|g| / p in the loss, p the number of all gates.
    pub penalty: f64,
    /// In place of the threshold: gates drawn by lot are closed over the run until this share is left.
    pub random_keep: Option<f64>,
}

/// What becomes of a gate g after each step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Update {
    /// The reference code's: where |g| > ξ it loses ξ, and what is then below ξ is zero.
    #[default]
    Masked,
    /// sign(g) · max(|g| − ξ, 0), the paper's.
    Soft,
}

impl Update {
    /// What a gate becomes.
    pub fn of(self, g: f64, xi: f64) -> f64 {
        let size = g.abs();
        match self {
            Self::Soft if size > xi => (size - xi).copysign(g),
            Self::Soft => 0.0,
            Self::Masked => {
                let left = if size > xi { size - xi } else { size };
                if left < xi { 0.0 } else { left.copysign(g) }
            }
        }
    }
}

impl CallbackKind for SoftThreshold {
    fn build(&self, run: RunShape, parameters: &[Named<'_>]) -> Box<dyn Callback> {
        let count = gates(parameters).map(|gate| gate.elem_count()).sum();
        let mut lot: Vec<usize> = (0..count).collect();
        lot.shuffle(&mut ChaCha8Rng::seed_from_u64(site_seed(run.seed, "gates by lot")));
        Box::new(Gates { settings: self.clone(), total: run.steps, peak: run.peak, lot })
    }
}

/// SoRA's threshold on gates.
struct Gates {
    settings: SoftThreshold,
    total: usize,
    /// The run's highest learning rate.
    peak: f64,
    /// All gates, in the order in which a lot closes them.
    lot: Vec<usize>,
}

impl Gates {
    /// The stage of a step, counted from 0.
    fn stage(&self, step: usize) -> usize {
        let stages = self.settings.stages.len().max(1);
        (step * stages / self.total.max(1)).min(stages - 1)
    }

    /// ξ of a step of which `rate` is the learning rate over its peak.
    fn threshold(&self, step: usize, rate: f64) -> f64 {
        let s = &self.settings;
        let xi = s.stages.get(self.stage(step)).copied().unwrap_or(0.0);
        let xi = if s.of_rate { xi * s.gate_lr.unwrap_or(self.peak) } else { xi };
        if s.lr_scaled { xi * rate } else { xi }
    }

    /// Whether each gate is closed after a step by lot: as many more after every step.
    fn closed_by_lot(&self, step: usize, keep: f64) -> Vec<bool> {
        let count = self.lot.len() as f64 * (1.0 - keep) * (step + 1) as f64 / self.total.max(1) as f64;
        let mut closed = vec![false; self.lot.len()];
        self.lot.iter().take(count.round() as usize).for_each(|&i| closed[i] = true);
        closed
    }
}

impl Callback for Gates {
    fn rate(&self, role: Role) -> f64 {
        self.settings.gate_lr.filter(|_| role == Role::Gate).map_or(1.0, |rate| rate / self.peak)
    }

    fn decays(&self, role: Role) -> bool {
        role != Role::Gate
    }

    fn gradient(&self, role: Role, var: &Var, g: Tensor) -> Result<Tensor> {
        match self.settings.penalty > 0.0 && role == Role::Gate {
            true => Ok((g + (var.as_tensor().sign()? * (self.settings.penalty / self.lot.len() as f64))?)?),
            false => Ok(g),
        }
    }

    fn after(&self, step: usize, rate: f64, parameters: &[Named<'_>]) -> Result<()> {
        let xi = self.threshold(step, rate);
        let closed = self.settings.random_keep.map(|keep| self.closed_by_lot(step, keep));
        let mut place = 0;
        for var in gates(parameters) {
            let mut gates = var.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
            for gate in &mut gates {
                *gate = match &closed {
                    None => self.settings.update.of(*gate, xi),
                    Some(closed) if closed[place] => 0.0,
                    Some(_) => *gate,
                };
                place += 1;
            }
            var.set(&Tensor::from_vec(gates, var.shape(), var.device())?.to_dtype(var.dtype())?)?;
        }
        Ok(())
    }

    fn stage_ended(&self, step: usize) -> Option<usize> {
        let stage = self.stage(step);
        let last = step + 1 >= self.total || self.stage(step + 1) > stage;
        (self.settings.stages.len() > 1 && last).then_some(stage + 1)
    }
}

#[cfg(test)]
mod tests;
