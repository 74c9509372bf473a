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

/// `sum` + factor · `other`.
fn add(sum: &mut [f32], factor: f32, other: &[f32]) {
    sum.iter_mut().zip(other).for_each(|(sum, other)| *sum += factor * other);
}

fn numbers(t: &Tensor) -> Result<Vec<f32>> {
    Ok(t.detach().to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

/// Σ of numbers, sixteen at a time.
fn sum(values: &[f32]) -> f64 {
    let mut sums = [0f32; 16];
    for chunk in values.chunks(16) {
        sums.iter_mut().zip(chunk).for_each(|(sum, value)| *sum += value);
    }
    sums.into_iter().map(f64::from).sum()
}

impl Scored<'_> {
    /// Σ |G ⊙ (W + s B A)|^power over each unit, over its norm (plus 1e-8), in f32. `unit`: of every row or column. G is [`surrogate`], formed a row
    /// at a time.
    ///
    /// # Errors
    ///
    /// Fails if a tensor operation fails.
    pub fn by_unit(&self, axis: Axis, unit: &[usize], units: usize) -> Result<Vec<f64>> {
        let (outputs, inputs) = self.weight.dims()?;
        let (a, b) = (numbers(self.factors.0)?, numbers(self.factors.1)?);
        let rank = b.len() / outputs.max(1);
        let gradients = match self.gradients {
            Some((ga, gb)) => Some((numbers(&(self.factors.0 - ga)?)?, numbers(ga)?, numbers(gb)?)),
            None => None,
        };
        let place = |row: usize, width: usize| row * width..(row + 1) * width;
        let (mut sums, mut columns, mut g) = (vec![0f64; units], vec![0f32; inputs], vec![0f32; inputs]);
        for begin in (0..outputs).step_by(BLOCK) {
            let ids: Vec<u32> = (begin..outputs.min(begin + BLOCK)).map(|i| i as u32).collect();
            let mut block = numbers(&self.weight.rows(&ids, DType::F32)?)?;
            for (row, importance) in (begin..).zip(block.chunks_exact_mut(inputs.max(1))) {
                let own = &b[place(row, rank)];
                for (k, b) in own.iter().enumerate() {
                    add(importance, *b * self.scaling as f32, &a[place(k, inputs)]);
                }
                if let Some((moved, ga, gb)) = &gradients {
                    g.fill(0.0);
                    for (k, (b, gb)) in own.iter().zip(&gb[place(row, rank)]).enumerate() {
                        add(&mut g, *gb, &moved[place(k, inputs)]);
                        add(&mut g, *b, &ga[place(k, inputs)]);
                    }
                    importance.iter_mut().zip(&g).for_each(|(value, g)| *value *= g);
                }
                match self.power {
                    2 => importance.iter_mut().for_each(|v| *v *= *v),
                    _ => importance.iter_mut().for_each(|v| *v = v.abs()),
                }
                match axis {
                    Axis::Rows => sums[unit[row]] += sum(importance),
                    Axis::Columns => add(&mut columns, 1.0, importance),
                }
            }
            if axis == Axis::Columns {
                columns.iter().zip(unit).for_each(|(value, unit)| sums[*unit] += f64::from(*value));
                columns.fill(0.0);
            }
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

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// Row by row it is what its definition gives at once.
    #[test]
    fn units_are_scored_as_defined() -> Result<()> {
        let (outputs, inputs, rank, scaling) = (2 * BLOCK + 6, 34, 3, 2.0);
        let of = |shape: (usize, usize), seed: f32| {
            let values = (0..shape.0 * shape.1).map(|i| ((i as f32 + seed) * 0.7).sin()).collect();
            Tensor::from_vec(values, shape, &Device::Cpu)
        };
        let (w, a, b) = (of((outputs, inputs), 1.0)?, of((rank, inputs), 2.0)?, of((outputs, rank), 3.0)?);
        let (ga, gb) = (of((rank, inputs), 4.0)?, of((outputs, rank), 5.0)?);
        let weight = FrozenWeight::Dense(w.clone());
        for (gradients, power) in [(Some((&ga, &gb)), 1), (Some((&ga, &gb)), 2), (None, 1)] {
            let mut all = (&w + (b.matmul(&a)? * scaling)?)?;
            if let Some(gradients) = gradients {
                all = (all * surrogate((&a, &b), gradients)?)?;
            }
            let all = if power == 2 { all.sqr()? } else { all.abs()? };
            let scored = Scored { weight: &weight, factors: (&a, &b), gradients, scaling, power };
            for (axis, count, units) in [(Axis::Rows, outputs, 59), (Axis::Columns, inputs, 17)] {
                let unit: Vec<usize> = (0..count).map(|i| i * units / count).collect();
                let mut expected = vec![0f64; units];
                let found = all.sum(1 - axis.dim())?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
                found.into_iter().zip(&unit).for_each(|(value, unit)| expected[*unit] += value);
                let norm = expected.iter().map(|v| v * v).sum::<f64>().sqrt();
                for (a, b) in scored.by_unit(axis, &unit, units)?.into_iter().zip(&expected) {
                    assert!((a - b / norm).abs() < 1e-6, "{a} {b}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn what_is_gone_goes_first_and_of_equals_the_first() {
        assert_eq!(keep_most(&[0.0, 0.0, 0.0, 1.0], &[true, true, false, true], 2), [false, true, false, true]);
        assert_eq!(keep_most(&[3.0, 1.0], &[true, true], 0), [true, true]);
    }
}
