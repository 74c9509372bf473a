//! An adapter on a model: attached new, looked at, written to a file. Reading one is `file::load`, running it `attached`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use candle_core::{DType, Result as TensorResult, Tensor, Var};
use lorimer_model::{BaseModel, Projection, Site};
use lorimer_tensor::FrozenWeight;
use rayon::prelude::*;
use serde_json::{Map, Value};

use crate::block::{BlockDelta, BlockSite};
use crate::delta::Delta;
use crate::error::{Error, Result};
use crate::file::dialects::peft;
use crate::file::frozen::FrozenParts;
use crate::file::store::{Mixture, StoredAdapter};
use crate::method::{Bias, CalibrationStats, Method, ParameterSource};
use crate::parameter::{Named, Role};
use crate::router::Router;
use crate::targets::Matcher;

/// One adapter on one model.
pub struct Adapter {
    /// The method with its configuration.
    pub method: Box<dyn Method>,
    pub(crate) deltas: BTreeMap<String, Box<dyn Delta>>,
    /// Layers after the attention of blocks, in the blocks' order.
    pub(crate) blocks: Vec<(BlockSite, Arc<dyn BlockDelta>)>,
    /// Whole parameters in place of the base's (biases, `modules_to_save`), by on-disk name.
    pub(crate) parameters: BTreeMap<String, Var>,
    /// Those of them that are not trained: PEFT saves the weight under an adapter on the head or the embedding.
    pub(crate) fixed: BTreeSet<String>,
    /// Projections that have both a weight of their own and a change, which is a change of that weight.
    pub(crate) replaced: BTreeMap<String, Projection>,
    /// Order of the projections in the model.
    pub(crate) order: Vec<String>,
    /// What is computed once a forward for all projections.
    pub(crate) router: Option<Arc<dyn Router>>,
}

/// A parameter of the base, whoever it belongs to, in the compute type.
pub(crate) fn base_parameter(model: &dyn BaseModel, path: &str) -> Result<Option<Tensor>> {
    if let Some(t) = model.parameter(path)? {
        return Ok(Some(t));
    }
    for (site, base) in model.projections() {
        if path == site.weight_path() {
            return Ok(Some(base.dense(model.dtype())?));
        }
        if path == site.bias_path() {
            return Ok(base.bias.clone());
        }
    }
    Ok(None)
}

impl Adapter {
    /// A new adapter on every targeted projection. The same seed gives the same bytes.
    pub fn attach(model: &dyn BaseModel, method: Box<dyn Method>, seed: u64) -> Result<Self> {
        Self::attach_calibrated(model, method, &CalibrationStats::new(), seed)
    }

    /// [`Self::attach`] with what calibration found out, for methods that ask for it.
    pub fn attach_calibrated(
        model: &dyn BaseModel,
        mut method: Box<dyn Method>,
        stats: &CalibrationStats,
        seed: u64,
    ) -> Result<Self> {
        bind(method.as_mut(), model)?;
        resolve(method.as_mut(), model, stats)?;
        method.targeting().check()?;
        let projections = model.projections();
        let matcher = Matcher::new(method.targeting(), projections.iter().map(|(site, _)| *site))?;
        let targeted: Vec<_> = projections.iter().filter(|(site, _)| matcher.targets(site)).collect();
        let modules: Vec<String> = projections
            .iter()
            .map(|(s, _)| s.path.clone())
            .chain(model.parameter_names().iter().filter_map(|p| p.strip_suffix(".weight").map(str::to_string)))
            .collect();
        let unknown = matcher.unknown_saves(&modules);
        if !unknown.is_empty() {
            return Err(Error::Config(format!(
                "modules_to_save names {}, which the base does not have",
                unknown.join(", ")
            )));
        }
        if targeted.is_empty() && method.blocks().is_none() {
            let mut roles: Vec<_> = projections.iter().map(|(s, _)| s.role.as_str()).collect();
            roles.sort_unstable();
            roles.dedup();
            return Err(Error::Config(format!(
                "target_modules matches no projection of the base; it has {}",
                roles.join(", ")
            )));
        }
        let dtype = model.dtype();
        let attach = |(site, base): &&(&Site, &Projection)| -> Result<(String, Box<dyn Delta>)> {
            let mut source = ParameterSource::start(site, dtype, seed, stats);
            Ok((site.path.clone(), method.attach(site, base, &mut source)?))
        };
        let deltas = targeted.par_iter().map(attach).collect::<Result<BTreeMap<_, _>>>()?;
        let mut parameters = BTreeMap::new();
        for (site, base) in &projections {
            let trained = match method.bias() {
                Bias::None => false,
                Bias::All => true,
                Bias::LoraOnly => deltas.contains_key(&site.path),
            };
            if let Some(bias) = base.bias.as_ref().filter(|_| trained) {
                parameters.insert(site.bias_path(), Var::from_tensor(bias)?);
            }
        }
        for module in modules.iter().filter(|m| matcher.saves(m)) {
            for path in [format!("{module}.weight"), format!("{module}.bias")] {
                if let Some(t) = base_parameter(model, &path)? {
                    parameters.insert(path, Var::from_tensor(&t.copy()?)?);
                }
            }
        }
        let blocks = attach_blocks(model, method.as_ref(), stats, seed)?;
        let order = projections.iter().map(|(s, _)| s.path.clone()).collect();
        let (fixed, replaced) = Default::default();
        let place = router_site(model);
        let router = method.router(&mut ParameterSource::start(&place, dtype, seed, stats))?;
        Ok(Self { method, deltas, blocks, parameters, fixed, replaced, order, router: router.map(Arc::from) })
    }

