//! DoRA on one projection.

use candle_core::{DType, Device, Result as TensorResult, Tensor, Var};
use lorimer_model::{Projection, Site};
use lorimer_tensor::frozen_linear;

use super::delta::LoraDelta;
use crate::delta::{Change, Delta, LowRank};
use crate::dropout::Dropout;
use crate::error::Result;
use crate::method::ParameterSource;
use crate::parameter::{Parameter, Role};
use crate::step::Step;

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
    fn change(&self, base: &Projection, _rows: usize, _step: &Step) -> TensorResult<Change> {
        let (a, b) = (self.low_rank.a.as_tensor().clone(), self.low_rank.b.as_tensor().clone());
        Ok(Change::RowScaled(LowRank { a, b, scaling: self.low_rank.scaling }, self.ratio(base)?))
    }

    /// As in PEFT, it acts on all that the magnitude scales.
    fn dropout(&self) -> Option<&Dropout> {
        self.low_rank.dropout()
    }

    fn parameters(&self) -> Vec<Parameter<'_>> {
        let mut all = self.low_rank.parameters();
        all.push(Parameter::new("lora_magnitude_vector", &self.magnitude, Role::Magnitude));
        all
    }

    fn stored(&self) -> TensorResult<Vec<(&'static str, Tensor)>> {
        let mut all = self.low_rank.stored()?;
        all.push(("lora_magnitude_vector", self.magnitude.detach()));
        Ok(all)
    }
}
