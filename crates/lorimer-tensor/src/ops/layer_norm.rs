//! Layer norm (Ba et al. 2016, arXiv 1607.06450): `y = (x − mean x) / √(var x + ε) · w + b`.

use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::kernels::real::Real;
use crate::kernels::simd::sum2;
use crate::kernels::slices::{rows_per_task, slice, with_slices};
use crate::kernels::wide::wide;

/// Layer norm over the last dimension. `x` (rows, width), `weight` and `bias` (width) of the same dtype → (rows, width). All have gradients.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return layer_norm_reference(x, weight, bias, eps);
    }
    x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, LayerNorm { eps })
}

/// The reference form out of plain candle operations.
pub fn layer_norm_reference(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(candle_core::D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(candle_core::D::Minus1)?;
    centred.broadcast_div(&(variance + eps)?.sqrt()?)?.broadcast_mul(weight)?.broadcast_add(bias)
}

pub(crate) struct LayerNorm {
    pub(crate) eps: f64,
}

/// The mean of a row and the inverse of its deviation.
#[inline(always)]
fn moments<T: Real>(row: &[T], eps: f64) -> (T, T) {
    let n = T::from_f64(row.len() as f64);
    let mean = sum2(row, row, |a, _| a) / n;
    let variance = sum2(row, row, |a, _| (a - mean) * (a - mean)) / n;
    (mean, (variance + T::from_f64(eps)).sqrt().recip())
}

impl LayerNorm {
    fn forward<T: Real>(&self, x: &[T], w: &[T], b: &[T]) -> CpuStorage {
        let mut y = vec![T::zero(); x.len()];
        if !w.is_empty() {
            let chunk = rows_per_task(x.len() / w.len()) * w.len();
            y.par_chunks_mut(chunk).zip(x.par_chunks(chunk)).for_each(|(y, x)| {
                for (y, x) in y.chunks_exact_mut(w.len()).zip(x.chunks_exact(w.len())) {
                    wide!({
                        let (mean, scale) = moments(x, self.eps);
                        for (((y, &x), &w), &b) in y.iter_mut().zip(x).zip(w).zip(b) {
                            *y = (x - mean) * scale * w + b;
                        }
                    });
                }
            });
        }
        T::to_cpu_storage_owned(y)
    }

    /// With n = (x − mean) / deviation: dx = (g·w − mean(g·w) − n·mean(g·w·n)) / deviation, dw = Σ rows g·n, db = Σ rows g.
    fn backward<T: Real>(&self, x: &Tensor, w: &Tensor, grad: &Tensor) -> Result<[Tensor; 3]> {
        let (dx, dw, db) = with_slices([x, w, grad], |[x, w, g]: [&[T]; 3]| {
            let width = w.len();
            let (mut dx, mut dw, mut db) = (vec![T::zero(); x.len()], vec![T::zero(); width], vec![T::zero(); width]);
            if width == 0 {
                return Ok((dx, dw, db));
            }
            let chunk = rows_per_task(x.len() / width) * width;
            let tasks = dx.par_chunks_mut(chunk).zip(x.par_chunks(chunk).zip(g.par_chunks(chunk)));
            let parts: Vec<(Vec<T>, Vec<T>)> = tasks
                .map(|(dx, (x, g))| {
                    let (mut dw, mut db) = (vec![T::zero(); width], vec![T::zero(); width]);
                    let (mut n, mut gw) = (vec![T::zero(); width], vec![T::zero(); width]);
                    let rows = x.chunks_exact(width).zip(g.chunks_exact(width));
                    for (dx, (x, g)) in dx.chunks_exact_mut(width).zip(rows) {
                        wide!({
                            let (mean, scale) = moments(x, self.eps);
                            for i in 0..width {
                                n[i] = (x[i] - mean) * scale;
                                gw[i] = g[i] * w[i];
                                dw[i] += g[i] * n[i];
                                db[i] += g[i];
                            }
                            let count = T::from_f64(width as f64);
                            let level = sum2(&gw, &gw, |a, _| a) / count;
                            let along = sum2(&gw, &n, |a, b| a * b) / count;
                            for i in 0..width {
                                dx[i] = scale * (gw[i] - level - n[i] * along);
                            }
                        });
                    }
                    (dw, db)
                })
                .collect();
            for (part_w, part_b) in parts {
                dw.iter_mut().zip(part_w).for_each(|(sum, v)| *sum += v);
                db.iter_mut().zip(part_b).for_each(|(sum, v)| *sum += v);
            }
            Ok((dx, dw, db))
        })?;
        let of = |v: Vec<T>, like: &Tensor| Tensor::from_vec(v, like.shape(), like.device());
        Ok([of(dx, x)?, of(dw, w)?, of(db, w)?])
    }
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, width) = lx.shape().dims2()?;
        if lw.dims() != [width] || lb.dims() != [width] {
            candle_core::bail!(
                "layer-norm: x is {:?} but weight and bias {:?}, {:?}",
                lx.shape(),
                lw.shape(),
                lb.shape()
            );
        }
        let storage = match x {
            CpuStorage::F32(_) => self.forward(slice::<f32>(x, lx)?, slice::<f32>(w, lw)?, slice::<f32>(b, lb)?),
            CpuStorage::F64(_) => self.forward(slice::<f64>(x, lx)?, slice::<f64>(w, lw)?, slice::<f64>(b, lb)?),
            _ => candle_core::bail!("layer-norm: x must be f32 or f64"),
        };
        Ok((storage, lx.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let [dx, dw, db] = match x.dtype() {
            DType::F64 => self.backward::<f64>(x, w, &grad)?,
            _ => self.backward::<f32>(x, w, &grad)?,
        };
        Ok((Some(dx), Some(dw), Some(db)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{assert_close, gradient_matches, random};

    #[test]
    fn equals_the_reference() -> Result<()> {
        let (x, w, b) = (random((9, 40), 1, DType::F32)?, random(40, 2, DType::F32)?, random(40, 3, DType::F32)?);
        assert_close(&layer_norm(&x, &w, &b, 1e-12)?, &layer_norm_reference(&x, &w, &b, 1e-12)?, 2e-6)
    }

    #[test]
    fn gradients_equal_central_differences() -> Result<()> {
        let (x, w, b) = (random((4, 6), 1, DType::F64)?, random(6, 2, DType::F64)?, random(6, 3, DType::F64)?);
        gradient_matches(&x, |x| layer_norm(x, &w, &b, 1e-5))?;
        gradient_matches(&w, |w| layer_norm(&x, w, &b, 1e-5))?;
        gradient_matches(&b, |b| layer_norm(&x, &w, b, 1e-5))
    }
}
