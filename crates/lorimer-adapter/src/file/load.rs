//! From the tensors of a file to an adapter on a model, with an account of each tensor.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::Var;
use lorimer_model::{BaseModel, Projection, Site};
use rayon::prelude::*;

use crate::adapter::{Adapter, base_parameter, equal, replaced_by, resolve};
use crate::error::{Error, Result};
use crate::file::account::{Accounting, BaseNames, FileAccount, WholeParameter};
use crate::file::dialects::peft;
use crate::file::store::StoredAdapter;
use crate::method::{CalibrationStats, Delta, Method, ModuleTensors, ParameterSource};
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

/// Offers a method the tensors of its file that belong to no projection; the names of those that it has no use for.
pub(crate) fn offer(account: &FileAccount, method: &mut dyn Method) -> Vec<String> {
    account.beside_modules().filter(|(name, tensor)| !method.take_shared(name, tensor)).map(|(name, _)| name).collect()
}

impl Adapter {
    /// Puts a stored adapter on a model and says what became of each of its tensors. Shapes must fit; whether an
    /// incomplete account is an error is the caller's choice (see [`Self::load_whole`]).
    pub fn load(model: &dyn BaseModel, stored: &StoredAdapter) -> Result<(Self, Accounting)> {
        let (mut method, mut account) = account_of(stored)?;
        account.refuse_embedding(stored)?;
        let projections = model.projections();
        check_targets(&stored.config, &model.shape().model_type, projections.iter().map(|(site, _)| *site))?;
        let matcher = Matcher::new(method.targeting(), projections.iter().map(|(site, _)| *site))?;
        let mut accounting = account.fit(&BaseNames::of(model), &matcher, method.name());
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
            if tensors.tensors.is_empty() {
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
