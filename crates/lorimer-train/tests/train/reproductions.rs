//! What papers say of their methods and what can be shown by construction.

use candle_core::{DType, Device, Tensor};
use lorimer_adapter::method::{CalibrationStats, ParameterSource};
use lorimer_adapter::training::{AdamW, AdamWConfig, Optimizer};
use lorimer_model::{Projection, Site};
use lorimer_tensor::FrozenWeight;
use lorimer_tensor::linalg::{qr, svd};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::prelude::*;

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

/// ‖W' − target‖ of a TLoRA that was trained towards the target, and of the best LoRA of at least as many parameters.
fn errors(w: &Tensor, target: &Tensor, ring: usize, seed: u64) -> (f64, f64) {
    let (outputs, inputs) = w.dims2().unwrap();
    let base = Projection { weight: FrozenWeight::Dense(w.clone()), bias: None };
    let site = Site::new("p", (outputs, inputs));
    let settings = serde_json::json!({ "r": 1, "ring": ring });
    let method = methods::build("tlora", settings.as_object().unwrap()).unwrap();
    let stats = CalibrationStats::new();
    let delta = method.attach(&site, &base, &mut ParameterSource::start(&site, DType::F64, seed, &stats)).unwrap();
    let parameters: Vec<(String, &candle_core::Var)> =
        delta.trainable().into_iter().map(|(name, var)| (name.to_string(), var)).collect();
    let count: usize = parameters.iter().map(|(_, v)| v.elem_count()).sum();
    assert_eq!(count, method.parameters(&site).unwrap());
    // All rows of the identity as inputs: the output is W'ᵀ.
    let eye = Tensor::eye(inputs, DType::F64, &Device::Cpu).unwrap();
    let y = base.forward(&eye).unwrap();
    let mut optimizer = AdamW::new(AdamWConfig::default(), false);
    let steps = 1500;
    for step in 0..steps {
        let moved = (&y + delta.forward(&base, &eye, &y, &Step::default()).unwrap()).unwrap();
        let loss = (moved - target.t().unwrap()).unwrap().sqr().unwrap().sum_all().unwrap();
        let found = loss.backward().unwrap();
        let gradients: Vec<_> = parameters.iter().map(|(_, v)| found.get(v.as_tensor()).cloned()).collect();
        optimizer.step(&parameters, &gradients, 1e-2 * (1.0 - step as f64 / steps as f64)).unwrap();
    }
    let tlora = norm(&(delta.merged(&base).unwrap().unwrap() - target).unwrap());
    // The best LoRA is the truncated SVD of the change.
    let rank = count.div_ceil(outputs + inputs);
    let (_, s, _) = svd(&(target - w).unwrap()).unwrap();
    let lora = s.to_vec1::<f64>().unwrap()[rank..].iter().map(|s| s * s).sum::<f64>().sqrt();
    println!(
        "{count} parameters; error of TLoRA {tlora:.3}, of the best LoRA of rank {rank} {lora:.3}: {:.3}",
        tlora / lora
    );
    (tlora, lora)
}

/// TLoRA's claim, that a transform takes on what no low rank can: the target is the weight turned and a little of rank one added, and the turn is
/// any rotation, which the tensor ring has no form for. A large one leaves TLoRA a smaller error than the best LoRA of as many
/// parameters; of one near the identity, where fine-tuning stays, that is not so. A turn that is a product of small ones is of
/// TLoRA's own form and has to be reached.
#[test]
fn tlora_takes_on_large_turns_that_lora_does_not() {
    let (outputs, inputs) = (40, 48);
    for seed in 0..3 {
        let mut rng = ChaCha8Rng::seed_from_u64(3 + seed);
        let w = random((outputs, inputs), &mut rng);
        let low = (random((outputs, 1), &mut rng).matmul(&random((1, inputs), &mut rng)).unwrap() * 0.5).unwrap();
        let target = |turn: Tensor| (w.matmul(&turn).unwrap() + &low).unwrap();
        let own = target(kronecker(&rotation(6, 0.3, &mut rng), &rotation(8, 0.3, &mut rng)));
        let (tlora, lora) = errors(&w, &own, 1, seed);
        assert!(tlora < 1e-2 * lora, "a turn of its own form: {tlora} against {lora}");
        for size in [0.3, 1.0] {
            let large = target(rotation(inputs, size, &mut rng));
            let (tlora, lora) = errors(&w, &large, 2, seed);
            assert!(tlora < 0.9 * lora, "a turn of size {size}: {tlora} against {lora}");
        }
        let small = target(rotation(inputs, 0.03, &mut rng));
        let (tlora, lora) = errors(&w, &small, 2, seed);
        assert!(tlora > 0.9 * lora, "the page says that a small turn leaves no advantage: {tlora} against {lora}");
    }
}
