//! The chained gradient of a group against the exact one in double precision, with a bound of each entry from the scores themselves.
//!
//! With f the exact weights, δ_ij = |s_ij|^{g+1} e^{|s_ij|}/(g+1)! before a query's own tile and 0 in it, D_i = Σ_j f_ij δ_ij and
//! η_ij = (δ_ij + D_i)/(1 − D_i): |f̃_ij − f_ij| ≤ η_ij f_ij. With R_i = Σ_j f_ij η_ij |q_ij − ρ_i|, q = dO Vᵀ:
//! |p̃_ij − p_ij| ≤ f_ij (η_ij |q_ij − ρ_i| + (1 + η_ij) R_i) =: e_ij. So |dQ̃ − dQ| ≤ β e |K|, |dK̃ − dK| ≤ β eᵀ |Q| and
//! |dṼ − dV| ≤ (f ∘ η)ᵀ |dO|, entry by entry, with K and V less their means. What rounding may do is added to η, and to e as a share of ‖dO_i‖ max_j ‖V_j‖ with K
//! and V as they were given.

use super::super::chained::remainder;
use super::group::{GroupGradients, HeadGroup, Strided};
use crate::kernels::real::Real;

/// How far a chained gradient is from the exact one.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Comparison {
    /// The largest error of an entry of dQ, dK or dV over the largest entry of the exact dQ, dK or dV.
    pub relative_error: f64,
    /// The largest error of an entry over its bound. Above 1 the gradient is wrong.
    pub share_of_bound: f64,
}

impl Comparison {
    /// Whether an error is above its bound, or no number.
    pub(super) fn is_outside(&self) -> bool {
        self.share_of_bound.is_nan() || self.share_of_bound > 1.0
    }

    /// The larger of both.
    pub(super) fn most(self, other: Self) -> Self {
        Self {
            relative_error: larger(self.relative_error, other.relative_error),
            share_of_bound: larger(self.share_of_bound, other.share_of_bound),
        }
    }
}

/// The larger one; a number that is none is larger than all.
fn larger(a: f64, b: f64) -> f64 {
    if a.is_nan() || a > b { a } else { b }
}

/// One gradient: exact, and the bound of its error.
struct Bounded {
    exact: Vec<f64>,
    bound: Vec<f64>,
}

impl Bounded {
    fn new(len: usize) -> Self {
        Self { exact: vec![0.0; len], bound: vec![0.0; len] }
    }

    /// Adds `factor` · row to the gradient.
    fn add(&mut self, at: usize, row: &[f64], factor: f64) {
        self.exact[at..at + row.len()].iter_mut().zip(row).for_each(|(sum, v)| *sum += factor * v);
    }

    /// Adds `error` · |row| to the bound.
    fn allow(&mut self, at: usize, row: &[f64], error: f64) {
        self.bound[at..at + row.len()].iter_mut().zip(row).for_each(|(sum, v)| *sum += error * v.abs());
    }

    fn compare<T: Real>(&self, found: &[T]) -> Comparison {
        let (mut off, mut share, mut top) = (0.0, 0.0, 0.0);
        for ((&found, exact), bound) in found.iter().zip(&self.exact).zip(&self.bound) {
            let error = (found.to_f64() - exact).abs();
            off = larger(off, error);
            share = larger(share, error / (bound + f64::from(f32::MIN_POSITIVE)));
            top = larger(top, exact.abs());
        }
        Comparison { relative_error: if off == 0.0 { 0.0 } else { off / top }, share_of_bound: share }
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn doubles<T: Real>(all: &[T]) -> Vec<f64> {
    all.iter().map(|&v| v.to_f64()).collect()
}

fn gathered<T: Real>((all, stride): &Strided<'_, T>, (rows, d): (usize, usize)) -> Vec<f64> {
    (0..rows).flat_map(|row| doubles(&all[row * stride..][..d])).collect()
}

/// What rounding may do to a weight that is made by features, as a share of it: the terms of P_g(s) are as large as those of e^{|s|}, which is up to e^{2τ}
/// times as large as e^s.
pub(super) fn rounding(tau: f64, epsilon: f64) -> f64 {
    16.0 * epsilon * (2.0 * tau).exp()
}

/// Holds `found` against the exact gradient of the group's keys and values as they were given, in L² time.
pub(super) fn compare<T: Real>(
    group: &HeadGroup<'_, T>,
    found: &GroupGradients<T>,
    (degree, tile): (usize, usize),
) -> Comparison {
    let (d, keys, beta) = (group.d, group.keys, group.scale.to_f64());
    let [k, v] = [0, 1].map(|i| gathered(&group.given[i], (keys, d)));
    // Bounds are of what was computed with: keys less their mean, which move no exact number.
    let (centred, values) = (doubles(&group.k), doubles(&group.v));
    let longest = v.chunks_exact(d).chain(values.chunks_exact(d)).map(|v| dot(v, v).sqrt()).fold(0.0, f64::max);
    let allowance = rounding(group.score_bound(), T::epsilon().to_f64());
    let row = |j: usize| j * d..(j + 1) * d;
    let (mut of_q, mut of_k, mut of_v) =
        (Bounded::new(group.rows * group.heads * d), Bounded::new(keys * d), Bounded::new(keys * d));
    for i in 0..group.rows {
        let seen = i + keys - group.rows + 1;
        let own_tile = (seen - 1) / tile * tile;
        for head in 0..group.heads {
            let at = group.at(i, head);
            let (q, g) = (doubles(&group.q[at..at + d]), doubles(&group.g[at..at + d]));
            let mut f: Vec<f64> = (0..seen).map(|j| beta * dot(&q, &k[row(j)])).collect();
            let top = f.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            f.iter_mut().for_each(|f| *f = (*f - top).exp());
            let sum: f64 = f.iter().sum();
            f.iter_mut().for_each(|f| *f /= sum);
            let along: Vec<f64> = (0..seen).map(|j| dot(&g, &v[row(j)])).collect();
            let rho = dot(&f, &along);
            let of_score = |j: usize| match j < own_tile {
                true => remainder((beta * dot(&q, &centred[row(j)])).abs(), degree),
                false => 0.0,
            };
            let delta: Vec<f64> = (0..seen).map(of_score).collect();
            let mean = dot(&f, &delta);
            let eta = |j: usize| (delta[j] + mean) / (1.0 - mean) + allowance;
            let spread: f64 = (0..seen).map(|j| f[j] * eta(j) * (along[j] - rho).abs()).sum();
            let rounded = allowance * dot(&g, &g).sqrt() * longest;
            let own = (i * group.heads + head) * d;
            for j in 0..seen {
                let off = (along[j] - rho).abs();
                let (e, rounded) =
                    (beta.abs() * f[j] * (eta(j) * off + (1.0 + eta(j)) * spread), beta.abs() * f[j] * rounded);
                let p = beta * f[j] * (along[j] - rho);
                of_q.add(own, &k[row(j)], p);
                of_q.allow(own, &centred[row(j)], e + rounded);
                of_q.allow(own, &k[row(j)], rounded);
                of_k.add(j * d, &q, p);
                of_k.allow(j * d, &q, e + rounded);
                of_v.add(j * d, &g, f[j]);
                of_v.allow(j * d, &g, f[j] * eta(j));
            }
        }
    }
    let all = [of_q.compare(&found.q), of_k.compare(&found.k), of_v.compare(&found.v)];
    all.into_iter().fold(Comparison::default(), Comparison::most)
}
