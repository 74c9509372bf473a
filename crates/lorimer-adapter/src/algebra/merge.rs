//! Merging adapters into a base's weights, tensor by tensor, so that memory stays at a few tensors.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io::Write;
use std::path::Path;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use lorimer_model::base::open_weights;
use lorimer_model::decoder::EMBEDDING;
use lorimer_model::files::{create_folder, write_atomic_with};
use lorimer_model::weights::SafetensorsFile;
use lorimer_model::weights::gguf::{Gguf, module_to_gguf};
use lorimer_model::{Config, LoadDtype, Projection, Site, Weights};
use serde::Serialize;

use crate::adapter::{equal, replaced_by};
use crate::algebra::folder::{
    Entry, refuse_own_folder, write_companions, write_index, write_safetensors, write_sharded,
};
use crate::attached::refuse_sum;
use crate::delta::Delta;
use crate::error::{Error, Result};
use crate::file::account::{BaseNames, WholeParameter};
use crate::file::bytes::raw_bytes;
use crate::file::frozen::FrozenParts;
use crate::file::load::{account_of, offer};
use crate::file::store::StoredAdapter;
use crate::method::{Method, ModuleTensors, ParameterSource, refuse_blocks};
use crate::pruning::check_record;
use crate::settings::check_targets;
use crate::targets::Matcher;

/// What a merge gave.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Merged {
    /// Folder or file written.
    pub output: String,
    /// Type of the merged tensors: `f32`, `bf16`, `Q4_1` …; several are joined by `+`.
    pub dtype: String,
    /// Number of tensors that changed.
    pub merged_tensors: usize,
    /// ‖stored − exact‖ / ‖exact‖ over the merged tensors, from rounding to `dtype`.
    pub error: f64,
    /// ‖stored − exact‖ / ‖exact − base‖: the share of the tuning that rounding blurs.
    pub error_of_change: f64,
}

/// Tensors of an adapter by module and key.
type Modules = BTreeMap<String, BTreeMap<String, Tensor>>;

/// One adapter of a merge.
struct Part {
    method: Box<dyn Method>,
    modules: Modules,
    weight: f64,
    frozen: BTreeMap<String, FrozenParts>,
}

/// Adapters grouped by module, ready to be merged into one tensor after another.
struct Plan<'a> {
    weights: &'a Weights,
    /// Whether the head is the embedding.
    tied: bool,
    adapters: Vec<Part>,
    /// Whole parameters by on-disk name, each with the place of the adapter that brings it.
    parameters: BTreeMap<String, (usize, Tensor)>,
}

impl<'a> Plan<'a> {
    fn new(adapters: &[(StoredAdapter, f64)], config: &Config, weights: &'a Weights) -> Result<Self> {
        let mut parameters: HashSet<String> = weights.names().into_iter().collect();
        if config.tied() {
            parameters.insert("lm_head.weight".into());
        }
        let shape = config.shape();
        let base = BaseNames { model_type: shape.model_type, sites: config.sites(), parameters, layers: shape.layers };
        let mut plan = Self { weights, tied: config.tied(), adapters: Vec::new(), parameters: BTreeMap::new() };
        for (stored, weight) in adapters {
            plan.add((stored, *weight), adapters.len(), &base)?;
        }
        Ok(plan)
    }

    /// Adds one of `count` adapters.
    fn add(&mut self, (stored, weight): (&StoredAdapter, f64), count: usize, base: &BaseNames) -> Result<()> {
        stored.refuse_mixture("merged")?;
        check_record(stored, self.weights.origin(), &base.layers)?;
        let (mut method, mut account) = account_of(stored)?;
        if method.blocks().is_some() {
            return Err(refuse_blocks(method.as_ref(), "merged"));
        }
        check_targets(&stored.config, &base.model_type, base.sites.iter())?;
        account.refuse_embedding(stored)?;
        refuse_sum(method.as_ref(), count, weight)?;
        let matcher = Matcher::new(method.targeting(), &base.sites)?;
        let mut accounting = account.fit(base, &matcher, method.name());
        accounting.refuse(offer(&account, method.as_mut()));
        if let Some(problem) = accounting.problem() {
            return Err(Error::Mismatch(format!("`{}`: {problem}", stored.path.display())));
        }
        for parameter in &account.parameters {
            let alone = account.parameters.iter().all(|p| p.path != EMBEDDING);
            self.add_whole(parameter, weight, alone)?;
        }
        let targeted: Vec<&Site> = base.sites.iter().filter(|site| matcher.targets(site)).collect();
        method.resolve(&targeted, &Default::default())?;
        let frozen = stored.manifest.as_ref().map(|m| m.frozen.clone()).unwrap_or_default();
        self.adapters.push(Part { method, modules: account.modules, weight, frozen });
        Ok(())
    }

