//! # DiffoRA: learn which projections deserve an adapter
//!
//! Jiang et al. 2025, *DiffoRA: Enabling Parameter-Efficient Fine-Tuning via Differential Module Selection*, arXiv 2502.08905. Before the run a short search:
//! every projection (layer l, kind k) gets a gated update `y = W x + n·σ(γ_l)_k · (α/r) B A x`, σ a softmax over the n kinds of a layer, times n so that equal
//! gates are 1. Steps alternate: A and B on one half of the rows, γ on the other (first-order, as in differentiable architecture search). During the
//! search projections of one kind share A and B, which makes it cheap and steady. Then each layer keeps the ⌈ρ·n⌉ kinds of the largest γ, and
//! an ordinary LoRA is trained afresh on those, its rank raised so that the budget is that of rank r everywhere.
//!
//! Settings: `rho` (ρ), `search_steps`, `search_r`, `search_lr`, `gamma_lr`, `gate` (`softmax`, `sigmoid`), `sharing` (`kind`; `group`: within groups of
//! `group_layers` neighbouring layers; `none`). The paper leaves normalisation and sharing pattern open to reading; both are settings here.
//!
//! How well it finds what is there is tested on planted teachers of a tiny model, with these defaults and with a longer search, against what chance
//! finds (`the_search_finds_planted_projections`; numbers in docs/comparison.md). Longer searches find more.
//!
//! Trainable parameters of a projection: `r' · (inputs + outputs)` where it is chosen.
//!
//! Meant for: a fixed budget that is better spent on some projections. The search costs `search_steps` steps twice, whatever the run's length; after it the step time is
//! less than LoRA's. The file is an ordinary LoRA with full names in `target_modules`; γ stands in `lorimer.json`.
//!
//! ```
//! use lorimer_adapter::methods::diffora::choose;
//! // Two layers of three kinds, half of each: the ⌈1.5⌉ = 2 largest.
//! assert_eq!(choose(&[&[0.1, 0.9, 0.5], &[2.0, 1.0, 1.5]], 0.5), [vec![1, 2], vec![0, 2]]);
//! ```

use std::collections::BTreeMap;

