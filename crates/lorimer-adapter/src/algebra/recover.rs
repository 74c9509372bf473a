//! From an adapter of a pruned model to one of the whole base: rows and columns go back to where they were, with zeros between.

use std::collections::{BTreeMap, HashSet};

use lorimer_model::decoder::EMBEDDING;
use serde_json::json;

use crate::error::{Error, Result};
use crate::file::account::BaseNames;
use crate::file::dialects::peft;
use crate::file::load::account_of;
use crate::file::store::{Manifest, StoredAdapter};
use crate::pruning::units::layer_of;
use crate::pruning::{Axis, Pruning, spans};
use crate::targets::Matcher;

/// Makes an adapter of a pruned model one of its whole base (LoRAM, Zhang et al. 2025, arXiv 2502.13533): B of q, k, v, gate and up gets its rows
/// back where they were, A of o and down its columns, everything else is copied. What PEFT saves of the base beside an adapter on the head is the
/// pruned model's and is left out. With `unverified`, an adapter without `lorimer.json` is taken on its shapes alone.
///
/// # Errors
///
/// Fails if the adapter is no plain LoRA, was not trained on the model of this record, does not fit it or is not whole.
pub fn recover(stored: &StoredAdapter, pruning: &Pruning, unverified: bool) -> Result<StoredAdapter> {
    let fail = |text: String| Err(Error::Mismatch(format!("`{}`: {text}", stored.path.display())));
    let base = stored.manifest.as_ref().and_then(|m| m.base.as_ref());
    match base.map(|base| base.pruned.as_ref()) {
        Some(Some(own)) if own.pruning == pruning.id => {}
        Some(Some(_)) => {
            return fail("was trained on another pruned model: the ids of lorimer.json and pruning.json differ".into());
        }
        Some(None) => return fail("was trained on a base that is no pruned model".into()),
        None if unverified => {}
        None => {
            return fail(
                "has no lorimer.json that says which pruned model it was trained on, and shapes do not tell; --unverified takes it all the same".into(),
            );
        }
    }
    let (method, mut account) = account_of(stored)?;
    let dora = stored.config.get("use_dora").and_then(serde_json::Value::as_bool) == Some(true);
    if method.name() != "lora" || dora {
        let name = if dora { "dora" } else { method.name() };
        return Err(Error::Refused(format!(
            "a `{name}` adapter cannot be recovered, only plain LoRA can; `lorimer convert --to lora` makes one of it"
        )));
    }
    account.refuse_embedding(stored)?;
    let sites = pruning.kept_sites();
    let parameters: HashSet<String> = account.parameters.iter().map(|p| p.path.clone()).collect();
    let layers = pruning.kept_layers();
    let matcher = Matcher::new(method.targeting(), &sites)?;
    let names = BaseNames { model_type: pruning.base.model_type.clone(), sites, parameters, layers };
    if let Some(problem) = account.fit(&names, &matcher, method.name()).problem() {
        return fail(problem);
    }
    let whole = pruning.layers();
    let mut tensors = BTreeMap::new();
    for site in &names.sites {
        let Some(own) = account.modules.get(&site.path) else { continue };
        for (key, tensor) in own {
            // B (outputs, r) has the rows, A (r, inputs) the columns.
            let (axis, dim, expected) = match key.as_str() {
                "lora_B.weight" => (Axis::Rows, 0, site.outputs),
                _ => (Axis::Columns, 1, site.inputs),
            };
            if tensor.dims().len() != 2 || tensor.dim(dim)? != expected {
                return fail(format!(
                    "`{}.{key}` has shape {:?}, the pruned model has {expected} there",
                    site.path,
                    tensor.dims()
                ));
            }
            let wide = match layer_of(site, &pruning.kept).zip(layer_of(site, &whole)) {
                Some((kept, whole)) => kept.scatter(tensor, (&site.role, axis, dim), whole)?,
                None => tensor.clone(),
            };
            tensors.insert(peft::tensor_name(&site.path, key), wide);
        }
    }
    for parameter in account.parameters.iter().filter(|p| !p.frozen) {
        let module = parameter.path.rsplit_once('.').map_or(parameter.path.as_str(), |(module, _)| module);
        let site = names.sites.iter().find(|site| site.path == module);
        let cut = site.and_then(|site| layer_of(site, &whole).map(|layer| spans(&site.role, layer).is_some()));
        if cut == Some(true) || parameter.path == EMBEDDING {
            return Err(Error::Refused(format!(
                "`{}` is replaced whole by the adapter, which cannot be recovered",
                parameter.path
            )));
        }
        tensors.insert(parameter.name.clone(), parameter.tensor.clone());
    }
    let mut config = stored.config.clone();
    config.insert("base_model_name_or_path".into(), pruning.base.name.clone().into());
    let mut found = StoredAdapter { path: "memory".into(), config, tensors, manifest: None, parts: Vec::new() };
    let before = stored.manifest.as_ref();
    found.manifest = Some(Manifest {
        format: 1,
        content_id: found.content_id()?,
        method: before.map_or("lora", |m| m.method.as_str()).to_string(),
        lorimer: env!("CARGO_PKG_VERSION").to_string(),
        base: Some(pruning.base.clone()),
        chat_template: before.and_then(|m| m.chat_template.clone()),
        training: json!({
            "recovered_from": stored.content_id()?, "pruning": pruning.id,
            "trained_on": base, "method_settings": before.map(|m| &m.training["method_settings"]),
        }),
        golden: Vec::new(),
        frozen: Default::default(),
        xlora: None,
    });
    Ok(found)
}
