//! BERT and MiniLM: post-norm encoders with learned positions, in which every token of a text sees every other.
//!
//! The stem is `LN(word[t] + type[0] + position[p])`; a layer is `x = LN(dense(attend(q, k, v)) + x); x = LN(dense(act(dense(x))) + x)`, all
//! projections with biases. The pooler, where the file has one, is `tanh(dense(x))` of a text's first token.

use std::path::Path;

use candle_core::{DType, Result as TensorResult, Tensor, bail};
use lorimer_seam::{
    Adaptation, AttentionCall, BaseModel, BlockScope, Input, KvCache, LayerShape, Layout, ModelShape, Point,
    Projection, Site,
};
use lorimer_tensor::{Activation, AttentionForm, FrozenWeight, Mask, Segment};
use serde_json::Value;

use crate::decoder::fields::Fields;
use crate::error::{Error, Result};
use crate::linear::{Linear, project_all};
use crate::weights::{LoadDtype, Weights};

/// More layers than any model has; bounds what a damaged file can ask for.
const MAX_LAYERS: usize = 1024;
/// The stem's tables.
const TABLES: [&str; 3] = ["word_embeddings", "position_embeddings", "token_type_embeddings"];

/// Shape and constants of a BERT.
#[derive(Clone, Debug, PartialEq)]
pub struct BertConfig {
    /// Number of tokens known.
    pub vocab_size: usize,
    /// Width of the hidden state.
    pub hidden_size: usize,
    /// Number of layers.
    pub layers: usize,
    /// Heads of a layer.
    pub heads: usize,
    /// Width of the unit.
    pub inner: usize,
    /// The unit's activation.
    pub activation: Activation,
    /// ε of the norms.
    pub eps: f64,
    /// Number of positions.
    pub max_positions: usize,
    /// Number of token types.
    pub types: usize,
    /// What stands before every name in the file: nothing, or `bert.` where a model with a head was saved.
    pub prefix: String,
    /// Whether the file has a pooler.
    pub pooler: bool,
    /// What a norm's scale and shift are called: `weight` and `bias`, or the older `gamma` and `beta`.
    pub norm_names: [&'static str; 2],
}

impl BertConfig {
    /// Reads a `config.json`; `path` is for errors.
    pub fn from_json(json: &Value, path: &Path) -> Result<Self> {
        let f = Fields::of(json, path)?;
        f.only("position_embedding_type", "absolute")?;
        for key in ["is_decoder", "add_cross_attention"] {
            if f.flag(key)? {
                return Err(Error::invalid(path, format!("`{key}` is true; only encoders of the family are read")));
            }
        }
        if f.map.get("pruned_heads").and_then(Value::as_object).is_some_and(|heads| !heads.is_empty()) {
            return Err(Error::invalid(path, "`pruned_heads` names heads that were taken out, which is not read"));
        }
        let activation = match f.text("hidden_act").as_deref() {
            None | Some("gelu") => Activation::Gelu,
            Some("gelu_new" | "gelu_pytorch_tanh") => Activation::GeluTanh,
            Some("relu") => Activation::Relu,
            Some("silu" | "swish") => Activation::Silu,
            Some(other) => {
                let known = "gelu, gelu_new, gelu_pytorch_tanh, relu, silu, swish";
                return Err(Error::invalid(path, format!("hidden_act `{other}` is not one of {known}")));
            }
        };
        let or = |key: &str, default| f.size(key).map(|found| found.unwrap_or(default));
        let config = Self {
            vocab_size: or("vocab_size", 30522)?,
            hidden_size: or("hidden_size", 768)?,
            layers: or("num_hidden_layers", 12)?,
            heads: or("num_attention_heads", 12)?,
            inner: or("intermediate_size", 3072)?,
            activation,
            eps: f.number("layer_norm_eps")?.unwrap_or(1e-12),
            max_positions: or("max_position_embeddings", 512)?,
            types: or("type_vocab_size", 2)?,
            prefix: String::new(),
            pooler: true,
            norm_names: ["weight", "bias"],
        };
        let (hidden, heads) = (config.hidden_size, config.heads);
        if hidden % heads != 0 {
            let problem = format!("`hidden_size` {hidden} does not divide into {heads} heads");
            return Err(Error::invalid(path, problem));
        }
        if config.layers > MAX_LAYERS {
            let problem = format!("`num_hidden_layers` is {}, at most {MAX_LAYERS} are read", config.layers);
            return Err(Error::invalid(path, problem));
        }
        Ok(config)
    }

