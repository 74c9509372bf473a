//! From logits to the next token.

use std::borrow::Cow;
use std::collections::HashSet;

use lorimer_tensor::{exp_f32, wide};
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
        let first = likeliest(&logits);
        if self.temperature == 0.0 {
            return first;
        }
        let top = logits[first as usize];
        let u = rng.random::<f64>();
        let all = (self.top_k == 0 || self.top_k >= logits.len()) && self.top_p >= 1.0 && self.min_p <= 0.0;
        if all { self.among_all(&logits, top, u).unwrap_or(first) } else { self.among_likeliest(&logits, top, u) }
    }

    /// The token at the share `u` of the weights of all.
    fn among_all(&self, logits: &[f32], top: f32, u: f64) -> Option<u32> {
        let sums = weights(logits, top, self.temperature);
        let mut at = u * sums.iter().sum::<f64>();
        // Sums in f32 and in f64 differ in the last places: the last with a weight, then.
        let end = sums.iter().rposition(|&sum| sum > 0.0)?;
        let mut last = None;
        for (i, (chunk, sum)) in logits.chunks(CHUNK).zip(sums).enumerate() {
            if at >= sum && i < end {
                at -= sum;
                continue;
            }
            for (token, &l) in (i * CHUNK..).zip(chunk) {
                let weight = (f64::from(l - top) / self.temperature).exp();
                at -= weight;
                if weight > 0.0 {
                    last = Some(token as u32);
                    if at < 0.0 {
                        return last;
                    }
                }
            }
            at = 0.0;
        }
        last
    }

    /// The token at the share `u` of the weights of those that the filters keep. They are looked for among the tokens near the likeliest, and ever more
    /// of them.
    fn among_likeliest(&self, logits: &[f32], top: f32, u: f64) -> u32 {
        let by = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        let weight = |t: &u32| (f64::from(logits[*t as usize] - top) / self.temperature).exp();
        let top_k = if self.top_k > 0 { self.top_k.min(logits.len()) } else { logits.len() };
        let cut = top_k < logits.len();
        let all: f64 = if cut || self.top_p >= 1.0 { 0.0 } else { weights(logits, top, self.temperature).iter().sum() };
        // How far below the likeliest, in units of the temperature.
        let mut depth = 4.0;
        loop {
            let bound = (f64::from(top) - depth * self.temperature) as f32;
            let mut order = at_least(logits, if depth > 1000.0 { f32::NEG_INFINITY } else { bound });
            let whole = order.len() == logits.len();
            depth *= 4.0;
            if cut && order.len() < top_k && !whole {
                continue;
            }
            if order.len() > top_k {
                order.select_nth_unstable_by(top_k - 1, by);
                order.truncate(top_k);
            }
            order.sort_unstable_by(by);
            let weights: Vec<f64> = order.iter().map(weight).collect();
            let total = if cut { weights.iter().sum() } else { all };
            let mut mass = 0.0;
            let ends = weights.iter().enumerate().position(|(i, &w)| {
                let over = i > 0 && ((self.top_p < 1.0 && mass >= self.top_p * total) || w < self.min_p);
                mass += if over { 0.0 } else { w };
                over
            });
            if ends.is_none() && !whole && !cut {
                continue;
            }
            let kept = ends.unwrap_or(order.len());
            let mut at = u * mass;
            let drawn = weights[..kept].iter().position(|w| {
                at -= w;
                at < 0.0
            });
            return order[drawn.unwrap_or(kept - 1)];
        }
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

/// Tokens whose weights are summed in f32.
const CHUNK: usize = 256;

/// e^((l − top) / temperature) of all logits, summed chunk by chunk. What is infinitely unlikely adds nothing.
pub(crate) fn weights(logits: &[f32], top: f32, temperature: f64) -> Vec<f64> {
    let inverse = (1.0 / temperature).min(f64::from(f32::MAX)) as f32;
    wide!({
        let sum = |chunk: &[f32]| {
            let mut lanes = [0f32; 16];
            for part in chunk.chunks(16) {
                for (lane, &l) in lanes.iter_mut().zip(part) {
                    let x = (l - top) * inverse;
                    *lane += if x > -87.0 { exp_f32(x) } else { 0.0 };
                }
            }
            f64::from(lanes.iter().sum::<f32>())
        };
        logits.chunks(CHUNK).map(sum).collect()
    })
}

/// Tokens whose logits are at least so large.
fn at_least(logits: &[f32], bound: f32) -> Vec<u32> {
    let mut found = Vec::new();
    wide!({
        for (i, chunk) in logits.chunks(64).enumerate() {
            if chunk.iter().fold(false, |any, &l| any | (l >= bound)) {
                let those = (i as u32 * 64..).zip(chunk).filter(|&(_, &l)| l >= bound);
                found.extend(those.map(|(token, _)| token));
            }
        }
    });
    found
}

/// The first of the largest.
pub(crate) fn likeliest(logits: &[f32]) -> u32 {
    let largest = wide!({
        let mut lanes = [f32::NEG_INFINITY; 16];
        for chunk in logits.chunks(16) {
            lanes.iter_mut().zip(chunk).for_each(|(lane, &l)| *lane = if l > *lane { l } else { *lane });
        }
        lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
    });
    logits.iter().position(|&l| l == largest).unwrap_or(0) as u32
}

/// Whether all are finite numbers.
pub(crate) fn all_finite(logits: &[f32]) -> bool {
    wide!(logits.chunks(256).all(|chunk| chunk.iter().fold(true, |all, l| all & l.is_finite())))
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

    /// Over a long row, tokens come as their probabilities say, and those that are impossible never.
    #[test]
    fn all_tokens_of_a_long_row_can_be_drawn() {
        let logits: Vec<f32> =
            (0..3000u32)
                .map(|i| {
                    if i % 7 == 3 || i < 300 {
                        f32::NEG_INFINITY
                    } else {
                        ((i * 7919 % 3000) as f32 / 900.0).sin() * 2.0
                    }
                })
                .collect();
        let sampling = Sampling { temperature: 0.8, ..Default::default() };
        let weight = |i: usize| (f64::from(logits[i]) / 0.8).exp();
        let total: f64 = (0..3000).map(weight).sum();
        let mut counts = vec![0f64; 3000];
        let mut rng = ChaCha8Rng::seed_from_u64(9);
        let draws = 300_000;
        (0..draws).for_each(|_| counts[sampling.draw(&logits, (&[], &[]), &mut rng) as usize] += 1.0);
        // χ² over groups of tokens next to each other.
        let chi: f64 = (0..3000)
            .step_by(100)
            .map(|i| {
                let (seen, p) = (counts[i..i + 100].iter().sum::<f64>(), (i..i + 100).map(weight).sum::<f64>() / total);
                if p == 0.0 {
                    assert_eq!(seen, 0.0)
                };
                if p > 0.0 { (seen - p * f64::from(draws)).powi(2) / (p * f64::from(draws)) } else { 0.0 }
            })
            .sum();
        assert!(chi < 60.0, "{chi}");
        assert!((0..3000).all(|i| counts[i] == 0.0 || logits[i].is_finite()));
        // At either end of the unit interval, too.
        let first = logits.iter().position(|l| l.is_finite()).unwrap() as u32;
        let top = logits[likeliest(&logits) as usize];
        assert_eq!(sampling.among_all(&logits, top, 0.0), Some(first));
        assert_eq!(sampling.among_all(&logits, top, 1.0), Some(2998));
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
