//! Configuration of the Llama family, from `config.json` (as transformers 4 and 5 write it) and from GGUF.

use std::f64::consts::TAU;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The `model_type`s of one family: pre-norm decoder, rotary positions, gated unit.
pub const MODEL_TYPES: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];
/// More layers than any model has; bounds what a damaged file can ask for.
const MAX_LAYERS: usize = 1024;

/// How rotary frequencies are stretched to longer contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// Stretch.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a smooth ramp between.
    Llama3 {
        /// Stretch of the low frequencies.
        factor: f64,
        /// Wavelengths over `original/low_freq_factor` are stretched.
        low_freq_factor: f64,
        /// Wavelengths under `original/high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length before stretching.
        original: f64,
    },
    /// YaRN (Peng et al. 2023, arXiv 2309.00071).
    Yarn {
        /// Stretch.
        factor: f64,
        /// Turns over the original context above which a frequency is kept.
        beta_fast: f64,
        /// Turns below which it is fully stretched.
        beta_slow: f64,
        /// Context length before stretching.
        original: f64,
        /// Multiplies sine and cosine.
        attention_factor: f64,
    },
    /// Each frequency divided by its own factor (GGUF's `rope_freqs.weight`).
    Factors(Vec<f64>),
}

impl RopeScaling {
    /// The longest sequence: YaRN's is its original length times its factor, whatever the configuration calls the longest.
    pub fn reach(&self, max_positions: usize) -> usize {
        match self {
            Self::Yarn { factor, original, .. } => {
                max_positions.max((factor * original).min(f64::from(u32::MAX)) as usize)
            }
            _ => max_positions,
        }
    }
}

/// Shape and constants of a Llama-family model.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// `llama`, `mistral`, `qwen2` or `qwen3`.
    pub model_type: String,
    /// Width of the hidden state.
    pub hidden_size: usize,
    /// Width of the gated unit.
    pub intermediate_size: usize,
    /// Number of tokens known.
    pub vocab_size: usize,
    /// Number of layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// ε of the norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Stretching of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Longest sequence the model is meant for.
    pub max_positions: usize,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Bias on q, k, v.
    pub qkv_bias: bool,
    /// Bias on o.
    pub output_bias: bool,
    /// Bias on gate, up, down.
    pub mlp_bias: bool,
    /// Norm of each query and key head before rotation (Qwen 3).
    pub qk_norm: bool,
}

/// Typed look-ups in a JSON object with errors that name the key.
struct Fields<'a> {
    path: &'a Path,
    map: &'a Map<String, Value>,
}

impl Fields<'_> {
    fn optional<T>(&self, key: &str, kind: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => read(value)
                .map(Some)
                .ok_or_else(|| Error::invalid(self.path, format!("`{key}` should be {kind}, found {}", short(value)))),
        }
    }
    fn size(&self, key: &str) -> Result<Option<usize>> {
        self.optional(key, "a positive whole number", |v| {
            v.as_u64().filter(|&n| n > 0 && n < (1 << 32)).map(|n| n as usize)
        })
    }
    fn needed(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| Error::invalid(self.path, format!("has no `{key}`")))
    }
    fn number(&self, key: &str) -> Result<Option<f64>> {
        self.optional(key, "a finite number", |v| v.as_f64().filter(|n| n.is_finite()))
    }
    fn flag(&self, key: &str) -> Result<bool> {
        Ok(self.optional(key, "true or false", Value::as_bool)?.unwrap_or(false))
    }
}

fn short(value: &Value) -> String {
    let mut text: String = value.to_string().chars().take(60).collect();
    if text.len() < value.to_string().len() {
        text.push('…');
    }
    text
}

impl LlamaConfig {
    /// Whether projections of this role add a bias.
    pub fn has_bias(&self, role: &str) -> bool {
        match role {
            "q_proj" | "k_proj" | "v_proj" => self.qkv_bias,
            "o_proj" => self.output_bias,
            "gate_proj" | "up_proj" | "down_proj" => self.mlp_bias,
            _ => false,
        }
    }

