//! LoRAPrune's settings.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The mask of a module in a file.
pub const MASK: &str = "lora_mask";
/// The average importance of its units, which is checkpointed and not in a file.
pub(super) const SCORE: &str = "lora_score";

/// LoRAPrune's settings beside LoRA's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraPruneConfig {
    /// Share of the units that are pruned at the end.
    pub prune_ratio: f64,
    /// Share from which it rises.
    pub prune_start: f64,
    /// Steps between prunings.
    pub prune_every: usize,
    /// Share of the steps before the first pruning.
    pub warmup: f64,
    /// Share of the steps after the last one.
    pub cooldown: f64,
    /// What importance keeps of its average a step.
    pub decay: f64,
    /// What importance is.
    pub score: Score,
    /// Its power.
    pub power: usize,
    /// Share of the layers, from the first on, that lose nothing; above 0 the last one does not either.
    pub protect: f64,
}

/// What importance is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Score {
    /// Weight times the gradient that A's and B's stand for.
    #[default]
    Lora,
    /// The weight.
    Magnitude,
    /// A lot.
    Random,
}

impl Default for LoraPruneConfig {
    fn default() -> Self {
        Self {
            prune_ratio: 0.5,
            prune_start: 0.0,
            prune_every: 10,
            warmup: 0.1,
            cooldown: 0.1,
            decay: 0.9,
            score: Score::Lora,
            power: 1,
            protect: 0.1,
        }
    }
}

impl LoraPruneConfig {
    /// Refuses what cannot be.
    pub(super) fn check(&self) -> Result<()> {
        let fail = |text: String| Err(Error::Config(text));
        let share = |v: f64| (0.0..1.0).contains(&v);
        if !share(self.prune_ratio) || !share(self.prune_start) || self.prune_start > self.prune_ratio {
            return fail(format!(
                "prune_start = {} and prune_ratio = {} should be at least 0 and below 1, and the first not above the second",
                self.prune_start, self.prune_ratio
            ));
        }
        if !share(self.warmup) || !share(self.cooldown) || self.warmup + self.cooldown >= 1.0 {
            return fail(format!(
                "warmup = {} and cooldown = {} are shares of the steps and should leave some between them",
                self.warmup, self.cooldown
            ));
        }
        if !share(self.decay) {
            return fail(format!("decay = {} should be at least 0 and below 1", self.decay));
        }
        if !(0.0..=1.0).contains(&self.protect) {
            return fail(format!("protect = {} should be between 0 and 1", self.protect));
        }
        if self.prune_every == 0 || !(1..=2).contains(&self.power) {
            return fail(format!(
                "prune_every = {} should be at least 1 and power = {} 1 or 2",
                self.prune_every, self.power
            ));
        }
        Ok(())
    }
}
