//! The folder of a quantised model: weights, configuration and tokenizer, the table of bits and errors, and the adapter that begins as the repair.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Tensor};
use lorimer_adapter::algebra::folder::{Entry, write_companions, write_sharded};
use lorimer_adapter::algebra::merge::merge_to_folder;
use lorimer_adapter::file::bytes::raw_bytes;
use lorimer_adapter::file::dialects::peft::tensor_name;
use lorimer_adapter::pruning::record_beside;
use lorimer_adapter::{BaseIdentity, Manifest, StoredAdapter, methods};
use lorimer_model::base::open_weights;
use lorimer_model::files::{create_folder, write_folder_atomic, write_json};
use lorimer_model::weights::SafetensorsFile;
use lorimer_model::weights::packed::FORMAT;
use lorimer_model::{LoadDtype, Site};
use serde_json::{Map, Value, json};

use super::grouped;
use super::job::{FACTORS, ModuleConfig, Partial, Quantize, Report};
use super::settings::Format;
use crate::error::{Error, Result};

/// Writes the folder whole and gives it its name; what was kept beside it goes.
pub(super) fn write(run: &Quantize<'_>, sites: &[Site], partial: &Partial, report: &Report) -> Result<()> {
    let folder = partial.folder.join("output");
    let io = |action: &'static str, path: &Path| {
        let path = path.to_path_buf();
        move |e| Error::Model(lorimer_model::Error::io(action, &path)(e))
    };
    if folder.exists() {
        fs::remove_dir_all(&folder).map_err(io("remove", &folder))?;
    }
    create_folder(&folder)?;
    let files = (0..sites.len()).map(|i| SafetensorsFile::open(&partial.tensors(i)));
    let files: Vec<SafetensorsFile> = files.collect::<lorimer_model::Result<_>>()?;
    write_sharded(&folder, entries(run, sites, &files)?)?;
    let quantization = quantization_config(run, report);
    write_companions(run.weights, run.config, &folder, LoadDtype::F32, |json| {
        json["quantization_config"] = quantization;
    })?;
    write_json(&folder.join("quantization.json"), report)?;
    if run.settings.method.repairs() {
        adapter(run, sites, &files, &folder)?.write(&folder.join("adapter"), None)?;
    }
    if let Some(dense) = run.dense {
        let mut failed = None;
        let written = write_folder_atomic(dense, |place| {
            merge_to_folder(&folder, &[], place, LoadDtype::F32, |_| {}).map(drop).map_err(|error| {
                let text = error.to_string();
                failed = Some(error);
                lorimer_model::Error::Unsupported(text)
            })
        });
        match failed {
            Some(error) => return Err(error.into()),
            None => written?,
        }
    }
    fs::rename(&folder, run.output).map_err(io("rename to", run.output))?;
    fs::remove_dir_all(&partial.folder).map_err(io("remove", &partial.folder))
}

/// How `config.json` says that the weights are packed.
fn quantization_config(run: &Quantize<'_>, report: &Report) -> Value {
    match (run.settings.format, run.settings.groups) {
        (_, Some(groups)) => grouped::quantization_config(&run.settings, groups),
        (Format::Bitsandbytes, None) => json!({
            "quant_method": "bitsandbytes", "load_in_4bit": true, "load_in_8bit": false, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": true, "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8",
        }),
        (_, None) => {
            let modules: BTreeMap<&str, &ModuleConfig> =
                report.modules.iter().map(|m| (m.module.as_str(), &m.config)).collect();
            json!({ "quant_method": FORMAT, "modules": modules })
        }
    }
}

