//! Attention with grouped heads over packed, variable-length segments: causal, in a sliding window, or of all keys; no `T × T` matrix is kept.

pub mod along;
mod backward;
pub mod causal;
pub mod chained;
pub mod edges;
pub mod eight_bits;
pub mod pool;
mod tiles;

use std::borrow::Cow;
use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor};

use self::pool::{KeyDtype, KeyPool};
use crate::kernels::real::Real;
use crate::kernels::shared::Strides;
use crate::kernels::simd::{softmax, sum2};
use crate::kernels::slices::{product, slice, with_slices};
use crate::kernels::wide::wide;

/// Query rows whose scores are formed at a time.
const BLOCK: usize = 64;

/// Which of a segment's keys a query sees. Positions are counted from the segment's first key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mask {
    /// Those up to its own position.
    #[default]
    Causal,
    /// The last so many up to its own position, that one included.
    Window(usize),
    /// All of them: attention in both directions, or to the keys of another sequence.
    Full,
}

/// How scores become an output: softmax over the keys that are seen of `cap · tanh(scale · q·k / cap)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionForm {
    /// Width of one head.
    pub head_dim: usize,
    /// Multiplies the products q·k.
    pub scale: f64,
    /// Which keys are seen.
    pub mask: Mask,
    /// The bound of scores (Gemma 2's soft cap); None for none.
    pub cap: Option<f64>,
}

impl AttentionForm {
    /// Causal attention without a cap.
    pub fn causal(head_dim: usize, scale: f64) -> Self {
        Self { head_dim, scale, mask: Mask::Causal, cap: None }
    }

    /// The keys that the query at a position sees, of `keys` in all.
    pub fn seen(&self, position: usize, keys: usize) -> std::ops::Range<usize> {
        match self.mask {
            Mask::Causal => 0..position + 1,
            Mask::Window(width) => (position + 1).saturating_sub(width.max(1))..position + 1,
            Mask::Full => 0..keys,
        }
    }
}

/// Queries of one sequence, or of a part of several, in a packed batch: the rows `q_start..q_start+q_len` see the key rows of
/// `keys` one after the other, of which the last `q_len` stand at the queries' own positions (what is before them comes
/// from a cache or from a prefix that several sequences share). Which of them a query sees says the [`Mask`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First query row.
    pub q_start: usize,
    /// Number of query rows.
    pub q_len: usize,
    /// Spans of key rows, each `(first row, number)`, in the order of positions; at least `q_len` rows in all, unless every query sees all.
    pub keys: Vec<(usize, usize)>,
}

impl Segment {
    /// A sequence without a cache: queries and keys are the same rows.
    pub fn plain(start: usize, len: usize) -> Self {
        Self { q_start: start, q_len: len, keys: vec![(start, len)] }
    }

    /// Number of keys that the last query sees.
    pub fn key_count(&self) -> usize {
        self.keys.iter().map(|&(_, n)| n).sum()
    }

    /// Its key rows in order.
    fn rows(&self) -> impl Iterator<Item = usize> {
        self.keys.iter().flat_map(|&(start, n)| start..start + n)
    }

    /// Columns `column..column+width` of this segment's key rows and the distance between two of them: where they are, or
    /// copied together if they lie in several spans.
    fn key_rows<'a, T: Real>(
        &self,
        rows: &'a [T],
        row_width: usize,
        column: usize,
        width: usize,
    ) -> (Cow<'a, [T]>, usize) {
        if let [(start, n)] = self.keys[..]
            && n > 0
        {
            return (Cow::Borrowed(&rows[start * row_width + column..][..(n - 1) * row_width + width]), row_width);
        }
        let mut out = Vec::with_capacity(self.key_count() * width);
        for row in self.rows() {
            let at = row * row_width + column;
            out.extend_from_slice(&rows[at..at + width]);
        }
        (Cow::Owned(out), width)
    }
}

/// Attention. `q` (rows, heads·d), `k` and `v` (key rows, kv_heads·d), all f32 or f64 → (rows, heads·d). Rows that no segment covers give
/// zero.
pub fn attention((q, k, v): (&Tensor, &Tensor, &Tensor), segments: &[Segment], form: &AttentionForm) -> Result<Tensor> {
    let op = Attention::new((q, k, v), segments, form)?;
    if !q.device().is_cpu() {
        return attention_reference((q, k, v), segments, form);
    }
    q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op)
}

/// [`attention`] over keys and values that lie in a pool. `q` (rows, heads·d) f32; the segments' keys are rows of the pool.
pub fn attention_in_pool(q: &Tensor, pool: KeyPool<'_>, segments: &[Segment], form: &AttentionForm) -> Result<Tensor> {
    let KeyPool { numbers, stride, width, values_at, dtype } = pool;
    let rows = pool.rows(form.head_dim)?;
    if values_at > rows {
        candle_core::bail!("attention: a pool of {rows} rows has no values {values_at} rows after its keys");
    }
    let values = &numbers[values_at * stride..];
    let shapes = (q.dims2()?, (rows - values_at, width));
    let op = Attention { kv_stride: stride, ..Attention::of_shapes(shapes, segments, form)? };
    let forward = |q: &[f32]| match dtype {
        KeyDtype::F32 => op.forward(q, numbers, values),
        KeyDtype::Int8 => op.forward_in_8_bits(q, &pool),
    };
    let y = with_slices([q], |[q]: [&[f32]; 1]| Ok(forward(q)))?;
    Tensor::from_vec(y, q.shape(), q.device())
}

