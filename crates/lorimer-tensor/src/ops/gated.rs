//! The gated unit of SwiGLU (Shazeer 2020, arXiv 2002.05202, eq. 6): `silu(gate) · up`.

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::kernels::real::Real;
use crate::kernels::slices::{rows_per_task, slice, with_slices};
use crate::kernels::wide::wide;

/// `silu(gate)·up`, element by element; both of one shape, f32 or f64.
pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if gate.shape() != up.shape() {
        candle_core::bail!("gated unit: gate is {:?} but up is {:?}", gate.shape(), up.shape());
    }
    if !gate.device().is_cpu() {
        return silu_mul_reference(gate, up);
    }
    gate.contiguous()?.apply_op2(&up.contiguous()?, SiluMul)
}

/// The reference form out of plain candle operations.
pub fn silu_mul_reference(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.silu()? * up
}

pub(crate) struct SiluMul;

#[inline(always)]
fn sigmoid<T: Real>(v: T) -> T {
    (T::one() + (-v).exp_fast()).recip()
}

fn forward<T: Real>(gate: &[T], up: &[T]) -> CpuStorage {
    let mut y = vec![T::zero(); gate.len()];
    let chunk = rows_per_task(gate.len());
    y.par_chunks_mut(chunk).zip(gate.par_chunks(chunk).zip(up.par_chunks(chunk))).for_each(|(y, (gate, up))| {
        wide(|| {
            for ((y, &g), &u) in y.iter_mut().zip(gate).zip(up) {
                *y = g * sigmoid(g) * u;
            }
        });
    });
    T::to_cpu_storage_owned(y)
}

fn backward<T: Real>(gate: &Tensor, up: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
    let (dg, du) = with_slices([gate, up, grad], |[gate, up, grad]: [&[T]; 3]| {
        let (mut dg, mut du) = (vec![T::zero(); gate.len()], vec![T::zero(); gate.len()]);
        let chunk = rows_per_task(gate.len());
        dg.par_chunks_mut(chunk)
            .zip(du.par_chunks_mut(chunk))
            .zip(gate.par_chunks(chunk).zip(up.par_chunks(chunk)).zip(grad.par_chunks(chunk)))
            .for_each(|((dg, du), ((gate, up), grad))| {
                wide(|| {
                    let (n, one) = (gate.len(), T::one());
                    let (dg, du, up, grad) = (&mut dg[..n], &mut du[..n], &up[..n], &grad[..n]);
                    for i in 0..n {
                        let s = sigmoid(gate[i]);
                        du[i] = grad[i] * gate[i] * s;
                        dg[i] = grad[i] * up[i] * s * (one + gate[i] * (one - s));
                    }
                });
            });
        Ok((dg, du))
    })?;
    Ok((
        Some(Tensor::from_vec(dg, gate.shape(), gate.device())?),
        Some(Tensor::from_vec(du, gate.shape(), gate.device())?),
    ))
}

impl CustomOp2 for SiluMul {
    fn name(&self) -> &'static str {
        "silu-mul"
    }

    fn cpu_fwd(&self, g: &CpuStorage, lg: &Layout, u: &CpuStorage, lu: &Layout) -> Result<(CpuStorage, Shape)> {
        let storage = match g {
            CpuStorage::F32(_) => forward(slice::<f32>(g, lg)?, slice::<f32>(u, lu)?),
            CpuStorage::F64(_) => forward(slice::<f64>(g, lg)?, slice::<f64>(u, lu)?),
            _ => candle_core::bail!("gated unit: inputs must be f32 or f64"),
        };
        Ok((storage, lg.shape().clone()))
    }

    fn bwd(&self, g: &Tensor, u: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        match g.dtype() {
            DType::F64 => backward::<f64>(g, u, grad),
            _ => backward::<f32>(g, u, grad),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{assert_close, gradient_matches, random};

    #[test]
    fn equals_the_reference() -> Result<()> {
        let (g, u) = (random((9, 32), 1, DType::F32)?, random((9, 32), 2, DType::F32)?);
        assert_close(&silu_mul(&g, &u)?, &silu_mul_reference(&g, &u)?, 1e-6)
    }

    #[test]
    fn gradients_equal_central_differences() -> Result<()> {
        let (g, u) = (random((3, 5), 1, DType::F64)?, random((3, 5), 2, DType::F64)?);
        gradient_matches(&g, |g| silu_mul(g, &u))?;
        gradient_matches(&u, |u| silu_mul(&g, u))
    }
}
