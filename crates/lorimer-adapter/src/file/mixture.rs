//! Folders of adapters that are made of others: where their parts are, and X-LoRA's as its authors' code writes them.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use lorimer_model::pull::snapshot_folder;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// The key of a configuration that names parts by number.
pub(crate) const PARTS: &str = "adapters";
/// What the tensors of a mixture's head begin with, before the number of the layer.
pub(crate) const HEAD: &str = "base_model.internal_xlora_classifier.layers.";
/// The authors' configuration, and their head.
pub(crate) const AUTHORS_CONFIG: &str = "xlora_config.json";
const AUTHORS_WEIGHTS: &str = "xlora_classifier.safetensors";
/// Most parts.
const MAX_PARTS: usize = 256;
/// Most layers of a head.
pub(crate) const MAX_DEPTH: usize = 64;

fn invalid(folder: &Path, problem: impl Into<String>) -> Error {
    lorimer_model::Error::invalid(folder, problem).into()
}

/// Whether a configuration is of an adapter made of others.
pub(crate) fn is_mixture(config: &Map<String, Value>) -> bool {
    config.get("peft_type").and_then(Value::as_str) == Some("XLORA")
}

/// What a configuration calls an adapter's parts, in the order of their numbers (a file that PEFT saved has `10` before `2`).
pub(crate) fn part_names(folder: &Path, config: &Map<String, Value>) -> Result<Vec<String>> {
    if !is_mixture(config) {
        return Ok(Vec::new());
    }
    let none = Map::new();
    let named = config.get(PARTS).and_then(Value::as_object).unwrap_or(&none);
    if named.len() > MAX_PARTS {
        return Err(invalid(folder, format!("names {} experts, at most {MAX_PARTS} are read", named.len())));
    }
    let part = |number: usize| match named.get(&number.to_string()) {
        Some(path) => Ok(path.as_str().unwrap_or_default().to_string()),
        None => {
            let keys: Vec<String> = named.keys().take(8).map(|k| k.chars().take(30).collect()).collect();
            let most = named.len() - 1;
            Err(invalid(
                folder,
                format!("`adapters` should be numbered \"0\" to \"{most}\", found {}", keys.join(", ").escape_debug()),
            ))
        }
    };
    (0..named.len()).map(part).collect()
}

/// The folders of an adapter's parts, in their order: absolute, else from the folder itself, else from the current one, else the snapshot of
/// a hub id in the hub's cache.
pub(crate) fn part_folders(folder: &Path, config: &Map<String, Value>) -> Result<Vec<PathBuf>> {
    let part = |(number, name): (usize, String)| {
        let (path, cached) = (Path::new(&name), snapshot_folder(&name));
        let tried = [folder.join(path), path.to_path_buf()];
        let found = tried.into_iter().chain(cached.clone()).find(|p| !name.is_empty() && p.is_dir());
        found.ok_or_else(|| {
            let shown: String = name.chars().take(120).collect();
            let fetch = match cached {
                Some(_) => {
                    let id = shown.replace('@', " --revision ");
                    format!("; if it is on the hub, `hf download {id}` fetches it into the cache that is read here")
                }
                None => String::new(),
            };
            let shown = shown.escape_debug();
            invalid(folder, format!("its expert {number} should be at `{shown}`, where no folder is{fetch}"))
        })
    };
    part_names(folder, config)?.into_iter().enumerate().map(part).collect()
}

/// A configuration whose parts are named by their way from the folder that it is written into.
pub(crate) fn with_relative_parts(
    config: &Map<String, Value>,
    folder: &Path,
    parts: &[crate::part::Part],
) -> Map<String, Value> {
    let mut config = config.clone();
    if !parts.is_empty() {
        let from = folder.canonicalize().unwrap_or_else(|_| folder.to_path_buf());
        let way = |(number, part): (usize, &crate::part::Part)| {
            (number.to_string(), json!(relative(&from, &part.path).display().to_string()))
        };
        config.insert(PARTS.into(), parts.iter().enumerate().map(way).collect::<Map<_, _>>().into());
    }
    config
}

