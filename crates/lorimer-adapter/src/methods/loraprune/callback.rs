//! When units are scored and pruned.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Tensor, Var};
use lorimer_model::LayerShape;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::config::{LoraPruneConfig, MASK, SCORE, Score};
use super::score::{Scored, keep_most};
use crate::delta::Change;
use crate::error::{Error, Result};
use crate::parameter::Named;
use crate::pruning::units::{Axis, groups, share_of};
use crate::step::site_seed;
use crate::training::callback::GradientOf;
use crate::training::optimizer::Module;
use crate::training::{Callback, CallbackKind, RunShape};

/// How units are pruned over a run.
#[derive(Clone, Debug, PartialEq)]
pub struct PruneSchedule {
    /// The settings.
    pub settings: LoraPruneConfig,
    /// The base's layers.
    pub layers: Vec<LayerShape>,
}

/// The pruned share at step `step` (from 0) of `total`.
pub fn sparsity(step: usize, total: usize, s: &LoraPruneConfig) -> f64 {
    let (step, total) = (step as f64, total as f64);
    let (first, last) = (s.prune_start, s.prune_ratio);
    if step <= s.warmup * total {
        first
    } else if step > total - s.cooldown * total {
        last
    } else {
        let left = 1.0 - (step - s.warmup * total) / (total - (s.cooldown + s.warmup) * total);
        last + (first - last) * left.powi(3)
    }
}

impl PruneSchedule {
    /// The step of the last pruning: the first one at which the whole share is reached.
    fn last(&self, total: usize) -> usize {
        let end = (total as f64 - self.settings.cooldown * total as f64).ceil() as usize;
        end.min(total.saturating_sub(1))
    }

    /// The share of units that a step leaves pruned; None where it prunes nothing.
    pub fn due(&self, step: usize, total: usize) -> Option<f64> {
        let s = &self.settings;
        if s.prune_ratio == 0.0 {
            return None;
        }
        let ratio = sparsity(step, total, s);
        match step == self.last(total) {
            true => Some(s.prune_ratio),
            false => {
                Some(ratio).filter(|r| step.is_multiple_of(s.prune_every) && *r > s.prune_start && *r < s.prune_ratio)
            }
        }
    }

    /// Whether a layer keeps all its units.
    fn protects(&self, layer: usize) -> bool {
        let count = self.layers.len();
        let first = share_of(self.settings.protect, count, false);
        layer < first || (self.settings.protect > 0.0 && layer + 1 == count)
    }
}

impl CallbackKind for PruneSchedule {
    fn build(&self, run: RunShape, _parameters: &[Named<'_>]) -> Box<dyn Callback> {
        Box::new(Pruner { schedule: self.clone(), run })
    }
}

/// LoRAPrune's masks in a run.
struct Pruner {
    schedule: PruneSchedule,
    run: RunShape,
}

/// The modules of a layer's attention or of its gated unit.
type Groups<'m, 'a> = BTreeMap<(usize, bool), Vec<&'m Module<'a>>>;

fn parameter<'a>(module: &Module<'a>, key: &str) -> Option<&'a Var> {
    module.2.parameters().into_iter().find(|p| p.key == key).map(|p| p.var)
}

fn values(var: &Var) -> Result<Vec<f64>> {
    Ok(var.to_dtype(DType::F64)?.to_vec1::<f64>()?)
}

fn set(var: &Var, values: Vec<f64>) -> Result<()> {
    Ok(var.set(&Tensor::from_vec(values, var.shape(), var.device())?.to_dtype(var.dtype())?)?)
}