use candle_core::{DType, Device, Result as TensorResult, Tensor, Var};
use lorimer_model::{Projection, Site};
use lorimer_tensor::NotFinite;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::entry::{Entry, Part, Served};
use super::lora::{FLAGS, Lora, LoraConfig, lora_file};
use super::mt19937::TorchGenerator;
use crate::adapter::Adapter;
use crate::attached::Attached;
use crate::delta::{Change, Delta};
use crate::error::{Error, Result};
use crate::file::keys::FileKeys;
use crate::method::{Bias, Calibration, CalibrationStats, Method, ParameterSource};
use crate::parameter::{Parameter, Role};
use crate::settings::{configure, split_off};
use crate::step::{Step, site_seed};
use crate::targets::{Names, Targeting};
use crate::training::search::SearchData;
use crate::training::{AdamW, AdamWConfig, Optimizer};

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "diffora",
    title: "LoRA on the projections that a search chose",
    paper: "arXiv 2502.08905",
    kind: "control",
    variants: &[],
    peft_type: "LORA",
    mergeable: true,
    served: Served::Batched,
    lr: 2e-3,
    parts: &[("diffora", Part::Search(search))],
    flags: FLAGS,
    source: include_str!("diffora.rs"),
    laws: &[
        (r#"{"r": 2, "search_steps": 4}"#, 0.0),
        (r#"{"r": 2, "search_steps": 3, "gate": "sigmoid", "sharing": "none", "rho": 0.3}"#, 0.0),
    ],
    build: |settings| {
        let mut settings = settings.clone();
        let own: DifforaConfig = configure("diffora", &split_off::<DifforaConfig>(&mut settings))?;
        own.check()?;
        let lora = LoraConfig::given("diffora", &settings)?;
        if !lora.rank_pattern.is_empty() || !lora.alpha_pattern.is_empty() {
            return Err(Error::Config(
                "`diffora` gives ranks itself: rank_pattern and alpha_pattern have no place".into(),
            ));
        }
        Ok(Box::new(Diffora { given: lora.clone(), lora: Lora::new("diffora", lora), own, gammas: BTreeMap::new() }))
    },
    // Its files are ordinary LoRAs.
    recognises: |_| false,
    from_file: lora_file,
};

impl DifforaConfig {
    fn check(&self) -> Result<()> {
        let fail = |text: &str| Err(Error::Config(text.into()));
        if !(self.rho > 0.0 && self.rho <= 1.0) {
            return fail("rho should be above 0 and at most 1");
        }
        if !(self.search_lr > 0.0 && self.gamma_lr > 0.0 && self.search_lr.is_finite() && self.gamma_lr.is_finite()) {
            return fail("search_lr and gamma_lr should be above 0");
        }
        let counts = [self.search_steps, self.search_r, self.search_batch_size, self.group_layers];
        if counts.iter().any(|c| *c == 0 || *c > 1 << 16) {
            return fail("search_steps, search_r, search_batch_size and group_layers should be between 1 and 65536");
        }
        Ok(())
    }
}

/// For each layer the places of the ⌈ρ·n⌉ largest of its n numbers, rising; of equal ones the first.
pub fn choose(gammas: &[&[f64]], rho: f64) -> Vec<Vec<usize>> {
    let of = |layer: &&[f64]| {
        let mut order: Vec<usize> = (0..layer.len()).collect();
        order.sort_by(|&a, &b| layer[b].total_cmp(&layer[a]));
        order.truncate((rho * layer.len() as f64).ceil() as usize);
        order.sort_unstable();
        order
    };
    gammas.iter().map(of).collect()
}

struct Diffora {
    /// LoRA as it was asked for.
    given: LoraConfig,
    /// LoRA on what was chosen.
    lora: Lora,
    own: DifforaConfig,
    gammas: BTreeMap<String, f64>,
}

impl Method for Diffora {
    fn name(&self) -> &'static str {
        "diffora"
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
        let mut config = Lora::new("diffora", self.given.clone()).config();
        if let Ok(Value::Object(own)) = serde_json::to_value(&self.own) {
            config.extend(own);
        }
        config
    }

    fn calibration(&self) -> Calibration {
        Calibration::Search(json!(self.own))
    }

    fn calibration_report(&self) -> Value {
        json!({ "gamma": self.gammas })
    }

    fn resolve(&mut self, targeted: &[&Site], stats: &CalibrationStats) -> Result<()> {
        if stats.is_empty() {
            return Ok(());
        }
        let mut layers: BTreeMap<Option<usize>, Vec<(&Site, f64)>> = BTreeMap::new();
        for site in targeted {
            let gamma = stats.get(&site.path).and_then(|f| f.get("gamma"));
            let gamma =
                gamma.ok_or_else(|| Error::Config(format!("the search found nothing about `{}`", site.path)))?;
            let gamma = gamma.to_dtype(DType::F64)?.flatten_all()?.get(0)?.to_scalar::<f64>()?;
            self.gammas.insert(site.path.clone(), gamma);
            layers.entry(site.layer).or_default().push((site, gamma));
        }
        let numbers: Vec<Vec<f64>> = layers.values().map(|l| l.iter().map(|(_, g)| *g).collect()).collect();
        let chosen = choose(&numbers.iter().map(Vec::as_slice).collect::<Vec<_>>(), self.own.rho);
        let kept = layers.values().zip(&chosen).flat_map(|(sites, places)| places.iter().map(|&i| sites[i].0));
        let kept: Vec<&Site> = kept.collect();
        let size = |sites: &[&Site]| sites.iter().map(|s| s.inputs + s.outputs).sum::<usize>().max(1) as f64;
        let config = &mut self.lora.config;
        let raised = ((self.given.r as f64 * size(targeted) / size(&kept)).round() as usize).max(1);
        let share = raised as f64 / self.given.r as f64;
        config.lora_alpha = self.given.lora_alpha * if config.use_rslora { share.sqrt() } else { share };
        config.r = raised;
        config.targeting.target_modules = Names::List(kept.iter().map(|site| site.path.clone()).collect());
        (config.targeting.exclude_modules, config.targeting.layers_to_transform) = (None, None);
        Ok(())
    }

    fn file_keys(&self) -> FileKeys {
        self.lora.file_keys()
    }

    fn attach(&self, site: &Site, base: &Projection, source: &mut ParameterSource<'_>) -> Result<Box<dyn Delta>> {
        self.lora.attach(site, base, source)
    }

    fn parameters(&self, site: &Site) -> Result<usize> {
        self.lora.parameters(site)
    }

    fn rows_are_independent(&self) -> bool {
        self.lora.rows_are_independent()
    }

    fn activations_per_row(&self, site: &Site) -> usize {
        self.lora.activations_per_row(site)
    }
}

