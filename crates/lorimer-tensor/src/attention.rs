//! Causal attention with grouped heads over packed, variable-length segments; no `T × T` matrix is kept.

use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::raw::{Real, Shared, Strides, product, product_raw, slice, with_slices};

/// Query rows whose scores are formed at a time.
const BLOCK: usize = 64;

/// One sequence in a packed batch: queries `q_start..q_start+q_len` see the keys
/// `k_start..k_start+k_len`, of which the last `q_len` stand at the queries' own positions
/// (so `k_len > q_len` means that earlier keys come from a cache). Causal within.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First query row.
    pub q_start: usize,
    /// Number of query rows.
    pub q_len: usize,
    /// First key row.
    pub k_start: usize,
    /// Number of key rows; at least `q_len`.
    pub k_len: usize,
}

impl Segment {
    /// A sequence without a cache: queries and keys are the same rows.
    pub fn plain(start: usize, len: usize) -> Self {
        Self { q_start: start, q_len: len, k_start: start, k_len: len }
    }
}

/// Causal attention. `q` (rows, heads·d), `k` and `v` (key rows, kv_heads·d), all f32 or f64 → (rows, heads·d).
/// `scale` multiplies the scores. Rows that no segment covers give zero.
pub fn attention(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    segments: &[Segment],
    head_dim: usize,
    scale: f64,
) -> Result<Tensor> {
    let op = Attention::new((q, k, v), segments, head_dim, scale)?;
    if !q.device().is_cpu() {
        return attention_reference((q, k, v), segments, head_dim, scale);
    }
    q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op)
}

/// The reference form out of plain candle operations, one segment and one head at a time.
pub fn attention_reference(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    segments: &[Segment],
    head_dim: usize,
    scale: f64,
) -> Result<Tensor> {
    let op = Attention::new((q, k, v), segments, head_dim, scale)?;
    let mut outputs = Vec::new();
    for s in segments {
        let mask: Vec<f64> = (0..s.q_len)
            .flat_map(|i| (0..s.k_len).map(move |j| if j <= i + s.k_len - s.q_len { 0.0 } else { f64::NEG_INFINITY }))
            .collect();
        let mask = Tensor::from_vec(mask, (s.q_len, s.k_len), q.device())?.to_dtype(q.dtype())?;
        let mut heads = Vec::new();
        for h in 0..op.heads {
            let kv = h / (op.heads / op.kv_heads) * head_dim;
            let q = q.narrow(0, s.q_start, s.q_len)?.narrow(1, h * head_dim, head_dim)?;
            let k = k.narrow(0, s.k_start, s.k_len)?.narrow(1, kv, head_dim)?;
            let v = v.narrow(0, s.k_start, s.k_len)?.narrow(1, kv, head_dim)?;
            let scores = ((q.contiguous()?.matmul(&k.t()?.contiguous()?)? * scale)? + &mask)?;
            let weights = scores.broadcast_sub(&scores.max_keepdim(1)?)?.exp()?;
            let weights = weights.broadcast_div(&weights.sum_keepdim(1)?)?;
            heads.push(weights.matmul(&v.contiguous()?)?);
        }
        outputs.push(Tensor::cat(&heads, 1)?);
    }
    Tensor::cat(&outputs, 0)
}

struct Attention {
    segments: Vec<Segment>,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    scale: f64,
}

impl Attention {
    fn new((q, k, v): (&Tensor, &Tensor, &Tensor), segments: &[Segment], head_dim: usize, scale: f64) -> Result<Self> {
        let ((rows, q_width), (k_rows, kv_width)) = (q.dims2()?, k.dims2()?);
        let fits = head_dim > 0
            && v.dims2()? == (k_rows, kv_width)
            && q_width % head_dim == 0
            && kv_width % head_dim == 0
            && kv_width > 0
            && q_width % kv_width == 0;
        if !fits {
            candle_core::bail!(
                "attention: q {:?}, k {:?}, v {:?} do not divide into heads of {head_dim}",
                q.shape(),
                k.shape(),
                v.shape()
            );
        }
        let mut end = 0;
        for s in segments {
            // Queries in order and apart from each other, so that parallel tasks write to disjoint rows.
            if s.q_start < end || s.q_start + s.q_len > rows || s.k_start + s.k_len > k_rows || s.k_len < s.q_len {
                candle_core::bail!("attention: segment {s:?} does not fit {rows} query rows and {k_rows} key rows");
            }
            end = s.q_start + s.q_len;
        }
        Ok(Self {
            segments: segments.to_vec(),
            heads: q_width / head_dim,
            kv_heads: kv_width / head_dim,
            head_dim,
            scale,
        })
    }

    fn widths(&self) -> (usize, usize) {
        (self.heads * self.head_dim, self.kv_heads * self.head_dim)
    }

