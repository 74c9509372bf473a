//! W ≈ Q + L1 L2: a quantised matrix and the low-rank change that repairs it (Guo et al. 2024, "LQ-LoRA", arXiv:2311.12023, algorithm 1).

use candle_core::{DType, Device, Result as TensorResult, Tensor};
use lorimer_tensor::linalg::{leading_basis, truncated_svd};
use lorimer_tensor::storage::levels::Levels;
use lorimer_tensor::storage::normal_float::{NfConfig, quantise};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::error::{Error, Result};

/// Directions beyond the rank in the randomised SVD, and its power iterations: the authors' and torch's.
const OVERSAMPLING: usize = 10;
const POWER_ITERATIONS: usize = 2;
/// Least weight of a row or column, as a part of their mean: a row without gradients would divide by zero.
const FLOOR: f64 = 1e-6;

/// What the alternation begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// Q = 0, the low-rank change of W itself first: LQ-LoRA.
    LowRank,
    /// Q of W itself first: LoftQ (arXiv 2310.08659).
    Quantised,
}

/// How a matrix is decomposed.
#[derive(Clone, Copy, Debug)]
pub struct Steps {
    /// Rank of L1 L2; 0 for Q alone.
    pub rank: usize,
    /// Most steps; they end earlier where the error rises.
    pub most: usize,
    /// They also end where a step lowers the error by less than this part of it.
    pub tolerance: f64,
    /// What they begin with.
    pub begin: Begin,
    /// Seed of the randomised SVD.
    pub seed: u64,
}

/// A decomposed matrix.
pub struct Decomposed {
    /// Q.
    pub quantised: Levels,
    /// L1 (outputs, r) and L2 (r, inputs) in f32; None at rank 0.
    pub factors: Option<(Tensor, Tensor)>,
    /// ‖√F ⊙ (W − Q − L1 L2)‖² of what is kept, F being ones where there is none.
    pub error: f64,
    /// The same of `quant(W)` alone.
    pub plain: f64,
    /// Errors (not squared) after each step.
    pub steps: Vec<f64>,
}

/// Fisher information as the weights of an error. F is divided by its mean, so that F × 7 is decomposed as F is.
pub struct Weighting {
    normed: Vec<f32>,
    /// √ of the means of rows (outputs) and of columns (inputs).
    rows: Vec<f32>,
    columns: Vec<f32>,
    mean: f64,
}

impl Weighting {
    /// Of F (outputs, inputs); None where it is zero throughout, which says nothing.
    ///
    /// # Errors
    ///
    /// Fails if a number of F is negative or not finite.
    pub fn new(fisher: &Tensor) -> Result<Option<Self>> {
        let (outputs, inputs) = fisher.dims2()?;
        let values = fisher.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
        if !mean.is_finite() || values.iter().any(|v| *v < 0.0) {
            return Err(Error::Settings("Fisher information should be finite and not negative".into()));
        }
        if mean == 0.0 {
            return Ok(None);
        }
        let (mut rows, mut columns) = (vec![0f64; outputs], vec![0f64; inputs]);
        for (values, row) in values.chunks_exact(inputs).zip(&mut rows) {
            for (v, column) in values.iter().zip(&mut columns) {
                *row += v / mean / inputs as f64;
                *column += v / mean / outputs as f64;
            }
        }
        let root = |means: Vec<f64>| means.into_iter().map(|m| m.max(FLOOR).sqrt() as f32).collect();
        let normed = values.iter().map(|v| (v / mean) as f32).collect();
        Ok(Some(Self { normed, rows: root(rows), columns: root(columns), mean }))
    }
}

// Large matrices are worked on as plain numbers: candle's pool for elementwise operations waits spinning, and configurations are tried beside each other.

fn difference(a: &[f32], b: &[f32]) -> Vec<f32> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

/// ‖√F ⊙ d‖².
pub(super) fn squared(d: &[f32], weighting: Option<&Weighting>) -> f64 {
    // In f32 a few hundred at a time, as f64 from there on.
    let sum = |part: &[f32], weights: Option<&[f32]>| -> f64 {
        let squares = part.iter().map(|v| v * v);
        f64::from(match weights {
            Some(weights) => squares.zip(weights).map(|(v, w)| v * w).sum::<f32>(),
            None => squares.sum::<f32>(),
        })
    };
    const PART: usize = 256;
    match weighting {
        Some(w) => w.mean * d.chunks(PART).zip(w.normed.chunks(PART)).map(|(d, w)| sum(d, Some(w))).sum::<f64>(),
        None => d.chunks(PART).map(|d| sum(d, None)).sum(),
    }
}

/// `left` (m, r) times `right` (r, n) as numbers.
fn product(left: &Tensor, right: &Tensor) -> TensorResult<Vec<f32>> {
    left.matmul(right)?.flatten_all()?.to_vec1()
}

/// Finds L1 (outputs, r) and L2 (r, inputs), the best of rank r for a matrix, each with the roots of the singular values.
struct Svd<'a> {
    rank: usize,
    weighting: Option<&'a Weighting>,
    rng: ChaCha8Rng,
    /// Right singular vectors (inputs, r) of the matrix before, which is near.
    before: Option<Tensor>,
}