/// DiffoRA's settings beside LoRA's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DifforaConfig {
    /// ρ: the share of a layer's projections that is kept.
    pub rho: f64,
    /// Steps of the search, each on A and B and on γ.
    pub search_steps: usize,
    /// Rank in the search.
    pub search_r: usize,
    /// Rate of A and B in the search.
    pub search_lr: f64,
    /// Rate of γ.
    pub gamma_lr: f64,
    /// Rows of a step of the search.
    pub search_batch_size: usize,
    /// How γ becomes a gate.
    pub gate: Gate,
    /// Which projections share A and B in the search.
    pub sharing: Sharing,
    /// With `group`: layers of a group.
    pub group_layers: usize,
}

/// How γ becomes a gate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gate {
    /// A softmax over the layer's kinds, times their number.
    #[default]
    Softmax,
    /// 1/(1 + e^−γ), times 2 so that γ = 0 is 1.
    Sigmoid,
}

/// Which projections share A and B in the search.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sharing {
    /// All of a kind.
    #[default]
    Kind,
    /// Those of a kind in neighbouring layers.
    Group,
    /// None.
    None,
}

impl Default for DifforaConfig {
    fn default() -> Self {
        Self {
            rho: 0.5,
            search_steps: 50,
            search_r: 4,
            search_lr: 5e-3,
            gamma_lr: 1e-2,
            search_batch_size: 8,
            gate: Gate::Softmax,
            sharing: Sharing::Kind,
            group_layers: 5,
        }
    }
}

/// The gated, shared adapters of a search.
struct Searched {
    targeting: Targeting,
    settings: DifforaConfig,
    dtype: DType,
    /// A and B by what shares them.
    factors: BTreeMap<String, (Var, Var)>,
    /// γ of each layer, and the paths that its numbers stand for.
    gates: BTreeMap<Option<usize>, (Var, Vec<String>)>,
}

impl Searched {
    /// What shares the factors of a site.
    fn key(&self, site: &Site) -> String {
        let layer = site.layer.unwrap_or(usize::MAX);
        match self.settings.sharing {
            // Projections of one kind may differ in shape from layer to layer.
            Sharing::Kind => format!("{} {}x{}", site.role, site.outputs, site.inputs),
            Sharing::Group => {
                format!("{} {}x{} {}", site.role, site.outputs, site.inputs, layer / self.settings.group_layers)
            }
            Sharing::None => site.path.clone(),
        }
    }
}

impl Method for Searched {
    fn name(&self) -> &'static str {
        "diffora-search"
    }

    fn targeting(&self) -> &Targeting {
        &self.targeting
    }

    fn config(&self) -> Map<String, Value> {
        Map::new()
    }

    fn resolve(&mut self, targeted: &[&Site], _stats: &CalibrationStats) -> Result<()> {
        let mut layers: BTreeMap<Option<usize>, Vec<String>> = BTreeMap::new();
        for site in targeted {
            layers.entry(site.layer).or_default().push(site.path.clone());
            let key = self.key(site);
            if !self.factors.contains_key(&key) {
                // By torch's generator, so that the same search can be made in Python (tests/goldens/make_diffora.py).
                let r = self.settings.search_r;
                let a = TorchGenerator::new(site_seed(0, &key)).kaiming(r * site.inputs, site.inputs);
                let a = Tensor::from_vec(a, (r, site.inputs), &Device::Cpu)?.to_dtype(self.dtype)?;
                let b = Tensor::zeros((site.outputs, self.settings.search_r), self.dtype, &Device::Cpu)?;
                self.factors.insert(key, (Var::from_tensor(&a)?, Var::from_tensor(&b)?));
            }
        }
        for (layer, paths) in layers {
            let gamma = Var::zeros(paths.len(), self.dtype, &Device::Cpu)?;
            self.gates.insert(layer, (gamma, paths));
        }
        Ok(())
    }

    fn attach(&self, site: &Site, _base: &Projection, _source: &mut ParameterSource<'_>) -> Result<Box<dyn Delta>> {
        let missing = || Error::Config(format!("`{}` is not part of the search", site.path));
        let (a, b) = self.factors.get(&self.key(site)).ok_or_else(missing)?;
        let (gamma, paths) = self.gates.get(&site.layer).ok_or_else(missing)?;
        let place = paths.iter().position(|p| *p == site.path).ok_or_else(missing)?;
        // Clones of a variable are the variable itself.
        Ok(Box::new(Gated { a: a.clone(), b: b.clone(), gamma: gamma.clone(), place, gate: self.settings.gate }))
    }

    fn parameters(&self, site: &Site) -> Result<usize> {
        Ok(self.settings.search_r * (site.inputs + site.outputs))
    }
}

struct Gated {
    a: Var,
    b: Var,
    /// γ of the layer.
    gamma: Var,
    place: usize,
    gate: Gate,
}

