//! Choosing some of an adapter's ranks for each row, and keeping their use even without a further loss: for methods whose ranks are experts.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Result as TensorResult, Tensor, Var};
use lorimer_tensor::NotFinite;
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::method::ParameterSource;
use crate::methods::largest::largest_places;
use crate::step::Step;

/// Sets the places of the `k` largest scores to `true`, the lowest place first where scores are equal.
pub(crate) fn choose<T: PartialOrd + Copy>(scores: &[T], k: usize, chosen: &mut [bool]) {
    chosen.fill(false);
    largest_places(scores, k).into_iter().for_each(|place| chosen[place as usize] = true);
}

/// One where a score (rows, rank) is among the `k` largest of its row, else zero; and how many rows chose each rank.
pub(crate) fn top_k(scores: &Tensor, k: usize) -> TensorResult<(Tensor, Vec<u64>)> {
    let (rows, rank) = scores.dims2()?;
    let values = scores.detach().to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    let mut mask = vec![0f64; rows * rank];
    let width = rank.max(1);
    let all = mask.par_chunks_mut(width).zip(values.par_chunks(width)).map(|(mask, scores)| {
        let mut chosen = vec![false; rank];
        choose(scores, k, &mut chosen);
        mask.iter_mut().zip(&chosen).for_each(|(m, chosen)| *m = f64::from(u8::from(*chosen)));
        scores.iter().all(|s| !s.is_nan())
    });
    if !all.reduce(|| true, |a, b| a && b) {
        return Err(NotFinite::error("a score that ranks or experts are chosen by is not a number"));
    }
    let mut counts = vec![0u64; rank];
    for row in mask.chunks(width) {
        counts.iter_mut().zip(row).for_each(|(count, m)| *count += u64::from(*m > 0.0));
    }
    Ok((Tensor::from_vec(mask, (rows, rank), &Device::Cpu)?.to_dtype(scores.dtype())?, counts))
}

/// A bias on the scores, moved after each step towards an even use of all ranks: bᵢ ← bᵢ + u · sign(mean c − cᵢ), with cᵢ the rows of the step
/// that chose rank i (Wang et al. 2024, arXiv 2408.15664).
#[derive(Debug)]
pub(crate) struct Balance {
    /// b (rank).
    pub bias: Var,
    rate: f64,
    /// Of each forward of the step, by its seed, so that one that is computed again counts once.
    counts: Mutex<BTreeMap<u64, Vec<u64>>>,
}

impl Balance {
    /// The bias `key` out of a file, where it has to be, or zeros.
    pub fn attach(source: &mut ParameterSource<'_>, key: &str, rank: usize, rate: f64) -> Result<Self> {
        let zeros = |dtype| Tensor::zeros(rank, dtype, &Device::Cpu);
        let dtype = source.dtype();
        let bias = source.trainable(key, &[rank], |_| Ok(zeros(dtype)?))?;
        Ok(Self { bias, rate, counts: Mutex::default() })
    }

    /// Notes which ranks the rows of a forward chose, in training.
    pub fn note(&self, step: &Step, counts: Vec<u64>) {
        if let Some(seed) = step.training {
            self.counts.lock().unwrap_or_else(PoisonError::into_inner).insert(seed, counts);
        }
    }

    /// Moves the bias by what was noted since the last step.
    pub fn after_step(&self) -> TensorResult<()> {
        let noted = std::mem::take(&mut *self.counts.lock().unwrap_or_else(PoisonError::into_inner));
        let rank = self.bias.elem_count();
        let mut sums = vec![0i128; rank];
        for counts in noted.values() {
            sums.iter_mut().zip(counts).for_each(|(sum, &count)| *sum += i128::from(count));
        }
        // In whole numbers: the mean is the total over the rank.
        let total: i128 = sums.iter().sum();
        let moves: Vec<f64> =
            sums.iter().map(|&count| self.rate * (total - count * rank as i128).signum() as f64).collect();
        if moves.iter().any(|m| *m != 0.0) {
            let moves = Tensor::from_vec(moves, rank, &Device::Cpu)?.to_dtype(self.bias.dtype())?;
            self.bias.set(&(self.bias.as_tensor().detach() + moves)?)?;
        }
        Ok(())
    }
}

/// Refuses a number of ranks to choose that is none.
pub(crate) fn check_choice(key: &str, k: usize, r: usize) -> Result<()> {
    match (1..=r).contains(&k) {
        true => Ok(()),
        false => Err(Error::Config(format!("{key} = {k} should be between 1 and r = {r}"))),
    }
}

/// Refuses a rate of the bias that is none.
pub(crate) fn check_rate(key: &str, rate: f64) -> Result<()> {
    match rate.is_finite() && rate >= 0.0 {
        true => Ok(()),
        false => Err(Error::Config(format!("{key} = {rate} should be a number of at least 0"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_chosen_before_is_forgotten() {
        let mut chosen = [true; 5];
        choose(&[1.0, 2.0, 2.0, 2.0, 0.0], 2, &mut chosen);
        assert_eq!(chosen, [false, true, true, false, false]);
    }

    #[test]
    fn what_is_no_number_is_an_error() {
        let scores = Tensor::new(&[[1.0f32, f32::NAN, 0.0]], &Device::Cpu).unwrap();
        assert!(top_k(&scores, 1).is_err());
    }
}
