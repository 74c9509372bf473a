//! A model's folder, written tensor by tensor.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::DType;
use lorimer_model::decoder::config::RopeScaling;
use lorimer_model::files::{MAX_JSON_BYTES, read_bounded, read_json, text_files, write_atomic, write_json};
use lorimer_model::{Config, LoadDtype, TextModel, Weights};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::file::bytes::Header;
use crate::file::writer::write_tensors;
use crate::pruning::{PRUNING_FILE, record_beside};

/// One tensor of a file to write: its bytes are made when its turn comes.
pub struct Entry<'a> {
    /// Its name.
    pub name: String,
    /// Its type.
    pub dtype: DType,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Makes its bytes.
    pub bytes: Box<dyn FnOnce() -> Result<Vec<u8>> + 'a>,
}

impl Entry<'_> {
    /// Bytes that it takes.
    pub fn length(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size_in_bytes()
    }
}

/// Streams tensors into a safetensors file, one in memory at a time.
///
/// # Errors
///
/// Fails if a tensor's bytes cannot be made, or if the file cannot be written.
pub fn write_safetensors(path: &Path, entries: Vec<Entry<'_>>) -> Result<()> {
    let mut header = Header::default();
    for e in &entries {
        header.push(&e.name, e.dtype, &e.shape)?;
    }
    write_tensors(path, header.room(), |out| {
        entries.into_iter().try_for_each(|e| out.push_bytes(&e.name, e.dtype, &e.shape, &(e.bytes)()?))
    })
}

/// Largest shard.
const SHARD_BYTES: usize = 4 << 30;

/// Writes tensors into `model.safetensors`, or into shards with their index where they are many.
///
/// # Errors
///
/// Fails as [`write_safetensors`] does.
pub fn write_sharded(output: &Path, entries: Vec<Entry<'_>>) -> Result<()> {
    let mut shards: Vec<Vec<Entry<'_>>> = vec![Vec::new()];
    let mut size = 0;
    for entry in entries {
        if size + entry.length() > SHARD_BYTES && size > 0 {
            shards.push(Vec::new());
            size = 0;
        }
        size += entry.length();
        if let Some(last) = shards.last_mut() {
            last.push(entry);
        }
    }
    let n = shards.len();
    let mut index = BTreeMap::new();
    for (i, entries) in shards.into_iter().enumerate() {
        let file_name = match n {
            1 => "model.safetensors".to_string(),
            _ => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
        };
        index.extend(entries.iter().map(|e| (e.name.clone(), file_name.clone())));
        write_safetensors(&output.join(file_name), entries)?;
    }
    write_index(output, &index)
}

/// The index of shards, where there are several.
pub(crate) fn write_index(output: &Path, index: &BTreeMap<String, String>) -> Result<()> {
    if index.values().collect::<BTreeSet<_>>().len() > 1 {
        let index = serde_json::json!({ "metadata": {}, "weight_map": index });
        write_json(&output.join("model.safetensors.index.json"), &index)?;
    }
    Ok(())
}

/// Configuration, tokenizer files and, of a pruned model, its record beside new weights; `config.json` last, after `change`. What it said of packed
/// weights is left out.
///
/// # Errors
///
/// Fails if a file cannot be read or written, or if a GGUF base's configuration has no form in `config.json`.
pub fn write_companions(
    weights: &Weights,
    config: &Config,
    output: &Path,
    dtype: LoadDtype,
    change: impl FnOnce(&mut Value),
) -> Result<()> {
    let folder = weights.origin();
    let mut json = match weights.gguf() {
        None => {
            for name in text_files(folder)? {
                let bytes = read_bounded(&folder.join(&name), MAX_JSON_BYTES)?;
                write_atomic(&output.join(name), &bytes)?;
            }
            if let Some(pruning) = record_beside(folder, &config.shape().layers)? {
                write_json(&output.join(PRUNING_FILE), &pruning)?;
            }
            read_json::<Value>(&folder.join("config.json"), MAX_JSON_BYTES)?
        }
        Some(file) => {
            let text = TextModel::from_gguf(file)?;
            write_atomic(&output.join("tokenizer.json"), text.to_json()?.as_bytes())?;
            let tokens = serde_json::json!({
                "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": text.bos, "eos_token": text.eos,
                "chat_template": text.template_source(),
            });
            write_json(&output.join("tokenizer_config.json"), &tokens)?;
            write_json(&output.join("generation_config.json"), &serde_json::json!({ "eos_token_id": text.eos_ids }))?;
            let name = match dtype {
                LoadDtype::F16 => "float16",
                LoadDtype::Bf16 => "bfloat16",
                LoadDtype::F32 | LoadDtype::Stored | LoadDtype::Nf4 | LoadDtype::Int8 => "float32",
            };
            let decoder = config.decoder("a GGUF base that is written as a folder")?;
            let mut json = decoder.to_json(name);
            if decoder.ropes.iter().any(|rope| matches!(rope.scaling, RopeScaling::Factors { .. })) {
                return Err(Error::Refused(
                    "the base's rope factors (rope_freqs.weight) have no form in config.json; merge into a safetensors base or to `.gguf`".into(),
                ));
            }
            json["eos_token_id"] = text.eos_ids.first().copied().into();
            json
        }
    };
    if let Value::Object(map) = &mut json {
        map.remove("quantization_config");
    }
    change(&mut json);
    write_json(&output.join("config.json"), &json)?;
    Ok(())
}

/// Refuses an output that is the base itself.
///
/// # Errors
///
/// Fails if it is.
pub fn refuse_own_folder(base: &Path, output: &Path) -> Result<()> {
    let same = |a: &Path, b: &Path| matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b);
    if same(base, output) || base.parent().is_some_and(|p| base.is_file() && same(p, output)) {
        return Err(Error::Refused(format!("`{}` is the base itself; choose another output", output.display())));
    }
    Ok(())
}
