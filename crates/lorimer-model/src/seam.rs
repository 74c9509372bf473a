//! The one seam: a base model is a frozen function, and every projection, attention and hidden state in it
//! goes through [`Adaptation`]. What the methods do differently, they do behind that trait.

use candle_core::{DType, Result, Tensor};
use lorimer_tensor::{FrozenWeight, Ops, Segment, frozen_linear};

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

/// Where a hidden state or an attention stands in the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// After the embedding, before the first layer.
    Embedded,
    /// In or after layer `i`, counted from 0.
    Layer(usize),
    /// After the final norm.
    Final,
}

/// One attention, ready to run: what a method may look at or change.
pub struct AttentionCall<'a> {
    /// (rows, heads·head_dim), rotated.
    pub q: Tensor,
    /// (key rows, kv_heads·head_dim), rotated.
    pub k: Tensor,
    /// (key rows, kv_heads·head_dim).
    pub v: Tensor,
    /// Which rows belong together; each is causal.
    pub segments: &'a [Segment],
    /// Width of one head.
    pub head_dim: usize,
    /// Multiplies the scores.
    pub scale: f64,
}

impl AttentionCall<'_> {
    /// Plain attention: (rows, heads·head_dim).
    pub fn run(self, ops: Ops<'_>) -> Result<Tensor> {
        ops.attention((&self.q, &self.k, &self.v), self.segments, self.head_dim, self.scale)
    }
}

/// What happens to a frozen model while it runs. Every default leaves the model as it is.
pub trait Adaptation {
    /// How operations are done: recorded on a tape for a fast backward, or in candle's graph.
    fn ops(&self) -> Ops<'_> {
        Ops::plain()
    }

    /// One frozen projection. `x` (rows, inputs) → (rows, outputs).
    fn project(&self, _site: &Site, base: &Projection, x: &Tensor) -> Result<Tensor> {
        base.forward_with(self.ops(), x)
    }

    /// Frozen projections that read the same `x`, to be computed together where that is quicker.
    fn project_all(&self, targets: &[(&Site, &Projection)], x: &Tensor) -> Result<Vec<Tensor>> {
        targets.iter().map(|(site, base)| self.project(site, base, x)).collect()
    }

    /// One attention.
    fn attend(&self, _point: Point, call: AttentionCall<'_>) -> Result<Tensor> {
        call.run(self.ops())
    }

    /// A hidden state between layers (rows, hidden): to record, to route on, to change.
    fn hidden(&self, _point: Point, h: Tensor) -> Result<Tensor> {
        Ok(h)
    }

    /// Whether [`Self::project`] may do anything but the frozen projection at this site.
    fn touches(&self, _site: &Site) -> bool {
        true
    }

    /// A whole parameter (embedding, norm) that takes the place of the frozen one, by its on-disk name.
    fn parameter(&self, _path: &str) -> Option<&Tensor> {
        None
    }
}

/// The base model as it is.
pub struct Frozen;
impl Adaptation for Frozen {
    fn touches(&self, _: &Site) -> bool {
        false
    }
}

/// Another adaptation without gradients: the graph is cut after every projection and layer, so that memory stays at one
/// layer's.
pub struct Inference<'a>(pub &'a dyn Adaptation);

impl Adaptation for Inference<'_> {
    fn project(&self, site: &Site, base: &Projection, x: &Tensor) -> Result<Tensor> {
        Ok(self.0.project(site, base, x)?.detach())
    }
    fn attend(&self, point: Point, call: AttentionCall<'_>) -> Result<Tensor> {
        Ok(self.0.attend(point, call)?.detach())
    }
    fn hidden(&self, point: Point, h: Tensor) -> Result<Tensor> {
        Ok(self.0.hidden(point, h)?.detach())
    }
    fn parameter(&self, path: &str) -> Option<&Tensor> {
        self.0.parameter(path)
    }
}

/// A frozen model that adapters attach to: its projections and its other parameters, by on-disk name.
pub trait BaseModel {
    /// Every projection with its site, in the order of the forward.
    fn projections(&self) -> Vec<(&Site, &Projection)>;
    /// A frozen parameter that is no projection's (embedding, norm), in the compute type.
    fn parameter(&self, path: &str) -> Result<Option<Tensor>>;
    /// The other name of a parameter that stands in two places: the embedding's, of a head that is tied to it.
    fn shared_with(&self, _path: &str) -> Option<&str> {
        None
    }
    /// Names of the parameters that [`Self::parameter`] knows.
    fn parameter_names(&self) -> Vec<String>;
    /// The type that activations are computed in.
    fn dtype(&self) -> DType;
}
