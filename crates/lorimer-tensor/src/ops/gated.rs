//! Gated units (Shazeer 2020, arXiv 2002.05202, eq. 5 and 6): `activation(gate) · up`, and the activations alone.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::kernels::real::Real;
use crate::kernels::slices::{rows_per_task, slice, with_slices};
use crate::kernels::wide::wide;

/// What is done to each element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x · σ(x).
    Silu,
    /// x · Φ(x) with the error function (Hendrycks and Gimpel 2016, arXiv 1606.08415).
    Gelu,
    /// The same with Φ by a hyperbolic tangent: transformers' `gelu_pytorch_tanh` and `gelu_new`.
    GeluTanh,
    /// The greater of x and 0.
    Relu,
}

/// √(2/π) and the cubic term of [`Activation::GeluTanh`].
const TANH: (f64, f64) = (0.797_884_560_802_865_4, 0.044_715);

/// Calls the form of a function that is made for one activation: a choice inside its loop would keep that out of wide registers.
macro_rules! made_for {
    ($activation:expr, $f:ident::<$real:ty>($($argument:expr),*)) => {
        match $activation {
            Activation::Silu => $f::<$real, { Activation::Silu as u8 }>($($argument),*),
            Activation::Gelu => $f::<$real, { Activation::Gelu as u8 }>($($argument),*),
            Activation::GeluTanh => $f::<$real, { Activation::GeluTanh as u8 }>($($argument),*),
            Activation::Relu => $f::<$real, { Activation::Relu as u8 }>($($argument),*),
        }
    };
}

impl Activation {
    /// The activation of a number, as [`made_for`] gives it.
    const fn of(number: u8) -> Self {
        match number {
            n if n == Self::Gelu as u8 => Self::Gelu,
            n if n == Self::GeluTanh as u8 => Self::GeluTanh,
            n if n == Self::Relu as u8 => Self::Relu,
            _ => Self::Silu,
        }
    }

    /// The reference form out of plain candle operations.
    pub fn reference(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Silu => x.silu(),
            Self::Relu => x.relu(),
            Self::Gelu => ((x / 2f64.sqrt())?.erf()? + 1.0)? * (x * 0.5)?,
            Self::GeluTanh => {
                let inner = ((x + (x.powf(3.0)? * TANH.1)?)? * TANH.0)?;
                (inner.tanh()? + 1.0)? * (x * 0.5)?
            }
        }
    }

    /// The value and the slope at a point.
    #[inline(always)]
    fn at<T: Real>(self, x: T) -> (T, T) {
        let (one, half) = (T::one(), T::from_f64(0.5));
        match self {
            Self::Silu => {
                let s = sigmoid(x);
                (x * s, s * (one + x * (one - s)))
            }
            Self::Relu => match x > T::zero() {
                true => (x, one),
                false => (T::zero(), T::zero()),
            },
            Self::Gelu => {
                let share = half * (one + (x * T::from_f64(std::f64::consts::FRAC_1_SQRT_2)).erf_fast());
                let density = (-half * x * x).exp_fast() * T::from_f64(0.398_942_280_401_432_7);
                (x * share, share + x * density)
            }
            Self::GeluTanh => {
                let (a, b) = (T::from_f64(TANH.0), T::from_f64(TANH.1));
                // tanh u = 2 σ(2u) − 1.
                let share = sigmoid((a + a) * (x + b * x * x * x));
                let slope = (a + a) * (one + T::from_f64(3.0) * b * x * x);
                (x * share, share + x * share * (one - share) * slope)
            }
        }
    }
}

/// `activation(gate)·up`, element by element; both of one shape, f32 or f64.
pub fn gated(activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if gate.shape() != up.shape() {
        candle_core::bail!("gated unit: gate is {:?} but up is {:?}", gate.shape(), up.shape());
    }
    if !gate.device().is_cpu() {
        return gated_reference(activation, gate, up);
    }
    gate.contiguous()?.apply_op2(&up.contiguous()?, GatedUnit(activation))
}

/// The reference form out of plain candle operations.
pub fn gated_reference(activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    activation.reference(gate)? * up
}

/// [`gated`] with x · σ(x), the unit of SwiGLU.
pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gated(Activation::Silu, gate, up)
}

/// An activation, element by element; f32 or f64.
pub fn activate(activation: Activation, x: &Tensor) -> Result<Tensor> {
    match x.device().is_cpu() {
        true => x.contiguous()?.apply_op1(Activate(activation)),
        false => activation.reference(x),
    }
}

#[inline(always)]
fn sigmoid<T: Real>(v: T) -> T {
    (T::one() + (-v).exp_fast()).recip()
}

pub(crate) struct GatedUnit(pub(crate) Activation);

fn forward<T: Real, const A: u8>(gate: &[T], up: &[T]) -> CpuStorage {
    let mut y = vec![T::zero(); gate.len()];
    let chunk = rows_per_task(gate.len());
    y.par_chunks_mut(chunk).zip(gate.par_chunks(chunk).zip(up.par_chunks(chunk))).for_each(|(y, (gate, up))| {
        wide!({
            for ((y, &g), &u) in y.iter_mut().zip(gate).zip(up) {
                *y = const { Activation::of(A) }.at(g).0 * u;
            }
        });
    });
    T::to_cpu_storage_owned(y)
}

