//! From the tensors of a file to an adapter on a model, with an account of each tensor.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use candle_core::Var;
use lorimer_model::{BaseModel, Projection, Site};
use rayon::prelude::*;

use crate::adapter::{Adapter, base_parameter, bind, block_sites, equal, replaced_by, resolve, router_site};
use crate::block::{BlockDelta, BlockSite};
use crate::delta::Delta;
use crate::error::{Error, Result};
use crate::file::account::{Accounting, BaseNames, FileAccount, WholeParameter};
use crate::file::dialects::peft;
use crate::file::store::StoredAdapter;
use crate::method::{CalibrationStats, Method, ModuleTensors, ParameterSource};
use crate::pruning::record::refuse_elsewhere;
use crate::settings::check_targets;
use crate::targets::Matcher;

/// The method of a stored adapter and what each tensor of its file is.
///
/// # Errors
///
/// Fails if the configuration is of no known method, or is none that it can be built from.
pub fn account_of(stored: &StoredAdapter) -> Result<(Box<dyn Method>, FileAccount)> {
    let method = crate::methods::from_adapter_config(&stored.config)?;
    let account = FileAccount::new(stored, &method.file_keys());
    Ok((method, account))
}

/// Offers a method the tensors of its file that belong to the whole adapter; the names of those that it has no use for.
pub(crate) fn offer(account: &FileAccount, method: &mut dyn Method) -> Vec<String> {
    account
        .shared
        .iter()
        .filter(|(name, tensor)| !method.take_shared(name, tensor))
        .map(|(name, _)| name.clone())
        .collect()
}

impl Adapter {
    /// Puts a stored adapter on a model and says what became of each of its tensors. Shapes must fit; whether an
    /// incomplete account is an error is the caller's choice (see [`Self::load_whole`]).
    pub fn load(model: &dyn BaseModel, stored: &StoredAdapter) -> Result<(Self, Accounting)> {
        let (mut method, mut account) = account_of(stored)?;
        account.refuse_embedding(stored)?;
        refuse_elsewhere(stored, &model.shape().layers)?;
        method.take_parts(&stored.parts)?;
        bind(method.as_mut(), model)?;
        let of_parts = !method.parts().is_empty();
        let projections = model.projections();
        let blocks = block_sites(model, method.as_ref())?;
        if method.blocks().is_none() {
            check_targets(&stored.config, &model.shape().model_type, projections.iter().map(|(site, _)| *site))?;
        }
        let matcher = Matcher::new(method.targeting(), projections.iter().map(|(site, _)| *site))?;
        let mut accounting = account.fit(&BaseNames::of(model), &matcher, method.name());
        if of_parts {
            // What it puts on projections comes out of its parts.
            accounting.missing.clear();
        }
        let (parameters, fixed) = whole_parameters(model, &account.parameters)?;
        accounting.refuse(offer(&account, method.as_mut()));
        resolve(method.as_mut(), model, &CalibrationStats::new())?;
        let mut deltas: BTreeMap<String, Box<dyn Delta>> = BTreeMap::new();
        let mut work: Vec<_> = projections
            .iter()
            .map(|&(site, base)| {
                let tensors = account.modules.remove(&site.path).unwrap_or_default();
                (site, base, ModuleTensors { tensors })
            })
            .collect();
        let (dtype, manifest) = (model.dtype(), stored.manifest.as_ref());
        let load = |(site, base, tensors): &mut (&Site, &Projection, ModuleTensors)| -> Result<_> {
            if !(matcher.targets(site) && (of_parts || !tensors.tensors.is_empty())) {
                return Ok(None);
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
            Ok(Some((delta, replaced)))
        };
        let loaded = work.par_iter_mut().map(load).collect::<Result<Vec<_>>>()?;
        let mut replaced = BTreeMap::new();
        let mut left = Vec::new();
        for ((site, _, tensors), delta) in work.iter().zip(loaded) {
            left.extend(tensors.tensors.keys().map(|key| peft::tensor_name(&site.path, key)));
            if let Some((delta, own)) = delta {
                deltas.insert(site.path.clone(), delta);
                replaced.extend(own.map(|own| (site.path.clone(), own)));
            }
        }
        accounting.refuse(left);
        let blocks = load_blocks(method.as_ref(), blocks, dtype, &account, &mut accounting)?;
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

/// The parameters of the base that a file replaces, by on-disk name, and which of them are not trained.
fn whole_parameters(
    model: &dyn BaseModel,
    stored: &[WholeParameter],
) -> Result<(BTreeMap<String, Var>, BTreeSet<String>)> {
    let (mut parameters, mut fixed) = (BTreeMap::new(), BTreeSet::new());
    for WholeParameter { name, path, frozen, tensor } in stored {
        let Some(base) = base_parameter(model, path)? else { continue };
        if base.dims() != tensor.dims() {
            return Err(Error::Mismatch(format!(
                "tensor `{name}` has shape {:?}, the base's has {:?}",
                tensor.dims(),
                base.dims()
            )));
        }
        let tensor = tensor.to_dtype(model.dtype())?;
        if *frozen && equal(&tensor, &base)? {
            continue;
        }
        // A tied embedding is that weight as well.
        if let Some(other) = model.shared_with(path).filter(|other| *frozen && stored.iter().all(|p| p.path != **other))
        {
            fixed.insert(other.to_string());
            parameters.insert(other.to_string(), Var::from_tensor(&tensor)?);
        }
        if *frozen {
            fixed.insert(path.clone());
        }
        parameters.insert(path.clone(), Var::from_tensor(&tensor)?);
    }
    Ok((parameters, fixed))
}

/// Layers on blocks out of their tensors, which are accounted for.
fn load_blocks(
    method: &dyn Method,
    blocks: Vec<BlockSite>,
    dtype: candle_core::DType,
    account: &FileAccount,
    accounting: &mut Accounting,
) -> Result<Vec<(BlockSite, Arc<dyn BlockDelta>)>> {
    let (mut found, mut left) = (Vec::new(), Vec::new());
    let mut layers = method.blocks().map(|own| account.layers(own.module())).unwrap_or_default();
    if let Some(own) = method.blocks() {
        for block in blocks {
            let Some(tensors) = layers.remove(&block.site.path) else {
                accounting.missing.extend(own.targets(block.layer).then(|| block.site.path.clone()));
                continue;
            };
            let mut tensors = ModuleTensors { tensors };
            let delta = own.attach(&block, &mut ParameterSource::file(&block.site, dtype, &mut tensors))?;
            left.extend(tensors.tensors.keys().map(|key| peft::tensor_name(&block.site.path, key)));
            found.extend(delta.map(|delta| (block, delta.into())));
        }
    }
    left.extend(layers.iter().flat_map(|(path, own)| own.keys().map(move |key| peft::tensor_name(path, key))));
    accounting.refuse(left);
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