    /// Finds out what only the weights tell.
    pub(crate) fn resolve(&mut self, weights: &Weights) {
        if !weights.has(&self.table(0)) && weights.has(&format!("bert.{}", self.table(0))) {
            self.prefix = "bert.".into();
        }
        self.pooler = weights.has(&self.name("pooler.dense.weight"));
        if weights.has(&self.name("embeddings.LayerNorm.gamma")) {
            self.norm_names = ["gamma", "beta"];
        }
    }

    fn name(&self, of: &str) -> String {
        format!("{}{of}", self.prefix)
    }

    fn table(&self, which: usize) -> String {
        self.name(&format!("embeddings.{}.weight", TABLES[which]))
    }

    /// Rows of each of the stem's tables.
    fn table_rows(&self) -> [usize; 3] {
        [self.vocab_size, self.max_positions, self.types]
    }

    /// Numbers of the model that do not depend on its weights.
    pub fn shape(&self) -> ModelShape {
        let head_dim = self.hidden_size / self.heads;
        ModelShape {
            model_type: "bert".into(),
            vocabulary: self.vocab_size,
            hidden: self.hidden_size,
            max_positions: self.max_positions,
            layers: vec![
                LayerShape { heads: self.heads, kv_heads: self.heads, head_dim, inner: self.inner };
                self.layers
            ],
            rotary_border: None,
            causal: false,
        }
    }

    /// Projections of a layer: name within it, and shape (outputs, inputs).
    fn layer_projections(&self) -> [(&'static str, (usize, usize)); 6] {
        let (h, inner) = (self.hidden_size, self.inner);
        [
            ("attention.self.query", (h, h)),
            ("attention.self.key", (h, h)),
            ("attention.self.value", (h, h)),
            ("attention.output.dense", (h, h)),
            ("intermediate.dense", (inner, h)),
            ("output.dense", (h, inner)),
        ]
    }

    /// Every projection's site in the order of the forward.
    pub fn sites(&self) -> Vec<Site> {
        let of = |i: usize| {
            let site = move |(name, shape)| Site::new(&self.name(&format!("encoder.layer.{i}.{name}")), shape);
            self.layer_projections().into_iter().map(site)
        };
        let h = self.hidden_size;
        let pooler = self.pooler.then(|| Site::new(&self.name("pooler.dense"), (h, h)));
        (0..self.layers).flat_map(of).chain(pooler).collect()
    }

    /// Bytes that the weights would take in memory under `dtype`, found without reading them.
    pub fn planned_bytes(&self, weights: &Weights, dtype: LoadDtype) -> Result<usize> {
        let mut bytes = 0;
        for (which, rows) in self.table_rows().into_iter().enumerate() {
            bytes += weights.weight_bytes(&self.table(which), (rows, self.hidden_size), LoadDtype::F32)?;
        }
        for site in self.sites() {
            bytes += weights.weight_bytes(&site.weight_path(), (site.outputs, site.inputs), dtype)?;
        }
        Ok(bytes)
    }
}

/// A layer norm, whose scale and shift an adapter may bring.
struct LayerNorm {
    paths: [String; 2],
    parameters: [Tensor; 2],
    eps: f64,
}

impl LayerNorm {
    fn load(weights: &Weights, c: &BertConfig, module: &str) -> Result<Self> {
        let paths = c.norm_names.map(|name| c.name(&format!("{module}.{name}")));
        let [scale, shift] = &paths;
        let parameters = [weights.vector(scale, c.hidden_size)?, weights.vector(shift, c.hidden_size)?];
        Ok(Self { paths, parameters, eps: c.eps })
    }

