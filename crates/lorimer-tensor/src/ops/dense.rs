//! A projection whose weight is a tensor that gradients flow to: y = x Wᵀ with dx = g W and dW = gᵀ x.

use candle_core::{Device, Result, Tensor, TensorId};

use crate::kernels::products::{Product, Right, Term, run};
use crate::kernels::real::Real;
use crate::kernels::slices::{with_slice_list, with_slices};
use crate::tape::{Gradients, Recompute};

/// `x Wᵀ`: `x` (rows, inputs), `weight` (outputs, inputs) of one type.
pub(crate) fn forward<T: Real>(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let ((rows, inputs), (outputs, expected)) = (x.dims2()?, weight.dims2()?);
    if inputs != expected {
        candle_core::bail!("projection: x is ({rows}, {inputs}) but the weight is ({outputs}, {expected})");
    }
    with_slices([x, weight], |[x, w]: [&[T]; 2]| {
        let terms = vec![Term::forward(x, inputs, Right::Slice(w, inputs))];
        let mut new = run(vec![Product::new((rows, outputs), terms)])?;
        Tensor::from_vec(new.pop().unwrap_or_default(), (rows, outputs), &Device::Cpu)
    })
}

/// Adds dx and dW, of which the wanted ones have an id.
pub(crate) fn backward<T: Real>(
    g: &Tensor,
    x: (Option<TensorId>, Option<&Recompute>),
    weight: (Option<TensorId>, &Tensor),
    gradients: &mut Gradients,
) -> Result<()> {
    let ((rows, outputs), (_, inputs)) = (g.dims2()?, weight.1.dims2()?);
    let values = x.1.map(|values| values()).transpose()?;
    let tensors: Vec<&Tensor> = [g, weight.1].into_iter().chain(&values).collect();
    let new = with_slice_list(&tensors, |slices: &[&[T]]| {
        let (g, w) = (slices[0], slices[1]);
        let mut products = Vec::new();
        if x.0.is_some() {
            products.push(Product::new((rows, inputs), vec![Term::backward(g, outputs, Right::Slice(w, inputs))]));
        }
        if let Some(x) = slices.get(2) {
            let terms = vec![Term::outer(g, (rows, outputs), Right::Slice(x, inputs))];
            products.push(Product::new((outputs, inputs), terms));
        }
        run(products)
    })?;
    let mut new = new.into_iter();
    if let Some(id) = x.0 {
        gradients.add(id, Tensor::from_vec(new.next().unwrap_or_default(), (rows, inputs), &Device::Cpu)?)?;
    }
    match weight.0 {
        Some(id) => {
            gradients.add(id, Tensor::from_vec(new.next().unwrap_or_default(), (outputs, inputs), &Device::Cpu)?)
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Var};

    use super::*;
    use crate::check::{assert_close, random};
    use crate::ops::Ops;
    use crate::tape::Tape;

    #[test]
    fn outputs_and_gradients_equal_candles() -> Result<()> {
        for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-4)] {
            let x = Var::from_tensor(&random((37, 24), 1, dtype)?)?;
            let w = Var::from_tensor(&random((19, 24), 2, dtype)?)?;
            let seed = random((37, 19), 3, dtype)?;
            let expected_y = x.matmul(&w.t()?)?;
            let expected = (&expected_y * &seed)?.sum_all()?.backward()?;
            let tape = Tape::new([x.as_tensor(), w.as_tensor()]);
            let y = Ops::recorded(&tape).dense(&x, &w)?;
            assert_close(&y, &expected_y, tolerance)?;
            let mut found = Gradients::default();
            tape.backward(&y, seed, &mut found)?;
            for var in [&x, &w] {
                let (a, b) = (found.get(var), expected.get(var));
                assert_close(a.expect("a gradient"), b.expect("a gradient"), tolerance)?;
            }
        }
        Ok(())
    }
}
