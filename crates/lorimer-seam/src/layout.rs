//! Shapes of a model and its layers, and what its blocks need to know of a batch's rows.

use std::collections::BTreeMap;

use candle_core::{Result, Tensor, bail};
use lorimer_tensor::{RotaryTable, Segment};

use crate::batch::{Batch, only_queries};

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
    /// The longest sequence whose keys stand as it grows: in a longer one every position turns otherwise (LongRoPE). None where keys
    /// always stand.
    pub rotary_border: Option<usize>,
}

impl ModelShape {
    /// Whether what sequences of at most `longest` tokens begin with in common is computed alike in each of them.
    pub fn prefixes_stand(&self, longest: usize) -> bool {
        self.causal && self.rotary_border.is_none_or(|border| longest <= border)
    }

    /// The longest sequence whose keys and values can be kept from its first token to its last.
    pub fn cached_positions(&self) -> usize {
        self.max_positions.min(self.rotary_border.unwrap_or(usize::MAX))
    }

    /// The sequences as one batch, with what they begin with in common once where that is computed alike.
    pub fn batch<'a>(&self, sequences: impl Iterator<Item = &'a [u32]>) -> Batch {
        let sequences: Vec<&[u32]> = sequences.collect();
        match self.prefixes_stand(sequences.iter().map(|s| s.len()).max().unwrap_or(0)) {
            true => Batch::share(sequences),
            false => Batch::pack(sequences),
        }
    }

    /// The widest keys of all layers.
    pub fn kv_width(&self) -> usize {
        self.layers.iter().map(LayerShape::kv_width).max().unwrap_or(0)
    }
}

/// What a forward begins with, one a row.
#[derive(Clone, Copy)]
pub enum Input<'a> {
    /// Token ids.
    Tokens(&'a [u32]),
    /// In place of the token embeddings: (rows, hidden).
    Embeddings(&'a Tensor),
}

/// Keys and values of one sequence, layer by layer, and what an adaptation keeps of each token beside them.
#[derive(Clone, Default)]
pub struct KvCache {
    layers: Vec<(Tensor, Tensor)>,
    /// Rows of the adaptation's own, by layer.
    own: BTreeMap<usize, Tensor>,
    pub(crate) length: usize,
    /// Of the passes before the last, where a forward takes several: each sees its own keys and values.
    pub(crate) earlier: Vec<KvCache>,
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

    /// Adds rows of an adaptation's own, one for each new token (rows, width), to a layer's; all of them, without gradients.
    ///
    /// # Errors
    ///
    /// Fails if the earlier tokens have none: they were read without the adaptation.
    pub fn keep(&mut self, layer: usize, rows: Tensor) -> Result<Tensor> {
        let rows = rows.detach();
        let all = match self.own.get(&layer) {
            Some(old) => Tensor::cat(&[old, &rows], 0)?,
            None => rows,
        };
        let tokens = self.layers.get(layer).map_or(Ok(0), |(k, _)| k.dim(0))?;
        if all.dim(0)? != tokens {
            bail!("of {tokens} tokens {} were read with the adapter; begin with an empty cache", all.dim(0)?);
        }
        self.own.insert(layer, all.clone());
        Ok(all)
    }

    /// Forgets all tokens but the first `length`, of all layers and of what is kept beside them.
    pub fn truncate(&mut self, length: usize) -> Result<()> {
        if length >= self.length {
            return Ok(());
        }
        if length == 0 {
            *self = Self::default();
            return Ok(());
        }
        let cut = |t: &Tensor| t.narrow(0, 0, length)?.contiguous();
        for (k, v) in &mut self.layers {
            (*k, *v) = (cut(k)?, cut(v)?);
        }
        for rows in self.own.values_mut() {
            *rows = cut(rows)?;
        }
        self.length = length;
        Ok(())
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

/// How queries and keys of some layers turn.
#[derive(Clone, Debug, PartialEq)]
pub struct Frequencies {
    /// Radians a position.
    pub turns: Vec<f64>,
    /// Multiplies sine and cosine.
    pub scale: f64,
    /// Other radians a position for all rows of a sequence that is longer than so many tokens (LongRoPE).
    pub long: Option<(usize, Vec<f64>)>,
}

impl Frequencies {
    /// The table of rows, each in a sequence of so many tokens.
    fn table(&self, positions: &[usize], lengths: &[usize]) -> RotaryTable {
        let of = |row: usize| match &self.long {
            Some((border, turns)) if lengths[row] > *border => turns.as_slice(),
            _ => self.turns.as_slice(),
        };
        RotaryTable::chosen(positions, self.turns.len(), of, self.scale)
    }
}

impl Layout {
    /// A layout with a table for each of the frequencies, whose heads are `head` wide. With `needed` (ascending), the last block gives these
    /// rows only. A row's sequence is as long as its segment has keys: rows that sequences on both sides of a border share are nobody's to
    /// ask for ([`ModelShape::prefixes_stand`]).
    pub fn new(
        positions: &[usize],
        segments: &[Segment],
        needed: Option<&[u32]>,
        frequencies: &[Frequencies],
        head: usize,
    ) -> Self {
        let mut lengths = vec![0; positions.len()];
        for segment in segments {
            lengths[segment.q_start..segment.q_start + segment.q_len].fill(segment.key_count());
        }
        let tables = |positions: &[usize], lengths: &[usize]| -> Vec<RotaryTable> {
            frequencies.iter().map(|f| f.table(positions, lengths).partial(head)).collect()
        };
        let last = needed.map(|needed| {
            let of = |all: &[usize]| needed.iter().map(|&row| all[row as usize]).collect::<Vec<_>>();
            let rotary = tables(&of(positions), &of(&lengths));
            LastRows { segments: only_queries(segments, needed), rotary, needed: needed.to_vec() }
        });
        Self { segments: segments.to_vec(), rotary: tables(positions, &lengths), last }
    }
}
