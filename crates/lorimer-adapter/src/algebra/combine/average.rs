//! Averages for adapters whose ranks act by the token: `dense`, of the changes with every rank acting, and `tensors`, tensor by tensor.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use serde_json::{Map, Value};

use super::entry::{Combination, Kind, Weights};
use super::parents::{Parent, Parents};
use crate::error::{Error, Result};
use crate::file::load::account_of;
use crate::file::store::StoredAdapter;

/// The average of the changes with every rank acting.
pub const DENSE: Combination = Combination {
    name: "dense",
    help: "mean of the changes as plain LoRA, every rank of FlyLoRA and SMoRA taken as acting with α/r: no choice by token is left",
    source: "FlyLoRA, arXiv 2510.08396",
    takes: &["rank"],
    weights: Weights::Mean,
    kind: Kind::GatedSites(super::svd::dense),
};

/// The average of the tensors.
pub const TENSORS: Combination = Combination {
    name: "tensors",
    help: "mean of each stored tensor, frozen, gates and balancing bias included: parents of one method and one start",
    source: "FlyLoRA's script",
    takes: &[],
    weights: Weights::Mean,
    kind: Kind::Tensors,
};

/// Methods whose tensors' mean is an adapter of the same kind.
const AVERAGED: &[&str] = &["lora", "flylora", "smora"];

/// Settings that say how an adapter was trained or found, not what its tensors mean.
fn meaning(config: &Map<String, Value>) -> BTreeMap<&String, &Value> {
    const FREE: &[&str] = &[
        "base_model_name_or_path",
        "inference_mode",
        "lora_dropout",
        "a_seed",
        "bias_u",
        "bias_update_rate",
        "peft_version",
    ];
    config.iter().filter(|(key, value)| !FREE.contains(&key.as_str()) && !value.is_null()).collect()
}

/// Refuses parents whose tensors do not mean the same.
pub(super) fn check(parents: &Parents) -> Result<()> {
    let Some((first, others)) = parents.all.split_first() else { return Ok(()) };
    for parent in &parents.all {
        let (method, account) = account_of(&parent.file.stored)?;
        account.refuse_unknown(method.name())?;
        if !AVERAGED.contains(&method.name()) {
            return Err(Error::Refused(format!(
                "`{}` is of `{}`, whose tensors' mean is no average of what they do; `tensors` is for {}",
                parent.shown(),
                method.name(),
                AVERAGED.join(", ")
            )));
        }
    }
    for other in others {
        let fail = |text: String| {
            Err(Error::Mismatch(format!(
                "`{}` and `{}` cannot be averaged tensor by tensor: {text}",
                first.shown(),
                other.shown()
            )))
        };
        let (a, b) = (meaning(&first.file.stored.config), meaning(&other.file.stored.config));
        if let Some(key) = a.keys().chain(b.keys()).find(|key| a.get(*key) != b.get(*key)) {
            return fail(format!("their adapter_config.json differ in `{key}`"));
        }
        let shape = |s: &StoredAdapter| -> Vec<(String, Vec<usize>)> {
            s.tensors.iter().map(|(name, t)| (name.clone(), t.dims().to_vec())).collect()
        };
        let (a, b) = (shape(&first.file.stored), shape(&other.file.stored));
        if let Some((name, _)) = a.iter().find(|t| !b.contains(t)).or_else(|| b.iter().find(|t| !a.contains(t))) {
            return fail(format!("`{name}` is not in both, or not of one shape"));
        }
    }
    Ok(())
}

/// How alike the parents' A are: of the parent that is least like the first, the mean cosine of its rows with the first's of the same place. Parents of
/// one start have alike A, frozen or trained; of other starts they have nothing in common. None where there is no A, or one parent.
pub(super) fn likeness(parents: &Parents) -> Result<Option<f64>> {
    let Some((first, others)) = parents.all.split_first() else { return Ok(None) };
    let (mut sums, mut rows) = (vec![0.0; others.len()], 0usize);
    for name in first.stored().tensors.keys().filter(|name| name.ends_with(".lora_A.weight")) {
        let unit = |parent: &Parent| -> Result<Tensor> {
            let a = parent.file.tensor(name)?.to_dtype(DType::F64)?;
            let sizes = a.sqr()?.sum_keepdim(1)?.sqrt()?.maximum(f64::MIN_POSITIVE)?;
            Ok(a.broadcast_div(&sizes)?)
        };
        let own = unit(first)?;
        rows += own.dim(0)?;
        for (sum, other) in sums.iter_mut().zip(others) {
            *sum += (&own * unit(other)?)?.sum_all()?.to_scalar::<f64>()?;
        }
    }
    Ok(sums.into_iter().reduce(f64::min).filter(|_| rows > 0).map(|least| least / rows as f64))
}

/// The weighted sum of a tensor over all parents, in the type of the first.
pub(super) fn tensor(parents: &Parents, name: &str) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    let mut dtype = DType::F32;
    for (parent, weight) in parents.all.iter().zip(&parents.weights) {
        let own = parent.file.tensor(name)?;
        let share = (own.to_dtype(DType::F64)? * *weight)?;
        match sum {
            None => (dtype, sum) = (own.dtype(), Some(share)),
            Some(before) => sum = Some((before + share)?),
        }
    }
    let none = || Error::Refused("there is no adapter to average".into());
    Ok(sum.ok_or_else(none)?.to_dtype(dtype)?)
}
