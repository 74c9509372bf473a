//! The gradient of one attention head, exact and by chained low-rank factors (arXiv 2406.03136, from the theory; experimental).
//!
//! f = softmax(β Q Kᵀ), O = f V, and dO comes from above. Exact: ρ_i = ⟨dO_i, O_i⟩, p = f ∘ (dO Vᵀ) − diag(ρ) f, dQ = β p K, dK = β pᵀ Q,
//! dV = fᵀ dO, in L² time. Chained: exp(x·y) ≈ Σ_{n ≤ g} (x·y)ⁿ/n! is a product of features, so that f ≈ U Vfᵀ (L, k) with k = C(d + g, g),
//! and everything is computed in O(L k d²) without a number for each pair of rows. Both see all keys: the paper has no causal mask.
//!
//! With τ = max |β q_i·k_j|, δ = τ^{g+1} e^τ/(g+1)! and η = 2δ/(1 − δ): |f̃ − f| ≤ η f, and ‖dQ̃ − dQ‖∞ ≤ β η (3 + η) ‖dO Vᵀ‖∞ ‖K‖∞.
//! Subtracting the keys' mean changes neither f nor dQ, and τ usually falls.

use candle_core::{Result, bail};
use rayon::prelude::*;

use crate::kernels::real::Real;

/// Most numbers that the factors of one head may take.
const MOST: u64 = 1 << 28;

/// One head after rotation: queries, keys and values (L, d), row by row.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// Q (L, d).
    pub q: &'a [f64],
    /// K (L, d).
    pub k: &'a [f64],
    /// V (L, d).
    pub v: &'a [f64],
    /// d.
    pub width: usize,
    /// β: what q·k is multiplied by.
    pub scale: f64,
}

/// Gradients of a head's queries, keys and values (L, d), with its output.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeadGradients {
    /// O (L, d).
    pub output: Vec<f64>,
    /// dQ (L, d).
    pub q: Vec<f64>,
    /// dK (L, d).
    pub k: Vec<f64>,
    /// dV (L, d).
    pub v: Vec<f64>,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add_scaled(into: &mut [f64], from: &[f64], factor: f64) {
    into.iter_mut().zip(from).for_each(|(into, from)| *into += factor * from);
}