    /// Adds a whole parameter of the adapter that is added next. `embedding_free`: it has none for the embedding.
    fn add_whole(&mut self, parameter: &WholeParameter, weight: f64, embedding_free: bool) -> Result<()> {
        let WholeParameter { path, frozen, tensor, .. } = parameter;
        let place = self.adapters.len();
        // The weight under an adapter on the head, as PEFT saves it, is mostly the base's own.
        let tensor = tensor.to_dtype(DType::F32)?;
        let base = self.base(path, tensor.dims())?;
        if *frozen && equal(&tensor, &base)? {
            return Ok(());
        }
        if weight != 1.0 || self.parameters.contains_key(path) {
            return Err(Error::Refused(format!(
                "`{path}` is replaced whole by the adapter, which goes only once and at weight 1"
            )));
        }
        // A tied embedding is that weight as well.
        if *frozen && self.tied && path == "lm_head.weight" && embedding_free {
            self.parameters.insert(EMBEDDING.into(), (place, tensor.clone()));
        }
        self.parameters.insert(path.clone(), (place, tensor));
        Ok(())
    }

    /// A tensor of the base in f32.
    fn base(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let source = if name == "lm_head.weight" && self.tied { EMBEDDING } else { name };
        if self.weights.shape(source)?.is_some_and(|own| own != shape) {
            return Err(Error::Mismatch(format!(
                "`{name}` has shape {shape:?}, the base's has {:?}",
                self.weights.shape(source)?.unwrap_or_default()
            )));
        }
        Ok(match shape {
            [rows, columns] => self.weights.weight(source, (*rows, *columns))?.dense(DType::F32)?,
            _ => self.weights.vector(source, shape.iter().product())?.reshape(shape)?.to_dtype(DType::F32)?,
        })
    }

    fn touches(&self, name: &str) -> bool {
        let module = name.strip_suffix(".weight").or(name.strip_suffix(".bias")).unwrap_or(name);
        self.parameters.contains_key(name) || self.adapters.iter().any(|p| p.modules.contains_key(module))
    }

    /// What an adapter has on a projection; `own` says that the adapter brings its weight as well.
    fn delta(&self, part: &Part, site: &Site, projection: &Projection, own: bool) -> Result<Option<Box<dyn Delta>>> {
        let Some(tensors) = part.modules.get(&site.path) else { return Ok(None) };
        let mut tensors = ModuleTensors { tensors: tensors.clone() };
        let mut source = ParameterSource::file(site, DType::F32, &mut tensors);
        if own {
            source = source.with_weight();
        }
        let delta = part.method.attach(site, projection, &mut source)?;
        if let Some(key) = tensors.tensors.keys().next() {
            return Err(Error::Mismatch(format!(
                "`{}`: `{key}` is not understood by `{}`",
                site.path,
                part.method.name()
            )));
        }
        if let Some(frozen) = part.frozen.get(&site.path) {
            frozen.check(&site.path, delta.as_ref())?;
        }
        Ok(Some(delta))
    }

    /// The projection whose change an adapter holds: the base's, or with the weight that the adapter brings itself.
    fn projection(&self, place: usize, module: &str, base: Projection) -> (Projection, bool) {
        match self.parameters.get(&format!("{module}.weight")) {
            Some((of, weight)) if *of == place => (replaced_by(weight, &base), true),
            _ => (base, false),
        }
    }

