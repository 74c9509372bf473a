//! The chained low-rank gradient of causal attention over packed segments, checked while it runs (experimental).
//!
//! The forward is exact. In the backward each key head of each segment, with the query heads that share it, takes the chained gradient ([`super::chained`],
//! here with prefix and suffix sums over tiles of positions) where a bound of its scores says that every weight is within a tolerance, and the exact one
//! elsewhere. Now and then one of the former is computed exactly as well, and held against a bound of each entry. The paper (arXiv 2406.03136) has no mask:
//! the sums over tiles and both bounds are derived here.

mod check;
mod group;

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Result, Tensor, bail};
use rayon::prelude::*;

pub use self::check::Comparison;
use self::check::{compare, rounding};
use self::group::{GroupGradients, HeadGroup};
use super::backward::Task;
use super::chained::{Powers, feature_count, remainder};
use super::{Attention, AttentionForm, Mask, Segment};
use crate::kernels::real::Real;
use crate::kernels::shared::Shared;
use crate::kernels::slices::with_slices;

/// Most numbers that one group's sums and tiles may take.
const MOST: usize = 1 << 24;

/// Where and how the chained gradient is taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LowRankGradient {
    /// g: the degree of the polynomial in the place of exp.
    pub degree: usize,
    /// The largest error of an attention weight, as a share of it. A group whose scores may bring more takes the exact gradient.
    pub tolerance: f64,
    /// Positions of a tile. A query has its own tile's keys exactly.
    pub tile: usize,
}

impl LowRankGradient {
    /// Numbers that one group of heads of a width takes: sums over features, and the rows of a tile.
    ///
    /// # Errors
    ///
    /// Fails if they are more than 2^24.
    pub fn numbers(&self, width: usize) -> Result<usize> {
        let sum = width.saturating_mul(width).saturating_add(width.saturating_mul(2)).saturating_add(1);
        let features = feature_count(width, self.degree).and_then(|k| usize::try_from(k).ok());
        let all = features.and_then(|k| {
            let row = k.checked_add(sum.checked_mul(2)?)?.checked_add(self.tile.checked_mul(2)?)?;
            let rows = self.tile.checked_mul(row)?;
            k.checked_mul(sum)?.checked_add(rows)
        });
        match all {
            Some(all) if all <= MOST => Ok(all),
            _ => bail!(
                "degree {} in tiles of {} at heads of width {width} takes more than {MOST} numbers a head; choose a smaller degree or tile",
                self.degree,
                self.tile
            ),
        }
    }

    /// Refuses attentions that have no chained gradient.
    ///
    /// # Errors
    ///
    /// Fails with the reason if there is a window, a cap or no causal mask, if the tile is 0, or if the degree takes too many numbers.
    pub fn check(&self, form: &AttentionForm) -> Result<()> {
        match (form.mask, form.cap) {
            (Mask::Window(_), _) => bail!("the low-rank gradient has no form for attention in a sliding window"),
            (Mask::Full, _) => bail!("the low-rank gradient has no form for attention without a causal mask"),
            (_, Some(_)) => bail!("the low-rank gradient has no form for scores that are bounded by a soft cap"),
            (Mask::Causal, None) if self.tile == 0 => bail!("a tile of the low-rank gradient has at least 1 position"),
            (Mask::Causal, None) => self.numbers(form.head_dim).map(|_| ()),
        }
    }

    /// Whether scores of up to τ keep every weight within the tolerance, at a precision.
    fn holds(&self, tau: f64, epsilon: f64) -> bool {
        let delta = remainder(tau, self.degree) + rounding(tau, epsilon);
        delta < 1.0 && 2.0 * delta / (1.0 - delta) <= self.tolerance
    }

