//! Adapters on a model: attaching a new one, loading one from a file, and several at once with weights.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use candle_core::{DType, Result as TensorResult, Tensor, Var};
use lorimer_model::{Adaptation, BaseModel, Projection, Site};
use lorimer_tensor::{FrozenWeight, LowRankTerm, Ops, Part, Tape};
use rayon::prelude::*;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::file::frozen::FrozenParts;
use crate::file::store::{BASE_WEIGHT, PREFIX, StoredAdapter};
use crate::method::{
    Bias, CalibrationStats, Change, Delta, GatedLowRank, LowRank, Method, ModuleTensors, ParameterSource, Step,
};
use crate::settings::check_targets;
use crate::targets::Matcher;

/// One adapter on one model.
pub struct Adapter {
    /// The method with its configuration.
    pub method: Box<dyn Method>,
    deltas: BTreeMap<String, Box<dyn Delta>>,
    /// Whole parameters in place of the base's (biases, `modules_to_save`), by on-disk name.
    parameters: BTreeMap<String, Var>,
    /// Those of them that are not trained: PEFT saves the weight under an adapter on the head or the embedding.
    fixed: BTreeSet<String>,
    /// Projections that have both a weight of their own and a change, which is a change of that weight.
    replaced: BTreeMap<String, Projection>,
    /// Order of the projections in the model.
    order: Vec<String>,
}

/// Every tensor of a file, accounted for.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Accounting {
    /// Tensors that are in use.
    pub used: Vec<String>,
    /// Tensors that belong to nothing in the base or the configuration.
    pub refused: Vec<String>,
    /// Modules that the configuration names and the file has nothing for.
    pub missing: Vec<String>,
}

impl Accounting {
    /// Whether all is in use and nothing missing.
    pub fn complete(&self) -> bool {
        self.refused.is_empty() && self.missing.is_empty() && !self.used.is_empty()
    }

    /// One sentence on what is wrong.
    pub fn problem(&self) -> Option<String> {
        let some = |names: &[String]| {
            let shown: Vec<_> = names.iter().take(2).map(|n| format!("`{n}`")).collect();
            let more = if names.len() > 2 { format!(" and {} more", names.len() - 2) } else { String::new() };
            format!("{}{more}", shown.join(", "))
        };
        if !self.refused.is_empty() {
            return Some(format!(
                "the adapter does not fit the base: {} of its tensors belong to no module there ({})",
                self.refused.len(),
                some(&self.refused)
            ));
        }
        if !self.missing.is_empty() {
            return Some(format!(
                "the adapter is not whole: {} modules that its configuration names have no tensors ({})",
                self.missing.len(),
                some(&self.missing)
            ));
        }
        self.used.is_empty().then(|| "the adapter holds no tensors".to_string())
    }
}

