//! # Sparse-GIN: the attention map as a graph, and a small trained graph layer on it
//!
//! Buehler 2025, *Graph-Aware Isomorphic Attention for Adaptive Dynamics in Transformers*, arXiv 2501.02393, the part on fine-tuning. No projection is
//! changed. Each block's attention maps A^h (rows, rows) are summed over the query heads, S = min(1, Σ_h A^h), and sums that are large become
//! weighted edges from a token to itself and to tokens before it: `w_ij = σ(a (S_ij − τ))` where that is above θ, else none; so an edge is there where
//! S_ij > τ + ln(θ/(1 − θ))/a, 0.1405 unless told otherwise. On the hidden state h (H) after the attention's residual, before the next norm:
//!
//! `p_i = W_in h_i + b`, `u_i = ε p_i + Σ_j w_ij p_j`, `v_i = W₂ φ(W₁ u_i + b₁) + b₂ + u_i`, `g_i = W_out dropout(φ(v_i)) + b`, `h_i ← h_i + λ RMSNorm(g_i)`
//!
//! with φ a PReLU of one slope (from 0.25), ε from 0, the norm's gain from 1 and its epsilon 1e-5, W_in (d, H), W₁ and W₂ (d, d), W_out (H, d). λ is trained and
//! starts at a value that goes with the layers from the first to the second number of `gin_scale`. All this is trained, a block by itself; which sums are
//! edges has no gradient, their weights have, into the blocks below. Linear layers start as N(0, 0.02²) without bias, which is what the authors' code
//! comes to (transformers fills in what a checkpoint lacks), or with `start` = `uniform` as torch's do, ±1/√inputs.
//!
//! `direction`: `causal` is the above. `reference` is what the authors' code computes: it turns its edges round and then keeps those that lead to later
//! tokens, so that of each token's edges the one to itself is left, u_i = (ε + w_ii) p_i, and no token sees another. `input` = `normed` divides h by its
//! root mean square first; `first_token` = `drop` leaves out edges to the first token of a sequence, on which attention rests where it looks at nothing
//! and whose hidden state is larger than the others' by far.
//!
//! The start is not the base: the norm gives the branch unit size whatever the weights are. With `gin_scale` = `[0, 0]` it is, and only λ learns at first.
//!
//! Refused by name: the code's other graphs (mean, any head, learned, one a head), binary edges, several layers, the layer after or beside the unit.
//!
//! Trainable parameters of a block: `2Hd + 2d² + 3d + 2H + 3`. Decoding keeps p, d numbers a token and block, beside keys and values. There is no weight
//! that gives the same: it cannot be merged, exported or switched in place, and is used alone.
//!
//! Meant for: looking at what attention's graph is worth. On the sentiment texts it does not do better than a LoRA of as many parameters
//! (docs/comparison.md). A step takes more than a LoRA's, as the map is formed a second time and the layers are many small operations.
//!
//! ```
//! use lorimer_adapter::methods::sparse_gin::SparseGinConfig;
//! let settings = SparseGinConfig::default();
//! assert!((settings.least_sum() - (0.1 + (0.6f64 / 0.4).ln() / 10.0)).abs() < 1e-12);
//! // d = 155 on 30 layers of width 576.
//! assert_eq!(30 * settings.parameters_of(576), 6_846_900);
//! ```

mod layer;

use candle_core::{DType, Device, Result as TensorResult, Tensor};
use lorimer_model::{Projection, Site};
use lorimer_tensor::{EdgeKeys, EdgeRule};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use self::layer::{Linear, SparseGin};
use super::entry::{Entry, Served};
use super::random::{kaiming, normal, uniform};
use crate::block::{BlockDelta, BlockSite};
use crate::delta::Delta;
use crate::dropout::{Dropout, check_dropout};
use crate::error::{Error, Result};
use crate::file::keys::FileKeys;
use crate::method::{BlockMethod, Method, ParameterSource};
use crate::settings::{PeftKeys, configure, from_peft_json, peft_json};
use crate::targets::{Indices, Names, Targeting};

/// Settings of the authors' code whose other values are not built, with what they ask for.
const REFUSED: &[(&str, &str)] = &[
    ("adj_construction_method", "forms the graph otherwise than from the sum over heads"),
    ("gnn_mode", "has a graph and a layer for each head"),
    ("gnn_logic", "puts the layer after the unit or beside it"),
    ("zero_below_epsilon_threshold", "makes edges binary or keeps all of them"),
    ("num_layers", "puts several layers one after the other"),
    ("target_modules", "names projections, and this method changes blocks; choose them with layers_to_transform"),
    ("modules_to_save", "brings whole modules"),
];