    fn forward(&self, x: &Tensor, on: &dyn Adaptation) -> TensorResult<Tensor> {
        let own = |i: usize| on.parameter(&self.paths[i]).unwrap_or(&self.parameters[i]);
        on.ops().layer_norm(x, own(0), own(1), self.eps)
    }

    fn parameters(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.paths.iter().map(String::as_str).zip(&self.parameters)
    }
}

struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    attended: Linear,
    attended_norm: LayerNorm,
    up: Linear,
    down: Linear,
    output_norm: LayerNorm,
}

impl Layer {
    fn load(c: &BertConfig, weights: &Weights, i: usize) -> Result<Self> {
        let at = |name: &str| format!("encoder.layer.{i}.{name}");
        let [query, key, value, attended, up, down] = c.layer_projections();
        let linear = |(name, shape)| Linear::load(weights, &c.name(&at(name)), shape, true);
        Ok(Self {
            query: linear(query)?,
            key: linear(key)?,
            value: linear(value)?,
            attended: linear(attended)?,
            attended_norm: LayerNorm::load(weights, c, &at("attention.output.LayerNorm"))?,
            up: linear(up)?,
            down: linear(down)?,
            output_norm: LayerNorm::load(weights, c, &at("output.LayerNorm"))?,
        })
    }

    fn linears(&self) -> [&Linear; 6] {
        [&self.query, &self.key, &self.value, &self.attended, &self.up, &self.down]
    }
}

/// A frozen BERT.
pub struct Bert {
    /// Shape and constants.
    pub config: BertConfig,
    shape: ModelShape,
    /// The tables of words, positions and types.
    tables: [FrozenWeight; 3],
    norm: LayerNorm,
    layers: Vec<Layer>,
    pooler: Option<Linear>,
    dtype: DType,
}

impl Bert {
    /// Loads every tensor, checking each shape against the configuration.
    pub fn load(config: BertConfig, weights: &Weights) -> Result<Self> {
        let (c, h) = (&config, config.hidden_size);
        let rows = c.table_rows();
        // Tables are read by rows, of which few are used at a time: they are never packed.
        let table = |which: usize| weights.table(&c.table(which), (rows[which], h));
        let pooler = || Linear::load(weights, &c.name("pooler.dense"), (h, h), true);
        Ok(Self {
            tables: [table(0)?, table(1)?, table(2)?],
            norm: LayerNorm::load(weights, c, "embeddings.LayerNorm")?,
            layers: (0..c.layers).map(|i| Layer::load(c, weights, i)).collect::<Result<_>>()?,
            pooler: c.pooler.then(pooler).transpose()?,
            dtype: weights.compute_dtype(),
            shape: config.shape(),
            config,
        })
    }

    /// `tanh(dense(x))` of the rows that texts begin with: (texts, hidden).
    pub fn pool(&self, first: &Tensor, on: &dyn Adaptation) -> TensorResult<Tensor> {
        let Some(pooler) = &self.pooler else { bail!("the model has no pooler") };
        on.ops().subgraph(&[&pooler.forward(first, on)?], &[], |t| t[0].tanh())
    }

    fn norms(&self) -> impl Iterator<Item = &LayerNorm> {
        [&self.norm].into_iter().chain(self.layers.iter().flat_map(|l| [&l.attended_norm, &l.output_norm]))
    }

    /// Rows of a table, or of what an adapter has in its place.
    fn rows(&self, which: usize, ids: &[u32], on: &dyn Adaptation) -> TensorResult<Tensor> {
        let most = self.config.table_rows()[which];
        if let Some(bad) = ids.iter().find(|&&id| id as usize >= most) {
            bail!("{bad} is outside the {most} rows of {}", TABLES[which]);
        }
        match on.parameter(&self.config.table(which)) {
            Some(table) => on.ops().subgraph(&[], &[table], |_| {
                table.index_select(&Tensor::from_slice(ids, ids.len(), table.device())?, 0)
            }),
            None => self.tables[which].rows(ids, self.dtype),
        }
    }
}

impl BaseModel for Bert {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn projections(&self) -> Vec<(&Site, &Projection)> {
        let all = self.layers.iter().flat_map(Layer::linears).chain(&self.pooler);
        all.map(|linear| (&linear.site, &linear.base)).collect()
    }

