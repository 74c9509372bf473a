//! From an adapter of a pruned model to one of the whole base: rows and columns go back to where they were, with zeros between.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use candle_core::Tensor;
use lorimer_model::decoder::EMBEDDING;
use lorimer_model::files::{write_folder_atomic, write_json};
use lorimer_model::{LayerShape, Site};
use serde::Serialize;
use serde_json::json;

use crate::error::{Error, Result};
use crate::file::account::{BaseNames, FileAccount};
use crate::file::bytes::Header;
use crate::file::dialects::peft;
use crate::file::load::account_of;
use crate::file::store::{CONFIG_FILE, MANIFEST_FILE, Manifest, StoredAdapter, WEIGHTS_FILE};
use crate::file::streamed::{StreamedAdapter, content_id_of};
use crate::file::writer::{carrying, write_tensors};
use crate::methods::lora::LoraConfig;
use crate::pruning::units::layer_of;
use crate::pruning::{Axis, Pruning, spans};
use crate::targets::Matcher;

/// What was recovered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Recovered {
    /// Folder written.
    pub output: String,
    /// Hub id or path of the whole base.
    pub base: String,
    /// Tensors written.
    pub tensors: usize,
    /// Numbers in them.
    pub parameters: usize,
    /// Numbers in the adapter's file.
    pub trained_parameters: usize,
}

/// Makes an adapter of a pruned model one of its whole base (LoRAM, Zhang et al. 2025, arXiv 2502.13533): B of q, k, v, gate and up gets its rows
/// back where they were, A of o and down its columns, everything else is copied. What PEFT saves of the base beside an adapter on the head is the
/// pruned model's and is left out. With `unverified`, an adapter without `lorimer.json` is taken on its shapes alone. One tensor is in memory at a
/// time, and the new folder is there whole or not at all.
///
/// # Errors
///
/// Fails if the adapter is damaged or no plain LoRA, was not trained on the model of this record, does not fit it or is not whole, or if the folder
/// exists or cannot be written.
pub fn recover(adapter: &Path, pruning: &Pruning, unverified: bool, output: &Path) -> Result<Recovered> {
    if output.exists() {
        return Err(Error::Refused(format!("`{}` exists; choose another --output", output.display())));
    }
    let file = StreamedAdapter::open(adapter, "recovered")?;
    check_origin(&file.stored, pruning, unverified)?;
    let account = account(&file.stored, pruning)?;
    let placed = places(&file.stored, pruning, &account)?;
    let mut parameters = 0;
    carrying(|carry| {
        write_folder_atomic(output, |folder| {
            parameters = fill(folder, &file, pruning, &placed).map_err(carry)?;
            Ok(())
        })
    })?;
    Ok(Recovered {
        output: output.display().to_string(),
        base: pruning.base.name.clone(),
        tensors: placed.len(),
        parameters,
        trained_parameters: file.stored.tensors.values().map(Tensor::elem_count).sum(),
    })
}

fn mismatch<T>(stored: &StoredAdapter, text: impl std::fmt::Display) -> Result<T> {
    Err(Error::Mismatch(format!("`{}`: {text}", stored.path.display())))
}

/// Refuses an adapter that was not trained on the model of this record.
fn check_origin(stored: &StoredAdapter, pruning: &Pruning, unverified: bool) -> Result<()> {
    let base = stored.manifest.as_ref().and_then(|m| m.base.as_ref());
    match base.map(|base| base.pruned.as_ref()) {
        Some(Some(own)) if own.pruning == pruning.id => Ok(()),
        Some(Some(_)) => {
            mismatch(stored, "was trained on another pruned model: the ids of lorimer.json and pruning.json differ")
        }
        Some(None) => mismatch(stored, "was trained on a base that is no pruned model"),
        None if unverified => Ok(()),
        None => mismatch(
            stored,
            "has no lorimer.json that says which pruned model it was trained on, and shapes do not tell; --unverified takes it all the same",
        ),
    }
}

/// What each tensor is, of a plain LoRA that is whole on the pruned model.
fn account(stored: &StoredAdapter, pruning: &Pruning) -> Result<FileAccount> {
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
    let matcher = Matcher::new(method.targeting(), &sites)?;
    let (model_type, layers) = (pruning.base.model_type.clone(), pruning.kept_layers());
    let names = BaseNames { model_type, sites, parameters, layers };
    match account.fit(&names, &matcher, method.name()).problem() {
        Some(problem) => mismatch(stored, problem),
        None => Ok(account),
    }
}

