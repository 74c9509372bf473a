//! A LoRA's first ranks as a LoRA of its own, byte for byte (DyLoRA, arXiv 2210.07558: every rank of one training is an adapter).

use std::collections::BTreeMap;

use candle_core::Tensor;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::file::dialects::peft;
use crate::file::load::account_of;
use crate::file::store::StoredAdapter;
use crate::method::Method;

/// LoRA's keys of a module's factors.
const A: &str = "lora_A.weight";
const B: &str = "lora_B.weight";

/// A plain LoRA's method, and the rank of every module with A and B.
fn ranks(stored: &StoredAdapter) -> Result<(Box<dyn Method>, BTreeMap<String, usize>)> {
    let plain = stored.config.get("peft_type").and_then(Value::as_str) == Some("LORA")
        && stored.config.get("use_dora").and_then(Value::as_bool) != Some(true);
    let no_lora = || {
        Error::Refused(format!(
            "`{}` is no plain LoRA, whose first ranks could be taken; `lorimer convert --to lora --rank k` gives the nearest of a rank",
            stored.path.display()
        ))
    };
    if !plain {
        return Err(no_lora());
    }
    let (method, account) = account_of(stored)?;
    account.refuse_embedding(stored)?;
    account.refuse_unknown(method.name())?;
    let of = |(module, tensors): (&String, &BTreeMap<String, Tensor>)| {
        Some((module.clone(), tensors.get(A)?.dims().first().copied()?))
    };
    let ranks: BTreeMap<String, usize> = account.modules.iter().filter_map(of).collect();
    if ranks.is_empty() { Err(no_lora()) } else { Ok((method, ranks)) }
}

/// The largest rank of a module.
///
/// # Errors
///
/// Fails if the adapter is no plain LoRA.
pub fn largest_rank(stored: &StoredAdapter) -> Result<usize> {
    Ok(ranks(stored)?.1.into_values().max().unwrap_or(0))
}

/// The first `rank` rows of every A and columns of every B; modules with fewer stay. α shrinks with the rank, so that what is left is
/// what it was, except where the adapter was trained with α/b at rank b (`dylora` with `scaling` = `rank`).
///
/// # Errors
///
/// Fails if the adapter is no plain LoRA, or if `rank` is 0 or larger than the adapter's.
pub fn resize(stored: &StoredAdapter, rank: usize) -> Result<StoredAdapter> {
    let (method, ranks) = ranks(stored)?;
    let most = ranks.values().copied().max().unwrap_or(0);
    if rank == 0 || rank > most {
        return Err(Error::Config(format!("--rank {rank} should be between 1 and the adapter's {most}")));
    }
    let mut tensors = stored.tensors.clone();
    for module in ranks.keys() {
        for (key, axis) in [(A, 0), (B, 1)] {
            let name = peft::tensor_name(module, key);
            let Some(t) = stored.tensors.get(&name) else { continue };
            if t.dims().len() != 2 {
                return Err(Error::Mismatch(format!("tensor `{name}` should be a matrix")));
            }
            let keep = rank.min(t.dim(axis)?);
            tensors.insert(name, t.narrow(axis, 0, keep)?.contiguous()?);
        }
    }
    let setting = |m: &crate::Manifest| m.training.pointer("/method_settings/scaling").cloned();
    let every_rank = stored.manifest.as_ref().and_then(setting).is_some_and(|scaling| scaling == "rank");
    let number = |key: &str, default: f64| stored.config.get(key).and_then(Value::as_f64).unwrap_or(default);
    let (r, alpha) = (number("r", 8.0), number("lora_alpha", 16.0));
    let root = stored.config.get("use_rslora").and_then(Value::as_bool).unwrap_or(false);
    let shrunk = |alpha: f64, from: f64, to: f64| match (every_rank, root) {
        (true, _) => alpha,
        (false, true) => alpha * (to / from).sqrt(),
        (false, false) => alpha * to / from,
    };
    let (mut rank_pattern, mut alpha_pattern) = (Map::new(), Map::new());
    let main = shrunk(alpha, r, rank as f64);
    for (module, own) in &ranks {
        let keep = rank.min(*own);
        let site = method.low_rank_alpha(module)?.unwrap_or(alpha);
        let own_alpha = shrunk(site, *own as f64, keep as f64);
        if keep != rank {
            rank_pattern.insert(module.clone(), json!(keep));
        }
        if (own_alpha - main).abs() > 1e-12 * main.abs() {
            alpha_pattern.insert(module.clone(), json!(own_alpha));
        }
    }
    let mut config = stored.config.clone();
    config.insert("r".into(), json!(rank));
    config.insert("lora_alpha".into(), if main.fract() == 0.0 { json!(main as i64) } else { json!(main) });
    config.insert("rank_pattern".into(), Value::Object(rank_pattern));
    config.insert("alpha_pattern".into(), Value::Object(alpha_pattern));
    Ok(StoredAdapter { path: stored.path.clone(), config, tensors, manifest: None, parts: Vec::new() })
}