impl Svd<'_> {
    fn factors(&mut self, mut w: Vec<f32>, (outputs, inputs): (usize, usize)) -> TensorResult<(Tensor, Tensor)> {
        let rank = self.rank;
        let width = (rank + OVERSAMPLING).min(outputs).min(inputs);
        if let Some(f) = self.weighting {
            for (w, row) in w.chunks_exact_mut(inputs).zip(&f.rows) {
                w.iter_mut().zip(&f.columns).for_each(|(w, column)| *w *= row * column);
            }
        }
        let scaled = Tensor::from_vec(w, (outputs, inputs), &Device::Cpu)?;
        let mut random = |columns: usize| -> TensorResult<Tensor> {
            let values: Vec<f32> = (0..inputs * columns).map(|_| self.rng.random_range(-1.0..1.0)).collect();
            Tensor::from_vec(values, (inputs, columns), &Device::Cpu)
        };
        let (q, projected) = match &self.before {
            Some(before) if width > rank => {
                leading_basis(&scaled, &Tensor::cat(&[before, &random(width - rank)?], 1)?, POWER_ITERATIONS - 1)?
            }
            _ => leading_basis(&scaled, &random(width)?, POWER_ITERATIONS)?,
        };
        let (u, s, vt) = truncated_svd(&projected, rank)?;
        self.before = Some(vt.t()?.to_dtype(DType::F32)?.contiguous()?);
        let root = s.sqrt()?;
        let left = q.matmul(&u)?.broadcast_mul(&root)?.to_dtype(DType::F32)?;
        let right = vt.broadcast_mul(&root.unsqueeze(1)?)?.to_dtype(DType::F32)?;
        Ok(match self.weighting {
            Some(f) => (
                left.broadcast_div(&Tensor::from_slice(&f.rows, (outputs, 1), &Device::Cpu)?)?,
                right.broadcast_div(&Tensor::from_slice(&f.columns, (1, inputs), &Device::Cpu)?)?,
            ),
            None => (left, right),
        })
    }
}

/// The best pair so far.
struct Kept {
    error: f64,
    quantised: Levels,
    factors: (Tensor, Tensor),
}

impl Kept {
    fn consider(kept: &mut Option<Self>, error: f64, quantised: &Levels, factors: &(Tensor, Tensor)) {
        if kept.as_ref().is_none_or(|kept| error < kept.error) {
            *kept = Some(Self { error, quantised: quantised.clone(), factors: factors.clone() });
        }
    }
}

/// Decomposes `w` (outputs, inputs) in f32. Of all pairs of Q and L1 L2 that the alternation passes, and of `quant(W)` with its repair, the best is
/// kept (the authors' code returns the last, which is worse).
///
/// # Errors
///
/// Fails if the rank is larger than the matrix, if the configuration cannot be stored, or if a number is not finite.
pub fn decompose(w: &Tensor, config: &NfConfig, steps: Steps, weighting: Option<&Weighting>) -> Result<Decomposed> {
    let shape = w.dims2()?;
    let w = w.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let first = quantise(&w, shape, config)?;
    let rest = difference(&w, &first.expanded());
    let plain = squared(&rest, weighting);
    if steps.rank == 0 {
        return Ok(Decomposed { quantised: first, factors: None, error: plain, plain, steps: Vec::new() });
    }
    if steps.rank > shape.0.min(shape.1) {
        return Err(Error::Settings(format!("rank {} is more than a matrix of shape {shape:?} has", steps.rank)));
    }
    let rng = ChaCha8Rng::seed_from_u64(steps.seed);
    let mut svd = Svd { rank: steps.rank, weighting, rng, before: None };
    let mut kept: Option<Kept> = None;
    let (mut errors, mut last) = (Vec::new(), f64::INFINITY);
    // Q, and what it leaves of W.
    let mut now = Some((first, rest));
    if let Some((first, rest)) = now.take_if(|_| steps.begin == Begin::LowRank) {
        let repair = svd.factors(rest.clone(), shape)?;
        let error = squared(&difference(&rest, &product(&repair.0, &repair.1)?), weighting);
        Kept::consider(&mut kept, error, &first, &repair);
        svd.before = None;
    }
    for _ in 0..steps.most {
        let target = now.as_ref().map_or(&w, |(_, rest)| rest);
        let factors = svd.factors(target.clone(), shape)?;
        let change = product(&factors.0, &factors.1)?;
        if let Some((levels, rest)) = &now {
            Kept::consider(&mut kept, squared(&difference(rest, &change), weighting), levels, &factors);
        }
        let rest = difference(&w, &change);
        let levels = quantise(&rest, shape, config)?;
        let dense = levels.expanded();
        let error = squared(&difference(&rest, &dense), weighting);
        Kept::consider(&mut kept, error, &levels, &factors);
        errors.push(error.sqrt());
        if error > last * (1.0 - steps.tolerance).powi(2) {
            break;
        }
        last = error;
        now = Some((levels, difference(&w, &dense)));
    }
    let Some(kept) = kept else { return Err(Error::Settings("a decomposition takes at least one step".into())) };
    Ok(Decomposed { quantised: kept.quantised, factors: Some(kept.factors), error: kept.error, plain, steps: errors })
}
