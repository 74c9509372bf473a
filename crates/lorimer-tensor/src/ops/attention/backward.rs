//! The exact backward of attention: each key head of each segment is a task, and what tasks give for the same key rows is added in a fixed order.

use rayon::prelude::*;

use super::{Attention, BLOCK, Segment, Weights};
use crate::kernels::real::Real;
use crate::kernels::shared::{Shared, Strides};
use crate::kernels::slices::{product, product_raw};

/// A segment and one of its key heads.
pub(super) type Task<'a> = (&'a Segment, usize);

impl Attention {
    /// Every key head of every segment.
    pub(super) fn tasks(&self) -> Vec<Task<'_>> {
        self.segments.iter().flat_map(|s| (0..self.kv_heads).map(move |kv| (s, kv))).collect()
    }

    /// dQ, dK and dV from q, k, v, the output and its gradient.
    pub(super) fn backward<T: Real>(&self, inputs: [&[T]; 5]) -> [Vec<T>; 3] {
        let [q, k, ..] = inputs;
        let mut dq = vec![T::zero(); q.len()];
        let out_q = Shared(dq.as_mut_ptr());
        let tasks = self.tasks();
        // SAFETY: tasks are apart from each other in segments, whose query rows are disjoint (checked in `of_shapes`), or in heads, and so in columns;
        // `dq` is as long as `q` and lives until they are done.
        let run = |&task: &Task<'_>| unsafe { self.exact_backward(inputs, task, out_q) };
        let parts: Vec<_> = tasks.par_iter().map(run).collect();
        let [dk, dv] = self.add_parts(k.len(), &tasks, parts);
        [dq, dk, dv]
    }

    /// One task of it: writes dQ and gives dK and dV of the segment's keys (keys, d) each.
    ///
    /// dV = Pᵀ dO, dS = P∘(dO Vᵀ − rowsum(dO∘O))·scale (times the cap's slope), dQ = dS K, dK = dSᵀ Q, with P formed again.
    ///
    /// # Safety
    /// `out_q` is as long as q, and nobody else uses the columns of this key head's queries in the segment's query rows.
    pub(super) unsafe fn exact_backward<T: Real>(
        &self,
        [q, k, v, y, g]: [&[T]; 5],
        (s, kv): Task<'_>,
        out_q: Shared<T>,
    ) -> (Vec<T>, Vec<T>) {
        let (q_width, kv_width) = (self.q_width(), self.kv_heads * self.form.head_dim);
        let (d, group) = (self.form.head_dim, self.heads / self.kv_heads);
        let (k, k_stride) = s.key_rows(k, kv_width, kv * d, d);
        let (v, v_stride) = s.key_rows(v, kv_width, kv * d, d);
        let size = s.key_count() * d;
        let (mut dk, mut dv) = (vec![T::zero(); size], vec![T::zero(); size]);
        let (one, q_strides, thin) = (T::one(), Strides(q_width, 1), Strides(d, 1));
        for head in kv * group..(kv + 1) * group {
            for from in (0..s.q_len).step_by(BLOCK) {
                let n = BLOCK.min(s.q_len - from);
                let Weights { p, first, keys, slope } = self.weights(q, (&k, k_stride), (s, head), from, n);
                let (k, v) = (&k[first * k_stride..], &v[first * v_stride..]);
                let row = (s.q_start + from) * q_width + head * d;
                let (q, g) = (&q[row..], &g[row..]);
                let mut ds = vec![T::zero(); n * keys];
                let (wide, turned) = (Strides(keys, 1), Strides(1, keys));
                product((n, keys, d), &mut ds, wide, false, g, q_strides, v, Strides(1, v_stride), one, false);
                for (i, (ds, p)) in ds.chunks_exact_mut(keys).zip(p.chunks_exact(keys)).enumerate() {
                    let (g, y) = (&g[i * q_width..][..d], &y[row + i * q_width..][..d]);
                    let along: T = g.iter().zip(y).map(|(&g, &y)| g * y).sum();
                    let scale = T::from_f64(self.form.scale);
                    ds.iter_mut().zip(p).for_each(|(ds, &p)| *ds = p * (*ds - along) * scale);
                }
                if let Some(slope) = slope {
                    ds.iter_mut().zip(slope).for_each(|(ds, slope)| *ds *= slope);
                }
                assert!((keys - 1) * k_stride + d <= k.len());
                // SAFETY: the caller's contract, and `new` checked the query rows to lie inside; `ds` and `k` are as long as their shapes say.
                unsafe {
                    let (dq, ds, k) = (out_q.at(row), ds.as_ptr(), k.as_ptr());
                    product_raw((n, d, keys), dq, q_strides, false, ds, wide, k, Strides(k_stride, 1), one, false);
                }
                let (dk, dv) = (&mut dk[first * d..], &mut dv[first * d..]);
                product((keys, d, n), dk, thin, true, &ds, turned, q, q_strides, one, false);
                product((keys, d, n), dv, thin, true, &p, turned, g, q_strides, one, false);
            }
        }
        (dk, dv)
    }

    /// dK and dV of `len` numbers each out of the tasks' parts. Segments may share key rows, so the sums are formed here, in a fixed order.
    pub(super) fn add_parts<T: Real>(
        &self,
        len: usize,
        tasks: &[Task<'_>],
        parts: impl IntoIterator<Item = (Vec<T>, Vec<T>)>,
    ) -> [Vec<T>; 2] {
        let (d, kv_width) = (self.form.head_dim, self.kv_heads * self.form.head_dim);
        let (mut dk, mut dv) = (vec![T::zero(); len], vec![T::zero(); len]);
        for ((s, kv), (part_k, part_v)) in tasks.iter().zip(parts) {
            for (row, (from_k, from_v)) in s.rows().zip(part_k.chunks_exact(d).zip(part_v.chunks_exact(d))) {
                let at = row * kv_width + kv * d;
                dk[at..at + d].iter_mut().zip(from_k).for_each(|(sum, &v)| *sum += v);
                dv[at..at + d].iter_mut().zip(from_v).for_each(|(sum, &v)| *sum += v);
            }
        }
        [dk, dv]
    }
}