    /// Softmax weights of query rows `from..from+n` of a segment and head, `(n, keys)` with `keys` the
    /// number of keys that the last of these rows sees.
    fn weights<T: Real>(&self, q: &[T], k: &[T], s: &Segment, head: usize, from: usize, n: usize) -> (Vec<T>, usize) {
        let (q_width, kv_width) = self.widths();
        let kv = head / (self.heads / self.kv_heads);
        let offset = s.k_len - s.q_len;
        let keys = offset + from + n;
        let mut p = vec![T::zero(); n * keys];
        product(
            (n, keys, self.head_dim),
            &mut p,
            Strides(keys, 1),
            false,
            &q[(s.q_start + from) * q_width + head * self.head_dim..],
            Strides(q_width, 1),
            &k[s.k_start * kv_width + kv * self.head_dim..],
            Strides(1, kv_width),
            T::from_f64(self.scale),
            false,
        );
        for (i, row) in p.chunks_exact_mut(keys).enumerate() {
            let (seen, hidden) = row.split_at_mut(offset + from + i + 1);
            let max = seen.iter().copied().fold(T::neg_infinity(), num_traits::Float::max);
            let mut total = T::zero();
            for v in seen.iter_mut() {
                *v = (*v - max).exp();
                total += *v;
            }
            let inverse = total.recip();
            seen.iter_mut().for_each(|v| *v *= inverse);
            hidden.fill(T::zero());
        }
        (p, keys)
    }

    fn forward<T: Real>(&self, q: &[T], k: &[T], v: &[T]) -> Vec<T> {
        let (q_width, kv_width) = self.widths();
        let d = self.head_dim;
        let mut y = vec![T::zero(); q.len()];
        let out = Shared(y.as_mut_ptr());
        let tasks = self.segments.iter().flat_map(|s| (0..self.heads).map(move |h| (s, h)));
        tasks.collect::<Vec<_>>().into_par_iter().for_each(|(s, head)| {
            let kv = head / (self.heads / self.kv_heads);
            for from in (0..s.q_len).step_by(BLOCK) {
                let n = BLOCK.min(s.q_len - from);
                let (p, keys) = self.weights(q, k, s, head, from, n);
                let values = &v[s.k_start * kv_width + kv * d..];
                assert!((keys - 1) * kv_width + d <= values.len());
                // SAFETY: the segments' query rows are disjoint (checked in `new`) and each task owns one
                // head's columns of them; `p` and `values` are as long as their shapes say.
                unsafe {
                    product_raw(
                        (n, d, keys),
                        out.at((s.q_start + from) * q_width + head * d),
                        Strides(q_width, 1),
                        false,
                        p.as_ptr(),
                        Strides(keys, 1),
                        values.as_ptr(),
                        Strides(kv_width, 1),
                        T::one(),
                        false,
                    )
                };
            }
        });
        y
    }

