//! One adapter, every tool: PEFT ↔ llama.cpp's GGUF adapter ↔ the safetensors files of kohya's scripts, mlx-lm and diffusers.
//!
//! All hold the same factors; GGUF knows one α for all modules and stores q and k of `llama` models with their rows interleaved, kohya knows
//! one α a module, mlx-lm one scale. Scalings that a format cannot say are folded into B.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::quantized::gguf_file::Value as GgufValue;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use lorimer_model::decoder::config::DecoderConfig;
use lorimer_model::files::{create_folder, write_atomic, write_atomic_with, write_json};
use lorimer_model::weights::SafetensorsFile;
use lorimer_model::weights::gguf::{Gguf, module_to_gguf, row_order};
use serde_json::{Map, Value, json};

use crate::delta::LowRank;
use crate::error::{Error, Result};
use crate::file::bytes::safetensors_bytes;
use crate::file::dialects::{DIFFUSERS, Dialect, Factor, Factors, LLAMA_CPP, MLX, SAFETENSORS, Scale, mlx, peft};
use crate::file::load::account_of;
use crate::file::store::{CONFIG_FILE, StoredAdapter};
use crate::method::refuse_blocks;

/// Where diffusers keeps settings in a file's header.
const DIFFUSERS_NOTE: &str = "lora_adapter_metadata";

/// The low-rank change of every module; an error names the first module or parameter that has more than that.
///
/// # Errors
///
/// Fails if the configuration is of no known method, if a module has more than two low-rank factors, if the file has whole parameters or
/// tensors that the method does not know, or if there is no module.
pub fn low_ranks(stored: &StoredAdapter) -> Result<BTreeMap<String, LowRank>> {
    stored.refuse_mixture("converted")?;
    let (method, account) = account_of(stored)?;
    if method.blocks().is_some() {
        return Err(refuse_blocks(method.as_ref(), "converted"));
    }
    account.refuse_embedding(stored)?;
    account.refuse_unknown(method.name())?;
    let mut all = BTreeMap::new();
    let refused = |module: &str, keys: &str| {
        Error::Refused(format!(
            "`{module}` holds {keys}, which no file of factors alone can say; convert it with --to lora first, or merge it"
        ))
    };
    // A DoRA whose magnitudes are missing is no LoRA either.
    let dora = stored.config.get("use_dora") == Some(&Value::Bool(true));
    for (module, tensors) in account.modules.iter() {
        match method.low_rank(module, tensors)? {
            Some(low) if tensors.len() == 2 && !dora => drop(all.insert(module.clone(), low)),
            _ => return Err(refused(module, &tensors.keys().map(String::as_str).collect::<Vec<_>>().join(", "))),
        }
    }
    if let Some((module, kind)) = account.parameters.iter().find_map(|p| p.path.rsplit_once('.')) {
        return Err(refused(module, kind));
    }
    if let Some((name, _)) = account.beside_modules().next() {
        return Err(refused("the adapter", &name));
    }
    match all.is_empty() {
        true => Err(Error::Refused("the adapter holds no low-rank factors".into())),
        false => Ok(all),
    }
}

