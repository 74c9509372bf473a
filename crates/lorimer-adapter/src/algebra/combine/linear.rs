//! Sums of factors: `linear`, and `cat`, which is exact. Both as PEFT's `add_weighted_adapter`.

use candle_core::Tensor;

use super::elements::{Elements, merged};
use super::settings::Settings;
use super::site::{Made, Pool};
use super::{Combination, Kind, Weights};
use crate::error::{Error, Result};

/// PEFT's `linear`.
pub const LINEAR: Combination = Combination {
    name: "linear",
    help: "sums of A and of B, each times √|weight·scaling|: parents of one rank, exact for one parent only",
    source: "PEFT add_weighted_adapter",
    takes: &[],
    weights: Weights::Sum,
    kind: Kind::Sites(|pool, settings| factors(pool, settings, Elements::Sum)),
};

/// PEFT's `cat`.
pub const CAT: Combination = Combination {
    name: "cat",
    help: "factors one after another: exactly Σ weight·ΔW, its rank the sum of the ranks",
    source: "PEFT add_weighted_adapter",
    takes: &[],
    weights: Weights::Sum,
    kind: Kind::Sites(cat),
};

/// Rank-preserving combinations: an element-wise rule on all A and on all B, after √|weight·scaling|, with the sign on A.
pub(super) fn factors(pool: &Pool, settings: &Settings, rule: Elements) -> Result<Made> {
    let rank = pool.parts.first().map_or(0, super::site::Part::rank);
    if let Some(other) = pool.parts.iter().map(super::site::Part::rank).find(|r| *r != rank) {
        return Err(Error::Refused(format!(
            "`{}` has rank {rank} in one adapter and {other} in another, and this method sums factors of one rank; take `cat`, `svd` or `lego`",
            pool.path
        )));
    }
    let root = |part: &super::site::Part| (part.weight * part.scaling).abs().sqrt();
    let signed = |part: &super::site::Part| root(part) * if part.weight * part.scaling >= 0.0 { 1.0 } else { -1.0 };
    let mut random = super::elements::generator(settings, &pool.path);
    let a: Vec<(&Tensor, f64)> = pool.parts.iter().map(|part| (&part.a, signed(part))).collect();
    let b: Vec<(&Tensor, f64)> = pool.parts.iter().map(|part| (&part.b, root(part))).collect();
    let a = merged(&a, rule, settings, &mut random)?;
    let b = merged(&b, rule, settings, &mut random)?;
    Made::new(&a, &b)
}

fn cat(pool: &Pool, _: &Settings) -> Result<Made> {
    let (b, a) = pool.stacked()?;
    Made::new(&a, &b)
}
