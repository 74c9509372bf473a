//! Cross-entropy over a large vocabulary.

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::kernels::real::Real;
use crate::kernels::simd::{exp_in_place, sum2};
use crate::kernels::slices::{slice, with_mut_slice, with_slices};
use crate::kernels::wide::wide;
use crate::ops::project::{frozen_accumulate_input, frozen_linear};
use crate::storage::FrozenWeight;

/// `−log softmax(logits)[target]` of every row: `logits` (rows, vocabulary) f32 or f64, one target a row → (rows).
pub fn cross_entropy(logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
    smoothed_cross_entropy(logits, targets, 0.0)
}

/// [`cross_entropy`] with smoothed labels, as transformers defines them: `1 − smoothing` times that of the target and `smoothing` times the mean over the
/// vocabulary. `smoothing` is between 0 and 1.
pub fn smoothed_cross_entropy(logits: &Tensor, targets: &[u32], smoothing: f64) -> Result<Tensor> {
    let (rows, vocabulary) = logits.dims2()?;
    if rows != targets.len() {
        candle_core::bail!("cross-entropy: {rows} rows of logits but {} targets", targets.len());
    }
    if let Some(bad) = targets.iter().find(|&&t| t as usize >= vocabulary) {
        candle_core::bail!("cross-entropy: target {bad} is outside the vocabulary of {vocabulary}");
    }
    if !logits.device().is_cpu() {
        return cross_entropy_reference(logits, targets, smoothing);
    }
    logits.contiguous()?.apply_op1(CrossEntropy { targets: targets.to_vec(), smoothing })
}

/// The reference form out of plain candle operations.
pub fn cross_entropy_reference(logits: &Tensor, targets: &[u32], smoothing: f64) -> Result<Tensor> {
    let index = Tensor::from_slice(targets, (targets.len(), 1), logits.device())?;
    let max = logits.max_keepdim(1)?;
    let shifted = logits.broadcast_sub(&max)?;
    let total = shifted.exp()?.sum_keepdim(1)?.log()?;
    let own = (shifted.gather(&index, 1)? * (1.0 - smoothing))?;
    ((total - own)? - (shifted.mean_keepdim(1)? * smoothing)?)?.squeeze(1)
}

/// Bytes of logits that exist at a time where head and loss are one operation.
pub const CHUNK_BYTES: usize = 64 << 20;

/// Σ [`smoothed_cross_entropy`] of the rows of x Wᵀ (a scalar) and its gradient (rows, width): `x` (rows,
/// width), `head` (vocabulary, width). Logits exist for a chunk of rows only.
pub(crate) fn head_loss_and_gradient(
    x: &Tensor,
    head: &FrozenWeight,
    targets: &[u32],
    smoothing: f64,
) -> Result<(Tensor, Tensor)> {
    fn run<T: Real>(x: &Tensor, head: &FrozenWeight, targets: &[u32], smoothing: f64) -> Result<(Tensor, Tensor)> {
        let (rows, width) = x.dims2()?;
        let vocabulary = head.dims()?.0;
        let chunk = (CHUNK_BYTES / (vocabulary.max(1) * size_of::<T>())).clamp(1, rows.max(1));
        let mut gradient = vec![T::zero(); rows * width];
        let mut total = 0.0;
        for ((start, targets), dx) in
            (0..rows).step_by(chunk).zip(targets.chunks(chunk)).zip(gradient.chunks_mut(chunk * width.max(1)))
        {
            let logits = frozen_linear(&x.narrow(0, start, targets.len())?.contiguous()?.detach(), head)?;
            with_mut_slice(&logits, |logits: &mut [T]| {
                let losses = logits.par_chunks_mut(vocabulary.max(1)).zip(targets).map(|(row, &t)| {
                    let (target, mean) = (row[t as usize], mean_of(row, smoothing));
                    let wide_of = |v: T| num_traits::ToPrimitive::to_f64(&v).unwrap_or(f64::NAN);
                    let (max, sum) = wide!({
                        let (max, _) = exp_in_place(row);
                        // Parts in the row's type, their sum in f64.
                        let sum: f64 = row.chunks(1024).map(|part| wide_of(sum2(part, part, |v, _| v))).sum();
                        let inverse = T::from_f64(sum.recip());
                        row.iter_mut().for_each(|v| *v *= inverse);
                        (max, sum)
                    });
                    let max = wide_of(max);
                    smooth(row, t, smoothing, T::one());
                    sum.ln() - (1.0 - smoothing) * (wide_of(target) - max) - smoothing * (mean - max)
                });
                total += losses.collect::<Vec<f64>>().into_iter().sum::<f64>();
                Ok(())
            })?;
            frozen_accumulate_input(&logits, head, dx, false)?;
        }
        let loss = Tensor::new(total, x.device())?.to_dtype(x.dtype())?;
        Ok((loss, Tensor::from_vec(gradient, (rows, width), x.device())?))
    }
    let vocabulary = head.dims()?.0;
    if targets.len() != x.dim(0)? || targets.iter().any(|&t| t as usize >= vocabulary) {
        candle_core::bail!("cross-entropy: {} targets for {:?}, below {vocabulary} each", targets.len(), x.shape());
    }
    match x.dtype() {
        DType::F64 => run::<f64>(x, head, targets, smoothing),
        _ => run::<f32>(x, head, targets, smoothing),
    }
}