    /// Whether any output changes.
    pub fn has_effect(&self, model: &dyn BaseModel) -> Result<bool> {
        for (site, base) in model.projections() {
            if let Some(delta) = self.deltas.get(&site.path)
                && delta.has_effect(self.own(site, base))?
            {
                return Ok(true);
            }
        }
        for (_, delta) in &self.blocks {
            if delta.has_effect()? {
                return Ok(true);
            }
        }
        for (path, var) in &self.parameters {
            if let Some(base) = base_parameter(model, path)? {
                let difference = (var.as_tensor() - base)?.abs()?.flatten_all()?.max(0)?;
                if difference.to_dtype(DType::F64)?.to_scalar::<f64>()? > 0.0 {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// ‖ΔW‖ / ‖W‖ over all adapted projections (Frobenius); None where a delta has no plain weight.
    pub fn effect(&self, model: &dyn BaseModel) -> Result<Option<f64>> {
        let norm = |t: &Tensor| -> TensorResult<f64> { t.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>() };
        if !self.blocks.is_empty() {
            return Ok(None);
        }
        let (mut change, mut whole) = (0.0, 0.0);
        for (site, base) in model.projections() {
            let Some(delta) = self.deltas.get(&site.path) else { continue };
            let base = self.own(site, base);
            let Ok(merged) = delta.merged(base)? else { return Ok(None) };
            let dense = base.dense(merged.dtype())?;
            change += norm(&(&merged - &dense)?)?;
            whole += norm(&dense)?;
        }
        for (path, var) in &self.parameters {
            if let Some(base) = base_parameter(model, path)? {
                change += norm(&(var.as_tensor() - &base)?)?;
                whole += norm(&base)?;
            }
        }
        Ok(Some(if whole > 0.0 { (change / whole).sqrt() } else { 0.0 }))
    }

    /// What is checkpointed and resumed, in a fixed order (that of the model's forward; buffers last): trained parameters and those that a
    /// rule moves.
    pub fn named(&self) -> Vec<Named<'_>> {
        let deltas = self.order.iter().filter_map(|path| Some((path, self.deltas.get(path)?)));
        let own = deltas.flat_map(|(path, delta)| delta.parameters().into_iter().map(move |p| p.named(path)));
        let blocks = self
            .blocks
            .iter()
            .flat_map(|(block, delta)| delta.parameters().into_iter().map(move |p| p.named(&block.site.path)));
        let (trained, buffers): (Vec<_>, Vec<_>) = own.chain(blocks).partition(|p| p.role.is_trained());
        let whole = self.parameters.iter().filter(|(path, _)| !self.fixed.contains(*path));
        let whole = whole.map(|(path, var)| Named { name: path.clone(), var, role: Role::Whole });
        let router = self.router.iter().flat_map(|router| router.trainable());
        let router = router.map(|(name, var)| Named { name, var, role: Role::Router });
        trained.into_iter().chain(whole).chain(router).chain(buffers).collect()
    }

    /// What is computed once a forward for all projections, where the adapter has such.
    pub fn router(&self) -> Option<&Arc<dyn Router>> {
        self.router.as_ref()
    }

    /// For `lorimer.json`: of an adapter made of others, the projections in the order of its routes, and what it is made of.
    pub fn mixture(&self) -> Option<Mixture> {
        let experts: Vec<String> = self.method.parts().iter().map(|part| part.content_id.clone()).collect();
        let sites = self.order.iter().filter(|path| self.deltas.contains_key(*path)).cloned().collect();
        (!experts.is_empty()).then_some(Mixture { sites, experts })
    }

    /// Trainable parameters in a fixed order (that of the model's forward), by a name that is unique.
    pub fn trainable(&self) -> Vec<(String, &Var)> {
        self.named().into_iter().filter(|p| p.role.is_trained()).map(|p| (p.name, p.var)).collect()
    }

    /// After the optimiser's step: moves the buffers.
    pub fn after_step(&self) -> TensorResult<()> {
        self.deltas.values().try_for_each(|delta| delta.after_step())?;
        self.blocks.iter().try_for_each(|(_, delta)| delta.after_step())
    }

    /// Number of trainable parameters.
    pub fn parameter_count(&self) -> usize {
        self.trainable().iter().map(|(_, v)| v.elem_count()).sum()
    }

    /// What this adapter's change of a projection is a change of: the base's, or the weight that the adapter brings for it.
    pub(crate) fn own<'a>(&'a self, site: &Site, base: &'a Projection) -> &'a Projection {
        self.replaced.get(&site.path).unwrap_or(base)
    }

    /// The projections that have a delta, in the order of the model's forward, with what the delta is a change of.
    pub fn sites<'a>(&'a self, model: &'a dyn BaseModel) -> Vec<(&'a Site, &'a Projection, &'a dyn Delta)> {
        let all = model.projections().into_iter();
        all.filter_map(|(site, base)| Some((site, self.own(site, base), self.delta(&site.path)?))).collect()
    }

    /// Every module's path with its delta, in the order of the paths.
    pub fn deltas(&self) -> impl Iterator<Item = (&str, &dyn Delta)> {
        self.deltas.iter().map(|(path, delta)| (path.as_str(), delta.as_ref()))
    }

    /// The layers after blocks' attention, in the blocks' order.
    pub fn blocks(&self) -> impl Iterator<Item = (&BlockSite, &Arc<dyn BlockDelta>)> {
        self.blocks.iter().map(|(block, delta)| (block, delta))
    }

    /// The delta on a projection.
    pub fn delta(&self, path: &str) -> Option<&dyn Delta> {
        self.deltas.get(path).map(Box::as_ref)
    }

    /// Whole parameters that take the place of the base's.
    pub fn parameters(&self) -> &BTreeMap<String, Var> {
        &self.parameters
    }

    /// What stands in `lorimer.json` for the frozen parts of every module.
    pub fn frozen_parts(&self) -> Result<BTreeMap<String, FrozenParts>> {
        let all: Vec<_> = self.deltas.iter().map(|(path, delta)| (path, delta.as_ref())).collect();
        let of =
            |(path, delta): &(&String, &dyn Delta)| Ok(FrozenParts::of(*delta)?.map(|parts| ((*path).clone(), parts)));
        Ok(all.par_iter().map(of).collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
    }

    /// Puts the adapted modules' names in the place of settings that PEFT would not read as they are meant here: keys that its
    /// configuration of the method lacks, and layers beside a regular expression.
    fn name_modules(&self, config: &mut Map<String, Value>) {
        let set = |config: &Map<String, Value>, key: &str| match config.get(key) {
            None | Some(Value::Null) => false,
            Some(Value::Array(list)) => !list.is_empty(),
            Some(_) => true,
        };
        let lacks = self.method.peft_lacks();
        let pattern = config.get("target_modules").is_some_and(Value::is_string);
        if lacks.iter().any(|key| set(config, key)) || (pattern && set(config, "layers_to_transform")) {
            config.insert("target_modules".into(), self.deltas.keys().cloned().collect::<Vec<_>>().into());
            for key in ["exclude_modules", "layers_to_transform", "layers_pattern"] {
                config.insert(key.into(), Value::Null);
            }
        }
        lacks.iter().for_each(|key| drop(config.shift_remove(*key)));
    }

    /// The adapter as a file holds it, for the base named `base`.
    pub fn to_stored(&self, base: &str) -> Result<StoredAdapter> {
        let mut config = self.method.stored_config();
        config.insert("base_model_name_or_path".into(), base.into());
        // PEFT keeps `all-linear` as the names that it stood for.
        if config.get("target_modules").and_then(|v| v.as_str()).is_some_and(|s| s.eq_ignore_ascii_case("all-linear")) {
            let mut roles: Vec<_> = self.deltas.keys().filter_map(|p| p.rsplit('.').next()).collect();
            roles.sort_unstable();
            roles.dedup();
            config.insert("target_modules".into(), roles.into());
        }
        self.name_modules(&mut config);
        let stored = self.deltas.iter().map(|(path, delta)| Ok((path.clone(), delta.stored()?)));
        let modules = stored.collect::<TensorResult<BTreeMap<_, _>>>()?;
        self.method.describe(&mut config, &modules);
        let mut tensors = BTreeMap::new();
        for (path, own) in modules {
            for (key, tensor) in own {
                tensors.insert(peft::tensor_name(&path, key), detached(&tensor)?);
            }
        }
        for (block, delta) in &self.blocks {
            for (key, tensor) in delta.stored()? {
                tensors.insert(peft::tensor_name(&block.site.path, key), detached(&tensor)?);
            }
        }
        let router = self.router.iter().flat_map(|router| router.stored());
        for (name, tensor) in self.method.shared()?.into_iter().chain(router) {
            tensors.insert(name, detached(&tensor)?);
        }
        for (path, var) in &self.parameters {
            let adapted = path.rsplit_once('.').is_some_and(|(module, _)| self.deltas.contains_key(module));
            tensors.insert(peft::parameter_name(path, adapted), detached(var.as_tensor())?);
        }
        let parts = self.method.parts().to_vec();
        Ok(StoredAdapter { path: "memory".into(), config, tensors, manifest: None, parts })
    }
}

/// The blocks that a method may put a layer on; none where it puts none on any.
pub(crate) fn block_sites(model: &dyn BaseModel, method: &dyn Method) -> Result<Vec<BlockSite>> {
    let Some(blocks) = method.blocks() else { return Ok(Vec::new()) };
    BlockSite::all(model.shape(), model.projections().into_iter().map(|(site, _)| site), blocks.module())
}

/// Tells a method which base it is for.
pub(crate) fn bind(method: &mut dyn Method, model: &dyn BaseModel) -> Result<()> {
    let sites: Vec<&Site> = model.projections().into_iter().map(|(site, _)| site).collect();
    method.bind(model.shape(), &sites)
}

/// Where a router stands: on hidden states, and on no projection.
pub(crate) fn router_site(model: &dyn BaseModel) -> Site {
    Site::new("router", (0, model.shape().hidden))
}

/// New layers on all blocks that a method targets.
fn attach_blocks(
    model: &dyn BaseModel,
    method: &dyn Method,
    stats: &CalibrationStats,
    seed: u64,
) -> Result<Vec<(BlockSite, Arc<dyn BlockDelta>)>> {
    let mut blocks: Vec<(BlockSite, Arc<dyn BlockDelta>)> = Vec::new();
    let Some(own) = method.blocks() else { return Ok(blocks) };
    for block in block_sites(model, method)? {
        let mut source = ParameterSource::start(&block.site, model.dtype(), seed, stats);
        if let Some(delta) = own.attach(&block, &mut source)? {
            blocks.push((block, delta.into()));
        }
    }
    match blocks.is_empty() {
        true => {
            let layers = model.shape().layers.len();
            Err(Error::Config(format!("layers_to_transform names none of the base's {layers} layers")))
        }
        false => Ok(blocks),
    }
}

/// Tells a method which projections it targets.
pub(crate) fn resolve(method: &mut dyn Method, model: &dyn BaseModel, stats: &CalibrationStats) -> Result<()> {
    let projections = model.projections();
    let matcher = Matcher::new(method.targeting(), projections.iter().map(|(site, _)| *site))?;
    let targeted: Vec<&Site> = projections.iter().map(|(site, _)| *site).filter(|site| matcher.targets(site)).collect();
    method.resolve(&targeted, stats)
}

fn detached(t: &Tensor) -> TensorResult<Tensor> {
    t.detach().contiguous()
}

/// A projection with another weight.
pub(crate) fn replaced_by(weight: &Tensor, base: &Projection) -> Projection {
    Projection { weight: FrozenWeight::Dense(weight.detach()), bias: base.bias.clone() }
}

/// Whether two tensors of one shape hold the same numbers.
pub(crate) fn equal(a: &Tensor, b: &Tensor) -> TensorResult<bool> {
    Ok(a.ne(b)?.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()? == 0.0)
}