    /// Reads what transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`) wrote; `path` is for errors.
    pub fn from_json(json: &Value, path: &Path) -> Result<Self> {
        let map = json.as_object().ok_or_else(|| Error::invalid(path, "should hold a JSON object"))?;
        let f = Fields { path, map };
        let model_type = map.get("model_type").and_then(Value::as_str).unwrap_or_default().to_string();
        if !MODEL_TYPES.contains(&model_type.as_str()) {
            return Err(Error::invalid(
                path,
                format!("model_type `{}` is not one of {}", short_str(&model_type), MODEL_TYPES.join(", ")),
            ));
        }
        if let Some(act) = map.get("hidden_act").and_then(Value::as_str)
            && act != "silu"
        {
            return Err(Error::invalid(path, format!("hidden_act `{}` is not `silu`", short_str(act))));
        }
        let (hidden_size, heads) = (f.needed("hidden_size")?, f.needed("num_attention_heads")?);
        let max_positions = f.size("max_position_embeddings")?.unwrap_or(2048);
        let sliding = match model_type.as_str() {
            "mistral" => f.size("sliding_window")?,
            _ if f.flag("use_sliding_window")? => f.size("sliding_window")?,
            _ => None,
        };
        let attention_bias = f.flag("attention_bias")?;
        let (rope_theta, rope_scaling) = rope_from_json(&f, max_positions)?;
        let max_positions = rope_scaling.reach(max_positions);
        let config = Self {
            hidden_size,
            intermediate_size: f.needed("intermediate_size")?,
            vocab_size: f.needed("vocab_size")?,
            layers: f.needed("num_hidden_layers")?,
            heads,
            kv_heads: f.size("num_key_value_heads")?.unwrap_or(heads),
            head_dim: f.size("head_dim")?.unwrap_or(hidden_size / heads),
            rms_norm_eps: f.number("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            // Within one window sliding and full attention are the same, and longer sequences are refused.
            max_positions: sliding.map_or(max_positions, |w| w.min(max_positions)),
            tied: f.flag("tie_word_embeddings")?,
            qkv_bias: model_type == "qwen2" || attention_bias,
            output_bias: attention_bias && model_type != "qwen2",
            mlp_bias: f.flag("mlp_bias")?,
            qk_norm: model_type == "qwen3",
            model_type,
        };
        config.checked(path)
    }

    /// Refuses shapes that cannot be a model.
    pub(crate) fn checked(self, path: &Path) -> Result<Self> {
        let fail = |problem: String| Err(Error::invalid(path, problem));
        if self.layers > MAX_LAYERS {
            return fail(format!("{} layers, at most {MAX_LAYERS} are possible", self.layers));
        }
        if self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            return fail(format!(
                "{} attention heads do not divide into {} key-value heads",
                self.heads, self.kv_heads
            ));
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) || self.head_dim > 4096 {
            return fail(format!("head_dim {} should be even and at most 4096", self.head_dim));
        }
        if !(self.rms_norm_eps >= 0.0 && self.rope_theta > 0.0) {
            return fail(format!(
                "rms_norm_eps {} or rope_theta {} is out of range",
                self.rms_norm_eps, self.rope_theta
            ));
        }
        if let RopeScaling::Factors(factors) = &self.rope_scaling
            && factors.len() != self.head_dim / 2
        {
            return fail(format!("{} rope factors for heads of {}", factors.len(), self.head_dim));
        }
        Ok(self)
    }

    /// The configuration as transformers reads it (`rope_theta` and `rope_scaling`, which 4 and 5 both accept).
    /// `dtype` is the name for `torch_dtype`.
    pub fn to_json(&self, dtype: &str) -> Value {
        let architecture = match self.model_type.as_str() {
            "mistral" => "MistralForCausalLM",
            "qwen2" => "Qwen2ForCausalLM",
            "qwen3" => "Qwen3ForCausalLM",
            _ => "LlamaForCausalLM",
        };
        let scaling = match &self.rope_scaling {
            RopeScaling::None | RopeScaling::Factors(_) => Value::Null,
            RopeScaling::Linear { factor } => serde_json::json!({ "rope_type": "linear", "factor": factor }),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => serde_json::json!({
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor, "original_max_position_embeddings": *original as u64,
            }),
            RopeScaling::Yarn { factor, beta_fast, beta_slow, original, attention_factor } => serde_json::json!({
                "rope_type": "yarn", "factor": factor, "beta_fast": beta_fast, "beta_slow": beta_slow,
                "original_max_position_embeddings": *original as u64, "attention_factor": attention_factor,
            }),
        };
        serde_json::json!({
            "architectures": [architecture], "model_type": self.model_type, "hidden_act": "silu",
            "hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim, "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta, "rope_scaling": scaling, "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": self.tied, "attention_bias": self.output_bias, "mlp_bias": self.mlp_bias,
            "torch_dtype": dtype,
        })
    }

