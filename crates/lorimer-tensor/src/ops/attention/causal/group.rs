//! The chained gradient of the query heads that share one key head of a segment, each query seeing the keys up to its own position.
//!
//! Positions are cut into tiles. A query has its own tile's keys (up to itself) exactly, and all tiles before it by their features: with P_g the
//! polynomial of degree g, w_ij = e^{s_ij} in the own tile and P_g(s_ij) = u_i·v_j before it, f̃ = w / Σ_j w. What the tiles before bring is one sum for
//! all queries of a tile, Σ_j v_j ⊗ [1, V_j, K_j, V_j ⊗ K_j], which grows from tile to tile (a prefix sum); what later queries bring to a key is
//! Σ_i u_i ⊗ [dO_i, ρ_i Q_i, dO_i ⊗ Q_i], which grows from the last tile to the first (a suffix sum, over all heads that share the key). So each pair of rows
//! is looked at within a tile only.

use std::borrow::Cow;
use std::ops::Range;

use candle_core::{Result, bail};

use super::super::chained::Powers;
use crate::kernels::real::Real;
use crate::kernels::shared::Strides;
use crate::kernels::slices::product;

/// Gradients of one group.
pub(super) struct GroupGradients<T> {
    /// dQ (rows, heads·d).
    pub q: Vec<T>,
    /// dK (keys, d).
    pub k: Vec<T>,
    /// dV (keys, d).
    pub v: Vec<T>,
}

/// A matrix that is a part of another one, with the distance between two of its rows.
pub(super) type Strided<'a, T> = (Cow<'a, [T]>, usize);

/// The query heads that share one key head of a segment. The last `rows` keys stand at the queries' own positions.
pub(super) struct HeadGroup<'a, T: Real> {
    /// Queries (rows, heads·d), each `stride` after the one before.
    pub q: &'a [T],
    /// The gradient of the output, as they are.
    pub g: &'a [T],
    pub stride: usize,
    /// Keys and values (keys, d) as they are.
    pub given: [Strided<'a, T>; 2],
    /// Keys and values (keys, d) less their means, which changes neither the weights nor a gradient: rows of p sum to nothing.
    pub k: Vec<T>,
    pub v: Vec<T>,
    pub heads: usize,
    pub rows: usize,
    pub keys: usize,
    pub d: usize,
    pub scale: T,
}

/// What is remembered of each query from its forward: 1/Σ_j w_ij and ρ_i = ⟨dO_i, Õ_i⟩.
type Totals<T> = [(T, T)];

/// (rows, d) less the mean row, which is found in double precision.
fn less_mean<T: Real>((all, stride): &Strided<'_, T>, (rows, d): (usize, usize)) -> Vec<T> {
    let mut mean = vec![0f64; d];
    for row in 0..rows {
        mean.iter_mut().zip(&all[row * stride..][..d]).for_each(|(mean, &v)| *mean += v.to_f64() / rows as f64);
    }
    let own = |row: usize| all[row * stride..][..d].iter().zip(&mean).map(|(&v, &mean)| v - T::from_f64(mean));
    (0..rows).flat_map(own).collect()
}

fn length<T: Real>(row: &[T]) -> f64 {
    row.iter().map(|&v| v.to_f64().powi(2)).sum::<f64>().sqrt()
}

fn dot<T: Real>(a: &[T], b: &[T]) -> T {
    a.iter().zip(b).map(|(&a, &b)| a * b).sum()
}

/// a ⊗ b, after the rest of a row.
fn outer<T: Real>(out: &mut Vec<T>, a: &[T], b: &[T]) {
    a.iter().for_each(|&a| out.extend(b.iter().map(|&b| a * b)));
}

