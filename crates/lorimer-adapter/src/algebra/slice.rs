//! A smaller dense model: units of a base are taken out, with adapters merged into it before.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Tensor;
use lorimer_model::base::open_weights;
use lorimer_model::decoder::DecoderConfig;
use lorimer_model::decoder::config::LAYER_KEYS;
use lorimer_model::files::{
    MAX_JSON_BYTES, read_bounded, read_json, remove_folder, text_files, write_atomic, write_folder_atomic, write_json,
};
use lorimer_model::{LayerShape, LoadDtype, Site, Weights};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::folder::{Entry, refuse_own_folder, write_safetensors};
use super::merge::{Merged, merge_to_folder};
use crate::error::{Error, Result};
use crate::file::bytes::raw_bytes;
use crate::file::load::account_of;
use crate::file::store::StoredAdapter;
use crate::methods::loraprune::MASK;
use crate::pruning::origin::BaseIdentity;
use crate::pruning::units::{groups, layer_of, share_of};
use crate::pruning::{KeptLayer, Kind, PRUNING_FILE, Pruning};

/// What slicing gave.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Sliced {
    /// Folder written.
    pub output: String,
    /// Numbers in the base's weights.
    pub whole_parameters: u64,
    /// Numbers in the smaller model's.
    pub parameters: u64,
    /// Share of all key-value heads that is gone.
    pub heads_pruned: f64,
    /// Share of all channels that is gone.
    pub channels_pruned: f64,
    /// Whether all layers are alike, so that transformers' configuration holds them.
    pub uniform: bool,
    /// What merging gave, where adapters were merged.
    pub merged: Option<Merged>,
}

/// Shares of key-value heads and channels that a choice takes out of some layers.
fn shares(whole: &[LayerShape], kept: &[KeptLayer]) -> (f64, f64) {
    let share = |kept: usize, all: usize| 1.0 - kept as f64 / all.max(1) as f64;
    (
        share(kept.iter().map(|k| k.kv_heads.len()).sum(), whole.iter().map(|w| w.kv_heads).sum()),
        share(kept.iter().map(|k| k.channels.len()).sum(), whole.iter().map(|w| w.inner).sum()),
    )
}

/// The numbers of `config.json` for layers of other shapes: plain ones where all are alike, `layer_shapes` otherwise.
fn reshaped(mut json: Value, layers: &[LayerShape]) -> Value {
    let Some(map) = json.as_object_mut() else { return json };
    let numbers = |l: &LayerShape| LAYER_KEYS.into_iter().zip([l.heads, l.kv_heads, l.inner]);
    let first = layers[0];
    map.insert("head_dim".into(), first.head_dim.into());
    map.shift_remove("layer_shapes");
    numbers(&first).for_each(|(key, n)| drop(map.insert(key.into(), n.into())));
    if layers.iter().any(|l| *l != first) {
        let of = |l| numbers(l).map(|(key, n)| (key.to_string(), json!(n))).collect::<Map<_, _>>();
        map.insert("layer_shapes".into(), layers.iter().map(of).collect());
    }
    json
}

/// The module's site, where a tensor is one of its weight or bias.
fn site_of<'s>(name: &str, sites: &'s BTreeMap<&str, &Site>) -> Option<&'s Site> {
    let module = name.strip_suffix(".weight").or(name.strip_suffix(".bias"))?;
    sites.get(module).copied()
}

