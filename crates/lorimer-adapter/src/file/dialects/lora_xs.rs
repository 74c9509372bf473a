//! LoRA-XS files as its authors write them.

use std::collections::BTreeMap;

use candle_core::Tensor;
use serde_json::{Map, Value};

/// What the authors' code calls R, below a module's path in a state dict, with and without the adapter's name (PEFT's versions differ in
/// whether they take that away here).
const AUTHORS_R: [&str; 2] = ["_lora_latent_mapping.weight", ".default_lora_latent_mapping.weight"];

/// A folder that the authors' code wrote, PEFT's LORA with one more tensor a module, in our form; others stay as they are.
pub(crate) fn from_authors(config: &mut Map<String, Value>, tensors: &mut BTreeMap<String, Tensor>) {
    let theirs =
        |name: &str| AUTHORS_R.iter().rev().find_map(|end| name.strip_suffix(end).map(|m| format!("{m}.lora_R")));
    if config.get("peft_type").and_then(Value::as_str) != Some("LORA") || !tensors.keys().any(|k| theirs(k).is_some()) {
        return;
    }
    *tensors = std::mem::take(tensors)
        .into_iter()
        .map(|(name, t)| {
            let factor = [".lora_A.weight", ".lora_B.weight"].iter().any(|end| name.ends_with(end));
            let plain = if factor { name.trim_end_matches(".weight").to_string() } else { name.clone() };
            (theirs(&name).unwrap_or(plain), t)
        })
        .collect();
    // PEFT's scaling is α/√r with this; LoRA-XS has α/r.
    if config.shift_remove("use_rslora") == Some(Value::Bool(true))
        && let (Some(r), Some(alpha)) =
            (config.get("r").and_then(Value::as_f64), config.get("lora_alpha").and_then(Value::as_f64))
    {
        config.insert("lora_alpha".into(), (alpha * r.sqrt()).into());
    }
    // What the file's tensors are the same without.
    for key in ["lora_dropout", "init_lora_weights", "loftq_config", "megatron_core", "qalora_group_size"] {
        config.shift_remove(key);
    }
    if config.get("bias").and_then(Value::as_str) == Some("none") {
        config.shift_remove("bias");
    }
    config.insert("peft_type".into(), "LORA_XS".into());
    config.insert("singular_values".into(), "inputs".into());
    config.insert("save_frozen".into(), true.into());
}
