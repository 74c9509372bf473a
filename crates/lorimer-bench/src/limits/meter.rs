//! What a forward's attentions are like, head by head: the norms by which arXiv 2406.03136 tells what a gradient may cost.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Result, Tensor};
use lorimer_model::{Adaptation, AttentionCall, BlockScope, LastPass, PassDone, Point, Projection, Site};
use lorimer_tensor::{Gradients, Ops};
use rayon::prelude::*;

/// Query rows whose scores are formed at a time.
const TILE: usize = 256;

/// One projection of queries, keys and values.
const FUSED: &str = "qkv_proj";
/// Projections whose change is measured.
const MEASURED: [&str; 3] = ["q_proj", "k_proj", FUSED];

/// Norms of one head: the largest absolute entry of each matrix, after rotation.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct HeadNorms {
    /// Of the queries X (W_Q + s B A), rotated.
    pub q: f64,
    /// Of the keys, rotated.
    pub k: f64,
    /// Of the values.
    pub v: f64,
    /// τ: the largest |β q·k| among pairs that are seen.
    pub tau: f64,
    /// The same with the mean key subtracted from all.
    pub tau_centred: f64,
    /// Of what adapters add to the queries before rotation, s X B A.
    pub q_change: f64,
    /// Of what adapters add to the keys.
    pub k_change: f64,
}

/// What was found, by layer and head.
#[derive(Debug, Default)]
pub struct Found {
    norms: Mutex<BTreeMap<usize, Vec<HeadNorms>>>,
    /// Of a layer's projection of queries, of keys, or of both and values in one: the largest change of each column.
    changes: Mutex<BTreeMap<(usize, &'static str), Vec<f64>>>,
}

impl Found {
    /// Norms by layer and head.
    pub fn take(self) -> BTreeMap<usize, Vec<HeadNorms>> {
        self.norms.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An adaptation whose attentions are measured. Of several passes the last counts.
pub struct Meter<'a> {
    on: LastPass<'a>,
    found: &'a Found,
}

impl<'a> Meter<'a> {
    /// Of an adaptation.
    pub fn new(on: &'a dyn Adaptation, found: &'a Found) -> Self {
        Self { on: LastPass::Only(on), found }
    }
}

/// The largest absolute value of each column of (rows, columns).
fn columns(t: &Tensor) -> Result<Vec<f64>> {
    t.abs()?.max(0)?.to_dtype(DType::F64)?.to_vec1()
}

fn top(of: &[f64]) -> f64 {
    of.iter().copied().fold(0.0, f64::max)
}

/// τ of one head's queries and keys (L, d), over the pairs that a query sees.
fn largest_score(q: &Tensor, k: &Tensor, call: &AttentionCall<'_>) -> Result<f64> {
    let (rows, keys) = (q.dim(0)?, k.dim(0)?);
    let mut tau = 0f64;
    for first in (0..rows).step_by(TILE) {
        let count = TILE.min(rows - first);
        let scores =
            q.narrow(0, first, count)?.matmul(&k.t()?)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        for (i, row) in scores.chunks_exact(keys.max(1)).enumerate() {
            let seen = call.form.seen(first + i, keys);
            let own = row[seen].iter().fold(0f32, |top, s| top.max(s.abs()));
            tau = tau.max(f64::from(own) * call.form.scale.abs());
        }
    }
    Ok(tau)
}

/// The norms of all heads of one sequence's attention.
fn measure(call: &AttentionCall<'_>) -> Result<Vec<HeadNorms>> {
    let d = call.form.head_dim;
    let (heads, kv_heads) = (call.q.dim(1)? / d.max(1), call.k.dim(1)? / d.max(1));
    if call.segments.len() != 1 || call.q.dim(0)? != call.k.dim(0)? || kv_heads == 0 || !heads.is_multiple_of(kv_heads)
    {
        candle_core::bail!("norms are those of one sequence without a cache");
    }
    let [q, k, v] = [&call.q, &call.k, &call.v].map(Tensor::detach);
    let maxima = [columns(&q)?, columns(&k)?, columns(&v)?];
    let part = |t: &Tensor, head: usize| t.narrow(1, head * d, d)?.contiguous();
    let of = |head: usize| -> Result<HeadNorms> {
        let shared = head / (heads / kv_heads);
        let (q, k) = (part(&q, head)?, part(&k, shared)?);
        let centred = k.broadcast_sub(&k.mean_keepdim(0)?)?;
        let most = |which: usize, head: usize| top(&maxima[which][head * d..(head + 1) * d]);
        Ok(HeadNorms {
            q: most(0, head),
            k: most(1, shared),
            v: most(2, shared),
            tau: largest_score(&q, &k, call)?,
            tau_centred: largest_score(&q, &centred, call)?,
            ..HeadNorms::default()
        })
    };
    (0..heads).into_par_iter().map(of).collect()
}

impl Adaptation for Meter<'_> {
    fn passes(&self) -> usize {
        self.on.passes()
    }

    fn pass<'s>(&'s self, number: usize, before: Option<&PassDone<'_>>) -> Result<Box<dyn Adaptation + 's>> {
        Ok(Box::new(Meter { on: LastPass::After(self.on.pass(number, before)?), found: self.found }))
    }

    fn ops(&self) -> Ops<'_> {
        self.on.ops()
    }

    fn project(&self, site: &Site, base: &Projection, x: &Tensor) -> Result<Tensor> {
        let mut all = self.project_all(&[(site, base)], x)?;
        all.pop().ok_or_else(|| candle_core::Error::Msg("no projection".into()))
    }