/// Writes the smaller model of a folder of safetensors into the folder `output`, which exists.
fn write_sliced(weights: &Weights, config: &DecoderConfig, pruning: &Pruning, output: &Path) -> Result<()> {
    let Some(shards) = weights.shards() else {
        return Err(Error::Refused("units are taken out of safetensors".into()));
    };
    let (whole, all) = (pruning.layers(), pruning.sites());
    let sites: BTreeMap<&str, &Site> = all.iter().map(|site| (site.path.as_str(), site)).collect();
    let mut index = BTreeMap::new();
    for shard in shards {
        let file = shard.path.file_name().unwrap_or_default();
        let mut entries = Vec::new();
        for name in shard.names() {
            let Some((dtype, mut shape, bytes)) = shard.tensor(&name)? else { continue };
            index.insert(name.clone(), file.to_string_lossy().into_owned());
            let cut = site_of(&name, &sites).and_then(|site| {
                let (kept, whole) = (layer_of(site, &pruning.kept)?, layer_of(site, &whole)?);
                let (axis, rows) = kept.index(&site.role, whole)?;
                (axis.dim() < shape.len()).then_some((site, kept, whole, axis.dim(), rows.len()))
            });
            let bytes: Box<dyn FnOnce() -> Result<Vec<u8>> + '_> = match cut {
                None => Box::new(move || Ok(bytes.to_vec())),
                Some((site, kept, whole, dim, count)) => {
                    let expected = if shape.len() == 2 { vec![site.outputs, site.inputs] } else { vec![site.outputs] };
                    if shape != expected {
                        return Err(Error::Mismatch(format!("`{name}` has shape {shape:?}, not {expected:?}")));
                    }
                    shape[dim] = count;
                    let name = name.clone();
                    Box::new(move || {
                        let missing = || Error::Mismatch(format!("`{name}` is missing"));
                        raw_bytes(&kept.gather(&shard.load(&name)?.ok_or_else(missing)?, &site.role, whole)?)
                    })
                }
            };
            entries.push(Entry { name, dtype, shape, bytes });
        }
        write_safetensors(&output.join(file), entries)?;
    }
    if shards.len() > 1 {
        write_json(&output.join("model.safetensors.index.json"), &json!({ "metadata": {}, "weight_map": index }))?;
    }
    let folder = weights.origin();
    for name in text_files(folder)? {
        write_atomic(&output.join(&name), &read_bounded(&folder.join(&name), MAX_JSON_BYTES)?)?;
    }
    write_json(&output.join(PRUNING_FILE), pruning)?;
    let json = read_json::<Value>(&folder.join("config.json"), MAX_JSON_BYTES)?;
    let smaller = DecoderConfig { layers: pruning.kept_layers(), ..config.clone() };
    write_json(&output.join("config.json"), &reshaped(json, &smaller.layers))?;
    Ok(())
}

/// Writes the smaller dense model of a base into a new folder: `adapters` are merged into it, then its units are taken out, with
/// `pruning.json` beside. `dtype` is for a GGUF base, which is expanded.
///
/// # Errors
///
/// Fails if `output` exists, if the record is not of this base, if an adapter cannot be merged, or if a file cannot be read or written.
pub fn slice_to_folder(
    base: &Path,
    adapters: &[(StoredAdapter, f64)],
    pruning: &Pruning,
    (output, dtype): (&Path, LoadDtype),
    progress: impl FnMut(&str),
) -> Result<Sliced> {
    refuse_own_folder(base, output)?;
    if output.exists() {
        return Err(Error::Refused(format!("`{}` exists; choose another --output", output.display())));
    }
    let (config, weights) = open_weights(base, LoadDtype::F32)?;
    let config = config.decoder("taking units out")?.clone();
    if pruning.layers() != config.layers || pruning.base.fingerprint != weights.fingerprint()? {
        return Err(Error::Mismatch(format!("the choice of units is not of `{}`", base.display())));
    }
    let (mut merged, mut failed) = (None, None);
    let whole_parameters = config.parameter_count();
    let fill = |folder: &Path| -> Result<()> {
        if adapters.is_empty() && weights.shards().is_some() {
            return write_sliced(&weights, &config, pruning, folder);
        }
        // The whole merged model lies beside for as long as it is cut.
        let whole = folder.join("whole");
        let found = merge_to_folder(base, adapters, &whole, dtype, progress)?;
        merged = (!adapters.is_empty()).then_some(found);
        let (config, weights) = open_weights(&whole, LoadDtype::F32)?;
        write_sliced(&weights, config.decoder("taking units out")?, pruning, folder)?;
        drop(weights);
        Ok(remove_folder(&whole)?)
    };
    let done = |folder: &Path| {
        fill(folder).map_err(|error| {
            failed = Some(error);
            lorimer_model::Error::Unsupported("slice".into())
        })
    };
    let written = write_folder_atomic(output, done);
    if let Some(error) = failed {
        return Err(error);
    }
    written?;
    let (config, weights) = open_weights(output, LoadDtype::F32)?;
    let config = config.decoder("a smaller model")?;
    drop(weights);
    let (heads_pruned, channels_pruned) = shares(&pruning.layers(), &pruning.kept);
    Ok(Sliced {
        output: output.display().to_string(),
        whole_parameters,
        parameters: config.parameter_count(),
        heads_pruned,
        channels_pruned,
        uniform: config.layers.windows(2).all(|w| w[0] == w[1]),
        merged,
    })
}

