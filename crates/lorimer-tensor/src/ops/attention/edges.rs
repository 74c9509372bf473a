//! Attention maps as graphs: of each query the sums of its weights over all heads, the large ones kept as edges. The map is
//! formed a row at a time and never kept.
//!
//! A query's sums depend on its own numbers and its keys' only, added in one order: whatever is beside it in a batch, a query has the same edges.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::eight_bits::Rounded;
use super::pool::{KeyDtype, KeyPool};
use super::{Attention, AttentionForm, BLOCK, Segment};
use crate::kernels::real::Real;
use crate::kernels::shared::Strides;
use crate::kernels::simd::{softmax, sum2};
use crate::kernels::slices::{product, with_slices};
use crate::kernels::wide::wide;

/// Which keys may be at the end of an edge. None of them comes after the query.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EdgeKeys {
    /// All that the query sees.
    #[default]
    All,
    /// All but the first key of the sequence, unless it is the query's own.
    WithoutFirst,
    /// The query's own.
    Own,
}

/// Which sums are edges.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EdgeRule {
    /// Those above this. The sums of a row add up to the number of heads, so a row has at most heads / `above` edges.
    pub above: f64,
    /// Of these keys.
    pub keys: EdgeKeys,
}

/// Edges from queries to the keys that they attend to.
#[derive(Clone, Debug)]
pub struct Edges {
    /// Where the edges of each query row begin, and their number at the end: (rows + 1).
    pub offsets: Arc<[usize]>,
    /// The key row of each edge, ascending in positions within a query.
    pub columns: Arc<[usize]>,
    /// min(1, Σ over heads of the softmax weight) of each edge (edges).
    pub sums: Tensor,
}

impl Edges {
    /// The edges with other numbers for their key rows.
    pub fn with_columns(self, columns: impl Iterator<Item = usize>) -> Self {
        Self { columns: columns.collect(), ..self }
    }
}

/// The edges of attention's map: of `q` (rows, heads·d) over `k` (key rows, kv_heads·d), both f32 or f64. Gradients of the sums go to `q` and `k`;
/// which sums are edges has none, nor have sums of 1 or more.
pub fn attention_edges(
    (q, k): (&Tensor, &Tensor),
    segments: &[Segment],
    form: &AttentionForm,
    rule: EdgeRule,
) -> Result<Edges> {
    let (op, edges) = find_edges((q, k), segments, form, rule)?;
    let sums = q.contiguous()?.apply_op2(&k.contiguous()?, op)?;
    Ok(Edges { sums, ..edges })
}

/// [`attention_edges`] over keys that lie in a pool, without gradients. `q` f32; the segments' keys, and the edges' columns, are rows of the pool.
pub fn edges_in_pool(
    q: &Tensor,
    pool: KeyPool<'_>,
    segments: &[Segment],
    form: &AttentionForm,
    rule: EdgeRule,
) -> Result<Edges> {
    let shapes = (q.dims2()?, (pool.rows(form.head_dim)?, pool.width));
    let attention = Attention { kv_stride: pool.stride, ..Attention::of_shapes(shapes, segments, form)? };
    let rows = q.dim(0)?;
    let found = |q: &[f32]| match pool.dtype {
        KeyDtype::F32 => attention.edges(q, &attention.scores_of(pool.numbers), rows, rule),
        KeyDtype::Int8 => {
            let (keys, scale) = (Rounded::new(pool.numbers, &pool, form.head_dim), form.scale as f32);
            let scores =
                |q: &[f32], places: &[usize], head: usize, p: &mut [f32]| keys.scores(q, (places, head), scale, p);
            attention.edges(q, &scores, rows, rule)
        }
    };
    let (offsets, columns, sums) = with_slices([q], |[q]: [&[f32]; 1]| Ok(found(q)))?;
    let count = columns.len();
    Ok(Edges { offsets: offsets.into(), columns: columns.into(), sums: Tensor::from_vec(sums, count, q.device())? })
}