/// The way from one absolute folder to another.
fn relative(from: &Path, to: &Path) -> PathBuf {
    let (a, b): (Vec<Component<'_>>, Vec<Component<'_>>) = (from.components().collect(), to.components().collect());
    if !from.is_absolute() || !to.is_absolute() || a.first() != b.first() {
        return to.to_path_buf();
    }
    let same = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
    let up = a[same..].iter().map(|_| Component::ParentDir);
    up.chain(b[same..].iter().copied()).collect()
}

/// Whether a folder is X-LoRA's as its authors' code writes it.
pub(crate) fn is_authors(folder: &Path) -> bool {
    folder.join(AUTHORS_CONFIG).is_file() && !folder.join("adapter_config.json").exists()
}

/// The file of the authors' head.
pub(crate) fn authors_weights(folder: &Path) -> Result<PathBuf> {
    let path = folder.join(AUTHORS_WEIGHTS);
    match path.is_file() {
        true => Ok(path),
        false => Err(invalid(
            folder,
            match folder.join("xlora_classifier.pt").exists() {
                true => "holds xlora_classifier.pt, a pickle that could run code; save it again as safetensors",
                false => "has no xlora_classifier.safetensors",
            },
        )),
    }
}

/// Configuration and head of a folder of the authors', in PEFT's form. Their head may be without biases, which are zeros here, and without
/// ReLU and dropout: then it is one linear layer, the product of theirs.
pub(crate) fn from_authors(
    folder: &Path,
    mut config: Map<String, Value>,
    tensors: BTreeMap<String, Tensor>,
) -> Result<(Map<String, Value>, BTreeMap<String, Tensor>)> {
    let names: Vec<String> = match config.get(PARTS) {
        Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).map(str::to_string).collect(),
        Some(Value::Object(map)) => map.keys().cloned().collect(),
        _ => Vec::new(),
    };
    let plain = |name: &String| matches!(Path::new(name).components().collect::<Vec<_>>()[..], [Component::Normal(_)]);
    if names.is_empty() || !names.iter().all(plain) {
        let text = "its xlora_config.json should name the experts' folders in the order of the head's columns, as `adapters`: [\"first\", …]";
        return Err(invalid(folder, text));
    }
    // What is left out has the default of the authors' package.
    let mut flag = |key: &str, default: bool| match config.shift_remove(key) {
        None | Some(Value::Null) => Ok(default),
        Some(Value::Bool(value)) => Ok(value),
        Some(_) => Err(invalid(folder, format!("`{key}` of its xlora_config.json should be true or false"))),
    };
    let (relu, biases) = (flag("enable_relu_and_dropout", false)?, flag("use_bias", true)?);
    for key in ["device", "stop_token_id"] {
        config.shift_remove(key);
    }
    let base = config.shift_remove("base_model_id").unwrap_or_default();
    let depth = match config.get("xlora_depth") {
        None | Some(Value::Null) => Some(1),
        Some(depth) => depth.as_u64().and_then(|depth| usize::try_from(depth).ok()),
    };
    let Some(depth) = depth.filter(|depth| (1..=MAX_DEPTH).contains(depth)) else {
        return Err(invalid(folder, format!("its xlora_depth should be a number between 1 and {MAX_DEPTH}")));
    };
    let mut layers = Vec::new();
    let mut left = tensors;
    for i in 0..depth {
        let name = if i + 1 == depth { "last".to_string() } else { format!("inner.{}", i * if relu { 3 } else { 1 }) };
        let mut take = |end: &str| {
            let name = format!("{name}.{end}");
            left.remove(&name).ok_or_else(|| invalid(folder, format!("its head has no `{name}`")))
        };
        let weight = take("weight")?.to_dtype(DType::F32)?;
        let outputs = weight.dims2()?.0;
        let bias = if biases {
            take("bias")?.to_dtype(DType::F32)?
        } else {
            Tensor::zeros(outputs, DType::F32, &Device::Cpu)?
        };
        layers.push((weight, bias.reshape(outputs)?));
    }
    if let Some(name) = left.keys().next() {
        return Err(invalid(folder, format!("its head holds `{name}`, which its configuration does not give it")));
    }
    if !relu {
        let mut product: Option<(Tensor, Tensor)> = None;
        for (number, (next, own)) in layers.into_iter().enumerate() {
            product = Some(match product {
                None => (next, own),
                Some((w, b)) => {
                    let (outputs, inputs) = (w.dim(0)?, next.dim(1)?);
                    if outputs != inputs {
                        let text = format!(
                            "layer {} of its head has {outputs} outputs, and layer {number} after it {inputs} inputs",
                            number - 1
                        );
                        return Err(invalid(folder, text));
                    }
                    fold(&w, &b, &next, &own)?
                }
            });
        }
        layers = product.into_iter().collect();
        config.insert("xlora_depth".into(), 1.into());
    }
    let dropout = config.get("xlora_dropout_p").and_then(Value::as_f64).unwrap_or(0.2);
    let mut head = BTreeMap::new();
    for (i, (weight, bias)) in layers.into_iter().enumerate() {
        let number = i * layer_step(dropout);
        head.insert(format!("{HEAD}{number}.weight"), weight);
        head.insert(format!("{HEAD}{number}.bias"), bias);
    }
    let parts: Map<String, Value> =
        names.into_iter().enumerate().map(|(i, name)| (i.to_string(), name.into())).collect();
    config.insert(PARTS.into(), parts.into());
    config.insert("peft_type".into(), "XLORA".into());
    config.insert("base_model_name_or_path".into(), base);
    Ok((config, head))
}

