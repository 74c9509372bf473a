//! Gemma 2 and the text models of Gemma 3: decoders with four norms a layer, of which two are of what attention and unit give, and all
//! multiply by 1 + their weight.
//!
//! A layer is `h += norm(o(attend(rope(q), rope(k), v))); h += norm(down(gelu(gate)·up))` on normed inputs. Embeddings are multiplied by the
//! root of their width. Some layers see a window of keys; in Gemma 3 these turn at other frequencies, and each head of q and k is normed; in
//! Gemma 2 scores and logits are bounded.

use std::path::Path;

use lorimer_tensor::Activation;
use serde_json::{Map, Value, json};

use super::config::{Config, Family, GgufFamily};
use crate::decoder::config::{DecoderConfig, Rope, RopeScaling};
use crate::decoder::fields::Fields;
use crate::decoder::rope::rope_from_json;
use crate::error::{Error, Result};
use crate::weights::gguf::Gguf;

/// The registry's line.
pub const FAMILY: Family = Family {
    model_types: &["gemma2", "gemma3_text"],
    read,
    gguf: Some(GgufFamily {
        architectures: &[("gemma2", "gemma2"), ("gemma3", "gemma3_text")],
        read: read_gguf,
        write,
    }),
};

/// The activation of both.
const ACTIVATION: &str = "gelu_pytorch_tanh";

/// What transformers takes for keys that are absent, as many are in published files.
fn defaults(gemma3: bool) -> Value {
    let (vocabulary, longest) = if gemma3 { (262_208, 131_072) } else { (256_000, 8192) };
    let (score_cap, logit_cap) = if gemma3 { (Value::Null, Value::Null) } else { (json!(50.0), json!(30.0)) };
    json!({
        "vocab_size": vocabulary, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": longest, "tie_word_embeddings": true,
        "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": score_cap, "final_logit_softcapping": logit_cap,
        "sliding_window_pattern": 6, "rope_local_base_freq": 10_000.0, "rope_theta": if gemma3 { 1e6 } else { 1e4 },
    })
}

fn read(json: &Value, path: &Path) -> Result<Config> {
    let given = Fields::of(json, path)?;
    let model_type = given.text("model_type").unwrap_or_default();
    let gemma3 = model_type == "gemma3_text";
    let mut all = defaults(gemma3);
    if let Value::Object(all) = &mut all {
        all.extend(given.map.iter().map(|(key, value)| (key.clone(), value.clone())));
    }
    let f = Fields::of(&all, path)?;
    f.only("hidden_activation", ACTIVATION)?;
    let fail = |problem: String| Err(Error::invalid(path, problem));
    if f.flag("use_bidirectional_attention")? {
        return fail(
            "`use_bidirectional_attention` asks for attention in both directions, which is not computed in this family"
                .into(),
        );
    }
    let mut config = match gemma3 {
        true => {
            // Its frequencies are read for each kind of layer.
            let flat = f.map.iter().filter(|(key, _)| !key.starts_with("rope_"));
            let flat: Map<String, Value> = flat.map(|(key, value)| (key.clone(), value.clone())).collect();
            DecoderConfig::from_fields(&Fields { path, map: &flat }, &model_type)?
        }
        false => DecoderConfig::from_fields(&f, &model_type)?,
    };
    own(&mut config, f.number("query_pre_attn_scalar")?.unwrap_or(256.0));
    config.qkv_bias = f.flag("attention_bias")?;
    config.output_bias = config.qkv_bias;
    config.attention_cap = f.number("attn_logit_softcapping")?;
    config.logit_cap = f.number("final_logit_softcapping")?;
    let window = f.size("sliding_window")?;
    if !config.read_layer_types(&f, window.unwrap_or(0))? {
        slide(&mut config, window.unwrap_or(0), if gemma3 { f.needed("sliding_window_pattern")? } else { 2 });
    }
    if window.is_none() && config.kinds.iter().any(|kind| kind.window.is_some()) {
        return fail("some layers see a window, and `sliding_window` does not say how wide it is".into());
    }
    if gemma3 {
        if let Some(cap) = config.attention_cap {
            return fail(format!(
                "`attn_logit_softcapping` {cap} is not computed in Gemma 3; transformers leaves it out too, so set it to null"
            ));
        }
        read_ropes(&mut config, &f)?;
    }
    checked(config, path).map(Config::Decoder)
}

/// What both have of their own, however it is stored.
fn own(config: &mut DecoderConfig, scalar: f64) {
    config.norm_offset = true;
    config.output_norms = true;
    config.qk_norm = config.model_type == "gemma3_text";
    config.activation = Activation::GeluTanh;
    config.embedding_scale = Some((config.hidden_size as f64).sqrt());
    config.attention_scale = Some(scalar.powf(-0.5));
}

/// All layers but each `pattern`-th see a window.
fn slide(config: &mut DecoderConfig, window: usize, pattern: usize) {
    for (i, kind) in config.kinds.iter_mut().enumerate() {
        kind.window = ((i + 1) % pattern != 0).then_some(window);
    }
}

