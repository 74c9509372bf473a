//! Objectives: what is minimised beside the loss of the task.

use candle_core::{D, DType, Tensor};
use lorimer_adapter::training::{self, BaLora, BaLoraTask};
use lorimer_tensor::linalg::eigh;

/// Most rows of logits that an objective looks at in a micro-batch.
pub const MOST_ROWS: usize = 1024;

/// A further term of the loss.
pub trait Objective: Send + Sync {
    /// The term for logits (n, c) of the adapted model at supervised positions and those of the frozen base there, as a mean over
    /// positions; a scalar in candle's graph.
    fn value(&self, logits: &Tensor, base: &Tensor) -> candle_core::Result<Tensor>;
}

/// The objective of a kind.
pub fn build(kind: &training::Objective) -> Box<dyn Objective> {
    match kind {
        training::Objective::BaLora(settings) => Box::new(Regularisers(settings.clone())),
    }
}

/// BA-LoRA's three terms (Chang et al. 2024, arXiv 2408.04556, sections 3.2 and 3.3).
pub struct Regularisers(pub BaLora);

impl Objective for Regularisers {
    fn value(&self, logits: &Tensor, base: &Tensor) -> candle_core::Result<Tensor> {
        let s = &self.0;
        let nlg = s.task == BaLoraTask::Nlg;
        let consistency = if nlg { divergence(base, logits)? } else { normalised_distance(base, logits)? };
        let diversity = if nlg { entropy(logits)?.neg()? } else { covariance(logits)? };
        let spread = singular_share(logits, s.k)?.neg()?;
        (((consistency * s.lambda1)? + (diversity * s.lambda2)?)? + (spread * s.lambda3)?)?.to_dtype(logits.dtype())
    }
}

fn log_softmax(z: &Tensor) -> candle_core::Result<Tensor> {
    let shifted = z.broadcast_sub(&z.max_keepdim(D::Minus1)?.detach())?;
    shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)
}

/// KL(softmax p ‖ softmax q), a mean over rows.
pub fn divergence(p: &Tensor, q: &Tensor) -> candle_core::Result<Tensor> {
    let (p, q) = (log_softmax(p)?, log_softmax(q)?);
    (p.exp()? * (p - q)?)?.sum(D::Minus1)?.mean_all()
}

/// Mean entropy of softmax z, in nats.
pub fn entropy(z: &Tensor) -> candle_core::Result<Tensor> {
    let z = log_softmax(z)?;
    (z.exp()? * &z)?.sum(D::Minus1)?.mean_all()?.neg()
}

/// Mean over rows of ‖a/‖a‖ − b/‖b‖‖².
pub fn normalised_distance(a: &Tensor, b: &Tensor) -> candle_core::Result<Tensor> {
    let unit = |t: &Tensor| t.broadcast_div(&(t.sqr()?.sum_keepdim(D::Minus1)?.sqrt()? + 1e-12)?);
    (unit(a)? - unit(b)?)?.sqr()?.sum(D::Minus1)?.mean_all()
}

/// Σ of squared off-diagonal covariances of the columns of (n, c), over c, by way of the n × n products of the centred rows.
pub fn covariance(z: &Tensor) -> candle_core::Result<Tensor> {
    let (n, c) = z.dims2()?;
    let z = z.broadcast_sub(&z.mean_keepdim(0)?)?;
    let part = 1.0 / (n.max(2) - 1) as f64;
    let all = (z.matmul(&z.t()?)? * part)?.sqr()?.sum_all()?;
    let own = (z.sqr()?.sum(0)? * part)?.sqr()?.sum_all()?;
    (all - own)? / c as f64
}

