//! A decoder as one frozen function over packed rows: pre-norm blocks of attention with rotary positions and a gated unit. What its families
//! have of their own is data in [`DecoderConfig`].

pub mod config;
pub(crate) mod fields;
pub mod gguf;
pub mod rope;

use candle_core::{DType, Result as TensorResult, Tensor};
use lorimer_seam::{
    Adaptation, AttentionCall, BaseModel, BlockScope, Frequencies, Input, KvCache, LayerShape, Layout, ModelShape,
    Point, Projection, Site,
};
use lorimer_tensor::{AttentionForm, FrozenWeight, Mask, Segment};

pub use self::config::{DecoderConfig, EMBEDDING};
use crate::error::Result;
use crate::linear::{Linear, Norm, project_all};
use crate::weights::Weights;

/// Queries, keys and values of one input.
// One a layer: what the smaller form wastes is nothing beside its weights.
#[allow(clippy::large_enum_variant)]
enum Attention {
    Apart { q: Linear, k: Linear, v: Linear },
    Fused(Linear),
}

/// The two sides of the gated unit.
enum Unit {
    Apart { gate: Linear, up: Linear },
    Fused(Linear),
}

struct Layer {
    shape: LayerShape,
    /// Which turns, and how attention sees.
    rope: usize,
    form: AttentionForm,
    input_norm: Norm,
    attention: Attention,
    head_norms: Option<(Norm, Norm)>,
    o: Linear,
    /// Of what the attention gives, where that is normed.
    attended_norm: Option<Norm>,
    unit_norm: Norm,
    unit: Unit,
    down: Linear,
    /// Of what the unit gives, where that is normed.
    output_norm: Option<Norm>,
}

impl Layer {
    fn load(c: &DecoderConfig, weights: &Weights, i: usize) -> Result<Self> {
        let (shape, kind) = (c.layers[i], c.kinds[i]);
        let projections = c.layer_projections(&shape);
        let at = |name: &str| format!("model.layers.{i}.{name}");
        let linear = |name: &str| {
            let role = name.rsplit('.').next().unwrap_or(name);
            let own = projections.iter().find(|(own, _)| *own == name).map_or((0, 0), |(_, shape)| *shape);
            Linear::load(weights, &at(name), own, c.has_bias(role))
        };
        let norm = |name: &str, width| Norm::load(weights, &at(name), width, c.rms_norm_eps, c.norm_offset);
        let h = c.hidden_size;
        let (attended_norm, unit_norm, output_norm) = match c.output_norms {
            true => (
                Some(norm("post_attention_layernorm", h)?),
                norm("pre_feedforward_layernorm", h)?,
                Some(norm("post_feedforward_layernorm", h)?),
            ),
            false => (None, norm("post_attention_layernorm", h)?, None),
        };
        let scale = c.attention_scale.unwrap_or_else(|| (shape.head_dim as f64).powf(-0.5));
        let mask = kind.window.map_or(Mask::Causal, Mask::Window);
        Ok(Self {
            shape,
            rope: kind.rope,
            form: AttentionForm { head_dim: shape.head_dim, scale, mask, cap: c.attention_cap },
            input_norm: norm("input_layernorm", h)?,
            attention: match c.fused {
                true => Attention::Fused(linear("self_attn.qkv_proj")?),
                false => Attention::Apart {
                    q: linear("self_attn.q_proj")?,
                    k: linear("self_attn.k_proj")?,
                    v: linear("self_attn.v_proj")?,
                },
            },
            head_norms: match c.qk_norm {
                true => Some((norm("self_attn.q_norm", shape.head_dim)?, norm("self_attn.k_norm", shape.head_dim)?)),
                false => None,
            },
            o: linear("self_attn.o_proj")?,
            attended_norm,
            unit_norm,
            unit: match c.fused {
                true => Unit::Fused(linear("mlp.gate_up_proj")?),
                false => Unit::Apart { gate: linear("mlp.gate_proj")?, up: linear("mlp.up_proj")? },
            },
            down: linear("mlp.down_proj")?,
            output_norm,
        })
    }

    /// In the order of the forward.
    fn linears(&self) -> Vec<&Linear> {
        let mut all = match &self.attention {
            Attention::Apart { q, k, v } => vec![q, k, v],
            Attention::Fused(qkv) => vec![qkv],
        };
        all.push(&self.o);
        match &self.unit {
            Unit::Apart { gate, up } => all.extend([gate, up]),
            Unit::Fused(both) => all.push(both),
        }
        all.push(&self.down);
        all
    }

