//! # LoRAPrune: heads and channels are pruned while a LoRA trains
//!
//! Zhang et al. 2024, *LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning*, Findings of ACL, arXiv 2305.18403:
//! `y = m ⊙ (W x + (α/r) · B A x + b)` with A (r, inputs), B (outputs, r) and a mask m (outputs) of ones and zeros. One run ends in a smaller dense
//! model that is tuned already: `lorimer merge --slice` writes it. See [Pruning](../prune.md).
//!
//! No gradient of W is formed. With the clipped gradients gA and gB of a step, G = gB A + B gA − gB gA stands for it, and the importance of a weight
//! is |G ⊙ (W + (α/r) B A)| (`power` 1, the reference code's) or its square (`power` 2, the paper's). It is summed over a unit, divided by the
//! module's norm, added up over the modules of attention (q, k, v, o) or of the gated unit (gate, up, down), and averaged over steps:
//! u ← 0.9 u + 0.1 (sum). Units are a key-value head with its query heads, and a channel.
//!
//! The pruned share ρ rises from `prune_start` at the end of `warmup` to `prune_ratio` at the beginning of `cooldown` (shares of all steps) as
//! ρ_f + (ρ₀ − ρ_f)(1 − progress)³. Every `prune_every` steps between, and once more at its end, each layer on its own loses its ⌊ρ · units⌋ least
//! important units. What is gone stays gone.
//!
//! Settings, beside LoRA's: `prune_ratio`, `prune_start`, `prune_every`, `warmup`, `cooldown`, `decay` (0.9), `power`; `score`: `lora` (the above),
//! `magnitude` (G = 1), or `random` (a control: units by lot from the seed); `protect`: the first ⌊protect · layers⌋ layers and the last one lose
//! nothing; 0: every layer does.
//!
//! All projections of a layer have to be adapted, since units are scored by all of them. A run that would prune nothing is refused: no layer adapted, only
//! protected ones, or less than one unit. Where the reference code and the paper differ, the code's is
//! the default. Two things are other than in the code: it counts 32 heads whatever the model has, and it stops just short of `prune_ratio`. With few
//! key-value heads ⌊ρ · units⌋ is coarse (1 of 3 at 0.5); `merge --slice` prints what was reached.
//!
//! Trainable parameters of a projection: `r · (inputs + outputs)`.
//!
//! Meant for: a model that has to be smaller and does one task. Step time is LoRA's and one pass over the weights.
//!
//! ```
//! use lorimer_adapter::example::project;
//! // r = 1, α = 1: ΔW x = B (A x), x = (1, 2); the mask is ones at the start.
//! let parameters: &[(&str, &[f64])] = &[("lora_A", &[1., 1.]), ("lora_B", &[1., 3.])];
//! let y = project("loraprune", r#"{"r": 1, "lora_alpha": 1}"#, &[&[0., 0.], &[0., 0.]], parameters, &[1., 2.]);
//! assert_eq!(y, [3.0, 9.0]);
//! ```

mod callback;
mod config;
pub mod score;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use candle_core::{DType, Device, Result as TensorResult, Tensor, Var};
use lorimer_model::{LayerShape, ModelShape, Projection, Site};
use lorimer_tensor::ops::low_rank::{LowRankTerm, Part};
use lorimer_tensor::{Ops, frozen_linear};
use serde_json::{Map, Value};

use super::entry::{Entry, Served};
use super::lora::{FLAGS, Lora, LoraConfig, Start};
use crate::delta::{Change, Delta, LowRank};
use crate::dropout::Dropout;
use crate::error::{Error, Result};
use crate::file::keys::FileKeys;
use crate::method::{Bias, CalibrationStats, Method, ParameterSource};
use crate::parameter::{Parameter, Role};
use crate::settings::{configure, split_off};
use crate::step::Step;
use crate::targets::Targeting;
use crate::training::Training;

use config::SCORE;

