//! Gates of an adapter's ranks that were made before the projection that they are at: by a router in the pass before, or at the input of a block's
//! gated unit.

use std::ops::Range;

use candle_core::{Result, Tensor};
use lorimer_tensor::RankGate;

use crate::adapters::hosted::Spread;

/// Sequences next to each other with the same adapters.
pub(crate) struct Run {
    /// Their places in the pass.
    pub places: Range<usize>,
    /// Routes of their rows, where the adapter has a router.
    pub routes: Option<Routes>,
    /// Whether the pass is the bare base for them.
    pub bare: bool,
}

impl Run {
    pub fn plain(places: Range<usize>) -> Self {
        Self { places, routes: None, bare: false }
    }
}

/// A router's numbers for the rows of a run.
#[derive(Default)]
pub(crate) struct Routes {
    /// (rows, width), or one row for all.
    numbers: Vec<f32>,
    width: usize,
    /// Whether one row, which is the same for all projections, stands for all.
    constant: bool,
    /// The run's rows that the last layer gives.
    pub needed: Vec<u32>,
}

impl Routes {
    pub fn of(numbers: &Tensor, constant: bool, needed: Vec<u32>) -> Result<Self> {
        let width = numbers.dim(1)?;
        Ok(Self { numbers: numbers.flatten_all()?.to_vec1()?, width, constant, needed })
    }

    /// The numbers of a row, from a place on; none where there are not so many.
    fn row(&self, row: usize, place: usize) -> &[f32] {
        let at = if self.constant { 0 } else { row * self.width + place };
        self.numbers.get(at..).unwrap_or_default()
    }
}

/// Gates of a run's rows at a projection.
pub(crate) struct RowGates<'r> {
    pub routes: &'r Routes,
    pub spread: &'r Spread,
    /// The run's first row of those that are computed together, and how many it has there.
    pub rows: Range<usize>,
    /// Which of the run's rows they are, where not all.
    pub needed: Option<&'r [u32]>,
}

impl std::fmt::Debug for RowGates<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "gates of rows {:?}", self.rows)
    }
}

impl RankGate for RowGates<'_> {
    fn apply(&self, first: usize, _x: &[f32], _inputs: usize, u: &mut [f32]) {
        let mut gates = vec![0f32; self.spread.rank];
        for (i, u) in u.chunks_exact_mut(self.spread.rank.max(1)).enumerate() {
            let at = (first + i).saturating_sub(self.rows.start);
            let row = self.needed.map_or(at, |needed| needed.get(at).map_or(0, |&row| row as usize));
            let numbers = self.routes.row(row, self.spread.place);
            gates.fill(0.0);
            for &(j, i, factor) in &self.spread.terms {
                gates[j] += factor * numbers.get(i).copied().unwrap_or(0.0);
            }
            u.iter_mut().zip(&gates).for_each(|(u, gate)| *u *= gate);
        }
    }

    fn bytes(&self) -> usize {
        self.routes.numbers.len() * size_of::<f32>()
    }
}
