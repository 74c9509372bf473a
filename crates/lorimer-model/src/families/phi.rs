//! Phi-3, 3.5 and 4-mini: decoders as Llama's whose q, k and v are one projection, and gate and up another.
//!
//! Rows of `qkv_proj` are those of all queries, all keys, all values; of `gate_up_proj` the gate's, then the up's. A part of each head may turn
//! (`partial_rotary_factor`), every layer may see a window, and models for long contexts turn at LongRoPE's frequencies.

use std::path::Path;

use candle_core::quantized::GgmlDType;
use serde_json::{Map, Value, json};

use super::config::{Config, Family, GgufFamily};
use crate::decoder::config::{DecoderConfig, RopeScaling};
use crate::decoder::fields::{Fields, short_str};
use crate::error::{Error, Result};
use crate::weights::gguf::Gguf;

/// The registry's line.
pub const FAMILY: Family = Family {
    model_types: &["phi3"],
    read,
    gguf: Some(GgufFamily { architectures: &[("phi3", "phi3")], read: read_gguf, write }),
};

/// Context length before stretching, where nothing says otherwise.
const ORIGINAL: usize = 4096;

fn read(json: &Value, path: &Path) -> Result<Config> {
    let given = Fields::of(json, path)?;
    let mut all = json!({
        "vocab_size": 32_064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    });
    if let Value::Object(all) = &mut all {
        all.extend(given.map.iter().map(|(key, value)| (key.clone(), value.clone())));
    }
    let f = Fields::of(&all, path)?;
    f.only("hidden_act", "silu")?;
    // Frequencies are read below.
    let flat = f.map.iter().filter(|(key, _)| !matches!(key.as_str(), "rope_scaling" | "rope_parameters"));
    let flat: Map<String, Value> = flat.map(|(key, value)| (key.clone(), value.clone())).collect();
    let mut config = DecoderConfig::from_fields(&Fields { path, map: &flat }, "phi3")?;
    config.fused = true;
    let window = f.size("sliding_window")?;
    config.kinds.iter_mut().for_each(|kind| kind.window = window);
    read_rope(&mut config, &f)?;
    Ok(Config::Decoder(config.checked(path)?))
}

fn read_rope(config: &mut DecoderConfig, f: &Fields<'_>) -> Result<()> {
    let object = |key: &str| f.optional(key, "an object", |v| v.as_object().cloned());
    let inner = match object("rope_parameters")? {
        Some(parameters) => parameters,
        None => object("rope_scaling")?.unwrap_or_default(),
    };
    let r = Fields { path: f.path, map: &inner };
    let part = r.number("partial_rotary_factor")?.or(f.number("partial_rotary_factor")?).unwrap_or(1.0);
    let longest = config.max_positions;
    let rope = &mut config.ropes[0];
    rope.theta = r.number("rope_theta")?.unwrap_or(rope.theta);
    rope.width = (rope.width as f64 * part) as usize;
    rope.scaling = match r.text("rope_type").or(r.text("type")).as_deref() {
        None | Some("default") => RopeScaling::None,
        // As transformers reads older files.
        Some("longrope" | "su" | "yarn") => {
            let original = f.size("original_max_position_embeddings")?.unwrap_or(ORIGINAL);
            let stretch = r.number("factor")?.unwrap_or(longest as f64 / original as f64);
            let attention_factor = r.number("attention_factor")?.unwrap_or_else(|| attention_factor(stretch, original));
            RopeScaling::Long {
                short: list(&r, "short_factor")?,
                long: list(&r, "long_factor")?,
                original,
                attention_factor,
            }
        }
        Some(other) => {
            let problem = format!("rope scaling `{}` is not one of default, longrope in this family", short_str(other));
            return Err(Error::invalid(f.path, problem));
        }
    };
    Ok(())
}

/// What LongRoPE multiplies sine and cosine by for a context stretched so many times.
fn attention_factor(stretch: f64, original: usize) -> f64 {
    match stretch > 1.0 {
        true => (1.0 + stretch.ln() / (original as f64).ln()).sqrt(),
        false => 1.0,
    }
}

fn list(r: &Fields<'_>, key: &str) -> Result<Vec<f64>> {
    let numbers = |v: &Value| v.as_array()?.iter().map(|n| n.as_f64().filter(|n| *n > 0.0)).collect::<Option<Vec<_>>>();
    let list = r.optional(key, "a list of positive numbers", numbers)?;
    list.ok_or_else(|| Error::invalid(r.path, format!("LongRoPE needs `{key}`, which is missing")))
}

fn read_gguf(file: &Gguf, config: &mut DecoderConfig) -> Result<()> {
    let key = |name: &str| format!("phi3.{name}");
    config.fused = true;
    let window = file.number(&key("attention.sliding_window")).filter(|w| *w > 0.0);
    config.kinds.iter_mut().for_each(|kind| kind.window = window.map(|w| w as usize));
    let longest = config.max_positions;
    let rope = &mut config.ropes[0];
    rope.width = file.size(&key("rope.dimension_count"))?.unwrap_or(rope.width);
    let factors = |name: &str| -> Result<Option<Vec<f64>>> {
        let found = file.tensor(&format!("rope_factors_{name}.weight"))?.filter(|(kind, ..)| *kind == GgmlDType::F32);
        let numbers =
            |bytes: &[u8]| bytes.as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect();
        Ok(found.map(|(_, _, bytes)| numbers(bytes)))
    };
    if let (Some(short), Some(long)) = (factors("short")?, factors("long")?) {
        let original = file.size(&key("rope.scaling.original_context_length"))?.unwrap_or(ORIGINAL);
        let stored = file.number(&key("rope.scaling.attn_factor"));
        let attention_factor = stored.unwrap_or_else(|| attention_factor(longest as f64 / original as f64, original));
        rope.scaling = RopeScaling::Long { short, long, original, attention_factor };
    }
    Ok(())
}

fn write(config: &DecoderConfig, json: &mut Value) {
    let rope = &config.ropes[0];
    let head = config.layers.first().map_or(1, |layer| layer.head_dim);
    json["architectures"] = json!(["Phi3ForCausalLM"]);
    json["sliding_window"] = json!(config.kinds.iter().find_map(|kind| kind.window));
    json["partial_rotary_factor"] = json!(rope.width as f64 / head as f64);
    json["original_max_position_embeddings"] = match rope.scaling {
        RopeScaling::Long { original, .. } => json!(original),
        _ => json!(config.max_positions),
    };
    // transformers takes the end of text and the padding of its own vocabulary where none is said.
    json["pad_token_id"] = Value::Null;
}
