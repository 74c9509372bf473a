//! What the parents have on one projection, and what a combination makes of it.

use candle_core::{DType, Device, Result as TensorResult, Tensor};
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Rows of a Gram matrix that are formed at a time.
pub(super) const GRAM_ROWS: usize = 512;

/// One parent's change of a projection: ΔW = scaling · B A, times its weight.
#[derive(Clone, Debug)]
pub struct Part {
    /// A (rank, inputs), f32.
    pub a: Tensor,
    /// B (outputs, rank), f32.
    pub b: Tensor,
    /// α/r, or what the parent has in its place.
    pub scaling: f64,
    /// The weight it is combined with.
    pub weight: f64,
}

impl Part {
    /// Its rank.
    pub fn rank(&self) -> usize {
        self.a.dims().first().copied().unwrap_or(0)
    }
}

/// The parents that have a projection, in their order.
#[derive(Clone, Debug)]
pub struct Pool {
    /// The projection's path in the base.
    pub path: String,
    /// Their changes; at least one.
    pub parts: Vec<Part>,
}

/// A combination's low-rank change of one projection, of scaling 1.
#[derive(Clone, Debug)]
pub struct Made {
    /// A' (rank, inputs), f32.
    pub a: Tensor,
    /// B' (outputs, rank), f32.
    pub b: Tensor,
    /// What the combination reports of this projection.
    pub report: Map<String, Value>,
}

impl Made {
    /// In f32, with nothing to report.
    ///
    /// # Errors
    ///
    /// Fails if a tensor operation fails.
    pub fn new(a: &Tensor, b: &Tensor) -> Result<Self> {
        let plain = |t: &Tensor| t.to_dtype(DType::F32)?.contiguous();
        Ok(Self { a: plain(a)?, b: plain(b)?, report: Map::new() })
    }
}

impl Pool {
    /// (outputs, inputs) of the projection.
    ///
    /// # Errors
    ///
    /// Fails if there is no parent.
    pub fn sides(&self) -> Result<(usize, usize)> {
        match self.parts.first() {
            Some(part) => Ok((part.b.dim(0)?, part.a.dim(1)?)),
            None => Err(Error::Refused(format!("no adapter has `{}`", self.path))),
        }
    }

    /// The sum of the parents' ranks.
    pub fn ranks(&self) -> usize {
        self.parts.iter().map(Part::rank).sum()
    }

    /// Σ weight · ΔW as one product: B (outputs, Σ rank) and A (Σ rank, inputs), weights and scalings in A; f64.
    ///
    /// # Errors
    ///
    /// Fails if a tensor operation fails.
    pub fn stacked(&self) -> Result<(Tensor, Tensor)> {
        let a = |part: &Part| part.a.to_dtype(DType::F64)? * (part.scaling * part.weight);
        let a = self.parts.iter().map(a).collect::<TensorResult<Vec<_>>>()?;
        let b = self.parts.iter().map(|part| part.b.to_dtype(DType::F64)).collect::<TensorResult<Vec<_>>>()?;
        Ok((Tensor::cat(&b, 1)?, Tensor::cat(&a, 0)?))
    }

    /// (‖B'A' − Σ weight · ΔW‖², ‖Σ weight · ΔW‖²) in Frobenius norms, from Gram matrices of the factors: ‖B A‖² = tr(BᵀB · A Aᵀ). The
    /// second is 0 where it is rounding beside the units that cancel in it.
    ///
    /// # Errors
    ///
    /// Fails if a tensor operation fails.
    pub fn squared_error(&self, made: &Made) -> Result<(f64, f64)> {
        let (b, a) = self.stacked()?;
        let own = made.a.dim(0)?;
        let b = Tensor::cat(&[&made.b.to_dtype(DType::F64)?, &b.neg()?], 1)?;
        let a = Tensor::cat(&[&made.a.to_dtype(DType::F64)?, &a], 0)?;
        let (columns, rows) = (b.t()?.contiguous()?, a.t()?.contiguous()?);
        let sizes = (columns.sqr()?.sum(1)? * a.sqr()?.sum(1)?)?.to_vec1::<f64>()?;
        let all = a.dim(0)?;
        let (mut wrong, mut whole) = (0.0, 0.0);
        // Some rows of the Gram matrices at a time: they would take the square of all ranks together.
        for first in (0..all).step_by(GRAM_ROWS) {
            let count = GRAM_ROWS.min(all - first);
            let own_columns = columns.narrow(0, first, count)?.matmul(&b)?;
            let product = (own_columns * a.narrow(0, first, count)?.matmul(&rows)?)?;
            wrong += product.sum_all()?.to_scalar::<f64>()?;
            let sums = product.narrow(1, own, all - own)?.sum(1)?.to_vec1::<f64>()?;
            whole += sums.into_iter().skip(own.saturating_sub(first)).sum::<f64>();
        }
        // What rounding leaves of units that cancel is nothing.
        let units: f64 = sizes.into_iter().skip(own).sum();
        let whole = if whole > 1e-13 * units { whole } else { 0.0 };
        Ok((wrong.max(0.0), whole))
    }
}

/// The numbers of a matrix, row after row.
pub(crate) fn values(t: &Tensor) -> TensorResult<Vec<f32>> {
    t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()
}

/// A matrix of these numbers.
pub(crate) fn matrix(values: Vec<f32>, rows: usize, columns: usize) -> TensorResult<Tensor> {
    Tensor::from_vec(values, (rows, columns), &Device::Cpu)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// More ranks than rows of a Gram matrix at a time: the norms are those of the whole matrices.
    #[test]
    fn the_error_is_that_of_whole_matrices() {
        let of = |rows: usize, columns: usize, seed: f32| {
            let numbers = (0..rows * columns).map(|i| ((i as f32 + seed) * 0.37).sin()).collect();
            matrix(numbers, rows, columns).unwrap()
        };
        for (own, rank) in [(3, 2), (5, GRAM_ROWS), (GRAM_ROWS, 3), (GRAM_ROWS + 7, 2 * GRAM_ROWS + 5)] {
            let part = |seed: f32, weight: f64| Part {
                a: of(rank, 4, seed),
                b: of(6, rank, seed + 9.0),
                scaling: 0.5,
                weight,
            };
            let pool = Pool { path: "m".into(), parts: vec![part(1.0, 1.0), part(2.0, -0.25)] };
            let made = Made::new(&of(own, 4, 3.0), &of(6, own, 4.0)).unwrap();
            let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
            let (b, a) = pool.stacked().unwrap();
            let sum = b.matmul(&a).unwrap();
            let squares = |t: Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
            let expected = (squares((wide(&made.b).matmul(&wide(&made.a)).unwrap() - &sum).unwrap()), squares(sum));
            let found = pool.squared_error(&made).unwrap();
            let near = |a: f64, b: f64| (a - b).abs() < 1e-9 * b.max(1.0);
            assert!(near(found.0, expected.0) && near(found.1, expected.1), "{found:?} {expected:?}");
        }
    }
}
