//! Callbacks: what acts between the parts of a step. Each is a function of settings, seed and step, so that a resumed run is the same.

use std::ops::Range;

use candle_core::{DType, Tensor, Var};
use lorimer_adapter::row_rate::Allora;
use lorimer_adapter::step::{SampledRank, site_seed};
use lorimer_adapter::training::{self, RankSampling, SoftThreshold};
use lorimer_adapter::{Named, Role};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::error::Result;

/// Acts before the forwards, between backward and optimiser, and after the optimiser of each step.
pub trait Callback: Send + Sync {
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
    /// After the optimiser's step of which `rate` is the learning rate over its peak.
    fn after(&self, _step: usize, _rate: f64, _parameters: &[Named<'_>]) -> Result<()> {
        Ok(())
    }
    /// The stage that ends with step `step` (from 0), counted from 1.
    fn stage_ended(&self, _step: usize) -> Option<usize> {
        None
    }
}

/// Nothing.
struct Idle;

impl Callback for Idle {}

/// The callback of a kind for a run of `total` steps with the highest learning rate `peak` over these parameters.
pub fn build(
    kind: Option<&training::Callback>,
    (seed, total, peak): (u64, usize, f64),
    parameters: &[Named<'_>],
) -> Box<dyn Callback> {
    match kind {
        None => Box::new(Idle),
        Some(training::Callback::RowRate(settings)) => Box::new(RowRates(settings.clone())),
        Some(training::Callback::RankSampling(settings)) => Box::new(Ranks { settings: settings.clone(), seed }),
        Some(training::Callback::SoftThreshold(settings)) => {
            let count = gates(parameters).map(|gate| gate.elem_count()).sum();
            let mut lot: Vec<usize> = (0..count).collect();
            lot.shuffle(&mut ChaCha8Rng::seed_from_u64(site_seed(seed, "gates by lot")));
            Box::new(Gates { settings: settings.clone(), total, peak, lot })
        }
    }
}

/// The gates among some parameters.
fn gates<'a>(parameters: &'a [Named<'_>]) -> impl Iterator<Item = &'a Var> {
    parameters.iter().filter(|p| p.role == Role::Gate).map(|p| p.var)
}

/// ALLoRA's factor on the step of each row of B.
struct RowRates(Allora);

impl Callback for RowRates {
    fn row_scale(&self, role: Role, var: &Var) -> Result<Option<Vec<f64>>> {
        match role {
            Role::B => Ok(Some(self.0.factors(var)?.to_dtype(DType::F64)?.to_vec1::<f64>()?)),
            _ => Ok(None),
        }
    }

    fn steps_rows_apart(&self) -> bool {
        true
    }
}

/// DyLoRA's rank a step.
struct Ranks {
    settings: RankSampling,
    seed: u64,
}

impl Callback for Ranks {
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

    fn rows(&self, step: usize, role: Role) -> Option<Range<usize>> {
        if !role.is_factor() {
            return None;
        }
        let SampledRank { rank, frozen } = self.rank(step)?;
        Some(if frozen { rank - 1..rank } else { 0..rank })
    }

    fn steps_rows_apart(&self) -> bool {
        true
    }
}

/// SoRA's threshold on gates.
struct Gates {
    settings: SoftThreshold,
    total: usize,
    /// The run's highest learning rate.
    peak: f64,
    /// All gates, in the order in which a lot closes them.
    lot: Vec<usize>,
}

impl Gates {
    /// The stage of a step, counted from 0.
    fn stage(&self, step: usize) -> usize {
        let stages = self.settings.stages.len().max(1);
        (step * stages / self.total.max(1)).min(stages - 1)
    }

    /// ξ of a step of which `rate` is the learning rate over its peak.
    fn threshold(&self, step: usize, rate: f64) -> f64 {
        let s = &self.settings;
        let xi = s.stages.get(self.stage(step)).copied().unwrap_or(0.0);
        let xi = if s.of_rate { xi * s.gate_lr.unwrap_or(self.peak) } else { xi };
        if s.lr_scaled { xi * rate } else { xi }
    }

    /// Whether each gate is closed after a step by lot: as many more after every step.
    fn closed_by_lot(&self, step: usize, keep: f64) -> Vec<bool> {
        let count = self.lot.len() as f64 * (1.0 - keep) * (step + 1) as f64 / self.total.max(1) as f64;
        let mut closed = vec![false; self.lot.len()];
        self.lot.iter().take(count.round() as usize).for_each(|&i| closed[i] = true);
        closed
    }
}

impl Callback for Gates {
    fn rate(&self, role: Role) -> f64 {
        self.settings.gate_lr.filter(|_| role == Role::Gate).map_or(1.0, |rate| rate / self.peak)
    }

    fn decays(&self, role: Role) -> bool {
        role != Role::Gate
    }

    fn gradient(&self, role: Role, var: &Var, g: Tensor) -> Result<Tensor> {
        match self.settings.penalty > 0.0 && role == Role::Gate {
            true => Ok((g + (var.as_tensor().sign()? * (self.settings.penalty / self.lot.len() as f64))?)?),
            false => Ok(g),
        }
    }

    fn after(&self, step: usize, rate: f64, parameters: &[Named<'_>]) -> Result<()> {
        let xi = self.threshold(step, rate);
        let closed = self.settings.random_keep.map(|keep| self.closed_by_lot(step, keep));
        let mut place = 0;
        for var in gates(parameters) {
            let mut gates = var.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
            for gate in &mut gates {
                *gate = match &closed {
                    None => self.settings.update.of(*gate, xi),
                    Some(closed) if closed[place] => 0.0,
                    Some(_) => *gate,
                };
                place += 1;
            }
            var.set(&Tensor::from_vec(gates, var.shape(), var.device())?.to_dtype(var.dtype())?)?;
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
pub fn open_gates(parameters: &[Named<'_>]) -> Result<Option<(usize, usize)>> {
    let (mut open, mut all) = (0, 0);
    for var in gates(parameters) {
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

    fn thresholds(settings: SoftThreshold, total: usize, count: usize) -> Gates {
        Gates { settings, total, peak: 2e-3, lot: (0..count).rev().collect() }
    }

    fn settings(stages: Vec<f64>) -> SoftThreshold {
        SoftThreshold {
            stages,
            of_rate: false,
            lr_scaled: false,
            update: training::Update::Soft,
            gate_lr: None,
            penalty: 0.0,
            random_keep: None,
        }
    }

    #[test]
    fn updates_are_exact() {
        let g = [-2.0, -0.75, -0.5, -0.1, 0.0, 0.3, 0.5, 0.75, 1.0, 3.0];
        let soft = g.map(|g| training::Update::Soft.of(g, 0.5));
        assert_eq!(soft, [-1.5, -0.25, 0.0, 0.0, 0.0, 0.0, 0.0, 0.25, 0.5, 2.5]);
        // What is at ξ stays, and all else below 2ξ is closed.
        let masked = g.map(|g| training::Update::Masked.of(g, 0.5));
        assert_eq!(masked, [-1.5, 0.0, -0.5, 0.0, 0.0, 0.0, 0.5, 0.0, 0.5, 2.5]);
        assert_eq!(g.map(|g| training::Update::Masked.of(g, 0.0)), g);
    }

    #[test]
    fn the_threshold_is_the_stages_or_a_share_of_the_gates_rate() {
        let of = |settings, rate| thresholds(settings, 4, 1).threshold(3, rate);
        assert_eq!(of(settings(vec![1e-4, 7e-4]), 0.25), 7e-4);
        assert_eq!(of(SoftThreshold { lr_scaled: true, ..settings(vec![4e-4]) }, 0.25), 1e-4);
        let relative = SoftThreshold { of_rate: true, ..settings(vec![0.375]) };
        assert_eq!(of(relative.clone(), 0.25), 0.375 * 2e-3);
        let own = SoftThreshold { gate_lr: Some(2e-2), ..relative };
        assert_eq!(of(own.clone(), 0.25), 0.375 * 2e-2);
        assert_eq!((thresholds(own.clone(), 4, 1).rate(Role::Gate), thresholds(own, 4, 1).rate(Role::A)), (10.0, 1.0));
    }

    /// Whatever the gates are, the share that is asked for is left at the end, and those that are closed stay closed.
    #[test]
    fn a_lot_closes_gates_step_by_step() {
        let first = Var::new(&[0.1f32, 0.2, 0.3, 0.4, 0.5, 0.6], &Device::Cpu).unwrap();
        let second = Var::new(&[1f32, 2.0, 3.0, 4.0], &Device::Cpu).unwrap();
        let of = |name: &str, var, role| Named { name: name.into(), var, role };
        let parameters =
            [of("a.gate", &first, Role::Gate), of("a.lora_A", &second, Role::A), of("b.gate", &second, Role::Gate)];
        let callback = thresholds(SoftThreshold { random_keep: Some(0.6), ..settings(vec![9.0]) }, 8, 10);
        let mut open = Vec::new();
        for step in 0..8 {
            callback.after(step, 1.0, &parameters).unwrap();
            open.push(open_gates(&parameters).unwrap().unwrap().0);
        }
        assert_eq!(open, [9, 9, 8, 8, 7, 7, 6, 6]);
        assert_eq!(second.to_vec1::<f32>().unwrap(), [0.0; 4]);
        let kind = training::Callback::SoftThreshold(SoftThreshold { random_keep: Some(0.5), ..settings(vec![0.0]) });
        let drawn = |seed| {
            let gate = Var::ones(100, DType::F32, &Device::Cpu).unwrap();
            let parameters = [Named { name: "a.gate".into(), var: &gate, role: Role::Gate }];
            build(Some(&kind), (seed, 1, 1e-3), &parameters).after(0, 1.0, &parameters).unwrap();
            gate.to_vec1::<f32>().unwrap()
        };
        assert_eq!(drawn(1).iter().sum::<f32>(), 50.0);
        assert_eq!(drawn(1), drawn(1));
        assert_ne!(drawn(1), drawn(2));
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
        assert_eq!(of(vec![], 1).rows(5, Role::A).map(|r| r.end), of(vec![], 1).rank(5).map(|r| r.rank));
        assert_eq!(of(vec![], 1).rows(5, Role::Whole), None);
    }

    #[test]
    fn stages_rise_in_equal_parts() {
        let gates = thresholds(settings(vec![0.1, 0.2, 0.3]), 9, 0);
        assert_eq!((0..9).map(|s| gates.stage(s)).collect::<Vec<_>>(), [0, 0, 0, 1, 1, 1, 2, 2, 2]);
        let ends: Vec<_> = (0..9).map(|s| gates.stage_ended(s)).collect();
        assert_eq!(ends.iter().flatten().collect::<Vec<_>>(), [&1, &2, &3]);
        assert_eq!((ends[2], ends[8]), (Some(1), Some(3)));
    }
}
