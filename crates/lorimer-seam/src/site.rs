//! Frozen projections and their names.

use candle_core::{DType, Result, Tensor};
use lorimer_tensor::{FrozenWeight, Ops, frozen_linear};

/// Which frozen projection: its path as on disk and its shape. A path with a role, never "layer i, q" by
/// construction, so that text encoders or U-Nets fit as well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// Full module path as on disk: `model.layers.3.self_attn.q_proj`.
    pub path: String,
    /// The layer's index, where the path has one.
    pub layer: Option<usize>,
    /// Last component of the path: `q_proj`.
    pub role: String,
    /// Width of x.
    pub inputs: usize,
    /// Width of y.
    pub outputs: usize,
    /// Whether this is the vocabulary head (which `all-linear` leaves out).
    pub is_head: bool,
}

impl Site {
    /// A site from its path; layer and role are read off it.
    pub fn new(path: &str, (outputs, inputs): (usize, usize)) -> Self {
        let role = path.rsplit('.').next().unwrap_or(path).to_string();
        let layer = path.split('.').find_map(|part| part.parse().ok());
        let is_head = role == "lm_head";
        Self { path: path.to_string(), layer, role, inputs, outputs, is_head }
    }

    /// On-disk name of the weight: `<path>.weight`.
    pub fn weight_path(&self) -> String {
        format!("{}.weight", self.path)
    }

    /// On-disk name of the bias: `<path>.bias`.
    pub fn bias_path(&self) -> String {
        format!("{}.bias", self.path)
    }
}

/// A frozen projection y = x Wᵀ + b, in whatever storage the base uses.
#[derive(Clone, Debug)]
pub struct Projection {
    /// W (outputs, inputs).
    pub weight: FrozenWeight,
    /// b (outputs) in the compute type.
    pub bias: Option<Tensor>,
}

impl Projection {
    /// `x` (rows, inputs) → (rows, outputs). Gradients flow to `x` only.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = frozen_linear(x, &self.weight)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }

    /// [`Self::forward`] with recorded operations.
    pub fn forward_with(&self, ops: Ops<'_>, x: &Tensor) -> Result<Tensor> {
        let y = ops.linear(x, &self.weight)?;
        match &self.bias {
            Some(bias) => ops.add_bias(&y, bias),
            None => Ok(y),
        }
    }

    /// The expanded weight (outputs, inputs).
    pub fn dense(&self, dtype: DType) -> Result<Tensor> {
        self.weight.dense(dtype)
    }
}
