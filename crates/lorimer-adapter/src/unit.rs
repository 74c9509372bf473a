//! Experts in a block's gated unit: a router reads the unit's input once, and all projections of the unit follow its choice. And the balance of a
//! step's choices, which an auxiliary loss keeps even.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Result, Tensor, Var};
use lorimer_tensor::{Gradients, NotFinite, Ops};

use crate::delta::LowRank;

/// How the rows of a unit go to n experts. It lives as long as the unit's forward.
#[derive(Clone, Debug)]
pub enum UnitRoute {
    /// Each row to one expert.
    One {
        /// Which (rows).
        chosen: Vec<u32>,
        /// What the expert's change is multiplied by (rows, n), of which each row's expert is read; None: 1.
        factors: Option<Tensor>,
        /// n.
        experts: usize,
    },
    /// Each row to all experts, whose changes are multiplied by these (rows, n).
    All(Tensor),
}

/// Factors (rows, n) of experts as gates (rows, n · rank) of their ranks, one expert's after another's.
///
/// # Errors
///
/// Fails if a tensor operation fails.
pub fn spread(factors: &Tensor, rank: usize) -> Result<Tensor> {
    let (rows, n) = factors.dims2()?;
    factors.unsqueeze(2)?.broadcast_as((rows, n, rank))?.contiguous()?.reshape((rows, n * rank))
}

impl UnitRoute {
    /// What each expert's change is multiplied by, row by row (rows, n), without gradients: zeros but for the chosen.
    ///
    /// # Errors
    ///
    /// Fails if a tensor operation fails.
    pub fn factors(&self, dtype: DType) -> Result<Tensor> {
        match self {
            Self::All(factors) => factors.detach().to_dtype(dtype),
            Self::One { chosen, factors, experts } => {
                let mut mask = vec![0f64; chosen.len() * experts];
                chosen.iter().enumerate().for_each(|(row, &e)| mask[row * experts + e as usize] = 1.0);
                let mask = Tensor::from_vec(mask, (chosen.len(), *experts), &Device::Cpu)?.to_dtype(dtype)?;
                match factors {
                    Some(factors) => mask * factors.detach().to_dtype(dtype)?,
                    None => Ok(mask),
                }
            }
        }
    }

    /// The change that the experts of a projection make of rows `x` (rows, inputs): (rows, outputs). Where each row goes to one expert, an
    /// expert computes its own rows and no others.
    ///
    /// # Errors
    ///
    /// Fails if there are other experts or rows than the route is for, or if a tensor operation fails.
    pub fn change(&self, ops: Ops<'_>, x: &Tensor, experts: &[LowRank]) -> Result<Tensor> {
        match self {
            Self::All(factors) => all(ops, x, experts, factors),
            Self::One { chosen, factors, experts: n } => {
                if experts.len() != *n || x.dim(0)? != chosen.len() {
                    candle_core::bail!(
                        "{} rows of {} experts met a route of {} rows among {n}",
                        x.dim(0)?,
                        experts.len(),
                        chosen.len()
                    );
                }
                one_each(ops, x, experts, (chosen, factors.as_ref()))
            }
        }
    }
}

/// Σ_e f_e · scaling · b_e a_e x, in one product of all ranks.
fn all(ops: Ops<'_>, x: &Tensor, experts: &[LowRank], factors: &Tensor) -> Result<Tensor> {
    let Some(LowRank { a, scaling, .. }) = experts.first() else { candle_core::bail!("a unit without experts") };
    let (rank, scaling) = (a.dim(0)?, *scaling);
    let parameters: Vec<&Tensor> = experts.iter().flat_map(|low| [&low.a, &low.b]).collect();
    let both = ops.subgraph_all(&[], &parameters, |_| {
        let a: Vec<&Tensor> = experts.iter().map(|low| &low.a).collect();
        let b: Vec<&Tensor> = experts.iter().map(|low| &low.b).collect();
        Ok(vec![Tensor::cat(&a, 0)?, Tensor::cat(&b, 1)?.contiguous()?])
    })?;
    let u = ops.dense(x, &both[0])?;
    let gated = ops.subgraph(&[&u, factors], &[], |t| (&t[0] * spread(&t[1], rank)?)? * scaling)?;
    ops.dense(&gated, &both[1])
}