/// The reference form out of plain candle operations, one segment and one head at a time.
pub fn attention_reference(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    segments: &[Segment],
    form: &AttentionForm,
) -> Result<Tensor> {
    let op = Attention::new((q, k, v), segments, form)?;
    let head_dim = form.head_dim;
    let mut outputs = Vec::new();
    for s in segments {
        let k_len = s.key_count();
        let row = |i: usize| {
            let seen = form.seen((i + k_len).saturating_sub(s.q_len), k_len);
            (0..k_len).map(move |j| if seen.contains(&j) { 0.0 } else { f64::NEG_INFINITY })
        };
        let mask: Vec<f64> = (0..s.q_len).flat_map(row).collect();
        let mask = Tensor::from_vec(mask, (s.q_len, k_len), q.device())?.to_dtype(q.dtype())?;
        let index: Vec<u32> = s.keys.iter().flat_map(|&(start, n)| start as u32..(start + n) as u32).collect();
        let index = Tensor::from_vec(index, k_len, q.device())?;
        let (k, v) = (k.index_select(&index, 0)?, v.index_select(&index, 0)?);
        let mut heads = Vec::new();
        for h in 0..op.heads {
            let kv = h / (op.heads / op.kv_heads) * head_dim;
            let q = q.narrow(0, s.q_start, s.q_len)?.narrow(1, h * head_dim, head_dim)?;
            let k = k.narrow(1, kv, head_dim)?;
            let v = v.narrow(1, kv, head_dim)?;
            let mut scores = (q.contiguous()?.matmul(&k.t()?.contiguous()?)? * form.scale)?;
            if let Some(cap) = form.cap {
                scores = ((scores / cap)?.tanh()? * cap)?;
            }
            let scores = (scores + &mask)?;
            let weights = scores.broadcast_sub(&scores.max_keepdim(1)?)?.exp()?;
            let weights = weights.broadcast_div(&weights.sum_keepdim(1)?)?;
            heads.push(weights.matmul(&v.contiguous()?)?);
        }
        outputs.push(Tensor::cat(&heads, 1)?);
    }
    Tensor::cat(&outputs, 0)
}

pub(crate) struct Attention {
    segments: Vec<Segment>,
    heads: usize,
    kv_heads: usize,
    /// Numbers from one key row to the next.
    kv_stride: usize,
    form: AttentionForm,
    /// The logarithm of each row's sum of exponentials (rows, heads), from the forward on, for the backward.
    logs: OnceLock<Vec<f64>>,
}

/// Softmax weights of some query rows over some of their segment's keys.
struct Weights<T> {
    /// (rows, keys).
    p: Vec<T>,
    /// The first key, of the segment's, and how many there are.
    first: usize,
    keys: usize,
    /// With a cap: what it does to the gradient of each score.
    slope: Option<Vec<T>>,
}

impl Attention {
    pub(crate) fn new(
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        segments: &[Segment],
        form: &AttentionForm,
    ) -> Result<Self> {
        if v.dims2()? != k.dims2()? {
            candle_core::bail!("attention: k {:?} and v {:?} differ", k.shape(), v.shape());
        }
        Self::of_shapes((q.dims2()?, k.dims2()?), segments, form)
    }

    fn of_shapes(
        ((rows, q_width), (k_rows, kv_width)): ((usize, usize), (usize, usize)),
        segments: &[Segment],
        form: &AttentionForm,
    ) -> Result<Self> {
        let head_dim = form.head_dim;
        let fits = head_dim > 0
            && q_width % head_dim == 0
            && kv_width % head_dim == 0
            && kv_width > 0
            && q_width % kv_width == 0;
        if !fits {
            candle_core::bail!(
                "attention: q ({rows}, {q_width}) and k ({k_rows}, {kv_width}) do not divide into heads of {head_dim}"
            );
        }
        let least = |s: &Segment| if form.mask == Mask::Full { s.q_len.min(1) } else { s.q_len };
        let mut end = 0;
        for s in segments {
            // Queries in order and apart from each other, so that parallel tasks write to disjoint rows.
            let inside = s.keys.iter().all(|&(start, n)| start + n <= k_rows);
            if s.q_start < end || s.q_start + s.q_len > rows || !inside || s.key_count() < least(s) {
                candle_core::bail!("attention: segment {s:?} does not fit {rows} query rows and {k_rows} key rows");
            }
            end = s.q_start + s.q_len;
        }
        Ok(Self {
            segments: segments.to_vec(),
            heads: q_width / head_dim,
            kv_heads: kv_width / head_dim,
            kv_stride: kv_width,
            form: *form,
            logs: OnceLock::new(),
        })
    }

