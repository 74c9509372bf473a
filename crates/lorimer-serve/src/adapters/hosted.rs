//! An adapter in host memory, in the form in which it is served: low-rank factors of every projection at its own rank.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use lorimer_adapter::file::export::low_rank_of;
use lorimer_adapter::{Adapter, BlockDelta, BlockSite, Change, Delta, GatedLowRank, Golden, LowRank, Router, Step};
use lorimer_model::text::chat::ChatTemplate;
use lorimer_model::{BaseModel, Projection, Site};
use lorimer_tensor::RankGate;
use rayon::prelude::*;

use crate::engine::pool::{BLOCK, Geometry};
use crate::error::{Error, Result};

/// Where the factors of one projection lie in the adapter's numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Rank r; 0 where only the output is scaled or a bias changed.
    pub rank: usize,
    /// Where A (r, inputs) begins.
    pub a: usize,
    /// Where scaling · Bᵀ (r, outputs) begins.
    pub b: usize,
    /// Where what the frozen output is multiplied by (outputs) begins.
    pub output_scale: Option<usize>,
    /// Where what is added to every row of the output (outputs) begins.
    pub bias: Option<usize>,
    /// Which of [`Hosted::gates`] multiplies x Aᵀ.
    pub gate: Option<usize>,
}

/// A layer after a block's attention, as it is served: it stays in host memory.
#[derive(Clone, Debug)]
pub struct HostedLayer {
    /// The block, counted from 0.
    pub layer: usize,
    /// What is done there.
    pub delta: Arc<dyn BlockDelta>,
}

/// Projections that no key or value of their block depends on.
const AFTER_KEYS: [&str; 6] = ["q_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"];

/// How an adapter came into this form.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Conversion {
    /// Projections whose form equals what the adapter does there.
    pub exact: usize,
    /// All of its projections.
    pub modules: usize,
    /// ‖approximation − ΔW‖ / ‖ΔW‖ over the others (Frobenius); 0 where there are none.
    pub error: f64,
}

/// An adapter ready to be put into the pool.
#[derive(Debug)]
pub struct Hosted {
    /// `sha256:…` over configuration and tensors.
    pub content_id: String,
    /// The method's name.
    pub method: String,
    /// The largest rank.
    pub rank: usize,
    /// All factors.
    pub numbers: Vec<f32>,
    /// Gates of low-rank changes that depend on their input. They stay in host memory.
    pub gates: Vec<Arc<dyn RankGate>>,
    /// What computes the gates of all projections once a forward, from the hidden states of a pass before. It stays in host memory.
    pub router: Option<HostedRouter>,
    /// By the projection's path.
    pub places: HashMap<String, Place>,
    /// Of projections in a routed unit: how a row's factors become gates of the experts' ranks.
    pub experts: HashMap<String, Spread>,
    /// Layers after blocks' attention, in the blocks' order.
    pub layers: Vec<HostedLayer>,
    /// Whether keys and values are the base's with it: it changes nothing but what comes after those of the last block.
    pub leaves_keys: bool,
    /// How exact it is.
    pub conversion: Conversion,
    /// Why it may only be used alone and at weight 1, if so.
    pub not_additive: Option<&'static str>,
    /// The chat template that it was trained with, where that is not the base's.
    pub template: Option<ChatTemplate>,
    /// Prompts with the log-probabilities that it gave when it was trained.
    pub golden: Vec<Golden>,
}

/// A router as it is served.
pub struct HostedRouter {
    /// The head.
    pub router: Arc<dyn Router>,
    /// By the projection's path.
    spreads: HashMap<String, Spread>,
}

/// How a projection's gates come out of a row of the router's numbers.
#[derive(Debug)]
pub struct Spread {
    /// Where the projection's numbers begin in the row.
    pub place: usize,
    /// Its rank.
    pub rank: usize,
    /// (rank j, number i, factor): gate j is the sum of its factors times numbers.
    pub terms: Vec<(usize, usize, f32)>,
}