    fn norms(&self) -> impl Iterator<Item = &Norm> {
        let heads = self.head_norms.iter().flat_map(|(q, k)| [q, k]);
        let outputs = self.attended_norm.iter().chain(&self.output_norm);
        [&self.input_norm, &self.unit_norm].into_iter().chain(heads).chain(outputs)
    }

    /// q, k and v of normed rows; of the queries only the rows `needed`, where not all are.
    fn attention_inputs(&self, x: &Tensor, needed: Option<&[u32]>, on: &dyn Adaptation) -> TensorResult<[Tensor; 3]> {
        let ops = on.ops();
        match (&self.attention, needed) {
            (Attention::Apart { q, k, v }, Some(needed)) => {
                let [k, v] = project_all([k, v], x, on)?;
                Ok([q.forward(&ops.rows(x, needed)?, on)?, k, v])
            }
            (Attention::Apart { q, k, v }, None) => project_all([q, k, v], x, on),
            (Attention::Fused(qkv), needed) => {
                let (q, kv) = (self.shape.q_width(), self.shape.kv_width());
                let [q, k, v] = ops.split(&qkv.forward(x, on)?, [q, kv, kv])?;
                Ok([needed.map_or_else(|| Ok(q.clone()), |needed| ops.rows(&q, needed))?, k, v])
            }
        }
    }

    fn gate_and_up(&self, x: &Tensor, on: &dyn Adaptation) -> TensorResult<[Tensor; 2]> {
        match &self.unit {
            Unit::Apart { gate, up } => project_all([gate, up], x, on),
            Unit::Fused(both) => on.ops().split(&both.forward(x, on)?, [self.shape.inner; 2]),
        }
    }
}

/// A frozen decoder.
pub struct Decoder {
    /// Shape and constants.
    pub config: DecoderConfig,
    shape: ModelShape,
    embedding: FrozenWeight,
    layers: Vec<Layer>,
    norm: Norm,
    head: Linear,
    frequencies: Vec<Frequencies>,
    dtype: DType,
}

impl Decoder {
    /// Loads every tensor, checking each shape against the configuration.
    pub fn load(config: DecoderConfig, weights: &Weights) -> Result<Self> {
        let c = &config;
        let embedding = weights.weight(EMBEDDING, (c.vocab_size, c.hidden_size))?;
        let layers = (0..c.layers.len()).map(|i| Layer::load(c, weights, i)).collect::<Result<Vec<_>>>()?;
        let head_site = Site::new("lm_head", (c.vocab_size, c.hidden_size));
        let head_weight = match c.tied {
            true => embedding.clone(),
            false => weights.weight(&head_site.weight_path(), (c.vocab_size, c.hidden_size))?,
        };
        Ok(Self {
            embedding,
            layers,
            norm: Norm::load(weights, "model.norm", c.hidden_size, c.rms_norm_eps, c.norm_offset)?,
            head: Linear::new(head_site, Projection { weight: head_weight, bias: None }),
            frequencies: config.frequencies(),
            dtype: weights.compute_dtype(),
            shape: config.shape(),
            config,
        })
    }

    fn norm_heads(&self, x: Tensor, norm: &Norm, d: usize, on: &dyn Adaptation) -> TensorResult<Tensor> {
        let (rows, width) = x.dims2()?;
        let ops = on.ops();
        let heads = ops.reshape(&x, (rows * width / d, d))?;
        ops.reshape(&norm.forward(&heads, on)?, (rows, width))
    }
}

impl BaseModel for Decoder {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn projections(&self) -> Vec<(&Site, &Projection)> {
        let layers = self.layers.iter().flat_map(Layer::linears);
        layers.chain([&self.head]).map(|linear| (&linear.site, &linear.base)).collect()
    }

    fn parameter(&self, path: &str) -> TensorResult<Option<Tensor>> {
        if path == EMBEDDING {
            return self.embedding.dense(self.dtype).map(Some);
        }
        let norms = self.layers.iter().flat_map(Layer::norms).chain([&self.norm]);
        Ok(norms.into_iter().find(|n| n.path() == path).map(|n| n.weight().clone()))
    }

    fn shared_with(&self, path: &str) -> Option<&str> {
        (self.config.tied && path == self.head.site.weight_path()).then_some(EMBEDDING)
    }

    fn parameter_names(&self) -> Vec<String> {
        let norms = self.layers.iter().flat_map(Layer::norms).chain([&self.norm]);
        std::iter::once(EMBEDDING.to_string()).chain(norms.map(|norm| norm.path().to_string())).collect()
    }

