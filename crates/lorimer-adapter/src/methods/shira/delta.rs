//! The entries on one projection, and how the file holds them.

use std::collections::HashSet;
use std::sync::Arc;

use candle_core::{DType, Device, Result as TensorResult, Tensor, Var};
use lorimer_model::Projection;
use lorimer_tensor::SparseIndex;

use super::positions::compact;
use super::reform::Form;
use crate::delta::{Change, Delta};
use crate::parameter::{Parameter, Role};
use crate::step::Step;

/// Trainable entries of a weight.
pub struct ShiraDelta {
    pub(super) values: Var,
    pub(super) index: Arc<SparseIndex>,
    pub(super) form: Form,
    /// Entries of the file in PEFT's form, at least those that there are; the others are zero.
    pub(super) entries: usize,
}

impl ShiraDelta {
    /// Positions and values in PEFT's form.
    fn filled(&self) -> TensorResult<(Vec<u32>, Tensor)> {
        let (flat, values) = (self.index.flat(), self.values.detach());
        let missing = self.entries.saturating_sub(flat.len());
        if missing == 0 {
            return Ok((flat, values));
        }
        let taken: HashSet<u32> = flat.iter().copied().collect();
        let free = (0..).filter(|p| !taken.contains(p)).take(missing);
        // Places after the last value hold zero.
        let mut all: Vec<(u32, u32)> = flat.iter().copied().zip(0..).collect();
        all.extend(free.zip(flat.len() as u32..));
        all.sort_unstable();
        let (positions, order): (Vec<u32>, Vec<u32>) = all.into_iter().unzip();
        let zeros = Tensor::zeros(missing, values.dtype(), &Device::Cpu)?;
        let n = order.len();
        let values = Tensor::cat(&[values, zeros], 0)?.index_select(&Tensor::from_vec(order, n, &Device::Cpu)?, 0)?;
        Ok((positions, values))
    }
}

impl Delta for ShiraDelta {
    fn change(&self, _base: &Projection, _rows: usize, _step: &Step) -> TensorResult<Change> {
        Ok(Change::Sparse(self.index.clone(), self.values.as_tensor().clone()))
    }

    fn parameters(&self) -> Vec<Parameter<'_>> {
        vec![Parameter::new("shira_weight", &self.values, Role::Entries)]
    }

    fn stored(&self) -> TensorResult<Vec<(&'static str, Tensor)>> {
        let inputs = self.index.shape().1 as u32;
        if self.form == Form::Peft {
            let (flat, values) = self.filled()?;
            let k = flat.len();
            let rows = flat.iter().map(|p| (p / inputs) as i32);
            let indices: Vec<i32> = rows.chain(flat.iter().map(|p| (p % inputs) as i32)).collect();
            return Ok(vec![
                ("shira_weight", values),
                ("shira_indices", Tensor::from_vec(indices, (2, k), &Device::Cpu)?),
            ]);
        }
        let bytes = compact(&self.index.flat(), inputs);
        let (count, values) = (bytes.len(), self.values.detach());
        let values = if self.form == Form::CompactF16 { values.to_dtype(DType::F16)? } else { values };
        Ok(vec![("shira_weight", values), ("shira_positions", Tensor::from_vec(bytes, count, &Device::Cpu)?)])
    }

    fn has_effect(&self, _base: &Projection) -> TensorResult<bool> {
        Ok(crate::delta::largest(&self.values)? > 0.0)
    }
}