/// Numbers from one linear layer of a head to the next: ReLU counts, and dropout where there is any.
pub(crate) fn layer_step(dropout: f64) -> usize {
    if dropout > 0.0 { 3 } else { 2 }
}

/// One linear layer after another as one.
fn fold(w: &Tensor, b: &Tensor, next: &Tensor, own: &Tensor) -> Result<(Tensor, Tensor)> {
    let bias = (next.matmul(&b.unsqueeze(1)?)?.squeeze(1)? + own)?;
    Ok((next.matmul(w)?, bias))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_between_folders_goes_up_and_down() {
        let way = |from: &str, to: &str| relative(Path::new(from), Path::new(to)).display().to_string();
        assert_eq!(way("/a/b/c", "/a/d/e"), "../../d/e");
        assert_eq!(way("/a", "/a/expert"), "expert");
        assert_eq!(way("here", "/a/expert"), "/a/expert");
    }

    #[test]
    fn parts_are_taken_by_number() {
        let folder = tempfile::tempdir().unwrap();
        let mut adapters = Map::new();
        // In the order in which PEFT writes them.
        for key in ["0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9"] {
            std::fs::create_dir(folder.path().join(format!("e{key}"))).unwrap();
            adapters.insert(key.into(), format!("e{key}").into());
        }
        let config = |adapters: &Map<String, Value>| {
            let Value::Object(config) = json!({ "peft_type": "XLORA", "adapters": adapters }) else { panic!() };
            config
        };
        let found = part_folders(folder.path(), &config(&adapters)).unwrap();
        let names: Vec<String> = found.iter().map(|p| p.file_name().unwrap().to_string_lossy().into_owned()).collect();
        assert_eq!(names, (0..12).map(|i| format!("e{i}")).collect::<Vec<_>>());
        adapters.insert("first".into(), "e0".into());
        let problem = part_folders(folder.path(), &config(&adapters)).unwrap_err().to_string();
        assert!(problem.contains("\\\"0\\\" to \\\"12\\\"") || problem.contains("\"0\" to \"12\""), "{problem}");
        adapters.shift_remove("first");
        adapters.insert("3".into(), "nowhere".into());
        let problem = part_folders(folder.path(), &config(&adapters)).unwrap_err().to_string();
        assert!(problem.contains("expert 3 should be at `nowhere`"), "{problem}");
    }
}