    fn q_width(&self) -> usize {
        self.heads * self.form.head_dim
    }

    /// Softmax weights of query rows `from..from+n` of a segment and head. `k` holds the segment's keys of the head, each `stride` after the
    /// one before.
    fn weights<T: Real>(
        &self,
        q: &[T],
        (k, stride): (&[T], usize),
        (s, head): (&Segment, usize),
        from: usize,
        n: usize,
    ) -> Weights<T> {
        let (q_width, d) = (self.q_width(), self.form.head_dim);
        let count = s.key_count();
        // Where a query stands among the keys; of no meaning where all of them are seen.
        let position = |row: usize| (from + row + count).saturating_sub(s.q_len);
        let (first, end) = (self.form.seen(position(0), count).start, self.form.seen(position(n - 1), count).end);
        let keys = end - first;
        let mut p = vec![T::zero(); n * keys];
        let (q, k) = (&q[(s.q_start + from) * q_width + head * d..], &k[first * stride..]);
        let (shape, scale) = ((n, keys, d), T::from_f64(self.form.scale));
        product(shape, &mut p, Strides(keys, 1), false, q, Strides(q_width, 1), k, Strides(1, stride), scale, false);
        let slope = self.form.cap.map(|cap| {
            let cap = T::from_f64(cap);
            let bent = |score: &mut T| {
                let t = (*score / cap).tanh();
                *score = t * cap;
                T::one() - t * t
            };
            p.iter_mut().map(bent).collect()
        });
        for (i, row) in p.chunks_exact_mut(keys).enumerate() {
            let seen = self.form.seen(position(i), count);
            let (start, end) = (seen.start - first, seen.end - first);
            softmax(&mut row[start..end]);
            row[..start].fill(T::zero());
            row[end..].fill(T::zero());
        }
        Weights { p, first, keys, slope }
    }

    /// Columns of a key head in the key rows.
    fn key_column(&self, head: usize) -> usize {
        head / (self.heads / self.kv_heads) * self.form.head_dim
    }

    /// The attention of one query in heads that share keys (heads·d), its keys and values read at their `places`.
    fn one_query<T: Real>(&self, q: &[T], (k, v, places): (&[T], &[T], &[usize]), out: &mut [T]) {
        let (d, scale) = (self.form.head_dim, T::from_f64(self.form.scale));
        if self.form.cap.is_none() && T::attend_one((q, d), (k, v, places), scale, out) {
            return;
        }
        for (q, out) in q.chunks_exact(d).zip(out.chunks_exact_mut(d)) {
            let mut p = vec![T::zero(); places.len()];
            wide!(for (p, &at) in p.iter_mut().zip(places) {
                *p = sum2(q, &k[at..at + d], |a, b| a * b) * scale;
            });
            if let Some(cap) = self.form.cap.map(T::from_f64) {
                p.iter_mut().for_each(|p| *p = (*p / cap).tanh() * cap);
            }
            softmax(&mut p);
            wide!({
                // Some columns at a time, whose sums stay in registers.
                for (part, out) in out.chunks_mut(32).enumerate() {
                    let (mut sums, n) = ([T::zero(); 32], out.len());
                    for (at, &p) in places.iter().zip(&p) {
                        let v = &v[at + part * 32..][..n];
                        match <&[T; 32]>::try_from(v) {
                            Ok(v) => sums.iter_mut().zip(v).for_each(|(sum, &v)| *sum += p * v),
                            Err(_) => sums.iter_mut().zip(v).for_each(|(sum, &v)| *sum += p * v),
                        }
                    }
                    out.copy_from_slice(&sums[..n]);
                }
            });
        }
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        lq: &Layout,
        k: &CpuStorage,
        lk: &Layout,
        v: &CpuStorage,
        lv: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let storage = match q {
            CpuStorage::F32(_) => CpuStorage::F32(self.forward(slice::<f32>(q, lq)?, slice(k, lk)?, slice(v, lv)?)),
            CpuStorage::F64(_) => CpuStorage::F64(self.forward(slice::<f64>(q, lq)?, slice(k, lk)?, slice(v, lv)?)),
            _ => candle_core::bail!("attention: inputs must be f32 or f64"),
        };
        Ok((storage, lq.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        y: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        fn tensors<T: Real>(
            op: &Attention,
            inputs: [&Tensor; 5],
        ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
            let [dq, dk, dv] = with_slices::<T, _, 5>(inputs, |inputs| Ok(op.backward(inputs)))?;
            let [q, k, v, ..] = inputs;
            Ok((
                Some(Tensor::from_vec(dq, q.shape(), q.device())?),
                Some(Tensor::from_vec(dk, k.shape(), k.device())?),
                Some(Tensor::from_vec(dv, v.shape(), v.device())?),
            ))
        }
        match q.dtype() {
            DType::F64 => tensors::<f64>(self, [q, k, v, y, g]),
            _ => tensors::<f32>(self, [q, k, v, y, g]),
        }
    }
}

#[cfg(test)]
mod tests;
