//! What EVA asks of the data, and the start that follows.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::method::{Calibration, ParameterSource};

/// PEFT's `EvaConfig`, and how much data is looked at.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvaConfig {
    /// ρ: a projection gets at most ρ·r; 1 leaves the ranks as they are.
    pub rho: f64,
    /// τ: cosine from which on a component holds still.
    pub tau: f64,
    /// Only positions whose token is supervised.
    pub use_label_mask: bool,
    /// What PEFT marks other positions with; ours are marked by the data.
    pub label_mask_value: i64,
    /// Divide each direction by the root of its singular value.
    pub whiten: bool,
    /// Scale α with the rank.
    pub adjust_scaling_factors: bool,
    /// Rows of data at a time.
    pub batch_size: usize,
    /// Batches after which what there is will do.
    pub max_batches: usize,
}

impl Default for EvaConfig {
    fn default() -> Self {
        Self {
            rho: 2.0,
            tau: 0.99,
            use_label_mask: true,
            label_mask_value: -100,
            whiten: false,
            adjust_scaling_factors: true,
            batch_size: 16,
            max_batches: 64,
        }
    }
}

impl EvaConfig {
    pub(crate) fn check(&self) -> Result<()> {
        let fail = |text: String| Err(Error::Config(text));
        if !(1.0..=1000.0).contains(&self.rho) {
            return fail(format!("rho = {} should be between 1 and 1000", self.rho));
        }
        if !(0.0..=1.0).contains(&self.tau) {
            return fail(format!("tau = {} should be between 0 and 1", self.tau));
        }
        if self.batch_size == 0 || self.batch_size > 1 << 16 || self.max_batches == 0 {
            return fail("batch_size and max_batches of eva_config should be at least 1".into());
        }
        Ok(())
    }

    pub(crate) fn calibration(&self) -> Calibration {
        Calibration::Inputs {
            threshold: self.tau,
            supervised_only: self.use_label_mask,
            batch_size: self.batch_size,
            max_batches: self.max_batches,
        }
    }

    /// The most directions that a projection of rank `rank` may get.
    pub(crate) fn most(&self, rank: usize) -> usize {
        (rank as f64 * self.rho).round_ties_even() as usize
    }

    /// A (rank, inputs).
    pub(crate) fn start(&self, source: &ParameterSource<'_>, rank: usize) -> Result<Tensor> {
        let a = source.found("components")?;
        if a.dim(0)? < rank {
            return Err(Error::Config(format!("the data gave {} directions where {rank} are needed", a.dim(0)?)));
        }
        let a = a.narrow(0, 0, rank)?;
        if !self.whiten {
            return Ok(a);
        }
        let roots = source.found("singular")?.narrow(0, 0, rank)?.sqrt()?.unsqueeze(1)?;
        Ok(a.broadcast_div(&roots.to_dtype(a.dtype())?)?)
    }
}
