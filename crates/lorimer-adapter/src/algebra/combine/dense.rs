//! Element-wise rules on whole changes, brought to a rank afterwards: PEFT's `…_svd`.
//!
//! A parent's (outputs, inputs) change is made in tiles that fit a cache and never kept: once to find the limit of its magnitudes, once to be pruned
//! and mixed. Only the mixed change is whole.

use std::ops::Range;

use candle_core::{Result as TensorResult, Tensor};
use lorimer_tensor::linalg::{subspace_svd, truncated_svd};
use lorimer_tensor::wide;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde_json::json;

use super::elements::{Elements, Limit, drop_at_random, generator, limit_of_blocks, limit_within, mix, prune};
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

/// Values of a block of whole rows, where their order counts.
const BLOCK: usize = 1 << 20;
/// Rows and columns of a tile: those of ten parents are 640 kB.
const TILE: (usize, usize) = (32, 512);
/// Columns of a product that are summed in registers.
const LANES: usize = 64;
/// Rows and columns, evenly spread, whose values tell about where a limit lies.
const SAMPLE: (usize, usize) = (256, 1024);
/// By how much of all values that may be off.
const MARGIN: f64 = 0.03;
/// The largest smaller side of a change that is decomposed exactly.
const EXACT_SIDE: usize = 1536;

/// A parent's ΔW = B A with its scaling in B. A value does not depend on the tile that it is made in.
struct Change {
    a: Vec<f32>,
    b: Vec<f32>,
    rank: usize,
    outputs: usize,
    inputs: usize,
}

/// Σ b a for the columns from one on.
#[inline(always)]
fn sums(b: &[f32], a: &[f32], inputs: usize, from: usize) -> [f32; LANES] {
    let mut sums = [0f32; LANES];
    for (r, &b) in b.iter().enumerate() {
        if let Some(a) = a.get(r * inputs + from..).and_then(<[f32]>::first_chunk::<LANES>) {
            for l in 0..LANES {
                sums[l] += b * a[l];
            }
        }
    }
    sums
}

impl Change {
    fn new(part: &Part) -> TensorResult<Self> {
        let (outputs, inputs) = (part.b.dim(0)?, part.a.dim(1)?);
        Ok(Self { a: values(&part.a)?, b: values(&(&part.b * part.scaling)?)?, rank: part.rank(), outputs, inputs })
    }

    /// Hands the values of rows and columns, row after row, to `f`; `tile` is what holds them.
    fn at<R>(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        tile: &mut Vec<f32>,
        f: impl FnOnce(&mut [f32]) -> R,
    ) -> R {
        tile.resize(rows.len() * columns.len(), 0.0);
        wide!(for (row, out) in rows.zip(tile.chunks_exact_mut(columns.len())) {
            let b = &self.b[row * self.rank..][..self.rank];
            let (whole, rest) = out.as_chunks_mut::<LANES>();
            let mut from = columns.start;
            for out in whole {
                *out = sums(b, &self.a, self.inputs, from);
                from += LANES;
            }
            for out in rest {
                *out = (0..self.rank).map(|r| b[r] * self.a[r * self.inputs + from]).sum();
                from += 1;
            }
        });
        f(tile)
    }

    /// The limit that keeps a share of the values.
    fn limit(&self, density: f64) -> TensorResult<Limit> {
        let count = self.outputs * self.inputs;
        let spread = |side: usize, most: usize| (0..side).step_by(side.div_ceil(most).max(1));
        let mut sample: Vec<f32> = Vec::new();
        for row in spread(self.outputs, SAMPLE.0) {
            let b = &self.b[row * self.rank..][..self.rank];
            sample.extend(spread(self.inputs, SAMPLE.1).map(|column| {
                let a = self.a.iter().skip(column).step_by(self.inputs.max(1));
                b.iter().zip(a).map(|(b, a)| b * a).sum::<f32>().abs()
            }));
        }
        sample.sort_unstable_by(f32::total_cmp);
        // The sample rises: what keeps more than the density lies before what keeps less.
        let at = |share: f64| sample.get(((1.0 - share) * sample.len() as f64) as usize).copied();
        let near =
            (at((density + MARGIN).min(1.0)).unwrap_or(0.0), at((density - MARGIN).max(0.0)).unwrap_or(f32::INFINITY));
        let tiles = self.tiles();
        let counted = tiles.into_par_iter().map_init(Vec::new, |tile, (rows, columns)| {
            self.at(rows, columns, tile, |values| {
                let above = wide!(values.iter().map(|v| u32::from(v.abs() > near.1)).sum::<u32>()) as usize;
                (above, values.iter().map(|v| v.abs()).filter(|v| (near.0..=near.1).contains(v)).collect::<Vec<f32>>())
            })
        });
        let (larger, within) = counted.reduce(Default::default, |mut one, mut other| {
            if one.1.len() < other.1.len() {
                std::mem::swap(&mut one.1, &mut other.1);
            }
            one.1.append(&mut other.1);
            (one.0 + other.0, one.1)
        });
        if let Some(limit) = limit_within(count, density, larger, within) {
            return Ok(limit);
        }
        // The sample was far off.
        limit_of_blocks(count, density, |take| {
            let mut block = Vec::new();
            self.blocks().for_each(|rows| self.at(rows, 0..self.inputs, &mut block, |values| take(values)));
            Ok(())
        })
    }