/// The configuration of a plain LoRA of PEFT's whose modules have these ranks and scalings, α = scaling·rank.
///
/// # Errors
///
/// Fails if there is no module.
pub fn peft_config(modules: &BTreeMap<String, (usize, f64)>, base: &str) -> Result<Map<String, Value>> {
    let Some(&(rank, scaling)) = modules.values().next() else {
        return Err(Error::Refused("the file holds no low-rank factors".into()));
    };
    let alpha = scaling * rank as f64;
    let (mut ranks, mut alphas) = (Map::new(), Map::new());
    for (module, &(own_rank, own_scaling)) in modules {
        let own_alpha = own_scaling * own_rank as f64;
        let key = module.replace('.', r"\.");
        if own_rank != rank {
            ranks.insert(key.clone(), json!(own_rank));
        }
        if (own_alpha - alpha).abs() > 1e-9 * alpha.abs() {
            alphas.insert(key, json!(own_alpha));
        }
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
    Ok(config)
}

/// A PEFT adapter from factors, each module with its own rank and α = scaling·rank.
///
/// # Errors
///
/// Fails if there is no module.
pub fn to_peft(modules: BTreeMap<String, LowRank>, base: &str) -> Result<StoredAdapter> {
    let mut tensors = BTreeMap::new();
    let mut ranks = BTreeMap::new();
    for (module, low) in modules {
        tensors.insert(peft::tensor_name(&module, "lora_A.weight"), low.a.contiguous()?);
        tensors.insert(peft::tensor_name(&module, "lora_B.weight"), low.b.contiguous()?);
        ranks.insert(module, (low.a.dim(0)?, low.scaling));
    }
    let config = peft_config(&ranks, base)?;
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
    let alphas = modules.values().map(|low| Ok(low.scaling * low.a.dim(0)? as f64)).collect::<Result<Vec<_>>>()?;
    let alpha = first_set(alphas);
    let mut tensors = Vec::new();
    for (module, low) in &modules {
        let name = |factor| {
            LLAMA_CPP.name_of(module, factor, config.architecture()).ok_or_else(|| {
                Error::Refused(format!("`{module}` has no name in llama.cpp's `{}` models", config.architecture()))
            })
        };
        let order = rows_in_file(config, module).map(inverse);
        let b = reorder(&folded(low, alpha)?, order, module)?;
        for (t, name) in [(&low.a, name(Factor::A)?), (&b, name(Factor::B)?)] {
            let t = t.to_dtype(DType::F32)?.contiguous()?;
            tensors.push((name, QTensor::quantize(&t, GgmlDType::F32)?));
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
    let names: Vec<String> = file.content.tensor_infos.keys().cloned().collect();
    let mut modules = BTreeMap::new();
    for (module, Factors { a, b, .. }) in LLAMA_CPP.read(&names, config.architecture(), &load, &fail)? {
        let b = reorder(&b, rows_in_file(config, &module), &module)?;
        let rank = a.dim(0)? as f64;
        modules.insert(module, LowRank { a, b, scaling: alpha / rank });
    }
    Ok(modules)
}

/// The first scale that is not zero, which others can be folded to.
fn first_set(scales: impl IntoIterator<Item = f64>) -> f64 {
    scales.into_iter().find(|scale| *scale != 0.0).unwrap_or(1.0)
}

/// How the file of an architecture orders a module's rows, where that is not the order of the base.
fn rows_in_file(config: &DecoderConfig, module: &str) -> Option<Vec<usize>> {
    let name = module_to_gguf(config.architecture(), module)?;
    row_order(config.architecture(), config.head_counts(), &format!("{name}.weight"))
}

/// B where the file says `alpha` for a module whose own α is another.
fn folded(low: &LowRank, alpha: f64) -> Result<Tensor> {
    let fold = low.scaling * low.a.dim(0)? as f64 / alpha;
    Ok(if (fold - 1.0).abs() > 1e-12 { (&low.b * fold)? } else { low.b.clone() })
}

/// Writes the factors of a low-rank adapter into one safetensors file, as kohya's scripts or diffusers name them.
///
/// # Errors
///
/// Fails if the adapter is more than low-rank factors, if a module has no name in the dialect, or if the file cannot be written.
pub fn write_safetensors(stored: &StoredAdapter, dialect: &Dialect, path: &Path) -> Result<()> {
    let mut tensors = BTreeMap::new();
    for (module, low) in low_ranks(stored)? {
        let name = |factor| {
            let none = || Error::Refused(format!("`{module}` has no name in files of {}", dialect.name));
            dialect.name_of(&module, factor, "").ok_or_else(none)
        };
        let rank = low.a.dim(0)? as f64;
        if dialect.scale == Scale::AlphaTensor {
            let alpha = low.scaling * rank;
            tensors.insert(name(Factor::Alpha)?, Tensor::new(alpha as f32, &Device::Cpu)?);
        }
        let b = if dialect.scale == Scale::InB { folded(&low, rank)? } else { low.b.clone() };
        tensors.insert(name(Factor::A)?, dialect.turned(&low.a)?);
        tensors.insert(name(Factor::B)?, dialect.turned(&b)?);
    }
    write_atomic(path, &safetensors_bytes(&tensors)?)?;
    Ok(())
}

/// Writes a folder for mlx-lm, which has one rank and one scale: smaller ranks are filled up with zeros, other scales are folded into B.
///
/// # Errors
///
/// Fails if the adapter is more than low-rank factors, or if a file cannot be written.
pub fn write_mlx(stored: &StoredAdapter, folder: &Path) -> Result<()> {
    let modules = low_ranks(stored)?;
    let scale = first_set(modules.values().map(|low| low.scaling));
    let ranks = modules.values().map(|low| Ok(low.a.dim(0)?)).collect::<Result<Vec<_>>>()?;
    let rank = ranks.into_iter().max().unwrap_or(0);
    let mut tensors = BTreeMap::new();
    for (module, low) in &modules {
        let own = low.a.dim(0)?;
        let name = |factor| {
            let none = || Error::Refused(format!("`{module}` has no name in files of {}", MLX.name));
            MLX.name_of(module, factor, "").ok_or_else(none)
        };
        let a = low.a.pad_with_zeros(0, 0, rank - own)?;
        let b = folded(low, scale * own as f64)?.pad_with_zeros(1, 0, rank - own)?;
        tensors.insert(name(Factor::A)?, MLX.turned(&a)?);
        tensors.insert(name(Factor::B)?, MLX.turned(&b)?);
    }
    create_folder(folder)?;
    write_atomic(&folder.join(mlx::WEIGHTS_FILE), &safetensors_bytes(&tensors)?)?;
    write_json(&folder.join(CONFIG_FILE), &mlx::config(modules.keys(), rank, scale))?;
    Ok(())
}

/// Reads a safetensors file of factors that is no folder of PEFT's: kohya's, mlx-lm's (with the `adapter_config.json` beside it) or
/// diffusers'.
///
/// # Errors
///
/// Fails if the file cannot be read, holds a tensor without a name in the dialect of the others, or if a module's factors do not belong
/// together.
pub fn read_safetensors(path: &Path) -> Result<BTreeMap<String, LowRank>> {
    let file = SafetensorsFile::open(path)?;
    let fail = |problem: String| -> Error { lorimer_model::Error::invalid(path, problem).into() };
    let names = file.names();
    let known = |dialect: &&&Dialect| names.iter().any(|name| dialect.split(name).is_some_and(|(_, f)| f == Factor::A));
    let Some(dialect) = SAFETENSORS.iter().find(known) else {
        return Err(match names.iter().any(|name| name.starts_with(peft::PREFIX)) {
            true => fail("is part of a folder of PEFT's; give the folder".into()),
            false => fail("holds no factors with names of kohya, mlx-lm or diffusers".into()),
        });
    };
    if dialect.name == DIFFUSERS.name
        && file.metadata.metadata().as_ref().is_some_and(|notes| notes.contains_key(DIFFUSERS_NOTE))
    {
        return Err(fail(format!("has settings of its own in `{DIFFUSERS_NOTE}`, which are not read here")));
    }
    let scale = if dialect.name == MLX.name { Some(mlx::scale(path)?) } else { None };
    let factors = dialect.read(&names, "", &|name| Ok(file.load(name)?), &fail)?;
    let low = |(module, Factors { a, b, alpha })| {
        let rank = a.dim(0)? as f64;
        let scaling = scale.unwrap_or_else(|| alpha.unwrap_or(rank) / rank);
        Ok((module, LowRank { a, b, scaling }))
    };
    factors.into_iter().map(low).collect()
}