impl<'a, T: Real> HeadGroup<'a, T> {
    /// With keys and values centred. `q` and `g` begin with the first query's first head.
    pub(super) fn new(
        (q, g, stride): (&'a [T], &'a [T], usize),
        given: [Strided<'a, T>; 2],
        (heads, rows, keys, d): (usize, usize, usize, usize),
        scale: f64,
    ) -> Self {
        let [k, v] = [0, 1].map(|i| less_mean(&given[i], (keys, d)));
        Self { q, g, stride, given, k, v, heads, rows, keys, d, scale: T::from_f64(scale) }
    }

    /// A bound of τ = max |β q_i·k_j| in O(L d): |β| times the longest query times the longest key.
    pub(super) fn score_bound(&self) -> f64 {
        let rows = (0..self.heads).flat_map(|head| (0..self.rows).map(move |row| self.at(row, head)));
        // A number that is none is not lost in a maximum.
        let most = |a: f64, b: f64| if a.is_nan() || a > b { a } else { b };
        let q = rows.map(|at| length(&self.q[at..at + self.d])).fold(0.0, most);
        let k = self.k.chunks_exact(self.d).map(length).fold(0.0, most);
        self.scale.to_f64().abs() * q * k
    }

    /// Where a query's head begins.
    pub(super) fn at(&self, row: usize, head: usize) -> usize {
        row * self.stride + head * self.d
    }

    /// The queries that stand at some positions.
    fn queries(&self, positions: &Range<usize>) -> Range<usize> {
        let before = self.keys - self.rows;
        positions.start.saturating_sub(before)..positions.end.saturating_sub(before)
    }

    /// Numbers that a product with features sums up: for queries 1 + 2d + d², for keys 2d + d².
    fn widths(&self) -> (usize, usize) {
        (1 + 2 * self.d + self.d * self.d, 2 * self.d + self.d * self.d)
    }

    fn key_features(&self, powers: &Powers, keys: &Range<usize>) -> Vec<T> {
        let (k, root) = (powers.count(), self.scale.abs().sqrt());
        let mut all = vec![T::zero(); keys.len() * k];
        let rows = self.k[keys.start * self.d..keys.end * self.d].chunks_exact(self.d);
        all.chunks_exact_mut(k).zip(rows).for_each(|(out, row)| powers.fill(row, root, out));
        all
    }

    fn query_features(&self, powers: &Powers, queries: &Range<usize>, head: usize) -> Vec<T> {
        let (k, root) = (powers.count(), self.scale.abs().sqrt() * self.scale.signum());
        let mut all = vec![T::zero(); queries.len() * k];
        for (out, row) in all.chunks_exact_mut(k).zip(queries.clone()) {
            powers.fill(&self.q[self.at(row, head)..][..self.d], root, out);
        }
        all
    }

    /// dQ, dK and dV by features, with tiles of `tile` positions.
    ///
    /// # Errors
    /// The degree is so small for these scores that a query's weights have no positive sum.
    pub(super) fn chained(&self, powers: &Powers, tile: usize) -> Result<GroupGradients<T>> {
        let (k, d, (width, _)) = (powers.count(), self.d, self.widths());
        let mut found = GroupGradients {
            q: vec![T::zero(); self.rows * self.heads * d],
            k: vec![T::zero(); self.keys * d],
            v: vec![T::zero(); self.keys * d],
        };
        let mut totals = vec![(T::zero(), T::zero()); self.rows * self.heads];
        let mut sums = vec![T::zero(); k * width];
        for start in (0..self.keys).step_by(tile) {
            let keys = start..(start + tile).min(self.keys);
            let queries = self.queries(&keys);
            for head in (0..self.heads).filter(|_| !queries.is_empty()) {
                let before = match start {
                    0 => vec![T::zero(); queries.len() * width],
                    _ => {
                        let u = self.query_features(powers, &queries, head);
                        let mut before = vec![T::zero(); queries.len() * width];
                        multiply((queries.len(), width, k), &mut before, (&u, Strides(k, 1)), &sums, false);
                        before
                    }
                };
                self.queries_of_tile((&keys, &queries, head), before, &mut totals, &mut found)?;
            }
            if keys.end < self.keys {
                let v = self.key_features(powers, &keys);
                multiply((k, width, keys.len()), &mut sums, (&v, Strides(1, k)), &self.of_keys(&keys), true);
            }
        }
        self.keys_from_later_queries(powers, tile, &totals, &mut found);
        Ok(found)
    }

    /// [1, V_j, K_j, V_j ⊗ K_j] of some keys.
    fn of_keys(&self, keys: &Range<usize>) -> Vec<T> {
        let mut all = Vec::with_capacity(keys.len() * self.widths().0);
        for j in keys.clone() {
            let (k, v) = (&self.k[j * self.d..][..self.d], &self.v[j * self.d..][..self.d]);
            all.push(T::one());
            all.extend_from_slice(v);
            all.extend_from_slice(k);
            outer(&mut all, v, k);
        }
        all
    }

    /// dQ of a tile's queries in a head, and what they bring to the keys of their own tile. `before`: of each query what all tiles before bring.
    fn queries_of_tile(
        &self,
        (keys, queries, head): (&Range<usize>, &Range<usize>, usize),
        mut before: Vec<T>,
        totals: &mut Totals<T>,
        found: &mut GroupGradients<T>,
    ) -> Result<()> {
        let (d, n, m, (width, _)) = (self.d, queries.len(), keys.len(), self.widths());
        let (q, g) = (&self.q[self.at(queries.start, head)..], &self.g[self.at(queries.start, head)..]);
        let (k, v) = (&self.k[keys.start * d..keys.end * d], &self.v[keys.start * d..keys.end * d]);
        let (rows, turned, thin) = (Strides(m, 1), Strides(1, m), Strides(d, 1));
        let (wide, one) = (Strides(self.stride, 1), T::one());
        let mut w = vec![T::zero(); n * m];
        product((n, m, d), &mut w, rows, false, q, wide, k, Strides(1, d), self.scale, false);
        let mut ds = vec![T::zero(); n * m];
        product((n, m, d), &mut ds, rows, false, g, wide, v, Strides(1, d), one, false);
        let first = queries.start + self.keys - self.rows - keys.start;
        let rows_of = w.chunks_exact_mut(m).zip(ds.chunks_exact_mut(m)).zip(before.chunks_exact_mut(width));
        for (i, ((w, ds), before)) in rows_of.enumerate() {
            let (seen, unseen) = w.split_at_mut(first + i + 1);
            seen.iter_mut().for_each(|w| *w = w.exp_fast());
            unseen.fill(T::zero());
            let total: T = before[0] + seen.iter().copied().sum();
            if !(total > T::zero() && total.is_finite()) {
                bail!("the degree is too small for scores of up to {:.3}", self.score_bound());
            }
            let inverse = total.recip();
            w.iter_mut().for_each(|w| *w *= inverse);
            before.iter_mut().for_each(|b| *b *= inverse);
            let g = &g[i * self.stride..][..d];
            // ρ = ⟨dO, Õ⟩ without Õ: Σ_j f̃_ij dO_i·V_j.
            let rho = dot(g, &before[1..1 + d]) + dot(w, ds);
            totals[(queries.start + i) * self.heads + head] = (inverse, rho);
            ds.iter_mut().zip(&*w).for_each(|(ds, &w)| *ds = w * (*ds - rho) * self.scale);
            let out = &mut found.q[((queries.start + i) * self.heads + head) * d..][..d];
            out.iter_mut().zip(&before[1 + d..]).for_each(|(out, &n)| *out = -rho * n * self.scale);
            for (&g, m) in g.iter().zip(before[1 + 2 * d..].chunks_exact(d)) {
                out.iter_mut().zip(m).for_each(|(out, &m)| *out += g * m * self.scale);
            }
        }
        let of_q = &mut found.q[(queries.start * self.heads + head) * d..];
        product((n, d, m), of_q, Strides(self.heads * d, 1), true, &ds, rows, k, thin, one, false);
        product((m, d, n), &mut found.k[keys.start * d..], thin, true, &ds, turned, q, wide, one, false);
        product((m, d, n), &mut found.v[keys.start * d..], thin, true, &w, turned, g, wide, one, false);
        Ok(())
    }

    /// Adds to dK and dV what queries of later tiles bring.
    fn keys_from_later_queries(&self, powers: &Powers, tile: usize, totals: &Totals<T>, found: &mut GroupGradients<T>) {
        let (k, d, (_, width)) = (powers.count(), self.d, self.widths());
        let mut sums = vec![T::zero(); k * width];
        for start in (0..self.keys).step_by(tile).rev() {
            let keys = start..(start + tile).min(self.keys);
            if keys.end < self.keys {
                let features = self.key_features(powers, &keys);
                let mut later = vec![T::zero(); keys.len() * width];
                multiply((keys.len(), width, k), &mut later, (&features, Strides(k, 1)), &sums, false);
                for (j, later) in keys.clone().zip(later.chunks_exact(width)) {
                    let (of_k, of_v) = (&mut found.k[j * d..][..d], &mut found.v[j * d..][..d]);
                    of_v.iter_mut().zip(&later[..d]).for_each(|(sum, &v)| *sum += v);
                    of_k.iter_mut().zip(&later[d..]).for_each(|(sum, &v)| *sum -= v * self.scale);
                    for (&v, m) in self.v[j * d..][..d].iter().zip(later[2 * d..].chunks_exact(d)) {
                        of_k.iter_mut().zip(m).for_each(|(sum, &m)| *sum += v * m * self.scale);
                    }
                }
            }
            let queries = self.queries(&keys);
            for head in (0..self.heads).filter(|_| start > 0 && !queries.is_empty()) {
                let mut u = self.query_features(powers, &queries, head);
                let mut own = Vec::with_capacity(queries.len() * width);
                for (i, u) in queries.clone().zip(u.chunks_exact_mut(k)) {
                    let (inverse, rho) = totals[i * self.heads + head];
                    u.iter_mut().for_each(|u| *u *= inverse);
                    let at = self.at(i, head);
                    let (q, g) = (&self.q[at..at + d], &self.g[at..at + d]);
                    own.extend_from_slice(g);
                    own.extend(q.iter().map(|&q| rho * q));
                    outer(&mut own, g, q);
                }
                multiply((k, width, queries.len()), &mut sums, (&u, Strides(1, k)), &own, true);
            }
        }
    }
}

/// `out` (m, n) = `left` (m, k) `right` (k, n), or with `keep` added to what it holds.
fn multiply<T: Real>(
    (m, n, k): (usize, usize, usize),
    out: &mut [T],
    (left, strides): (&[T], Strides),
    right: &[T],
    keep: bool,
) {
    product((m, n, k), out, Strides(n, 1), keep, left, strides, right, Strides(n, 1), T::one(), false);
}