/// Each expert's change of its own rows, put where these were.
fn one_each(
    ops: Ops<'_>,
    x: &Tensor,
    experts: &[LowRank],
    (chosen, factors): (&[u32], Option<&Tensor>),
) -> Result<Tensor> {
    let (mut parts, mut order) = (Vec::new(), Vec::with_capacity(chosen.len()));
    for (e, low) in experts.iter().enumerate() {
        let rows: Vec<u32> = (0..chosen.len() as u32).filter(|&row| chosen[row as usize] as usize == e).collect();
        if rows.is_empty() {
            continue;
        }
        let u = ops.dense(&ops.rows(x, &rows)?, &low.a)?;
        let u = match factors {
            Some(factors) => ops.subgraph(&[&u, &ops.rows(factors, &rows)?], &[], |t| {
                t[0].broadcast_mul(&t[1].narrow(1, e, 1)?)? * low.scaling
            })?,
            None => ops.subgraph(&[&u], &[], |t| &t[0] * low.scaling)?,
        };
        parts.push(ops.dense(&u, &low.b)?);
        order.extend(rows);
    }
    if let [only] = &parts[..] {
        return Ok(only.clone());
    }
    let mut back = vec![0u32; order.len()];
    order.iter().enumerate().for_each(|(at, &row)| back[row as usize] = at as u32);
    let parts: Vec<&Tensor> = parts.iter().collect();
    let all = ops.subgraph(&parts, &[], |t| Tensor::cat(t, 0))?;
    ops.rows(&all, &back)
}

/// What routes the rows of a block's gated unit.
pub trait UnitRouter: Send + Sync {
    /// p (rows, n): how much of each row is each expert's, from the unit's input `x` (rows, hidden), in recorded operations.
    ///
    /// # Errors
    ///
    /// Fails if a tensor operation fails.
    fn shares(&self, ops: Ops<'_>, x: &Tensor) -> Result<Tensor>;
    /// The route that follows from p.
    ///
    /// # Errors
    ///
    /// Fails if p is no number somewhere, or if a tensor operation fails.
    fn route(&self, ops: Ops<'_>, shares: &Tensor) -> Result<UnitRoute>;
    /// Its trained tensors.
    fn trained(&self) -> Vec<&Var>;
}

/// The expert that has the largest share of each row (rows, n), the lowest where several have.
///
/// # Errors
///
/// Fails if a share is no number.
pub fn largest_share(shares: &Tensor) -> Result<Vec<u32>> {
    let n = shares.dim(1)?;
    let values = shares.detach().to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    if values.iter().any(|p| p.is_nan()) {
        return Err(NotFinite::error("a share that an expert is chosen by is not a number"));
    }
    let best = |row: &[f64]| (1..row.len()).fold(0, |best, e| if row[e] > row[best] { e } else { best }) as u32;
    Ok(values.chunks(n.max(1)).map(best).collect())
}

/// Watches the routes of a forward of training, and has the gradient of their balance.
///
/// Of a sample, over the rows i of all routed blocks: P_e = mean p_e(i), C_e the share of rows whose largest p is that of e, and
/// L = Σ_e P_e C_e (arXiv 2401.16160, as the authors' code has it: all blocks together). C has no gradient.
#[derive(Debug)]
pub struct RouteMeter {
    /// Rows of each sample.
    samples: Vec<Vec<u32>>,
    weight: f64,
    /// p of each block.
    noted: Mutex<BTreeMap<usize, Tensor>>,
}

/// What a step's routes were.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RouteTotals {
    /// Σ of L over samples.
    pub balance: f64,
    /// Samples.
    pub samples: usize,
    /// Of each routed block, the rows of each expert.
    pub chosen: BTreeMap<usize, Vec<u64>>,
}

impl RouteTotals {
    /// Of each routed block, the share of rows that went to each expert.
    pub fn shares(&self) -> BTreeMap<usize, Vec<f64>> {
        let of = |counts: &Vec<u64>| {
            let all = counts.iter().sum::<u64>().max(1) as f64;
            counts.iter().map(|&count| count as f64 / all).collect()
        };
        self.chosen.iter().map(|(&layer, counts)| (layer, of(counts))).collect()
    }
}

/// Choices and p of one block.
struct Noted {
    chosen: Vec<u32>,
    shares: Vec<f64>,
    n: usize,
}

impl RouteMeter {
    /// Of a forward over samples with these rows. `weight`: what Σ L over samples is multiplied by in what is minimised.
    pub fn new(samples: Vec<Vec<u32>>, weight: f64) -> Self {
        Self { samples, weight, noted: Mutex::default() }
    }

