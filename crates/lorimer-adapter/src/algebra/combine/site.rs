//! What the parents have on one projection, and what a combination makes of it.

use candle_core::{DType, Device, Result as TensorResult, Tensor};
use serde_json::{Map, Value};

use crate::error::{Error, Result};

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
    /// What the combination tells of this projection.
    pub told: Map<String, Value>,
}

impl Made {
    /// In f32, with nothing to tell.
    ///
    /// # Errors
    ///
    /// Fails if a tensor operation fails.
    pub fn new(a: &Tensor, b: &Tensor) -> Result<Self> {
        let plain = |t: &Tensor| t.to_dtype(DType::F32)?.contiguous();
        Ok(Self { a: plain(a)?, b: plain(b)?, told: Map::new() })
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
        let (columns, rows) = (b.t()?.contiguous()?.matmul(&b)?, a.matmul(&a.t()?)?);
        let product = (columns * rows)?;
        let rest = product.dim(0)? - own;
        let sum = |t: &Tensor| -> TensorResult<f64> { t.sum_all()?.to_scalar::<f64>() };
        let whole = sum(&product.narrow(0, own, rest)?.narrow(1, own, rest)?)?;
        // What rounding leaves of units that cancel is nothing.
        let mut units = 0.0;
        for i in own..own + rest {
            units += product.get(i)?.get(i)?.to_scalar::<f64>()?;
        }
        let whole = if whole > 1e-13 * units { whole } else { 0.0 };
        Ok((sum(&product)?.max(0.0), whole))
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