const PEFT_KEYS: PeftKeys = PeftKeys { inert: &[], refused: REFUSED };

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "sparse-gin",
    title: "A graph layer on the attention map after each attention",
    paper: "arXiv 2501.02393",
    kind: "block",
    variants: &[],
    peft_type: "SPARSE_GIN",
    mergeable: false,
    served: Served::Batched,
    lr: 1e-3,
    parts: &[],
    flags: &[("rank", "gin_dim"), ("dropout", "gin_dropout"), ("init", "start")],
    source: include_str!("sparse_gin.rs"),
    laws: &[
        (r#"{"gin_dim": 5, "gin_scale": [0, 0]}"#, 0.0),
        (r#"{"gin_dim": 4, "input": "normed", "first_token": "drop", "start": "uniform"}"#, f64::INFINITY),
        (r#"{"gin_dim": 4, "direction": "reference", "gin_dropout": 0.2}"#, f64::INFINITY),
    ],
    build: |settings| {
        if let Some((key, why)) = REFUSED.iter().find(|(key, _)| settings.contains_key(*key)) {
            return Err(Error::Config(format!("`sparse-gin` does not take `{key}`: it {why}")));
        }
        configure::<SparseGinConfig>("sparse-gin", settings)?.checked()
    },
    recognises: |config| config.get("peft_type").and_then(Value::as_str) == Some("SPARSE_GIN"),
    from_file: |config| from_peft_json::<SparseGinConfig>("sparse-gin", config, &PEFT_KEYS)?.checked(),
};

/// Sparse-GIN's settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SparseGinConfig {
    /// Width d of the graph layer.
    pub gin_dim: usize,
    /// Probability of zeroing an element before W_out, in training; the authors' run has 0.1.
    pub gin_dropout: f64,
    /// a: how sharply an edge's weight follows the sum.
    pub edge_sharpness: f64,
    /// τ: the sum at which a weight is 1/2.
    pub edge_threshold: f64,
    /// θ: the weight above which there is an edge.
    pub edge_cut: f64,
    /// λ at the start, of the first block and of the last: `[0, 0.5]` or `"0:0.5"`.
    pub gin_scale: Ramp,
    /// Which edges count: `causal`, to the token itself and to those before it; `reference`, to itself.
    pub direction: Direction,
    /// What the layer reads: `raw`, the hidden state; `normed`, divided by its root mean square.
    pub input: InputNorm,
    /// Edges to the first token of a sequence: `keep` or `drop`.
    pub first_token: FirstToken,
    /// Linear layers at the start: `normal`, N(0, 0.02²) and no bias; `uniform`, ±1/√inputs.
    pub start: Start,
    /// Only these blocks, counted from 0.
    pub layers_to_transform: Option<Indices>,
    #[serde(skip, default = "no_projection")]
    targeting: Targeting,
}

fn no_projection() -> Targeting {
    Targeting { target_modules: Names::List(Vec::new()), ..Targeting::default() }
}

/// λ at the start, of the first block and of the last.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "[f64; 2]")]
pub struct Ramp(pub f64, pub f64);

impl From<Ramp> for [f64; 2] {
    fn from(ramp: Ramp) -> Self {
        [ramp.0, ramp.1]
    }
}

impl TryFrom<Value> for Ramp {
    type Error = String;

    fn try_from(value: Value) -> std::result::Result<Self, String> {
        let two = |parts: Vec<Option<f64>>| match parts[..] {
            [Some(a), Some(b)] => Some(Self(a, b)),
            _ => None,
        };
        let found = match &value {
            Value::String(text) => two(text.split(':').map(|part| part.trim().parse().ok()).collect()),
            Value::Array(list) => two(list.iter().map(Value::as_f64).collect()),
            _ => None,
        };
        found.ok_or_else(|| "gin_scale should be two numbers, as [0, 0.5] or 0:0.5".into())
    }
}

/// Which edges count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// To the token itself and to those before it.
    #[default]
    Causal,
    /// To the token itself, as in the authors' code.
    Reference,
}

