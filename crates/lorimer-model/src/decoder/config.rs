//! Shape and constants of a decoder, whatever its family calls them.

use std::f64::consts::TAU;
use std::path::Path;

use lorimer_seam::{LayerShape, ModelShape, Site};
use lorimer_tensor::Activation;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::weights::gguf::HeadCounts;
use crate::weights::{LoadDtype, Weights};

/// On-disk name of the embedding.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
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
    /// Each frequency divided by its own factor (GGUF's `rope_freqs.weight`, LongRoPE).
    Factors {
        /// One a frequency.
        factors: Vec<f64>,
        /// Multiplies sine and cosine.
        attention_factor: f64,
    },
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

/// Rotary frequencies of some layers.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Their stretching.
    pub scaling: RopeScaling,
    /// Elements of a head that turn; the others do not.
    pub width: usize,
}

/// What one layer is beside its shape.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerKind {
    /// Which of [`DecoderConfig::ropes`] turns its queries and keys.
    pub rope: usize,
    /// How many keys a query sees, its own position included; None for all before it.
    pub window: Option<usize>,
}

/// Shape and constants of a decoder: what is common to its families, with what differs as data.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// transformers' `model_type`: `llama`, `qwen2`.
    pub model_type: String,
    /// Width of the hidden state.
    pub hidden_size: usize,
    /// Number of tokens known.
    pub vocab_size: usize,
    /// Shape of each layer.
    pub layers: Vec<LayerShape>,
    /// What each layer is beside that, as many as there are layers.
    pub kinds: Vec<LayerKind>,
    /// Frequencies of the layers, at least one.
    pub ropes: Vec<Rope>,
    /// ε of the norms.
    pub rms_norm_eps: f64,
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
    /// Norm of each query and key head before rotation (Qwen 3, Gemma 3).
    pub qk_norm: bool,
    /// Whether norms multiply by 1 + their weight (Gemma).
    pub norm_offset: bool,
    /// Whether what attention and unit give is normed before it is added, in names of their own (Gemma 2 and 3).
    pub output_norms: bool,
    /// Whether q, k, v are one projection, and gate and up another (Phi-3).
    pub fused: bool,
    /// The gated unit's.
    pub activation: Activation,
    /// What embeddings are multiplied by (Gemma).
    pub embedding_scale: Option<f64>,
    /// What products q·k are multiplied by; None for one over the root of a head's width.
    pub attention_scale: Option<f64>,
    /// Bound of attention scores (Gemma 2).
    pub attention_cap: Option<f64>,
    /// Bound of logits (Gemma 2).
    pub logit_cap: Option<f64>,
}

