//! Any adapter as a plain LoRA that every tool loads: exactly where its change is a product of low-rank factors, else the best
//! approximation of a rank, with the error told.

use std::collections::BTreeMap;

use candle_core::{DType, Result as TensorResult, Tensor};
use lorimer_model::{BaseModel, Projection, Site};
use lorimer_tensor::linalg::truncated_svd;
use rayon::prelude::*;
use serde::Serialize;
use serde_json::json;

use crate::adapter::Adapter;
use crate::delta::{Delta, LowRank};
use crate::error::{Error, Result};
use crate::file::account::FileAccount;
use crate::file::convert::to_peft;
use crate::file::dialects::peft;
use crate::file::store::StoredAdapter;
use crate::method::refuse_blocks;
use crate::step::Step;

/// Rank of the approximation where none is given.
const DEFAULT_RANK: usize = 64;

/// What an export gave.
#[derive(Clone, Debug, Serialize)]
pub struct Exported {
    /// Modules written.
    pub modules: usize,
    /// Modules whose LoRA equals their change.
    pub exact: usize,
    /// The largest rank.
    pub rank: usize,
    /// ‖approximation − ΔW‖ / ‖ΔW‖ over the modules that are not exact (Frobenius); 0 where all are.
    pub error: f64,
}

fn squares(t: &Tensor) -> TensorResult<f64> {
    t.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()
}

/// One module's LoRA, whether it is exact, ‖ΔW‖² and the squared error.
pub type One = (LowRank, bool, f64, f64);

/// The change of one projection as a product of low-rank factors: its own, where it is one and `rank` allows it, else the best of rank
/// `rank` (64 where none is given).
///
/// # Errors
///
/// Fails if the projection has to be approximated and its method has no plain weight, or if a tensor operation fails.
pub fn low_rank_of(site: &Site, base: &Projection, delta: &dyn Delta, rank: Option<usize>) -> Result<One> {
    let side = site.inputs.min(site.outputs);
    if let Some(low) = delta.change(base, 0, &Step::default())?.factors() {
        let own = low.a.dim(0)?;
        if rank.map_or(own < side, |rank| own <= rank) {
            let (a, b) = (low.a.detach(), low.b.detach());
            return Ok((LowRank { a, b, scaling: low.scaling }, true, 0.0, 0.0));
        }
    }
    let merged =
        delta.merged(base)?.map_err(|why| Error::Refused(format!("`{}` has no plain weight: {}", site.path, why.0)))?;
    let dtype = merged.dtype();
    let change = (merged.to_dtype(DType::F64)? - base.dense(dtype)?.to_dtype(DType::F64)?)?;
    let (u, s, vt) = truncated_svd(&change, rank.unwrap_or(DEFAULT_RANK).min(side))?;
    let root = s.sqrt()?;
    let a = vt.broadcast_mul(&root.unsqueeze(1)?)?;
    let b = u.broadcast_mul(&root)?;
    let whole = squares(&change)?;
    let error = squares(&(b.matmul(&a)? - change)?)?;
    Ok((LowRank { a: a.to_dtype(dtype)?, b: b.to_dtype(dtype)?, scaling: 1.0 }, false, whole, error))
}

/// The adapter as a LoRA of PEFT's for `base_name`. With `rank`, no module's is larger; without, exact modules keep their own and
/// the others get 64.
///
/// # Errors
///
/// Fails if no projection is adapted, if one has to be approximated and its method has no plain weight, or if a tensor operation fails.
pub fn to_lora(
    model: &dyn BaseModel,
    adapter: &Adapter,
    rank: Option<usize>,
    base_name: &str,
) -> Result<(StoredAdapter, Exported)> {
    if adapter.blocks().next().is_some() {
        return Err(refuse_blocks(adapter.method.as_ref(), "written as a LoRA"));
    }
    let sites = adapter.sites(model);
    let found = sites
        .par_iter()
        .map(|(site, base, delta)| low_rank_of(site, base, *delta, rank))
        .collect::<Result<Vec<One>>>()?;
    let (mut whole, mut error, mut exact, mut largest) = (0.0, 0.0, 0, 0);
    let mut modules = BTreeMap::new();
    for ((site, ..), (low, is_exact, squared, wrong)) in sites.iter().zip(found) {
        exact += usize::from(is_exact);
        largest = largest.max(low.a.dim(0)?);
        whole += squared;
        error += wrong;
        modules.insert(site.path.clone(), low);
    }
    let mut stored = to_peft(modules, base_name)?;
    let mut biases = false;
    for (site, base, delta) in &sites {
        let own = adapter.parameters().get(&site.bias_path()).map(|v| v.as_tensor()).or(base.bias.as_ref());
        if let (Some(bias), Some(change)) = (own, delta.bias_change(base)?) {
            stored.tensors.insert(peft::parameter_name(&site.bias_path(), true), (bias + change.detach())?.detach());
            biases = true;
        }
    }
    // What an adapter brings whole goes along as it is.
    let own = adapter.to_stored(base_name)?;
    for parameter in FileAccount::new(&own, &adapter.method.file_keys()).parameters {
        stored.tensors.entry(parameter.name).or_insert(parameter.tensor);
    }
    let config = adapter.method.config();
    let bias = if biases { json!("lora_only") } else { json!(adapter.method.bias()) };
    stored.config.insert("bias".into(), bias);
    if let Some(saved) = config.get("modules_to_save").filter(|v| !v.is_null()) {
        stored.config.insert("modules_to_save".into(), saved.clone());
    }
    let error = if whole > 0.0 { (error / whole).sqrt() } else { 0.0 };
    Ok((stored, Exported { modules: sites.len(), exact, rank: largest, error }))
}
