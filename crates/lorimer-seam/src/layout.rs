//! Shapes of a model and its layers, and what its blocks need to know of a batch's rows.

use candle_core::{Result, Tensor};
use lorimer_tensor::{RotaryTable, Segment};

use crate::batch::only_queries;

/// Shape of one layer's attention and unit. Layers of one model may differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerShape {
    /// Query heads.
    pub heads: usize,
    /// Key-value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Width of the unit between the two projections after the attention.
    pub inner: usize,
}

impl LayerShape {
    /// Width of all queries of a row.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all keys of a row.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// Numbers of a model that do not depend on its weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelShape {
    /// transformers' name of the family: `llama`, `bert`.
    pub model_type: String,
    /// Number of tokens known.
    pub vocabulary: usize,
    /// Width of the hidden state.
    pub hidden: usize,
    /// Longest sequence that the model is made for.
    pub max_positions: usize,
    /// Its layers.
    pub layers: Vec<LayerShape>,
    /// Whether a row sees only rows before it, so that what sequences begin with in common can be computed once, and tokens can be generated.
    pub causal: bool,
}

impl ModelShape {
    /// The widest keys of all layers.
    pub fn kv_width(&self) -> usize {
        self.layers.iter().map(LayerShape::kv_width).max().unwrap_or(0)
    }
}

/// What a forward begins with, one a row.
pub enum Input<'a> {
    /// Token ids.
    Tokens(&'a [u32]),
    /// In place of the token embeddings: (rows, hidden).
    Embeddings(&'a Tensor),
}

/// Keys and values of one sequence, layer by layer.
#[derive(Clone, Default)]
pub struct KvCache {
    layers: Vec<(Tensor, Tensor)>,
    pub(crate) length: usize,
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

    /// Adds keys and values of new rows to a layer's; all of them.
    pub fn extend(&mut self, layer: usize, k: Tensor, v: Tensor) -> Result<(Tensor, Tensor)> {
        let all = match self.layers.get(layer) {
            Some((old_k, old_v)) => (Tensor::cat(&[old_k, &k], 0)?, Tensor::cat(&[old_v, &v], 0)?),
            None => (k, v),
        };
        match self.layers.get_mut(layer) {
            Some(slot) => *slot = all.clone(),
            None => self.layers.push(all.clone()),
        }
        Ok(all)
    }
}

/// What every block needs to know of the rows of a batch.
pub struct Layout {
    /// Which rows belong together.
    pub segments: Vec<Segment>,
    /// Turns of queries and keys, one table for each kind of layer that the model has; empty where positions come otherwise.
    pub rotary: Vec<RotaryTable>,
    /// The rows that the last block is to give, where it need not give all.
    pub last: Option<LastRows>,
}

/// The rows that the last block is to give.
pub struct LastRows {
    /// Which, ascending.
    pub needed: Vec<u32>,
    /// Their segments, with queries counted in `needed`.
    pub segments: Vec<Segment>,
    /// Their turns.
    pub rotary: Vec<RotaryTable>,
}

impl Layout {
    /// A layout with a table for each of the frequencies (radians a position, and the factor on sine and cosine) whose heads are `head` wide.
    /// With `needed` (ascending), the last block gives these rows only.
    pub fn new(
        positions: &[usize],
        segments: &[Segment],
        needed: Option<&[u32]>,
        frequencies: &[(Vec<f64>, f64)],
        head: usize,
    ) -> Self {
        let tables = |positions: &[usize]| {
            let table = |(turns, scale): &(Vec<f64>, f64)| RotaryTable::new(positions, turns, *scale).partial(head);
            frequencies.iter().map(table).collect()
        };
        let last = needed.map(|needed| LastRows {
            segments: only_queries(segments, needed),
            rotary: tables(&needed.iter().map(|&row| positions[row as usize]).collect::<Vec<_>>()),
            needed: needed.to_vec(),
        });
        Self { segments: segments.to_vec(), rotary: tables(positions), last }
    }
}