/// The units that the masks of a LoRAPrune adapter keep.
///
/// # Errors
///
/// Fails if the adapter has no masks, or if they keep parts of units, or other units of one module than of another.
pub fn kept_by_masks(stored: &StoredAdapter, config: &DecoderConfig) -> Result<Vec<KeptLayer>> {
    let (_, account) = account_of(stored)?;
    let fail = |text: String| Error::Mismatch(format!("`{}`: {text}", stored.path.display()));
    let mut kept: Vec<KeptLayer> = config.layers.iter().map(KeptLayer::whole).collect();
    let mut seen: BTreeMap<(usize, bool), Vec<bool>> = BTreeMap::new();
    for site in config.sites() {
        let Some(mask) = account.modules.get(&site.path).and_then(|tensors| tensors.get(MASK)) else { continue };
        let Some((shape, layer)) = layer_of(&site, &config.layers).zip(site.layer) else { continue };
        let Some((_, attention, unit)) = groups(&site.role, shape) else { continue };
        let mask: Vec<f32> = mask.to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1()?;
        let units = if attention { shape.kv_heads } else { shape.inner };
        let mut own: Vec<Option<bool>> = vec![None; units];
        if mask.len() != unit.len() {
            return Err(fail(format!("the mask of `{}` has {} numbers, not {}", site.path, mask.len(), unit.len())));
        }
        for (unit, value) in unit.into_iter().zip(mask) {
            if own[unit].is_some_and(|before| before != (value != 0.0)) {
                return Err(fail(format!("the mask of `{}` keeps a part of a head or channel", site.path)));
            }
            own[unit] = Some(value != 0.0);
        }
        let own: Vec<bool> = own.into_iter().map(|kept| kept.unwrap_or(true)).collect();
        let first = seen.entry((layer, attention)).or_insert_with(|| own.clone());
        if *first != own {
            return Err(fail(format!("the mask of `{}` keeps other units than its layer's others", site.path)));
        }
    }
    if seen.is_empty() {
        return Err(fail("has no masks, which --slice goes by; they come from --method loraprune".into()));
    }
    for ((layer, attention), units) in seen {
        let list = |kept: Vec<bool>| (0..kept.len()).filter(|i| kept[*i]).collect::<Vec<_>>();
        let before = std::mem::take(&mut kept[layer]);
        kept[layer] = match attention {
            true => KeptLayer::of_groups(&config.layers[layer], list(units), before.channels),
            false => KeptLayer { channels: list(units), ..before },
        };
    }
    Ok(kept)
}

/// How many units of a layer a share takes out: ⌊ρ · key-value heads⌋ and ⌈ρ · channels⌉, as LoRAM has it.
pub fn pruned_counts(layer: &LayerShape, ratio: f64) -> (usize, usize) {
    (share_of(ratio, layer.kv_heads, false), share_of(ratio, layer.inner, true))
}

