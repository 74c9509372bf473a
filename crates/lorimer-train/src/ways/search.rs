//! DiffoRA's search (arXiv 2502.08905): which projections of each layer deserve an adapter, by gates that learn on other rows than the
//! adapters behind them.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Result as TensorResult, Tensor, Var};
use lorimer_adapter::methods::mt19937::TorchGenerator;
use lorimer_adapter::search::{DifforaConfig, Gate, Sharing};
use lorimer_adapter::step::site_seed;
use lorimer_adapter::targets::Targeting;
use lorimer_adapter::{Adapter, Attached, CalibrationStats, Change, Delta, Method, Parameter, Role, Step};
use lorimer_model::{BaseModel, Projection, Site};
use lorimer_tensor::Gradients;
use serde_json::{Map, Value};

use crate::data::encode::Example;
use crate::error::{Error, Result};
use crate::run::step::{StepOptions, accumulate_gradients};
use crate::ways::optimizer::{AdamW, AdamWConfig, Optimizer};

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

    fn resolve(&mut self, targeted: &[&Site], _stats: &CalibrationStats) -> lorimer_adapter::Result<()> {
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

    fn attach(
        &self,
        site: &Site,
        _base: &Projection,
        _source: &mut lorimer_adapter::method::ParameterSource<'_>,
    ) -> lorimer_adapter::Result<Box<dyn Delta>> {
        let missing = || lorimer_adapter::Error::Config(format!("`{}` is not part of the search", site.path));
        let (a, b) = self.factors.get(&self.key(site)).ok_or_else(missing)?;
        let (gamma, paths) = self.gates.get(&site.layer).ok_or_else(missing)?;
        let place = paths.iter().position(|p| *p == site.path).ok_or_else(missing)?;
        // Clones of a variable are the variable itself.
        Ok(Box::new(Gated { a: a.clone(), b: b.clone(), gamma: gamma.clone(), place, gate: self.settings.gate }))
    }

    fn parameters(&self, site: &Site) -> lorimer_adapter::Result<usize> {
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
pub fn search(
    model: &dyn BaseModel,
    targeting: &Targeting,
    settings: &DifforaConfig,
    rows: &[&Example],
    mut progress: impl FnMut(usize, usize),
) -> Result<CalibrationStats> {
    let halves = [0, 1].map(|half| rows.iter().copied().skip(half).step_by(2).collect::<Vec<_>>());
    if halves.iter().any(|h| h.iter().all(|e| e.targets().next().is_none())) {
        return Err(Error::Settings(
            "diffora's search needs at least two rows with a learnt token, one for each half".into(),
        ));
    }
    let method = Searched {
        targeting: targeting.clone(),
        settings: settings.clone(),
        dtype: lorimer_model::BaseModel::dtype(model),
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
            let batch: Vec<&Example> =
                (0..size.min(half.len())).map(|i| half[(step * size + i) % half.len()]).collect();
            let supervised: usize = batch.iter().map(|e| e.targets().count()).sum();
            let mut sums = Gradients::default();
            let scale = 1.0 / supervised.max(1) as f64;
            let options = StepOptions::default();
            let found = accumulate_gradients(model, &attached, parameters, &batch, scale, options, None, &mut sums)?;
            if !found.sum.is_finite() {
                return Err(Error::Diverged("diffora's search diverged; lower search_lr or gamma_lr".into()));
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