/// Where rows or columns of a tensor go: the projection, and the side of it that the tensor has.
struct Place {
    site: Site,
    axis: Axis,
}

/// The tensors of the result by name, which is the name in the adapter's file too, and where they go; None: they are copied.
fn places(stored: &StoredAdapter, pruning: &Pruning, account: &FileAccount) -> Result<BTreeMap<String, Option<Place>>> {
    let (sites, whole) = (pruning.kept_sites(), pruning.layers());
    let config = LoraConfig::from_file(&stored.config)?;
    let mut placed = BTreeMap::new();
    for site in &sites {
        let Some(own) = account.modules.get(&site.path) else { continue };
        for (key, tensor) in own {
            // B (outputs, r) has the rows, A (r, inputs) the columns.
            let rank = config.rank(&site.path)?;
            let (axis, expected) = match key.as_str() {
                "lora_B.weight" => (Axis::Rows, [site.outputs, rank]),
                _ => (Axis::Columns, [rank, site.inputs]),
            };
            if tensor.dims() != expected {
                let text = format!("has shape {:?}, rank {rank} on the pruned model takes {expected:?}", tensor.dims());
                return mismatch(stored, format!("`{}.{key}` {text}", site.path));
            }
            placed.insert(peft::tensor_name(&site.path, key), Some(Place { site: site.clone(), axis }));
        }
    }
    for parameter in account.parameters.iter().filter(|p| !p.frozen) {
        let module = parameter.path.rsplit_once('.').map_or(parameter.path.as_str(), |(module, _)| module);
        let site = sites.iter().find(|site| site.path == module);
        let cut = site.and_then(|site| layer_of(site, &whole).map(|layer| spans(&site.role, layer).is_some()));
        if cut == Some(true) || parameter.path == EMBEDDING {
            return Err(Error::Refused(format!(
                "`{}` is replaced whole by the adapter, which cannot be recovered",
                parameter.path
            )));
        }
        placed.insert(parameter.name.clone(), None);
    }
    Ok(placed)
}

/// Fills the folder of the result. Gives the numbers in its tensors.
fn fill(
    folder: &Path,
    file: &StreamedAdapter,
    pruning: &Pruning,
    placed: &BTreeMap<String, Option<Place>>,
) -> Result<usize> {
    let (path, whole) = (folder.join(WEIGHTS_FILE), pruning.layers());
    let mut parameters = 0;
    let names: Vec<String> = placed.keys().cloned().collect();
    write_tensors(&path, Header::room_for(&names), |out| {
        for (name, place) in placed {
            let tensor = recovered(&file.tensor(name)?, place.as_ref(), pruning, &whole)?;
            parameters += tensor.elem_count();
            out.push(name, &tensor)?;
        }
        Ok(())
    })?;
    let mut config = file.stored.config.clone();
    config.insert("base_model_name_or_path".into(), pruning.base.name.clone().into());
    write_json(&folder.join(CONFIG_FILE), &config)?;
    let before = file.stored.manifest.as_ref();
    let manifest = Manifest {
        format: 1,
        content_id: content_id_of(folder)?,
        method: before.map_or("lora", |m| m.method.as_str()).to_string(),
        lorimer: env!("CARGO_PKG_VERSION").to_string(),
        base: Some(pruning.base.clone()),
        chat_template: before.and_then(|m| m.chat_template.clone()),
        training: json!({
            "recovered_from": file.content_id, "pruning": pruning.id,
            "trained_on": before.and_then(|m| m.base.as_ref()),
            "method_settings": before.map(|m| &m.training["method_settings"]),
        }),
        golden: Vec::new(),
        frozen: BTreeMap::new(),
        xlora: None,
    };
    write_json(&folder.join(MANIFEST_FILE), &manifest)?;
    Ok(parameters)
}

/// A tensor as the whole base has it.
fn recovered(tensor: &Tensor, place: Option<&Place>, pruning: &Pruning, whole: &[LayerShape]) -> Result<Tensor> {
    let Some(Place { site, axis }) = place else { return Ok(tensor.clone()) };
    match layer_of(site, &pruning.kept).zip(layer_of(site, whole)) {
        Some((kept, layer)) => Ok(kept.scatter(tensor, (&site.role, *axis, axis.dim()), layer)?),
        None => Ok(tensor.clone()),
    }
}
