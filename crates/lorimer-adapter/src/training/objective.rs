//! Auxiliary losses: what is minimised beside the loss of the task.

use candle_core::Tensor;
use serde_json::{Map, Value};

/// Most rows of logits that an objective looks at together.
pub const BLOCK_ROWS: usize = 1024;

/// Where in a run an objective is asked, and what its means are over.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Moment {
    /// Share of the run's steps that are done.
    pub progress: f64,
    /// The step, from 0, and all steps.
    pub step: (usize, usize),
    /// Supervised positions of the step over its rows of data.
    pub positions_per_row: f64,
}

impl Moment {
    /// Before step `step` (from 0) of `total`.
    pub fn new(step: usize, total: usize, positions_per_row: f64) -> Self {
        Self { progress: step as f64 / total.max(1) as f64, step: (step, total), positions_per_row }
    }
}

/// An auxiliary loss.
pub trait Objective: Send + Sync {
    /// The term for logits (n, c) of the adapted model at supervised positions and those of the frozen base there, such that blocks of positions can be
    /// averaged by their length; a scalar in candle's graph.
    fn value(&self, logits: &Tensor, base: &Tensor, at: &Moment) -> candle_core::Result<Tensor>;
}

/// An auxiliary loss with its settings, before a run.
pub trait ObjectiveKind: std::fmt::Debug + Send + Sync {
    /// Its name on the command line.
    fn name(&self) -> &'static str;
    /// Its settings by name.
    fn settings(&self) -> Map<String, Value>;
    /// The loss.
    fn build(&self) -> Box<dyn Objective>;
}
