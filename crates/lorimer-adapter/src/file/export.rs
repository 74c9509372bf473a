//! Any adapter as a plain LoRA that every tool loads: exactly where its change is a product of low-rank factors, else the best
//! approximation of a rank, with the error told. Where its gates depend on the token, with fixed gates in their place.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Result as TensorResult, Tensor};
use lorimer_model::{BaseModel, Projection, Site};
use lorimer_tensor::linalg::truncated_svd;
use rayon::prelude::*;
use serde::Serialize;
use serde_json::json;

use crate::adapter::Adapter;
use crate::delta::{Change, Delta, GatedLowRank, LowRank};
use crate::error::{Error, Result};
use crate::file::account::FileAccount;
use crate::file::convert::to_peft;
use crate::file::dialects::peft;
use crate::file::store::StoredAdapter;
use crate::gates::{Gated, Gates, gated_by};
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
    assemble(model, adapter, base_name, |site, base, delta| low_rank_of(site, base, delta, rank).map(Some))
}

/// What takes the place of gates that depend on the token.
#[derive(Clone, Copy, Debug)]
pub enum FixedGates<'a> {
    /// One number an expert, for all projections.
    Experts(&'a [f64]),
    /// The means of each projection.
    Means(&'a Gates),
}

/// An adapter whose gates depend on the token, with fixed gates, as a LoRA of PEFT's for `base_name`: the factors of its experts or ranks one after
/// another, each times its gate, which is exact; those whose gate is 0 are left out. Projections without gates are written as [`to_lora`] does.
///
/// # Errors
///
/// Fails if the adapter has no such gates, or others than the numbers are for, if a number is not finite or all are 0, or if a tensor operation
/// fails.
pub fn to_lora_with_gates(
    model: &dyn BaseModel,
    adapter: &Adapter,
    gates: FixedGates<'_>,
    base_name: &str,
) -> Result<(StoredAdapter, Exported)> {
    let (of, count) = gated_by(model, adapter)?;
    let name = adapter.method.name();
    if let Some((block, _)) = adapter.blocks().find(|(_, delta)| delta.unit_router().is_none()) {
        return Err(Error::Refused(format!("`{}` is a layer of its own, which no LoRA does", block.site.path)));
    }
    if let FixedGates::Experts(numbers) = gates {
        if of != Gated::Experts {
            return Err(Error::Refused(format!(
                "the gates of `{name}` are those of its ranks, which have no numbers by expert; take their means over rows"
            )));
        }
        if numbers.len() != count {
            return Err(Error::Config(format!("{} gates are given, the adapter has {count} experts", numbers.len())));
        }
        if let Some(number) = numbers.iter().find(|number| !number.is_finite()) {
            return Err(Error::Config(format!("the gate {number} should be a finite number")));
        }
    }
    let find = |site: &Site, base: &Projection, delta: &dyn Delta| {
        let Change::Gated(GatedLowRank { factors, .. }) = delta.change(base, 0, &Step::default())? else {
            return low_rank_of(site, base, delta, None).map(Some);
        };
        let own = match gates {
            FixedGates::Experts(numbers) => numbers,
            FixedGates::Means(means) => {
                let own = means.modules.iter().find(|own| own.name == site.path);
                let none = || Error::Config(format!("there are no means of the gates of `{}`", site.path));
                own.ok_or_else(none)?.mean.as_slice()
            }
        };
        fixed(delta, of, &factors, own).map(|low| low.map(|low| (low, true, 0.0, 0.0)))
    };
    assemble(model, adapter, base_name, find)
}

/// The factors of a gated change with fixed gates, of scaling 1; None where all are 0.
fn fixed(delta: &dyn Delta, of: Gated, factors: &LowRank, gates: &[f64]) -> Result<Option<LowRank>> {
    let dtype = factors.a.dtype();
    let mut gates = Tensor::from_slice(gates, (1, gates.len()), &Device::Cpu)?;
    if of == Gated::Experts {
        gates = delta.route_gates(&gates.to_dtype(dtype)?)?.detach().to_dtype(DType::F64)?;
    }
    let gates = gates.flatten_all()?.to_vec1::<f64>()?;
    let kept: Vec<u32> = (0..gates.len() as u32).filter(|&rank| gates[rank as usize] != 0.0).collect();
    if kept.is_empty() {
        return Ok(None);
    }
    let scales: Vec<f64> = kept.iter().map(|&rank| gates[rank as usize] * factors.scaling).collect();
    let scales = Tensor::from_vec(scales, (kept.len(), 1), &Device::Cpu)?;
    let kept = Tensor::new(kept, &Device::Cpu)?;
    let a = factors.a.detach().index_select(&kept, 0)?.to_dtype(DType::F64)?.broadcast_mul(&scales)?.to_dtype(dtype)?;
    Ok(Some(LowRank { a, b: factors.b.detach().index_select(&kept, 1)?, scaling: 1.0 }))
}

/// The LoRA of what `find` gives of each projection, with the whole parameters that the adapter brings.
fn assemble(
    model: &dyn BaseModel,
    adapter: &Adapter,
    base_name: &str,
    find: impl Fn(&Site, &Projection, &dyn Delta) -> Result<Option<One>> + Sync,
) -> Result<(StoredAdapter, Exported)> {
    let sites = adapter.sites(model);
    let found =
        sites.par_iter().map(|(site, base, delta)| find(site, base, *delta)).collect::<Result<Vec<Option<One>>>>()?;
    let (mut whole, mut error, mut exact, mut largest) = (0.0, 0.0, 0, 0);
    let mut modules = BTreeMap::new();
    for ((site, ..), found) in sites.iter().zip(found) {
        let Some((low, is_exact, squared, wrong)) = found else { continue };
        exact += usize::from(is_exact);
        largest = largest.max(low.a.dim(0)?);
        whole += squared;
        error += wrong;
        modules.insert(site.path.clone(), low);
    }
    if modules.is_empty() && !sites.is_empty() {
        return Err(Error::Config("all gates are 0, which leaves nothing to write".into()));
    }
    let count = modules.len();
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
    Ok((stored, Exported { modules: count, exact, rank: largest, error }))
}
