//! One adapter, every tool: PEFT ↔ llama.cpp's GGUF adapter ↔ kohya-style keys.
//!
//! All three hold the same factors; GGUF knows one α for all modules and stores q and k of `llama` models with
//! their rows interleaved, kohya knows one α a module. Scalings that a format cannot say are folded into B.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::quantized::gguf_file::Value as GgufValue;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use lorimer_model::decoder::config::DecoderConfig;
use lorimer_model::files::write_atomic_with;
use lorimer_model::weights::SafetensorsFile;
use lorimer_model::weights::gguf::{Gguf, module_from_gguf, module_to_gguf, row_order};
use serde_json::{Map, Value, json};

use crate::block::refuse;
use crate::delta::LowRank;
use crate::error::{Error, Result};
use crate::file::bytes::safetensors_bytes;
use crate::file::store::PREFIX;
use crate::file::store::StoredAdapter;

/// The low-rank change of every module; an error names the first module that has more than that.
///
/// # Errors
///
/// Fails if the configuration is of no known method, if a module has more than two low-rank factors, or if there is no module.
pub fn low_ranks(stored: &StoredAdapter) -> Result<BTreeMap<String, LowRank>> {
    stored.refuse_mixture("converted")?;
    let method = crate::methods::from_adapter_config(&stored.config)?;
    if method.blocks().is_some() {
        return Err(refuse(method.name(), "converted"));
    }
    let mut all = BTreeMap::new();
    for (module, tensors) in stored.modules() {
        match method.low_rank(&module, &tensors)? {
            Some(low) if tensors.len() == 2 => {
                all.insert(module, low);
            }
            _ => {
                let keys: Vec<_> = tensors.keys().map(String::as_str).collect();
                return Err(Error::Refused(format!(
                    "`{module}` holds {}, which neither GGUF adapters nor kohya files can say; convert it with --to lora first, or merge it",
                    keys.join(", ")
                )));
            }
        }
    }
    match all.is_empty() {
        true => Err(Error::Refused("the adapter holds no low-rank factors".into())),
        false => Ok(all),
    }
}

/// A PEFT adapter from factors, each module with its own rank and α = scaling·rank.
///
/// # Errors
///
/// Fails if there is no module.
pub fn to_peft(modules: BTreeMap<String, LowRank>, base: &str) -> Result<StoredAdapter> {
    let Some(first) = modules.values().next() else {
        return Err(Error::Refused("the file holds no low-rank factors".into()));
    };
    let (rank, alpha) = (first.a.dim(0)?, first.scaling * first.a.dim(0)? as f64);
    let (mut ranks, mut alphas, mut tensors) = (Map::new(), Map::new(), BTreeMap::new());
    for (module, low) in &modules {
        let own_rank = low.a.dim(0)?;
        let own_alpha = low.scaling * own_rank as f64;
        let key = module.replace('.', r"\.");
        if own_rank != rank {
            ranks.insert(key.clone(), json!(own_rank));
        }
        if (own_alpha - alpha).abs() > 1e-9 * alpha.abs() {
            alphas.insert(key, json!(own_alpha));
        }
        tensors.insert(format!("{PREFIX}{module}.lora_A.weight"), low.a.contiguous()?);
        tensors.insert(format!("{PREFIX}{module}.lora_B.weight"), low.b.contiguous()?);
    }
    let config = json!({
        "r": rank, "lora_alpha": alpha, "rank_pattern": ranks, "alpha_pattern": alphas,
        "target_modules": modules.keys().collect::<Vec<_>>(),
    });
    let method = match &config {
        Value::Object(map) => crate::methods::build("lora", map)?,
        _ => return Err(Error::Config("the configuration is no object".into())),
    };
    let mut config = method.stored_config();
    config.insert("base_model_name_or_path".into(), base.into());
    Ok(StoredAdapter { path: "converted".into(), config, tensors, manifest: None, parts: Vec::new() })
}

fn reorder(t: &Tensor, order: Option<Vec<usize>>, module: &str) -> Result<Tensor> {
    let Some(order) = order else { return Ok(t.clone()) };
    if order.len() != t.dim(0)? {
        return Err(Error::Mismatch(format!("`{module}` has {} outputs, the base has {}", t.dim(0)?, order.len())));
    }
    let order: Vec<u32> = order.into_iter().map(|i| i as u32).collect();
    Ok(t.index_select(&Tensor::new(order, &Device::Cpu)?, 0)?)
}

fn inverse(order: Vec<usize>) -> Vec<usize> {
    let mut inverse = vec![0; order.len()];
    order.into_iter().enumerate().for_each(|(i, row)| inverse[row] = i);
    inverse
}

