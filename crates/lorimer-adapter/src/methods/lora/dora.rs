//! DoRA on one projection.

use candle_core::{DType, Device, Result as TensorResult, Tensor, Var};
use lorimer_model::{Projection, Site};
use lorimer_tensor::{LowRankTerm, Ops, Part, frozen_linear};

use super::delta::LoraDelta;
use crate::error::Result;
use crate::method::{Delta, LowRank, NotMergeable, ParameterSource, Step};

/// LoRA's factors with a magnitude a row.
pub(crate) struct DoraDelta {
    low_rank: LoraDelta,
    /// m (outputs).
    magnitude: Var,
    /// ‖Wᵢ‖² of the base's rows (outputs).
    squares: Tensor,
}

impl DoraDelta {
    pub(crate) fn new(
        low_rank: LoraDelta,
        base: &Projection,
        site: &Site,
        source: &mut ParameterSource<'_>,
    ) -> Result<Self> {
        let dtype = low_rank.a.dtype();
        let exact = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let squares = base.dense(exact)?.to_dtype(DType::F64)?.sqr()?.sum(1)?;
        let mut delta =
            Self { low_rank, magnitude: Var::zeros(1, dtype, &Device::Cpu)?, squares: squares.to_dtype(dtype)? };
        // Older files say `.weight`.
        let shape = [site.outputs];
        delta.magnitude = match source.optional("lora_magnitude_vector.weight", &shape)? {
            Some(m) => Var::from_tensor(&m.to_dtype(dtype)?)?,
            None => source.trainable("lora_magnitude_vector", &shape, |_| Ok(delta.norms(base)?))?,
        };
        Ok(delta)
    }

    /// ‖W + s·B A‖ of each row (outputs), without gradient.
    fn norms(&self, base: &Projection) -> TensorResult<Tensor> {
        let (a, b, s) = (self.low_rank.a.detach(), self.low_rank.b.detach(), self.low_rank.scaling);
        let along = (&b * frozen_linear(&a, &base.weight)?.t()?)?.sum(1)?;
        let own = (b.matmul(&a.matmul(&a.t()?)?)? * &b)?.sum(1)?;
        ((&self.squares + (along * (2.0 * s))?)? + (own * (s * s))?)?.relu()?.sqrt()
    }

    /// m / ‖W + s·B A‖ (outputs); the gradient reaches m only.
    fn ratio(&self, base: &Projection) -> TensorResult<Tensor> {
        self.magnitude.as_tensor() / self.norms(base)?
    }
}

impl Delta for DoraDelta {
    fn forward(&self, base: &Projection, x: &Tensor, y: &Tensor, step: &Step) -> TensorResult<Tensor> {
        let ratio = self.ratio(base)?;
        // As in PEFT, dropout acts on all that the magnitude scales.
        let dropped = self.low_rank.dropout.mask(x, step)?.map(|mask| x * mask).transpose()?;
        let (low_rank, plain) = match dropped {
            Some(x) => (self.low_rank.product(&x)?, frozen_linear(&x, &base.weight)?),
            None => (self.low_rank.product(x)?, y.clone()),
        };
        plain.broadcast_mul(&(&ratio - 1.0)?)? + low_rank.broadcast_mul(&ratio)?
    }

    fn output(&self, ops: Ops<'_>, base: &Projection, x: &Tensor, step: &Step) -> TensorResult<Option<Tensor>> {
        if !self.low_rank.dropout.is_off(step) {
            return Ok(None);
        }
        let (a, b) = (self.low_rank.a.as_tensor().clone(), self.low_rank.b.as_tensor().clone());
        let low_rank = Some(LowRankTerm::new(a, b, self.low_rank.scaling));
        let moved = ops.project(x, &[Part { weight: Some(&base.weight), low_rank }])?;
        let ratio = ops.subgraph_all(&[], &[self.magnitude.as_tensor()], |_| Ok(vec![self.ratio(base)?]))?;
        ops.scale_columns(&moved[0], &ratio[0]).map(Some)
    }

    fn rows_are_independent(&self, step: &Step) -> bool {
        self.low_rank.rows_are_independent(step)
    }

    fn merged(&self, base: &Projection) -> TensorResult<Result<Tensor, NotMergeable>> {
        let ratio = self.ratio(base)?.detach().unsqueeze(1)?;
        let moved = (base.dense(self.low_rank.a.dtype())? + self.low_rank.weight_change()?)?;
        Ok(Ok(moved.broadcast_mul(&ratio)?))
    }

    fn scaled(&self, base: &Projection) -> TensorResult<Option<(LowRank, Tensor)>> {
        let ratio = self.ratio(base)?.detach();
        let (a, b) = (self.low_rank.a.detach(), self.low_rank.b.detach().broadcast_mul(&ratio.unsqueeze(1)?)?);
        Ok(Some((LowRank { a, b, scaling: self.low_rank.scaling }, ratio)))
    }

    fn trainable(&self) -> Vec<(&'static str, &Var)> {
        let mut all = self.low_rank.trainable();
        all.push(("lora_magnitude_vector", &self.magnitude));
        all
    }

    fn stored(&self) -> TensorResult<Vec<(&'static str, Tensor)>> {
        let mut all = self.low_rank.stored()?;
        all.push(("lora_magnitude_vector", self.magnitude.detach()));
        Ok(all)
    }
}
