//! The Llama family: Llama 1–3, SmolLM2, Mistral, Qwen 2, 2.5 and 3, as one frozen function over packed rows.
//!
//! A layer is `h += o(attend(rope(q), rope(k), v)); h += down(silu(gate)·up)` on normed inputs; Qwen 2 adds a
//! bias to q, k, v and Qwen 3 norms each head of q and k. Every projection goes through [`Adaptation::project`].

use candle_core::{DType, Result as TensorResult, Tensor};
use lorimer_tensor::{FrozenWeight, RotaryTable, Segment};

use crate::batch::{Batch, only_queries};
use crate::config::LlamaConfig;
use crate::error::{Error, Result};
use crate::seam::{Adaptation, AttentionCall, BaseModel, Point, Projection, Site};
use crate::weights::{LoadDtype, Weights};

/// A projection with its site.
struct Linear {
    site: Site,
    base: Projection,
}

impl Linear {
    fn load(weights: &Weights, path: &str, shape: (usize, usize), bias: bool) -> Result<Self> {
        let site = Site::new(path, shape);
        let weight = weights.weight(&site.weight_path(), shape)?;
        let bias = if bias { Some(weights.vector(&site.bias_path(), shape.0)?) } else { None };
        Ok(Self { base: Projection { weight, bias }, site })
    }

    fn forward(&self, x: &Tensor, adaptation: &dyn Adaptation) -> TensorResult<Tensor> {
        adaptation.project(&self.site, &self.base, x)
    }
}

/// Projections of one input.
fn all<const N: usize>(of: [&Linear; N], x: &Tensor, adaptation: &dyn Adaptation) -> TensorResult<[Tensor; N]> {
    let targets = of.map(|linear| (&linear.site, &linear.base));
    let found = adaptation.project_all(&targets, x)?;
    found.try_into().map_err(|_| candle_core::Error::Msg("an adaptation left out a projection".into()))
}

struct Norm {
    path: String,
    weight: Tensor,
    eps: f64,
}

impl Norm {
    fn load(weights: &Weights, module: &str, width: usize, eps: f64) -> Result<Self> {
        let path = format!("{module}.weight");
        Ok(Self { weight: weights.vector(&path, width)?, path, eps })
    }

    fn forward(&self, x: &Tensor, adaptation: &dyn Adaptation) -> TensorResult<Tensor> {
        adaptation.ops().rms_norm(x, adaptation.parameter(&self.path).unwrap_or(&self.weight), self.eps)
    }
}