/// What the layer reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InputNorm {
    /// The hidden state.
    #[default]
    Raw,
    /// The hidden state over its root mean square.
    Normed,
}

/// What becomes of edges to the first token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FirstToken {
    /// They count.
    #[default]
    Keep,
    /// They do not, but for its own.
    Drop,
}

/// How linear layers start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// N(0, 0.02²), biases 0.
    #[default]
    Normal,
    /// Uniform in ±1/√inputs, biases too.
    Uniform,
}

impl Default for SparseGinConfig {
    fn default() -> Self {
        Self {
            gin_dim: 155,
            gin_dropout: 0.0,
            edge_sharpness: 10.0,
            edge_threshold: 0.1,
            edge_cut: 0.6,
            gin_scale: Ramp(0.0, 0.5),
            direction: Direction::Causal,
            input: InputNorm::Raw,
            first_token: FirstToken::Keep,
            start: Start::Normal,
            layers_to_transform: None,
            targeting: no_projection(),
        }
    }
}

/// Below this a row has so many edges that the graph is no longer sparse.
const LEAST_SUM: f64 = 0.01;

impl SparseGinConfig {
    /// The sum above which there is an edge: τ + ln(θ/(1 − θ))/a; infinite from θ = 1 on.
    pub fn least_sum(&self) -> f64 {
        match self.edge_cut >= 1.0 {
            true => f64::INFINITY,
            false => self.edge_threshold + (self.edge_cut / (1.0 - self.edge_cut)).ln() / self.edge_sharpness,
        }
    }

    /// Trainable parameters of a block of width `hidden`.
    pub fn parameters_of(&self, hidden: usize) -> usize {
        let d = self.gin_dim;
        2 * hidden * d + 2 * d * d + 3 * d + 2 * hidden + 3
    }

    fn checked(self) -> Result<Box<dyn Method>> {
        let fail = |text: String| Err(Error::Config(text));
        if self.gin_dim == 0 || self.gin_dim > 1 << 14 {
            return fail(format!("gin_dim = {} should be between 1 and 16384", self.gin_dim));
        }
        check_dropout("gin_dropout", self.gin_dropout)?;
        if !(self.edge_sharpness > 0.0 && self.edge_sharpness <= 1e4) {
            return fail(format!("edge_sharpness = {} should be above 0 and at most 10000", self.edge_sharpness));
        }
        if !(self.edge_threshold.is_finite() && self.edge_cut > 0.0 && self.edge_cut.is_finite()) {
            return fail("edge_threshold should be a number and edge_cut one above 0".into());
        }
        if self.least_sum() < LEAST_SUM {
            return fail(format!(
                "edge_threshold, edge_cut and edge_sharpness make edges of all sums above {:.4}, which should be at least {LEAST_SUM}: a row may have heads over so many",
                self.least_sum()
            ));
        }
        let Ramp(first, last) = self.gin_scale;
        if !(first.abs() <= 1e3 && last.abs() <= 1e3) {
            return fail("gin_scale should be two numbers between −1000 and 1000".into());
        }
        Ok(Box::new(self))
    }

    /// λ at the start.
    fn scale(&self, block: &BlockSite) -> f64 {
        let Ramp(first, last) = self.gin_scale;
        first + (last - first) * block.layer as f64 / (block.layers.saturating_sub(1)).max(1) as f64
    }

    /// A linear layer (outputs, inputs) with its bias.
    fn linear(
        &self,
        source: &mut ParameterSource<'_>,
        keys: [&'static str; 2],
        shape: (usize, usize),
    ) -> Result<Linear> {
        let dtype = source.dtype();
        let weight = source.trainable(keys[0], &[shape.0, shape.1], |rng| {
            Ok(match self.start {
                Start::Normal => (normal(shape, rng)? * 0.02)?,
                Start::Uniform => kaiming(shape, dtype, rng)?,
            })
        })?;
        let bias = source.trainable(keys[1], &[shape.0], |rng: &mut ChaCha8Rng| {
            Ok(match self.start {
                Start::Normal => Tensor::zeros(shape.0, dtype, &Device::Cpu)?,
                Start::Uniform => uniform((1, shape.0), (shape.1 as f64).powf(-0.5), dtype, rng)?.squeeze(0)?,
            })
        })?;
        Ok(Linear { weight, bias, keys })
    }
}

impl Method for SparseGinConfig {
    fn file_keys(&self) -> FileKeys {
        FileKeys { block: &["sparse_gin."], ..FileKeys::default() }
    }