/// Typed look-ups in a JSON object with errors that name the key.
pub(crate) struct Fields<'a> {
    pub path: &'a Path,
    pub map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The fields of a configuration.
    pub fn of(json: &'a Value, path: &'a Path) -> Result<Self> {
        let map = json.as_object().ok_or_else(|| Error::invalid(path, "should hold a JSON object"))?;
        Ok(Self { path, map })
    }

    /// A text, short enough to be shown.
    pub fn text(&self, key: &str) -> Option<String> {
        self.map.get(key).and_then(Value::as_str).map(short_str)
    }

    /// Refuses another value than `known` of a key that is a text.
    pub fn only(&self, key: &str, known: &str) -> Result<()> {
        match self.text(key) {
            Some(other) if other != known => {
                Err(Error::invalid(self.path, format!("{key} `{other}` is not `{known}`")))
            }
            _ => Ok(()),
        }
    }

    pub fn optional<T>(&self, key: &str, kind: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => read(value)
                .map(Some)
                .ok_or_else(|| Error::invalid(self.path, format!("`{key}` should be {kind}, found {}", short(value)))),
        }
    }
    pub fn size(&self, key: &str) -> Result<Option<usize>> {
        self.optional(key, "a positive whole number", |v| {
            v.as_u64().filter(|&n| n > 0 && n < (1 << 32)).map(|n| n as usize)
        })
    }
    /// A whole number that may be zero.
    pub fn count(&self, key: &str) -> Result<Option<usize>> {
        self.optional(key, "a whole number", |v| v.as_u64().filter(|&n| n < (1 << 32)).map(|n| n as usize))
    }
    pub fn needed(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| Error::invalid(self.path, format!("has no `{key}`")))
    }
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.optional(key, "a finite number", |v| v.as_f64().filter(|n| n.is_finite()))
    }
    pub fn flag(&self, key: &str) -> Result<bool> {
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

impl DecoderConfig {
    /// A decoder of equal layers as Llama has it, for a family to change where it differs.
    pub(crate) fn plain(
        model_type: &str,
        hidden_size: usize,
        vocab_size: usize,
        shape: LayerShape,
        layers: usize,
    ) -> Self {
        let layers = layers.min(MAX_LAYERS + 1);
        Self {
            model_type: model_type.to_string(),
            hidden_size,
            vocab_size,
            layers: vec![shape; layers],
            kinds: vec![LayerKind::default(); layers],
            ropes: vec![Rope { theta: 10_000.0, scaling: RopeScaling::None, width: shape.head_dim }],
            rms_norm_eps: 1e-6,
            max_positions: 2048,
            tied: false,
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            qk_norm: false,
            norm_offset: false,
            output_norms: false,
            fused: false,
            activation: Activation::Silu,
            embedding_scale: None,
            attention_scale: None,
            attention_cap: None,
            logit_cap: None,
        }
    }

    /// The fields of `config.json` that all decoders have: sizes, norms, rotary frequencies, the longest sequence, ties.
    pub(crate) fn from_fields(f: &Fields<'_>, model_type: &str) -> Result<Self> {
        let (hidden_size, heads) = (f.needed("hidden_size")?, f.needed("num_attention_heads")?);
        let shape = LayerShape {
            heads,
            kv_heads: f.size("num_key_value_heads")?.unwrap_or(heads),
            head_dim: f.size("head_dim")?.unwrap_or(hidden_size / heads),
            inner: f.needed("intermediate_size")?,
        };
        let layers = f.needed("num_hidden_layers")?;
        let mut config = Self::plain(model_type, hidden_size, f.needed("vocab_size")?, shape, layers);
        let max_positions = f.size("max_position_embeddings")?.unwrap_or(2048);
        let (theta, scaling) = rope_from_json(f, max_positions)?;
        config.max_positions = scaling.reach(max_positions);
        config.ropes = vec![Rope { theta, scaling, width: shape.head_dim }];
        config.rms_norm_eps = f.number("rms_norm_eps")?.unwrap_or(1e-6);
        config.tied = f.flag("tie_word_embeddings")?;
        config.read_layer_shapes(f)?;
        Ok(config)
    }

    /// Gives the layers that `layer_types` calls sliding a window; whether there is such a list.
    pub(crate) fn read_layer_types(&mut self, f: &Fields<'_>, window: usize) -> Result<bool> {
        let Some(types) = f.optional("layer_types", "a list", |v| v.as_array().cloned())? else { return Ok(false) };
        if types.len() != self.kinds.len() {
            let problem = format!("`layer_types` has {} entries for {} layers", types.len(), self.kinds.len());
            return Err(Error::invalid(f.path, problem));
        }
        for (kind, name) in self.kinds.iter_mut().zip(&types) {
            kind.window = match name.as_str() {
                Some("full_attention") => None,
                Some("sliding_attention") => Some(window),
                _ => {
                    let problem = format!(
                        "`layer_types` has {}, which is not one of full_attention, sliding_attention",
                        short(name)
                    );
                    return Err(Error::invalid(f.path, problem));
                }
            };
        }
        Ok(true)
    }

    /// Shapes of layers that differ, from `layer_shapes`: an object a layer with any of `num_attention_heads`, `num_key_value_heads` and
    /// `intermediate_size`. Lorimer writes it for models of which heads or channels were taken out.
    fn read_layer_shapes(&mut self, f: &Fields<'_>) -> Result<()> {
        let Some(all) = f.optional("layer_shapes", "a list", |v| v.as_array().cloned())? else { return Ok(()) };
        if all.len() != self.layers.len() {
            let problem = format!("`layer_shapes` has {} entries for {} layers", all.len(), self.layers.len());
            return Err(Error::invalid(f.path, problem));
        }
        for (shape, own) in self.layers.iter_mut().zip(&all) {
            let own = Fields::of(own, f.path)?;
            if let Some(key) = own.map.keys().find(|key| !LAYER_KEYS.contains(&key.as_str())) {
                let problem = format!("`layer_shapes` has `{}`; it knows {}", short_str(key), LAYER_KEYS.join(", "));
                return Err(Error::invalid(f.path, problem));
            }
            shape.heads = own.size(LAYER_KEYS[0])?.unwrap_or(shape.heads);
            shape.kv_heads = own.size(LAYER_KEYS[1])?.unwrap_or(shape.kv_heads);
            shape.inner = own.size(LAYER_KEYS[2])?.unwrap_or(shape.inner);
        }
        Ok(())
    }

    /// Numbers of the model that do not depend on its weights.
    pub fn shape(&self) -> ModelShape {
        ModelShape {
            model_type: self.model_type.clone(),
            vocabulary: self.vocab_size,
            hidden: self.hidden_size,
            max_positions: self.max_positions,
            layers: self.layers.clone(),
            causal: true,
        }
    }

    /// Projections of a layer: name within it, and shape (outputs, inputs).
    pub(crate) fn layer_projections(&self, layer: &LayerShape) -> Vec<(&'static str, (usize, usize))> {
        let (h, q, kv, inner) = (self.hidden_size, layer.q_width(), layer.kv_width(), layer.inner);
        match self.fused {
            false => vec![
                ("self_attn.q_proj", (q, h)),
                ("self_attn.k_proj", (kv, h)),
                ("self_attn.v_proj", (kv, h)),
                ("self_attn.o_proj", (h, q)),
                ("mlp.gate_proj", (inner, h)),
                ("mlp.up_proj", (inner, h)),
                ("mlp.down_proj", (h, inner)),
            ],
            true => vec![
                ("self_attn.qkv_proj", (q + 2 * kv, h)),
                ("self_attn.o_proj", (h, q)),
                ("mlp.gate_up_proj", (2 * inner, h)),
                ("mlp.down_proj", (h, inner)),
            ],
        }
    }

    /// Every projection's site in the order of the forward, without loading anything.
    pub fn sites(&self) -> Vec<Site> {
        let of = |(i, layer): (usize, &LayerShape)| {
            let site = move |(name, shape)| Site::new(&format!("model.layers.{i}.{name}"), shape);
            self.layer_projections(layer).into_iter().map(site)
        };
        let head = Site::new("lm_head", (self.vocab_size, self.hidden_size));
        self.layers.iter().enumerate().flat_map(of).chain([head]).collect()
    }

    /// Bytes that the weights would take in memory under `dtype`, found without reading them.
    pub fn planned_bytes(&self, weights: &Weights, dtype: LoadDtype) -> Result<usize> {
        let mut bytes = weights.weight_bytes(EMBEDDING, (self.vocab_size, self.hidden_size), dtype)?;
        for site in self.sites().iter().filter(|site| !(site.is_head && self.tied)) {
            bytes += weights.weight_bytes(&site.weight_path(), (site.outputs, site.inputs), dtype)?;
        }
        Ok(bytes)
    }

    /// Heads of the attention, the first layer's.
    pub fn head_counts(&self) -> HeadCounts {
        let of = |layer: &LayerShape| (layer.heads, layer.kv_heads, layer.head_dim);
        let (heads, kv_heads, head_dim) = self.layers.first().map_or((1, 1, 2), of);
        HeadCounts { heads, kv_heads, head_dim }
    }

    /// Whether projections of this role add a bias.
    pub fn has_bias(&self, role: &str) -> bool {
        match role {
            "q_proj" | "k_proj" | "v_proj" | "qkv_proj" => self.qkv_bias,
            "o_proj" => self.output_bias,
            "gate_proj" | "up_proj" | "down_proj" | "gate_up_proj" => self.mlp_bias,
            _ => false,
        }
    }

    /// Refuses shapes that cannot be a model.
    pub fn checked(self, path: &Path) -> Result<Self> {
        let fail = |problem: String| Err(Error::invalid(path, problem));
        if self.layers.len() > MAX_LAYERS {
            return fail(format!("{} layers, at most {MAX_LAYERS} are possible", self.layers.len()));
        }
        for LayerShape { heads, kv_heads, head_dim, .. } in &self.layers {
            if *kv_heads == 0 || !heads.is_multiple_of(*kv_heads) {
                return fail(format!("{heads} attention heads do not divide into {kv_heads} key-value heads"));
            }
            if *head_dim == 0 || !head_dim.is_multiple_of(2) || *head_dim > 4096 {
                return fail(format!("head_dim {head_dim} should be even and at most 4096"));
            }
            if let Some(rope) = self.ropes.iter().find(|r| r.width > *head_dim || !r.width.is_multiple_of(2)) {
                return fail(format!("{} elements of heads of {head_dim} cannot turn", rope.width));
            }
        }
        for Rope { theta, scaling, width } in &self.ropes {
            if !(self.rms_norm_eps >= 0.0 && *theta > 0.0) {
                return fail(format!("rms_norm_eps {} or rope_theta {theta} is out of range", self.rms_norm_eps));
            }
            if let RopeScaling::Factors { factors, .. } = scaling
                && factors.len() != width / 2
            {
                return fail(format!("{} rope factors for heads of {width}", factors.len()));
            }
        }
        Ok(self)
    }

    /// The configuration as transformers reads it (`rope_theta` and `rope_scaling`, which 4 and 5 both accept), of a decoder that was read
    /// from GGUF. `dtype` is the name for `torch_dtype`.
    pub fn to_json(&self, dtype: &str) -> Value {
        let architecture = match self.model_type.as_str() {
            "mistral" => "MistralForCausalLM",
            "qwen2" => "Qwen2ForCausalLM",
            "qwen3" => "Qwen3ForCausalLM",
            _ => "LlamaForCausalLM",
        };
        let rope = &self.ropes[0];
        let scaling = match &rope.scaling {
            RopeScaling::None | RopeScaling::Factors { .. } => Value::Null,
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
        let layer = self.layers.first().copied().unwrap_or(LayerShape { heads: 0, kv_heads: 0, head_dim: 0, inner: 0 });
        serde_json::json!({
            "architectures": [architecture], "model_type": self.model_type, "hidden_act": "silu",
            "hidden_size": self.hidden_size, "intermediate_size": layer.inner,
            "vocab_size": self.vocab_size, "num_hidden_layers": self.layers.len(), "num_attention_heads": layer.heads,
            "num_key_value_heads": layer.kv_heads, "head_dim": layer.head_dim, "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": rope.theta, "rope_scaling": scaling, "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": self.tied, "attention_bias": self.output_bias, "mlp_bias": self.mlp_bias,
            "torch_dtype": dtype,
        })
    }

    /// Frequencies of each of [`Self::ropes`].
    pub fn frequencies(&self) -> Vec<(Vec<f64>, f64)> {
        self.ropes.iter().map(Rope::frequencies).collect()
    }
}

impl Rope {
    /// Radians a position (width/2 of them), and the factor on sine and cosine.
    pub fn frequencies(&self) -> (Vec<f64>, f64) {
        let d = self.width as f64;
        let plain = (0..self.width / 2).map(|i| self.theta.powf(-2.0 * i as f64 / d));
        match &self.scaling {
            RopeScaling::None => (plain.collect(), 1.0),
            RopeScaling::Linear { factor } => (plain.map(|f| f / factor).collect(), 1.0),
            RopeScaling::Factors { factors, attention_factor } => {
                (plain.zip(factors).map(|(f, x)| f / x).collect(), *attention_factor)
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                let stretch = |f: f64| {
                    let turns = original * f / TAU;
                    let keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                    keep * f + (1.0 - keep) * f / factor
                };
                (plain.map(stretch).collect(), 1.0)
            }
            RopeScaling::Yarn { factor, beta_fast, beta_slow, original, attention_factor } => {
                let dimension = |turns: f64| d * (original / (turns * TAU)).ln() / (2.0 * self.theta.ln());
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

/// Keys of an entry of `layer_shapes`.
const LAYER_KEYS: [&str; 3] = ["num_attention_heads", "num_key_value_heads", "intermediate_size"];

pub(crate) fn short_str(text: &str) -> String {
    text.chars().take(40).collect()
}

pub(crate) fn rope_from_json(f: &Fields<'_>, max_positions: usize) -> Result<(f64, RopeScaling)> {
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