/// The edges, their sums without gradients, and the operation that gives these sums with them.
pub(crate) fn find_edges(
    (q, k): (&Tensor, &Tensor),
    segments: &[Segment],
    form: &AttentionForm,
    rule: EdgeRule,
) -> Result<(EdgeSums, Edges)> {
    fn run<T: Real>(attention: Attention, (q, k): (&Tensor, &Tensor), rule: EdgeRule) -> Result<(EdgeSums, Edges)> {
        let rows = q.dim(0)?;
        let (offsets, columns, sums) =
            with_slices([q, k], |[q, k]: [&[T]; 2]| Ok(attention.edges(q, &attention.scores_of(k), rows, rule)))?;
        let (offsets, columns): (Arc<[usize]>, Arc<[usize]>) = (offsets.into(), columns.into());
        let values = Tensor::from_vec(sums, columns.len(), q.device())?;
        let op = EdgeSums { attention, offsets: offsets.clone(), columns: columns.clone(), values: values.clone() };
        Ok((op, Edges { offsets, columns, sums: values }))
    }
    let attention = Attention::of_shapes((q.dims2()?, k.dims2()?), segments, form)?;
    match q.dtype() {
        DType::F64 => run::<f64>(attention, (q, k), rule),
        _ => run::<f32>(attention, (q, k), rule),
    }
}

/// What gives the scaled products of one query with the keys of a head at some rows: of (query, rows, key head), into the last.
type Scores<'a, T> = dyn Fn(&[T], &[usize], usize, &mut [T]) + Sync + 'a;

impl Attention {
    /// Where a query stands among its segment's keys.
    fn position(&self, s: &Segment, row: usize) -> usize {
        (row + s.key_count()).saturating_sub(s.q_len)
    }

    /// The scores of one query over keys that are where they are: see [`Scores`].
    fn scores_of<T: Real>(&self, k: &[T]) -> impl Fn(&[T], &[usize], usize, &mut [T]) + Sync {
        let (d, scale) = (self.form.head_dim, T::from_f64(self.form.scale));
        move |q, places, head, p| {
            wide!({
                for (p, &place) in p.iter_mut().zip(places) {
                    *p = sum2(q, &k[place * self.kv_stride + head * d..][..d], |a, b| a * b) * scale;
                }
            });
        }
    }

    /// The edges of all rows: offsets, key rows, and sums bounded by 1.
    fn edges<T: Real>(
        &self,
        q: &[T],
        scores: &Scores<'_, T>,
        rows: usize,
        rule: EdgeRule,
    ) -> (Vec<usize>, Vec<usize>, Vec<T>) {
        let places: Vec<Vec<usize>> = self.segments.iter().map(|s| s.rows().collect()).collect();
        let tasks: Vec<(usize, usize)> =
            self.segments.iter().enumerate().flat_map(|(i, s)| (0..s.q_len).map(move |row| (i, row))).collect();
        let found: Vec<Vec<(usize, T)>> = tasks
            .par_iter()
            .map(|&(i, row)| self.row_edges(q, scores, (&self.segments[i], &places[i]), row, rule))
            .collect();
        let mut counts = vec![0; rows];
        for (&(i, row), edges) in tasks.iter().zip(&found) {
            counts[self.segments[i].q_start + row] = edges.len();
        }
        let mut offsets = Vec::with_capacity(rows + 1);
        offsets.push(0);
        counts.iter().for_each(|n| offsets.push(offsets[offsets.len() - 1] + n));
        let (columns, sums) = found.into_iter().flatten().unzip();
        (offsets, columns, sums)
    }

    /// The edges of one query.
    fn row_edges<T: Real>(
        &self,
        q: &[T],
        scores: &Scores<'_, T>,
        (s, places): (&Segment, &[usize]),
        row: usize,
        rule: EdgeRule,
    ) -> Vec<(usize, T)> {
        let (d, own) = (self.form.head_dim, self.position(s, row));
        let seen = self.form.seen(own, places.len());
        let (mut sums, mut p) = (vec![T::zero(); seen.len()], vec![T::zero(); seen.len()]);
        for head in 0..self.heads {
            let q = &q[(s.q_start + row) * self.q_width() + head * d..][..d];
            scores(q, &places[seen.clone()], self.key_column(head) / d, &mut p);
            if let Some(cap) = self.form.cap.map(T::from_f64) {
                p.iter_mut().for_each(|p| *p = (*p / cap).tanh() * cap);
            }
            softmax(&mut p);
            sums.iter_mut().zip(&p).for_each(|(sum, &p)| *sum += p);
        }
        let may = |position: usize| match rule.keys {
            EdgeKeys::All => position <= own,
            EdgeKeys::WithoutFirst => position <= own && (position > 0 || own == 0),
            EdgeKeys::Own => position == own,
        };
        let all = seen.clone().zip(sums).filter(|&(position, sum)| may(position) && sum.to_f64() > rule.above);
        all.map(|(position, sum)| (places[position], if sum < T::one() { sum } else { T::one() })).collect()
    }

