//! From the tensors of a file to an adapter on a model, with an account of each tensor.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use candle_core::Var;
use lorimer_model::{BaseModel, Projection, Site};
use rayon::prelude::*;

use crate::adapter::{Adapter, base_parameter, bind, block_sites, equal, replaced_by, resolve, router_site};
use crate::block::{BlockDelta, BlockSite};
use crate::delta::Delta;
use crate::error::{Error, Result};
use crate::file::store::{BASE_WEIGHT, PREFIX, StoredAdapter};
use crate::method::{CalibrationStats, Method, ModuleTensors, ParameterSource};
use crate::settings::check_targets;
use crate::targets::Matcher;

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

impl Adapter {
    /// Puts a stored adapter on a model and says what became of each of its tensors. Shapes must fit; whether an
    /// incomplete account is an error is the caller's choice (see [`Self::load_whole`]).
    pub fn load(model: &dyn BaseModel, stored: &StoredAdapter) -> Result<(Self, Accounting)> {
        let mut method = crate::methods::from_adapter_config(&stored.config)?;
        method.take_parts(&stored.parts)?;
        bind(method.as_mut(), model)?;
        let of_parts = !method.parts().is_empty();
        let projections = model.projections();
        let blocks = block_sites(model, method.as_ref())?;
        if method.blocks().is_none() {
            check_targets(&stored.config, &model.shape().model_type, projections.iter().map(|(site, _)| *site))?;
        }
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
            let known = |p: &&str| sites.contains_key(p) || blocks.iter().any(|block| block.site.path == *p);
            let site = path.match_indices('.').map(|(i, _)| &path[..i]).rev().find(known);
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
            if (before.is_empty() && !of_parts) || !matcher.targets(site) {
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
        let blocks = load_blocks(method.as_ref(), blocks, dtype, &mut modules, &mut accounting)?;
        let order = projections.iter().map(|(s, _)| s.path.clone()).collect();
        let place = router_site(model);
        let router = method.router(&mut ParameterSource::file(&place, dtype, &mut ModuleTensors::default()))?;
        let router = router.map(Arc::from);
        let adapter = Self { method, deltas, blocks, parameters, fixed, replaced, order, router };
        check_mixture(&adapter, stored)?;
        Ok((adapter, accounting))
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
}

/// Layers on blocks out of their modules' tensors, which are accounted for.
fn load_blocks(
    method: &dyn Method,
    blocks: Vec<BlockSite>,
    dtype: candle_core::DType,
    modules: &mut BTreeMap<String, ModuleTensors>,
    accounting: &mut Accounting,
) -> Result<Vec<(BlockSite, Arc<dyn BlockDelta>)>> {
    let mut found = Vec::new();
    let Some(own) = method.blocks() else { return Ok(found) };
    for block in blocks {
        let mut tensors = modules.remove(&block.site.path).unwrap_or_default();
        let before: Vec<String> = tensors.tensors.keys().cloned().collect();
        if before.is_empty() {
            if own.targets(block.layer) {
                accounting.missing.push(block.site.path.clone());
            }
            continue;
        }
        let delta = own.attach(&block, &mut ParameterSource::file(&block.site, dtype, &mut tensors))?;
        for key in before {
            let name = format!("{PREFIX}{}.{key}", block.site.path);
            match tensors.tensors.contains_key(&key) {
                true => accounting.refused.push(name),
                false => accounting.used.push(name),
            }
        }
        found.extend(delta.map(|delta| (block, delta.into())));
    }
    Ok(found)
}

/// Refuses an adapter made of others where these are not those that it was made of, or the base orders its projections otherwise: each weight
/// of a mixture belongs to a place among both.
fn check_mixture(adapter: &Adapter, stored: &StoredAdapter) -> Result<()> {
    let then = stored.manifest.as_ref().and_then(|manifest| manifest.xlora.as_ref());
    let (Some(then), Some(now)) = (then, adapter.mixture()) else { return Ok(()) };
    let fail = |text: String| Err(Error::Mismatch(format!("`{}`: {text}", stored.path.display())));
    if then.sites != now.sites {
        return fail(
            "lorimer.json names other projections, or in another order, than the experts have on this base".into(),
        );
    }
    let same = then.experts.iter().zip(&now.experts).position(|(then, now)| then != now);
    match (same, stored.parts.get(same.unwrap_or_default())) {
        (Some(number), Some(part)) => fail(format!(
            "expert {number}, `{}`, is not the adapter that the head was trained with",
            part.path.display()
        )),
        _ if then.experts.len() != now.experts.len() => {
            fail(format!("lorimer.json names {} experts, there are {}", then.experts.len(), now.experts.len()))
        }
        _ => Ok(()),
    }
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