impl Gated {
    /// The factor on the update; 1 at the start.
    fn factor(&self) -> TensorResult<Tensor> {
        let gamma = self.gamma.as_tensor();
        let own = gamma.narrow(0, self.place, 1)?;
        match self.gate {
            Gate::Softmax => {
                let top = gamma.detach().max_keepdim(0)?;
                let all = gamma.broadcast_sub(&top)?.exp()?.sum_keepdim(0)?;
                (own.broadcast_sub(&top)?.exp()? / all)? * gamma.dim(0)? as f64
            }
            Gate::Sigmoid => ((own.neg()?.exp()? + 1.0)?.recip()?) * 2.0,
        }
    }
}

impl Delta for Gated {
    fn change(&self, _base: &Projection, _rows: usize, _step: &Step) -> TensorResult<Change> {
        let b = self.b.broadcast_mul(&self.factor()?)?;
        // α = 2r, as LoRA's default.
        Ok(Change::low_rank(self.a.as_tensor().clone(), b, 2.0))
    }

    fn parameters(&self) -> Vec<Parameter<'_>> {
        let [a, b] = Parameter::pair(&self.a, &self.b);
        vec![a, b, Parameter::new("gamma", &self.gamma, Role::Gate)]
    }
}

/// γ of every targeted projection, as `gamma` (1). Of the rows (in order) those at even places teach A and B, those at odd places γ.
fn search(
    data: &dyn SearchData,
    targeting: &Targeting,
    settings: &Value,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<CalibrationStats> {
    let model = data.model();
    let settings: DifforaConfig =
        serde_json::from_value(settings.clone()).map_err(|e| Error::Config(format!("diffora's search: {e}")))?;
    let halves = [0, 1].map(|half| (half..data.rows()).step_by(2).collect::<Vec<_>>());
    if halves.iter().any(|half| half.iter().all(|&row| data.supervised(row) == 0)) {
        return Err(Error::Config(
            "diffora's search needs at least two rows with a supervised token, one for each half".into(),
        ));
    }
    let method = Searched {
        targeting: targeting.clone(),
        settings: settings.clone(),
        dtype: model.dtype(),
        factors: BTreeMap::new(),
        gates: BTreeMap::new(),
    };
    let adapter = Adapter::attach(model, Box::new(method), 0)?;
    // Shared variables stand there once for each projection.
    let mut seen = std::collections::HashSet::new();
    let all = adapter.named().into_iter().filter(|p| seen.insert(p.var.as_tensor().id()));
    let (gates, factors): (Vec<_>, Vec<_>) = all.partition(|p| p.role == Role::Gate);
    let [gates, factors] = [gates, factors].map(|all| all.into_iter().map(|p| (p.name, p.var)).collect::<Vec<_>>());
    let attached = Attached::one(&adapter);
    let mut optimizers = [AdamW::new(AdamWConfig::default(), false), AdamW::new(AdamWConfig::default(), false)];
    for step in 0..settings.search_steps {
        let sides = [(&factors, settings.search_lr), (&gates, settings.gamma_lr)];
        for (side, (parameters, rate)) in sides.into_iter().enumerate() {
            let half = &halves[side];
            let size = settings.search_batch_size;
            let batch: Vec<usize> = (0..size.min(half.len())).map(|i| half[(step * size + i) % half.len()]).collect();
            let supervised: usize = batch.iter().map(|&row| data.supervised(row)).sum();
            let scale = 1.0 / supervised.max(1) as f64;
            let (loss, mut sums) = data.gradients(&attached, parameters, &batch, scale)?;
            if !loss.is_finite() {
                return Err(NotFinite::error("diffora's search diverged; lower search_lr or gamma_lr").into());
            }
            let gradients: Vec<_> = parameters.iter().map(|(_, var)| sums.remove(var.as_tensor())).collect();
            optimizers[side].step(parameters, &gradients, rate)?;
        }
        progress(step + 1, settings.search_steps);
    }
    let mut stats = CalibrationStats::new();
    // A layer's numbers stand in the order of its projections.
    let mut places: BTreeMap<Option<usize>, usize> = BTreeMap::new();
    for (site, _, delta) in adapter.sites(model) {
        let place = places.entry(site.layer).or_default();
        let Some(gamma) = delta.parameters().into_iter().find(|p| p.role == Role::Gate) else { continue };
        stats.entry(site.path.clone()).or_default().insert("gamma".into(), gamma.var.detach().narrow(0, *place, 1)?);
        *place += 1;
    }
    Ok(stats)
}
