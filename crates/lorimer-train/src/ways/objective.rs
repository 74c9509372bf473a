//! Objectives: what is minimised beside the loss of the task.

use candle_core::{D, DType, Tensor};
use lorimer_adapter::training::{self, BaLora, BaLoraTask};
use lorimer_tensor::linalg::eigh;
use rayon::prelude::*;

/// Most rows of logits that an objective looks at together.
pub const BLOCK_ROWS: usize = 1024;

/// Where in a run an objective is asked, and what its means are over.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Moment {
    /// Share of the run's steps that are done.
    pub progress: f64,
    /// The step, from 0, and all steps.
    pub step: (usize, usize),
    /// Supervised positions of the step over its rows of data.
    pub positions_per_row: f64,
}

impl Moment {
    /// Before step `step` (from 0) of `total`.
    pub fn new(step: usize, total: usize, positions_per_row: f64) -> Self {
        Self { progress: step as f64 / total.max(1) as f64, step: (step, total), positions_per_row }
    }
}

/// An auxiliary loss.
pub trait Objective: Send + Sync {
    /// The term for logits (n, c) of the adapted model at supervised positions and those of the frozen base there, such that blocks of positions can be
    /// averaged by their length; a scalar in candle's graph.
    fn value(&self, logits: &Tensor, base: &Tensor, at: &Moment) -> candle_core::Result<Tensor>;
}

/// The objective of a kind.
pub fn build(kind: &training::Objective) -> Box<dyn Objective> {
    match kind {
        training::Objective::BaLora(settings) => Box::new(Regularisers(settings.clone())),
    }
}

/// BA-LoRA's three terms (Chang et al. 2024, arXiv 2408.04556, sections 3.2 and 3.3), in the normalisations of the authors' code.
pub struct Regularisers(pub BaLora);

impl Regularisers {
    /// λ₁, λ₂ and λ₃ at a moment.
    fn weights(&self, at: &Moment) -> (f64, f64, f64) {
        let s = &self.0;
        if s.version == 1 {
            return (s.lambda1, s.lambda2, s.lambda3);
        }
        let falling = 0.5 * (1.0 + (std::f64::consts::PI * at.progress).cos());
        let (step, total) = at.step;
        let quiet = (0.2 * total as f64) as usize;
        let ramp = ((0.05 * total as f64) as usize).max(1);
        let focus = (step.saturating_sub(quiet) as f64 / ramp as f64).min(1.0);
        (s.lambda1 * (0.1 + 0.9 * falling), s.lambda2 * focus, s.lambda3 * focus)
    }
}

impl Objective for Regularisers {
    fn value(&self, logits: &Tensor, base: &Tensor, at: &Moment) -> candle_core::Result<Tensor> {
        let s = &self.0;
        let (lambda1, lambda2, lambda3) = self.weights(at);
        let mut terms = Vec::new();
        if lambda1 != 0.0 {
            let (term, factor) = match (s.version, s.task) {
                (1, BaLoraTask::Nlg) => (divergence(base, logits)?, at.positions_per_row),
                (1, BaLoraTask::Nlu) => (normalised_distance(base, logits)?, 1.0),
                _ => {
                    let cooled = |t: &Tensor| t / s.temperature;
                    (divergence(&cooled(base)?, &cooled(logits)?)?, s.temperature * s.temperature)
                }
            };
            terms.push((term * (lambda1 * factor))?);
        }
        if lambda2 != 0.0 {
            let term = match s.task {
                BaLoraTask::Nlg if s.top_k_entropy > 0 => entropy(&largest(logits, s.top_k_entropy)?)?.neg()?,
                BaLoraTask::Nlg => entropy(logits)?.neg()?,
                BaLoraTask::Nlu => covariance(logits)?,
            };
            terms.push((term * lambda2)?);
        }
        // The second code looks at a matrix with at least two rows.
        if lambda3 != 0.0 && (s.version == 1 || logits.dim(0)? > 1) {
            terms.push((singular_share(logits, s.k, s.version == 2)? * -lambda3)?);
        }
        let zero = Tensor::zeros((), logits.dtype(), logits.device())?;
        terms.into_iter().try_fold(zero, |sum, term| sum + term.to_dtype(logits.dtype())?)
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

/// Mean over all numbers of (a/‖a‖ − b/‖b‖)², a and b row by row.
pub fn normalised_distance(a: &Tensor, b: &Tensor) -> candle_core::Result<Tensor> {
    let unit = |t: &Tensor| t.broadcast_div(&(t.sqr()?.sum_keepdim(D::Minus1)?.sqrt()? + 1e-12)?);
    (unit(a)? - unit(b)?)?.sqr()?.mean_all()
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

/// The k largest numbers of each row of (n, c).
pub fn largest(z: &Tensor, k: usize) -> candle_core::Result<Tensor> {
    let (n, c) = z.dims2()?;
    let k = k.min(c);
    let values = z.detach().to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    let row = |row: &[f64]| -> Vec<u32> {
        let mut order: Vec<u32> = (0..c as u32).collect();
        if k < c {
            order.select_nth_unstable_by(k, |&i, &j| row[j as usize].total_cmp(&row[i as usize]));
        }
        order.truncate(k);
        order
    };
    let places: Vec<u32> = values.par_chunks(c.max(1)).flat_map_iter(row).collect();
    z.contiguous()?.gather(&Tensor::from_vec(places, (n, k), z.device())?, 1)
}

/// Σ of the k largest singular values of (n, c) over the sum of all, or over the root of the sum of their squares. The vectors come from the n × n
/// Gram matrix and are constants of the graph: σ_i = u_iᵀ Z v_i then has the value and, with u_i v_iᵀ, the gradient of the singular value.
pub fn singular_share(z: &Tensor, k: usize, frobenius: bool) -> candle_core::Result<Tensor> {
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
    let all = if frobenius { z.sqr()?.sum_all()?.sqrt()? } else { side(0)? };
    side(n - k.min(n))?.div(&all)
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
        let terms: [(&str, Term); 7] = [
            ("divergence", |z| divergence(&random(5, 9, 3), z)),
            ("entropy", entropy),
            ("entropy of the largest", |z| entropy(&largest(z, 4)?)),
            ("distance", |z| normalised_distance(&random(5, 9, 3), z)),
            ("covariance", covariance),
            ("share, wide", |z| singular_share(z, 2, false)),
            ("share, tall", |z| singular_share(&z.t()?.contiguous()?, 2, true)),
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
        assert!((number(&singular_share(&z, 2, false)?) - expected).abs() < 1e-12);
        let low = random(5, 2, 4).matmul(&random(2, 9, 5))?;
        assert!((number(&singular_share(&low, 2, false)?) - 1.0).abs() < 1e-6);
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
