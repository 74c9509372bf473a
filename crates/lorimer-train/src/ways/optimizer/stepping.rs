//! What an optimiser is, and how one parameter is stepped.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::{Tensor, Var};

use crate::error::Result;

/// How one parameter is stepped.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamGroup {
    /// Multiplies the learning rate.
    pub rate: f64,
    /// Whether weight decay acts.
    pub decay: bool,
    /// Only these rows of the first axis are stepped; moments and step counts of the others stay.
    pub rows: Option<Range<usize>>,
    /// Multiplies the step of each row.
    pub row_scale: Option<Vec<f64>>,
    /// Whether it is a weight that GaLore projects.
    pub projected: bool,
    /// Whether its moments may be kept in 8 bits, where the optimiser does that.
    pub eight_bit: bool,
}

impl Default for ParamGroup {
    fn default() -> Self {
        Self { rate: 1.0, decay: true, rows: None, row_scale: None, projected: true, eight_bit: true }
    }
}

/// Turns gradients into steps. State is saved by the parameter's name, so that a run resumes exactly.
pub trait Optimizer: Send {
    /// One step at rate `rate`, each parameter as `how` says of its name; one without a gradient stays.
    fn step_with(
        &mut self,
        parameters: &[(String, &Var)],
        gradients: &[Option<Tensor>],
        how: &dyn Fn(&str) -> Result<ParamGroup>,
        rate: f64,
    ) -> Result<()>;
    /// [`Self::step_with`], all parameters alike.
    fn step(&mut self, parameters: &[(String, &Var)], gradients: &[Option<Tensor>], rate: f64) -> Result<()> {
        self.step_with(parameters, gradients, &|_| Ok(ParamGroup::default()), rate)
    }
    /// State tensors by name.
    fn state(&self) -> Result<Vec<(String, Tensor)>>;
    /// Puts state back.
    fn restore(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()>;
    /// Seconds that it spent on decompositions.
    fn decomposing_seconds(&self) -> f64 {
        0.0
    }
}