pub use callback::{PruneSchedule, sparsity};
pub use config::{LoraPruneConfig, MASK, Score};

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "loraprune",
    title: "Heads and channels are pruned while a LoRA trains",
    paper: "arXiv 2305.18403",
    kind: "control",
    variants: &[],
    peft_type: PEFT_TYPE,
    mergeable: true,
    served: Served::Batched,
    lr: 1e-3,
    parts: &[],
    flags: FLAGS,
    source: include_str!("loraprune.rs"),
    laws: &[(r#"{"r": 3}"#, 0.0), (r#"{"r": 2, "prune_ratio": 0.3, "protect": 0, "lora_dropout": 0.2}"#, 0.0)],
    build: |settings| LoraPrune::built(settings, LoraConfig::given),
    recognises: |config| config.get("peft_type").and_then(Value::as_str) == Some(PEFT_TYPE),
    from_file: |config| LoraPrune::built(config, |_, lora| LoraConfig::from_file(lora)),
};

/// PEFT does not have it: as plain LoRA the masks would be lost.
const PEFT_TYPE: &str = "LORAPRUNE";

struct LoraPrune {
    lora: Lora,
    own: LoraPruneConfig,
    /// Of the base, once it is known.
    layers: Vec<LayerShape>,
}

impl LoraPrune {
    /// Of settings, among which are LoRA's as `lora` reads them.
    fn built(
        settings: &Map<String, Value>,
        lora: impl Fn(&'static str, &Map<String, Value>) -> Result<LoraConfig>,
    ) -> Result<Box<dyn Method>> {
        let mut settings = settings.clone();
        let own: LoraPruneConfig = configure("loraprune", &split_off::<LoraPruneConfig>(&mut settings))?;
        let lora = lora("loraprune", &settings)?;
        if lora.use_dora || lora.bias != Bias::None || Start::parse(&lora.init_lora_weights)?.moves_base() {
            return Err(Error::Config(
                "`loraprune` takes LoRA's own form without trained biases and a start that leaves the base".into(),
            ));
        }
        own.check()?;
        Ok(Box::new(Self { lora: Lora::new("loraprune", lora), own, layers: Vec::new() }))
    }

    /// LoRA's configuration with the settings of its own.
    fn with_own(&self, mut config: Map<String, Value>) -> Map<String, Value> {
        if let Ok(Value::Object(own)) = serde_json::to_value(&self.own) {
            config.extend(own);
        }
        config.insert("peft_type".into(), PEFT_TYPE.into());
        config
    }
}

/// Refuses layers of which only some projections are adapted.
fn check_whole_layers(targeted: &[&Site]) -> Result<()> {
    let mut roles: BTreeMap<usize, BTreeSet<&str>> = BTreeMap::new();
    for site in targeted.iter().filter(|site| !site.is_head) {
        if let Some(layer) = site.layer {
            roles.entry(layer).or_default().insert(&site.role);
        }
    }
    for (layer, roles) in roles {
        let apart = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
        let fused = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"];
        let wanted =
            if roles.iter().any(|role| fused[..3].contains(role) && *role != "o_proj") { &fused[..] } else { &apart };
        let missing: Vec<&str> = wanted.iter().filter(|role| !roles.contains(**role)).copied().collect();
        if !missing.is_empty() {
            return Err(Error::Config(format!(
                "`loraprune` scores heads and channels by all projections of a layer, and {} of layer {layer} are not adapted; use --target-modules all-linear, with --layers for some layers only",
                missing.join(", ")
            )));
        }
    }
    Ok(())
}

impl Method for LoraPrune {
    fn name(&self) -> &'static str {
        "loraprune"
    }

    fn targeting(&self) -> &Targeting {
        self.lora.targeting()
    }

    fn stored_config(&self) -> Map<String, Value> {
        self.with_own(self.lora.stored_config())
    }

    fn config(&self) -> Map<String, Value> {
        self.with_own(self.lora.config())
    }

    fn training(&self) -> Training {
        let callback = PruneSchedule { settings: self.own.clone(), layers: self.layers.clone() };
        Training { callback: Some(Arc::new(callback)), ..Default::default() }
    }

    fn bind(&mut self, shape: &ModelShape, _sites: &[&Site]) -> Result<()> {
        self.layers.clone_from(&shape.layers);
        Ok(())
    }

    fn resolve(&mut self, targeted: &[&Site], _stats: &CalibrationStats) -> Result<()> {
        check_whole_layers(targeted)
    }

    fn file_keys(&self) -> FileKeys {
        FileKeys::of_modules(&["lora_A.weight", "lora_B.weight", MASK])
    }

    fn attach(&self, site: &Site, base: &Projection, source: &mut ParameterSource<'_>) -> Result<Box<dyn Delta>> {
        let (config, dtype) = (&self.lora.config, source.dtype());
        let (rank, start) = (config.rank(&site.path)?, Start::parse(&config.init_lora_weights)?);
        let mut b = None;
        let a = source.trainable("lora_A.weight", &[rank, site.inputs], |rng| {
            let (a, zero) = start.factors(config, (site, base), dtype, rng)?;
            b = Some(zero);
            Ok(a)
        })?;
        let b =
            source.trainable("lora_B.weight", &[site.outputs, rank], |_| b.ok_or(Error::Config("no start".into())))?;
        let outputs = site.outputs;
        let masked = !site.is_head && !matches!(site.role.as_str(), "o_proj" | "down_proj");
        let buffers = match masked {
            true => {
                let mask = source.trainable(MASK, &[outputs], |_| Ok(Tensor::ones(outputs, dtype, &Device::Cpu)?))?;
                let values = mask.to_dtype(DType::F64)?.to_vec1::<f64>()?;
                if values.iter().any(|m| *m != 0.0 && *m != 1.0) {
                    return Err(Error::Mismatch(format!("`{}.{MASK}` should hold ones and zeros only", site.path)));
                }
                Some((mask, Var::zeros(outputs, dtype, &Device::Cpu)?))
            }
            false => None,
        };
        let (scaling, dropout) = (config.scaling(&site.path)?, Dropout::new(config.lora_dropout, &site.path));
        Ok(Box::new(MaskedDelta { a, b, scaling, dropout, buffers }))
    }

    fn parameters(&self, site: &Site) -> Result<usize> {
        self.lora.parameters(site)
    }

    fn rows_are_independent(&self) -> bool {
        self.lora.rows_are_independent()
    }

    fn not_additive(&self) -> Option<&'static str> {
        Some("its masks take outputs of the base away")
    }

    fn activations_per_row(&self, site: &Site) -> usize {
        self.lora.activations_per_row(site)
    }

    fn remarks(&self, tensors: &BTreeMap<String, Tensor>) -> Result<Vec<(String, f64)>> {
        let Some(mask) = tensors.get(MASK) else { return Ok(Vec::new()) };
        Ok(vec![("kept".into(), mask.to_dtype(DType::F64)?.mean_all()?.to_scalar::<f64>()?)])
    }
}

