//! Test helpers: closeness and central differences.

use candle_core::{DType, Device, Result, Shape, Tensor, Var};
use rand::{Rng, SeedableRng};

pub fn random(shape: impl Into<Shape>, seed: u64, dtype: DType) -> Result<Tensor> {
    let shape = shape.into();
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let data: Vec<f64> = (0..shape.elem_count()).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(data, shape, &Device::Cpu)?.to_dtype(dtype)
}

pub fn assert_close(a: &Tensor, b: &Tensor, tolerance: f64) -> Result<()> {
    assert_eq!(a.dims(), b.dims());
    let worst =
        (a.to_dtype(DType::F64)? - b.to_dtype(DType::F64)?)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>()?;
    assert!(worst <= tolerance, "differ by {worst:e}, more than {tolerance:e}");
    Ok(())
}

/// Compares the gradient of `Σ f(x)·r` (r fixed and random) with central differences in f64.
pub fn gradient_matches(x: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<()> {
    let var = Var::from_tensor(x)?;
    let y = f(var.as_tensor())?;
    let r = random(y.shape().clone(), 99, DType::F64)?;
    let objective = |x: &Tensor| -> Result<f64> { (f(x)? * &r)?.sum_all()?.to_scalar::<f64>() };
    let grads = (y * &r)?.sum_all()?.backward()?;
    let grad = grads.get(&var).expect("a gradient").flatten_all()?.to_vec1::<f64>()?;
    let base = x.flatten_all()?.to_vec1::<f64>()?;
    let h = 1e-5;
    for i in 0..base.len() {
        let at = |delta: f64| {
            let mut moved = base.clone();
            moved[i] += delta;
            objective(&Tensor::from_vec(moved, x.shape(), &Device::Cpu)?)
        };
        let numeric = (at(h)? - at(-h)?) / (2.0 * h);
        assert!(
            (numeric - grad[i]).abs() <= 1e-6 * (1.0 + numeric.abs()),
            "element {i}: {numeric} against {}",
            grad[i]
        );
    }
    Ok(())
}
