//! What mlx-lm keeps beside its factors: one rank and one scale for all modules, in `adapter_config.json`.

use std::path::Path;

use lorimer_model::files::read_json;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// Largest `adapter_config.json`.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// The file of tensors in an mlx-lm folder.
pub const WEIGHTS_FILE: &str = "adapters.safetensors";

/// What mlx-lm multiplies the product of the factors by, out of the configuration beside a file of tensors.
///
/// # Errors
///
/// Fails if there is no configuration, or if it is not that of a LoRA with a scale.
pub fn scale(weights: &Path) -> Result<f64> {
    let path = weights.with_file_name("adapter_config.json");
    let fail = |problem: String| -> Error { lorimer_model::Error::invalid(&path, problem).into() };
    if !path.is_file() {
        return Err(fail("is missing; mlx-lm keeps the scale of its factors there".into()));
    }
    let config: Map<String, Value> = read_json(&path, MAX_CONFIG_BYTES)?;
    match config.get("fine_tune_type").and_then(Value::as_str).unwrap_or("lora") {
        "lora" => {}
        other => {
            let other: String = other.chars().take(40).collect();
            return Err(fail(format!("says fine_tune_type `{other}`, and only `lora` is factors alone")));
        }
    }
    let scale = config.get("lora_parameters").and_then(|p| p.get("scale")).and_then(Value::as_f64);
    scale.filter(|s| s.is_finite()).ok_or_else(|| fail("has no number `lora_parameters.scale`".into()))
}

/// The configuration of a LoRA on these modules. All blocks count as adapted (`num_layers` −1): what a block has no factors for starts at zero.
pub fn config<'m>(modules: impl Iterator<Item = &'m String>, rank: usize, scale: f64) -> Value {
    // Inside a block mlx-lm goes by the path below the block.
    let below = |module: &'m String| match module.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) {
        Some((_, key)) => key.to_string(),
        None => module.clone(),
    };
    let mut keys: Vec<String> = modules.map(below).collect();
    keys.sort_unstable();
    keys.dedup();
    json!({
        "fine_tune_type": "lora", "num_layers": -1,
        "lora_parameters": { "rank": rank, "scale": scale, "dropout": 0.0, "keys": keys },
    })
}
