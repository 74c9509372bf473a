//! What models are made of: projections with their sites, and norms.

use candle_core::{Result as TensorResult, Tensor};
use lorimer_seam::{Adaptation, Projection, Site};

use crate::error::Result;
use crate::weights::Weights;

/// A projection with its site.
pub(crate) struct Linear {
    pub site: Site,
    pub base: Projection,
}

impl Linear {
    pub fn new(site: Site, base: Projection) -> Self {
        Self { site, base }
    }

    /// `path`.weight of a shape (outputs, inputs), and `path`.bias where there is to be one.
    pub fn load(weights: &Weights, path: &str, shape: (usize, usize), bias: bool) -> Result<Self> {
        let site = Site::new(path, shape);
        let weight = weights.weight(&site.weight_path(), shape)?;
        let bias = if bias { Some(weights.vector(&site.bias_path(), shape.0)?) } else { None };
        Ok(Self { base: Projection { weight, bias }, site })
    }

    pub fn forward(&self, x: &Tensor, on: &dyn Adaptation) -> TensorResult<Tensor> {
        on.project(&self.site, &self.base, x)
    }
}

/// Projections of one input.
pub(crate) fn project_all<const N: usize>(
    of: [&Linear; N],
    x: &Tensor,
    on: &dyn Adaptation,
) -> TensorResult<[Tensor; N]> {
    let targets = of.map(|linear| (&linear.site, &linear.base));
    let found = on.project_all(&targets, x)?;
    found.try_into().map_err(|_| candle_core::Error::Msg("an adaptation left out a projection".into()))
}

/// A root-mean-square norm.
pub(crate) struct Norm {
    path: String,
    weight: Tensor,
    /// With an offset: 1 + the weight, which is what it multiplies by.
    raised: Option<Tensor>,
    eps: f64,
}

impl Norm {
    /// `module`.weight (width); with `offset`, the norm multiplies by 1 + that.
    pub fn load(weights: &Weights, module: &str, width: usize, eps: f64, offset: bool) -> Result<Self> {
        let path = format!("{module}.weight");
        let weight = weights.vector(&path, width)?;
        let raised = if offset { Some((&weight + 1.0)?) } else { None };
        Ok(Self { weight, path, raised, eps })
    }

    pub fn path(&self) -> &str {
        &self.path
    }

    /// The weight as it is on disk.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    pub fn forward(&self, x: &Tensor, on: &dyn Adaptation) -> TensorResult<Tensor> {
        let ops = on.ops();
        match (on.parameter(&self.path), &self.raised) {
            (None, raised) => ops.rms_norm(x, raised.as_ref().unwrap_or(&self.weight), self.eps),
            (Some(own), None) => ops.rms_norm(x, own, self.eps),
            (Some(own), Some(_)) => ops.rms_norm(x, &ops.subgraph(&[], &[own], |_| own + 1.0)?, self.eps),
        }
    }
}
