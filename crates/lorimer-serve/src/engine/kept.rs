//! Rows that an adapter's layers keep of every token, in pages of their own beside keys and values; and such layers on the rows of a batch.

use std::ops::Range;
use std::sync::{PoisonError, RwLock};

use candle_core::{Result, Tensor, bail};
use lorimer_adapter::{BlockDelta, Step};
use lorimer_model::{BlockScope, KeepRows};
use lorimer_tensor::{Edges, Ops};

use crate::engine::pool::{BLOCK, Geometry};

/// Where the rows of one sequence lie.
#[derive(Clone)]
pub struct Place<'a> {
    /// Pages of its blocks of tokens.
    pub blocks: &'a [Vec<u32>],
    /// Position of its first new row.
    pub position: usize,
    /// Number of new rows.
    pub count: usize,
}

/// The rows that a layer keeps of some sequences.
pub struct Kept<'a, 'p> {
    /// The pool's numbers.
    pub pool: &'a RwLock<&'p mut [f32]>,
    /// How its pages are laid out.
    pub geometry: Geometry,
    /// The first of the layer's pages in each block.
    pub first: usize,
    /// The sequences.
    pub places: Vec<Place<'a>>,
}

impl Kept<'_, '_> {
    /// The numbers of a token's row in the pool, in pieces: a row may stand on two pages.
    fn pieces(&self, place: &Place<'_>, position: usize, width: usize) -> Result<Vec<Range<usize>>> {
        let (page, mut at, mut left) = (self.geometry.page(), position % BLOCK * width, width);
        let mut pieces = Vec::with_capacity(2);
        while left > 0 {
            let found = place.blocks.get(position / BLOCK).and_then(|pages| pages.get(self.first + at / page));
            let Some(&found) = found else { bail!("a sequence has no page for what is kept of position {position}") };
            let n = left.min(page - at % page);
            let start = found as usize * page + at % page;
            pieces.push(start..start + n);
            (at, left) = (at + n, left - n);
        }
        Ok(pieces)
    }
}

impl KeepRows for Kept<'_, '_> {
    /// The sequences' new rows, one after the other, into the pool; all rows of all of them, one sequence after the other.
    fn keep(&mut self, _: usize, rows: Tensor) -> Result<Tensor> {
        let (n, width) = rows.dims2()?;
        let new = rows.flatten_all()?.to_vec1::<f32>()?;
        if n != self.places.iter().map(|place| place.count).sum::<usize>() {
            bail!("{n} rows to keep belong to no part of the batch");
        }
        let mut pool = self.pool.write().unwrap_or_else(PoisonError::into_inner);
        let (mut new, mut all) = (new.chunks_exact(width.max(1)), Vec::new());
        for place in &self.places {
            for position in place.position..place.position + place.count {
                let mut row = new.next().unwrap_or_default();
                for piece in self.pieces(place, position, width)? {
                    let (part, rest) = row.split_at(piece.len());
                    pool[piece].copy_from_slice(part);
                    row = rest;
                }
            }
            for position in 0..place.position + place.count {
                self.pieces(place, position, width)?.into_iter().for_each(|piece| all.extend_from_slice(&pool[piece]));
            }
        }
        Tensor::from_vec(all, ((), width), rows.device())
    }
}

/// Edges of some sequences' queries over rows of the pool, with the rows that [`Kept::keep`] gives in their place.
pub fn over_kept_rows(edges: Edges, places: &[Place<'_>], layer: usize) -> Result<Edges> {
    let (mut row, mut before) = (0, 0);
    let mut columns = Vec::with_capacity(edges.columns.len());
    for place in places {
        // Where each page of the sequence's keys stands among its blocks.
        let pages = place.blocks.iter().enumerate().filter_map(|(block, pages)| Some((*pages.get(layer)?, block)));
        let pages: std::collections::HashMap<u32, usize> = pages.collect();
        for &column in &edges.columns[edges.offsets[row]..edges.offsets[row + place.count]] {
            let (page, within) = ((column / (2 * BLOCK)) as u32, column % (2 * BLOCK));
            let Some(block) = pages.get(&page) else { bail!("an edge leads out of its sequence") };
            columns.push(before + block * BLOCK + within);
        }
        row += place.count;
        before += place.position + place.count;
    }
    Ok(edges.with_columns(columns.into_iter()))
}

/// A layer on the hidden states `h` (rows, hidden) of some sequences, whose attention showed `edges`.
pub fn apply(
    ops: Ops<'_>,
    (layer, delta): (usize, &dyn BlockDelta),
    h: &Tensor,
    edges: Option<Edges>,
    kept: &mut Kept<'_, '_>,
) -> Result<Tensor> {
    let mut scope = BlockScope::kept_by(layer, kept);
    scope.edges = edges;
    delta.attended(ops, h, &mut scope, &Step::default())
}