    fn parameter(&self, path: &str) -> TensorResult<Option<Tensor>> {
        if let Some(which) = (0..3).find(|&which| self.config.table(which) == path) {
            return self.tables[which].dense(self.dtype).map(Some);
        }
        let found = self.norms().flat_map(LayerNorm::parameters).find(|(own, _)| *own == path);
        Ok(found.map(|(_, tensor)| tensor.clone()))
    }

    fn parameter_names(&self) -> Vec<String> {
        let norms = self.norms().flat_map(LayerNorm::parameters).map(|(path, _)| path.to_string());
        (0..3).map(|which| self.config.table(which)).chain(norms).collect()
    }

    fn stem_parameters(&self) -> Vec<String> {
        let norm = self.norm.parameters().map(|(path, _)| path.to_string());
        (0..3).map(|which| self.config.table(which)).chain(norm).collect()
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn bytes(&self) -> usize {
        let tables: usize = self.tables.iter().map(FrozenWeight::bytes).sum();
        tables + self.projections().iter().map(|(_, p)| p.weight.bytes()).sum::<usize>()
    }

    fn stem(&self, input: Input<'_>, positions: &[usize], on: &dyn Adaptation) -> TensorResult<Tensor> {
        let words = match input {
            Input::Tokens(tokens) => self.rows(0, tokens, on)?,
            Input::Embeddings(rows) => rows.clone(),
        };
        let ops = on.ops();
        let at: Vec<u32> = positions.iter().map(|&p| u32::try_from(p).unwrap_or(u32::MAX)).collect();
        let h = ops.add(&words, &self.rows(2, &vec![0; at.len()], on)?)?;
        self.norm.forward(&ops.add(&h, &self.rows(1, &at, on)?)?, on)
    }

    /// All rows come out of the last block, whichever are needed.
    fn layout(&self, _: &[usize], segments: &[Segment], _: Option<&[u32]>) -> Layout {
        Layout { segments: segments.to_vec(), rotary: Vec::new(), last: None }
    }

    fn block(
        &self,
        i: usize,
        h: &Tensor,
        layout: &Layout,
        on: &dyn Adaptation,
        cache: Option<&mut KvCache>,
    ) -> TensorResult<Tensor> {
        if cache.is_some() {
            bail!("a `bert` model reads whole texts; it does not go on with what it has read");
        }
        let (layer, ops) = (&self.layers[i], on.ops());
        let [q, k, v] = project_all([&layer.query, &layer.key, &layer.value], h, on)?;
        let head_dim = self.config.hidden_size / self.config.heads;
        let scale = (head_dim as f64).powf(-0.5);
        let form = AttentionForm { head_dim, scale, mask: Mask::Full, cap: None };
        let mut scope = BlockScope::new(i, true, None);
        let call = AttentionCall { q, k, v, segments: &layout.segments, form };
        let attended = on.attend(Point::Layer(i), call, &mut scope)?;
        let change = layer.attended.forward(&attended, on)?;
        let x = layer.attended_norm.forward(&ops.add(&change, h)?, on)?;
        let x = on.attended(x, &mut scope)?;
        let inner = ops.activate(self.config.activation, &layer.up.forward(&x, on)?)?;
        let change = layer.down.forward(&inner, on)?;
        on.hidden(Point::Layer(i), layer.output_norm.forward(&ops.add(&change, &x)?, on)?)
    }

    fn end(&self, h: &Tensor, on: &dyn Adaptation) -> TensorResult<Tensor> {
        on.hidden(Point::Final, h.clone())
    }
}
