//! Llama 1–3 and SmolLM2, Mistral, Qwen 2, 2.5 and 3: pre-norm decoders with rotary positions and a gated unit.
//!
//! A layer is `h += o(attend(rope(q), rope(k), v)); h += down(silu(gate)·up)` on normed inputs; Qwen 2 adds a bias to q, k, v and Qwen 3 norms
//! each head of q and k. Mistral's layers, and the upper ones of Qwen where `use_sliding_window` is set, see a window of keys.

use std::path::Path;

use serde_json::Value;

use super::config::{Config, Family, GgufFamily};
use crate::decoder::config::DecoderConfig;
use crate::decoder::fields::Fields;
use crate::error::Result;
use crate::weights::gguf::Gguf;

/// The registry's line.
pub const FAMILY: Family = Family {
    model_types: &["llama", "mistral", "qwen2", "qwen3"],
    read,
    gguf: Some(GgufFamily {
        architectures: &[("llama", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")],
        read: read_gguf,
        write: |_, _| (),
    }),
};

fn read(json: &Value, path: &Path) -> Result<Config> {
    let f = Fields::of(json, path)?;
    let model_type = f.text("model_type").unwrap_or_default();
    f.only("hidden_act", "silu")?;
    let mut config = DecoderConfig::from_fields(&f, &model_type)?;
    // The first layer with a window.
    let from = match model_type.as_str() {
        "mistral" => Some(0),
        _ if f.flag("use_sliding_window")? => Some(f.count("max_window_layers")?.unwrap_or(28)),
        _ => None,
    };
    if let (Some(window), Some(from)) = (f.size("sliding_window")?, from)
        && !config.read_layer_types(&f, window)?
    {
        config.kinds.iter_mut().skip(from).for_each(|kind| kind.window = Some(window));
    }
    let attention_bias = f.flag("attention_bias")?;
    config.qkv_bias = model_type == "qwen2" || attention_bias;
    config.output_bias = attention_bias && model_type != "qwen2";
    config.mlp_bias = f.flag("mlp_bias")?;
    config.qk_norm = model_type == "qwen3";
    Ok(Config::Decoder(config.checked(path)?))
}

fn read_gguf(_: &Gguf, config: &mut DecoderConfig) -> Result<()> {
    config.qk_norm = config.model_type == "qwen3";
    Ok(())
}
