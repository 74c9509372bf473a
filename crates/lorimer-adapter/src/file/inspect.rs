//! What is in an adapter file, without its base.

use std::collections::BTreeMap;
use std::path::PathBuf;

use lorimer_tensor::linalg::product_singular_values;
use serde::Serialize;

use crate::error::Result;
use crate::file::load::account_of;
use crate::file::store::StoredAdapter;
use crate::part::Part;

/// One adapted module.
#[derive(Clone, Debug, Serialize)]
pub struct ModuleReport {
    /// Path in the base.
    pub name: String,
    /// Rank of the stored factors.
    pub rank: Option<usize>,
    /// Frobenius norm of ΔW.
    pub norm: Option<f64>,
    /// Effective rank of ΔW: e to the entropy of its normalised singular values (Roy and Vetterli 2007).
    pub effective_rank: Option<f64>,
    /// Number of stored values, those of the base's parameters under the adapter included.
    pub parameters: usize,
    /// Figures that only this method has.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub remarks: BTreeMap<String, f64>,
}

/// One adapter.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Name in the registry.
    pub method: String,
    /// PEFT's name.
    pub peft_type: String,
    /// `r` of the configuration.
    pub rank: Option<u64>,
    /// `lora_alpha` of the configuration.
    pub alpha: Option<f64>,
    /// Number of stored values.
    pub parameters: usize,
    /// Bytes of the stored values.
    pub bytes: usize,
    /// `sha256:…` over configuration and tensors.
    pub content_id: String,
    /// Whether `lorimer.json` says the same id; None without that file.
    pub content_matches: Option<bool>,
    /// Base that the configuration names.
    pub base: Option<String>,
    /// The modules.
    pub modules: Vec<ModuleReport>,
    /// The adapters that it is made of, in the order of its weights.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub experts: Vec<ExpertReport>,
    /// Parameters in the place of the base's (biases, norms, what PEFT saves under an adapter), by on-disk name, with their numbers of values.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub whole: BTreeMap<String, usize>,
    /// Tensors of the method that belong to no module, by name, with their numbers of values.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub beside: BTreeMap<String, usize>,
    /// Tensors that the method does not know.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unknown: Vec<String>,
}

/// An adapter that another is made of.
#[derive(Clone, Debug, Serialize)]
pub struct ExpertReport {
    /// Its folder.
    pub path: PathBuf,
    /// `sha256:…` over configuration and tensors.
    pub content_id: String,
    /// Whether it is the one that `lorimer.json` names at this place; None without that file.
    pub content_matches: Option<bool>,
}

/// Looks into an adapter.
///
/// # Errors
///
/// Fails if the configuration is of no known method, or if a module's tensors do not belong together.
pub fn inspect(stored: &StoredAdapter) -> Result<Report> {
    let (method, mut account) = account_of(stored)?;
    if let Some(own) = method.blocks() {
        // A layer on a block is a module like any other here.
        let layers = account.layers(own.module());
        account.blocks.clear();
        account.modules.extend(layers);
    }
    let mut modules = Vec::new();
    for (name, tensors) in &account.modules {
        let low_rank = method.low_rank(name, tensors)?;
        let (mut rank, mut norm, mut effective_rank) = (None, None, None);
        if let Some(low) = &low_rank {
            let values: Vec<f64> =
                product_singular_values(&low.b, &low.a)?.iter().map(|s| s * low.scaling.abs()).collect();
            let total: f64 = values.iter().sum();
            let entropy: f64 = values.iter().map(|s| s / total).filter(|p| *p > 0.0).map(|p| -p * p.ln()).sum();
            rank = Some(low.a.dim(0)?);
            norm = Some(values.iter().map(|s| s * s).sum::<f64>().sqrt());
            effective_rank = Some(if total > 0.0 { entropy.exp() } else { 0.0 });
        }
        let parameters = account.values_of(name);
        let remarks = method.remarks(tensors)?.into_iter().collect();
        modules.push(ModuleReport { name: name.clone(), rank, norm, effective_rank, parameters, remarks });
    }
    let content_id = stored.content_id()?;
    let named = stored.manifest.as_ref().and_then(|manifest| manifest.xlora.as_ref());
    let expert = |(i, part): (usize, &Part)| ExpertReport {
        path: part.path.clone(),
        content_id: part.content_id.clone(),
        content_matches: named.map(|named| named.experts.get(i) == Some(&part.content_id)),
    };
    Ok(Report {
        experts: stored.parts.iter().enumerate().map(expert).collect(),
        method: method.name().to_string(),
        peft_type: stored.config.get("peft_type").and_then(|v| v.as_str()).unwrap_or_default().to_string(),
        rank: stored.config.get("r").and_then(serde_json::Value::as_u64),
        alpha: stored.config.get("lora_alpha").and_then(serde_json::Value::as_f64),
        parameters: stored.tensors.values().map(|t| t.elem_count()).sum(),
        bytes: stored.tensors.values().map(|t| t.elem_count() * t.dtype().size_in_bytes()).sum(),
        content_matches: stored.manifest.as_ref().map(|m| m.content_id == content_id),
        content_id,
        base: stored.config.get("base_model_name_or_path").and_then(|v| v.as_str()).map(str::to_string),
        modules,
        whole: account.parameters.iter().map(|p| (p.path.clone(), p.tensor.elem_count())).collect(),
        beside: account.beside_modules().map(|(name, tensor)| (name, tensor.elem_count())).collect(),
        unknown: account.unknown,
    })
}