    fn name(&self) -> &'static str {
        "sparse-gin"
    }

    fn targeting(&self) -> &Targeting {
        &self.targeting
    }

    fn config(&self) -> Map<String, Value> {
        peft_json("SPARSE_GIN", self)
    }

    fn blocks(&self) -> Option<&dyn BlockMethod> {
        Some(self)
    }

    fn attach(&self, site: &Site, _: &Projection, _: &mut ParameterSource<'_>) -> Result<Box<dyn Delta>> {
        Err(Error::Config(format!("`sparse-gin` changes blocks, and no projection such as `{}`", site.path)))
    }

    fn parameters(&self, _: &Site) -> Result<usize> {
        Ok(0)
    }

    fn rows_are_independent(&self) -> bool {
        self.gin_dropout == 0.0
    }

    fn not_additive(&self) -> Option<&'static str> {
        Some("its layer is no summand of a weight, and keeps what it reads of every token")
    }

    fn remarks(&self, tensors: &std::collections::BTreeMap<String, Tensor>) -> Result<Vec<(String, f64)>> {
        let number = |(key, name): (&str, &str)| {
            let t = tensors.get(key).filter(|t| t.elem_count() == 1)?;
            Some(
                t.to_dtype(DType::F64)
                    .and_then(|t| t.flatten_all()?.get(0)?.to_scalar())
                    .map(|v| (name.to_string(), v)),
            )
        };
        Ok([("scale", "lambda"), ("eps", "epsilon")].into_iter().filter_map(number).collect::<TensorResult<_>>()?)
    }
}

impl BlockMethod for SparseGinConfig {
    fn module(&self) -> &'static str {
        "sparse_gin"
    }

    fn targets(&self, layer: usize) -> bool {
        match &self.layers_to_transform {
            None => true,
            Some(Indices::One(i)) => *i == layer,
            Some(Indices::Many(list)) => list.is_empty() || list.contains(&layer),
        }
    }

    fn attach(&self, block: &BlockSite, source: &mut ParameterSource<'_>) -> Result<Option<Box<dyn BlockDelta>>> {
        if !self.targets(block.layer) {
            return Ok(None);
        }
        let (d, hidden, dtype) = (self.gin_dim, block.site.inputs, source.dtype());
        let into = self.linear(source, ["in.weight", "in.bias"], (d, hidden))?;
        let first = self.linear(source, ["fc1.weight", "fc1.bias"], (d, d))?;
        let second = self.linear(source, ["fc2.weight", "fc2.bias"], (d, d))?;
        let out = self.linear(source, ["out.weight", "out.bias"], (hidden, d))?;
        let mut vector = |key: &str, n: usize, value: f64| {
            source.trainable(key, &[n], |_| Ok((Tensor::ones(n, DType::F64, &Device::Cpu)? * value)?))
        };
        let (act, eps, scale) =
            (vector("act", 1, 0.25)?, vector("eps", 1, 0.0)?, vector("scale", 1, self.scale(block))?);
        let gain = vector("norm.weight", hidden, 1.0)?;
        let keys = match (self.direction, self.first_token) {
            (Direction::Reference, _) => EdgeKeys::Own,
            (Direction::Causal, FirstToken::Keep) => EdgeKeys::All,
            (Direction::Causal, FirstToken::Drop) => EdgeKeys::WithoutFirst,
        };
        Ok(Some(Box::new(SparseGin {
            linears: [into, first, second, out],
            act,
            eps,
            gain,
            scale,
            rule: EdgeRule { above: self.least_sum(), keys },
            sharpness: self.edge_sharpness,
            threshold: self.edge_threshold,
            ones: (self.input == InputNorm::Normed).then(|| Tensor::ones(hidden, dtype, &Device::Cpu)).transpose()?,
            dropout: Dropout::new(self.gin_dropout, &block.site.path),
        })))
    }

    fn parameters(&self, block: &BlockSite) -> usize {
        self.parameters_of(block.site.inputs)
    }

    fn activations_per_row(&self, block: &BlockSite) -> usize {
        // The hidden state before, g, its norm and λ times that; and of the inner states with their activations.
        let normed = if self.input == InputNorm::Normed { block.site.inputs } else { 0 };
        4 * block.site.inputs + normed + 13 * self.gin_dim
    }
}
