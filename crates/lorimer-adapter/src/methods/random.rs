//! Random matrices that several methods start from.

use candle_core::{DType, Device, Result as TensorResult, Tensor};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// Uniform in ±`bound`.
pub fn uniform(shape: (usize, usize), bound: f64, dtype: DType, rng: &mut ChaCha8Rng) -> TensorResult<Tensor> {
    let data: Vec<f64> = (0..shape.0 * shape.1).map(|_| rng.random_range(-bound..bound)).collect();
    Tensor::from_vec(data, shape, &Device::Cpu)?.to_dtype(dtype)
}

/// torch's `kaiming_uniform_(a = √5)`: uniform in ±1/√columns.
pub fn kaiming(shape: (usize, usize), dtype: DType, rng: &mut ChaCha8Rng) -> TensorResult<Tensor> {
    uniform(shape, (shape.1.max(1) as f64).powf(-0.5), dtype, rng)
}

/// Standard normal values (Box and Muller).
pub fn normal(shape: (usize, usize), rng: &mut ChaCha8Rng) -> TensorResult<Tensor> {
    let mut one = || {
        let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    };
    Tensor::from_vec((0..shape.0 * shape.1).map(|_| one()).collect::<Vec<f64>>(), shape, &Device::Cpu)
}