    fn project_all(&self, targets: &[(&Site, &Projection)], x: &Tensor) -> Result<Vec<Tensor>> {
        let all = self.on.project_all(targets, x)?;
        for ((site, base), y) in targets.iter().zip(&all) {
            let Some(role) = MEASURED.into_iter().find(|role| *role == site.role) else { continue };
            if let Some(layer) = site.layer.filter(|_| self.on.touches(site)) {
                let change = columns(&(y - base.forward(x)?)?)?;
                self.found.changes.lock().unwrap_or_else(PoisonError::into_inner).insert((layer, role), change);
            }
        }
        Ok(all)
    }

    fn attend(&self, point: Point, call: AttentionCall<'_>, block: &mut BlockScope<'_>) -> Result<Tensor> {
        let (layer, d) = (block.layer(), call.form.head_dim);
        let mut norms = measure(&call)?;
        let changes = self.found.changes.lock().unwrap_or_else(PoisonError::into_inner);
        let groups = norms.len() / (call.k.dim(1)? / d).max(1);
        // Of one fused projection the first rows are queries, and those after them keys.
        let after = call.q.dim(1)?;
        let of = |role: &'static str, begin: usize, head: usize| {
            let found =
                |role, begin: usize| Some(top(changes.get(&(layer, role))?.get(begin + head * d..)?.get(..d)?));
            found(role, 0).or_else(|| found(FUSED, begin)).unwrap_or(0.0)
        };
        for (head, own) in norms.iter_mut().enumerate() {
            (own.q_change, own.k_change) = (of("q_proj", 0, head), of("k_proj", after, head / groups.max(1)));
        }
        drop(changes);
        self.found.norms.lock().unwrap_or_else(PoisonError::into_inner).insert(layer, norms);
        self.on.attend(point, call, block)
    }

    fn attended(&self, h: Tensor, block: &mut BlockScope<'_>) -> Result<Tensor> {
        self.on.attended(h, block)
    }

    fn unit<'s>(&'s self, layer: usize, x: &Tensor) -> Result<Option<Box<dyn Adaptation + 's>>> {
        self.on.unit(layer, x)
    }

    fn unit_gradients(&self, layer: usize, gradients: &mut Gradients) -> Result<()> {
        self.on.unit_gradients(layer, gradients)
    }

    fn hidden(&self, point: Point, h: Tensor) -> Result<Tensor> {
        self.on.hidden(point, h)
    }

    fn touches(&self, site: &Site) -> bool {
        self.on.touches(site)
    }

    fn parameter(&self, path: &str) -> Option<&Tensor> {
        self.on.parameter(path)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use lorimer_model::Frozen;
    use lorimer_tensor::ops::attention::chained::{Head, centred};
    use lorimer_tensor::{AttentionForm, Mask, Segment};
    use rand::{Rng, SeedableRng};

    use super::*;

    /// Norms of heads that share keys are those of plain loops, and only pairs that are seen count.
    #[test]
    fn norms_are_those_of_plain_loops() {
        let (rows, d, heads, kv) = (300, 4, 4, 2);
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(2);
        let mut draw = |width: usize| {
            let data: Vec<f64> = (0..rows * width).map(|_| rng.random_range(-2.0..2.0)).collect();
            Tensor::from_vec(data, (rows, width), &Device::Cpu).unwrap()
        };
        let (q, k, v) = (draw(heads * d), draw(kv * d), draw(kv * d));
        for mask in [Mask::Full, Mask::Causal, Mask::Window(3)] {
            let form = AttentionForm { head_dim: d, scale: 0.5, mask, cap: None };
            let segments = [Segment::plain(0, rows)];
            let call = AttentionCall { q: q.clone(), k: k.clone(), v: v.clone(), segments: &segments, form };
            let found = Found::default();
            let mut scope = BlockScope::new(3, true, None);
            let out = Meter::new(&Frozen, &found).attend(Point::Layer(3), call, &mut scope).unwrap();
            assert_eq!(out.dims(), [rows, heads * d]);
            let norms = found.take().remove(&3).unwrap();
            for (head, own) in norms.iter().enumerate() {
                let part = |t: &Tensor, h: usize| {
                    t.narrow(1, h * d, d)
                        .unwrap()
                        .contiguous()
                        .unwrap()
                        .flatten_all()
                        .unwrap()
                        .to_vec1::<f64>()
                        .unwrap()
                };
                let (q, k) = (part(&q, head), part(&k, head / 2));
                let largest = |t: &[f64]| t.iter().fold(0f64, |top, v| top.max(v.abs()));
                assert_eq!((own.q, own.k, own.v), (largest(&q), largest(&k), largest(&part(&v, head / 2))));
                let tau = |k: &[f64]| {
                    let mut tau = 0f64;
                    for i in 0..rows {
                        for j in form.seen(i, rows) {
                            let s: f64 = q[i * d..][..d].iter().zip(&k[j * d..][..d]).map(|(a, b)| a * b).sum();
                            tau = tau.max(s.abs() * 0.5);
                        }
                    }
                    tau
                };
                let keys = centred(&k, d);
                assert!((own.tau - tau(&k)).abs() < 1e-5 && (own.tau_centred - tau(&keys)).abs() < 1e-5);
                if mask == Mask::Full {
                    let head = Head { q: &q, k: &k, v: &k, width: d, scale: 0.5 };
                    assert!((own.tau - head.largest_score()).abs() < 1e-5);
                }
            }
        }
    }
}
