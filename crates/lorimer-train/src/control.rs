//! Controls: what acts between the parts of a step. Each is a function of settings, seed and step, so that a resumed run is the same.

use std::ops::Range;

use candle_core::{DType, Tensor, Var};
use lorimer_adapter::method::{SampledRank, site_seed};
use lorimer_adapter::training::{self, RankSampling, SoftThreshold};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::error::Result;

/// Acts before the forwards, between backward and optimiser, and after the optimiser of each step.
pub trait Control: Send + Sync {
    /// The rank that step `step` (from 0) trains.
    fn rank(&self, _step: usize) -> Option<SampledRank> {
        None
    }
    /// Rows of a parameter's first axis that the step touches; None: all.
    fn rows(&self, _step: usize, _name: &str) -> Option<Range<usize>> {
        None
    }
    /// Changes the gradient of a parameter.
    fn gradient(&self, _name: &str, _var: &Var, g: Tensor) -> Result<Tensor> {
        Ok(g)
    }
    /// After the optimiser's step of which `rate` is the learning rate over its peak.
    fn after(&self, _step: usize, _rate: f64, _parameters: &[(String, &Var)]) -> Result<()> {
        Ok(())
    }
    /// The stage that ends with step `step` (from 0), counted from 1.
    fn stage_ended(&self, _step: usize) -> Option<usize> {
        None
    }
}

/// Nothing.
struct Idle;

impl Control for Idle {}

/// The control of a kind for a run of `total` steps.
pub fn build(kind: Option<&training::Control>, seed: u64, total: usize) -> Box<dyn Control> {
    match kind {
        None => Box::new(Idle),
        Some(training::Control::RankSampling(settings)) => Box::new(Ranks { settings: settings.clone(), seed }),
        Some(training::Control::SoftThreshold(settings)) => Box::new(Gates { settings: settings.clone(), total }),
    }
}

/// DyLoRA's rank a step.
struct Ranks {
    settings: RankSampling,
    seed: u64,
}

impl Control for Ranks {
    fn rank(&self, step: usize) -> Option<SampledRank> {
        let s = &self.settings;
        let mut rng = ChaCha8Rng::seed_from_u64(site_seed(self.seed, &format!("rank {step}")));
        let total: f64 = s.weights.iter().sum();
        let place = match s.weights.is_empty() {
            true => rng.random_range(0..s.ranks.len()),
            false => {
                let mut left = rng.random_range(0.0..total);
                let found = s.weights.iter().position(|w| {
                    left -= w;
                    left < 0.0
                });
                found.unwrap_or(s.ranks.len() - 1)
            }
        };
        Some(SampledRank { rank: s.ranks[place], frozen: s.frozen })
    }

    fn rows(&self, step: usize, name: &str) -> Option<Range<usize>> {
        if !(name.ends_with(".lora_A") || name.ends_with(".lora_B")) {
            return None;
        }
        let SampledRank { rank, frozen } = self.rank(step)?;
        Some(if frozen { rank - 1..rank } else { 0..rank })
    }
}

/// SoRA's soft threshold.
struct Gates {
    settings: SoftThreshold,
    total: usize,
}

impl Gates {
    /// The stage of a step, counted from 0.
    fn stage(&self, step: usize) -> usize {
        let stages = self.settings.stages.len().max(1);
        (step * stages / self.total.max(1)).min(stages - 1)
    }
}

/// sign(g) · max(|g| − ξ, 0).
pub fn soft_threshold(g: &Tensor, xi: f64) -> candle_core::Result<Tensor> {
    // What is within ξ of zero is taken away from itself, so that it is zero exactly.
    g - g.clamp(-xi, xi)?
}

impl Control for Gates {
    fn gradient(&self, name: &str, var: &Var, g: Tensor) -> Result<Tensor> {
        match self.settings.penalty > 0.0 && name.ends_with(".gate") {
            true => Ok((g + (var.as_tensor().sign()? * self.settings.penalty)?)?),
            false => Ok(g),
        }
    }

    fn after(&self, step: usize, rate: f64, parameters: &[(String, &Var)]) -> Result<()> {
        let xi = self.settings.stages.get(self.stage(step)).copied().unwrap_or(0.0);
        let xi = if self.settings.lr_scaled { xi * rate } else { xi };
        for (_, var) in parameters.iter().filter(|(name, _)| name.ends_with(".gate")) {
            var.set(&soft_threshold(&var.as_tensor().copy()?, xi)?)?;
        }
        Ok(())
    }

    fn stage_ended(&self, step: usize) -> Option<usize> {
        let stage = self.stage(step);
        let last = step + 1 >= self.total || self.stage(step + 1) > stage;
        (self.settings.stages.len() > 1 && last).then_some(stage + 1)
    }
}

/// Gates that are not zero, and all gates.
pub fn open_gates(parameters: &[(String, &Var)]) -> Result<Option<(usize, usize)>> {
    let (mut open, mut all) = (0, 0);
    for (_, var) in parameters.iter().filter(|(name, _)| name.ends_with(".gate")) {
        let values = var.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        open += values.iter().filter(|v| **v != 0.0).count();
        all += values.len();
    }
    Ok((all > 0).then_some((open, all)))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn the_soft_threshold_is_exact() {
        let g = Tensor::new(&[-2.0, -0.5, -0.1, 0.0, 0.3, 0.5, 3.0], &Device::Cpu).unwrap();
        let found = soft_threshold(&g, 0.5).unwrap().to_vec1::<f64>().unwrap();
        assert_eq!(found, [-1.5, 0.0, 0.0, 0.0, 0.0, 0.0, 2.5]);
    }

    #[test]
    fn ranks_follow_seed_and_step_and_their_chances() {
        let of = |weights: Vec<f64>, seed| Ranks {
            settings: RankSampling { ranks: vec![1, 2, 4], weights, frozen: false },
            seed,
        };
        let draw = |r: &Ranks| (0..3000).map(|step| r.rank(step).unwrap().rank).collect::<Vec<_>>();
        assert_eq!(draw(&of(vec![], 1)), draw(&of(vec![], 1)));
        assert_ne!(draw(&of(vec![], 1)), draw(&of(vec![], 2)));
        let share = |ranks: &[usize], r| ranks.iter().filter(|x| **x == r).count() as f64 / ranks.len() as f64;
        let (even, uneven) = (draw(&of(vec![], 3)), draw(&of(vec![0.6, 0.3, 0.1], 3)));
        for (r, chance) in [(1, 0.6), (2, 0.3), (4, 0.1)] {
            assert!((share(&even, r) - 1.0 / 3.0).abs() < 0.04);
            assert!((share(&uneven, r) - chance).abs() < 0.04);
        }
        assert_eq!(of(vec![], 1).rows(5, "x.lora_A").map(|r| r.end), of(vec![], 1).rank(5).map(|r| r.rank));
        assert_eq!(of(vec![], 1).rows(5, "model.norm.weight"), None);
    }

    #[test]
    fn stages_rise_in_equal_parts() {
        let settings = SoftThreshold { stages: vec![0.1, 0.2, 0.3], lr_scaled: false, penalty: 0.0 };
        let gates = Gates { settings, total: 9 };
        assert_eq!((0..9).map(|s| gates.stage(s)).collect::<Vec<_>>(), [0, 0, 0, 1, 1, 1, 2, 2, 2]);
        let ends: Vec<_> = (0..9).map(|s| gates.stage_ended(s)).collect();
        assert_eq!(ends.iter().flatten().collect::<Vec<_>>(), [&1, &2, &3]);
        assert_eq!((ends[2], ends[8]), (Some(1), Some(3)));
    }
}