    fn tiles(&self) -> Vec<(Range<usize>, Range<usize>)> {
        let cut = |side: usize, step: usize| (0..side).step_by(step).map(move |at| at..(at + step).min(side));
        cut(self.outputs, TILE.0)
            .flat_map(|rows| cut(self.inputs, TILE.1).map(move |columns| (rows.clone(), columns)))
            .collect()
    }

    /// Blocks of whole rows, in order.
    fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (outputs, step) = (self.outputs, (BLOCK / self.inputs.max(1)).max(1));
        (0..outputs).step_by(step).map(move |at| at..(at + step).min(outputs))
    }
}

/// The rule of all changes, row after row.
fn mixed(pool: &Pool, settings: &Settings, rule: Elements) -> Result<Vec<f32>> {
    let (outputs, inputs) = pool.sides()?;
    let (density, majority) = (settings.density.unwrap_or(1.0), settings.majority_sign_method);
    let changes = pool.parts.iter().map(Change::new).collect::<TensorResult<Vec<_>>>()?;
    let Some(first) = changes.first().filter(|change| change.inputs > 0) else { return Ok(Vec::new()) };
    let weights: Vec<f64> = pool.parts.iter().map(|part| part.weight).collect();
    let mut limits = Vec::new();
    let mut generators = Vec::new();
    let mut random = generator(settings, &pool.path);
    for change in &changes {
        if rule.is_random() {
            generators.push(random.clone());
            // The next parent's numbers come after all of this one's.
            if density < 1.0 {
                random.skip(outputs * inputs);
            }
        } else {
            limits.push(change.limit(density)?);
        }
    }
    let mut all = vec![0f32; outputs * inputs];
    // Numbers are drawn, and values that are equal to a limit are kept, in the order of rows.
    if rule.is_random() || !limits.iter().all(Limit::is_of_each) {
        let mut tiles = vec![Vec::new(); changes.len()];
        for rows in first.blocks() {
            for (i, (change, tile)) in changes.iter().zip(&mut tiles).enumerate() {
                change.at(rows.clone(), 0..inputs, tile, |values| match rule.is_random() {
                    true => drop_at_random(values, density, &mut generators[i]),
                    false => prune(values, &mut limits[i]),
                });
            }
            all[rows.start * inputs..rows.end * inputs].copy_from_slice(&mix(&tiles, &weights, rule, majority));
        }
        return Ok(all);
    }
    all.par_chunks_mut(TILE.0 * inputs).enumerate().for_each_init(
        || vec![Vec::new(); changes.len()],
        |tiles, (band, out)| {
            let rows = band * TILE.0..band * TILE.0 + out.len() / inputs;
            for column in (0..inputs).step_by(TILE.1) {
                let columns = column..(column + TILE.1).min(inputs);
                for ((change, limit), tile) in changes.iter().zip(&limits).zip(tiles.iter_mut()) {
                    change.at(rows.clone(), columns.clone(), tile, |values| prune(values, &mut limit.clone()));
                }
                let mixed = mix(tiles, &weights, rule, majority);
                for (out, mixed) in out.chunks_exact_mut(inputs).zip(mixed.chunks_exact(columns.len())) {
                    out[columns.clone()].copy_from_slice(mixed);
                }
            }
        },
    );
    Ok(all)
}

fn whole(pool: &Pool, settings: &Settings, rule: Elements) -> Result<Made> {
    let (outputs, inputs) = pool.sides()?;
    let change = mixed(pool, settings, rule)?;
    let size: f64 = change.par_iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
    let change = matrix(change, outputs, inputs)?;
    let (u, s, vt) = decomposed(&change, wanted_rank(pool, settings)?, site_seed(settings.seed, &pool.path))?;
    let mut made = split(&u, &s, &vt, settings.svd_clamp)?;
    let kept: f64 = s.iter().map(|s| s * s).sum();
    // How much of the mixed change its rank leaves out.
    let error = if size > 0.0 { ((size - kept).max(0.0) / size).sqrt() } else { 0.0 };
    made.report.insert("rank_error".into(), json!(error));
    Ok(made)
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
