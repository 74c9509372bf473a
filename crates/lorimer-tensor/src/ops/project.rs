//! The frozen projection `y = x Wᵀ`: a product whose backward never computes the weight's gradient.

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor};

use crate::kernels::products::{Out, Product, Right, Term, run};
use crate::kernels::real::Real;
use crate::kernels::slices::{slice, with_slices};
use crate::storage::FrozenWeight;

/// `x Wᵀ`: `x` (rows, inputs) f32 or f64 → (rows, outputs). The backward gives the gradient of `x` only.
///
/// On a device other than the CPU this is [`frozen_linear_reference`].
pub fn frozen_linear(x: &Tensor, weight: &FrozenWeight) -> Result<Tensor> {
    let (rows, inputs) = x.dims2()?;
    let (outputs, expected) = weight.dims()?;
    if inputs != expected {
        candle_core::bail!("projection: x is ({rows}, {inputs}) but the weight is ({outputs}, {expected})");
    }
    if !x.device().is_cpu() {
        return frozen_linear_reference(x, weight);
    }
    x.contiguous()?.apply_op1(FrozenLinear { weight: weight.clone(), outputs })
}

/// The reference form: a plain product with the expanded weight.
pub fn frozen_linear_reference(x: &Tensor, weight: &FrozenWeight) -> Result<Tensor> {
    x.matmul(&weight.dense(x.dtype())?.to_device(x.device())?.t()?)
}

/// `x W`: `x` (rows, outputs) → (rows, inputs), the frozen weight (outputs, inputs) from the other side. The backward gives the
/// gradient of `x` only.
pub fn frozen_left(x: &Tensor, weight: &FrozenWeight) -> Result<Tensor> {
    let ((rows, outputs), (expected, inputs)) = (x.dims2()?, weight.dims()?);
    if outputs != expected {
        candle_core::bail!("projection: x is ({rows}, {outputs}) but the weight is ({expected}, {inputs})");
    }
    if !x.device().is_cpu() {
        return x.matmul(&weight.dense(x.dtype())?.to_device(x.device())?);
    }
    x.contiguous()?.apply_op1(FrozenLeft { weight: weight.clone() })
}

struct FrozenLeft {
    weight: FrozenWeight,
}

impl FrozenLeft {
    fn forward<T: Real>(&self, storage: &CpuStorage, layout: &Layout) -> Result<CpuStorage> {
        let (rows, outputs) = layout.shape().dims2()?;
        let x = slice::<T>(storage, layout)?;
        let guard = self.weight.guard();
        let view = guard.view()?;
        let terms = vec![Term::backward(x, outputs, Right::Weight(view))];
        let mut new = run(vec![Product::new((rows, view.shape().1), terms)])?;
        Ok(T::to_cpu_storage_owned(new.pop().unwrap_or_default()))
    }
}

impl CustomOp1 for FrozenLeft {
    fn name(&self) -> &'static str {
        "frozen-left"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let shape = Shape::from((layout.shape().dims2()?.0, self.weight.dims()?.1));
        let y = match storage {
            CpuStorage::F64(_) => self.forward::<f64>(storage, layout)?,
            CpuStorage::F32(_) => self.forward::<f32>(storage, layout)?,
            _ => candle_core::bail!("projection: x must be f32 or f64"),
        };
        Ok((y, shape))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        frozen_linear(&grad.contiguous()?.detach(), &self.weight).map(Some)
    }
}

/// `g W`: the gradient of `x` from the gradient `g` (rows, outputs) of `x Wᵀ`; (rows, inputs).
pub fn frozen_backward_input(grad: &Tensor, weight: &FrozenWeight) -> Result<Tensor> {
    fn run<T: Real>(grad: &Tensor, weight: &FrozenWeight, shape: (usize, usize)) -> Result<Tensor> {
        let mut dx = vec![T::zero(); shape.0 * shape.1];
        frozen_accumulate_input(grad, weight, &mut dx, false)?;
        Tensor::from_vec(dx, shape, &Device::Cpu)
    }
    let shape = (grad.dim(0)?, weight.dims()?.1);
    match grad.dtype() {
        DType::F64 => run::<f64>(grad, weight, shape),
        _ => run::<f32>(grad, weight, shape),
    }
}