impl Head<'_> {
    /// L.
    pub fn rows(&self) -> usize {
        self.q.len() / self.width.max(1)
    }

    fn check(&self, upstream: &[f64]) -> Result<()> {
        let n = self.q.len();
        match self.width > 0 && n.is_multiple_of(self.width) && [self.k, self.v, upstream].iter().all(|t| t.len() == n)
        {
            true => Ok(()),
            false => {
                bail!("queries, keys, values and the gradient of a head should have one shape (L, {})", self.width)
            }
        }
    }

    /// τ = max |β q_i·k_j| over all pairs.
    pub fn largest_score(&self) -> f64 {
        let d = self.width.max(1);
        let of = |q: &[f64]| self.k.chunks_exact(d).map(|k| (self.scale * dot(q, k)).abs()).fold(0.0, f64::max);
        self.q.par_chunks_exact(d).map(of).reduce(|| 0.0, f64::max)
    }

    /// A row of f, from the scores' largest on.
    fn softmax(&self, q: &[f64], row: &mut [f64]) {
        let scores = self.k.chunks_exact(self.width).map(|k| self.scale * dot(q, k));
        row.iter_mut().zip(scores).for_each(|(f, score)| *f = score);
        let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        row.iter_mut().for_each(|f| *f = (*f - top).exp());
        let sum: f64 = row.iter().sum();
        row.iter_mut().for_each(|f| *f /= sum);
    }

    /// The exact gradients for dO (L, d), over `tile` query rows at a time: no (L, L) matrix is kept.
    ///
    /// # Errors
    ///
    /// Fails if the shapes differ.
    pub fn exact(&self, upstream: &[f64], tile: usize) -> Result<HeadGradients> {
        self.check(upstream)?;
        let (d, rows) = (self.width, self.rows());
        let mut all = HeadGradients {
            output: vec![0.0; rows * d],
            q: vec![0.0; rows * d],
            k: vec![0.0; rows * d],
            v: vec![0.0; rows * d],
        };
        let tile = tile.clamp(1, rows.max(1));
        let mut f = vec![0.0; tile * rows];
        for first in (0..rows).step_by(tile) {
            let count = tile.min(rows - first);
            for i in 0..count {
                let (at, row) = ((first + i) * d, &mut f[i * rows..(i + 1) * rows]);
                let (q, up) = (&self.q[at..at + d], &upstream[at..at + d]);
                self.softmax(q, row);
                let output = &mut all.output[at..at + d];
                self.v.chunks_exact(d).zip(&*row).for_each(|(v, f)| add_scaled(output, v, *f));
                let rho = dot(up, output);
                for (j, f) in row.iter().enumerate() {
                    let own = j * d..(j + 1) * d;
                    let p = self.scale * f * (dot(up, &self.v[own.clone()]) - rho);
                    add_scaled(&mut all.q[at..at + d], &self.k[own.clone()], p);
                    add_scaled(&mut all.k[own.clone()], q, p);
                    add_scaled(&mut all.v[own], up, *f);
                }
            }
        }
        Ok(all)
    }

    /// The gradients for dO (L, d) by factors of degree `degree`, in O(L k d²).
    ///
    /// # Errors
    ///
    /// Fails if the shapes differ, if k is so large that the factors would take more than 2^28 numbers, or if the degree is so small that a
    /// row of f has no positive sum.
    pub fn chained(&self, upstream: &[f64], degree: usize) -> Result<HeadGradients> {
        self.check(upstream)?;
        let (d, rows) = (self.width, self.rows());
        let k = match feature_count(d, degree) {
            Some(k) if k.saturating_mul((rows as u64).max((d * d) as u64)) <= MOST => k as usize,
            _ => bail!("degree {degree} at width {d} makes more factors than {MOST} numbers hold"),
        };
        let powers = Powers::new(d, degree);
        let root = self.scale.abs().sqrt();
        let mut u = powers.of(self.q, root * self.scale.signum());
        let vf = powers.of(self.k, root);
        let mut sums = vec![0.0; k];
        vf.chunks_exact(k).for_each(|row| add_scaled(&mut sums, row, 1.0));
        for row in u.chunks_exact_mut(k) {
            let sum = dot(row, &sums);
            if !(sum > 0.0 && sum.is_finite()) {
                bail!("degree {degree} is too small for scores of up to {:.3}", self.largest_score());
            }
            row.iter_mut().for_each(|u| *u /= sum);
        }
        let output = through(&u, &contract(&vf, self.v, k, d), k, d);
        let rho: Vec<f64> = upstream.chunks_exact(d).zip(output.chunks_exact(d)).map(|(up, o)| dot(up, o)).collect();
        let rho_q: Vec<f64> =
            self.q.chunks_exact(d).zip(&rho).flat_map(|(q, rho)| q.iter().map(move |q| q * rho)).collect();
        let mut of_q = twice(&u, upstream, &contract_twice((&vf, self.v, self.k), k, d), k, d);
        let less = through(&u, &contract(&vf, self.k, k, d), k, d);
        of_q.chunks_exact_mut(d)
            .zip(less.chunks_exact(d))
            .zip(&rho)
            .for_each(|((q, less), rho)| add_scaled(q, less, -rho));
        let mut of_k = twice(&vf, self.v, &contract_twice((&u, upstream, self.q), k, d), k, d);
        add_scaled(&mut of_k, &through(&vf, &contract(&u, &rho_q, k, d), k, d), -1.0);
        [&mut of_q, &mut of_k].into_iter().flatten().for_each(|g| *g *= self.scale);
        let of_v = through(&vf, &contract(&u, upstream, k, d), k, d);
        Ok(HeadGradients { output, q: of_q, k: of_k, v: of_v })
    }
}

/// k = C(d + g, g), the number of features of degree up to g; None where that is above 2^64.
pub fn feature_count(width: usize, degree: usize) -> Option<u64> {
    (1..=degree as u128)
        .try_fold(1u128, |k, n| Some(k.checked_mul(width as u128 + n)? / n))
        .and_then(|k| k.try_into().ok())
}

/// δ = τ^{g+1} e^τ/(g+1)!: how far a degree's sum may be from exp, as a share of it.
pub fn remainder(tau: f64, degree: usize) -> f64 {
    (1..=degree + 1).fold(tau.exp(), |delta, n| delta * tau / n as f64)
}

/// η = 2δ/(1 − δ), a bound of |f̃ − f|/f; None where δ ≥ 1, and nothing is known.
pub fn relative_error(tau: f64, degree: usize) -> Option<f64> {
    let delta = remainder(tau, degree);
    (delta < 1.0).then(|| 2.0 * delta / (1.0 - delta))
}

/// The least degree up to `most` whose [`relative_error`] is within a tolerance.
pub fn least_degree(tau: f64, tolerance: f64, most: usize) -> Option<usize> {
    (0..=most).find(|&g| relative_error(tau, g).is_some_and(|eta| eta <= tolerance))
}

/// Keys (L, d) less their mean. Neither f nor dQ changes.
pub fn centred(keys: &[f64], width: usize) -> Vec<f64> {
    let (rows, mut mean) = ((keys.len() / width.max(1)).max(1) as f64, vec![0.0; width]);
    keys.chunks_exact(width.max(1)).for_each(|row| add_scaled(&mut mean, row, 1.0 / rows));
    keys.iter().zip(mean.iter().cycle()).map(|(key, mean)| key - mean).collect()
}

/// G_A = s (dY B)ᵀ X and G_B = s dYᵀ (X Aᵀ) of y = x (W + s B A)ᵀ, from dY (L, outputs), X (L, inputs), A (r, inputs), B (outputs, r): no (outputs, inputs)
/// matrix is formed.
///
/// # Errors
///
/// Fails if the shapes do not fit.
pub fn low_rank_gradients(
    (dy, x): (&candle_core::Tensor, &candle_core::Tensor),
    (a, b, scaling): (&candle_core::Tensor, &candle_core::Tensor, f64),
) -> Result<(candle_core::Tensor, candle_core::Tensor)> {
    let of_a = (dy.matmul(b)?.t()?.contiguous()?.matmul(x)? * scaling)?;
    let of_b = (dy.t()?.contiguous()?.matmul(&x.matmul(&a.t()?)?)? * scaling)?;
    Ok((of_a, of_b))
}