/// Shapes that a share leaves of a model's layers, the first and last ones whole.
///
/// # Errors
///
/// Fails if the share is none, or if nothing would be pruned or left.
pub fn pruned_shapes(layers: &[LayerShape], ratio: f64, (first, last): (usize, usize)) -> Result<Vec<LayerShape>> {
    if !(0.0..1.0).contains(&ratio) {
        return Err(Error::Config(format!("--ratio {ratio} should be at least 0 and below 1")));
    }
    if first.saturating_add(last) >= layers.len() {
        return Err(Error::Config(format!(
            "--keep-first {first} and --keep-last {last} leave none of the base's {} layers to prune",
            layers.len()
        )));
    }
    let of = |(i, layer): (usize, &LayerShape)| {
        if i < first || i + last >= layers.len() {
            return Ok(*layer);
        }
        let (heads, channels) = pruned_counts(layer, ratio);
        let (kv_heads, inner) = (layer.kv_heads - heads, layer.inner - channels.min(layer.inner));
        if inner == 0 || kv_heads == 0 {
            return Err(Error::Config(format!("--ratio {ratio} leaves nothing of layer {i}; take a smaller one")));
        }
        Ok(LayerShape { heads: kv_heads * (layer.heads / layer.kv_heads), kv_heads, inner, ..*layer })
    };
    layers.iter().enumerate().map(of).collect()
}

/// The units of each layer that are kept: the most important ones of those shapes. `importance` gives each layer's of key-value heads and of channels;
/// the least goes, of equals the first.
///
/// # Errors
///
/// Fails if `importance` does.
pub fn keep_important(
    layers: &[LayerShape],
    shapes: &[LayerShape],
    importance: impl Fn(usize) -> Result<(Vec<f64>, Vec<f64>)>,
) -> Result<Vec<KeptLayer>> {
    let most = |importance: &[f64], count: usize| {
        let mut order: Vec<usize> = (0..importance.len()).collect();
        order.sort_by(|&i, &j| importance[i].total_cmp(&importance[j]));
        let mut kept = order.split_off(importance.len() - count.min(importance.len()));
        kept.sort_unstable();
        kept
    };
    let of = |(i, (layer, shape)): (usize, (&LayerShape, &LayerShape))| {
        if layer == shape {
            return Ok(KeptLayer::whole(layer));
        }
        let (heads, channels) = importance(i)?;
        Ok(KeptLayer::of_groups(layer, most(&heads, shape.kv_heads), most(&channels, shape.inner)))
    };
    layers.iter().zip(shapes).enumerate().map(of).collect()
}

/// The importance of a layer's key-value heads or channels by a weight and its gradient (outputs, inputs): Σ |W ⊙ G| over each unit's rows or columns of
/// a projection (LLM-Pruner's first-order form; its sums over the projections of a unit are the caller's).
///
/// # Errors
///
/// Fails if a tensor operation fails.
pub fn salience(
    site: &Site,
    layer: &LayerShape,
    weight: &Tensor,
    gradient: &Tensor,
) -> Result<Option<(Kind, Vec<f64>)>> {
    let Some((axis, attention, unit)) = groups(&site.role, layer) else { return Ok(None) };
    let dim = 1 - axis.dim();
    let sums: Vec<f64> = (weight * gradient)?.abs()?.sum(dim)?.to_dtype(candle_core::DType::F64)?.to_vec1()?;
    let (kind, units) = if attention { (Kind::KvHead, layer.kv_heads) } else { (Kind::Channel, layer.inner) };
    let mut found = vec![0.0; units];
    sums.into_iter().zip(unit).for_each(|(value, unit)| found[unit] += value);
    Ok(Some((kind, found)))
}

/// What stands for a base in a record.
///
/// # Errors
///
/// Fails if the weights cannot be read.
pub fn identity_of(config: &DecoderConfig, weights: &Weights, name: &str) -> Result<BaseIdentity> {
    Ok(BaseIdentity {
        name: name.to_string(),
        fingerprint: weights.fingerprint()?,
        model_type: config.model_type.clone(),
        pruned: None,
    })
}