/// Writes a llama.cpp adapter; the base's configuration says how q and k are laid out.
///
/// # Errors
///
/// Fails if the adapter is more than low-rank factors, if a module has no name in llama.cpp or does not fit the base, or if the file cannot
/// be written.
pub fn write_gguf(stored: &StoredAdapter, config: &DecoderConfig, path: &Path) -> Result<()> {
    let modules = low_ranks(stored)?;
    let alpha = modules.values().next().map_or(1.0, |l| l.scaling * l.a.dim(0).unwrap_or(1) as f64);
    let mut tensors = Vec::new();
    for (module, low) in &modules {
        let name = module_to_gguf(config.architecture(), module).ok_or_else(|| {
            Error::Refused(format!("`{module}` has no name in llama.cpp's `{}` models", config.architecture()))
        })?;
        let fold = low.scaling * low.a.dim(0)? as f64 / alpha;
        let order = row_order(config.architecture(), config.head_counts(), &format!("{name}.weight")).map(inverse);
        let b = reorder(&low.b, order, module)?;
        let b = if (fold - 1.0).abs() > 1e-12 { (b * fold)? } else { b };
        for (t, end) in [(&low.a, "lora_a"), (&b, "lora_b")] {
            let t = t.to_dtype(DType::F32)?.contiguous()?;
            tensors.push((format!("{name}.weight.{end}"), QTensor::quantize(&t, GgmlDType::F32)?));
        }
    }
    let text = |s: &str| GgufValue::String(s.to_string());
    let metadata = [
        ("general.architecture", text(config.architecture())),
        ("general.type", text("adapter")),
        ("general.name", text("lorimer adapter")),
        ("adapter.type", text("lora")),
        ("adapter.lora.alpha", GgufValue::F32(alpha as f32)),
    ];
    let metadata: Vec<_> = metadata.iter().map(|(k, v)| (*k, v)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    write_atomic_with(path, |file| {
        let mut out = std::io::BufWriter::new(&mut *file);
        candle_core::quantized::gguf_file::write(&mut out, &metadata, &tensors)?;
        std::io::Write::flush(&mut out).map_err(lorimer_model::Error::io("write", path))
    })?;
    Ok(())
}

/// Reads a llama.cpp adapter.
///
/// # Errors
///
/// Fails if the file cannot be read, is no GGUF LoRA adapter, is damaged, or is for another architecture than the base's.
pub fn read_gguf(path: &Path, config: &DecoderConfig) -> Result<BTreeMap<String, LowRank>> {
    let file = Gguf::open(path)?;
    let fail = |problem: String| -> Error { lorimer_model::Error::invalid(path, problem).into() };
    if file.text("general.type") != Some("adapter") || file.text("adapter.type") != Some("lora") {
        return Err(fail("is no GGUF LoRA adapter (general.type, adapter.type)".into()));
    }
    if file.architecture() != config.architecture() {
        return Err(fail(format!("is for `{}` models, the base is `{}`", file.architecture(), config.architecture())));
    }
    let alpha = file
        .number("adapter.lora.alpha")
        .filter(|a| a.is_finite())
        .ok_or_else(|| fail("has no adapter.lora.alpha".into()))?;
    let load = |name: &str| -> Result<Option<Tensor>> {
        let Some((dtype, dims, bytes)) = file.tensor(name)? else { return Ok(None) };
        if dims.len() != 2 {
            return Err(fail(format!("tensor `{name}` should be a matrix, found {dims:?}")));
        }
        let t = candle_core::quantized::ggml_file::qtensor_from_ggml(dtype, bytes, dims, &Device::Cpu)?;
        Ok(Some(t.dequantize(&Device::Cpu)?))
    };
    let mut modules = BTreeMap::new();
    for name in file.content.tensor_infos.keys() {
        let Some(stem) = name.strip_suffix(".weight.lora_a") else {
            if name.ends_with(".weight.lora_b") {
                continue;
            }
            return Err(fail(format!("tensor `{name}` is no part of a LoRA")));
        };
        let module = module_from_gguf(config.architecture(), stem)
            .ok_or_else(|| fail(format!("tensor `{name}` belongs to no known module")))?;
        let (Some(a), Some(b)) = (load(name)?, load(&format!("{stem}.weight.lora_b"))?) else {
            return Err(fail(format!("`{stem}` lacks lora_b")));
        };
        let rank = a.dim(0)?;
        if rank == 0 || b.dim(1)? != rank {
            return Err(fail(format!(
                "`{stem}`: lora_a {:?} and lora_b {:?} have no rank in common",
                a.dims(),
                b.dims()
            )));
        }
        let b =
            reorder(&b, row_order(config.architecture(), config.head_counts(), &format!("{stem}.weight")), &module)?;
        modules.insert(module, LowRank { a, b, scaling: alpha / rank as f64 });
    }
    Ok(modules)
}

/// Module names with dots as underscores, behind this.
const KOHYA_PREFIX: &str = "lora_te_";

/// Writes kohya-style keys: `lora_te_<module>.lora_down.weight`, `.lora_up.weight`, `.alpha`.
///
/// # Errors
///
/// Fails if the adapter is more than low-rank factors, if a module has no kohya-style name, or if the file cannot be written.
pub fn write_kohya(stored: &StoredAdapter, path: &Path) -> Result<()> {
    let mut tensors = BTreeMap::new();
    for (module, low) in low_ranks(stored)? {
        let name = format!("{KOHYA_PREFIX}{}", module.replace('.', "_"));
        if from_kohya_name(&name).as_deref() != Some(&module) {
            return Err(Error::Refused(format!("`{module}` cannot be told apart in kohya's names")));
        }
        let alpha = low.scaling * low.a.dim(0)? as f64;
        tensors.insert(format!("{name}.alpha"), Tensor::new(alpha as f32, &Device::Cpu)?);
        tensors.insert(format!("{name}.lora_down.weight"), low.a);
        tensors.insert(format!("{name}.lora_up.weight"), low.b);
    }
    let bytes = safetensors_bytes(&tensors)?;
    lorimer_model::files::write_atomic(path, &bytes)?;
    Ok(())
}

/// `lora_te_model_layers_3_self_attn_q_proj` → `model.layers.3.self_attn.q_proj`.
fn from_kohya_name(name: &str) -> Option<String> {
    let prefixes = [KOHYA_PREFIX, "lora_te1_", "lora_te2_", "lora_te3_", "lora_unet_", "lora_"];
    let rest = prefixes.iter().find_map(|p| name.strip_prefix(p))?;
    if rest == "lm_head" {
        return Some("lm_head".into());
    }
    let rest = rest.strip_prefix("model_").unwrap_or(rest).strip_prefix("layers_")?;
    let (layer, rest) = rest.split_once('_')?;
    let layer: usize = layer.parse().ok()?;
    let (block, role) = match rest.strip_prefix("self_attn_") {
        Some(role) => ("self_attn", role),
        None => ("mlp", rest.strip_prefix("mlp_")?),
    };
    let known =
        ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"];
    known.contains(&role).then(|| format!("model.layers.{layer}.{block}.{role}"))
}

/// Reads kohya-style keys of a language model.
///
/// # Errors
///
/// Fails if the file cannot be read, holds a tensor without a kohya-style name, or a module's factors do not belong together.
pub fn read_kohya(path: &Path) -> Result<BTreeMap<String, LowRank>> {
    let file = SafetensorsFile::open(path)?;
    let fail = |problem: String| -> Error { lorimer_model::Error::invalid(path, problem).into() };
    let names = file.names();
    let mut modules = BTreeMap::new();
    for name in &names {
        let Some(stem) = name.strip_suffix(".lora_down.weight") else {
            if name.ends_with(".lora_up.weight") || name.ends_with(".alpha") {
                continue;
            }
            return Err(fail(format!(
                "tensor `{}` has no kohya-style name",
                name.chars().take(80).collect::<String>()
            )));
        };
        let module =
            from_kohya_name(stem).ok_or_else(|| fail(format!("`{stem}` is no module of a Llama-family model")))?;
        let (Some(a), Some(b)) = (file.load(name)?, file.load(&format!("{stem}.lora_up.weight"))?) else {
            return Err(fail(format!("`{stem}` lacks lora_up")));
        };
        if a.dims().len() != 2 || b.dims().len() != 2 || a.dim(0)? == 0 || a.dim(0)? != b.dim(1)? {
            return Err(fail(format!(
                "`{stem}`: lora_down {:?} and lora_up {:?} have no rank in common",
                a.dims(),
                b.dims()
            )));
        }
        let rank = a.dim(0)? as f64;
        let alpha = match file.load(&format!("{stem}.alpha"))? {
            Some(t) if t.elem_count() == 1 => t.flatten_all()?.to_dtype(DType::F64)?.get(0)?.to_scalar::<f64>()?,
            Some(t) => return Err(fail(format!("`{stem}.alpha` should be one number, found {:?}", t.dims()))),
            None => rank,
        };
        modules.insert(module, LowRank { a, b, scaling: alpha / rank });
    }
    Ok(modules)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kohya_names_of_every_projection_go_both_ways() {
        for role in ["self_attn.q_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.gate_proj", "mlp.down_proj"] {
            let module = format!("model.layers.11.{role}");
            let name = format!("{KOHYA_PREFIX}{}", module.replace('.', "_"));
            assert_eq!(from_kohya_name(&name).as_deref(), Some(module.as_str()));
        }
        assert_eq!(from_kohya_name("lora_te_text_model_encoder_layers_0_self_attn_q_proj"), None);
    }
}
