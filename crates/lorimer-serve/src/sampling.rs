//! From logits to the next token.

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// How tokens are drawn. The filters act in llama.cpp's and transformers' order: repetition penalty, temperature,
/// top-k, top-p, min-p.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 takes the likeliest token; higher flattens.
    pub temperature: f64,
    /// Only the k likeliest tokens; 0 for all.
    pub top_k: usize,
    /// Only the likeliest tokens that together reach this probability; 1 for all.
    pub top_p: f64,
    /// Only tokens at least this times as likely as the likeliest; 0 for all.
    pub min_p: f64,
    /// Logits of tokens seen before are divided (if positive) or multiplied by this (CTRL, arXiv 1909.05858); 1 for none.
    pub repetition_penalty: f64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0 }
    }
}

impl Sampling {
    /// Refuses what cannot be.
    pub fn check(&self) -> Result<(), String> {
        let bad = |name: &str, value: f64, range: &str| Err(format!("--{name} {value} should be {range}"));
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return bad("temperature", self.temperature, "0 or more");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return bad("top-p", self.top_p, "above 0 and at most 1");
        }
        if !(0.0..1.0).contains(&self.min_p) {
            return bad("min-p", self.min_p, "at least 0 and below 1");
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            return bad("repetition-penalty", self.repetition_penalty, "above 0");
        }
        Ok(())
    }

    /// Draws a token. `seen` are the tokens of prompt and answer so far.
    pub fn draw(&self, logits: &[f32], seen: &[u32], rng: &mut ChaCha8Rng) -> u32 {
        let mut logits: Vec<f64> = logits.iter().map(|&l| f64::from(l)).collect();
        if self.repetition_penalty != 1.0 {
            let unique: std::collections::HashSet<u32> = seen.iter().copied().collect();
            for token in unique {
                if let Some(l) = logits.get_mut(token as usize) {
                    *l = if *l > 0.0 { *l / self.repetition_penalty } else { *l * self.repetition_penalty };
                }
            }
        }
        let likeliest = || {
            let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0)));
            best.map_or(0, |(i, _)| i as u32)
        };
        if self.temperature == 0.0 {
            return likeliest();
        }
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
        if self.top_k > 0 {
            order.truncate(self.top_k);
        }
        let Some(&first) = order.first() else { return 0 };
        let top = logits[first as usize];
        let mut weights: Vec<f64> =
            order.iter().map(|&t| ((logits[t as usize] - top) / self.temperature).exp()).collect();
        let total: f64 = weights.iter().sum();
        let (mut kept, mut mass) = (0, 0.0);
        while kept < weights.len() && (kept == 0 || (mass < self.top_p * total && weights[kept] >= self.min_p)) {
            mass += weights[kept];
            kept += 1;
        }
        weights.truncate(kept);
        let mut at = rng.random::<f64>() * mass;
        for (token, weight) in order.iter().zip(&weights) {
            at -= weight;
            if at < 0.0 {
                return *token;
            }
        }
        order[kept - 1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    fn share(sampling: &Sampling, token: u32) -> f64 {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let logits = [2.0f32.ln(), 1.0f32.ln(), 1.0f32.ln(), -30.0];
        (0..4000).filter(|_| sampling.draw(&logits, &[], &mut rng) == token).count() as f64 / 4000.0
    }

    #[test]
    fn tokens_come_as_often_as_their_probabilities_say() {
        let plain = Sampling { temperature: 1.0, ..Default::default() };
        assert!((share(&plain, 0) - 0.5).abs() < 0.03);
        assert_eq!(share(&Sampling { top_k: 1, ..plain.clone() }, 0), 1.0);
        assert!((share(&Sampling { top_k: 2, ..plain.clone() }, 0) - 2.0 / 3.0).abs() < 0.03);
        assert_eq!(share(&Sampling { top_p: 0.4, ..plain.clone() }, 0), 1.0);
        assert_eq!(share(&Sampling { min_p: 0.6, ..plain }, 0), 1.0);
        assert_eq!(share(&Sampling::default(), 0), 1.0);
    }

    #[test]
    fn repeated_tokens_become_less_likely() {
        let sampling = Sampling { repetition_penalty: 2.0, ..Default::default() };
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        assert_eq!(sampling.draw(&[1.0, 0.9], &[0], &mut rng), 1);
        assert_eq!(sampling.draw(&[-1.0, -1.5], &[0], &mut rng), 1);
    }
}