    /// From the gradients of the edges' sums to those of q and k: dS = P ∘ (dA − rowsum(P ∘ dA)) · scale (times the cap's slope), with dA the
    /// same for every head.
    fn edges_backward<T: Real>(&self, op: &EdgeSums, q: &[T], k: &[T], sums: &[T], g: &[T]) -> [Vec<T>; 2] {
        let (q_width, kv_width) = (self.q_width(), self.kv_heads * self.form.head_dim);
        let (d, group) = (self.form.head_dim, self.heads / self.kv_heads);
        let run = |(i, kv): (usize, usize)| {
            let s = &self.segments[i];
            let (k, k_stride) = s.key_rows(k, kv_width, kv * d, d);
            let places: std::collections::HashMap<usize, usize> =
                s.rows().enumerate().map(|(at, row)| (row, at)).collect();
            let (mut dq, mut dk) = (vec![T::zero(); s.q_len * group * d], vec![T::zero(); s.key_count() * d]);
            for from in (0..s.q_len).step_by(BLOCK) {
                let n = BLOCK.min(s.q_len - from);
                let wanted = |row: usize| {
                    op.edges_of(s.q_start + from + row).filter(|&e| sums[e] < T::one() && g[e] != T::zero())
                };
                if (0..n).all(|row| wanted(row).next().is_none()) {
                    continue;
                }
                for h in 0..group {
                    let head = kv * group + h;
                    let super::Weights { p, first, keys, slope } = self.weights(q, (&k, k_stride), (s, head), from, n);
                    let mut ds = vec![T::zero(); n * keys];
                    for (row, (ds, p)) in ds.chunks_exact_mut(keys).zip(p.chunks_exact(keys)).enumerate() {
                        let mut along = T::zero();
                        for e in wanted(row) {
                            let at = places[&op.columns[e]] - first;
                            ds[at] = g[e];
                            along += p[at] * g[e];
                        }
                        let scale = T::from_f64(self.form.scale);
                        ds.iter_mut().zip(p).for_each(|(ds, &p)| *ds = p * (*ds - along) * scale);
                    }
                    if let Some(slope) = slope {
                        ds.iter_mut().zip(slope).for_each(|(ds, slope)| *ds *= slope);
                    }
                    let (one, rows, turned) = (T::one(), Strides(keys, 1), Strides(1, keys));
                    let out = &mut dq[(from * group + h) * d..];
                    product(
                        (n, d, keys),
                        out,
                        Strides(group * d, 1),
                        false,
                        &ds,
                        rows,
                        &k[first * k_stride..],
                        Strides(k_stride, 1),
                        one,
                        false,
                    );
                    let q = &q[(s.q_start + from) * q_width + head * d..];
                    product(
                        (keys, d, n),
                        &mut dk[first * d..],
                        Strides(d, 1),
                        true,
                        &ds,
                        turned,
                        q,
                        Strides(q_width, 1),
                        one,
                        false,
                    );
                }
            }
            (dq, dk)
        };
        let tasks: Vec<_> = (0..self.segments.len()).flat_map(|i| (0..self.kv_heads).map(move |kv| (i, kv))).collect();
        let parts: Vec<_> = tasks.par_iter().map(|&task| run(task)).collect();
        let (mut dq, mut dk) = (vec![T::zero(); q.len()], vec![T::zero(); k.len()]);
        // Segments may share key rows, so the sums are formed here, in a fixed order.
        for ((i, kv), (from_q, from_k)) in tasks.into_iter().zip(parts) {
            let s = &self.segments[i];
            for (row, part) in from_q.chunks_exact(group * d).enumerate() {
                dq[(s.q_start + row) * q_width + kv * group * d..][..group * d].copy_from_slice(part);
            }
            for (row, part) in s.rows().zip(from_k.chunks_exact(d)) {
                dk[row * kv_width + kv * d..][..d].iter_mut().zip(part).for_each(|(sum, &v)| *sum += v);
            }
        }
        [dq, dk]
    }
}

/// The sums of edges that are known already, as a function of q and k.
pub(crate) struct EdgeSums {
    attention: Attention,
    offsets: Arc<[usize]>,
    columns: Arc<[usize]>,
    values: Tensor,
}

