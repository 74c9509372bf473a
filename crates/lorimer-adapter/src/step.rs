//! What one forward is for, and seeds that follow from a run's and a name.

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

/// Seed for one site, so that neither the order of sites nor threads matter (FNV-1a).
pub fn site_seed(seed: u64, path: &str) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325 ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for byte in path.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash
}
