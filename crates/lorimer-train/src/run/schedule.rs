//! Learning-rate schedules with linear warm-up, as transformers defines them.

use serde::{Deserialize, Serialize};

/// The shape of the rate after warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// Falls in a straight line to zero at the last step.
    #[default]
    Linear,
    /// Falls along half a cosine to zero at the last step.
    Cosine,
    /// Stays.
    Constant,
}

/// A rate for every step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// Highest rate.
    pub peak: f64,
    /// Steps over which the rate rises from zero.
    pub warmup: usize,
    /// All steps.
    pub total: usize,
    /// Shape after warm-up.
    pub shape: Shape,
}

impl Schedule {
    /// Rate at step `step`, counted from 0.
    pub fn rate(&self, step: usize) -> f64 {
        if step < self.warmup {
            return self.peak * step as f64 / self.warmup.max(1) as f64;
        }
        let done = (step - self.warmup) as f64 / (self.total.saturating_sub(self.warmup)).max(1) as f64;
        self.peak
            * match self.shape {
                Shape::Linear => (1.0 - done).max(0.0),
                Shape::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos()),
                Shape::Constant => 1.0,
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_equal_those_of_transformers() {
        // get_{linear,cosine}_schedule_with_warmup(num_warmup_steps=2, num_training_steps=10), lr 1.
        let at = |shape, step| Schedule { peak: 1.0, warmup: 2, total: 10, shape }.rate(step);
        for (step, linear, cosine) in
            [(0, 0.0, 0.0), (1, 0.5, 0.5), (2, 1.0, 1.0), (6, 0.5, 0.5), (9, 0.125, 0.038_060_233_744_356_63)]
        {
            assert!((at(Shape::Linear, step) - linear).abs() < 1e-12);
            assert!((at(Shape::Cosine, step) - cosine).abs() < 1e-12);
        }
        assert_eq!(at(Shape::Constant, 9), 1.0);
    }
}