/// `dx = keep·dx + g W` with `keep` 0 or 1; `grad` (rows, outputs) of dx's type, `dx` (rows, inputs).
pub(crate) fn frozen_accumulate_input<T: Real>(
    grad: &Tensor,
    weight: &FrozenWeight,
    dx: &mut [T],
    keep: bool,
) -> Result<()> {
    let (rows, outputs) = grad.dims2()?;
    let guard = weight.guard();
    let view = guard.view()?;
    with_slices([grad], |[g]: [&[T]; 1]| {
        let terms = vec![Term::backward(g, outputs, Right::Weight(view))];
        run(vec![Product { out: Out::Into(dx, keep), rows, columns: view.shape().1, terms }]).map(|_| ())
    })
}

struct FrozenLinear {
    weight: FrozenWeight,
    outputs: usize,
}

impl FrozenLinear {
    fn forward<T: Real>(&self, storage: &CpuStorage, layout: &Layout) -> Result<CpuStorage> {
        let (rows, inputs) = layout.shape().dims2()?;
        let x = slice::<T>(storage, layout)?;
        let guard = self.weight.guard();
        let terms = vec![Term::forward(x, inputs, Right::Weight(guard.view()?))];
        let mut new = run(vec![Product::new((rows, self.outputs), terms)])?;
        Ok(T::to_cpu_storage_owned(new.pop().unwrap_or_default()))
    }
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let shape = Shape::from((layout.shape().dims2()?.0, self.outputs));
        let y = match storage {
            CpuStorage::F64(_) => self.forward::<f64>(storage, layout)?,
            CpuStorage::F32(_) => self.forward::<f32>(storage, layout)?,
            _ => candle_core::bail!("projection: x must be f32 or f64"),
        };
        Ok((y, shape))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(frozen_backward_input(grad, &self.weight)?))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::{GgmlDType, QTensor};

    use super::*;
    use crate::check::{assert_close, gradient_matches, random};

    #[test]
    fn forward_equals_the_reference_in_every_storage() -> Result<()> {
        let w = random((200, 64), 1, DType::F32)?;
        let quantised = QTensor::quantize(&w, GgmlDType::Q8_0)?;
        let weights = [
            FrozenWeight::Dense(w.clone()),
            FrozenWeight::Dense(w.to_dtype(DType::BF16)?),
            FrozenWeight::Dense(w.to_dtype(DType::F16)?),
            FrozenWeight::from_ggml(GgmlDType::Q8_0, &quantised.data()?, (200, 64))?,
            FrozenWeight::Dense(w.clone()).to_nf4()?,
        ];
        for weight in &weights {
            for rows in [1, 3, 37] {
                let x = random((rows, 64), 2, DType::F32)?;
                assert_close(&frozen_linear(&x, weight)?, &frozen_linear_reference(&x, weight)?, 1e-5)?;
                let g = random((rows, 200), 3, DType::F32)?;
                assert_close(&frozen_backward_input(&g, weight)?, &g.matmul(&weight.dense(DType::F32)?)?, 1e-5)?;
            }
        }
        Ok(())
    }

    #[test]
    fn gradient_equals_central_differences() -> Result<()> {
        let weight = FrozenWeight::Dense(random((5, 7), 1, DType::F64)?);
        gradient_matches(&random((6, 7), 2, DType::F64)?, |x| frozen_linear(x, &weight))?;
        let x = random((6, 5), 2, DType::F64)?;
        assert_close(&frozen_left(&x, &weight)?, &x.matmul(&weight.dense(DType::F64)?)?, 1e-12)?;
        gradient_matches(&x, |x| frozen_left(x, &weight))
    }
}
