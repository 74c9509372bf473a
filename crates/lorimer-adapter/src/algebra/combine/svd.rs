//! Sums of whole changes brought to a rank by their singular value decomposition: `svd`, `task_arithmetic`, and `knots`, which merges what
//! parents have along shared directions. All stay in factored form: no (outputs, inputs) matrix is made.

use candle_core::{DType, Tensor};
use lorimer_tensor::linalg::{product_svd, qr, svd};
use serde_json::json;

use super::elements::{Elements, generator, merged};
use super::entry::{Combination, Kind, Weights};
use super::settings::Settings;
use super::site::{Made, Part, Pool, matrix, values};
use crate::error::Result;

/// PEFT's `svd`.
pub const SVD: Combination = Combination {
    name: "svd",
    help: "the best of --rank (the parents' largest unless given) for Σ weight·ΔW",
    source: "PEFT add_weighted_adapter",
    takes: &["rank", "svd_clamp"],
    weights: Weights::Sum,
    kind: Kind::Sites(best),
};

/// The least rank for a share of what is there.
pub const COMPRESS: Combination = Combination {
    name: "compress",
    help: "Σ weight·ΔW at the least rank that keeps --set energy=SHARE of each module's squared singular values",
    source: "Eckart and Young 1936",
    takes: &["energy"],
    weights: Weights::Sum,
    kind: Kind::Sites(compressed),
};

/// Task arithmetic.
pub const TASK_ARITHMETIC: Combination = Combination {
    name: "task_arithmetic",
    help: "Σ weight·ΔW at the smallest rank that holds it: sums, differences (weight −1), negation; --rank bounds it",
    source: "arXiv 2212.04089",
    takes: &["rank"],
    weights: Weights::Sum,
    kind: Kind::Sites(exact),
};

/// KnOTS with TIES.
pub const KNOTS: Combination = Combination {
    name: "knots",
    help: "TIES of the parents' coordinates along their common output directions",
    source: "KnOTS, arXiv 2410.19735",
    takes: &["density", "majority_sign_method", "rank"],
    weights: Weights::Sum,
    kind: Kind::Sites(knots),
};

/// Singular values below this share of the largest are rounding.
const NOTHING: f64 = 1e-6;

/// The parents' largest rank, or the one asked for, but not more than the projection's sides.
pub(super) fn wanted_rank(pool: &Pool, settings: &Settings) -> Result<usize> {
    let (outputs, inputs) = pool.sides()?;
    let largest = pool.parts.iter().map(Part::rank).max().unwrap_or(1);
    Ok(settings.rank.unwrap_or(largest).min(outputs).min(inputs))
}

/// U diag(S) and Vᵀ as B' and A', clamped where that is asked for.
pub(super) fn split(u: &Tensor, s: &[f64], vt: &Tensor, clamp_at: Option<f64>) -> Result<Made> {
    let s = Tensor::new(s, &candle_core::Device::Cpu)?;
    let (b, a) = (u.broadcast_mul(&s)?.to_dtype(DType::F32)?, vt.to_dtype(DType::F32)?);
    match clamp_at {
        None => Made::new(&a, &b),
        Some(quantile) => {
            let (b, a) = clamp(&b, &a, quantile)?;
            Made::new(&a, &b)
        }
    }
}

/// Values of both factors beyond ±q brought to it, with q their common quantile (linear between values): PEFT's `svd_clamp`.
///
/// # Errors
///
/// Fails if a tensor operation fails.
pub fn clamp(b: &Tensor, a: &Tensor, quantile: f64) -> Result<(Tensor, Tensor)> {
    let mut all = values(b)?;
    all.extend(values(a)?);
    all.sort_unstable_by(f32::total_cmp);
    let place = quantile * (all.len().max(1) - 1) as f64;
    let (low, high) = (place.floor() as usize, place.ceil() as usize);
    let at = |i: usize| f64::from(all.get(i).copied().unwrap_or(0.0));
    // A quantile below zero bounds nothing that torch's clamp would not turn around; it then gives the upper bound everywhere.
    let bound = (at(low) + (at(high) - at(low)) * (place - low as f64)) as f32;
    let clamped = |t: &Tensor| -> Result<Tensor> {
        let (rows, columns) = t.dims2()?;
        let inside = |v: f32| v.max(-bound).min(bound);
        Ok(matrix(values(t)?.into_iter().map(inside).collect(), rows, columns)?)
    };
    Ok((clamped(b)?, clamped(a)?))
}

fn best(pool: &Pool, settings: &Settings) -> Result<Made> {
    let (b, a) = pool.stacked()?;
    let (u, s, vt) = product_svd(&b, &a, wanted_rank(pool, settings)?)?;
    split(&u, &s[..u.dim(1)?], &vt, settings.svd_clamp)
}