/// Mean of a row of logits, where labels are smoothed.
fn mean_of<T: Real>(row: &[T], smoothing: f64) -> f64 {
    if smoothing == 0.0 {
        return 0.0;
    }
    row.iter().map(|v| num_traits::ToPrimitive::to_f64(v).unwrap_or(f64::NAN)).sum::<f64>() / row.len() as f64
}

/// From `g` times softmax to `g` times the gradient of the loss with smoothed labels.
fn smooth<T: Real>(row: &mut [T], target: u32, smoothing: f64, g: T) {
    row[target as usize] -= g * T::from_f64(1.0 - smoothing);
    if smoothing != 0.0 {
        let share = g * T::from_f64(smoothing / row.len() as f64);
        row.iter_mut().for_each(|v| *v -= share);
    }
}

struct CrossEntropy {
    targets: Vec<u32>,
    smoothing: f64,
}

/// `(maximum, log Σ exp(v − maximum))`.
fn log_sum<T: Real>(row: &[T]) -> (T, T) {
    let max = row.iter().copied().fold(T::neg_infinity(), num_traits::Float::max);
    // Tens of thousands of terms: one after the other in f32 they would lose four digits.
    let total: f64 = row.iter().map(|&v| num_traits::ToPrimitive::to_f64(&(v - max).exp()).unwrap_or(f64::NAN)).sum();
    (max, T::from_f64(total.ln()))
}

impl CrossEntropy {
    fn forward<T: Real>(&self, logits: &[T], vocabulary: usize) -> Vec<T> {
        logits
            .par_chunks(vocabulary.max(1))
            .zip(&self.targets)
            .map(|(row, &t)| {
                let (max, log) = log_sum(row);
                let mean = T::from_f64(mean_of(row, self.smoothing));
                let own = (row[t as usize] - max) * T::from_f64(1.0 - self.smoothing);
                log - own - (mean - max) * T::from_f64(self.smoothing)
            })
            .collect()
    }

    fn backward<T: Real>(&self, logits: &Tensor, grad: &Tensor) -> Result<Tensor> {
        let (_, vocabulary) = logits.dims2()?;
        with_slices([logits, grad], |[logits, grad]: [&[T]; 2]| {
            let mut d = vec![T::zero(); logits.len()];
            d.par_chunks_mut(vocabulary.max(1))
                .zip(logits.par_chunks(vocabulary.max(1)))
                .zip(grad.par_iter().zip(&self.targets))
                .for_each(|((d, row), (&g, &t))| {
                    let (max, log) = log_sum(row);
                    d.iter_mut().zip(row).for_each(|(d, &v)| *d = g * (v - max - log).exp());
                    smooth(d, t, self.smoothing, g);
                });
            Ok(d)
        })
        .and_then(|d| Tensor::from_vec(d, logits.shape(), logits.device()))
    }
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, vocabulary) = layout.shape().dims2()?;
        let storage = match x {
            CpuStorage::F32(_) => CpuStorage::F32(self.forward(slice::<f32>(x, layout)?, vocabulary)),
            CpuStorage::F64(_) => CpuStorage::F64(self.forward(slice::<f64>(x, layout)?, vocabulary)),
            _ => candle_core::bail!("cross-entropy: logits must be f32 or f64"),
        };
        Ok((storage, Shape::from(rows)))
    }

    fn bwd(&self, logits: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(match logits.dtype() {
            DType::F64 => self.backward::<f64>(logits, grad)?,
            _ => self.backward::<f32>(logits, grad)?,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{assert_close, gradient_matches, random};

    #[test]
    fn equals_the_reference() -> Result<()> {
        let logits = (random((4, 50), 1, DType::F32)? * 30.0)?;
        let targets = [0, 49, 7, 7];
        for smoothing in [0.0, 0.1, 0.9] {
            let found = smoothed_cross_entropy(&logits, &targets, smoothing)?;
            assert_close(&found, &cross_entropy_reference(&logits, &targets, smoothing)?, 1e-5)?;
        }
        Ok(())
    }

    #[test]
    fn gradient_equals_central_differences() -> Result<()> {
        gradient_matches(&random((3, 8), 1, DType::F64)?, |x| cross_entropy(x, &[1, 7, 0]))?;
        gradient_matches(&random((3, 8), 1, DType::F64)?, |x| smoothed_cross_entropy(x, &[1, 7, 0], 0.3))
    }

    #[test]
    fn a_target_outside_the_vocabulary_is_refused() -> Result<()> {
        assert!(cross_entropy(&random((1, 8), 1, DType::F32)?, &[8]).is_err());
        Ok(())
    }
}