/// The features x^α/√(α!) of |α| ≤ g: each is an earlier one times a coordinate.
pub(super) struct Powers {
    width: usize,
    /// (earlier feature, coordinate, factor) of all but the first, which is 1.
    steps: Vec<(usize, usize, f64)>,
}

impl Powers {
    pub(super) fn new(width: usize, degree: usize) -> Self {
        // The last coordinate and its power of each feature, of the degree before.
        let (mut steps, mut level, mut next) = (Vec::new(), vec![(0usize, 0usize, 0usize)], 1);
        for _ in 0..degree {
            let mut above = Vec::new();
            for (feature, last, power) in level {
                for coordinate in last..width {
                    let power = if coordinate == last { power + 1 } else { 1 };
                    steps.push((feature, coordinate, (power as f64).powf(-0.5)));
                    above.push((next, coordinate, power));
                    next += 1;
                }
            }
            level = above;
        }
        Self { width, steps }
    }

    /// k.
    pub(super) fn count(&self) -> usize {
        self.steps.len() + 1
    }

    /// Features (k) of a row (d), each coordinate times `factor`.
    pub(super) fn fill<T: Real>(&self, row: &[T], factor: T, out: &mut [T]) {
        out[0] = T::one();
        for (i, &(from, coordinate, own)) in self.steps.iter().enumerate() {
            out[i + 1] = out[from] * factor * row[coordinate] * T::from_f64(own);
        }
    }

    /// Features (L, k) of rows (L, d), each coordinate times `factor`.
    fn of(&self, rows: &[f64], factor: f64) -> Vec<f64> {
        let k = self.count();
        let mut all = vec![0.0; rows.len() / self.width * k];
        let rows = all.par_chunks_exact_mut(k).zip(rows.par_chunks_exact(self.width));
        rows.for_each(|(out, row)| self.fill(row, factor, out));
        all
    }
}

/// Σ_j a_jc b_je: (k, d) of a (L, k) and b (L, d).
fn contract(a: &[f64], b: &[f64], k: usize, d: usize) -> Vec<f64> {
    let mut sum = vec![0.0; k * d];
    for (a, b) in a.chunks_exact(k).zip(b.chunks_exact(d)) {
        sum.chunks_exact_mut(d).zip(a).for_each(|(sum, a)| add_scaled(sum, b, *a));
    }
    sum
}

/// Σ_j a_jc b_je t_jx: (k, d, d).
fn contract_twice((a, b, t): (&[f64], &[f64], &[f64]), k: usize, d: usize) -> Vec<f64> {
    let mut sum = vec![0.0; k * d * d];
    for ((a, b), t) in a.chunks_exact(k).zip(b.chunks_exact(d)).zip(t.chunks_exact(d)) {
        for (a, sum) in a.iter().zip(sum.chunks_exact_mut(d * d)) {
            sum.chunks_exact_mut(d).zip(b).for_each(|(sum, b)| add_scaled(sum, t, a * b));
        }
    }
    sum
}

/// Σ_c u_ic m_cx: (L, d).
fn through(u: &[f64], m: &[f64], k: usize, d: usize) -> Vec<f64> {
    let mut all = vec![0.0; u.len() / k * d];
    for (out, u) in all.chunks_exact_mut(d).zip(u.chunks_exact(k)) {
        u.iter().zip(m.chunks_exact(d)).for_each(|(u, m)| add_scaled(out, m, *u));
    }
    all
}

/// Σ_ce u_ic b_ie m_cex: (L, d).
fn twice(u: &[f64], b: &[f64], m: &[f64], k: usize, d: usize) -> Vec<f64> {
    let mut all = vec![0.0; u.len() / k * d];
    for ((out, u), b) in all.chunks_exact_mut(d).zip(u.chunks_exact(k)).zip(b.chunks_exact(d)) {
        for (u, m) in u.iter().zip(m.chunks_exact(d * d)) {
            b.iter().zip(m.chunks_exact(d)).for_each(|(b, m)| add_scaled(out, m, u * b));
        }
    }
    all
}

/// Multiplications of a head's backward: exact, of L² pairs (half of them where `causal`), and chained with k features.
pub fn operations(rows: usize, width: usize, features: u64, causal: bool) -> (f64, f64) {
    let (l, d, k) = (rows as f64, width as f64, features as f64);
    let pairs = if causal { l * (l + 1.0) / 2.0 } else { l * l };
    // Scores, O, dO·V, dQ, dK, dV; and four sums over features and pairs of coordinates, eight over features and one.
    (6.0 * pairs * d, 4.0 * l * k * d * d + 8.0 * l * k * d)
}

#[cfg(test)]
mod tests;
