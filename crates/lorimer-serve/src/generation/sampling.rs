//! From logits to the next token.

use std::borrow::Cow;
use std::collections::HashSet;

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// How tokens are drawn. The filters act in llama.cpp's and transformers' order: penalties, temperature, top-k, top-p, min-p.
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
    /// Taken off the logit of a token for each time that the answer has it already (OpenAI's); 0 for none.
    #[serde(default)]
    pub frequency_penalty: f64,
    /// Taken off the logit of a token that the answer has already; 0 for none.
    #[serde(default)]
    pub presence_penalty: f64,
    /// Added to the logits of tokens, before all else.
    #[serde(default)]
    pub logit_bias: Vec<(u32, f32)>,
    /// The only tokens that may be drawn; none for all.
    #[serde(default)]
    pub allowed: Option<Vec<u32>>,
    /// Tokens that an answer has before one of `ends` may be drawn.
    #[serde(default)]
    pub min_tokens: usize,
    /// Tokens that end an answer.
    #[serde(default)]
    pub ends: Vec<u32>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            allowed: None,
            min_tokens: 0,
            ends: Vec::new(),
        }
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
        for (name, value) in
            [("frequency-penalty", self.frequency_penalty), ("presence-penalty", self.presence_penalty)]
        {
            if !(-2.0..=2.0).contains(&value) {
                return bad(name, value, "from -2 to 2");
            }
        }
        if let Some((_, bias)) = self.logit_bias.iter().find(|(_, bias)| !(-100.0..=100.0).contains(bias)) {
            return bad("logit-bias", f64::from(*bias), "from -100 to 100");
        }
        Ok(())
    }

    /// Draws a token after a prompt and what there is of its answer.
    pub fn draw(&self, logits: &[f32], (prompt, answer): (&[u32], &[u32]), rng: &mut ChaCha8Rng) -> u32 {
        let mut logits: Cow<'_, [f32]> = logits.into();
        self.bias(&mut logits, answer.len());
        self.penalise(&mut logits, prompt, answer);
        let by = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        let first = likeliest(&logits);
        if self.temperature == 0.0 {
            return first;
        }
        let top = f64::from(logits[first as usize]);
        let weight = |t: u32| ((f64::from(logits[t as usize]) - top) / self.temperature).exp();
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        if self.top_k > 0 && self.top_k < order.len() {
            order.select_nth_unstable_by(self.top_k - 1, by);
            order.truncate(self.top_k);
            order.sort_unstable_by(by);
        }
        let mut weights: Vec<f64> = order.iter().map(|&t| weight(t)).collect();
        let mut mass: f64 = weights.iter().sum();
        if self.top_p < 1.0 || self.min_p > 0.0 {
            // The likeliest that are kept, looked for among ever more of them.
            let (total, mut among) = (mass, 64);
            (weights, mass) = loop {
                if among < order.len() {
                    order.select_nth_unstable_by(among - 1, by);
                }
                let among_now = among.min(order.len());
                order[..among_now].sort_unstable_by(by);
                let (mut kept, mut mass) = (Vec::new(), 0.0);
                for w in order[..among_now].iter().map(|&t| weight(t)) {
                    if !kept.is_empty() && (mass >= self.top_p * total || w < self.min_p) {
                        break;
                    }
                    kept.push(w);
                    mass += w;
                }
                if kept.len() < among_now || among_now == order.len() {
                    break (kept, mass);
                }
                among *= 8;
            };
        }
        let mut at = rng.random::<f64>() * mass;
        for (token, weight) in order.iter().zip(&weights) {
            at -= weight;
            if at < 0.0 {
                return *token;
            }
        }
        order[weights.len() - 1]
    }

    /// Makes tokens more or less likely as asked, or impossible.
    fn bias(&self, logits: &mut Cow<'_, [f32]>, generated: usize) {
        if let Some(allowed) = &self.allowed {
            let mut only = vec![f32::NEG_INFINITY; logits.len()];
            for &token in allowed {
                if let (Some(only), Some(&l)) = (only.get_mut(token as usize), logits.get(token as usize)) {
                    *only = l;
                }
            }
            *logits = only.into();
        }
        for &(token, bias) in &self.logit_bias {
            if let Some(l) = logits.to_mut().get_mut(token as usize) {
                *l += bias;
            }
        }
        if generated < self.min_tokens {
            for &token in &self.ends {
                if let Some(l) = logits.to_mut().get_mut(token as usize) {
                    *l = f32::NEG_INFINITY;
                }
            }
        }
    }

    /// Makes tokens less likely that were there before.
    fn penalise(&self, logits: &mut Cow<'_, [f32]>, prompt: &[u32], answer: &[u32]) {
        if self.repetition_penalty != 1.0 {
            let unique: HashSet<u32> = prompt.iter().chain(answer).copied().collect();
            let (logits, penalty) = (logits.to_mut(), self.repetition_penalty as f32);
            for token in unique {
                if let Some(l) = logits.get_mut(token as usize) {
                    *l = if *l > 0.0 { *l / penalty } else { *l * penalty };
                }
            }
        }
        if self.frequency_penalty != 0.0 || self.presence_penalty != 0.0 {
            let logits = logits.to_mut();
            let mut seen = HashSet::new();
            for &token in answer {
                if let Some(l) = logits.get_mut(token as usize) {
                    let once = if seen.insert(token) { self.presence_penalty } else { 0.0 };
                    *l -= (self.frequency_penalty + once) as f32;
                }
            }
        }
    }
}

