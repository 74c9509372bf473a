//! Callbacks: what acts between the parts of a step. Each is a function of settings, seed and step, so that a resumed run is the same.

use std::ops::Range;

use candle_core::{DType, Tensor, Var};

use crate::error::Result;
use crate::parameter::{Named, Role};
use crate::step::SampledRank;
use crate::training::optimizer::Module;

/// The gradient of a parameter, where there is one.
pub type GradientOf<'a> = dyn Fn(&Var) -> Option<&'a Tensor> + Sync + 'a;

/// Acts before the forwards, between backward and optimiser, and after the optimiser of each step.
pub trait Callback: Send + Sync {
    /// Refuses projections on which it would do nothing.
    ///
    /// # Errors
    ///
    /// Fails if these are such.
    fn check(&self, _modules: &[Module<'_>]) -> Result<()> {
        Ok(())
    }
    /// The rank that step `step` (from 0) trains.
    fn rank(&self, _step: usize) -> Option<SampledRank> {
        None
    }
    /// Rows of the first axis of a parameter with this role that the step touches; None: all.
    fn rows(&self, _step: usize, _role: Role) -> Option<Range<usize>> {
        None
    }
    /// What the step of each row of a parameter is multiplied by; None: 1.
    fn row_scale(&self, _role: Role, _var: &Var) -> Result<Option<Vec<f64>>> {
        Ok(None)
    }
    /// Whether it steps parts of a parameter apart, which AdamW alone can.
    fn steps_rows_apart(&self) -> bool {
        false
    }
    /// What the learning rate of a parameter is multiplied by.
    fn rate(&self, _role: Role) -> f64 {
        1.0
    }
    /// Whether weight decay may act on a parameter.
    fn decays(&self, _role: Role) -> bool {
        true
    }
    /// Changes the gradient of a parameter.
    fn gradient(&self, _role: Role, _var: &Var, g: Tensor) -> Result<Tensor> {
        Ok(g)
    }
    /// Between the clipping of a step's whole gradients and the optimiser's step: on the projections, with the gradient of a parameter where there
    /// is one. It may move buffers.
    fn before(&self, _step: usize, _modules: &[Module<'_>], _gradient: &GradientOf<'_>) -> Result<()> {
        Ok(())
    }
    /// Whether it takes units of the base away while training ([`Self::before`]): it needs whole gradients, and only the end has its result.
    fn prunes(&self) -> bool {
        false
    }
    /// After the optimiser's step of which `rate` is the learning rate over its peak.
    fn after(&self, _step: usize, _rate: f64, _parameters: &[Named<'_>]) -> Result<()> {
        Ok(())
    }
    /// The stage that ends with step `step` (from 0), counted from 1.
    fn stage_ended(&self, _step: usize) -> Option<usize> {
        None
    }
}

/// What a callback needs to know of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RunShape {
    /// The run's seed.
    pub seed: u64,
    /// All steps.
    pub steps: usize,
    /// The highest learning rate.
    pub peak: f64,
}

/// A callback with its settings, before a run.
pub trait CallbackKind: std::fmt::Debug + Send + Sync {
    /// The callback of a run over these parameters.
    fn build(&self, run: RunShape, parameters: &[Named<'_>]) -> Box<dyn Callback>;
}

/// Nothing.
pub struct Idle;

impl Callback for Idle {}

/// The gates among some parameters.
pub(crate) fn gates<'a>(parameters: &'a [Named<'_>]) -> impl Iterator<Item = &'a Var> {
    parameters.iter().filter(|p| p.role == Role::Gate).map(|p| p.var)
}

/// Gates that are not zero, and all gates.
pub fn open_gates(parameters: &[Named<'_>]) -> Result<Option<(usize, usize)>> {
    let (mut open, mut all) = (0, 0);
    for var in gates(parameters) {
        let values = var.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        open += values.iter().filter(|v| **v != 0.0).count();
        all += values.len();
    }
    Ok((all > 0).then_some((open, all)))
}
