//! FlyLoRA files as its authors' changed PEFT writes them.

use serde_json::{Map, Value};

/// Starts that move the base, from which an adapter of theirs then counts.
const MOVED: [&str; 4] = ["pissa", "olora", "corda", "loftq"];

/// A configuration that the authors' code wrote, PEFT's LORA with their two keys, in our form, which has the same tensors; others stay as they are.
pub(crate) fn from_authors(config: &mut Map<String, Value>) {
    let lora = config.get("peft_type").and_then(Value::as_str) == Some("LORA");
    if lora && ["bias_u", "top_k"].iter().all(|key| config.get(*key).is_some_and(Value::is_number)) {
        config.insert("peft_type".into(), "FLYLORA".into());
    }
}

/// Whether a configuration's start moved the base.
pub(crate) fn moved_base(config: &Map<String, Value>) -> bool {
    let start = config.get("init_lora_weights").and_then(Value::as_str).unwrap_or_default().to_lowercase();
    MOVED.iter().any(|name| start.starts_with(name))
}
