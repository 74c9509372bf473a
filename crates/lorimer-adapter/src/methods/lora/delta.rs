//! LoRA on one projection.

use candle_core::{DType, Result as TensorResult, Tensor, Var};
use lorimer_model::Projection;

use crate::delta::{Change, Delta, LowRank};
use crate::dropout::Dropout;
use crate::parameter::Parameter;
use crate::row_rate::Allora;
use crate::step::Step;

/// A, B and their scaling on one projection.
pub(crate) struct LoraDelta {
    pub(crate) a: Var,
    pub(crate) b: Var,
    pub(crate) scaling: f64,
    pub(crate) dropout: Dropout,
    /// A₀ and B₀, where the start moved the base.
    pub(crate) origin: Option<(Tensor, Tensor)>,
    pub(crate) row_rate: Option<Allora>,
}

impl LoraDelta {
    /// scaling · (B A − B₀A₀), (outputs, inputs).
    pub(crate) fn weight_change(&self) -> TensorResult<Tensor> {
        let mut change = self.b.matmul(&self.a)?;
        if let Some((a, b)) = &self.origin {
            change = (change - b.matmul(a)?)?;
        }
        (change * self.scaling)?.detach().copy()
    }
}

impl Delta for LoraDelta {
    fn change(&self, _base: &Projection, _rows: usize, _step: &Step) -> TensorResult<Change> {
        let (mut a, mut b) = (self.a.as_tensor().clone(), self.b.as_tensor().clone());
        if let Some((a0, b0)) = &self.origin {
            (a, b) = (Tensor::cat(&[&a, a0], 0)?, Tensor::cat(&[&b, &b0.neg()?], 1)?);
        }
        let low = LowRank { a, b, scaling: self.scaling };
        Ok(match &self.row_rate {
            Some(row_rate) => Change::RowRate(low, row_rate.factors(&self.b)?),
            None => Change::LowRank(low),
        })
    }

    fn dropout(&self) -> Option<&Dropout> {
        Some(&self.dropout)
    }

    fn parameters(&self) -> Vec<Parameter<'_>> {
        Parameter::pair(&self.a, &self.b).into()
    }

    fn stored(&self) -> TensorResult<Vec<(&'static str, Tensor)>> {
        let (mut a, mut b) = (self.a.detach(), self.b.detach());
        if let Some((a0, b0)) = &self.origin {
            a = Tensor::cat(&[&a, a0], 0)?;
            b = Tensor::cat(&[&b, &b0.neg()?], 1)?;
        }
        Ok(vec![("lora_A.weight", a), ("lora_B.weight", b)])
    }

    fn has_effect(&self, _base: &Projection) -> TensorResult<bool> {
        let sum = |t: Tensor| -> TensorResult<f64> { t.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>() };
        if self.origin.is_some() {
            return Ok(sum(self.weight_change()?.abs()?)? > 0.0);
        }
        // ‖B A‖² = Σ (BᵀB)∘(A Aᵀ), against ‖B‖²‖A‖², so that rounding in an orthogonal pair is no effect.
        let (a, b) = (self.a.detach(), self.b.detach());
        let (aa, bb) = (a.matmul(&a.t()?)?, b.t()?.matmul(&b)?);
        let product = sum((aa * bb)?)?;
        Ok(product > 1e-12 * sum(a.sqr()?)? * sum(b.sqr()?)?)
    }
}
