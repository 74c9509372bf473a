//! One block's forward as an adaptation sees it: what the attention shows to the layer that follows it, and rows that are kept from token to token.

use candle_core::{Result, Tensor, bail};
use lorimer_tensor::Edges;

use crate::layout::KvCache;

/// Where rows of an adaptation's own are kept from token to token.
pub trait KeepRows {
    /// Adds rows, one for each new token (rows, width), to a layer's; all of them, in the order of the attention's key rows.
    ///
    /// # Errors
    ///
    /// Fails if the earlier tokens have none, or if there is no room.
    fn keep(&mut self, layer: usize, rows: Tensor) -> Result<Tensor>;
}

/// One block's forward, from its attention to the end of the block.
pub struct BlockScope<'a> {
    layer: usize,
    whole: bool,
    cache: Option<&'a mut KvCache>,
    keeper: Option<&'a mut dyn KeepRows>,
    /// The edges of the attention's map, where the adaptation took them ([`crate::Adaptation::attend`]). Their columns are the attention's
    /// key rows.
    pub edges: Option<Edges>,
}

impl<'a> BlockScope<'a> {
    /// Of a layer, counted from 0. `whole`: whether the block's queries are all its rows, and not those that are needed after the last block.
    pub fn new(layer: usize, whole: bool, cache: Option<&'a mut KvCache>) -> Self {
        Self { layer, whole, cache, keeper: None, edges: None }
    }

    /// Of all rows of a layer, whose adaptation's own are kept elsewhere than keys and values.
    pub fn kept_by(layer: usize, keeper: &'a mut dyn KeepRows) -> Self {
        Self { layer, whole: true, cache: None, keeper: Some(keeper), edges: None }
    }

    /// The layer, counted from 0.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// Whether the rows after the attention are all rows of the block.
    pub fn is_whole(&self) -> bool {
        self.whole
    }

    /// Keys and values of the block's rows after those of earlier tokens, where these are kept.
    pub fn extend(&mut self, k: Tensor, v: Tensor) -> Result<(Tensor, Tensor)> {
        match &mut self.cache {
            Some(cache) => cache.extend(self.layer, k, v),
            None => Ok((k, v)),
        }
    }

    /// Rows of an adaptation's own, one for each row of the block (rows, width), after those of earlier tokens where these are kept: in the order
    /// of the attention's key rows. Once a forward and block.
    ///
    /// # Errors
    ///
    /// Fails if the block has not all its rows, or if none were kept of earlier tokens.
    pub fn keep(&mut self, rows: Tensor) -> Result<Tensor> {
        if !self.whole {
            bail!("a layer that looks at all rows of block {} was given some of them", self.layer);
        }
        match (&mut self.cache, &mut self.keeper) {
            (Some(cache), _) => cache.keep(self.layer, rows),
            (None, Some(keeper)) => keeper.keep(self.layer, rows),
            (None, None) => Ok(rows),
        }
    }
}