impl EdgeSums {
    fn edges_of(&self, row: usize) -> std::ops::Range<usize> {
        self.offsets[row]..self.offsets[row + 1]
    }
}

impl CustomOp2 for EdgeSums {
    fn name(&self) -> &'static str {
        "attention edges"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let storage = match self.values.dtype() {
            DType::F64 => CpuStorage::F64(self.values.to_vec1()?),
            _ => CpuStorage::F32(self.values.to_vec1()?),
        };
        Ok((storage, self.values.shape().clone()))
    }

    fn bwd(&self, q: &Tensor, k: &Tensor, _: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        fn run<T: Real>(op: &EdgeSums, q: &Tensor, k: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
            let [dq, dk] = with_slices([q, k, &op.values, g], |[q, k, sums, g]: [&[T]; 4]| {
                Ok(op.attention.edges_backward(op, q, k, sums, g))
            })?;
            Ok((Some(Tensor::from_vec(dq, q.shape(), q.device())?), Some(Tensor::from_vec(dk, k.shape(), k.device())?)))
        }
        match q.dtype() {
            DType::F64 => run::<f64>(self, q, k, g),
            _ => run::<f32>(self, q, k, g),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Mask;
    use super::*;

    /// A row, the columns of its edges and their sums.
    type Written = (usize, Vec<usize>, Vec<f64>);
    use crate::check::{gradient_matches, random};

    /// The map of a segment, summed over heads: rows of (query row, key rows, sums).
    fn maps(q: &Tensor, k: &Tensor, segments: &[Segment], form: &AttentionForm) -> Result<Vec<Written>> {
        let (width, kv_width) = (q.dim(1)?, k.dim(1)?);
        let (heads, d) = (width / form.head_dim, form.head_dim);
        let (q, k) = (q.to_dtype(DType::F64)?.to_vec2::<f64>()?, k.to_dtype(DType::F64)?.to_vec2::<f64>()?);
        let mut all = Vec::new();
        for s in segments {
            let keys: Vec<usize> = s.rows().collect();
            for i in 0..s.q_len {
                let seen = form.seen(keys.len() + i - s.q_len, keys.len());
                let mut sums = vec![0.0; seen.len()];
                for h in 0..heads {
                    let kv = h / (heads / (kv_width / d)) * d;
                    let score = |key: &usize| -> f64 {
                        let dot: f64 = (0..d).map(|c| q[s.q_start + i][h * d + c] * k[*key][kv + c]).sum();
                        let score = dot * form.scale;
                        form.cap.map_or(score, |cap| (score / cap).tanh() * cap).exp()
                    };
                    let weights: Vec<f64> = keys[seen.clone()].iter().map(score).collect();
                    let total: f64 = weights.iter().sum();
                    sums.iter_mut().zip(&weights).for_each(|(sum, w)| *sum += w / total);
                }
                all.push((s.q_start + i, keys[seen].to_vec(), sums));
            }
        }
        Ok(all)
    }

    fn segments() -> [Segment; 3] {
        [
            Segment { q_start: 0, q_len: 70, keys: vec![(0, 70)] },
            Segment { q_start: 70, q_len: 2, keys: vec![(0, 20), (70, 2)] },
            Segment { q_start: 72, q_len: 7, keys: vec![(72, 9)] },
        ]
    }

    const RULE: EdgeRule = EdgeRule { above: 0.08, keys: EdgeKeys::All };

    fn inputs(dtype: DType) -> Result<(Tensor, Tensor)> {
        Ok(((random((79, 24), 1, dtype)? * 3.0)?, (random((81, 8), 2, dtype)? * 3.0)?))
    }

    #[test]
    fn edges_are_the_large_sums_of_the_map() -> Result<()> {
        for (mask, cap) in [(Mask::Causal, None), (Mask::Window(3), None), (Mask::Causal, Some(1.5))] {
            let form = AttentionForm { mask, cap, ..AttentionForm::causal(4, 0.5) };
            let (q, k) = inputs(DType::F64)?;
            let whole = maps(&q, &k, &segments(), &form)?;
            for keys in [EdgeKeys::All, EdgeKeys::WithoutFirst, EdgeKeys::Own] {
                let edges = attention_edges((&q, &k), &segments(), &form, EdgeRule { keys, ..RULE })?;
                let sums = edges.sums.to_vec1::<f64>()?;
                let mut number = 0;
                for (row, places, expected) in &whole {
                    let found: Vec<(usize, f64)> =
                        (edges.offsets[*row]..edges.offsets[row + 1]).map(|e| (edges.columns[e], sums[e])).collect();
                    let start =
                        segments().into_iter().find(|s| (s.q_start..s.q_start + s.q_len).contains(row)).unwrap();
                    let first = start.keys[0].0;
                    let own = places[places.len() - 1];
                    let may = |key: usize| match keys {
                        EdgeKeys::All => true,
                        EdgeKeys::WithoutFirst => key != first || key == own,
                        EdgeKeys::Own => key == own,
                    };
                    let large: Vec<(usize, f64)> = places
                        .iter()
                        .copied()
                        .zip(expected.iter().copied())
                        .filter(|&(key, s)| s > RULE.above && may(key))
                        .collect();
                    assert_eq!(
                        found.iter().map(|e| e.0).collect::<Vec<_>>(),
                        large.iter().map(|e| e.0).collect::<Vec<_>>()
                    );
                    found.iter().zip(&large).for_each(|(a, b)| assert!((a.1 - b.1.min(1.0)).abs() < 1e-12));
                    assert!(found.len() as f64 <= 6.0 / RULE.above);
                    number += found.len();
                }
                assert_eq!(number, edges.columns.len());
            }
        }
        Ok(())
    }

    /// In f32 a query has the same edges with the same bits alone, among others, and with its keys in a pool.
    #[test]
    fn a_query_has_the_same_edges_whatever_is_beside_it() -> Result<()> {
        let form = AttentionForm::causal(4, 0.5);
        let (q, k) = inputs(DType::F32)?;
        let all = attention_edges((&q, &k), &segments(), &form, RULE)?;
        let sums = all.sums.to_vec1::<f32>()?;
        let numbers = k.flatten_all()?.to_vec1::<f32>()?;
        for s in segments() {
            for i in 0..s.q_len {
                let mut keys = s.keys.clone();
                keys.last_mut().unwrap().1 -= s.q_len - 1 - i;
                let one = [Segment { q_start: 0, q_len: 1, keys }];
                let row = q.narrow(0, s.q_start + i, 1)?;
                let span = all.offsets[s.q_start + i]..all.offsets[s.q_start + i + 1];
                let alone = attention_edges((&row, &k), &one, &form, RULE)?;
                let pool = KeyPool { numbers: &numbers, stride: 8, width: 8, values_at: 0, dtype: KeyDtype::F32 };
                let pooled = edges_in_pool(&row, pool, &one, &form, RULE)?;
                for found in [alone, pooled] {
                    assert_eq!(found.columns[..], all.columns[span.clone()]);
                    assert_eq!(found.sums.to_vec1::<f32>()?, sums[span.clone()]);
                }
            }
        }
        Ok(())
    }

    /// Away from the threshold, where sums are clamped and where not, with keys that two segments share, with a cap and in a window.
    #[test]
    fn gradients_equal_central_differences() -> Result<()> {
        let segments = [
            Segment { q_start: 0, q_len: 4, keys: vec![(0, 4)] },
            Segment { q_start: 4, q_len: 2, keys: vec![(0, 2), (4, 2)] },
        ];
        let mut all = 0;
        for (mask, cap) in [(Mask::Causal, None), (Mask::Window(2), None), (Mask::Causal, Some(0.9))] {
            let form = AttentionForm { mask, cap, ..AttentionForm::causal(4, 0.5) };
            let (q, k) = ((random((6, 16), 3, DType::F64)? * 2.0)?, (random((6, 8), 4, DType::F64)? * 2.0)?);
            let (mut clamped, mut free) = (0, 0);
            for (_, _, sums) in maps(&q, &k, &segments, &form)? {
                sums.iter().for_each(|s| assert!((s - 0.4).abs() > 1e-3 && (s - 1.0).abs() > 1e-3));
                clamped += sums.iter().filter(|s| **s > 1.0).count();
                free += sums.iter().filter(|s| **s > 0.4 && **s < 1.0).count();
            }
            all += free;
            assert!(clamped > 2);
            let rule = EdgeRule { above: 0.4, keys: EdgeKeys::All };
            gradient_matches(&q, |q| Ok(attention_edges((q, &k), &segments, &form, rule)?.sums))?;
            gradient_matches(&k, |k| Ok(attention_edges((&q, k), &segments, &form, rule)?.sums))?;
        }
        assert!(all > 4);
        Ok(())
    }
}
