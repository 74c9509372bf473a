//! Requests as S-LoRA's evaluation makes them (arXiv 2311.03285, section 7.1, and its code): which adapters, when, how long.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Gamma};
use serde::{Deserialize, Serialize};

/// A synthetic workload.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Workload {
    /// Number of adapters.
    pub adapters: usize,
    /// How unequal they are asked for: the index is ⌊n · u⌋ with u of density α u^(α−1). At 1 all are alike.
    pub alpha: f64,
    /// Requests a second.
    pub rate: f64,
    /// Coefficient of variation of the times between two: gamma with shape 1/cv² and scale cv²/rate. At 1 they come at random.
    pub cv: f64,
    /// Seconds.
    pub duration: f64,
    /// Least and most tokens of a prompt, uniform.
    pub input: (usize, usize),
    /// Least and most tokens of an answer, uniform.
    pub output: (usize, usize),
    /// Ranks, given to the adapters in turn.
    pub ranks: Vec<usize>,
    /// Seed.
    pub seed: u64,
}

impl Default for Workload {
    fn default() -> Self {
        Self {
            adapters: 100,
            alpha: 1.0,
            rate: 2.0,
            cv: 1.0,
            duration: 300.0,
            input: (8, 512),
            output: (8, 512),
            ranks: vec![8],
            seed: 42,
        }
    }
}

/// One request of a workload.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Arrival {
    /// Seconds from the beginning.
    pub at: f64,
    /// Index of its adapter.
    pub adapter: usize,
    /// Tokens of the prompt.
    pub input: usize,
    /// Tokens of the answer.
    pub output: usize,
}

/// Most requests of a workload.
const MAX_REQUESTS: usize = 10_000_000;

impl Workload {
    /// Refuses what cannot be.
    pub fn check(&self) -> Result<(), String> {
        let positive = |name: &str, v: f64| match v.is_finite() && v > 0.0 {
            true => Ok(()),
            false => Err(format!("{name} {v} should be above 0")),
        };
        positive("alpha", self.alpha)?;
        positive("rate", self.rate)?;
        positive("cv", self.cv)?;
        positive("duration", self.duration)?;
        if self.rate * self.duration > MAX_REQUESTS as f64 {
            return Err(format!("{} requests, at most {MAX_REQUESTS} are made", self.rate * self.duration));
        }
        if self.adapters == 0 || self.ranks.is_empty() || self.ranks.contains(&0) {
            return Err("a workload needs adapters, each of a rank of at least 1".into());
        }
        for (name, (least, most)) in [("input", self.input), ("output", self.output)] {
            if least == 0 || least > most {
                return Err(format!("{name} {least} to {most} should be a range from at least 1"));
            }
        }
        Ok(())
    }

    /// Rank of an adapter.
    pub fn rank(&self, adapter: usize) -> usize {
        self.ranks[adapter % self.ranks.len()]
    }

    /// The requests in the order in which they come. The same seed gives the same.
    pub fn arrivals(&self) -> Result<Vec<Arrival>, String> {
        self.check()?;
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let shape = 1.0 / (self.cv * self.cv);
        let gaps = Gamma::new(shape, self.cv * self.cv / self.rate).map_err(|e| e.to_string())?;
        let (mut all, mut at) = (Vec::new(), 0.0);
        loop {
            at += gaps.sample(&mut rng);
            if at >= self.duration || all.len() >= MAX_REQUESTS {
                return Ok(all);
            }
            let u = rng.random::<f64>().powf(1.0 / self.alpha);
            let adapter = ((self.adapters as f64 * u) as usize).min(self.adapters - 1);
            let (input, output) =
                (rng.random_range(self.input.0..=self.input.1), rng.random_range(self.output.0..=self.output.1));
            all.push(Arrival { at, adapter, input, output });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_have_the_rate_the_spread_and_the_popularity_asked_for() {
        for (alpha, cv) in [(1.0, 1.0), (0.3, 2.0), (2.0, 0.5)] {
            let workload = Workload { alpha, cv, rate: 50.0, duration: 400.0, ..Default::default() };
            let all = workload.arrivals().unwrap();
            assert_eq!(all, workload.arrivals().unwrap());
            let gaps: Vec<f64> = all.windows(2).map(|w| w[1].at - w[0].at).collect();
            let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
            let variance = gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
            assert!((mean * 50.0 - 1.0).abs() < 0.06, "{mean}");
            assert!((variance.sqrt() / mean / cv - 1.0).abs() < 0.1, "{variance}");
            // E u = α / (α + 1).
            let index = all.iter().map(|a| a.adapter as f64).sum::<f64>() / all.len() as f64 / 100.0;
            assert!((index - alpha / (alpha + 1.0)).abs() < 0.02, "{index}");
            assert!(
                all.iter().all(|a| (8..=512).contains(&a.input) && (8..=512).contains(&a.output) && a.adapter < 100)
            );
        }
    }

    #[test]
    fn workloads_that_cannot_be_are_refused() {
        for bad in [
            Workload { rate: -1.0, ..Default::default() },
            Workload { rate: 1e300, ..Default::default() },
            Workload { cv: f64::NAN, ..Default::default() },
            Workload { ranks: vec![], ..Default::default() },
            Workload { adapters: 0, ..Default::default() },
            Workload { input: (5, 4), ..Default::default() },
        ] {
            assert!(bad.arrivals().is_err());
        }
    }
}
