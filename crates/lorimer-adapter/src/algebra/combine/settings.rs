//! Settings of combinations, with the checks that need no adapter.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Whose sign wins in TIES.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MajoritySign {
    /// That of the sum of values.
    #[default]
    Total,
    /// That of most values.
    Frequency,
}

/// What LoRA-LEGO's clusters are found by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Features {
    /// The units as they are.
    #[default]
    Raw,
    /// Both halves of a unit brought to length 1.
    Halves,
}

/// Which of the equal forms (c·a, b/c), (−a, −b) of a unit LoRA-LEGO takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gauge {
    /// The stored one.
    #[default]
    Stored,
    /// Halves of equal length, and the sign that is nearer to the cluster's centre. Lorimer's own.
    Balance,
}

/// Which units LoRA-LEGO makes of an adapter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Basis {
    /// Row i of A with column i of B.
    #[default]
    Stored,
    /// The singular triplets of ΔW. Lorimer's own.
    Svd,
}

/// The norm that LoRA-LEGO's centres are brought back to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Norm {
    /// The largest absolute value.
    #[default]
    Max,
    /// The Euclidean norm.
    L2,
}

/// Settings of all combinations; each takes some of them ([`super::Combination::takes`]).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Share of values that is kept, above 0 and at most 1.
    pub density: Option<f64>,
    /// Whose sign wins in TIES.
    pub majority_sign_method: MajoritySign,
    /// Largest rank of the result, in LoRA-LEGO its rank.
    pub rank: Option<usize>,
    /// Quantile of the factors' values that they are clamped to, as PEFT's `svd_clamp`.
    pub svd_clamp: Option<f64>,
    /// Seed of random masks and of the start of clusters.
    pub seed: u64,
    /// What clusters are found by.
    pub features: Features,
    /// Which of a unit's equal forms is taken.
    pub gauge: Gauge,
    /// Which units an adapter is made of.
    pub basis: Basis,
    /// The norm that centres are brought back to.
    pub norm: Norm,
    /// Whether a centre is brought back to the mean norm of its members.
    pub parameter_reweighting: bool,
    /// Whether the output is multiplied by √(reference rank / rank).
    pub output_reweighting: bool,
    /// The rank that the output's size is brought to; `null`: the mean of the parents'.
    pub reference_rank: Option<f64>,
    /// Starts of the clustering, of which the best is taken.
    pub restarts: usize,
    /// Most steps of the clustering.
    pub iterations: usize,
    /// Share of the squared singular values that is kept, above 0 and at most 1.
    pub energy: Option<f64>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            density: None,
            majority_sign_method: MajoritySign::Total,
            rank: None,
            svd_clamp: None,
            seed: 0,
            features: Features::Raw,
            gauge: Gauge::Stored,
            basis: Basis::Stored,
            norm: Norm::Max,
            parameter_reweighting: true,
            output_reweighting: true,
            reference_rank: None,
            restarts: 10,
            iterations: 300,
            energy: None,
        }
    }
}

/// Largest rank that is accepted.
const MAX_RANK: usize = 1 << 16;
/// Most starts and steps of a clustering.
const MAX_ROUNDS: usize = 10_000;

impl Settings {
    /// Out of a map of those that a combination takes.
    ///
    /// # Errors
    ///
    /// Fails if it takes no such setting, if a value is none of the setting's, or if it needs one that is not given.
    pub fn given(name: &str, takes: &[&str], map: &Map<String, Value>) -> Result<Self> {
        if let Some(key) = map.keys().find(|key| !takes.contains(&key.as_str())) {
            let key: String = key.chars().take(40).collect();
            let known = if takes.is_empty() { "none".to_string() } else { takes.join(", ") };
            return Err(Error::Config(format!("`{name}` has no setting `{key}`; it has {known}")));
        }
        let settings: Self = serde_json::from_value(Value::Object(map.clone()))
            .map_err(|e| Error::Config(format!("the settings of `{name}` cannot be read: {e}")))?;
        settings.check(name, takes)?;
        Ok(settings)
    }

    fn check(&self, name: &str, takes: &[&str]) -> Result<()> {
        let fail = |text: String| Err(Error::Config(text));
        match self.density {
            None if takes.contains(&"density") => {
                return fail(format!(
                    "`{name}` needs a density, the share of values that is kept, above 0 and at most 1"
                ));
            }
            Some(density) if !(density > 0.0 && density <= 1.0) => {
                return fail(format!("density {density} should be above 0 and at most 1"));
            }
            _ => {}
        }
        match self.energy {
            None if takes.contains(&"energy") => {
                return fail(format!("`{name}` needs an energy, the share that is kept, above 0 and at most 1"));
            }
            Some(energy) if !(energy > 0.0 && energy <= 1.0) => {
                return fail(format!("energy {energy} should be above 0 and at most 1"));
            }
            _ => {}
        }
        if let Some(rank) = self.rank.filter(|rank| *rank == 0 || *rank > MAX_RANK) {
            return fail(format!("rank {rank} should be between 1 and {MAX_RANK}"));
        }
        if let Some(quantile) = self.svd_clamp.filter(|q| !(*q > 0.0 && *q <= 1.0)) {
            return fail(format!("svd_clamp {quantile} should be above 0 and at most 1"));
        }
        if let Some(rank) = self.reference_rank.filter(|r| !(r.is_finite() && *r > 0.0)) {
            return fail(format!("reference_rank {rank} should be a positive number"));
        }
        for (key, value) in [("restarts", self.restarts), ("iterations", self.iterations)] {
            if value == 0 || value > MAX_ROUNDS {
                return fail(format!("{key} {value} should be between 1 and {MAX_ROUNDS}"));
            }
        }
        Ok(())
    }

    /// Those that a combination takes, for `lorimer.json`.
    pub fn taken(&self, takes: &[&str]) -> Map<String, Value> {
        match serde_json::to_value(self) {
            Ok(Value::Object(all)) => all.into_iter().filter(|(key, _)| takes.contains(&key.as_str())).collect(),
            _ => Map::new(),
        }
    }
}
