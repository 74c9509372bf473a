//! Element-wise rules on a list of tensors of one shape: task arithmetic, magnitude pruning, TIES (arXiv 2306.01708) and DARE (arXiv
//! 2311.03099), as PEFT's `merge_utils` computes them; and the combinations that apply them to A and to B.

use candle_core::Tensor;

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
#[derive(Clone, Copy, Debug)]
pub(super) struct Limit {
    above: f32,
    equal: usize,
}

/// The limit that keeps ⌊density · count⌋ values; `magnitudes` is reordered.
pub(super) fn limit(magnitudes: &mut [f32], density: f64) -> Limit {
    let keep = (density * magnitudes.len() as f64) as usize;
    if density >= 1.0 || keep >= magnitudes.len() {
        return Limit { above: -1.0, equal: 0 };
    }
    if keep == 0 {
        return Limit { above: f32::INFINITY, equal: 0 };
    }
    let (larger, nth, _) = magnitudes.select_nth_unstable_by(keep - 1, |a, b| b.total_cmp(a));
    let above = *nth;
    let strictly = larger.iter().filter(|v| **v > above).count();
    Limit { above, equal: keep - strictly }
}

/// Zeroes what is not kept; `limit` counts down the equal ones.
pub(super) fn prune(values: &mut [f32], limit: &mut Limit) {
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
    let one = |i: usize| -> f32 {
        if !rule.elects() {
            return all.iter().zip(&weights).map(|(values, w)| values[i] * w).sum();
        }
        let sign = |v: f32| if v > 0.0 { 1i32 } else { -i32::from(v < 0.0) };
        let positive = match majority {
            MajoritySign::Total => all.iter().map(|values| values[i]).sum::<f32>() >= 0.0,
            MajoritySign::Frequency => all.iter().map(|values| sign(values[i])).sum::<i32>() >= 0,
        };
        let wanted = if positive { 1 } else { -1 };
        let agree = all.iter().zip(&weights).filter(|(values, _)| sign(values[i]) == wanted);
        let (sum, n) = agree.fold((0f32, 0u32), |(sum, n), (values, w)| (sum + values[i] * w, n + 1));
        sum / n.max(1) as f32
    };
    (0..count).map(one).collect()
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
