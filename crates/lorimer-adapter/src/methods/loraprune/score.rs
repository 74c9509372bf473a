//! How important a unit is, by one module.

use candle_core::{DType, Tensor};
use lorimer_tensor::FrozenWeight;

use crate::error::Result;
use crate::pruning::Axis;

/// Rows of a weight that are looked at together.
const BLOCK: usize = 256;

/// What the gradients gA (r, inputs) and gB (outputs, r) of factors stand for: G = gB A + B gA − gB gA, minus the change of B A by one step of rate 1.
///
/// # Errors
///
/// Fails if a tensor operation fails.
pub fn surrogate((a, b): (&Tensor, &Tensor), (ga, gb): (&Tensor, &Tensor)) -> candle_core::Result<Tensor> {
    gb.matmul(&(a - ga)?)? + b.matmul(ga)?
}

/// A module as it is scored.
pub struct Scored<'a> {
    /// W (outputs, inputs).
    pub weight: &'a FrozenWeight,
    /// A (r, inputs) and B (outputs, r).
    pub factors: (&'a Tensor, &'a Tensor),
    /// Their gradients; None: G is 1.
    pub gradients: Option<(&'a Tensor, &'a Tensor)>,
    /// What B A is multiplied by.
    pub scaling: f64,
    /// 1 or 2.
    pub power: usize,
}

impl Scored<'_> {
    /// Σ |G ⊙ (W + s B A)|^power over each unit, over its norm (plus 1e-8). `unit`: of every row or column.
    ///
    /// # Errors
    ///
    /// Fails if a tensor operation fails.
    pub fn by_unit(&self, axis: Axis, unit: &[usize], units: usize) -> Result<Vec<f64>> {
        let (outputs, _) = self.weight.dims()?;
        let (a, b) = (self.factors.0.detach(), self.factors.1.detach());
        let mut sums = vec![0f64; units];
        for begin in (0..outputs).step_by(BLOCK) {
            let rows = BLOCK.min(outputs - begin);
            let of = |t: &Tensor| t.narrow(0, begin, rows);
            let ids: Vec<u32> = (begin..begin + rows).map(|i| i as u32).collect();
            let b = of(&b)?;
            let mut importance = (self.weight.rows(&ids, a.dtype())? + (b.matmul(&a)? * self.scaling)?)?;
            if let Some((ga, gb)) = self.gradients {
                importance = (importance * surrogate((&a, &b), (ga, &of(gb)?))?)?;
            }
            let importance = if self.power == 2 { importance.sqr()? } else { importance.abs()? };
            let (dim, first) = if axis == Axis::Rows { (1, begin) } else { (0, 0) };
            let found = importance.sum(dim)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
            found.into_iter().zip(&unit[first..]).for_each(|(value, unit)| sums[*unit] += value);
        }
        let norm = sums.iter().map(|s| s * s).sum::<f64>().sqrt();
        sums.iter_mut().for_each(|s| *s /= norm + 1e-8);
        Ok(sums)
    }
}

/// The units that are kept when the `count` least of them go, those that are gone (`kept` false) first; of equals the first ones.
pub fn keep_most(importance: &[f64], kept: &[bool], count: usize) -> Vec<bool> {
    let mut order: Vec<usize> = (0..importance.len()).collect();
    order.sort_by(|&i, &j| kept[i].cmp(&kept[j]).then(importance[i].total_cmp(&importance[j])));
    let mut left = kept.to_vec();
    order.into_iter().take(count).for_each(|i| left[i] = false);
    left
}