fn checked(config: DecoderConfig, path: &Path) -> Result<DecoderConfig> {
    let positive = |number: Option<f64>| number.is_none_or(|n| n.is_finite() && n > 0.0);
    if ![config.attention_scale, config.attention_cap, config.logit_cap].into_iter().all(positive) {
        let problem = "query_pre_attn_scalar and soft caps should be positive, and caps null for none";
        return Err(Error::invalid(path, problem));
    }
    config.checked(path)
}

/// Gemma 3's frequencies: the first of layers that see all, the second of those that see a window.
fn read_ropes(config: &mut DecoderConfig, f: &Fields<'_>) -> Result<()> {
    let object = |key: &str| f.optional(key, "an object", |v| v.as_object().cloned());
    let (by_kind, legacy) = (object("rope_parameters")?.unwrap_or_default(), object("rope_scaling")?);
    if let Some(key) = ["rope_type", "type", "rope_theta", "factor"].into_iter().find(|key| by_kind.contains_key(*key))
    {
        let problem = format!(
            "`rope_parameters` has `{key}`; Gemma 3's has an object for each of full_attention, sliding_attention"
        );
        return Err(Error::invalid(f.path, problem));
    }
    if legacy.as_ref().is_some_and(|scaling| !scaling.contains_key("rope_type")) {
        return Err(Error::invalid(
            f.path,
            "`rope_scaling` has no `rope_type`, without which transformers leaves it out; name it so",
        ));
    }
    let width = config.layers.first().map_or(0, |layer| layer.head_dim);
    let rope = |kind: &str, theta: &str, legacy: Option<Map<String, Value>>| -> Result<Rope> {
        let parameters = match by_kind.get(kind) {
            Some(own) => own.clone(),
            None => legacy.map_or(Value::Null, Value::Object),
        };
        let flat = json!({ "rope_theta": f.map.get(theta), "rope_parameters": parameters });
        let (theta, scaling) = rope_from_json(&Fields::of(&flat, f.path)?, config.max_positions)?;
        Ok(Rope { theta, scaling, width })
    };
    let full = rope("full_attention", "rope_theta", legacy)?;
    let sliding = rope("sliding_attention", "rope_local_base_freq", None)?;
    config.max_positions = full.scaling.reach(config.max_positions);
    turn(config, full, sliding);
    Ok(())
}

fn turn(config: &mut DecoderConfig, full: Rope, sliding: Rope) {
    config.ropes = vec![full, sliding];
    config.kinds.iter_mut().for_each(|kind| kind.rope = usize::from(kind.window.is_some()));
}

/// llama.cpp's files hold neither the pattern nor the scale nor, as a rule, the local frequencies; it has them by the model.
fn read_gguf(file: &Gguf, config: &mut DecoderConfig) -> Result<()> {
    let gemma3 = config.model_type == "gemma3_text";
    let key = |name: &str| format!("{}.{name}", file.architecture());
    let layer = config.layers.first().copied().ok_or_else(|| Error::invalid(&file.path, "has no layers"))?;
    // The largest of each generation is scaled by the width of the hidden state.
    let scalar = match config.layers.len() == if gemma3 { 62 } else { 46 } {
        true => config.hidden_size / layer.heads,
        false => layer.head_dim,
    };
    own(config, scalar as f64);
    let cap = |name: &str, absent: f64| file.number(&key(name)).or((!gemma3).then_some(absent));
    config.attention_cap = cap("attn_logit_softcapping", 50.0);
    config.logit_cap = cap("final_logit_softcapping", 30.0);
    if let Some(window) = file.size(&key("attention.sliding_window"))? {
        let pattern = file.size(&key("attention.sliding_window_pattern"))?.unwrap_or(if gemma3 { 6 } else { 2 });
        slide(config, window, pattern);
    }
    if gemma3 {
        let full = config.ropes[0].clone();
        let theta = file.number(&key("rope.freq_base_swa")).unwrap_or(10_000.0);
        turn(config, full.clone(), Rope { theta, scaling: RopeScaling::None, width: full.width });
    }
    *config = checked(config.clone(), &file.path)?;
    Ok(())
}

fn write(config: &DecoderConfig, json: &mut Value) {
    let gemma3 = config.model_type == "gemma3_text";
    let window = config.kinds.iter().find_map(|kind| kind.window);
    let kind = |sliding: bool| if sliding { "sliding_attention" } else { "full_attention" };
    let types: Vec<_> = config.kinds.iter().map(|k| kind(k.window.is_some())).collect();
    json["architectures"] = json!([if gemma3 { "Gemma3ForCausalLM" } else { "Gemma2ForCausalLM" }]);
    json["hidden_activation"] = ACTIVATION.into();
    json["query_pre_attn_scalar"] = json!(config.attention_scale.unwrap_or(1.0).powi(-2));
    json["attn_logit_softcapping"] = json!(config.attention_cap);
    json["final_logit_softcapping"] = json!(config.logit_cap);
    json["sliding_window"] = json!(window);
    json["layer_types"] = json!(types);
    if let Some(sliding) = config.ropes.get(1) {
        json["rope_local_base_freq"] = json!(sliding.theta);
    }
    if let Value::Object(json) = json {
        json.shift_remove("hidden_act");
    }
}