impl Pruner {
    fn groups<'m, 'a>(&self, modules: &'m [Module<'a>]) -> Groups<'m, 'a> {
        let mut found = Groups::new();
        for module in modules {
            let (site, ..) = module;
            let Some(layer) = site.layer.filter(|layer| !site.is_head && !self.schedule.protects(*layer)) else {
                continue;
            };
            let shape = self.schedule.layers.get(layer);
            if let Some((_, attention, _)) = shape.and_then(|shape| groups(&site.role, shape)) {
                found.entry((layer, attention)).or_default().push(module);
            }
        }
        found
    }

    fn units(&self, layer: usize, attention: bool) -> usize {
        let shape = &self.schedule.layers[layer];
        if attention { shape.kv_heads } else { shape.inner }
    }

    /// The unit of each of a module's rows or columns.
    fn unit_of(&self, module: &Module<'_>, layer: usize) -> Result<(Axis, Vec<usize>)> {
        let found = groups(&module.0.role, &self.schedule.layers[layer]);
        let missing = || Error::Config(format!("`{}` has no heads or channels", module.0.path));
        found.map(|(axis, _, unit)| (axis, unit)).ok_or_else(missing)
    }

    /// Importance in this step of the units of every layer, by all modules; None where one is no number.
    fn importance(&self, groups: &Groups<'_, '_>, gradient: &GradientOf<'_>) -> Result<Option<Vec<Vec<f64>>>> {
        let s = &self.schedule.settings;
        let one = |(layer, attention): (usize, bool), module: &Module<'_>| -> Result<Vec<f64>> {
            let (axis, unit) = self.unit_of(module, layer)?;
            let missing = || Error::Config(format!("`{}` has no LoRA", module.0.path));
            let (a, b) =
                (parameter(module, "lora_A").ok_or_else(missing)?, parameter(module, "lora_B").ok_or_else(missing)?);
            let units = self.units(layer, attention);
            let gradients = match s.score {
                Score::Magnitude | Score::Random => None,
                Score::Lora => match (gradient(a), gradient(b)) {
                    (Some(ga), Some(gb)) => Some((ga, gb)),
                    // What the loss does not depend on is of no importance.
                    _ => return Ok(vec![0.0; units]),
                },
            };
            let scaling = match module.2.change(module.1, 0, &Default::default())? {
                Change::LowRank(low) | Change::RowScaled(low, _) => low.scaling,
                _ => return Err(missing()),
            };
            let factors = (a.as_tensor(), b.as_tensor());
            let scored = Scored { weight: &module.1.weight, factors, gradients, scaling, power: s.power };
            scored.by_unit(axis, &unit, units)
        };
        let tasks: Vec<_> = groups.iter().flat_map(|(key, modules)| modules.iter().map(move |m| (*key, *m))).collect();
        let found = tasks.par_iter().map(|(key, module)| one(*key, module)).collect::<Result<Vec<_>>>()?;
        let mut sums: BTreeMap<(usize, bool), Vec<f64>> = groups
            .keys()
            .map(|&(layer, attention)| ((layer, attention), vec![0.0; self.units(layer, attention)]))
            .collect();
        for ((key, _), own) in tasks.iter().zip(found) {
            if let Some(sum) = sums.get_mut(key) {
                sum.iter_mut().zip(own).for_each(|(sum, own)| *sum += own);
            }
        }
        let sums: Vec<Vec<f64>> = sums.into_values().collect();
        Ok(Some(sums).filter(|sums| sums.iter().flatten().all(|v| v.is_finite())))
    }

    /// By lot, alike in every step.
    fn lot(&self, layer: usize, attention: bool) -> Vec<f64> {
        let name = format!("units of layer {layer} {attention}");
        let mut rng = ChaCha8Rng::seed_from_u64(site_seed(self.run.seed, &name));
        (0..self.units(layer, attention)).map(|_| rng.random_range(0.0..1.0)).collect()
    }

    /// A buffer of a module, one number a unit.
    fn read(&self, module: &Module<'_>, layer: usize, (key, units): (&str, usize)) -> Result<Option<Vec<f64>>> {
        let Some(var) = parameter(module, key) else { return Ok(None) };
        let (mut found, all) = (vec![0.0; units], values(var)?);
        for (unit, value) in self.unit_of(module, layer)?.1.into_iter().zip(all) {
            found[unit] = value;
        }
        Ok(Some(found))
    }

    /// Sets a buffer of modules, where they have it.
    fn write(&self, modules: &[&Module<'_>], layer: usize, (key, units): (&str, &[f64])) -> Result<()> {
        for module in modules {
            if let Some(var) = parameter(module, key) {
                set(var, self.unit_of(module, layer)?.1.into_iter().map(|unit| units[unit]).collect())?;
            }
        }
        Ok(())
    }

    /// What a buffer of a layer's units holds.
    fn held(&self, modules: &[&Module<'_>], layer: usize, what: (&str, usize)) -> Result<Vec<f64>> {
        for module in modules {
            if let Some(found) = self.read(module, layer, what)? {
                return Ok(found);
            }
        }
        Err(Error::Config(format!("layer {layer} has no masks")))
    }
}

impl Callback for Pruner {
    fn prunes(&self) -> bool {
        true
    }

    fn check(&self, modules: &[Module<'_>]) -> Result<()> {
        let s = &self.schedule.settings;
        if s.prune_ratio == 0.0 {
            return Ok(());
        }
        let nothing = |why: &str| Err(Error::Config(format!("`loraprune` would prune nothing: {why}")));
        let layers: BTreeSet<usize> =
            modules.iter().filter(|(site, ..)| !site.is_head).filter_map(|(site, ..)| site.layer).collect();
        if layers.is_empty() {
            return nothing("no layer is adapted; use --target-modules all-linear, or prune_ratio=0 for plain LoRA");
        }
        if layers.iter().all(|layer| self.schedule.protects(*layer)) {
            return nothing(&format!(
                "protect={} keeps all {} adapted layers of {} whole; choose other --layers, or a smaller share",
                s.protect,
                layers.len(),
                self.schedule.layers.len()
            ));
        }
        let groups = self.groups(modules);
        let most = groups.keys().map(|(layer, attention)| self.units(*layer, *attention)).max().unwrap_or(0);
        match share_of(s.prune_ratio, most, false) {
            0 => nothing(&format!("prune_ratio={} of at most {most} units is less than one", s.prune_ratio)),
            _ => Ok(()),
        }
    }

    fn before(&self, step: usize, modules: &[Module<'_>], gradient: &GradientOf<'_>) -> Result<()> {
        let s = &self.schedule.settings;
        if s.prune_ratio == 0.0 || step > self.schedule.last(self.run.steps) {
            return Ok(());
        }
        let groups = self.groups(modules);
        let importance = if s.score == Score::Random { None } else { self.importance(&groups, gradient)? };
        let due = self.schedule.due(step, self.run.steps);
        for (place, (&(layer, attention), modules)) in groups.iter().enumerate() {
            let units = self.units(layer, attention);
            let mut average = match s.score {
                Score::Random => self.lot(layer, attention),
                _ => self.held(modules, layer, (SCORE, units))?,
            };
            if let Some(now) = importance.as_ref().map(|all| &all[place]) {
                average.iter_mut().zip(now).for_each(|(u, now)| *u = s.decay * *u + (1.0 - s.decay) * now);
                self.write(modules, layer, (SCORE, &average))?;
            }
            let Some(ratio) = due else { continue };
            let kept: Vec<bool> = self.held(modules, layer, (MASK, units))?.iter().map(|m| *m != 0.0).collect();
            let count = share_of(ratio, units, false);
            if count > kept.iter().filter(|kept| !**kept).count() {
                let left = keep_most(&average, &kept, count);
                let mask: Vec<f64> = left.into_iter().map(|kept| f64::from(u8::from(kept))).collect();
                self.write(modules, layer, (MASK, &mask))?;
            }
        }
        Ok(())
    }
}