impl Spread {
    /// Of a projection, from one route a number (n, n).
    fn of(delta: &dyn Delta, each: &Tensor, place: usize) -> Result<Self> {
        let factors = delta.route_gates(each)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        let rank = factors.first().map_or(0, Vec::len);
        let terms = (0..rank).flat_map(|j| factors.iter().enumerate().map(move |(i, row)| (j, i, row[j])));
        let terms = terms.filter(|(.., factor)| *factor != 0.0).collect();
        Ok(Self { place, rank, terms })
    }
}

impl std::fmt::Debug for HostedRouter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a router of {} projections", self.spreads.len())
    }
}

impl HostedRouter {
    fn new(adapter: &Adapter, router: &Arc<dyn Router>) -> Result<Self> {
        let each = Tensor::eye(router.width(), DType::F32, &candle_core::Device::Cpu)?;
        let mut spreads = HashMap::new();
        for (path, delta) in adapter.deltas() {
            let Some(place) = router.place(path) else { continue };
            spreads.insert(path.to_string(), Spread::of(delta, &each, place)?);
        }
        Ok(Self { router: router.clone(), spreads })
    }

    /// How a projection's gates come out of the router's numbers; none where it changes nothing.
    pub fn spread(&self, site: &str) -> Option<&Spread> {
        self.spreads.get(site)
    }

    fn bytes(&self) -> usize {
        let head = self.router.trainable().iter().map(|(_, var)| var.elem_count()).sum::<usize>();
        let terms: usize = self.spreads.values().map(|s| s.terms.len()).sum();
        head * size_of::<f32>() + terms * size_of::<(usize, usize, f32)>()
    }
}

/// What an adapter does to one projection, as it is served.
struct Served {
    low: LowRank,
    output_scale: Option<Tensor>,
    bias: Option<Tensor>,
    gate: Option<Arc<dyn RankGate>>,
    /// ‖ΔW‖² and the squared error, where the form is an approximation.
    inexact: Option<(f64, f64)>,
}

fn served(adapter: &Adapter, site: &Site, base: &Projection, rank: Option<usize>) -> Result<Option<Served>> {
    let mut bias = adapter.parameters().get(&site.bias_path()).map(|own| match &base.bias {
        Some(base) => own.as_tensor() - base,
        None => Ok(own.as_tensor().clone()),
    });
    let Some(delta) = adapter.delta(&site.path) else {
        let none = || -> Result<LowRank> {
            let empty = |shape| Tensor::zeros(shape, DType::F32, &candle_core::Device::Cpu);
            Ok(LowRank { a: empty((0, site.inputs))?, b: empty((site.outputs, 0))?, scaling: 1.0 })
        };
        let of = |bias| Ok(Served { low: none()?, output_scale: None, bias: Some(bias), gate: None, inexact: None });
        return bias.transpose()?.map(of).transpose();
    };
    if let Some(change) = delta.bias_change(base)? {
        bias = Some(match bias {
            Some(own) => own? + change,
            None => Ok(change),
        });
    }
    let bias = bias.transpose()?;
    let exact = |low| Served { low, output_scale: None, bias: bias.clone(), gate: None, inexact: None };
    let change = delta.change(base, 0, &Step::default())?;
    let own = match change {
        Change::RowScaled(LowRank { a, b, scaling }, scale) => {
            let (a, b, scale) = (a.detach(), b.detach(), scale.detach());
            let low = LowRank { a, b: b.broadcast_mul(&scale.unsqueeze(1)?)?, scaling };
            return Ok(Some(Served { output_scale: Some(scale), ..exact(low) }));
        }
        Change::Gated(GatedLowRank { factors, .. }) => {
            return Ok(Some(Served { gate: delta.rank_gate()?, ..exact(factors) }));
        }
        // What is low-rank as it is stays as it is, whatever its rank; one that is as wide as the matrix becomes the matrix.
        Change::LowRank(low) | Change::RowRate(low, _) => {
            if low.a.dim(0)? >= site.inputs.min(site.outputs) {
                let whole = low.weight()?;
                let identity = |n: usize| Tensor::eye(n, whole.dtype(), whole.device());
                let (a, b) = match site.outputs <= site.inputs {
                    true => (whole.clone(), identity(site.outputs)?),
                    false => (identity(site.inputs)?, whole.clone()),
                };
                return Ok(Some(exact(LowRank { a, b, scaling: 1.0 })));
            }
            true
        }
        Change::Sparse(..) | Change::Weight(_) | Change::Free => false,
    };
    let (low, is_exact, whole, wrong) = low_rank_of(site, base, delta, if own { None } else { rank })?;
    Ok(Some(Served { inexact: (!is_exact).then_some((whole, wrong)), ..exact(low) }))
}

