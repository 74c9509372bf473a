//! What papers say of their methods and what can be shown by construction.

use candle_core::{DType, Device, Tensor};
use lorimer::adapter::method::{Findings, Source};
use lorimer::model::{Projection, Site};
use lorimer::prelude::*;
use lorimer::tensor::FrozenWeight;
use lorimer::tensor::linalg::{qr, svd};
use lorimer::train::optimizer::{AdamW, AdamWConfig, Optimizer};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn random(shape: (usize, usize), rng: &mut ChaCha8Rng) -> Tensor {
    let data: Vec<f64> = (0..shape.0 * shape.1).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
}

fn kronecker(a: &Tensor, b: &Tensor) -> Tensor {
    let ((m, n), (p, q)) = (a.dims2().unwrap(), b.dims2().unwrap());
    let a = a.reshape((m, 1, n, 1)).unwrap();
    let b = b.reshape((1, p, 1, q)).unwrap();
    a.broadcast_mul(&b).unwrap().reshape((m * p, n * q)).unwrap()
}

/// A rotation near the identity: the orthogonal factor of I + a skew matrix.
fn rotation(n: usize, size: f64, rng: &mut ChaCha8Rng) -> Tensor {
    let x = random((n, n), rng);
    let skew = ((&x - x.t().unwrap()).unwrap() * size).unwrap();
    let (q, r) = qr(&(Tensor::eye(n, DType::F64, &Device::Cpu).unwrap() + skew).unwrap()).unwrap();
    let signs: Vec<f64> =
        (0..n).map(|i| r.get(i).unwrap().get(i).unwrap().to_scalar::<f64>().unwrap().signum()).collect();
    q.broadcast_mul(&Tensor::from_vec(signs, (1, n), &Device::Cpu).unwrap()).unwrap()
}

fn norm(t: &Tensor) -> f64 {
    t.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt()
}

/// TLoRA's must-show: where the target is the weight turned and a little of low rank added, transform and residual come nearer
/// than the best LoRA of as many parameters.
#[test]
fn tlora_reaches_a_turned_weight_that_lora_does_not() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let (outputs, inputs) = (40, 48);
    let w = random((outputs, inputs), &mut rng);
    let turn = kronecker(&rotation(6, 0.3, &mut rng), &rotation(8, 0.3, &mut rng));
    let low = (random((outputs, 1), &mut rng).matmul(&random((1, inputs), &mut rng)).unwrap() * 0.5).unwrap();
    let target = (w.matmul(&turn).unwrap() + low).unwrap();
    let base = Projection { weight: FrozenWeight::Dense(w.clone()), bias: None };
    let site = Site::new("p", (outputs, inputs));
    let settings = serde_json::json!({ "r": 1, "ring": 1 });
    let method = methods::build("tlora", settings.as_object().unwrap()).unwrap();
    let findings = Findings::new();
    let delta = method.attach(&site, &base, &mut Source::start(&site, DType::F64, 0, &findings)).unwrap();
    let parameters: Vec<(String, &candle_core::Var)> =
        delta.trainable().into_iter().map(|(name, var)| (name.to_string(), var)).collect();
    let count: usize = parameters.iter().map(|(_, v)| v.elem_count()).sum();
    assert_eq!(count, method.parameters(&site).unwrap());

    // All rows of the identity as inputs: the output is W'ᵀ.
    let eye = Tensor::eye(inputs, DType::F64, &Device::Cpu).unwrap();
    let y = base.forward(&eye).unwrap();
    let mut optimizer = AdamW::new(AdamWConfig::default(), false);
    for step in 0..3000 {
        let moved = (&y + delta.forward(&base, &eye, &y, &Step::default()).unwrap()).unwrap();
        let loss = (moved - target.t().unwrap()).unwrap().sqr().unwrap().sum_all().unwrap();
        let found = loss.backward().unwrap();
        let gradients: Vec<_> = parameters.iter().map(|(_, v)| found.get(v.as_tensor()).cloned()).collect();
        optimizer.step(&parameters, &gradients, 1e-2 * (1.0 - step as f64 / 3000.0)).unwrap();
    }
    let tlora = norm(&(delta.merged(&base).unwrap().unwrap() - &target).unwrap());

    // The best LoRA of at least as many parameters is the truncated SVD of the change.
    let rank = count.div_ceil(outputs + inputs);
    let (_, s, _) = svd(&(&target - &w).unwrap()).unwrap();
    let lora = s.to_vec1::<f64>().unwrap()[rank..].iter().map(|s| s * s).sum::<f64>().sqrt();
    println!("{count} parameters; error of TLoRA {tlora:.4}, of the best LoRA of rank {rank} {lora:.4}");
    assert!(tlora < 0.5 * lora, "{tlora} against {lora}");
}
