//! Sums of products as they are asked for.

use crate::kernels::shared::Strides;
use crate::storage::View;

/// Up to this many rows a product takes dot products with the weight unpacked.
pub(crate) const FEW_ROWS: usize = 64;

/// The right side of a product.
#[derive(Clone, Copy)]
pub(crate) enum Right<'a, T> {
    /// Row-major numbers, with the length of a row.
    Slice(&'a [T], usize),
    /// A frozen weight.
    Weight(View<'a>),
}

/// `left · right`.
#[derive(Clone, Copy)]
pub(crate) struct Term<'a, T> {
    /// (rows, depth).
    pub left: &'a [T],
    /// Of the left side.
    pub strides: Strides,
    /// Length of the sums.
    pub depth: usize,
    /// (depth, columns), or (columns, depth) if transposed.
    pub right: Right<'a, T>,
    /// Whether the right side is stored as (columns, depth).
    pub transposed: bool,
}

/// Where a result goes.
pub(crate) enum Out<'a, T> {
    /// Into a new vector that [`super::run`] gives back.
    New,
    /// Over these numbers, or added to them if the flag says so.
    Into(&'a mut [T], bool),
}

/// One result (rows, columns), row-major, and what is summed into it.
pub(crate) struct Product<'a, T> {
    /// Where it goes.
    pub out: Out<'a, T>,
    /// Of the result.
    pub rows: usize,
    /// Of the result.
    pub columns: usize,
    /// At least one.
    pub terms: Vec<Term<'a, T>>,
}