    /// The largest τ = max |β q·k| that keeps every weight within the tolerance, for numbers of a type.
    pub fn reach(&self, dtype: DType) -> f64 {
        let epsilon = if dtype == DType::F64 { f64::EPSILON } else { f64::from(f32::EPSILON) };
        let (mut low, mut high) = (0.0, 64.0);
        for _ in 0..60 {
            let middle = (low + high) / 2.0;
            if self.holds(middle, epsilon) { low = middle } else { high = middle }
        }
        low
    }
}

/// What backwards of low-rank gradients were like.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GradientTotals {
    /// Query heads of segments of more than one tile.
    pub heads: u64,
    /// Those of them that took the chained gradient; the others took the exact one.
    pub low_rank: u64,
    /// The smallest and the largest bound of τ among them.
    pub scores: Option<(f64, f64)>,
    /// The worst of the comparisons with the exact gradient, where there was one.
    pub checked: Option<Comparison>,
}

/// Counts how attentions came by their gradients, and says whether they are held against the exact ones.
#[derive(Debug, Default)]
pub struct GradientMeter {
    check: Option<u64>,
    totals: Mutex<GradientTotals>,
}

impl GradientMeter {
    /// With `check`, a seed, one chained group of each attention is held against its exact gradient.
    pub fn new(check: Option<u64>) -> Self {
        Self { check, totals: Mutex::default() }
    }