/// A parameter of the base, whoever it belongs to, in the compute type.
fn base_parameter(model: &dyn BaseModel, path: &str) -> Result<Option<Tensor>> {
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
        if targeted.is_empty() {
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
        let order = projections.iter().map(|(s, _)| s.path.clone()).collect();
        let (fixed, replaced) = Default::default();
        Ok(Self { method, deltas, parameters, fixed, replaced, order })
    }

    /// Puts a stored adapter on a model and says what became of each of its tensors. Shapes must fit; whether an
    /// incomplete account is an error is the caller's choice (see [`Self::load_whole`]).
    pub fn load(model: &dyn BaseModel, stored: &StoredAdapter) -> Result<(Self, Accounting)> {
        let mut method = crate::methods::from_adapter_config(&stored.config)?;
        let projections = model.projections();
        check_targets(&stored.config, &model.shape().model_type, projections.iter().map(|(site, _)| *site))?;
        let matcher = Matcher::new(method.targeting(), projections.iter().map(|(site, _)| *site))?;
        let sites: HashMap<&str, _> = projections.iter().map(|p| (p.0.path.as_str(), p)).collect();
        let mut modules: BTreeMap<String, ModuleTensors> = BTreeMap::new();
        let (mut parameters, mut fixed) = (BTreeMap::new(), BTreeSet::new());
        let mut accounting = Accounting::default();
        refuse_embedding(stored)?;
        let own = model.parameter_names().into_iter();
        let own: HashSet<String> =
            own.chain(projections.iter().flat_map(|(site, _)| [site.weight_path(), site.bias_path()])).collect();
        for (key, tensor) in &stored.tensors {
            let Some(path) = key.strip_prefix(PREFIX) else {
                match method.take_shared(key, tensor) {
                    true => accounting.used.push(key.clone()),
                    false => accounting.refused.push(key.clone()),
                }
                continue;
            };
            // PEFT keeps a trained bias of an adapted projection under `base_layer`, and the frozen weight of an adapted head.
            let frozen = path.ends_with(BASE_WEIGHT);
            let path = path.replace(".base_layer.", ".");
            if own.contains(&path)
                && let Some(base) = base_parameter(model, &path)?
            {
                if base.dims() != tensor.dims() {
                    return Err(Error::Mismatch(format!(
                        "tensor `{key}` has shape {:?}, the base's has {:?}",
                        tensor.dims(),
                        base.dims()
                    )));
                }
                accounting.used.push(key.clone());
                let tensor = tensor.to_dtype(model.dtype())?;
                if frozen && equal(&tensor, &base)? {
                    continue;
                }
                if let Some(other) = model.shared_with(&path).filter(|_| frozen)
                    && !stored.tensors.contains_key(&format!("{PREFIX}{other}"))
                {
                    fixed.insert(other.to_string());
                    parameters.insert(other.to_string(), Var::from_tensor(&tensor)?);
                }
                if frozen {
                    fixed.insert(path.clone());
                }
                parameters.insert(path, Var::from_tensor(&tensor)?);
                continue;
            }
            // The longest site path that the key begins with.
            let site = path.match_indices('.').map(|(i, _)| &path[..i]).rev().find(|p| sites.contains_key(p));
            match site {
                Some(site) => {
                    let rest = path[site.len() + 1..].to_string();
                    modules.entry(site.to_string()).or_default().tensors.insert(rest, tensor.clone());
                }
                None if method.take_shared(key, tensor) => accounting.used.push(key.clone()),
                None => accounting.refused.push(key.clone()),
            }
        }
        resolve(method.as_mut(), model, &CalibrationStats::new())?;
        let mut deltas: BTreeMap<String, Box<dyn Delta>> = BTreeMap::new();
        let mut work: Vec<_> = projections
            .iter()
            .map(|&(site, base)| (site, base, modules.remove(&site.path).unwrap_or_default()))
            .collect();
        let (dtype, manifest) = (model.dtype(), stored.manifest.as_ref());
        let load = |(site, base, tensors): &mut (&Site, &Projection, ModuleTensors)| -> Result<_> {
            let before: Vec<String> = tensors.tensors.keys().cloned().collect();
            // What the configuration does not name would be left out by others who read the file.
            if before.is_empty() || !matcher.targets(site) {
                return Ok((before, None));
            }
            let replaced = parameters.get(&site.weight_path()).map(|own| replaced_by(own.as_tensor(), base));
            let own = replaced.as_ref().unwrap_or(base);
            let mut source = ParameterSource::file(site, dtype, tensors);
            if replaced.is_some() {
                source = source.with_weight();
            }
            let delta = method.attach(site, own, &mut source)?;
            if let Some(frozen) = manifest.and_then(|m| m.frozen.get(&site.path)) {
                frozen.check(&site.path, delta.as_ref())?;
            }
            Ok((before, Some((delta, replaced))))
        };
        let loaded = work.par_iter_mut().map(load).collect::<Result<Vec<_>>>()?;
        let mut replaced = BTreeMap::new();
        for ((site, _, tensors), (before, delta)) in work.iter().zip(loaded) {
            if let Some((delta, own)) = delta {
                deltas.insert(site.path.clone(), delta);
                replaced.extend(own.map(|own| (site.path.clone(), own)));
            } else if matcher.targets(site) {
                accounting.missing.push(site.path.clone());
            }
            for key in before {
                let name = format!("{PREFIX}{}.{key}", site.path);
                match tensors.tensors.contains_key(&key) {
                    true => accounting.refused.push(name),
                    false => accounting.used.push(name),
                }
            }
        }
        let order = projections.iter().map(|(s, _)| s.path.clone()).collect();
        Ok((Self { method, deltas, parameters, fixed, replaced, order }, accounting))
    }

    /// [`Self::load`], where every tensor must be in use, none missing, and the adapter must do something.
    pub fn load_whole(model: &dyn BaseModel, stored: &StoredAdapter) -> Result<Self> {
        let (adapter, accounting) = Self::load(model, stored)?;
        if let Some(problem) = accounting.problem() {
            return Err(Error::Mismatch(format!("`{}`: {problem}", stored.path.display())));
        }
        if !adapter.has_effect(model)? {
            return Err(Error::Mismatch(format!(
                "`{}`: the adapter changes nothing (all its changes are zero); was it trained?",
                stored.path.display()
            )));
        }
        Ok(adapter)
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

    /// Trainable parameters in a fixed order (that of the model's forward), by a name that is unique.
    pub fn trainable(&self) -> Vec<(String, &Var)> {
        let deltas = self.order.iter().filter_map(|path| Some((path, self.deltas.get(path)?)));
        let deltas =
            deltas.flat_map(|(path, d)| d.trainable().into_iter().map(move |(n, v)| (format!("{path}.{n}"), v)));
        let whole = self.parameters.iter().filter(|(path, _)| !self.fixed.contains(*path));
        deltas.chain(whole.map(|(path, v)| (path.clone(), v))).collect()
    }

    /// What is saved and resumed beside the trainable parameters: buffers that a rule moves, by a name that is unique.
    pub fn buffers(&self) -> Vec<(String, &Var)> {
        let deltas = self.deltas.iter();
        deltas.flat_map(|(path, d)| d.buffers().into_iter().map(move |(n, v)| (format!("{path}.{n}"), v))).collect()
    }

    /// After the optimiser's step: moves the buffers.
    pub fn after_step(&self) -> TensorResult<()> {
        self.deltas.values().try_for_each(|delta| delta.after_step())
    }

    /// Number of trainable parameters.
    pub fn parameter_count(&self) -> usize {
        self.trainable().iter().map(|(_, v)| v.elem_count()).sum()
    }

    /// What this adapter's change of a projection is a change of: the base's, or the weight that the adapter brings for it.
    fn own<'a>(&'a self, site: &Site, base: &'a Projection) -> &'a Projection {
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
                tensors.insert(format!("{PREFIX}{path}.{key}"), detached(&tensor)?);
            }
        }
        for (name, tensor) in self.method.shared()? {
            tensors.insert(name, detached(&tensor)?);
        }
        for (path, var) in &self.parameters {
            let key = match path.rsplit_once('.') {
                Some((module, kind)) if self.deltas.contains_key(module) => {
                    format!("{PREFIX}{module}.base_layer.{kind}")
                }
                _ => format!("{PREFIX}{path}"),
            };
            tensors.insert(key, detached(var.as_tensor())?);
        }
        Ok(StoredAdapter { path: "memory".into(), config, tensors, manifest: None })
    }
}