struct MaskedDelta {
    /// (r, inputs).
    a: Var,
    /// (outputs, r).
    b: Var,
    scaling: f64,
    dropout: Dropout,
    /// m and the average importance of each output's unit (outputs), where outputs are units.
    buffers: Option<(Var, Var)>,
}

impl MaskedDelta {
    fn low(&self) -> LowRank {
        LowRank { a: self.a.as_tensor().clone(), b: self.b.as_tensor().clone(), scaling: self.scaling }
    }
}

impl Delta for MaskedDelta {
    fn change(&self, _base: &Projection, _rows: usize, step: &Step) -> TensorResult<Change> {
        Ok(match &self.buffers {
            None => Change::LowRank(self.low()),
            // Dropout is of the change's input, and not of the product that is masked with it.
            Some(_) if !self.dropout.is_off(step) => Change::Free,
            Some((mask, _)) => Change::RowScaled(self.low(), mask.as_detached_tensor()),
        })
    }

    fn output(&self, ops: Ops<'_>, base: &Projection, x: &Tensor, step: &Step) -> TensorResult<Tensor> {
        let Some((mask, _)) = &self.buffers else { candle_core::bail!("an unmasked projection has a form") };
        let (dropped, mask, low) = (self.mask(x, step)?, mask.as_detached_tensor(), self.low());
        if !ops.is_recorded() {
            let input = dropped.map_or_else(|| Ok(x.clone()), |dropped| x * dropped)?;
            return (frozen_linear(x, &base.weight)? + low.apply(&input)?)?.broadcast_mul(&mask);
        }
        let term = LowRankTerm { mask: dropped, ..LowRankTerm::new(low.a, low.b, low.scaling) };
        let y = ops.project(x, &[Part { weight: Some(&base.weight), low_rank: Some(term) }])?;
        ops.scale_columns(&y[0], &mask)
    }

    fn bias_change(&self, base: &Projection) -> TensorResult<Option<Tensor>> {
        match (&self.buffers, &base.bias) {
            (Some((mask, _)), Some(bias)) => {
                Ok(Some(((mask.as_detached_tensor() - 1.0)?.to_dtype(bias.dtype())? * bias)?))
            }
            _ => Ok(None),
        }
    }

    fn dropout(&self) -> Option<&Dropout> {
        Some(&self.dropout)
    }

    fn parameters(&self) -> Vec<Parameter<'_>> {
        let mut all: Vec<_> = Parameter::pair(&self.a, &self.b).into();
        if let Some((mask, score)) = &self.buffers {
            all.extend([Parameter::new(MASK, mask, Role::Buffer), Parameter::new(SCORE, score, Role::Buffer)]);
        }
        all
    }

    fn stored(&self) -> TensorResult<Vec<(&'static str, Tensor)>> {
        let mut all = vec![("lora_A.weight", self.a.detach()), ("lora_B.weight", self.b.detach())];
        all.extend(self.buffers.iter().map(|(mask, _)| (MASK, mask.as_detached_tensor())));
        Ok(all)
    }
}
