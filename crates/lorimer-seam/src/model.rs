//! What a model is to those who train, serve and measure it: projections with names, and a forward of blocks.

use candle_core::{DType, Result, Tensor, bail};
use lorimer_tensor::{RotaryTable, Segment};

use crate::adaptation::{Adaptation, Point};
use crate::batch::{Batch, only_queries};
use crate::forward::run_blocks;
use crate::site::{Projection, Site};

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

/// A frozen model that adapters attach to: its projections and other parameters by on-disk name, and its forward over packed rows: a stem
/// (embeddings), blocks, an end (the final norm), and what its hidden states are read by.
///
/// The loop over blocks is [`run_blocks`], whoever drives it.
pub trait BaseModel: Send + Sync {
    /// Its shape.
    fn shape(&self) -> &ModelShape;
    /// Every projection with its site, in the order of the forward.
    fn projections(&self) -> Vec<(&Site, &Projection)>;
    /// A frozen parameter that is no projection's (embedding, norm), in the compute type.
    fn parameter(&self, path: &str) -> Result<Option<Tensor>>;
    /// The other name of a parameter that stands in two places: the embedding's, of a head that is tied to it.
    fn shared_with(&self, _path: &str) -> Option<&str> {
        None
    }
    /// Names of the parameters that [`Self::parameter`] knows.
    fn parameter_names(&self) -> Vec<String>;
    /// On-disk names of the parameters that the stem reads, the token embedding first.
    fn stem_parameters(&self) -> Vec<String>;
    /// The type that activations are computed in.
    fn dtype(&self) -> DType;
    /// Bytes that the weights take in memory.
    fn bytes(&self) -> usize;

    /// Rows to the first block's input (rows, hidden). `positions`: of each row in its sequence.
    fn stem(&self, input: Input<'_>, positions: &[usize], on: &dyn Adaptation) -> Result<Tensor>;
    /// What every block needs to know of the rows. With `needed` (ascending), the last block may give these rows only: see [`Layout::last`].
    fn layout(&self, positions: &[usize], segments: &[Segment], needed: Option<&[u32]>) -> Layout;
    /// One block: hidden states (rows, hidden) → (rows, hidden).
    fn block(
        &self,
        i: usize,
        h: &Tensor,
        layout: &Layout,
        on: &dyn Adaptation,
        cache: Option<&mut KvCache>,
    ) -> Result<Tensor>;
    /// After the last block.
    fn end(&self, h: &Tensor, on: &dyn Adaptation) -> Result<Tensor>;
    /// Hidden states after the end (rows, hidden) to logits (rows, vocabulary).
    fn logits(&self, _hidden: &Tensor, _on: &dyn Adaptation) -> Result<Tensor> {
        bail!("a `{}` model has no head that predicts tokens", self.shape().model_type)
    }
    /// Σ −log p of one target for each row of hidden states after the end, with smoothed labels:
    /// [`lorimer_tensor::smoothed_cross_entropy`].
    fn smoothed_loss(&self, hidden: &Tensor, targets: &[u32], smoothing: f64, on: &dyn Adaptation) -> Result<Tensor> {
        on.ops().cross_entropy(&self.logits(hidden, on)?, targets, smoothing)
    }

    /// [`Self::smoothed_loss`] without smoothing.
    fn loss(&self, hidden: &Tensor, targets: &[u32], on: &dyn Adaptation) -> Result<Tensor> {
        self.smoothed_loss(hidden, targets, 0.0, on)
    }

    /// Refuses sequences that the model is not made for.
    fn check_length(&self, length: usize) -> std::result::Result<(), String> {
        let most = self.shape().max_positions;
        match length > most {
            true => Err(format!("a sequence of {length} tokens is longer than the {most} the model is made for")),
            false => Ok(()),
        }
    }

    /// The first block's input for token rows, as the adaptation leaves it.
    fn embed(&self, tokens: &[u32], positions: &[usize], on: &dyn Adaptation) -> Result<Tensor> {
        on.hidden(Point::Embedded, self.stem(Input::Tokens(tokens), positions, on)?)
    }

    /// Token rows to hidden states after the end (rows, hidden).
    fn hidden(&self, batch: &Batch, on: &dyn Adaptation) -> Result<Tensor> {
        self.hidden_from(Input::Tokens(&batch.tokens), &batch.positions, &batch.segments, on, None)
    }

    /// The next tokens of a sequence whose earlier ones are in `cache`, which then holds these too.
    fn hidden_cached(&self, tokens: &[u32], cache: &mut KvCache, on: &dyn Adaptation) -> Result<Tensor> {
        let (past, n) = (cache.length, tokens.len());
        let positions: Vec<usize> = (past..past + n).collect();
        let segment = Segment { q_start: 0, q_len: n, keys: vec![(0, past + n)] };
        let h = self.hidden_from(Input::Tokens(tokens), &positions, &[segment], on, Some(cache))?;
        cache.length += n;
        Ok(h)
    }

    /// Rows to hidden states after the end (rows, hidden).
    fn hidden_from(
        &self,
        input: Input<'_>,
        positions: &[usize],
        segments: &[Segment],
        on: &dyn Adaptation,
        cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        let layout = self.layout(positions, segments, None);
        let h = on.hidden(Point::Embedded, self.stem(input, positions, on)?)?;
        let all = 0..self.shape().layers.len();
        let h = run_blocks(self, h, all, &layout, on, cache, |_, _| {})?;
        self.end(&h, on)
    }
}
