//! Element-wise rules on a list of tensors of one shape: task arithmetic, magnitude pruning, TIES (arXiv 2306.01708) and DARE (arXiv
//! 2311.03099), as PEFT's `merge_utils` computes them; and the combinations that apply them to A and to B.

use candle_core::{Result as TensorResult, Tensor};
use lorimer_tensor::wide;

use super::entry::{Combination, Kind, Weights};
use super::settings::{MajoritySign, Settings};
use super::site::{Made, Part, Pool, matrix, values};
use crate::error::{Error, Result};
use crate::methods::mt19937::TorchGenerator;
use crate::step::site_seed;

/// Which rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Elements {
    /// Σ weight · x.
    Sum,
    /// The same of the values of largest magnitude.
    Magnitude,
    /// Of those, the mean of the weighted values whose sign is the majority's.
    Ties,
    /// Σ weight · x of values kept at random, over the density.
    Dare,
    /// TIES of these.
    DareTies,
}

impl Elements {
    pub(super) fn is_random(self) -> bool {
        matches!(self, Self::Dare | Self::DareTies)
    }

    fn elects(self) -> bool {
        matches!(self, Self::Ties | Self::DareTies)
    }
}

const PRUNED: &[&str] = &["density"];
const ELECTED: &[&str] = &["density", "majority_sign_method"];
const DROPPED: &[&str] = &["density", "seed"];
const DROPPED_ELECTED: &[&str] = &["density", "majority_sign_method", "seed"];

/// PEFT's `magnitude_prune`.
pub const MAGNITUDE_PRUNE: Combination = Combination {
    name: "magnitude_prune",
    help: "as linear, of the share of each factor's values that are largest",
    source: "PEFT add_weighted_adapter",
    takes: PRUNED,
    weights: Weights::Sum,
    kind: Kind::Sites(|pool, settings| factors(pool, settings, Elements::Magnitude)),
};

/// PEFT's `ties`.
pub const TIES: Combination = Combination {
    name: "ties",
    help: "of each factor's largest values, the mean of those with the majority's sign",
    source: "TIES, arXiv 2306.01708; PEFT",
    takes: ELECTED,
    weights: Weights::Sum,
    kind: Kind::Sites(|pool, settings| factors(pool, settings, Elements::Ties)),
};

/// PEFT's `dare_linear`.
pub const DARE_LINEAR: Combination = Combination {
    name: "dare_linear",
    help: "as linear, of values kept at random and divided by the density",
    source: "DARE, arXiv 2311.03099; PEFT",
    takes: DROPPED,
    weights: Weights::Sum,
    kind: Kind::Sites(|pool, settings| factors(pool, settings, Elements::Dare)),
};

/// PEFT's `dare_ties`.
pub const DARE_TIES: Combination = Combination {
    name: "dare_ties",
    help: "as ties, of values kept at random and divided by the density",
    source: "DARE, arXiv 2311.03099; PEFT",
    takes: DROPPED_ELECTED,
    weights: Weights::Sum,
    kind: Kind::Sites(|pool, settings| factors(pool, settings, Elements::DareTies)),
};

/// The generator of a projection's masks: torch's, seeded by the low 32 bits of [`site_seed`].
pub(super) fn generator(settings: &Settings, path: &str) -> TorchGenerator {
    TorchGenerator::new(site_seed(settings.seed, path))
}

/// What is kept of values by magnitude: those above a limit, and the first of those that are equal to it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Limit {
    above: f32,
    equal: usize,
}

impl Limit {
    /// Whether it says of each value alone, wherever it stands, if it is kept.
    pub(super) fn is_of_each(&self) -> bool {
        self.equal == 0
    }
}

/// ⌊density · count⌋, or the limit where that is none or all.
fn kept(count: usize, density: f64) -> std::result::Result<usize, Limit> {
    let keep = (density * count as f64) as usize;
    match keep {
        _ if density >= 1.0 || keep >= count => Err(Limit { above: -1.0, equal: 0 }),
        0 => Err(Limit { above: f32::INFINITY, equal: 0 }),
        _ => Ok(keep),
    }
}

/// The limit that keeps ⌊density · count⌋ values; `magnitudes` is reordered.
pub(super) fn limit(magnitudes: &mut [f32], density: f64) -> Limit {
    let keep = match kept(magnitudes.len(), density) {
        Ok(keep) => keep,
        Err(limit) => return limit,
    };
    let (larger, nth, _) = magnitudes.select_nth_unstable_by(keep - 1, |a, b| b.total_cmp(a));
    let above = *nth;
    let strictly = larger.iter().filter(|v| **v > above).count();
    Limit { above, equal: keep - strictly }
}

