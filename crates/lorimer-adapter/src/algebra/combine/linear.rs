//! Sums of factors: `linear`, and `cat`, which is exact, as PEFT's `add_weighted_adapter`; and `zero_pad`, which FLoRA is compared with.

use candle_core::{DType, Device, Tensor};

use super::elements::{Elements, factors};
use super::entry::{Combination, Kind, Weights};
use super::settings::Settings;
use super::site::{Made, Part, Pool};
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

/// The mean of factors of unequal ranks.
pub const ZERO_PAD: Combination = Combination {
    name: "zero_pad",
    help: "means of A and of scaling·B, filled up with zeros to the largest rank: of several parents exact for none",
    source: "FLoRA's baseline, arXiv 2409.05976",
    takes: &[],
    weights: Weights::Mean,
    kind: Kind::Sites(zero_pad),
};

fn zero_pad(pool: &Pool, _: &Settings) -> Result<Made> {
    let (outputs, inputs) = pool.sides()?;
    let rank = pool.parts.iter().map(Part::rank).max().unwrap_or(0);
    let zeros = |rows: usize, columns: usize| Tensor::zeros((rows, columns), DType::F64, &Device::Cpu);
    let (mut a, mut b) = (zeros(rank, inputs)?, zeros(outputs, rank)?);
    for part in &pool.parts {
        let more = rank - part.rank();
        let own = (part.a.to_dtype(DType::F64)? * part.weight)?;
        a = (a + own.pad_with_zeros(0, 0, more)?)?;
        let own = (part.b.to_dtype(DType::F64)? * (part.weight * part.scaling))?;
        b = (b + own.pad_with_zeros(1, 0, more)?)?;
    }
    Made::new(&a, &b)
}

fn cat(pool: &Pool, _: &Settings) -> Result<Made> {
    let (b, a) = pool.stacked()?;
    Made::new(&a, &b)
}