    /// The merged bias of a module, where an adapter changes it; `whole` is what takes the base's place.
    fn merge_bias(&self, module: &str, base: &Tensor, whole: Option<Tensor>) -> Result<Option<Tensor>> {
        let name = format!("{module}.weight");
        let mut result = whole;
        for (place, part) in self.adapters.iter().enumerate().filter(|(_, p)| p.modules.contains_key(module)) {
            let Some(shape) = self.weights.shape(&name)? else { continue };
            let [rows, columns] = shape[..] else { continue };
            let weight = self.weights.weight(&name, (rows, columns))?;
            let frozen = Projection { weight, bias: Some(base.clone()) };
            let (projection, own) = self.projection(place, module, frozen);
            let site = Site::new(module, (rows, columns));
            let Some(delta) = self.delta(part, &site, &projection, own)? else { continue };
            if let Some(change) = delta.bias_change(&projection)? {
                result = Some((result.unwrap_or_else(|| base.clone()) + (change.detach() * part.weight)?)?);
            }
        }
        Ok(result)
    }

    /// The merged tensor in f32, given the base's in f32; None where nothing touches it. A whole parameter takes the place of
    /// the base's, and changes are added to it.
    fn merge(&self, name: &str, base: &Tensor) -> Result<Option<Tensor>> {
        let whole = self.parameters.get(name).map(|(_, t)| t.clone());
        if let Some(module) = name.strip_suffix(".bias") {
            return self.merge_bias(module, base, whole);
        }
        let Some(module) = name.strip_suffix(".weight") else { return Ok(whole) };
        let mut result = whole;
        for (place, part) in self.adapters.iter().enumerate().filter(|(_, p)| p.modules.contains_key(module)) {
            let site = Site::new(module, base.dims2()?);
            let frozen = Projection { weight: lorimer_tensor::FrozenWeight::Dense(base.clone()), bias: None };
            let (projection, own) = self.projection(place, module, frozen);
            let Some(delta) = self.delta(part, &site, &projection, own)? else { continue };
            let merged = delta
                .merged(&projection)?
                .map_err(|why| Error::Refused(format!("`{module}` cannot be merged: {}", why.0)))?;
            let so_far = result.unwrap_or_else(|| base.clone());
            result = Some((so_far + ((merged - projection.dense(DType::F32)?)? * part.weight)?)?);
        }
        Ok(result)
    }
}

/// Sums of squares for the error of rounding.
#[derive(Default)]
struct Rounding {
    error: f64,
    exact: f64,
    change: f64,
    tensors: usize,
    dtypes: BTreeSet<String>,
}

impl Rounding {
    fn add(&mut self, base: &Tensor, exact: &Tensor, stored: &Tensor, dtype: &str) -> Result<()> {
        let squares =
            |t: Tensor| -> candle_core::Result<f64> { t.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>() };
        self.error += squares((stored.to_dtype(DType::F32)? - exact)?)?;
        self.exact += squares(exact.clone())?;
        self.change += squares((exact - base)?)?;
        self.tensors += 1;
        self.dtypes.insert(dtype.to_string());
        Ok(())
    }

    fn report(self, output: &Path) -> Merged {
        let ratio = |a: f64, b: f64| if b > 0.0 { (a / b).sqrt() } else { 0.0 };
        Merged {
            output: output.display().to_string(),
            dtype: self.dtypes.into_iter().collect::<Vec<_>>().join("+"),
            merged_tensors: self.tensors,
            error: ratio(self.error, self.exact),
            error_of_change: ratio(self.error, self.change),
        }
    }
}

/// A merge into a folder, tensor by tensor as they are written.
struct FolderMerge<'a> {
    plan: Plan<'a>,
    config: &'a Config,
    /// Whether a head that the base shares with its embedding becomes a tensor of its own.
    untie: bool,
    rounding: RefCell<Rounding>,
    progress: RefCell<&'a mut dyn FnMut(&str)>,
}