/// [`limit`] of values that are made in blocks, twice, and never all kept: first counted by the upper bits of their magnitudes, then only those
/// with the bits of the limit compared. `each` hands every block to what it is given; `count` is the number of all values.
pub(super) fn limit_of_blocks(
    count: usize,
    density: f64,
    each: impl Fn(&mut dyn FnMut(&[f32])) -> TensorResult<()>,
) -> TensorResult<Limit> {
    let keep = match kept(count, density) {
        Ok(keep) => keep,
        Err(limit) => return Ok(limit),
    };
    // Magnitudes rise with their bits; the sign's is gone.
    let bin = |value: f32| (value.abs().to_bits() >> 15) as usize;
    let mut counts = vec![0usize; 1 << 16];
    each(&mut |values| values.iter().for_each(|v| counts[bin(*v)] += 1))?;
    let mut larger = 0;
    let found = (0..counts.len()).rev().find(|&i| {
        larger += counts[i];
        larger >= keep
    });
    let found = found.unwrap_or(0);
    larger -= counts[found];
    let mut near = Vec::with_capacity(counts[found]);
    each(&mut |values| near.extend(values.iter().filter(|v| bin(**v) == found).map(|v| v.abs())))?;
    let (above_it, nth, _) = near.select_nth_unstable_by(keep - larger - 1, |a, b| b.total_cmp(a));
    let above = *nth;
    let strictly = larger + above_it.iter().filter(|v| **v > above).count();
    Ok(Limit { above, equal: keep - strictly })
}

/// [`limit`] of `count` values of which `larger` are above all of `within`, and the others below; None where it does not lie among those. Where all that are
/// equal to it are kept, it is the next smaller number, which says so of each value.
pub(super) fn limit_within(count: usize, density: f64, larger: usize, mut within: Vec<f32>) -> Option<Limit> {
    let keep = match kept(count, density) {
        Ok(keep) => keep,
        Err(limit) => return Some(limit),
    };
    let place = keep.checked_sub(larger + 1).filter(|place| *place < within.len())?;
    let (above_it, nth, below_it) = within.select_nth_unstable_by(place, |a, b| b.total_cmp(a));
    let above = *nth;
    let equal = keep - larger - above_it.iter().filter(|v| **v > above).count();
    let more = below_it.contains(&above);
    Some(if more { Limit { above, equal } } else { Limit { above: above.next_down(), equal: 0 } })
}

/// Zeroes what is not kept; `limit` counts down the equal ones.
pub(super) fn prune(values: &mut [f32], limit: &mut Limit) {
    if limit.is_of_each() {
        let above = limit.above;
        wide!(values.iter_mut().for_each(|v| *v = if v.abs() > above { *v } else { 0.0 }));
        return;
    }
    for value in values {
        let magnitude = value.abs();
        if magnitude > limit.above {
            continue;
        }
        match magnitude == limit.above && limit.equal > 0 {
            true => limit.equal -= 1,
            false => *value = 0.0,
        }
    }
}

/// Zeroes values at random, as torch's `bernoulli` draws on the CPU, and divides the others by the density.
pub(super) fn drop_at_random(values: &mut [f32], density: f64, random: &mut TorchGenerator) {
    if density >= 1.0 {
        return;
    }
    let kept = density as f32;
    let masks = random.rand(values.len());
    values.iter_mut().zip(masks).for_each(|(value, drawn)| *value = if drawn < kept { *value / kept } else { 0.0 });
}

/// The rule's last step on pruned values of equal length, with their weights.
pub(super) fn mix(all: &[Vec<f32>], weights: &[f64], rule: Elements, majority: MajoritySign) -> Vec<f32> {
    let count = all.first().map_or(0, Vec::len);
    let weights: Vec<f32> = weights.iter().map(|w| *w as f32).collect();
    let mut sums = vec![0f32; count];
    if !rule.elects() {
        for (values, w) in all.iter().zip(&weights) {
            wide!(sums.iter_mut().zip(values).for_each(|(sum, v)| *sum += v * w));
        }
        return sums;
    }
    let mut majorities = vec![0f32; count];
    for values in all {
        let places = majorities.iter_mut().zip(values);
        match majority {
            MajoritySign::Total => wide!(places.for_each(|(m, v)| *m += v)),
            MajoritySign::Frequency => {
                wide!(places.for_each(|(m, &v)| *m += f32::from(v > 0.0) - f32::from(v < 0.0)));
            }
        }
    }
    let mut counts = vec![0f32; count];
    for (values, w) in all.iter().zip(&weights) {
        wide!(for (((sum, n), &m), &v) in sums.iter_mut().zip(&mut counts).zip(&majorities).zip(values) {
            let agrees = if m >= 0.0 { v > 0.0 } else { v < 0.0 };
            *sum += if agrees { v * w } else { 0.0 };
            *n += f32::from(agrees);
        });
    }
    sums.iter_mut().zip(counts).for_each(|(sum, n)| *sum /= n.max(1.0));
    sums
}

