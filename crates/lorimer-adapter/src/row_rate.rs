//! ALLoRA's factor on the gradient of each row of B, and on its step.

use candle_core::{Result as TensorResult, Tensor};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// ALLoRA's settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Allora {
    /// η²: the square of the factor at B = 0.
    pub eta2: f64,
    /// Which norm of a row stands under the root.
    pub norm: RowNorm,
    /// Multiply AdamW's step of B by the factors too.
    pub post: bool,
}

/// ‖B_i‖ or its square.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowNorm {
    /// ‖B_i‖₂.
    #[default]
    L2,
    /// ‖B_i‖₂².
    L2Squared,
}

impl Default for Allora {
    fn default() -> Self {
        Self { eta2: 4.0, norm: RowNorm::L2, post: true }
    }
}

impl Allora {
    pub(crate) fn check(&self) -> Result<()> {
        match self.eta2.is_finite() && self.eta2 > 0.0 {
            true => Ok(()),
            false => Err(Error::Config(format!("eta2 = {} should be above 0", self.eta2))),
        }
    }

    /// c (outputs) for B (outputs, r).
    pub fn factors(&self, b: &Tensor) -> TensorResult<Tensor> {
        let squares = b.detach().sqr()?.sum(1)?;
        let norms = if self.norm == RowNorm::L2 { squares.sqrt()? } else { squares };
        (norms + 1.0 / self.eta2)?.sqrt()?.recip()
    }
}