impl FolderMerge<'_> {
    /// A tensor with what the adapters change in it.
    fn entry(&self, name: String, dtype: DType, shape: Vec<usize>) -> Entry<'_> {
        let (own, own_shape) = (name.clone(), shape.clone());
        let bytes = Box::new(move || {
            (self.progress.borrow_mut())(&own);
            let before = self.plan.base(&own, &own_shape)?;
            let Some(merged) = self.plan.merge(&own, &before)? else { return raw_bytes(&before.to_dtype(dtype)?) };
            let stored = merged.to_dtype(dtype)?;
            self.rounding.borrow_mut().add(&before, &merged, &stored, dtype.as_str())?;
            raw_bytes(&stored)
        });
        Entry { name, dtype, shape, bytes }
    }

    /// Writes files like the base's, each tensor in its own type.
    fn write_shards(&self, shards: &[SafetensorsFile], output: &Path) -> Result<()> {
        let mut index = BTreeMap::new();
        for (i, shard) in shards.iter().enumerate() {
            let mut entries = Vec::new();
            for name in shard.names() {
                let Some((dtype, shape, bytes)) = shard.tensor(&name)? else { continue };
                entries.push(match self.plan.touches(&name) {
                    true => self.entry(name, dtype, shape),
                    false => Entry { name, dtype, shape, bytes: Box::new(move || Ok(bytes.to_vec())) },
                });
            }
            if self.untie && i + 1 == shards.len() {
                let mut dtype = DType::F32;
                for shard in shards {
                    if let Some((found, ..)) = shard.tensor(EMBEDDING)? {
                        dtype = found;
                    }
                }
                let shape = self.config.shape();
                entries.push(self.entry("lm_head.weight".into(), dtype, vec![shape.vocabulary, shape.hidden]));
            }
            let file_name = shard.path.file_name().unwrap_or_default();
            for e in &entries {
                index.insert(e.name.clone(), file_name.to_string_lossy().into_owned());
            }
            write_safetensors(&output.join(file_name), entries)?;
        }
        write_index(output, &index)
    }

    /// Writes every tensor of a base in fewer bits in one type.
    fn write_expanded(&self, dtype: DType, output: &Path) -> Result<()> {
        let weights = self.plan.weights;
        let mut names: Vec<String> = weights.names().into_iter().filter(|n| !n.starts_with("rope_f")).collect();
        if self.untie {
            names.push("lm_head.weight".into());
        }
        let mut entries = Vec::new();
        for name in names {
            let source = if name == "lm_head.weight" && self.config.tied() { EMBEDDING } else { &name };
            let shape = weights.shape(source)?.ok_or_else(|| Error::Mismatch(format!("tensor `{name}` is unknown")))?;
            entries.push(self.entry(name, dtype, shape));
        }
        write_sharded(output, entries)
    }
}

/// Merges adapters into a base and writes a folder that transformers loads. `dtype` is for a GGUF base and a packed checkpoint, whose
/// quantised tensors are expanded; a safetensors base keeps its own types and shards. `progress` hears each tensor.
///
/// # Errors
///
/// Fails if an adapter does not fit the base or cannot be merged, if `dtype` is nf4 or int8, if `output` is the base's own folder, or if a
/// file cannot be read or written.
pub fn merge_to_folder(
    base: &Path,
    adapters: &[(StoredAdapter, f64)],
    output: &Path,
    dtype: LoadDtype,
    mut progress: impl FnMut(&str),
) -> Result<Merged> {
    if matches!(dtype, LoadDtype::Nf4 | LoadDtype::Int8) {
        let text = "a merged base is not written in nf4 or int8; choose f32, f16, bf16 or stored";
        return Err(Error::Refused(text.into()));
    }
    refuse_own_folder(base, output)?;
    let (config, weights) = open_weights(base, LoadDtype::F32)?;
    let plan = Plan::new(adapters, &config, &weights)?;
    let untie = config.tied() && (plan.touches("lm_head.weight") || plan.touches(EMBEDDING));
    create_folder(output)?;
    let (rounding, progress) = (RefCell::default(), RefCell::new(&mut progress as &mut dyn FnMut(&str)));
    let merge = FolderMerge { plan, config: &config, untie, rounding, progress };
    match (weights.shards(), dtype) {
        (Some(shards), _) => merge.write_shards(shards, output)?,
        (None, LoadDtype::F16) => merge.write_expanded(DType::F16, output)?,
        (None, LoadDtype::Bf16) => merge.write_expanded(DType::BF16, output)?,
        (None, _) => merge.write_expanded(DType::F32, output)?,
    }
    write_companions(&weights, &config, output, dtype, |json| {
        if untie {
            json["tie_word_embeddings"] = false.into();
        }
    })?;
    Ok(merge.rounding.into_inner().report(output))
}

