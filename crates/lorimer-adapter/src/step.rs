//! What one forward is for: evaluation, or a step of training with its seed and its draws.

/// What one forward is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// In training, the seed that dropout masks of this forward come from.
    pub training: Option<u64>,
    /// The rank that this step trains, of methods that have a choice.
    pub rank: Option<SampledRank>,
}

impl Step {
    /// A forward of training with a seed for dropout.
    pub fn training(seed: u64) -> Self {
        Self { training: Some(seed), rank: None }
    }
}

/// A rank drawn for one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampledRank {
    /// The rank.
    pub rank: usize,
    /// Whether only its last row of A and column of B learn.
    pub frozen: bool,
}