    fn stem_parameters(&self) -> Vec<String> {
        vec![EMBEDDING.to_string()]
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn bytes(&self) -> usize {
        let tied = if self.config.tied { self.head.base.weight.bytes() } else { 0 };
        let projections: usize = self.projections().iter().map(|(_, p)| p.weight.bytes()).sum();
        self.embedding.bytes() + projections - tied
    }

    fn stem(&self, input: Input<'_>, _: &[usize], on: &dyn Adaptation) -> TensorResult<Tensor> {
        let tokens = match input {
            Input::Tokens(tokens) => tokens,
            Input::Embeddings(rows) => return Ok(rows.clone()),
        };
        if let Some(bad) = tokens.iter().find(|&&t| t as usize >= self.config.vocab_size) {
            candle_core::bail!("token {bad} is outside the vocabulary of {}", self.config.vocab_size);
        }
        let ops = on.ops();
        let rows = match on.parameter(EMBEDDING) {
            Some(table) => ops.subgraph(&[], &[table], |_| {
                table.index_select(&Tensor::from_slice(tokens, tokens.len(), table.device())?, 0)
            })?,
            None => self.embedding.rows(tokens, self.dtype)?,
        };
        match self.config.embedding_scale {
            Some(scale) => ops.subgraph(&[&rows], &[], |t| &t[0] * scale),
            None => Ok(rows),
        }
    }

    fn layout(&self, positions: &[usize], segments: &[Segment], needed: Option<&[u32]>) -> Layout {
        let head = self.config.layers.first().map_or(0, |layer| layer.head_dim);
        Layout::new(positions, segments, needed, &self.frequencies, head)
    }

    fn block(
        &self,
        i: usize,
        h: &Tensor,
        layout: &Layout,
        on: &dyn Adaptation,
        cache: Option<&mut KvCache>,
    ) -> TensorResult<Tensor> {
        let (layer, ops) = (&self.layers[i], on.ops());
        let last = layout.last.as_ref().filter(|_| i + 1 == self.layers.len());
        let x = layer.input_norm.forward(h, on)?;
        // In the last layer only the queries of some rows count from here on.
        let [mut q, mut k, mut v] = layer.attention_inputs(&x, last.map(|l| l.needed.as_slice()), on)?;
        let (h, segments, turns) = match last {
            Some(l) => (ops.rows(h, &l.needed)?, &l.segments, &l.rotary),
            None => (h.clone(), &layout.segments, &layout.rotary),
        };
        if let Some((q_norm, k_norm)) = &layer.head_norms {
            q = self.norm_heads(q, q_norm, layer.shape.head_dim, on)?;
            k = self.norm_heads(k, k_norm, layer.shape.head_dim, on)?;
        }
        (q, k) = (ops.rotary(&q, &turns[layer.rope])?, ops.rotary(&k, &layout.rotary[layer.rope])?);
        let mut scope = BlockScope::new(i, last.is_none(), cache);
        (k, v) = scope.extend(k, v)?;
        let attended = on.attend(Point::Layer(i), AttentionCall { q, k, v, segments, form: layer.form }, &mut scope)?;
        let mut change = layer.o.forward(&attended, on)?;
        if let Some(norm) = &layer.attended_norm {
            change = norm.forward(&change, on)?;
        }
        let h = on.attended(ops.add(&h, &change)?, &mut scope)?;
        let x = layer.unit_norm.forward(&h, on)?;
        let unit = on.unit(i, &x)?;
        let on = unit.as_deref().unwrap_or(on);
        let [gate, up] = layer.gate_and_up(&x, on)?;
        let gated = ops.gated(self.config.activation, &gate, &up)?;
        let mut change = layer.down.forward(&gated, on)?;
        if let Some(norm) = &layer.output_norm {
            change = norm.forward(&change, on)?;
        }
        on.hidden(Point::Layer(i), ops.add(&h, &change)?)
    }

    fn end(&self, h: &Tensor, on: &dyn Adaptation) -> TensorResult<Tensor> {
        on.hidden(Point::Final, self.norm.forward(h, on)?)
    }

    fn logits(&self, hidden: &Tensor, on: &dyn Adaptation) -> TensorResult<Tensor> {
        let logits = self.head.forward(hidden, on)?;
        match self.config.logit_cap {
            Some(cap) => on.ops().subgraph(&[&logits], &[], |t| (&t[0] / cap)?.tanh()? * cap),
            None => Ok(logits),
        }
    }

    fn smoothed_loss(
        &self,
        hidden: &Tensor,
        targets: &[u32],
        smoothing: f64,
        on: &dyn Adaptation,
    ) -> TensorResult<Tensor> {
        match on.touches(&self.head.site) || self.config.logit_cap.is_some() {
            true => on.ops().cross_entropy(&self.logits(hidden, on)?, targets, smoothing),
            false => on.ops().head_loss(hidden, &self.head.base.weight, targets, smoothing),
        }
    }
}
