//! What the gates of an adapter are over some rows: of a mixture's experts λ, of routed experts how much goes to each, of ranks that a token chooses
//! how often each acts.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Result as TensorResult, Tensor};
use lorimer_model::{
    Adaptation, AttentionCall, BaseModel, Batch, BlockScope, Inference, PassDone, Point, Projection, Site,
};
use lorimer_tensor::Ops;
use serde::Serialize;

use crate::adapter::Adapter;
use crate::attached::Attached;
use crate::delta::{Change, GatedLowRank};
use crate::error::{Error, Result};
use crate::step::Step;

/// What a number of a projection's gates belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Gated {
    /// An expert, whose change is multiplied by it.
    Experts,
    /// A rank.
    Ranks,
}

/// The gates of one projection over rows, or their mean over several.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModuleGates {
    /// The projection's path, or what several have in common.
    pub name: String,
    /// Mean of each gate.
    pub mean: Vec<f64>,
    /// Share of the rows in which each is not 0.
    pub used: Vec<f64>,
}

/// The gates of an adapter over rows.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Gates {
    /// What they belong to.
    pub of: Gated,
    /// Gates of a projection.
    pub count: usize,
    /// Rows seen: tokens.
    pub rows: usize,
    /// Of each projection, in the model's order.
    pub modules: Vec<ModuleGates>,
}

impl Gates {
    /// Of what an adapter does to sequences of tokens.
    ///
    /// # Errors
    ///
    /// Fails if its method has no gates, if there is no token, or if a tensor operation fails.
    pub fn over<'r>(
        model: &dyn BaseModel,
        adapter: &Adapter,
        sequences: impl IntoIterator<Item = &'r [u32]>,
    ) -> Result<Self> {
        let meter = GateMeter::new(model, adapter)?;
        for tokens in sequences.into_iter().filter(|tokens| !tokens.is_empty()) {
            let batch = Batch::pack([tokens]);
            rayon::scope(|_| model.hidden(&batch, &Inference::of(&meter)))?;
        }
        meter.finish()
    }

    /// Means over the projections for which `group` gives the same name, in the order in which the names are met.
    pub fn grouped(&self, group: impl Fn(&str) -> String) -> Vec<ModuleGates> {
        let mut groups: Vec<(ModuleGates, f64)> = Vec::new();
        for own in &self.modules {
            let name = group(&own.name);
            match groups.iter_mut().find(|(all, _)| all.name == name) {
                Some((all, count)) => {
                    all.mean.iter_mut().zip(&own.mean).for_each(|(sum, v)| *sum += v);
                    all.used.iter_mut().zip(&own.used).for_each(|(sum, v)| *sum += v);
                    *count += 1.0;
                }
                None => groups.push((ModuleGates { name, ..own.clone() }, 1.0)),
            }
        }
        for (all, count) in &mut groups {
            all.mean.iter_mut().chain(&mut all.used).for_each(|sum| *sum /= *count);
        }
        groups.into_iter().map(|(all, _)| all).collect()
    }
}

/// Sums of one projection.
#[derive(Clone, Debug, Default)]
struct Sums {
    sum: Vec<f64>,
    used: Vec<u64>,
    rows: usize,
}

/// An adapter at work whose gates are watched.
struct GateMeter<'a> {
    attached: Attached<'a>,
    adapter: &'a Adapter,
    of: Gated,
    /// Projections with experts, by layer.
    units: BTreeMap<usize, Vec<String>>,
    /// Projections in the model's order.
    order: Vec<String>,
    sums: Mutex<BTreeMap<String, Sums>>,
}

/// What an adapter's gates belong to.
///
/// # Errors
///
/// Fails if the adapter has none, or if a tensor operation fails.
pub fn gated_by(model: &dyn BaseModel, adapter: &Adapter) -> Result<(Gated, usize)> {
    let name = adapter.method.name();
    if let Some(router) = adapter.router() {
        return Ok((Gated::Experts, router.width()));
    }
    for (_, base, delta) in adapter.sites(model) {
        if let Change::Gated(GatedLowRank { factors, .. }) = delta.change(base, 0, &Step::default())? {
            return Ok(match delta.experts().len() {
                0 => (Gated::Ranks, factors.a.dim(0)?),
                n => (Gated::Experts, n),
            });
        }
    }
    Err(Error::Refused(format!(
        "a `{name}` adapter does the same to every token: it has no gates that depend on a text"
    )))
}

