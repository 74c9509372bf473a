//! Settings of a run: what decides its result.

use lorimer_adapter::methods::{ObjectiveChoice, OptimizerChoice};
use lorimer_adapter::training::AdamWConfig;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::run::attention::AttentionGradient;
use crate::run::schedule::Shape;
use crate::run::step::StepOptions;

/// Settings that stand at zero are not written, so that what an earlier version began can be resumed.
fn is_zero(value: &f64) -> bool {
    *value == 0.0
}

/// Settings of a run. What is here decides the result; the same settings give the same bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainSettings {
    /// Highest learning rate.
    pub learning_rate: f64,
    /// Passes over the data, where `max_steps` does not say otherwise.
    pub epochs: f64,
    /// Number of optimiser steps.
    pub max_steps: Option<usize>,
    /// Examples in one forward and backward.
    pub batch_size: usize,
    /// Forwards and backwards in one step.
    pub gradient_accumulation: usize,
    /// Steps over which the rate rises.
    pub warmup_steps: usize,
    /// The same as a share of all steps, rounded up; only where `warmup_steps` is 0, as in transformers.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub warmup_ratio: f64,
    /// Shape of the rate after that.
    pub schedule: Shape,
    /// Which optimiser; None: the method's own.
    pub optimizer: Option<OptimizerChoice>,
    /// What is minimised beside the loss of the task; None: the method's own.
    pub objective: Option<ObjectiveChoice>,
    /// LoRA+ (Hayou et al. 2024, arXiv 2402.12354): what the rate of B is multiplied by.
    pub loraplus_lr_ratio: Option<f64>,
    /// The optimiser's constants.
    pub adamw: AdamWConfig,
    /// Limit on the gradient's norm; 0 for none.
    pub max_grad_norm: f64,
    /// Label smoothing in training, as transformers defines it: so much of the loss is the mean over the vocabulary. Evaluations have none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub label_smoothing: f64,
    /// How gradients of attention are computed.
    #[serde(default, skip_serializing_if = "AttentionGradient::is_exact")]
    pub attention_gradient: AttentionGradient,
    /// Seed of initialisation, data order and dropout.
    pub seed: u64,
    /// Whether rows are taken in a new random order every epoch.
    pub shuffle: bool,
    /// Evaluate every so many steps (and at the end), where there is evaluation data.
    pub eval_steps: Option<usize>,
    /// Keep the adapter of the lowest evaluation loss instead of the last.
    pub keep_best: bool,
    /// How forward and backward go about it.
    pub step: StepOptions,
}

impl Default for TrainSettings {
    fn default() -> Self {
        Self {
            learning_rate: 2e-4,
            epochs: 1.0,
            max_steps: None,
            batch_size: 8,
            gradient_accumulation: 1,
            warmup_steps: 0,
            warmup_ratio: 0.0,
            schedule: Shape::Linear,
            optimizer: None,
            objective: None,
            loraplus_lr_ratio: None,
            adamw: AdamWConfig::default(),
            max_grad_norm: 1.0,
            label_smoothing: 0.0,
            attention_gradient: AttentionGradient::Exact,
            seed: 0,
            shuffle: true,
            eval_steps: None,
            keep_best: false,
            step: StepOptions::default(),
        }
    }
}

impl TrainSettings {
    /// Refuses what cannot be.
    pub fn check(&self) -> Result<()> {
        let fail = |text: String| Err(Error::Settings(text));
        if !(self.learning_rate.is_finite() && self.learning_rate > 0.0) {
            return fail(format!("--lr {} should be above 0", self.learning_rate));
        }
        if self.loraplus_lr_ratio.is_some_and(|r| !(r.is_finite() && r > 0.0)) {
            return fail("--loraplus-lr-ratio should be above 0".into());
        }
        if self.batch_size == 0 || self.gradient_accumulation == 0 {
            return fail("--batch-size and --gradient-accumulation should be at least 1".into());
        }
        if self.batch_size > 1 << 16 || self.gradient_accumulation > 1 << 16 {
            return fail("--batch-size and --gradient-accumulation should be at most 65536".into());
        }
        if self.max_steps.is_none() && !(self.epochs.is_finite() && self.epochs > 0.0 && self.epochs <= 1e6) {
            return fail(format!("--epochs {} should be above 0", self.epochs));
        }
        if !(0.0..=1.0).contains(&self.warmup_ratio) {
            return fail(format!("--warmup-ratio {} should be between 0 and 1", self.warmup_ratio));
        }
        if !(0.0..1.0).contains(&self.label_smoothing) {
            return fail(format!("--label-smoothing {} should be at least 0 and below 1", self.label_smoothing));
        }
        if self.warmup_ratio > 0.0 && self.warmup_steps > 0 {
            return fail("--warmup-steps and --warmup-ratio say the same thing twice; give one of them".into());
        }
        self.attention_gradient.check()?;
        if self.max_steps == Some(0) || self.eval_steps == Some(0) {
            return fail("--max-steps and --eval-steps should be at least 1".into());
        }
        Ok(())
    }