fn backward<T: Real, const A: u8>(
    gate: &Tensor,
    up: &Tensor,
    grad: &Tensor,
) -> Result<(Option<Tensor>, Option<Tensor>)> {
    let (dg, du) = with_slices([gate, up, grad], |[gate, up, grad]: [&[T]; 3]| {
        let (mut dg, mut du) = (vec![T::zero(); gate.len()], vec![T::zero(); gate.len()]);
        let chunk = rows_per_task(gate.len());
        dg.par_chunks_mut(chunk)
            .zip(du.par_chunks_mut(chunk))
            .zip(gate.par_chunks(chunk).zip(up.par_chunks(chunk)).zip(grad.par_chunks(chunk)))
            .for_each(|((dg, du), ((gate, up), grad))| {
                wide!({
                    let n = gate.len();
                    let (dg, du, up, grad) = (&mut dg[..n], &mut du[..n], &up[..n], &grad[..n]);
                    for i in 0..n {
                        // The order of the factors decides the last bit of every training run.
                        (du[i], dg[i]) = match const { Activation::of(A) } {
                            Activation::Silu => {
                                let s = sigmoid(gate[i]);
                                let slope = T::one() + gate[i] * (T::one() - s);
                                (grad[i] * gate[i] * s, grad[i] * up[i] * s * slope)
                            }
                            _ => {
                                let (value, slope) = const { Activation::of(A) }.at(gate[i]);
                                (grad[i] * value, grad[i] * up[i] * slope)
                            }
                        };
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

impl CustomOp2 for GatedUnit {
    fn name(&self) -> &'static str {
        "gated-unit"
    }

    fn cpu_fwd(&self, g: &CpuStorage, lg: &Layout, u: &CpuStorage, lu: &Layout) -> Result<(CpuStorage, Shape)> {
        let storage = match g {
            CpuStorage::F32(_) => made_for!(self.0, forward::<f32>(slice(g, lg)?, slice(u, lu)?)),
            CpuStorage::F64(_) => made_for!(self.0, forward::<f64>(slice(g, lg)?, slice(u, lu)?)),
            _ => candle_core::bail!("gated unit: inputs must be f32 or f64"),
        };
        Ok((storage, lg.shape().clone()))
    }

    fn bwd(&self, g: &Tensor, u: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        match g.dtype() {
            DType::F64 => made_for!(self.0, backward::<f64>(g, u, grad)),
            _ => made_for!(self.0, backward::<f32>(g, u, grad)),
        }
    }
}

pub(crate) struct Activate(pub(crate) Activation);

/// The values of an activation, or with `g` its slopes times that.
fn values<T: Real, const A: u8>(x: &[T], g: Option<&[T]>) -> Vec<T> {
    let mut y = vec![T::zero(); x.len()];
    let chunk = rows_per_task(x.len());
    y.par_chunks_mut(chunk).zip(x.par_chunks(chunk)).enumerate().for_each(|(task, (y, x))| {
        wide!(match g {
            None => y.iter_mut().zip(x).for_each(|(y, &x)| *y = const { Activation::of(A) }.at(x).0),
            Some(g) => {
                let g = &g[task * chunk..][..x.len()];
                y.iter_mut().zip(x).zip(g).for_each(|((y, &x), &g)| *y = const { Activation::of(A) }.at(x).1 * g);
            }
        });
    });
    y
}

impl Activate {
    fn gradient<T: Real>(&self, x: &Tensor, grad: &Tensor) -> Result<Tensor> {
        let dx = with_slices([x, grad], |[x, g]: [&[T]; 2]| Ok(made_for!(self.0, values::<T>(x, Some(g)))))?;
        Tensor::from_vec(dx, x.shape(), x.device())
    }
}

impl CustomOp1 for Activate {
    fn name(&self) -> &'static str {
        "activate"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let storage = match x {
            CpuStorage::F32(_) => CpuStorage::F32(made_for!(self.0, values::<f32>(slice(x, layout)?, None))),
            CpuStorage::F64(_) => CpuStorage::F64(made_for!(self.0, values::<f64>(slice(x, layout)?, None))),
            _ => candle_core::bail!("activation: the input must be f32 or f64"),
        };
        Ok((storage, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        match x.dtype() {
            DType::F64 => self.gradient::<f64>(x, &grad).map(Some),
            _ => self.gradient::<f32>(x, &grad).map(Some),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{assert_close, gradient_matches, random};

    const ALL: [Activation; 4] = [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu];

    #[test]
    fn equals_the_reference() -> Result<()> {
        for activation in ALL {
            for (dtype, bound) in [(DType::F32, 1e-6), (DType::F64, 1e-12)] {
                let (g, u) = ((random((9, 32), 1, dtype)? * 6.0)?, random((9, 32), 2, dtype)?);
                assert_close(&gated(activation, &g, &u)?, &gated_reference(activation, &g, &u)?, bound)?;
                assert_close(&activate(activation, &g)?, &activation.reference(&g)?, bound)?;
            }
        }
        Ok(())
    }

    #[test]
    fn gradients_equal_central_differences() -> Result<()> {
        let (g, u) = ((random((3, 5), 1, DType::F64)? * 3.0)?, random((3, 5), 2, DType::F64)?);
        for activation in ALL {
            gradient_matches(&g, |g| gated(activation, g, &u))?;
            gradient_matches(&u, |u| gated(activation, &g, u))?;
            gradient_matches(&g, |g| activate(activation, g))?;
        }
        Ok(())
    }
}