    /// What was counted.
    pub fn totals(&self) -> GradientTotals {
        *self.totals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which of `count` groups of a block is looked at.
    fn sample(&self, layer: usize, count: usize) -> Option<usize> {
        // The finaliser of SplitMix64.
        let mut x = self.check?.wrapping_add((layer as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (count > 0).then(|| ((x ^ (x >> 31)) % count as u64) as usize)
    }

    fn add(&self, (heads, low_rank): (u64, u64), bounds: impl IntoIterator<Item = f64>, checked: Option<Comparison>) {
        let mut totals = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
        totals.heads += heads;
        totals.low_rank += low_rank;
        for tau in bounds {
            let (least, most) = totals.scores.unwrap_or((tau, tau));
            totals.scores = Some((least.min(tau), most.max(tau)));
        }
        if let Some(checked) = checked {
            totals.checked = Some(totals.checked.unwrap_or_default().most(checked));
        }
    }
}

/// A rule, and what counts how it is followed.
#[derive(Clone, Debug)]
pub struct CheckedGradient {
    /// Where and how the chained gradient is taken.
    pub rule: LowRankGradient,
    /// What counts.
    pub meter: Arc<GradientMeter>,
}

/// Attention whose backward is chained where that is within the tolerance.
pub(crate) struct LowRankAttention {
    op: Attention,
    rule: LowRankGradient,
    layer: usize,
}

impl LowRankAttention {
    /// `layer` is named in errors, and decides which group is looked at.
    pub(crate) fn new(
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        (segments, form): (&[Segment], &AttentionForm),
        rule: LowRankGradient,
        layer: usize,
    ) -> Result<Self> {
        rule.check(form)?;
        Ok(Self { op: Attention::new((q, k, v), segments, form)?, rule, layer })
    }

    /// The exact operation.
    pub(crate) fn exact(&self) -> &Attention {
        &self.op
    }

    /// dQ, dK and dV from q, k, v, the output and its gradient.
    pub(crate) fn bwd(&self, inputs: [&Tensor; 5], meter: &GradientMeter) -> Result<[Tensor; 3]> {
        match inputs[0].dtype() {
            DType::F64 => self.tensors::<f64>(inputs, meter),
            _ => self.tensors::<f32>(inputs, meter),
        }
    }

    fn tensors<T: Real>(&self, inputs: [&Tensor; 5], meter: &GradientMeter) -> Result<[Tensor; 3]> {
        let [dq, dk, dv] = with_slices::<T, _, 5>(inputs, |inputs| self.backward(inputs, meter))?;
        let [q, k, v, ..] = inputs;
        Ok([
            Tensor::from_vec(dq, q.shape(), q.device())?,
            Tensor::from_vec(dk, k.shape(), k.device())?,
            Tensor::from_vec(dv, v.shape(), v.device())?,
        ])
    }

    /// A task's heads, if its segment has more than one tile.
    fn group<'a, T: Real>(&self, [q, k, v, _, g]: [&'a [T]; 5], (s, kv): Task<'_>) -> Option<HeadGroup<'a, T>> {
        let (op, d) = (&self.op, self.op.form.head_dim);
        let (width, kv_width, heads) = (op.q_width(), op.kv_heads * d, op.heads / op.kv_heads);
        if s.q_len == 0 || s.key_count() <= self.rule.tile {
            return None;
        }
        let first = s.q_start * width + kv * heads * d;
        let given = [k, v].map(|all| s.key_rows(all, kv_width, kv * d, d));
        let shape = (heads, s.q_len, s.key_count(), d);
        Some(HeadGroup::new((&q[first..], &g[first..], width), given, shape, op.form.scale))
    }

    fn backward<T: Real>(&self, inputs: [&[T]; 5], meter: &GradientMeter) -> Result<[Vec<T>; 3]> {
        let op = &self.op;
        let (d, heads) = (op.form.head_dim, op.heads / op.kv_heads);
        let tasks = op.tasks();
        let bounds: Vec<Option<f64>> =
            tasks.par_iter().map(|&task| self.group(inputs, task).map(|group| group.score_bound())).collect();
        let holds = |tau: &Option<f64>| tau.is_some_and(|tau| self.rule.holds(tau, T::epsilon().to_f64()));
        let chained: Vec<usize> = (0..tasks.len()).filter(|&i| holds(&bounds[i])).collect();
        let checked = meter.sample(self.layer, chained.len()).map(|at| chained[at]);
        let powers = Powers::new(d, if chained.is_empty() { 0 } else { self.rule.degree });
        let mut dq = vec![T::zero(); inputs[0].len()];
        let out_q = Shared(dq.as_mut_ptr());
        type Part<T> = (GroupGradients<T>, Option<Comparison>);
        let run = |(i, &task): (usize, &Task<'_>)| -> Result<Part<T>> {
            let Some(group) = self.group(inputs, task).filter(|_| holds(&bounds[i])) else {
                // SAFETY: as in `Attention::backward`; what is chained writes nothing to `dq` here.
                let (k, v) = unsafe { op.exact_backward(inputs, task, out_q) };
                return Ok((GroupGradients { q: Vec::new(), k, v }, None));
            };
            let found = group.chained(&powers, self.rule.tile)?;
            let compared = (checked == Some(i)).then(|| compare(&group, &found, (self.rule.degree, self.rule.tile)));
            Ok((found, compared))
        };
        let parts: Vec<Part<T>> = tasks.par_iter().enumerate().map(run).collect::<Result<_>>()?;
        let found = parts.iter().find_map(|(_, compared)| *compared);
        let far = bounds.iter().flatten().count();
        meter.add(((far * heads) as u64, (chained.len() * heads) as u64), bounds.iter().flatten().copied(), found);
        if let Some(Comparison { share_of_bound, relative_error }) = found.filter(Comparison::is_outside) {
            bail!(
                "the low-rank gradient of attention in block {} is {relative_error:.1e} of the exact one away from it, {share_of_bound:.1} times its bound; train with exact gradients, and report this",
                self.layer
            );
        }
        for (&(s, kv), (part, _)) in tasks.iter().zip(&parts) {
            for (row, part) in part.q.chunks_exact(heads * d).enumerate() {
                dq[(s.q_start + row) * op.q_width() + kv * heads * d..][..heads * d].copy_from_slice(part);
            }
        }
        let parts = parts.into_iter().map(|(part, _)| (part.k, part.v));
        let [dk, dv] = op.add_parts(inputs[1].len(), &tasks, parts);
        Ok([dq, dk, dv])
    }
}

#[cfg(test)]
mod tests;