/// Every tensor: packed ones as they were kept, others as they lie in the base's files, or in 16 bits where that is GGUF.
fn entries<'a>(run: &Quantize<'a>, sites: &[Site], files: &'a [SafetensorsFile]) -> Result<Vec<Entry<'a>>> {
    let weights = run.weights;
    let packed: BTreeMap<String, usize> = sites.iter().enumerate().map(|(i, s)| (s.weight_path(), i)).collect();
    let mut entries = Vec::new();
    for name in weights.names().into_iter().filter(|name| !name.starts_with("rope_f")) {
        if let Some(&i) = packed.get(&name) {
            for part in files[i].names().into_iter().filter(|part| !FACTORS.contains(&part.as_str())) {
                let Some((dtype, shape, bytes)) = files[i].tensor(&part)? else { continue };
                entries.push(Entry { name: part, dtype, shape, bytes: Box::new(move || Ok(bytes.to_vec())) });
            }
            continue;
        }
        if let Some((dtype, shape, bytes)) = weights.raw(&name)? {
            entries.push(Entry { name, dtype, shape, bytes: Box::new(move || Ok(bytes.to_vec())) });
            continue;
        }
        let Some(shape) = weights.shape(&name)? else { continue };
        let (own, dims) = (name.clone(), shape.clone());
        // A GGUF file's matrices are of few bits, of which 16 lose nothing to speak of.
        let dtype = if dims.len() == 2 { DType::F16 } else { DType::F32 };
        let bytes = move || {
            let tensor = match dims[..] {
                [rows, columns] => weights.weight(&own, (rows, columns))?.dense(dtype)?,
                _ => weights.vector(&own, dims.iter().product())?.reshape(dims)?.to_dtype(dtype)?,
            };
            raw_bytes(&tensor)
        };
        entries.push(Entry { name, dtype, shape, bytes: Box::new(bytes) });
    }
    Ok(entries)
}

/// The LoRA with s·BA = L1 L2: B = L1/√s and A = L2/√s.
fn adapter(run: &Quantize<'_>, sites: &[Site], files: &[SafetensorsFile], folder: &Path) -> Result<StoredAdapter> {
    let mut roles: Vec<&str> = sites.iter().map(|site| site.role.as_str()).collect();
    roles.sort_unstable();
    roles.dedup();
    let (rank, alpha) = (run.settings.rank, run.settings.alpha);
    let settings = json!({ "r": rank, "lora_alpha": alpha, "target_modules": roles });
    let Value::Object(settings) = settings else { return Err(Error::Settings("settings of LoRA".into())) };
    let mut config: Map<String, Value> = methods::build("lora", &settings)?.stored_config();
    config.insert("base_model_name_or_path".into(), run.output.display().to_string().into());
    let root = (alpha / rank as f64).sqrt();
    let mut tensors = BTreeMap::new();
    for (site, file) in sites.iter().zip(files) {
        for (key, own) in ["lora_B.weight", "lora_A.weight"].into_iter().zip(FACTORS) {
            let missing = || Error::Settings(format!("`{}` has no low-rank change", site.path));
            let factor: Tensor = file.load(own)?.ok_or_else(missing)?;
            tensors.insert(tensor_name(&site.path, key), (factor / root)?);
        }
    }
    let mut stored = StoredAdapter { path: folder.to_path_buf(), config, tensors, manifest: None, parts: Vec::new() };
    let (_, weights) = open_weights(folder, LoadDtype::F32)?;
    stored.manifest = Some(Manifest {
        format: 1,
        content_id: stored.content_id()?,
        method: "lora".into(),
        lorimer: env!("CARGO_PKG_VERSION").into(),
        base: Some(BaseIdentity {
            name: run.output.display().to_string(),
            fingerprint: weights.fingerprint()?,
            model_type: run.config.shape().model_type,
            pruned: record_beside(folder, &run.config.shape().layers)?.map(|record| record.identity()),
        }),
        chat_template: run.text.template_source().map(str::to_string),
        training: json!({ "quantize": run.settings, "of": run.base_name }),
        golden: Vec::new(),
        frozen: BTreeMap::new(),
        xlora: None,
    });
    Ok(stored)
}
