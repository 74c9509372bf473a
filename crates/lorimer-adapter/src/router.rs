//! What an adapter computes once a forward, from the hidden states of the pass before, for all of its projections.

use std::collections::HashMap;

use candle_core::{Result, Tensor, Var};
use lorimer_tensor::Ops;

/// What one forward computed for the projections of an adapter: a row of numbers for each token row. It lives as long as the pass that reads it.
pub struct Routes {
    of: Of,
    needed: Option<Vec<u32>>,
}

enum Of {
    /// One row (1, n) for every row of every projection.
    All(Tensor),
    /// Of each projection, by its path, so many rows.
    Each(HashMap<String, Tensor>, usize),
}

impl Routes {
    /// Numbers (rows, n) of every projection, by its path.
    pub fn new(by_site: HashMap<String, Tensor>, rows: usize) -> Self {
        Self { of: Of::Each(by_site, rows), needed: None }
    }

    /// The same numbers (1, n) for all rows of all projections.
    pub fn constant(numbers: Tensor) -> Self {
        Self { of: Of::All(numbers), needed: None }
    }

    /// Of a pass whose last block gives some rows (ascending) only.
    pub(crate) fn with_needed(self, needed: Option<&[u32]>) -> Self {
        Self { needed: needed.map(<[u32]>::to_vec), ..self }
    }

    /// The tensors that hold the numbers, each once.
    pub fn tensors(&self) -> Vec<&Tensor> {
        let mut all: Vec<&Tensor> = match &self.of {
            Of::All(numbers) => vec![numbers],
            Of::Each(by_site, _) => by_site.values().collect(),
        };
        let mut seen = std::collections::HashSet::new();
        all.retain(|t| seen.insert(t.id()));
        all
    }

    /// The numbers (rows, n) of a projection whose input has so many rows: all of the forward's, or those that the last block gives.
    ///
    /// # Errors
    /// A projection without a route, or rows that belong to no part of the forward.
    pub fn at(&self, ops: Ops<'_>, site: &str, rows: usize) -> Result<Tensor> {
        let (own, all) = match &self.of {
            Of::All(numbers) => return numbers.broadcast_as((rows, numbers.dim(1)?))?.contiguous(),
            Of::Each(by_site, all) => (by_site.get(site), *all),
        };
        let Some(own) = own else { candle_core::bail!("`{site}` has no route") };
        match &self.needed {
            _ if rows == all => Ok(own.clone()),
            Some(needed) if rows == needed.len() => ops.rows(own, needed),
            _ => candle_core::bail!("{rows} rows of `{site}` belong to no part of the forward of {all}"),
        }
    }
}

/// A part of an adapter that belongs to no projection: it reads the hidden states of the first of two passes over the rows, and gives each
/// projection its routes in the second.
pub trait Router: Send + Sync {
    /// Numbers n that a projection's route has for each row.
    fn width(&self) -> usize;
    /// Trainable parameters in a fixed order, by a name that is unique.
    fn trainable(&self) -> Vec<(String, &Var)>;
    /// What a file holds of it, by full name.
    fn stored(&self) -> Vec<(String, Tensor)>;
    /// One row of numbers (1, n) that every row of every projection has in the first pass; None where that is the bare base.
    ///
    /// # Errors
    /// Tensor operations.
    fn first_pass(&self) -> Result<Option<Tensor>>;
    /// Routes of the second pass, from hidden states after the end of the first (rows, hidden). `training`: the seed of dropout in a step of
    /// training.
    ///
    /// # Errors
    /// Tensor operations.
    fn routes(&self, ops: Ops<'_>, hidden: &Tensor, training: Option<u64>) -> Result<Routes>;
    /// The numbers of all projections as one matrix (rows, m), without gradients: what [`Self::routes`] gives, for serving.
    ///
    /// # Errors
    /// Tensor operations.
    fn all_routes(&self, hidden: &Tensor) -> Result<Tensor>;
    /// Where the n numbers of a projection begin in a row of [`Self::all_routes`].
    fn place(&self, site: &str) -> Option<usize>;
    /// Whether, in training, a row's routes depend on its hidden state alone.
    fn rows_are_independent(&self) -> bool;
    /// What the routes are made of, before any choice among them: (rows, projections in the model's order, n).
    ///
    /// # Errors
    /// Tensor operations.
    fn scalings(&self, hidden: &Tensor) -> Result<Tensor>;
}