/// The first of the largest.
fn likeliest(logits: &[f32]) -> u32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    for chunk in logits.chunks(16) {
        lanes.iter_mut().zip(chunk).for_each(|(lane, &l)| *lane = lane.max(l));
    }
    let largest = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|&l| l == largest).unwrap_or(0) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    fn share(sampling: &Sampling, token: u32) -> f64 {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let logits = [2.0f32.ln(), 1.0f32.ln(), 1.0f32.ln(), -30.0];
        (0..4000).filter(|_| sampling.draw(&logits, (&[], &[]), &mut rng) == token).count() as f64 / 4000.0
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
        assert_eq!(sampling.draw(&[1.0, 0.9], (&[0], &[]), &mut rng), 1);
        assert_eq!(sampling.draw(&[-1.0, -1.5], (&[], &[0]), &mut rng), 1);
    }

    #[test]
    fn penalties_count_what_the_answer_has() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let logits = [3.0, 2.0, 1.9];
        let frequency = Sampling { frequency_penalty: 0.6, ..Default::default() };
        assert_eq!(frequency.draw(&logits, (&[0, 0, 0], &[0]), &mut rng), 0);
        assert_eq!(frequency.draw(&logits, (&[], &[0, 0]), &mut rng), 1);
        let presence = Sampling { presence_penalty: 1.05, ..Default::default() };
        assert_eq!(presence.draw(&logits, (&[], &[0, 0, 0]), &mut rng), 1);
        assert_eq!(presence.draw(&logits, (&[], &[0, 1]), &mut rng), 0);
        assert!(Sampling { presence_penalty: 3.0, ..Default::default() }.check().is_err());
    }

    #[test]
    fn tokens_are_biased_allowed_and_held_back() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let logits = [3.0, 2.0, 1.0];
        let mut first = |sampling: &Sampling, answer: &[u32]| sampling.draw(&logits, (&[], answer), &mut rng);
        let bias = Sampling { logit_bias: vec![(0, -100.0), (2, 0.5), (9, 100.0)], ..Default::default() };
        assert_eq!(first(&bias, &[]), 1);
        assert_eq!(first(&Sampling { allowed: Some(vec![2, 9]), ..Default::default() }, &[]), 2);
        let held = Sampling { min_tokens: 2, ends: vec![0], ..Default::default() };
        assert_eq!((first(&held, &[]), first(&held, &[1]), first(&held, &[1, 1])), (1, 1, 0));
        // What can draw nothing draws something, and does not fail.
        let nothing = Sampling { temperature: 1.0, top_p: 0.5, allowed: Some(vec![]), ..Default::default() };
        assert!(first(&nothing, &[]) < 3);
        assert!(Sampling { logit_bias: vec![(0, 101.0)], ..Default::default() }.check().is_err());
        assert!(Sampling { logit_bias: vec![(0, f32::NAN)], ..Default::default() }.check().is_err());
    }

    /// Filters over a long row of logits keep what sorting all of it would keep.
    #[test]
    fn filters_keep_the_likeliest() {
        let logits: Vec<f32> = (0..3000u32).map(|i| ((i * 7919 % 3000) as f32 / 900.0).sin() * 2.0).collect();
        for sampling in [
            Sampling { temperature: 1.3, top_p: 0.5, ..Default::default() },
            Sampling { temperature: 0.7, min_p: 0.3, ..Default::default() },
            Sampling { temperature: 1.0, top_k: 900, top_p: 0.8, ..Default::default() },
            Sampling { temperature: 0.2, top_k: 5, min_p: 0.9, ..Default::default() },
        ] {
            let mut order: Vec<usize> = (0..logits.len()).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
            order.truncate(if sampling.top_k > 0 { sampling.top_k } else { order.len() });
            let top = f64::from(logits[order[0]]);
            let weights: Vec<f64> =
                order.iter().map(|&t| ((f64::from(logits[t]) - top) / sampling.temperature).exp()).collect();
            let total: f64 = weights.iter().sum();
            let (mut kept, mut mass) = (HashSet::new(), 0.0);
            for (token, w) in order.iter().zip(&weights) {
                if !kept.is_empty() && (mass >= sampling.top_p * total || *w < sampling.min_p) {
                    break;
                }
                kept.insert(*token as u32);
                mass += w;
            }
            let mut rng = ChaCha8Rng::seed_from_u64(4);
            let drawn: HashSet<u32> = (0..20_000).map(|_| sampling.draw(&logits, (&[], &[]), &mut rng)).collect();
            assert!(drawn.is_subset(&kept), "{sampling:?}");
            assert!(drawn.len() * 10 > kept.len() * 8, "{} of {} for {sampling:?}", drawn.len(), kept.len());
        }
    }
}