    /// Rotary frequencies in radians a position (head_dim/2 of them), and the factor on sine and cosine.
    pub fn rotary(&self) -> (Vec<f64>, f64) {
        let d = self.head_dim as f64;
        let plain = (0..self.head_dim / 2).map(|i| self.rope_theta.powf(-2.0 * i as f64 / d));
        match &self.rope_scaling {
            RopeScaling::None => (plain.collect(), 1.0),
            RopeScaling::Linear { factor } => (plain.map(|f| f / factor).collect(), 1.0),
            RopeScaling::Factors(factors) => (plain.zip(factors).map(|(f, x)| f / x).collect(), 1.0),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                let stretch = |f: f64| {
                    let turns = original * f / TAU;
                    let keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                    keep * f + (1.0 - keep) * f / factor
                };
                (plain.map(stretch).collect(), 1.0)
            }
            RopeScaling::Yarn { factor, beta_fast, beta_slow, original, attention_factor } => {
                let dimension = |turns: f64| d * (original / (turns * TAU)).ln() / (2.0 * self.rope_theta.ln());
                let low = dimension(*beta_fast).floor().max(0.0);
                let high = dimension(*beta_slow).ceil().min(d - 1.0);
                let high = if high == low { high + 0.001 } else { high };
                let stretch = |(i, f): (usize, f64)| {
                    let stretched = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    stretched * f / factor + (1.0 - stretched) * f
                };
                (plain.enumerate().map(stretch).collect(), *attention_factor)
            }
        }
    }
}

fn short_str(text: &str) -> String {
    text.chars().take(40).collect()
}

fn rope_from_json(f: &Fields<'_>, max_positions: usize) -> Result<(f64, RopeScaling)> {
    let object = |key: &str| f.optional(key, "an object", |v| v.as_object().cloned());
    let inner = match object("rope_parameters")? {
        Some(parameters) => Some(parameters),
        None => object("rope_scaling")?,
    };
    let theta_above = f.number("rope_theta")?;
    let Some(inner) = inner else { return Ok((theta_above.unwrap_or(10_000.0), RopeScaling::None)) };
    let r = Fields { path: f.path, map: &inner };
    let theta = r.number("rope_theta")?.or(theta_above).unwrap_or(10_000.0);
    let kind = inner.get("rope_type").or_else(|| inner.get("type")).and_then(Value::as_str).unwrap_or("default");
    let factor = r.number("factor")?.unwrap_or(1.0);
    if factor < 1.0 {
        return Err(Error::invalid(f.path, format!("rope factor {factor} should be 1 or more")));
    }
    let original = r.number("original_max_position_embeddings")?.unwrap_or(max_positions as f64);
    let scaling = match kind {
        "default" => RopeScaling::None,
        // Up to the length the model was trained for, dynamic scaling is none; longer sequences are refused.
        "dynamic" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor },
        "llama3" => RopeScaling::Llama3 {
            factor,
            low_freq_factor: r.number("low_freq_factor")?.unwrap_or(1.0),
            high_freq_factor: r.number("high_freq_factor")?.unwrap_or(4.0),
            original,
        },
        "yarn" => RopeScaling::Yarn {
            factor,
            beta_fast: r.number("beta_fast")?.unwrap_or(32.0),
            beta_slow: r.number("beta_slow")?.unwrap_or(1.0),
            original,
            attention_factor: r.number("attention_factor")?.unwrap_or(0.1 * factor.ln() + 1.0),
        },
        other => {
            return Err(Error::invalid(
                f.path,
                format!("rope scaling `{}` is not one of default, linear, dynamic, llama3, yarn", short_str(other)),
            ));
        }
    };
    Ok((theta, scaling))
}