fn compressed(pool: &Pool, settings: &Settings) -> Result<Made> {
    let (b, a) = pool.stacked()?;
    let (u, s, vt) = product_svd(&b, &a, usize::MAX)?;
    let all: f64 = s.iter().map(|v| v * v).sum();
    let wanted = settings.energy.unwrap_or(1.0) * all;
    let (mut kept, mut rank) = (0.0, 0);
    // What is left of equal singular values is rounding at the whole share.
    while rank < u.dim(1)? && kept < wanted * (1.0 - 1e-12) {
        kept += s[rank] * s[rank];
        rank += 1;
    }
    let rank = rank.max(1).min(u.dim(1)?);
    split(&u.narrow(1, 0, rank)?.contiguous()?, &s[..rank], &vt.narrow(0, 0, rank)?.contiguous()?, None)
}

/// The exact sum, or the best of a rank where one is given.
pub(super) fn dense(pool: &Pool, settings: &Settings) -> Result<Made> {
    let (b, a) = pool.stacked()?;
    match settings.rank {
        None => Made::new(&a, &b),
        Some(_) => best(pool, settings),
    }
}

fn exact(pool: &Pool, settings: &Settings) -> Result<Made> {
    let (b, a) = pool.stacked()?;
    let (u, s, vt) = product_svd(&b, &a, settings.rank.unwrap_or(usize::MAX))?;
    let largest = s.first().copied().unwrap_or(0.0);
    // What a difference leaves of two equal changes is rounding beside these.
    let size = pool.parts.iter().map(size).sum::<Result<f64>>()?;
    let real = s.iter().filter(|s| **s > NOTHING * largest && **s > 1e-7 * size).count();
    if real == 0 {
        let (outputs, inputs) = pool.sides()?;
        let zeros = |rows, columns| Tensor::zeros((rows, columns), DType::F32, &candle_core::Device::Cpu);
        return Made::new(&zeros(1, inputs)?, &zeros(outputs, 1)?);
    }
    let rank = real.min(u.dim(1)?);
    split(&u.narrow(1, 0, rank)?.contiguous()?, &s[..rank], &vt.narrow(0, 0, rank)?.contiguous()?, None)
}

/// |weight · scaling| ‖B‖ ‖A‖, which bounds the size of a parent's change.
fn size(part: &Part) -> Result<f64> {
    let norm = |t: &Tensor| -> Result<f64> { Ok(t.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt()) };
    Ok((part.weight * part.scaling).abs() * norm(&part.b)? * norm(&part.a)?)
}

/// [ΔW₁ … ΔWₙ] = U Σ [V₁ … Vₙ]; TIES of the ΣVᵢ by PEFT's rules, then U times that. Trimming and signs go by projection here, over all of
/// them together in the authors' code.
fn knots(pool: &Pool, settings: &Settings) -> Result<Made> {
    let scaled = |part: &Part| -> Result<Tensor> { Ok((part.a.to_dtype(DType::F64)? * part.scaling)?) };
    let b = pool.parts.iter().map(|part| part.b.to_dtype(DType::F64)).collect::<candle_core::Result<Vec<_>>>()?;
    let (q, r) = qr(&Tensor::cat(&b, 1)?)?;
    let (_, inputs) = pool.sides()?;
    // ΔWᵢ = Q Rᵢ Aᵢ. With Aᵢ = Lᵢ Pᵢ for orthonormal rows Pᵢ, [R₁A₁ … RₙAₙ] has the left singular vectors and values of [R₁L₁ … RₙLₙ].
    let (mut along, mut sizes, mut first) = (Vec::new(), Vec::new(), 0);
    for part in &pool.parts {
        let (own, a) = (r.narrow(1, first, part.rank())?.contiguous()?, scaled(part)?);
        let (_, upper) = qr(&a.t()?.contiguous()?)?;
        sizes.push(own.matmul(&upper.t()?.contiguous()?)?);
        along.push((own, a));
        first += part.rank();
    }
    let (u, s, _) = svd(&Tensor::cat(&sizes, 1)?)?;
    // As the authors do with directions of no size.
    let kept = s.to_vec1::<f64>()?.iter().filter(|s| **s > 1e-5).count().max(1);
    let u = u.narrow(1, 0, kept)?.contiguous()?;
    let turned = u.t()?.contiguous()?;
    // Row i: a parent's coordinates along column i of Q U.
    let coordinates = |(own, a): &(Tensor, Tensor)| turned.matmul(own)?.matmul(a)?.to_dtype(DType::F32);
    let coordinates = along.iter().map(coordinates).collect::<candle_core::Result<Vec<_>>>()?;
    let weighted: Vec<(&Tensor, f64)> = coordinates.iter().zip(&pool.parts).map(|(c, p)| (c, p.weight)).collect();
    let mut random = generator(settings, &pool.path);
    let a = merged(&weighted, Elements::Ties, settings, &mut random)?;
    let b = q.matmul(&u)?;
    let mut made = match settings.rank {
        Some(rank) if rank < kept => {
            let (u, s, vt) = product_svd(&b, &a.to_dtype(DType::F64)?, rank.min(inputs))?;
            split(&u, &s[..u.dim(1)?], &vt, None)?
        }
        _ => Made::new(&a, &b)?,
    };
    made.report.insert("directions".into(), json!(kept));
    Ok(made)
}