    /// dV = Pᵀ dO, dS = P∘(dO Vᵀ − rowsum(dO∘O))·scale, dQ = dS K, dK = dSᵀ Q, with P formed again.
    fn backward<T: Real>(&self, q: &[T], k: &[T], v: &[T], y: &[T], g: &[T]) -> [Vec<T>; 3] {
        let (q_width, kv_width) = self.widths();
        let (d, group) = (self.head_dim, self.heads / self.kv_heads);
        let mut dq = vec![T::zero(); q.len()];
        let (mut dk, mut dv) = (vec![T::zero(); k.len()], vec![T::zero(); v.len()]);
        let out_q = Shared(dq.as_mut_ptr());
        // Two segments may share key rows (a common prefix), so a key head's segments run in one task.
        let (out_k, out_v) = (Shared(dk.as_mut_ptr()), Shared(dv.as_mut_ptr()));
        let shares_keys = {
            let mut spans: Vec<_> = self.segments.iter().map(|s| (s.k_start, s.k_start + s.k_len)).collect();
            spans.sort_unstable();
            spans.windows(2).any(|w| w[1].0 < w[0].1)
        };
        let run = |s: &Segment, kv: usize| {
            for head in kv * group..(kv + 1) * group {
                for from in (0..s.q_len).step_by(BLOCK) {
                    let n = BLOCK.min(s.q_len - from);
                    let (p, keys) = self.weights(q, k, s, head, from, n);
                    let row = (s.q_start + from) * q_width + head * d;
                    let key = s.k_start * kv_width + kv * d;
                    let mut ds = vec![T::zero(); n * keys];
                    let g_strides = Strides(q_width, 1);
                    product(
                        (n, keys, d),
                        &mut ds,
                        Strides(keys, 1),
                        false,
                        &g[row..],
                        g_strides,
                        &v[key..],
                        Strides(1, kv_width),
                        T::one(),
                        false,
                    );
                    for i in 0..n {
                        let at = row + i * q_width;
                        let along: T = g[at..at + d].iter().zip(&y[at..at + d]).map(|(&g, &y)| g * y).sum();
                        for j in 0..keys {
                            let e = i * keys + j;
                            ds[e] = p[e] * (ds[e] - along) * T::from_f64(self.scale);
                        }
                    }
                    assert!(key + (keys - 1) * kv_width + d <= k.len());
                    // SAFETY: this task owns the query rows and head columns it writes in `dq`, and the key
                    // rows and key-head columns in `dk` and `dv` (segments that share keys share a task);
                    // the assertion bounds the key side, `new` the query side.
                    unsafe {
                        product_raw(
                            (n, d, keys),
                            out_q.at(row),
                            g_strides,
                            false,
                            ds.as_ptr(),
                            Strides(keys, 1),
                            k[key..].as_ptr(),
                            Strides(kv_width, 1),
                            T::one(),
                            false,
                        );
                        product_raw(
                            (keys, d, n),
                            out_k.at(key),
                            Strides(kv_width, 1),
                            true,
                            ds.as_ptr(),
                            Strides(1, keys),
                            q[row..].as_ptr(),
                            g_strides,
                            T::one(),
                            false,
                        );
                        product_raw(
                            (keys, d, n),
                            out_v.at(key),
                            Strides(kv_width, 1),
                            true,
                            p.as_ptr(),
                            Strides(1, keys),
                            g[row..].as_ptr(),
                            g_strides,
                            T::one(),
                            false,
                        );
                    }
                }
            }
        };
        if shares_keys {
            (0..self.kv_heads).into_par_iter().for_each(|kv| self.segments.iter().for_each(|s| run(s, kv)));
        } else {
            let tasks = self.segments.iter().flat_map(|s| (0..self.kv_heads).map(move |kv| (s, kv)));
            tasks.collect::<Vec<_>>().into_par_iter().for_each(|(s, kv)| run(s, kv));
        }
        [dq, dk, dv]
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
            let [dq, dk, dv] = with_slices::<T, _, 5>(inputs, |[q, k, v, y, g]| Ok(op.backward(q, k, v, y, g)))?;
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
mod tests {
    use super::*;
    use crate::check::{assert_close, gradient_matches, random};
    use proptest::prelude::*;

    fn packed(lengths: &[(usize, usize)]) -> (Vec<Segment>, usize, usize) {
        let (mut q, mut k, mut segments) = (0, 0, Vec::new());
        for &(q_len, cached) in lengths {
            segments.push(Segment { q_start: q, q_len, k_start: k, k_len: q_len + cached });
            q += q_len;
            k += q_len + cached;
        }
        (segments, q, k)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn equals_the_reference(
            lengths in prop::collection::vec((1usize..90, 0usize..9), 1..4),
            group in 1usize..4,
            kv_heads in 1usize..3,
        ) {
            let (segments, rows, keys) = packed(&lengths);
            let d = 8;
            let q = random((rows, group * kv_heads * d), 1, DType::F32).unwrap();
            let k = random((keys, kv_heads * d), 2, DType::F32).unwrap();
            let v = random((keys, kv_heads * d), 3, DType::F32).unwrap();
            let fast = attention((&q, &k, &v), &segments, d, 0.4).unwrap();
            let slow = attention_reference((&q, &k, &v), &segments, d, 0.4).unwrap();
            assert_close(&fast, &slow, 1e-5).unwrap();
        }
    }

    #[test]
    fn gradients_equal_central_differences() -> Result<()> {
        let (segments, rows, keys) = packed(&[(3, 0), (2, 2)]);
        let (d, heads, kv_heads) = (4, 2, 1);
        let q = random((rows, heads * d), 1, DType::F64)?;
        let k = random((keys, kv_heads * d), 2, DType::F64)?;
        let v = random((keys, kv_heads * d), 3, DType::F64)?;
        gradient_matches(&q, |q| attention((q, &k, &v), &segments, d, 0.5))?;
        gradient_matches(&k, |k| attention((&q, k, &v), &segments, d, 0.5))?;
        gradient_matches(&v, |v| attention((&q, &k, v), &segments, d, 0.5))
    }

    #[test]
    fn gradients_flow_into_keys_that_two_segments_share() -> Result<()> {
        let segments = [
            Segment { q_start: 0, q_len: 2, k_start: 0, k_len: 2 },
            Segment { q_start: 2, q_len: 1, k_start: 0, k_len: 3 },
        ];
        let (q, k) = (random((3, 4), 1, DType::F64)?, random((3, 4), 2, DType::F64)?);
        let v = random((3, 4), 3, DType::F64)?;
        gradient_matches(&k, |k| attention((&q, k, &v), &segments, 4, 0.5))?;
        gradient_matches(&v, |v| attention((&q, &k, v), &segments, 4, 0.5))
    }
}