impl<'a> GateMeter<'a> {
    fn new(model: &dyn BaseModel, adapter: &'a Adapter) -> Result<Self> {
        let (of, _) = gated_by(model, adapter)?;
        let (mut units, mut order) = (BTreeMap::<usize, Vec<String>>::new(), Vec::new());
        for (site, _, delta) in adapter.sites(model) {
            order.push(site.path.clone());
            if let Some(layer) = site.layer.filter(|_| !delta.experts().is_empty()) {
                units.entry(layer).or_default().push(site.path.clone());
            }
        }
        Ok(Self { attached: Attached::one(adapter), adapter, of, units, order, sums: Mutex::default() })
    }

    /// Adds the gates (rows, n) of a projection.
    fn note(&self, path: &str, gates: &Tensor) -> TensorResult<()> {
        let (rows, n) = gates.dims2()?;
        let values = gates.detach().to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let own = sums.entry(path.to_string()).or_default();
        own.sum.resize(n, 0.0);
        own.used.resize(n, 0);
        own.rows += rows;
        for row in values.chunks_exact(n.max(1)) {
            own.sum.iter_mut().zip(row).for_each(|(sum, v)| *sum += v);
            own.used.iter_mut().zip(row).for_each(|(used, v)| *used += u64::from(*v != 0.0));
        }
        Ok(())
    }

    fn finish(self) -> Result<Gates> {
        let sums = std::mem::take(&mut *self.sums.lock().unwrap_or_else(PoisonError::into_inner));
        let rows = sums.values().map(|own| own.rows).max().unwrap_or(0);
        if rows == 0 {
            return Err(Error::Config("there is no token whose gates could be looked at".into()));
        }
        let share = |path: &String| -> Option<ModuleGates> {
            let own = sums.get(path)?;
            Some(ModuleGates {
                name: path.clone(),
                mean: own.sum.iter().map(|sum| sum / own.rows as f64).collect(),
                used: own.used.iter().map(|&used| used as f64 / own.rows as f64).collect(),
            })
        };
        let modules: Vec<ModuleGates> = self.order.iter().filter_map(share).collect();
        let count = modules.iter().map(|gates| gates.mean.len()).max().unwrap_or(0);
        Ok(Gates { of: self.of, count, rows, modules })
    }
}

impl Adaptation for GateMeter<'_> {
    fn passes(&self) -> usize {
        self.attached.passes()
    }

    fn pass<'s>(&'s self, number: usize, before: Option<&PassDone<'_>>) -> TensorResult<Box<dyn Adaptation + 's>> {
        if let (Some(router), Some(done)) = (self.adapter.router(), before) {
            let (all, n) = (router.all_routes(done.hidden)?, router.width());
            for path in &self.order {
                if let Some(place) = router.place(path) {
                    self.note(path, &all.narrow(1, place, n)?)?;
                }
            }
        }
        self.attached.pass(number, before)
    }

    fn ops(&self) -> Ops<'_> {
        self.attached.ops()
    }

    fn project(&self, site: &Site, base: &Projection, x: &Tensor) -> TensorResult<Tensor> {
        if let Some(delta) = self.adapter.delta(&site.path).filter(|delta| delta.experts().is_empty())
            && self.adapter.router().is_none()
            && let Change::Gated(GatedLowRank { factors, .. }) = delta.change(base, x.dim(0)?, &Step::default())?
        {
            let u = x.matmul(&factors.a.t()?)?;
            self.note(&site.path, &delta.gates(x, &u, &Step::default())?)?;
        }
        self.attached.project(site, base, x)
    }

    fn attend(&self, point: Point, call: AttentionCall<'_>, block: &mut BlockScope<'_>) -> TensorResult<Tensor> {
        self.attached.attend(point, call, block)
    }

    fn attended(&self, h: Tensor, block: &mut BlockScope<'_>) -> TensorResult<Tensor> {
        self.attached.attended(h, block)
    }

    fn unit<'s>(&'s self, layer: usize, x: &Tensor) -> TensorResult<Option<Box<dyn Adaptation + 's>>> {
        let mut blocks = self.adapter.blocks().filter(|(block, _)| block.layer == layer);
        if let Some(router) = blocks.find_map(|(_, delta)| delta.unit_router()) {
            let shares = router.shares(Ops::plain(), x)?;
            let factors = router.route(Ops::plain(), &shares)?.factors(DType::F64)?;
            for path in self.units.get(&layer).into_iter().flatten() {
                self.note(path, &factors)?;
            }
        }
        self.attached.unit(layer, x)
    }

    fn hidden(&self, point: Point, h: Tensor) -> TensorResult<Tensor> {
        self.attached.hidden(point, h)
    }

    fn parameter(&self, path: &str) -> Option<&Tensor> {
        self.attached.parameter(path)
    }
}