    /// Steps in one pass over `examples` rows.
    fn steps_per_epoch(&self, examples: usize) -> usize {
        examples.div_ceil(self.batch_size * self.gradient_accumulation).max(1)
    }

    /// All steps of a run over `examples` rows.
    pub fn total_steps(&self, examples: usize) -> usize {
        let by_epochs = (self.epochs * self.steps_per_epoch(examples) as f64).ceil() as usize;
        self.max_steps.unwrap_or(by_epochs.max(1))
    }

    /// Steps over which the rate of a run over `examples` rows rises.
    pub fn warmup(&self, examples: usize) -> usize {
        match self.warmup_steps {
            0 => (self.total_steps(examples) as f64 * self.warmup_ratio).ceil() as usize,
            steps => steps,
        }
    }

    /// The rate of the first step that moves anything: the highest one over the steps of the warm-up.
    pub fn first_rate(&self, examples: usize) -> f64 {
        self.learning_rate / self.warmup(examples).max(1) as f64
    }

    /// Whether a run over `examples` rows sees any of them twice.
    pub fn repeats(&self, examples: usize) -> bool {
        self.total_steps(examples) > self.steps_per_epoch(examples)
    }

    /// The order of rows in an epoch.
    fn order(&self, epoch: usize, examples: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..examples).collect();
        if self.shuffle {
            let seed = lorimer_adapter::step::site_seed(self.seed, &format!("epoch {epoch}"));
            order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        }
        order
    }

    /// The rows of one step, each micro-batch a list of indices. `order` keeps the epoch's order between steps.
    pub(crate) fn rows(
        &self,
        step: usize,
        examples: usize,
        order: &mut Option<(usize, Vec<usize>)>,
    ) -> Vec<Vec<usize>> {
        let per_epoch = self.steps_per_epoch(examples);
        let (epoch, within) = (step / per_epoch, step % per_epoch);
        let kept = order.take().filter(|(of, _)| *of == epoch);
        let (_, order) = order.insert(kept.unwrap_or_else(|| (epoch, self.order(epoch, examples))));
        let size = self.batch_size * self.gradient_accumulation;
        let rows = &order[within * size..((within + 1) * size).min(examples)];
        rows.chunks(self.batch_size).map(<[usize]>::to_vec).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// transformers' `get_warmup_steps`: steps where they are given, else the ratio of all steps, rounded up.
    #[test]
    fn warm_up_is_as_transformers_counts_it() {
        let of = |steps, ratio| {
            let s =
                TrainSettings { max_steps: Some(138), warmup_steps: steps, warmup_ratio: ratio, ..Default::default() };
            (s.warmup(1000), s.first_rate(1000))
        };
        assert_eq!(of(0, 0.0), (0, 2e-4));
        assert_eq!(of(0, 0.03), (5, 2e-4 / 5.0));
        assert_eq!(of(7, 0.0), (7, 2e-4 / 7.0));
        assert_eq!(of(0, 1e-9), (1, 2e-4));
        let check = |warmup_steps, warmup_ratio| {
            TrainSettings { warmup_steps, warmup_ratio, ..Default::default() }.check().is_ok()
        };
        assert!(check(3, 0.0) && check(0, 1.0) && !check(3, 0.1) && !check(0, 1.5) && !check(0, f64::NAN));
    }

    #[test]
    fn an_epoch_takes_every_row_once() {
        let s = TrainSettings { batch_size: 3, gradient_accumulation: 2, ..Default::default() };
        let mut order = None;
        for epoch in 0..2 {
            let per_epoch = s.steps_per_epoch(20);
            let steps = epoch * per_epoch..(epoch + 1) * per_epoch;
            let mut rows: Vec<usize> = steps.flat_map(|step| s.rows(step, 20, &mut order)).flatten().collect();
            rows.sort_unstable();
            assert_eq!(rows, (0..20).collect::<Vec<_>>());
        }
        assert_ne!(s.rows(0, 20, &mut order), s.rows(4, 20, &mut order));
    }
}
