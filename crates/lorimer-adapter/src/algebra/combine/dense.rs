//! Element-wise rules on whole changes, brought to a rank afterwards: PEFT's `…_svd`.
//!
//! A parent's (outputs, inputs) change is made some rows at a time and never kept: twice to find the limit of its magnitudes, once to be pruned
//! and mixed. Only the mixed change is whole.

use candle_core::{Result as TensorResult, Tensor};
use lorimer_tensor::linalg::{subspace_svd, truncated_svd};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use super::elements::{Elements, Limit, drop_at_random, generator, limit_of_blocks, mix, prune};
use super::entry::{Combination, Kind, Weights};
use super::settings::Settings;
use super::site::{Made, Part, Pool, matrix, values};
use super::svd::{split, wanted_rank};
use crate::error::Result;
use crate::step::site_seed;

macro_rules! dense {
    ($(#[$doc:meta])* $id:ident, $name:literal, $help:literal, $source:literal, $takes:expr, $rule:expr) => {
        $(#[$doc])*
        pub const $id: Combination = Combination {
            name: $name,
            help: $help,
            source: $source,
            takes: $takes,
            weights: Weights::Sum,
            kind: Kind::WholeSites(|pool, settings| whole(pool, settings, $rule)),
        };
    };
}

dense!(
    /// PEFT's `magnitude_prune_svd`.
    MAGNITUDE_PRUNE_SVD,
    "magnitude_prune_svd",
    "as magnitude_prune, of ΔW, then the best of --rank",
    "PEFT add_weighted_adapter",
    &["density", "rank", "svd_clamp"],
    Elements::Magnitude
);
dense!(
    /// PEFT's `ties_svd`.
    TIES_SVD,
    "ties_svd",
    "as ties, of ΔW, then the best of --rank",
    "TIES, arXiv 2306.01708; PEFT",
    &["density", "majority_sign_method", "rank", "svd_clamp"],
    Elements::Ties
);
dense!(
    /// PEFT's `dare_linear_svd`.
    DARE_LINEAR_SVD,
    "dare_linear_svd",
    "as dare_linear, of ΔW, then the best of --rank",
    "DARE, arXiv 2311.03099; PEFT",
    &["density", "seed", "rank", "svd_clamp"],
    Elements::Dare
);
dense!(
    /// PEFT's `dare_ties_svd`.
    DARE_TIES_SVD,
    "dare_ties_svd",
    "as dare_ties, of ΔW, then the best of --rank",
    "DARE, arXiv 2311.03099; PEFT",
    &["density", "majority_sign_method", "seed", "rank", "svd_clamp"],
    Elements::DareTies
);

/// Values of a block of rows.
const BLOCK: usize = 1 << 20;
/// The largest smaller side of a change that is decomposed exactly.
const EXACT_SIDE: usize = 1536;

/// Rows `first .. first + rows` of a parent's change.
fn rows(part: &Part, first: usize, rows: usize) -> TensorResult<Vec<f32>> {
    values(&(part.b.narrow(0, first, rows)?.contiguous()?.matmul(&part.a)? * part.scaling)?)
}

fn whole(pool: &Pool, settings: &Settings, rule: Elements) -> Result<Made> {
    let (outputs, inputs) = pool.sides()?;
    let step = (BLOCK / inputs.max(1)).clamp(1, outputs.max(1));
    let blocks: Vec<(usize, usize)> = (0..outputs).step_by(step).map(|at| (at, step.min(outputs - at))).collect();
    let density = settings.density.unwrap_or(1.0);
    let mut limits = Vec::new();
    let mut generators = Vec::new();
    let mut random = generator(settings, &pool.path);
    for part in &pool.parts {
        if rule.is_random() {
            generators.push(random.clone());
            // The next parent's numbers come after all of this one's.
            if density < 1.0 {
                random.skip(outputs * inputs);
            }
        } else {
            limits.push(limit_of(part, &blocks, density)?);
        }
    }
    let weights: Vec<f64> = pool.parts.iter().map(|part| part.weight).collect();
    let mut change = Vec::with_capacity(outputs * inputs);
    for &(first, count) in &blocks {
        let mut all = pool.parts.iter().map(|p| rows(p, first, count)).collect::<TensorResult<Vec<_>>>()?;
        all.iter_mut().zip(&mut generators).for_each(|(values, random)| drop_at_random(values, density, random));
        all.iter_mut().zip(&mut limits).for_each(|(values, limit)| prune(values, limit));
        change.extend(mix(&all, &weights, rule, settings.majority_sign_method));
    }
    let size: f64 = change.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
    let change = matrix(change, outputs, inputs)?;
    let (u, s, vt) = decomposed(&change, wanted_rank(pool, settings)?, site_seed(settings.seed, &pool.path))?;
    let mut made = split(&u, &s, &vt, settings.svd_clamp)?;
    let kept: f64 = s.iter().map(|s| s * s).sum();
    // How much of the mixed change its rank leaves out.
    let error = if size > 0.0 { ((size - kept).max(0.0) / size).sqrt() } else { 0.0 };
    made.report.insert("rank_error".into(), json!(error));
    Ok(made)
}

fn limit_of(part: &Part, blocks: &[(usize, usize)], density: f64) -> Result<Limit> {
    let count = part.b.dim(0)? * part.a.dim(1)?;
    let each = |take: &mut dyn FnMut(&[f32])| -> TensorResult<()> {
        for &(first, count) in blocks {
            take(&rows(part, first, count)?);
        }
        Ok(())
    };
    Ok(limit_of_blocks(count, density, each)?)
}

/// U, S and Vᵀ of a rank: exactly up to [`EXACT_SIDE`], by subspace iteration beyond.
fn decomposed(change: &Tensor, rank: usize, seed: u64) -> Result<(Tensor, Vec<f64>, Tensor)> {
    let (outputs, inputs) = change.dims2()?;
    let (u, s, vt) = match outputs.min(inputs) <= EXACT_SIDE {
        true => truncated_svd(change, rank)?,
        false => {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            subspace_svd(change, rank, || rng.random_range(-1.0..1.0))?
        }
    };
    Ok((u, s.to_vec1::<f64>()?, vt))
}
