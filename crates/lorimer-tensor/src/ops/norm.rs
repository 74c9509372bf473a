//! Root-mean-square norm (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4): `y = x / √(mean x² + ε) · w`.

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::kernels::real::Real;
use crate::kernels::simd::sum2;
use crate::kernels::slices::{rows_per_task, slice, with_slices};
use crate::kernels::wide::wide;

/// RMS norm over the last dimension. `x` (rows, width), `weight` (width) of the same dtype → (rows, width).
/// Both have gradients.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return rms_norm_reference(x, weight, eps);
    }
    x.contiguous()?.apply_op2(&weight.contiguous()?, RmsNorm { eps })
}

/// The reference form out of plain candle operations.
pub fn rms_norm_reference(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let mean = x.sqr()?.mean_keepdim(candle_core::D::Minus1)?;
    x.broadcast_div(&(mean + eps)?.sqrt()?)?.broadcast_mul(weight)
}

pub(crate) struct RmsNorm {
    pub(crate) eps: f64,
}

#[inline(always)]
fn inverse_rms<T: Real>(row: &[T], eps: f64) -> T {
    let squares = sum2(row, row, |a, b| a * b);
    (squares / T::from_f64(row.len() as f64) + T::from_f64(eps)).sqrt().recip()
}

impl RmsNorm {
    fn forward<T: Real>(&self, x: &[T], w: &[T]) -> CpuStorage {
        if w.is_empty() {
            return T::to_cpu_storage_owned(Vec::new());
        }
        let mut y = vec![T::zero(); x.len()];
        let chunk = rows_per_task(x.len() / w.len()) * w.len();
        y.par_chunks_mut(chunk).zip(x.par_chunks(chunk)).for_each(|(y, x)| {
            for (y, x) in y.chunks_exact_mut(w.len()).zip(x.chunks_exact(w.len())) {
                wide!({
                    let scale = inverse_rms(x, self.eps);
                    for ((y, &x), &w) in y.iter_mut().zip(x).zip(w) {
                        *y = x * scale * w;
                    }
                });
            }
        });
        T::to_cpu_storage_owned(y)
    }

    /// With n = x/rms: dx = (g·w − n·mean(g·w·n)) / rms, dw = Σ rows g·n.
    fn backward<T: Real>(&self, x: &Tensor, w: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dx, dw) = with_slices([x, w, grad], |[x, w, g]: [&[T]; 3]| {
            let width = w.len();
            let mut dx = vec![T::zero(); x.len()];
            if width == 0 {
                return Ok((Vec::new(), Vec::new()));
            }
            let chunk = rows_per_task(x.len() / width) * width;
            let parts: Vec<Vec<T>> = dx
                .par_chunks_mut(chunk)
                .zip(x.par_chunks(chunk).zip(g.par_chunks(chunk)))
                .map(|(dx, (x, g))| {
                    let (mut dw, mut gw) = (vec![T::zero(); width], vec![T::zero(); width]);
                    for (dx, (x, g)) in dx.chunks_exact_mut(width).zip(x.chunks_exact(width).zip(g.chunks_exact(width)))
                    {
                        wide!({
                            let scale = inverse_rms(x, self.eps);
                            for ((t, &g), &w) in gw.iter_mut().zip(g).zip(w) {
                                *t = g * w;
                            }
                            let along = sum2(x, &gw, |x, gw| x * gw) * scale * scale / T::from_f64(width as f64);
                            for ((dx, &x), &gw) in dx.iter_mut().zip(x).zip(&gw) {
                                *dx = scale * (gw - x * along);
                            }
                            for ((dw, &g), &x) in dw.iter_mut().zip(g).zip(x) {
                                *dw += g * x * scale;
                            }
                        });
                    }
                    dw
                })
                .collect();
            let mut dw = vec![T::zero(); width];
            for part in parts {
                dw.iter_mut().zip(part).for_each(|(sum, v)| *sum += v);
            }
            Ok((dx, dw))
        })?;
        let dx = Tensor::from_vec(dx, x.shape(), x.device())?;
        Ok((Some(dx), Some(Tensor::from_vec(dw, w.shape(), w.device())?)))
    }
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, w: &CpuStorage, lw: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, width) = lx.shape().dims2()?;
        if lw.dims() != [width] {
            candle_core::bail!("rms-norm: x is {:?} but the weight is {:?}", lx.shape(), lw.shape());
        }
        let storage = match x {
            CpuStorage::F32(_) => self.forward(slice::<f32>(x, lx)?, slice::<f32>(w, lw)?),
            CpuStorage::F64(_) => self.forward(slice::<f64>(x, lx)?, slice::<f64>(w, lw)?),
            _ => candle_core::bail!("rms-norm: x must be f32 or f64"),
        };
        Ok((storage, lx.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        match x.dtype() {
            DType::F64 => self.backward::<f64>(x, w, grad),
            _ => self.backward::<f32>(x, w, grad),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{assert_close, gradient_matches, random};

    #[test]
    fn equals_the_reference() -> Result<()> {
        let (x, w) = (random((9, 32), 1, DType::F32)?, random(32, 2, DType::F32)?);
        assert_close(&rms_norm(&x, &w, 1e-5)?, &rms_norm_reference(&x, &w, 1e-5)?, 1e-6)
    }

    #[test]
    fn gradients_equal_central_differences() -> Result<()> {
        let (x, w) = (random((4, 6), 1, DType::F64)?, random(6, 2, DType::F64)?);
        gradient_matches(&x, |x| rms_norm(x, &w, 1e-5))?;
        gradient_matches(&w, |w| rms_norm(&x, w, 1e-5))
    }
}