    /// Notes p (rows, n) of a block. A block that is computed again takes its own place.
    pub fn note(&self, layer: usize, shares: &Tensor) {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner).insert(layer, shares.clone());
    }

    fn read(&self) -> Result<BTreeMap<usize, Noted>> {
        let noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        let of = |(&layer, p): (&usize, &Tensor)| {
            let (rows, n) = p.dims2()?;
            if self.samples.iter().flatten().any(|&row| row as usize >= rows) {
                candle_core::bail!("block {layer} routed {rows} rows, of which the samples have more");
            }
            let shares = p.detach().to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
            Ok((layer, Noted { chosen: largest_share(p)?, shares, n }))
        };
        noted.iter().map(of).collect()
    }

    /// Of a sample: C, and how many rows it has in all blocks.
    fn choices(noted: &BTreeMap<usize, Noted>, rows: &[u32]) -> (Vec<f64>, f64) {
        let n = noted.values().next().map_or(0, |own| own.n);
        let mut counts = vec![0f64; n];
        for own in noted.values() {
            rows.iter().for_each(|&row| counts[own.chosen[row as usize] as usize] += 1.0);
        }
        let all = (rows.len() * noted.len()).max(1) as f64;
        counts.iter_mut().for_each(|count| *count /= all);
        (counts, all)
    }

    /// Adds what was noted to the totals of a step.
    ///
    /// # Errors
    ///
    /// Fails if a block routed fewer rows than the samples have.
    pub fn add_to(&self, totals: &mut RouteTotals) -> Result<()> {
        let noted = self.read()?;
        for rows in &self.samples {
            let (counts, all) = Self::choices(&noted, rows);
            let of = |own: &Noted| -> f64 {
                let row = |&row: &u32| &own.shares[row as usize * own.n..][..own.n];
                rows.iter().map(|r| row(r).iter().zip(&counts).map(|(p, c)| p * c).sum::<f64>()).sum()
            };
            totals.balance += noted.values().map(of).sum::<f64>() / all;
        }
        totals.samples += self.samples.len();
        for (layer, own) in noted {
            let counts = totals.chosen.entry(layer).or_insert_with(|| vec![0; own.n]);
            for &row in self.samples.iter().flatten() {
                counts[own.chosen[row as usize] as usize] += 1;
            }
        }
        Ok(())
    }

    /// Σ of L over samples in candle's graph, of a forward without a tape.
    ///
    /// # Errors
    ///
    /// Fails if a block routed fewer rows than the samples have, or if a tensor operation fails.
    pub fn balance(&self) -> Result<Option<Tensor>> {
        let noted = self.read()?;
        let shares = self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sum: Option<Tensor> = None;
        for rows in &self.samples {
            let (counts, all) = Self::choices(&noted, rows);
            for p in shares.values() {
                let own = p.index_select(&Tensor::new(rows.as_slice(), &Device::Cpu)?, 0)?.sum(0)?;
                let term =
                    ((own * Tensor::new(counts.as_slice(), &Device::Cpu)?.to_dtype(p.dtype())?)?.sum_all()? / all)?;
                sum = Some(match sum {
                    Some(sum) => (sum + term)?,
                    None => term,
                });
            }
        }
        Ok(sum)
    }

    /// Adds weight · ∂ΣL/∂p of a block to the gradients, before they are taken back through it.
    ///
    /// # Errors
    ///
    /// Fails if a block routed fewer rows than the samples have, or if a tensor operation fails.
    pub fn add_gradient(
        &self,
        layer: usize,
        follows: impl Fn(&Tensor) -> bool,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let p = self.noted.lock().unwrap_or_else(PoisonError::into_inner).get(&layer).cloned();
        let Some(p) = p.filter(|p| self.weight != 0.0 && follows(p)) else { return Ok(()) };
        let noted = self.read()?;
        let (rows, n) = p.dims2()?;
        let mut gradient = vec![0f64; rows * n];
        for own in &self.samples {
            let (counts, all) = Self::choices(&noted, own);
            for &row in own {
                let at = row as usize * n;
                gradient[at..at + n].iter_mut().zip(&counts).for_each(|(g, c)| *g += self.weight * c / all);
            }
        }
        gradients.add(p.id(), Tensor::from_vec(gradient, (rows, n), &Device::Cpu)?.to_dtype(p.dtype())?)
    }
}
