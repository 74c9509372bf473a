//! Dropout of a change's input, for the methods that have it.

use candle_core::{DType, Device, Result as TensorResult, Tensor};
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::step::{Step, site_seed};

/// Dropout on one projection.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    probability: f64,
    seed: u64,
}

/// One step of SplitMix64, as a hash of `n`.
fn mix(n: u64) -> u64 {
    let mut z = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Refuses a probability that is none.
pub fn check_dropout(key: &str, probability: f64) -> Result<()> {
    match (0.0..1.0).contains(&probability) {
        true => Ok(()),
        false => Err(Error::Config(format!("{key} = {probability} should be at least 0 and below 1"))),
    }
}

impl Dropout {
    /// With this probability of zeroing an element, at a module.
    pub fn new(probability: f64, module: &str) -> Self {
        Self { probability, seed: site_seed(0, module) }
    }

    /// Whether a step has none.
    pub fn is_off(&self, step: &Step) -> bool {
        step.training.is_none() || self.probability == 0.0
    }

    /// The mask of x's shape: 0 or 1/(1 − p), or None where none applies. It depends on the step's seed, the site and the element
    /// only, so that a resumed run draws the same.
    pub fn mask(&self, x: &Tensor, step: &Step) -> TensorResult<Option<Tensor>> {
        let Some(seed) = step.training.filter(|_| self.probability > 0.0) else { return Ok(None) };
        let key = mix(seed ^ self.seed);
        let threshold = (self.probability * (1u64 << 53) as f64) as u64;
        let keep = 1.0 / (1.0 - self.probability);
        let one = |i: usize| if mix(key.wrapping_add(i as u64)) >> 11 < threshold { 0.0 } else { keep };
        let count = x.elem_count();
        let mask = match x.dtype() {
            DType::F64 => Tensor::from_vec((0..count).map(one).collect::<Vec<_>>(), x.shape(), &Device::Cpu)?,
            dtype => {
                let mask: Vec<f32> = (0..count).into_par_iter().with_min_len(1 << 14).map(|i| one(i) as f32).collect();
                Tensor::from_vec(mask, x.shape(), &Device::Cpu)?.to_dtype(dtype)?
            }
        };
        Ok(Some(mask))
    }
}
