//! Sums of factors: `linear`, and `cat`, which is exact. Both as PEFT's `add_weighted_adapter`.

use super::elements::{Elements, factors};
use super::entry::{Combination, Kind, Weights};
use super::settings::Settings;
use super::site::{Made, Pool};
use crate::error::Result;

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

fn cat(pool: &Pool, _: &Settings) -> Result<Made> {
    let (b, a) = pool.stacked()?;
    Made::new(&a, &b)
}
