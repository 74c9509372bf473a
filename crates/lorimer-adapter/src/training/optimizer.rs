//! What an optimiser is, and how one parameter is stepped.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::{Tensor, Var};
use lorimer_model::{Projection, Site};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::delta::Delta;
use crate::error::Result;

/// AdamW's constants.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

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

/// An adapted projection.
pub type Module<'a> = (&'a Site, &'a Projection, &'a dyn Delta);

/// An optimiser with its settings, before a run.
pub trait OptimizerKind: std::fmt::Debug + Send + Sync {
    /// Its name on the command line.
    fn name(&self) -> &'static str;
    /// The name under which it is saved with its settings, where `name` stands for some of them.
    fn family(&self) -> &'static str {
        self.name()
    }
    /// Its settings by name.
    fn settings(&self) -> Map<String, Value> {
        Map::new()
    }
    /// The learning rate that training with it takes unless told otherwise, where that is its own and not the method's.
    fn learning_rate(&self) -> Option<f64> {
        None
    }
    /// The optimiser for an adapter of `method` on these projections.
    ///
    /// # Errors
    ///
    /// Fails if it needs parameters that the method does not train.
    fn build(&self, config: AdamWConfig, method: &str, modules: &[Module<'_>]) -> Result<Box<dyn Optimizer>>;
    /// Whether it steps parameters of any role: AdamW.
    fn takes_any_parameter(&self) -> bool {
        false
    }
    /// Whether it steps each layer as soon as its gradients are there.
    fn per_layer(&self) -> bool {
        false
    }
    /// Bytes of state that it keeps for each number of a parameter that is no projection's.
    fn bytes_per_number(&self) -> f64 {
        8.0
    }
    /// Bytes of state that it keeps for a projection of this shape (outputs, inputs) with so many trained numbers.
    fn bytes(&self, _shape: (usize, usize), parameters: u64) -> f64 {
        self.bytes_per_number() * parameters as f64
    }
}
