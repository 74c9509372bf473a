//! Settings of a search for the projections to adapt.

use serde::{Deserialize, Serialize};

/// DiffoRA's settings beside LoRA's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DifforaConfig {
    /// ρ: the share of a layer's projections that is kept.
    pub rho: f64,
    /// Steps of the search, each on A and B and on γ.
    pub search_steps: usize,
    /// Rank in the search.
    pub search_r: usize,
    /// Rate of A and B in the search.
    pub search_lr: f64,
    /// Rate of γ.
    pub gamma_lr: f64,
    /// Rows of a step of the search.
    pub search_batch_size: usize,
    /// How γ becomes a gate.
    pub gate: Gate,
    /// Which projections share A and B in the search.
    pub sharing: Sharing,
    /// With `group`: layers of a group.
    pub group_layers: usize,
}

/// How γ becomes a gate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gate {
    /// A softmax over the layer's kinds, times their number.
    #[default]
    Softmax,
    /// 1/(1 + e^−γ), times 2 so that γ = 0 is 1.
    Sigmoid,
}

/// Which projections share A and B in the search.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sharing {
    /// All of a kind.
    #[default]
    Kind,
    /// Those of a kind in neighbouring layers.
    Group,
    /// None.
    None,
}

impl Default for DifforaConfig {
    fn default() -> Self {
        Self {
            rho: 0.5,
            search_steps: 50,
            search_r: 4,
            search_lr: 5e-3,
            gamma_lr: 1e-2,
            search_batch_size: 8,
            gate: Gate::Softmax,
            sharing: Sharing::Kind,
            group_layers: 5,
        }
    }
}