fn flat(t: &Tensor) -> Result<Vec<f32>> {
    Ok(t.detach().to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

/// An adapter's layers after blocks' attention.
fn layers_of(adapter: &Adapter) -> Result<Vec<HostedLayer>> {
    let of = |(block, delta): (&BlockSite, &Arc<dyn BlockDelta>)| {
        for (_, var) in delta.trainable() {
            if !flat(var)?.iter().all(|v| v.is_finite()) {
                return Err(Error::Request(format!("the numbers of `{}` are not finite", block.site.path)));
            }
        }
        Ok(HostedLayer { layer: block.layer, delta: delta.clone() })
    };
    adapter.blocks().map(of).collect()
}

/// How a route becomes gates, of projections in routed units.
fn experts_of(adapter: &Adapter) -> Result<HashMap<String, Spread>> {
    let mut all = HashMap::new();
    for (path, delta) in adapter.deltas() {
        let n = delta.experts().len();
        if n > 0 {
            let each = Tensor::eye(n, DType::F32, &candle_core::Device::Cpu)?;
            all.insert(path.to_string(), Spread::of(delta, &each, 0)?);
        }
    }
    Ok(all)
}

impl Hosted {
    /// The served form of an adapter on a model. `rank` is that of projections whose change is not low-rank as it is; 64 where none is
    /// given.
    ///
    /// # Errors
    ///
    /// Fails if the adapter brings whole parameters other than biases, changes no projection, has factors that are not finite, or has a
    /// method with neither a low-rank form nor a plain weight.
    pub fn new(model: &dyn BaseModel, adapter: &Adapter, content_id: String, rank: Option<usize>) -> Result<Self> {
        if adapter.router().is_some() && !model.shape().causal {
            return Err(Error::Request(format!(
                "a `{}` adapter takes two passes over every row, which is served of models that generate only",
                adapter.method.name()
            )));
        }
        let projections = model.projections();
        let biases: Vec<String> = projections.iter().map(|(site, _)| site.bias_path()).collect();
        if let Some(path) = adapter.parameters().keys().find(|path| !biases.contains(path)) {
            return Err(Error::Request(format!(
                "the adapter brings its own `{path}`, of which a batch of many adapters has one only; merge it into the base instead"
            )));
        }
        let find = |&(site, base): &(&Site, &Projection)| -> Result<Option<(String, Served)>> {
            Ok(served(adapter, site, base, rank)?.map(|served| (site.path.clone(), served)))
        };
        let found = projections.par_iter().map(find).collect::<Result<Vec<_>>>()?;
        let mut hosted = Self {
            content_id,
            method: adapter.method.name().to_string(),
            rank: 0,
            numbers: Vec::new(),
            gates: Vec::new(),
            router: adapter.router().map(|router| HostedRouter::new(adapter, router)).transpose()?,
            places: HashMap::new(),
            experts: experts_of(adapter)?,
            layers: Vec::new(),
            leaves_keys: false,
            conversion: Conversion { exact: 0, modules: 0, error: 0.0 },
            not_additive: adapter.method.not_additive(),
            template: None,
            golden: Vec::new(),
        };
        let (mut whole, mut wrong) = (0.0, 0.0);
        let length = |(_, s): &(String, Served)| {
            let vectors = s.output_scale.iter().chain(&s.bias).map(Tensor::elem_count);
            s.low.a.elem_count() + s.low.b.elem_count() + vectors.sum::<usize>()
        };
        hosted.numbers.reserve_exact(found.iter().flatten().map(length).sum());
        for (path, Served { low, output_scale, bias, gate, inexact }) in found.into_iter().flatten() {
            let rank = low.a.dim(0)?;
            hosted.rank = hosted.rank.max(rank);
            hosted.conversion.modules += 1;
            match inexact {
                None => hosted.conversion.exact += 1,
                Some((all, error)) => (whole, wrong) = (whole + all, wrong + error),
            }
            let a = hosted.put(&low.a)?;
            let b = hosted.numbers.len();
            let (numbers, scaling) = (flat(&low.b)?, low.scaling as f32);
            for j in 0..rank {
                hosted.numbers.extend(numbers.iter().skip(j).step_by(rank).map(|v| v * scaling));
            }
            let output_scale = output_scale.map(|t| hosted.put(&t)).transpose()?;
            let bias = bias.map(|t| hosted.put(&t)).transpose()?;
            let gate = gate.map(|gate| {
                hosted.gates.push(gate);
                hosted.gates.len() - 1
            });
            hosted.places.insert(path, Place { rank, a, b, output_scale, bias, gate });
        }
        hosted.layers = layers_of(adapter)?;
        let last = model.shape().layers.len().checked_sub(1);
        let after = |site: &Site| site.is_head || (site.layer == last && AFTER_KEYS.contains(&site.role.as_str()));
        let changes = |site: &Site| {
            hosted.places.contains_key(&site.path) || adapter.parameters().contains_key(&site.bias_path())
        };
        let mut changed = projections.iter().map(|(site, _)| site).filter(|site| changes(site));
        hosted.leaves_keys = hosted.layers.is_empty() && hosted.router.is_none() && changed.all(|site| after(site));
        hosted.conversion.modules += hosted.layers.len();
        hosted.conversion.exact += hosted.layers.len();
        hosted.conversion.error = if whole > 0.0 { (wrong / whole).sqrt() } else { 0.0 };
        if hosted.places.is_empty() && hosted.layers.is_empty() {
            return Err(Error::Request("the adapter changes no projection of this base".into()));
        }
        if !hosted.numbers.iter().all(|v| v.is_finite()) {
            return Err(Error::Request("the adapter's factors are not finite".into()));
        }
        Ok(hosted)
    }

    fn put(&mut self, t: &Tensor) -> Result<usize> {
        let start = self.numbers.len();
        self.numbers.extend(flat(t)?);
        Ok(start)
    }

    /// Bytes in host memory.
    pub fn bytes(&self) -> usize {
        let router = self.router.as_ref().map_or(0, HostedRouter::bytes);
        let layers = self.layers.iter().flat_map(|layer| layer.delta.trainable());
        let numbers = self.numbers.len() + layers.map(|(_, var)| var.elem_count()).sum::<usize>();
        numbers * size_of::<f32>() + self.gates.iter().map(|gate| gate.bytes()).sum::<usize>() + router
    }

    /// The layer after a block's attention, and the first of its pages among those of a block of tokens: they come after the pages of keys and
    /// values, those of one layer after those of another.
    pub fn layer(&self, layer: usize, geometry: Geometry) -> Option<(&HostedLayer, usize)> {
        let at = self.layers.iter().position(|own| own.layer == layer && own.delta.unit_router().is_none())?;
        Some((&self.layers[at], geometry.layers + Self::kept_pages(&self.layers[..at], geometry)))
    }

    /// Pages that a block of tokens takes beside those of the last pass's keys and values: those of other passes, or what layers keep.
    pub fn pages_per_block(&self, geometry: Geometry) -> usize {
        let other_passes = if self.router.is_some() { geometry.layers } else { 0 };
        other_passes + Self::kept_pages(&self.layers, geometry)
    }

    fn kept_pages(layers: &[HostedLayer], geometry: Geometry) -> usize {
        layers.iter().map(|layer| geometry.pages_of_numbers(BLOCK * layer.delta.kept_width())).sum()
    }

    /// Pages that it takes in a pool.
    pub fn pages(&self, geometry: Geometry) -> usize {
        geometry.pages_of_numbers(self.numbers.len())
    }
}
