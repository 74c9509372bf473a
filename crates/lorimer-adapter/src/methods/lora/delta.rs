//! LoRA on one projection.

use candle_core::{DType, Result as TensorResult, Tensor, Var};
use lorimer_model::Projection;

use super::row_rate::Allora;
use crate::method::{Change, Delta, LowRank, Step};
use crate::methods::dropout::Dropout;

/// A, B and their scaling on one projection.
pub(crate) struct LoraDelta {
    pub(crate) a: Var,
    pub(crate) b: Var,
    pub(crate) scaling: f64,
    pub(crate) dropout: Dropout,
    /// A₀ and B₀, where the start moved the base.
    pub(crate) origin: Option<(Tensor, Tensor)>,
    pub(crate) adaptive: Option<Allora>,
}

impl LoraDelta {
    /// scaling · (x Aᵀ) Bᵀ, less the same of A₀ and B₀.
    pub(crate) fn product(&self, x: &Tensor) -> TensorResult<Tensor> {
        // The scaling goes onto the low-rank factor, where it costs next to nothing.
        let part = |a: &Tensor, b: &Tensor| (x.matmul(&a.t()?)? * self.scaling)?.matmul(&b.t()?);
        match &self.origin {
            Some((a, b)) => part(&self.a, &self.b)? - part(a, b)?,
            None => part(&self.a, &self.b),
        }
    }

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
    fn change(&self, _base: &Projection, _rows: usize, _step: &Step) -> TensorResult<Option<Change>> {
        let (mut a, mut b) = (self.a.as_tensor().clone(), self.b.as_tensor().clone());
        if let Some((a0, b0)) = &self.origin {
            (a, b) = (Tensor::cat(&[&a, a0], 0)?, Tensor::cat(&[&b, &b0.neg()?], 1)?);
        }
        Ok(Some(Change::LowRank(LowRank { a, b, scaling: self.scaling })))
    }

    fn mask(&self, x: &Tensor, step: &Step) -> TensorResult<Option<Tensor>> {
        self.dropout.mask(x, step)
    }

    fn gradient_scale(&self) -> TensorResult<Option<Tensor>> {
        self.adaptive.as_ref().map(|adaptive| adaptive.factors(&self.b)).transpose()
    }

    fn step_scale(&self, key: &str) -> TensorResult<Option<Tensor>> {
        match &self.adaptive {
            Some(adaptive) if adaptive.post && key == "lora_B" => self.gradient_scale(),
            _ => Ok(None),
        }
    }

    fn pair_scaling(&self) -> Option<f64> {
        Some(self.scaling)
    }

    fn rows_are_independent(&self, step: &Step) -> bool {
        self.dropout.is_off(step)
    }

    fn trainable(&self) -> Vec<(&'static str, &Var)> {
        vec![("lora_A", &self.a), ("lora_B", &self.b)]
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
