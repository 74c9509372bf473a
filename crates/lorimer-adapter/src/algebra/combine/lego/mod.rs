//! LoRA-LEGO (Zhao et al., "Merging LoRAs like playing LEGO", arXiv 2409.16167): an adapter is a bag of rank-one units, the units of all
//! parents are clustered, and the centres are the units of the result.
//!
//! A unit of parent n is √s·[aᵢ ; bᵢ], row i of A and column i of B with s = α/r. A centre is the weighted mean of its members, brought back
//! to their mean norm (parameter reweighting), and the output is multiplied by √(reference rank / k) (output reweighting).

mod clusters;

use candle_core::{DType, Device, Tensor};
use lorimer_tensor::linalg::product_svd;
use serde_json::json;

use super::entry::{Combination, Kind, Weights};
use super::settings::{Basis, Features, Gauge, Norm, Settings};
use super::site::{GRAM_ROWS, Made, Part, Pool};
use crate::error::{Error, Result};
use crate::step::site_seed;
use clusters::Points;

/// LoRA-LEGO.
pub const LEGO: Combination = Combination {
    name: "lego",
    help: "clusters the rank-one units of all parents; the centres are the units of a LoRA of rank --rank (their mean unless given)",
    source: "LoRA-LEGO, arXiv 2409.16167",
    takes: &[
        "rank",
        "seed",
        "features",
        "gauge",
        "basis",
        "norm",
        "parameter_reweighting",
        "output_reweighting",
        "reference_rank",
        "restarts",
        "iterations",
    ],
    weights: Weights::Positive,
    kind: Kind::Sites(lego),
};

/// One unit: both halves in one vector, and its weight.
struct Unit {
    values: Vec<f64>,
    weight: f64,
    parent: usize,
}

/// The units of a parent.
fn units(part: &Part, parent: usize, settings: &Settings) -> Result<Vec<Unit>> {
    let (mut a, mut b) = (part.a.to_dtype(DType::F64)?, part.b.to_dtype(DType::F64)?);
    let mut scaling = part.scaling;
    if settings.basis == Basis::Svd {
        let (u, s, vt) = product_svd(&b, &(&a * scaling)?, part.rank())?;
        let root: Vec<f64> = s.iter().take(u.dim(1)?).map(|s| s.sqrt()).collect();
        let root = Tensor::new(root, &Device::Cpu)?;
        (a, b, scaling) = (vt.broadcast_mul(&root.unsqueeze(1)?)?, u.broadcast_mul(&root)?, 1.0);
    }
    let root = scaling.abs().sqrt();
    let (a, b) = ((a * (root * if scaling < 0.0 { -1.0 } else { 1.0 }))?, (b.t()? * root)?);
    let halves = a.to_vec2::<f64>()?.into_iter().zip(b.contiguous()?.to_vec2::<f64>()?);
    let unit = |(mut a, mut b): (Vec<f64>, Vec<f64>)| {
        let (long, wide) = (length(&a), length(&b));
        if settings.gauge == Gauge::Balance && long > 0.0 && wide > 0.0 {
            let factor = (wide / long).sqrt();
            a.iter_mut().for_each(|v| *v *= factor);
            b.iter_mut().for_each(|v| *v /= factor);
        }
        a.extend(b);
        Unit { values: a, weight: part.weight, parent }
    };
    Ok(halves.map(unit).collect())
}

fn length(values: &[f64]) -> f64 {
    values.iter().map(|v| v * v).sum::<f64>().sqrt()
}

fn norm(values: &[f64], kind: Norm) -> f64 {
    match kind {
        Norm::Max => values.iter().fold(0.0, |top, v| top.max(v.abs())),
        Norm::L2 => length(values),
    }
}

/// Inner products of rows, row after row.
fn gram(rows: &[Vec<f64>]) -> Result<Vec<f64>> {
    let width = rows.first().map_or(0, Vec::len);
    let flat: Vec<f64> = rows.iter().flatten().copied().collect();
    let t = Tensor::from_vec(flat, (rows.len(), width), &Device::Cpu)?;
    Ok(t.matmul(&t.t()?)?.flatten_all()?.to_vec1::<f64>()?)
}

/// How alike the A halves of different parents are: the mean, over units, of the largest |cosine| to another parent's unit. None with one
/// parent. Inner products are formed some rows at a time.
fn likeness(units: &[Unit], inputs: usize) -> Result<Option<f64>> {
    let n = units.len();
    let halves: Vec<f64> = units.iter().flat_map(|unit| &unit.values[..inputs]).copied().collect();
    let halves = Tensor::from_vec(halves, (n, inputs), &Device::Cpu)?;
    let (turned, sizes) = (halves.t()?.contiguous()?, halves.sqr()?.sum(1)?.to_vec1::<f64>()?);
    let (mut sum, mut count) = (0.0, 0usize);
    for first in (0..n).step_by(GRAM_ROWS) {
        let rows = GRAM_ROWS.min(n - first);
        let inner = halves.narrow(0, first, rows)?.matmul(&turned)?.flatten_all()?.to_vec1::<f64>()?;
        for (i, inner) in (first..).zip(inner.chunks_exact(n)) {
            let cosine = |j: usize| {
                let size = (sizes[i] * sizes[j]).sqrt();
                if size > 0.0 { (inner[j] / size).abs() } else { 0.0 }
            };
            let others = (0..n).filter(|j| units[*j].parent != units[i].parent);
            if let Some(largest) = others.map(cosine).reduce(f64::max) {
                (sum, count) = (sum + largest, count + 1);
            }
        }
    }
    Ok((count > 0).then(|| sum / count as f64))
}

