//! Shape and constants of a decoder, whatever its family calls them.

use std::path::Path;

use lorimer_seam::{Frequencies, LayerShape, ModelShape, Site};
use lorimer_tensor::Activation;
use serde_json::Value;

use super::fields::{Fields, short, short_str};
use super::rope::rope_from_json;
pub use super::rope::{Rope, RopeScaling};
use crate::error::{Error, Result};
use crate::weights::gguf::HeadCounts;
use crate::weights::{LoadDtype, Weights};

/// On-disk name of the embedding.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// More layers than any model has; bounds what a damaged file can ask for.
const MAX_LAYERS: usize = 1024;

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
            rotary_border: self.ropes.iter().filter_map(|rope| rope.border(self.max_positions)).min(),
        }
    }

    /// Projections of a layer: name within it, and shape (outputs, inputs).
    pub(crate) fn layer_projections(&self, layer: &LayerShape) -> Vec<(&'static str, (usize, usize))> {
        layer_projections(self.hidden_size, self.fused, layer)
    }

    /// Every projection's site in the order of the forward, without loading anything.
    pub fn sites(&self) -> Vec<Site> {
        sites_of(self.hidden_size, self.vocab_size, self.fused, &self.layers)
    }

    /// Numbers in the model's weights.
    pub fn parameter_count(&self) -> u64 {
        let of = |site: &Site| {
            let bias = if self.has_bias(&site.role) { site.outputs } else { 0 };
            (site.outputs as u64) * (site.inputs as u64) + bias as u64
        };
        let sites = self.sites();
        let projections: u64 = sites.iter().filter(|site| !(site.is_head && self.tied)).map(of).sum();
        let norms = if self.output_norms { 4 } else { 2 };
        let heads: usize = self.layers.iter().map(|layer| if self.qk_norm { 2 * layer.head_dim } else { 0 }).sum();
        let norms = (norms * self.layers.len() + 1) as u64 * self.hidden_size as u64 + heads as u64;
        projections + norms + (self.vocab_size as u64) * (self.hidden_size as u64)
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
            let lists = match scaling {
                RopeScaling::Factors { factors, .. } => vec![factors],
                RopeScaling::Long { short, long, .. } => vec![short, long],
                _ => Vec::new(),
            };
            if let Some(wrong) = lists.into_iter().find(|list| list.len() != width / 2) {
                return fail(format!("{} rope factors where {} pairs of elements turn", wrong.len(), width / 2));
            }
        }
        Ok(self)
    }

    /// The keys of a `config.json` that all decoders have (`rope_theta` and `rope_scaling`, which transformers 4 and 5 both accept).
    pub(crate) fn common_json(&self, dtype: &str) -> Value {
        let architecture = match self.model_type.as_str() {
            "mistral" => "MistralForCausalLM",
            "qwen2" => "Qwen2ForCausalLM",
            "qwen3" => "Qwen3ForCausalLM",
            _ => "LlamaForCausalLM",
        };
        let rope = &self.ropes[0];
        let scaling = match &rope.scaling {
            RopeScaling::None | RopeScaling::Factors { .. } => Value::Null,
            RopeScaling::Long { short, long, original, attention_factor } => serde_json::json!({
                "rope_type": "longrope", "short_factor": short, "long_factor": long,
                "original_max_position_embeddings": original, "attention_factor": attention_factor,
            }),
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
    pub fn frequencies(&self) -> Vec<Frequencies> {
        self.ropes.iter().map(Rope::all_frequencies).collect()
    }
}

/// Projections of a decoder's layer: name within it, and shape (outputs, inputs). `fused`: q, k, v are one, and gate and up another.
pub fn layer_projections(hidden: usize, fused: bool, layer: &LayerShape) -> Vec<(&'static str, (usize, usize))> {
    let (q, kv, inner) = (layer.q_width(), layer.kv_width(), layer.inner);
    match fused {
        false => vec![
            ("self_attn.q_proj", (q, hidden)),
            ("self_attn.k_proj", (kv, hidden)),
            ("self_attn.v_proj", (kv, hidden)),
            ("self_attn.o_proj", (hidden, q)),
            ("mlp.gate_proj", (inner, hidden)),
            ("mlp.up_proj", (inner, hidden)),
            ("mlp.down_proj", (hidden, inner)),
        ],
        true => vec![
            ("self_attn.qkv_proj", (q + 2 * kv, hidden)),
            ("self_attn.o_proj", (hidden, q)),
            ("mlp.gate_up_proj", (2 * inner, hidden)),
            ("mlp.down_proj", (hidden, inner)),
        ],
    }
}

/// The sites of a decoder with these layers, in the order of the forward, the head last.
pub fn sites_of(hidden: usize, vocabulary: usize, fused: bool, layers: &[LayerShape]) -> Vec<Site> {
    let of = |(i, layer): (usize, &LayerShape)| {
        let site = move |(name, shape)| Site::new(&format!("model.layers.{i}.{name}"), shape);
        layer_projections(hidden, fused, layer).into_iter().map(site)
    };
    layers.iter().enumerate().flat_map(of).chain([Site::new("lm_head", (vocabulary, hidden))]).collect()
}

/// Keys of an entry of `layer_shapes`.
pub const LAYER_KEYS: [&str; 3] = ["num_attention_heads", "num_key_value_heads", "intermediate_size"];