/// Tells a method which projections it targets.
fn resolve(method: &mut dyn Method, model: &dyn BaseModel, stats: &CalibrationStats) -> Result<()> {
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

/// Refuses low-rank changes of the embedding, which has no projection's form.
pub(crate) fn refuse_embedding(stored: &StoredAdapter) -> Result<()> {
    match stored.tensors.keys().find(|key| key.contains(".lora_embedding_")) {
        None => Ok(()),
        Some(key) => Err(Error::Refused(format!(
            "`{}`: `{key}` is a low-rank change of the embedding, which is not read here; merge the adapter into its base with PEFT",
            stored.path.display()
        ))),
    }
}

/// Refuses to sum or scale what is not additive.
pub(crate) fn refuse_sum(method: &dyn Method, adapters: usize, weight: f64) -> Result<()> {
    match method.not_additive() {
        Some(why) if adapters > 1 || weight != 1.0 => {
            Err(Error::Refused(format!("a `{}` adapter can only be used alone and at weight 1: {why}", method.name())))
        }
        _ => Ok(()),
    }
}

/// Adapters at work on a model: their changes add up, each times its weight.
pub struct Attached<'a> {
    adapters: Vec<(&'a Adapter, f64)>,
    step: Step,
    tape: Option<&'a Tape>,
}

impl<'a> Attached<'a> {
    /// One adapter at full weight.
    pub fn one(adapter: &'a Adapter) -> Self {
        Self { adapters: vec![(adapter, 1.0)], step: Step::default(), tape: None }
    }

    /// Several adapters with weights. Whole parameters cannot be mixed, so at most one adapter may bring any of a name,
    /// and at weight 1.
    pub fn weighted(adapters: Vec<(&'a Adapter, f64)>) -> Result<Self> {
        for (adapter, weight) in &adapters {
            refuse_sum(adapter.method.as_ref(), adapters.len(), *weight)?;
        }
        let mut seen = std::collections::HashSet::new();
        for (adapter, weight) in &adapters {
            for path in adapter.parameters.keys() {
                if !seen.insert(path) {
                    return Err(Error::Refused(format!("two adapters each bring their own `{path}`; use one of them")));
                }
                if *weight != 1.0 {
                    return Err(Error::Refused(format!(
                        "an adapter that brings its own `{path}` can only be used at weight 1"
                    )));
                }
            }
        }
        Ok(Self { adapters, step: Step::default(), tape: None })
    }

    /// The same adapters in a forward of another kind.
    pub fn at(&self, step: Step) -> Self {
        Self { adapters: self.adapters.clone(), step, tape: self.tape }
    }

    /// The same adapters with their forward recorded on a tape.
    pub fn recorded<'b>(&'b self, tape: &'b Tape) -> Attached<'b> {
        Attached { adapters: self.adapters.clone(), step: self.step, tape: Some(tape) }
    }

    /// Whether the output of a row depends on that row alone, so that what sequences share may be computed once.
    pub fn rows_are_independent(&self) -> bool {
        let mut deltas = self.adapters.iter().flat_map(|(a, _)| a.deltas.values());
        deltas.all(|d| d.rows_are_independent(&self.step))
    }
}

impl Attached<'_> {
    /// What the adapters put on a site, with their weights.
    fn here(&self, site: &Site) -> impl Iterator<Item = (&Adapter, &dyn Delta, f64)> {
        self.adapters.iter().filter_map(|(a, weight)| Some((*a, a.deltas.get(&site.path)?.as_ref(), *weight)))
    }

    /// A projection without its bias, operation by operation.
    fn project_plain(&self, site: &Site, base: &Projection, x: &Tensor) -> TensorResult<Tensor> {
        let ops = self.ops();
        let own = self.parameter(&site.weight_path());
        if own.is_none()
            && self.tape.is_some()
            && let [(_, delta, 1.0)] = self.here(site).collect::<Vec<_>>()[..]
            && let Some(y) = delta.output(ops, base, x, &self.step)?
        {
            return Ok(y);
        }
        let plain = match own {
            Some(weight) => ops.subgraph(&[x], &[weight], |t| t[0].matmul(&weight.t()?))?,
            None => ops.linear(x, &base.weight)?,
        };
        let mut y = plain.clone();
        for (adapter, delta, weight) in self.here(site) {
            // Another adapter's weight takes the place of the base's; what this one changes is still the base's.
            let from = match own.is_some() && !adapter.parameters.contains_key(&site.weight_path()) {
                true => ops.linear(x, &base.weight)?,
                false => plain.clone(),
            };
            let change = ops.subgraph(&[x, &from], &parameters(delta), |t| {
                let change = delta.forward(adapter.own(site, base), &t[0], &t[1], &self.step)?;
                if weight == 1.0 { Ok(change) } else { change * weight }
            })?;
            y = ops.add(&y, &change)?;
        }
        Ok(y)
    }

    /// The form of the only adapter's change on a site, where it has one that is computed with the frozen projection: recorded as
    /// a function of its parameters.
    fn form(&self, delta: &dyn Delta, base: &Projection, x: &Tensor) -> TensorResult<Option<Change>> {
        let (mut scaling, mut gated) = (None, None);
        let rows = x.dim(0)?;
        let found = self.ops().subgraph_all(&[], &parameters(delta), |_| {
            Ok(match delta.change(base, rows, &self.step)? {
                None => vec![],
                Some(Change::Weight(weight)) => vec![weight],
                Some(Change::LowRank(low)) => {
                    scaling = Some(low.scaling);
                    vec![low.a, low.b]
                }
                Some(Change::Gated(GatedLowRank { factors, input_gradient })) => {
                    (scaling, gated) = (Some(factors.scaling), Some(input_gradient));
                    vec![factors.a, factors.b]
                }
            })
        })?;
        let mut found = found.into_iter();
        Ok(match (found.next(), found.next(), scaling) {
            (Some(a), Some(b), Some(scaling)) => {
                let factors = LowRank { a, b, scaling };
                Some(match gated {
                    Some(input_gradient) => Change::Gated(GatedLowRank { factors, input_gradient }),
                    None => Change::LowRank(factors),
                })
            }
            (Some(weight), None, _) => Some(Change::Weight(weight)),
            _ => None,
        })
    }

    /// x Wᵀ + scaling · (g ∘ (x aᵀ)) bᵀ, recorded: the products by themselves, the gates as a subgraph.
    fn project_gated(
        &self,
        (delta, base): (&dyn Delta, &Projection),
        x: &Tensor,
        change: &GatedLowRank,
    ) -> TensorResult<Tensor> {
        let (ops, LowRank { a, b, scaling }) = (self.ops(), &change.factors);
        let own = match delta.mask(x, &self.step)? {
            Some(mask) => ops.subgraph(&[x], &[], |t| &t[0] * &mask)?,
            None => x.clone(),
        };
        let own = if change.input_gradient { own } else { own.detach() };
        let u = ops.dense(&own, a)?;
        let gated = ops.subgraph(&[&own, &u], &parameters(delta), |t| {
            (&t[1] * delta.gates(&t[0], &t[1], &self.step)?)? * *scaling
        })?;
        ops.add(&ops.linear(x, &base.weight)?, &ops.dense(&gated, b)?)
    }

    /// The output with all biases, from the one without.
    fn with_biases(&self, site: &Site, base: &Projection, mut y: Tensor) -> TensorResult<Tensor> {
        let ops = self.ops();
        if let Some(bias) = self.parameter(&site.bias_path()).or(base.bias.as_ref()) {
            y = ops.add_bias(&y, bias)?;
        }
        for (_, delta, weight) in self.here(site) {
            let change =
                ops.subgraph_all(&[], &parameters(delta), |_| Ok(delta.bias_change(base)?.into_iter().collect()))?;
            if let Some(change) = change.first() {
                y = ops.add_bias(&y, &if weight == 1.0 { change.clone() } else { (change * weight)? })?;
            }
        }
        Ok(y)
    }
}

/// The tensors that a delta trains.
fn parameters(delta: &dyn Delta) -> Vec<&Tensor> {
    delta.trainable().into_iter().map(|(_, v)| v.as_tensor()).collect()
}

impl Adaptation for Attached<'_> {
    fn ops(&self) -> Ops<'_> {
        self.tape.map_or(Ops::plain(), Ops::recorded)
    }

    fn project(&self, site: &Site, base: &Projection, x: &Tensor) -> TensorResult<Tensor> {
        let mut found = self.project_all(&[(site, base)], x)?;
        found.pop().ok_or_else(|| candle_core::Error::Msg("no projection".into()))
    }

    fn project_all(&self, targets: &[(&Site, &Projection)], x: &Tensor) -> TensorResult<Vec<Tensor>> {
        let ops = self.ops();
        let mut parts = Vec::new();
        let mut places = Vec::new();
        let mut outputs: Vec<Option<Tensor>> = vec![None; targets.len()];
        // Without a tape the plain form runs, so that it is what the fast one is held against.
        for (place, (site, base)) in targets.iter().enumerate().filter(|_| self.tape.is_some()) {
            if self.parameter(&site.weight_path()).is_some() {
                continue;
            }
            let low_rank = match self.here(site).collect::<Vec<_>>()[..] {
                [] => None,
                [(_, delta, 1.0)] => match self.form(delta, base, x)? {
                    Some(Change::LowRank(LowRank { a, b, scaling })) => Some(LowRankTerm {
                        gradient_scale: delta.gradient_scale()?,
                        mask: delta.mask(x, &self.step)?,
                        ..LowRankTerm::new(a, b, scaling)
                    }),
                    Some(Change::Weight(weight)) => {
                        outputs[place] = Some(ops.dense(x, &weight)?);
                        continue;
                    }
                    Some(Change::Gated(change)) => {
                        outputs[place] = Some(self.project_gated((delta, base), x, &change)?);
                        continue;
                    }
                    None => continue,
                },
                _ => continue,
            };
            parts.push(Part { weight: Some(&base.weight), low_rank });
            places.push(place);
        }
        for (place, y) in places.into_iter().zip(ops.project(x, &parts)?) {
            outputs[place] = Some(y);
        }
        let all = targets.iter().zip(outputs).map(|((site, base), y)| {
            let y = y.map_or_else(|| self.project_plain(site, base, x), Ok)?;
            self.with_biases(site, base, y)
        });
        all.collect()
    }

    fn touches(&self, site: &Site) -> bool {
        self.adapters.iter().any(|(a, _)| a.deltas.contains_key(&site.path))
            || self.parameter(&site.weight_path()).is_some()
            || self.parameter(&site.bias_path()).is_some()
    }

    fn parameter(&self, path: &str) -> Option<&Tensor> {
        self.adapters.iter().find_map(|(a, _)| a.parameters.get(path)).map(Var::as_tensor)
    }
}