fn lego(pool: &Pool, settings: &Settings) -> Result<Made> {
    let (outputs, inputs) = pool.sides()?;
    let mut all = Vec::new();
    for (parent, part) in pool.parts.iter().enumerate() {
        all.extend(units(part, parent, settings)?);
    }
    // One order whatever the order of parents and of ranks in them.
    let order = |a: &Unit, b: &Unit| {
        let pairs = a.values.iter().zip(&b.values);
        let first = pairs.map(|(a, b)| a.total_cmp(b)).find(|o| o.is_ne());
        first.unwrap_or(std::cmp::Ordering::Equal).then(a.weight.total_cmp(&b.weight))
    };
    all.sort_by(order);
    let mean = pool.ranks() as f64 / pool.parts.len().max(1) as f64;
    let k = settings.rank.unwrap_or(mean.round() as usize);
    if k == 0 || k > all.len() {
        return Err(Error::Refused(format!(
            "`{}` has {} units in all adapters together, of which rank {k} makes too many clusters; give a smaller rank",
            pool.path,
            all.len()
        )));
    }
    let features: Vec<Vec<f64>> = all.iter().map(|unit| feature(unit, inputs, settings.features)).collect();
    let (inner, weights) = (gram(&features)?, all.iter().map(|u| u.weight).collect::<Vec<_>>());
    let points = Points { gram: &inner, weights: &weights, flips: settings.gauge == Gauge::Balance };
    let seed = site_seed(settings.seed, &pool.path);
    let found = points.cluster(k, seed, settings.restarts, settings.iterations);
    let reference = settings.reference_rank.unwrap_or(mean);
    let output = if settings.output_reweighting { (reference / k as f64).sqrt() } else { 1.0 };
    let (mut a, mut b) = (Vec::with_capacity(k * inputs), vec![0f64; outputs * k]);
    let (mut sizes, mut factors) = (vec![0usize; k], Vec::with_capacity(k));
    for j in 0..k {
        let members: Vec<usize> = (0..all.len()).filter(|i| found.of[*i] == j).collect();
        sizes[j] = members.len();
        let (centre, factor) = centre(&all, &members, &found.signs, settings);
        factors.push(factor);
        a.extend_from_slice(&centre[..inputs]);
        centre[inputs..].iter().enumerate().for_each(|(row, v)| b[row * k + j] = v * output);
    }
    let a = Tensor::from_vec(a, (k, inputs), &Device::Cpu)?;
    let mut made = Made::new(&a, &Tensor::from_vec(b, (outputs, k), &Device::Cpu)?)?;
    sizes.sort_unstable_by(|a, b| b.cmp(a));
    let least = factors.iter().copied().fold(f64::INFINITY, f64::min);
    made.report.insert("cluster_sizes".into(), json!(sizes));
    made.report.insert("inertia".into(), json!(found.inertia));
    made.report.insert("smallest_factor".into(), json!(least));
    if let Some(likeness) = likeness(&all, inputs)? {
        made.report.insert("likeness".into(), json!(likeness));
    }
    Ok(made)
}

/// What a unit is clustered by.
fn feature(unit: &Unit, inputs: usize, features: Features) -> Vec<f64> {
    match features {
        Features::Raw => unit.values.clone(),
        Features::Halves => {
            let (a, b) = unit.values.split_at(inputs);
            let one = |half: &[f64]| {
                let size = length(half);
                half.iter().map(|v| if size > 0.0 { v / size } else { 0.0 }).collect::<Vec<_>>()
            };
            [one(a), one(b)].concat()
        }
    }
}

/// The weighted mean of raw members, brought back to their mean norm; and the factor that does that.
fn centre(all: &[Unit], members: &[usize], signs: &[f64], settings: &Settings) -> (Vec<f64>, f64) {
    let width = all.first().map_or(0, |unit| unit.values.len());
    let mass: f64 = members.iter().map(|i| all[*i].weight).sum();
    let (mut mean, mut size) = (vec![0f64; width], 0.0);
    for i in members {
        let share = all[*i].weight / mass;
        mean.iter_mut().zip(&all[*i].values).for_each(|(mean, v)| *mean += share * signs[*i] * v);
        size += share * norm(&all[*i].values, settings.norm);
    }
    let factor = match settings.parameter_reweighting && members.len() > 1 {
        true => size / norm(&mean, settings.norm).max(1e-12),
        false => 1.0,
    };
    mean.iter_mut().for_each(|v| *v *= factor);
    (mean, factor)
}