/// Σ of the k largest singular values of (n, c) over the sum of all. The vectors come from the n × n Gram matrix and are constants of
/// the graph: σ_i = u_iᵀ Z v_i then has the value and, with u_i v_iᵀ, the gradient of the singular value.
pub fn singular_share(z: &Tensor, k: usize) -> candle_core::Result<Tensor> {
    let wide = z.dim(0)? <= z.dim(1)?;
    let fixed = z.detach().to_dtype(DType::F64)?;
    let fixed = if wide { fixed } else { fixed.t()?.contiguous()? };
    let n = fixed.dim(0)?;
    let (values, u) = eigh(&fixed.matmul(&fixed.t()?)?)?;
    // Values rise; what rounding made of a zero has no direction.
    let largest = values.last().copied().unwrap_or(0.0).max(0.0);
    let inverse: Vec<f64> = values.iter().map(|v| if *v > 1e-14 * largest { v.powf(-0.5) } else { 0.0 }).collect();
    let side = |from: usize| -> candle_core::Result<Tensor> {
        // Σ_i u_i v_iᵀ = Σ_i u_i u_iᵀ Z / σ_i over i ≥ from.
        let u = u.narrow(1, from, n - from)?;
        let scale = Tensor::from_slice(&inverse[from..], (1, n - from), u.device())?;
        let directions = u.broadcast_mul(&scale)?.matmul(&u.t()?)?.matmul(&fixed)?;
        let directions = if wide { directions } else { directions.t()?.contiguous()? };
        (z * directions.to_dtype(z.dtype())?.detach())?.sum_all()
    };
    side(n - k.min(n))?.div(&side(0)?)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};
    use lorimer_tensor::linalg::svd;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn random(rows: usize, columns: usize, seed: u64) -> Tensor {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let data: Vec<f64> = (0..rows * columns).map(|_| rng.random_range(-2.0..2.0)).collect();
        Tensor::from_vec(data, (rows, columns), &Device::Cpu).unwrap()
    }

    fn number(t: &Tensor) -> f64 {
        t.to_scalar::<f64>().unwrap()
    }

    type Term = fn(&Tensor) -> candle_core::Result<Tensor>;

    #[test]
    fn gradients_equal_central_differences() -> candle_core::Result<()> {
        let terms: [(&str, Term); 6] = [
            ("divergence", |z| divergence(&random(5, 9, 3), z)),
            ("entropy", entropy),
            ("distance", |z| normalised_distance(&random(5, 9, 3), z)),
            ("covariance", covariance),
            ("share, wide", |z| singular_share(z, 2)),
            ("share, tall", |z| singular_share(&z.t()?.contiguous()?, 2)),
        ];
        for (name, term) in terms {
            let (z, direction) = (random(5, 9, 1), random(5, 9, 2));
            let var = Var::from_tensor(&z)?;
            let grads = term(var.as_tensor())?.backward()?;
            let along = number(&(grads.get(&var).unwrap() * &direction)?.sum_all()?);
            let at = |h: f64| term(&(&z + (&direction * h).unwrap()).unwrap()).map(|t| number(&t));
            let numeric = (at(1e-6)? - at(-1e-6)?) / 2e-6;
            assert!((numeric - along).abs() < 1e-7, "{name}: {numeric} against {along}");
        }
        Ok(())
    }

    #[test]
    fn terms_have_their_values() -> candle_core::Result<()> {
        let z = random(5, 9, 1);
        assert!(number(&divergence(&z, &z)?).abs() < 1e-15);
        assert!(number(&divergence(&random(5, 9, 2), &z)?) > 0.0);
        let even = Tensor::zeros((4, 7), DType::F64, &Device::Cpu)?;
        assert!((number(&entropy(&even)?) - 7f64.ln()).abs() < 1e-14);
        let (_, s, _) = svd(&z)?;
        let s = s.to_vec1::<f64>()?;
        let expected = s[..2].iter().sum::<f64>() / s.iter().sum::<f64>();
        assert!((number(&singular_share(&z, 2)?) - expected).abs() < 1e-12);
        let low = random(5, 2, 4).matmul(&random(2, 9, 5))?;
        assert!((number(&singular_share(&low, 2)?) - 1.0).abs() < 1e-6);
        // The covariance by its definition.
        let centred = z.broadcast_sub(&z.mean_keepdim(0)?)?;
        let c = (centred.t()?.matmul(&centred)? / 4.0)?.to_vec2::<f64>()?;
        let off: f64 = (0..9)
            .flat_map(|i| (0..9).map(move |j| (i, j)))
            .filter(|(i, j)| i != j)
            .map(|(i, j)| c[i][j].powi(2))
            .sum();
        assert!((number(&covariance(&z)?) - off / 9.0).abs() < 1e-12);
        Ok(())
    }
}
