//! Random bases with their trained scalings: out[k, j, c] = A[k, c] · Λ[k, j] · Γ[j, c] (RandLoRA, arXiv 2502.00987, section 3), with
//! a backward that never stores the product: dΛ[k, j] = Σ_c g A Γ, dΓ[j, c] = Σ_k g A Λ.

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::kernels::real::Real;
use crate::kernels::slices::{slice, with_slices};

/// `A` (r, width) is frozen, Λ (r, n) and Γ (n, width) are trained; gives (r·n, width).
pub fn scaled_bases(a: &Tensor, lambda: &Tensor, gamma: &Tensor) -> Result<Tensor> {
    let ((r, width), (rows, n)) = (a.dims2()?, lambda.dims2()?);
    if rows != r || gamma.dims() != [n, width] {
        candle_core::bail!(
            "scaled bases: A is ({r}, {width}), lambda ({rows}, {n}), gamma {:?}; expected lambda ({r}, n) and gamma (n, {width})",
            gamma.dims()
        );
    }
    if !a.device().is_cpu() {
        return scaled_bases_reference(a, lambda, gamma);
    }
    lambda.contiguous()?.apply_op2(&gamma.contiguous()?, ScaledBases { a: a.contiguous()? })
}

/// The reference form.
pub fn scaled_bases_reference(a: &Tensor, lambda: &Tensor, gamma: &Tensor) -> Result<Tensor> {
    let scaled = a.unsqueeze(1)?.broadcast_mul(&lambda.unsqueeze(2)?)?.broadcast_mul(&gamma.unsqueeze(0)?)?;
    scaled.flatten(0, 1)
}

struct ScaledBases {
    a: Tensor,
}

impl ScaledBases {
    fn forward<T: Real>(&self, lambda: &[T], gamma: &[T]) -> Result<CpuStorage> {
        let (r, width) = self.a.dims2()?;
        let n = lambda.len() / r.max(1);
        let out = with_slices([&self.a], |[a]: [&[T]; 1]| {
            let mut out = vec![T::zero(); r * n * width];
            out.par_chunks_mut(width.max(1)).enumerate().with_min_len(16).for_each(|(row, out)| {
                let (k, j) = (row / n, row % n);
                let (a, gamma, scale) = (&a[k * width..][..width], &gamma[j * width..][..width], lambda[row]);
                out.iter_mut().zip(a.iter().zip(gamma)).for_each(|(out, (&a, &g))| *out = a * g * scale);
            });
            Ok(out)
        })?;
        Ok(T::to_cpu_storage_owned(out))
    }

    fn backward<T: Real>(&self, lambda: &Tensor, gamma: &Tensor, grad: &Tensor) -> Result<(Tensor, Tensor)> {
        let ((r, width), n) = (self.a.dims2()?, lambda.dim(1)?);
        with_slices([&self.a, lambda, gamma, grad], |[a, l, g, grad]: [&[T]; 4]| {
            let mut dl = vec![T::zero(); r * n];
            let mut dg = vec![T::zero(); n * width];
            // One task a row of Γ, so that each number has one writer.
            let rows: Vec<Vec<T>> = dg
                .par_chunks_mut(width.max(1))
                .enumerate()
                .map(|(j, dg)| {
                    let gamma = &g[j * width..][..width];
                    (0..r)
                        .map(|k| {
                            let (a, grad) = (&a[k * width..][..width], &grad[(k * n + j) * width..][..width]);
                            let (scale, mut sum) = (l[k * n + j], T::zero());
                            for c in 0..width {
                                let along = grad[c] * a[c];
                                dg[c] += along * scale;
                                sum += along * gamma[c];
                            }
                            sum
                        })
                        .collect()
                })
                .collect();
            for (j, row) in rows.into_iter().enumerate() {
                row.into_iter().enumerate().for_each(|(k, v)| dl[k * n + j] = v);
            }
            Ok((Tensor::from_vec(dl, (r, n), lambda.device())?, Tensor::from_vec(dg, (n, width), gamma.device())?))
        })
    }
}

impl CustomOp2 for ScaledBases {
    fn name(&self) -> &'static str {
        "scaled-bases"
    }

    fn cpu_fwd(&self, l: &CpuStorage, ll: &Layout, g: &CpuStorage, lg: &Layout) -> Result<(CpuStorage, Shape)> {
        let storage = match l {
            CpuStorage::F32(_) => self.forward(slice::<f32>(l, ll)?, slice::<f32>(g, lg)?)?,
            CpuStorage::F64(_) => self.forward(slice::<f64>(l, ll)?, slice::<f64>(g, lg)?)?,
            _ => candle_core::bail!("scaled bases: f32 or f64 expected"),
        };
        Ok((storage, Shape::from((ll.shape().elem_count(), self.a.dim(1)?))))
    }

    fn bwd(&self, l: &Tensor, g: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dl, dg) = match grad.dtype() {
            DType::F64 => self.backward::<f64>(l, g, grad)?,
            _ => self.backward::<f32>(l, g, grad)?,
        };
        Ok((Some(dl), Some(dg)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{assert_close, gradient_matches, random};

    #[test]
    fn equals_the_reference_and_central_differences() -> Result<()> {
        let (a, l, g) =
            (random((3, 7), 1, DType::F64)?, random((3, 4), 2, DType::F64)?, random((4, 7), 3, DType::F64)?);
        assert_close(&scaled_bases(&a, &l, &g)?, &scaled_bases_reference(&a, &l, &g)?, 1e-14)?;
        gradient_matches(&l, |l| scaled_bases(&a, l, &g))?;
        gradient_matches(&g, |g| scaled_bases(&a, &l, g))
    }
}