/// A rule on tensors of one shape (rows, columns) with their weights.
pub(super) fn merged(
    all: &[(&Tensor, f64)],
    rule: Elements,
    settings: &Settings,
    random: &mut TorchGenerator,
) -> Result<Tensor> {
    let density = settings.density.unwrap_or(1.0);
    let (rows, columns) = all.first().map_or(Ok((0, 0)), |(t, _)| t.dims2())?;
    let mut pruned = Vec::with_capacity(all.len());
    for (tensor, _) in all {
        let mut values = values(tensor)?;
        match rule {
            Elements::Sum => {}
            Elements::Dare | Elements::DareTies => drop_at_random(&mut values, density, random),
            Elements::Magnitude | Elements::Ties => {
                let mut magnitudes: Vec<f32> = values.iter().map(|v| v.abs()).collect();
                prune(&mut values, &mut limit(&mut magnitudes, density));
            }
        }
        pruned.push(values);
    }
    let weights: Vec<f64> = all.iter().map(|(_, w)| *w).collect();
    Ok(matrix(mix(&pruned, &weights, rule, settings.majority_sign_method), rows, columns)?)
}

/// Rank-preserving combinations: an element-wise rule on all A and on all B, after √|weight·scaling|, with the sign on A.
pub(super) fn factors(pool: &Pool, settings: &Settings, rule: Elements) -> Result<Made> {
    let rank = pool.parts.first().map_or(0, Part::rank);
    if let Some(other) = pool.parts.iter().map(Part::rank).find(|r| *r != rank) {
        return Err(Error::Refused(format!(
            "`{}` has rank {rank} in one adapter and {other} in another, and this method sums factors of one rank; take `cat`, `svd` or `lego`",
            pool.path
        )));
    }
    let root = |part: &Part| (part.weight * part.scaling).abs().sqrt();
    let signed = |part: &Part| root(part) * if part.weight * part.scaling >= 0.0 { 1.0 } else { -1.0 };
    let mut random = generator(settings, &pool.path);
    let a: Vec<(&Tensor, f64)> = pool.parts.iter().map(|part| (&part.a, signed(part))).collect();
    let b: Vec<(&Tensor, f64)> = pool.parts.iter().map(|part| (&part.b, root(part))).collect();
    let a = merged(&a, rule, settings, &mut random)?;
    let b = merged(&b, rule, settings, &mut random)?;
    Made::new(&a, &b)
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};

    use super::*;

    /// Few values many times over and of all sizes, so that limits fall among equal ones and among those of equal upper bits.
    #[test]
    fn a_limit_does_not_depend_on_blocks() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(3);
        for case in 0..200 {
            let kinds = rng.random_range(1..40);
            let pool: Vec<f32> = (0..kinds)
                .map(|i| match case % 3 {
                    0 => 1.0 + i as f32 * f32::EPSILON,
                    1 => rng.random_range(-1.0..1.0f32).powi(9),
                    _ => [0.0, -0.0, 1e-40, -3.5, f32::MAX][i % 5],
                })
                .collect();
            let values: Vec<f32> =
                (0..rng.random_range(1..300)).map(|_| pool[rng.random_range(0..pool.len())]).collect();
            for density in [0.0, 0.01, 0.3, 0.5, 0.999, 1.0] {
                let whole = limit(&mut values.iter().map(|v| v.abs()).collect::<Vec<_>>(), density);
                let found = limit_of_blocks(values.len(), density, |take| {
                    for block in values.chunks(7) {
                        take(block);
                    }
                    Ok(())
                });
                assert_eq!(found.unwrap(), whole, "case {case}, density {density}");
                // Among those between two of the values, if it lies there, whichever form it has.
                let (low, high) = (pool[0].abs().min(pool[kinds / 2].abs()), pool[0].abs().max(pool[kinds / 2].abs()));
                let near = values.iter().map(|v| v.abs()).filter(|v| (low..=high).contains(v)).collect();
                let larger = values.iter().filter(|v| v.abs() > high).count();
                let pruned = |limit: Limit| {
                    let mut kept = values.clone();
                    prune(&mut kept, &mut { limit });
                    kept
                };
                if let Some(found) = limit_within(values.len(), density, larger, near) {
                    assert_eq!(pruned(found), pruned(whole), "case {case}, density {density}");
                }
            }
        }
    }
}