/// A merged tensor of a GGUF file in its own type: `stored` is its name there, `name` that in a model's folder.
fn requantised(
    plan: &Plan<'_>,
    file: &Gguf,
    (stored, name): (&str, &str),
    (dtype, dims): (GgmlDType, &[usize]),
    rounding: &mut Rounding,
) -> Result<QTensor> {
    let before = match dims {
        [rows, columns] => plan.weights.weight(name, (*rows, *columns))?.dense(DType::F32)?,
        _ => plan.weights.vector(name, dims.iter().product())?,
    };
    let merged = plan.merge(name, &before)?.unwrap_or_else(|| before.clone());
    let order = file.row_order(stored)?;
    let to_file = |t: &Tensor| -> Result<Tensor> {
        let t = &(t + file.offset(stored))?;
        let Some(order) = &order else { return Ok(t.clone()) };
        let mut inverse = vec![0u32; order.len()];
        order.iter().enumerate().for_each(|(i, &row)| inverse[row] = i as u32);
        Ok(t.index_select(&Tensor::new(inverse, &Device::Cpu)?, 0)?)
    };
    let (before, merged) = (to_file(&before)?, to_file(&merged)?);
    let quantised = QTensor::quantize(&merged, dtype)?;
    rounding.add(&before, &merged, &quantised.dequantize(&Device::Cpu)?, &format!("{dtype:?}"))?;
    Ok(quantised)
}

/// Merges adapters into a GGUF base and writes a GGUF file of the same types: each merged tensor is quantised anew and
/// the error measured.
///
/// # Errors
///
/// Fails if an adapter does not fit the base or cannot be merged, if the base is no GGUF file, if the change needs a head of its own that
/// the base shares with its embedding, or if a file cannot be read or written.
pub fn merge_to_gguf(
    base: &Path,
    adapters: &[(StoredAdapter, f64)],
    output: &Path,
    mut progress: impl FnMut(&str),
) -> Result<Merged> {
    refuse_own_folder(base, output)?;
    let (config, weights) = open_weights(base, LoadDtype::F32)?;
    let Some(file) = weights.gguf() else {
        return Err(Error::Refused("a GGUF output needs a GGUF base; give a folder as output instead".into()));
    };
    let plan = Plan::new(adapters, &config, &weights)?;
    if config.tied() && (plan.touches("lm_head.weight") || plan.touches(EMBEDDING)) {
        return Err(Error::Refused(
            "the adapter changes the head or the embedding, which this base shares; merge into a folder instead".into(),
        ));
    }
    let mut rounding = Rounding::default();
    let mut tensors = Vec::new();
    let mut stored_names: Vec<_> = file.content.tensor_infos.keys().cloned().collect();
    stored_names.sort();
    let by_stored: BTreeMap<String, String> = weights
        .names()
        .into_iter()
        .filter_map(|n| {
            let (module, kind) = n.rsplit_once('.')?;
            Some((format!("{}.{kind}", module_to_gguf(file.architecture(), module)?), n.clone()))
        })
        .collect();
    for stored in stored_names {
        let Some((dtype, dims, bytes)) = file.tensor(&stored)? else { continue };
        let name = by_stored.get(&stored).filter(|n| plan.touches(n));
        let tensor = match name {
            None => candle_core::quantized::ggml_file::qtensor_from_ggml(dtype, bytes, dims, &Device::Cpu)?,
            Some(name) => {
                progress(name);
                requantised(&plan, file, (&stored, name), (dtype, &dims), &mut rounding)?
            }
        };
        tensors.push((stored, tensor));
    }
    let metadata: BTreeMap<_, _> = file.content.metadata.iter().collect();
    let metadata: Vec<_> = metadata.into_iter().map(|(k, v)| (k.as_str(), v)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    write_atomic_with(output, |out| {
        let mut out = std::io::BufWriter::new(&mut *out);
        candle_core::quantized::gguf_file::write(&mut out, &metadata, &tensors)?;
        out.flush().map_err(lorimer_model::Error::io("write", output))
    })?;
    Ok(rounding.report(output))
}
