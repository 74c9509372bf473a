//! Clipping and Gaussian noise of what a client sends, and the privacy loss of that.
//!
//! A stack shows each client's factors by themselves, so there is no sum to hide in: the client clips what it has changed of both factors together to a norm C
//! and adds noise of standard deviation zC to every number. The loss is that of one client's whole data exchanged for others (sensitivity 2C), over all rounds,
//! by the exact curve of the Gaussian mechanism (Balle and Wang 2018, arXiv 1805.06530, theorem 8).

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use lorimer_adapter::StoredAdapter;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// What is done to an adapter before it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Privacy {
    /// C: the largest norm of the change of all factors together.
    pub clip: f64,
    /// z: noise in parts of C.
    pub noise: f64,
}

impl Privacy {
    /// # Errors
    ///
    /// Fails if a number is none that clipping or noise can have.
    pub fn check(self) -> Result<()> {
        let Self { clip, noise } = self;
        match clip > 0.0 && clip.is_finite() && noise >= 0.0 && noise.is_finite() {
            true => Ok(()),
            false => Err(Error::Settings(format!(
                "a norm of {clip} should be above 0, noise of {noise} at least 0, and both finite"
            ))),
        }
    }
}

/// ε of one client's data for `rounds` uploads with noise z at a δ, where neighbours differ in all the data of one client. Infinite without noise.
pub fn epsilon(rounds: usize, noise: f64, delta: f64) -> f64 {
    // Exchanging data moves a clipped change by up to 2C; uploads with one z are one upload with z over their number's root.
    gaussian_epsilon(noise / 2.0 / (rounds.max(1) as f64).sqrt(), delta)
}

/// ε of one Gaussian mechanism of sensitivity 1.
fn gaussian_epsilon(sigma: f64, delta: f64) -> f64 {
    if !(sigma > 0.0 && delta > 0.0) {
        return f64::INFINITY;
    }
    let below = |x: f64| 0.5 * libm::erfc(-x / std::f64::consts::SQRT_2);
    let of = |e: f64| below(0.5 / sigma - e * sigma) - e.exp() * below(-0.5 / sigma - e * sigma);
    let (mut low, mut high) = (0.0, 1.0);
    while of(high) > delta && high < 700.0 {
        high *= 2.0;
    }
    if high >= 700.0 {
        return f64::INFINITY;
    }
    for _ in 0..200 {
        let middle = 0.5 * (low + high);
        match of(middle) > delta {
            true => low = middle,
            false => high = middle,
        }
    }
    high
}

/// What may be sent of an adapter that began as `start`.
///
/// # Errors
///
/// Fails if the two have other tensors, or if one is not a float.
pub fn private(adapter: &StoredAdapter, start: &StoredAdapter, privacy: Privacy, seed: u64) -> Result<StoredAdapter> {
    let mut changes = BTreeMap::new();
    let mut square = 0.0;
    for (name, tensor) in &adapter.tensors {
        let Some(before) = start.tensors.get(name).filter(|t| t.dims() == tensor.dims()) else {
            return Err(Error::Settings(format!("`{name}` is not what it began as")));
        };
        let change = (tensor.to_dtype(DType::F64)? - before.to_dtype(DType::F64)?)?;
        square += change.sqr()?.sum_all()?.to_scalar::<f64>()?;
        changes.insert(name.clone(), (before, change));
    }
    let norm = square.sqrt();
    let factor = if norm > privacy.clip { privacy.clip / norm } else { 1.0 };
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut sent = adapter.clone();
    sent.manifest = None;
    for (name, (before, change)) in changes {
        let noise: Vec<f64> = (0..change.elem_count())
            .map(|_| {
                let drawn: f64 = StandardNormal.sample(&mut rng);
                drawn * privacy.noise * privacy.clip
            })
            .collect();
        let noise = Tensor::from_vec(noise, change.dims(), change.device())?;
        let now = ((before.to_dtype(DType::F64)? + (change * factor)?)? + noise)?;
        sent.tensors.insert(name.clone(), now.to_dtype(before.dtype())?);
    }
    Ok(sent)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// PyPI's dp-accounting 0.6.0, `pld.PLDAccountant()` of `GaussianDpEvent(z)` composed R times, at δ = 1e-5; its other relation is ours with twice the z.
    #[test]
    fn the_loss_is_that_of_a_kept_accountant() {
        for (rounds, noise, expected) in [(3, 1.0, 8.3854), (3, 4.0, 1.6980)] {
            assert!((epsilon(rounds, 2.0 * noise, 1e-5) - expected).abs() < 2e-4, "{rounds} {noise}");
        }
        assert_eq!(epsilon(3, 0.0, 1e-5), f64::INFINITY);
        assert!(epsilon(1, 1e-3, 1e-5).is_infinite() || epsilon(1, 1e-3, 1e-5) > 100.0);
        assert!(epsilon(4, 1.0, 1e-5) > epsilon(1, 1.0, 1e-5));
    }

    #[test]
    fn changes_are_clipped_together_and_noise_has_its_size() {
        let of = |value: f32| {
            let tensor = |n: usize| Tensor::full(value, (n, 50), &Device::Cpu).unwrap();
            StoredAdapter {
                path: Default::default(),
                config: Default::default(),
                tensors: BTreeMap::from([("a".to_string(), tensor(10)), ("b".to_string(), tensor(30))]),
                manifest: None,
                parts: Vec::new(),
            }
        };
        let norm = |a: &StoredAdapter, b: &StoredAdapter| {
            let one = |(name, t): (&String, &Tensor)| {
                (t - &b.tensors[name]).unwrap().sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()
            };
            f64::from(a.tensors.iter().map(one).sum::<f32>()).sqrt()
        };
        let (start, adapter) = (of(1.0), of(2.0));
        let plain = private(&adapter, &start, Privacy { clip: 3.0, noise: 0.0 }, 0).unwrap();
        assert!((norm(&plain, &start) - 3.0).abs() < 1e-4);
        let whole = private(&adapter, &start, Privacy { clip: 1e3, noise: 0.0 }, 0).unwrap();
        assert!(norm(&whole, &adapter) < 1e-6);
        let noisy = private(&adapter, &start, Privacy { clip: 3.0, noise: 0.5 }, 0).unwrap();
        let size = norm(&noisy, &plain) / (2000f64).sqrt();
        assert!((size - 1.5).abs() < 0.1, "{size}");
    }
}