struct Layer {
    input_norm: Norm,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    head_norms: Option<(Norm, Norm)>,
    post_norm: Norm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// Keys and values of one sequence, layer by layer.
#[derive(Clone, Default)]
pub struct KvCache {
    layers: Vec<(Tensor, Tensor)>,
    length: usize,
}

impl KvCache {
    /// Number of tokens held.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }
}

/// What every layer needs to know of the rows of a batch: see [`Llama::layout`].
pub struct Layout {
    segments: Vec<Segment>,
    table: RotaryTable,
    last: Option<Last>,
}

/// The rows that the last layer is to give.
struct Last {
    needed: Vec<u32>,
    segments: Vec<Segment>,
    table: RotaryTable,
}

/// A frozen model of the Llama family.
pub struct Llama {
    /// Shape and constants.
    pub config: LlamaConfig,
    embedding: FrozenWeight,
    layers: Vec<Layer>,
    norm: Norm,
    head: Linear,
    frequencies: (Vec<f64>, f64),
    dtype: DType,
}

/// On-disk name of the embedding.
pub const EMBEDDING: &str = "model.embed_tokens.weight";

impl Llama {
    /// Loads every tensor, checking each shape against the configuration.
    pub fn load(config: LlamaConfig, weights: &Weights) -> Result<Self> {
        let c = &config;
        let (h, q_width, kv_width) = (c.hidden_size, c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let embedding = weights.weight(EMBEDDING, (c.vocab_size, h))?;
        let mut layers = Vec::new();
        for i in 0..c.layers {
            let at = |name: &str| format!("model.layers.{i}.{name}");
            let linear = |name: &str, shape, bias| Linear::load(weights, &at(name), shape, bias);
            let norm = |name: &str, width| Norm::load(weights, &at(name), width, c.rms_norm_eps);
            layers.push(Layer {
                input_norm: norm("input_layernorm", h)?,
                q: linear("self_attn.q_proj", (q_width, h), c.qkv_bias)?,
                k: linear("self_attn.k_proj", (kv_width, h), c.qkv_bias)?,
                v: linear("self_attn.v_proj", (kv_width, h), c.qkv_bias)?,
                o: linear("self_attn.o_proj", (h, q_width), c.output_bias)?,
                head_norms: match c.qk_norm {
                    true => Some((norm("self_attn.q_norm", c.head_dim)?, norm("self_attn.k_norm", c.head_dim)?)),
                    false => None,
                },
                post_norm: norm("post_attention_layernorm", h)?,
                gate: linear("mlp.gate_proj", (c.intermediate_size, h), c.mlp_bias)?,
                up: linear("mlp.up_proj", (c.intermediate_size, h), c.mlp_bias)?,
                down: linear("mlp.down_proj", (h, c.intermediate_size), c.mlp_bias)?,
            });
        }
        let head_site = Site::new("lm_head", (c.vocab_size, h));
        let head_weight = match c.tied {
            true => embedding.clone(),
            false => weights.weight(&head_site.weight_path(), (c.vocab_size, h))?,
        };
        Ok(Self {
            embedding,
            layers,
            norm: Norm::load(weights, "model.norm", h, c.rms_norm_eps)?,
            head: Linear { site: head_site, base: Projection { weight: head_weight, bias: None } },
            frequencies: config.rotary(),
            dtype: weights.compute_dtype(),
            config,
        })
    }

    /// Every projection's site in the order of the forward, without loading anything.
    pub fn sites(c: &LlamaConfig) -> Vec<Site> {
        let (h, q_width, kv_width) = (c.hidden_size, c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let mut sites = Vec::new();
        for i in 0..c.layers {
            for (name, shape) in [
                ("self_attn.q_proj", (q_width, h)),
                ("self_attn.k_proj", (kv_width, h)),
                ("self_attn.v_proj", (kv_width, h)),
                ("self_attn.o_proj", (h, q_width)),
                ("mlp.gate_proj", (c.intermediate_size, h)),
                ("mlp.up_proj", (c.intermediate_size, h)),
                ("mlp.down_proj", (h, c.intermediate_size)),
            ] {
                sites.push(Site::new(&format!("model.layers.{i}.{name}"), shape));
            }
        }
        sites.push(Site::new("lm_head", (c.vocab_size, h)));
        sites
    }

    /// Bytes that the weights would take in memory under `dtype`, found without reading them.
    pub fn planned_bytes(config: &LlamaConfig, weights: &Weights, dtype: LoadDtype) -> Result<usize> {
        let mut bytes = weights.weight_bytes(EMBEDDING, (config.vocab_size, config.hidden_size), dtype)?;
        for site in Self::sites(config).iter().filter(|site| !(site.is_head && config.tied)) {
            bytes += weights.weight_bytes(&site.weight_path(), (site.outputs, site.inputs), dtype)?;
        }
        Ok(bytes)
    }

    /// Bytes that the weights take in memory.
    pub fn bytes(&self) -> usize {
        let tied = if self.config.tied { self.head.base.weight.bytes() } else { 0 };
        let projections: usize = self.projections().iter().map(|(_, p)| p.weight.bytes()).sum();
        self.embedding.bytes() + projections - tied
    }

    /// Refuses sequences that the model is not made for.
    pub fn check_length(&self, length: usize) -> Result<()> {
        if length > self.config.max_positions {
            return Err(Error::Unsupported(format!(
                "a sequence of {length} tokens is longer than the {} the model is made for",
                self.config.max_positions
            )));
        }
        Ok(())
    }

    /// Token rows to embeddings (rows, hidden).
    pub fn embed(&self, tokens: &[u32], adaptation: &dyn Adaptation) -> TensorResult<Tensor> {
        if let Some(bad) = tokens.iter().find(|&&t| t as usize >= self.config.vocab_size) {
            candle_core::bail!("token {bad} is outside the vocabulary of {}", self.config.vocab_size);
        }
        match adaptation.parameter(EMBEDDING) {
            Some(table) => adaptation.ops().subgraph(&[], &[table], |_| {
                table.index_select(&Tensor::from_slice(tokens, tokens.len(), table.device())?, 0)
            }),
            None => self.embedding.rows(tokens, self.dtype),
        }
    }

    /// Token rows to hidden states after the final norm (rows, hidden).
    pub fn hidden(&self, batch: &Batch, adaptation: &dyn Adaptation) -> TensorResult<Tensor> {
        let h = self.embed(&batch.tokens, adaptation)?;
        self.hidden_from(h, &batch.positions, &batch.segments, adaptation, None)
    }

    /// The next tokens of a sequence whose earlier ones are in `cache`, which then holds these too.
    pub fn hidden_cached(
        &self,
        tokens: &[u32],
        cache: &mut KvCache,
        adaptation: &dyn Adaptation,
    ) -> TensorResult<Tensor> {
        let (past, n) = (cache.length, tokens.len());
        let positions: Vec<usize> = (past..past + n).collect();
        let segment = Segment { q_start: 0, q_len: n, keys: vec![(0, past + n)] };
        let h = self.embed(tokens, adaptation)?;
        let h = self.hidden_from(h, &positions, &[segment], adaptation, Some(cache))?;
        cache.length += n;
        Ok(h)
    }

    /// Embeddings (rows, hidden) to hidden states after the final norm (rows, hidden).
    pub fn hidden_from(
        &self,
        embedded: Tensor,
        positions: &[usize],
        segments: &[Segment],
        adaptation: &dyn Adaptation,
        mut cache: Option<&mut KvCache>,
    ) -> TensorResult<Tensor> {
        let layout = self.layout(positions, segments, None);
        let mut h = adaptation.hidden(Point::Embedded, embedded)?;
        for i in 0..self.layers.len() {
            h = self.layer(i, &h, &layout, adaptation, cache.as_deref_mut())?;
        }
        self.finish(&h, adaptation)
    }

    /// What every layer needs to know of the rows. With `needed` (ascending), the last layer gives these rows only.
    pub fn layout(&self, positions: &[usize], segments: &[Segment], needed: Option<&[u32]>) -> Layout {
        let table = |positions: &[usize]| RotaryTable::new(positions, &self.frequencies.0, self.frequencies.1);
        let last = needed.map(|needed| Last {
            segments: only_queries(segments, needed),
            table: table(&needed.iter().map(|&row| positions[row as usize]).collect::<Vec<_>>()),
            needed: needed.to_vec(),
        });
        Layout { segments: segments.to_vec(), table: table(positions), last }
    }

    /// Number of layers.
    pub fn layer_count(&self) -> usize {
        self.layers.len()
    }

    /// One layer: hidden states (rows, hidden) → (rows, hidden).
    pub fn layer(
        &self,
        i: usize,
        h: &Tensor,
        layout: &Layout,
        adaptation: &dyn Adaptation,
        cache: Option<&mut KvCache>,
    ) -> TensorResult<Tensor> {
        let (layer, ops) = (&self.layers[i], adaptation.ops());
        let last = layout.last.as_ref().filter(|_| i + 1 == self.layers.len());
        let x = layer.input_norm.forward(h, adaptation)?;
        let (mut q, mut k, mut v);
        // In the last layer only the queries of some rows count from here on.
        let (h, segments, table) = match last {
            Some(l) => {
                [k, v] = all([&layer.k, &layer.v], &x, adaptation)?;
                q = layer.q.forward(&ops.rows(&x, &l.needed)?, adaptation)?;
                (ops.rows(h, &l.needed)?, &l.segments, &l.table)
            }
            None => {
                [q, k, v] = all([&layer.q, &layer.k, &layer.v], &x, adaptation)?;
                (h.clone(), &layout.segments, &layout.table)
            }
        };
        if let Some((q_norm, k_norm)) = &layer.head_norms {
            q = self.norm_heads(q, q_norm, adaptation)?;
            k = self.norm_heads(k, k_norm, adaptation)?;
        }
        (q, k) = (ops.rotary(&q, table)?, ops.rotary(&k, &layout.table)?);
        if let Some(cache) = cache {
            (k, v) = match cache.layers.get(i) {
                Some((old_k, old_v)) => (Tensor::cat(&[old_k, &k], 0)?, Tensor::cat(&[old_v, &v], 0)?),
                None => (k, v),
            };
            match cache.layers.get_mut(i) {
                Some(slot) => *slot = (k.clone(), v.clone()),
                None => cache.layers.push((k.clone(), v.clone())),
            }
        }
        let head_dim = self.config.head_dim;
        let call = AttentionCall { q, k, v, segments, head_dim, scale: (head_dim as f64).powf(-0.5) };
        let attended = adaptation.attend(Point::Layer(i), call)?;
        let h = ops.add(&h, &layer.o.forward(&attended, adaptation)?)?;
        let x = layer.post_norm.forward(&h, adaptation)?;
        let [gate, up] = all([&layer.gate, &layer.up], &x, adaptation)?;
        let gated = ops.silu_mul(&gate, &up)?;
        adaptation.hidden(Point::Layer(i), ops.add(&h, &layer.down.forward(&gated, adaptation)?)?)
    }

    /// The final norm.
    pub fn finish(&self, h: &Tensor, adaptation: &dyn Adaptation) -> TensorResult<Tensor> {
        adaptation.hidden(Point::Final, self.norm.forward(h, adaptation)?)
    }

    /// Σ −log p of one target for each row of hidden states (rows, hidden) after the final norm.
    pub fn loss(&self, hidden: &Tensor, targets: &[u32], adaptation: &dyn Adaptation) -> TensorResult<Tensor> {
        self.smoothed_loss(hidden, targets, 0.0, adaptation)
    }

    /// [`Self::loss`] with smoothed labels: [`lorimer_tensor::smoothed_cross_entropy`].
    pub fn smoothed_loss(
        &self,
        hidden: &Tensor,
        targets: &[u32],
        smoothing: f64,
        adaptation: &dyn Adaptation,
    ) -> TensorResult<Tensor> {
        let ops = adaptation.ops();
        match adaptation.touches(&self.head.site) {
            true => ops.cross_entropy(&self.logits(hidden, adaptation)?, targets, smoothing),
            false => ops.head_loss(hidden, &self.head.base.weight, targets, smoothing),
        }
    }

    fn norm_heads(&self, x: Tensor, norm: &Norm, adaptation: &dyn Adaptation) -> TensorResult<Tensor> {
        let (rows, width) = x.dims2()?;
        let d = self.config.head_dim;
        let ops = adaptation.ops();
        let heads = ops.reshape(&x, (rows * width / d, d))?;
        ops.reshape(&norm.forward(&heads, adaptation)?, (rows, width))
    }

    /// Hidden states (rows, hidden) to logits (rows, vocabulary).
    pub fn logits(&self, hidden: &Tensor, adaptation: &dyn Adaptation) -> TensorResult<Tensor> {
        self.head.forward(hidden, adaptation)
    }
}

impl BaseModel for Llama {
    fn projections(&self) -> Vec<(&Site, &Projection)> {
        let layers = self.layers.iter().flat_map(|l| [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down]);
        layers.chain([&self.head]).map(|linear| (&linear.site, &linear.base)).collect()
    }

    fn parameter(&self, path: &str) -> TensorResult<Option<Tensor>> {
        if path == EMBEDDING {
            return self.embedding.dense(self.dtype).map(Some);
        }
        let norms = self.layers.iter().flat_map(|l| {
            let heads = l.head_norms.iter().flat_map(|(q, k)| [q, k]);
            [&l.input_norm, &l.post_norm].into_iter().chain(heads)
        });
        Ok(norms.chain([&self.norm]).find(|n| n.path == path).map(|n| n.weight.clone()))
    }

    fn shared_with(&self, path: &str) -> Option<&str> {
        (self.config.tied && path == self.head.site.weight_path()).then_some(EMBEDDING)
    }

    fn parameter_names(&self) -> Vec<String> {
        let norms = self.layers.iter().flat_map(|l| {
            let heads = l.head_norms.iter().flat_map(|(q, k)| [&q.path, &k.path]);
            [&l.input_norm.path, &l.post_norm.path].into_iter().chain(heads)
        });
        std::iter::once(EMBEDDING.to_string()).chain(norms.cloned()).chain([self.norm.path.clone()]).collect()
    }

    fn dtype(&self) -> DType {
        self.dtype
    }
}
