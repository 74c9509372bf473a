//! The exact backward of attention: each key head of each segment is a task, and what tasks give for the same key rows is added in a fixed order.

use std::collections::VecDeque;
use std::ops::Range;

use rayon::prelude::*;

use super::tiles::{Buffers, Queries, Rows};
use super::{Attention, BLOCK, Segment};
use crate::kernels::real::Real;
use crate::kernels::shared::Shared;

/// A segment and one of its key heads.
pub(super) type Task<'a> = (&'a Segment, usize);

/// Query rows of a task: so many have dK and dV of their own at most.
const ROWS: usize = 4096;

/// Adds what a part gives for the same keys.
fn add<T: Real>(sums: &mut (Vec<T>, Vec<T>), part: (Vec<T>, Vec<T>)) {
    sums.0.iter_mut().zip(part.0).for_each(|(sum, part)| *sum += part);
    sums.1.iter_mut().zip(part.1).for_each(|(sum, part)| *sum += part);
}

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
        let group = self.heads / self.kv_heads;
        let parts = self.segments.iter().flat_map(|s| {
            (0..self.heads)
                .flat_map(move |head| (0..s.q_len).step_by(ROWS).map(move |at| (s, head, at..(at + ROWS).min(s.q_len))))
        });
        let parts: Vec<_> = parts.collect();
        let run = |(s, head, rows): &(&Segment, usize, Range<usize>)| {
            // SAFETY: parts are apart from each other in segments, whose query rows are disjoint (checked in `of_shapes`), in their rows, or in
            // heads, and so in columns; `dq` is as long as `q` and lives until they are done.
            unsafe { self.part_backward(inputs, s, *head, rows.clone(), out_q) }
        };
        let mut found: VecDeque<_> = parts.par_iter().with_max_len(1).map(run).collect::<Vec<_>>().into();
        let tasks = self.tasks();
        let sums = tasks.iter().map(|(s, _)| {
            let mut parts = found.drain(..(group * s.q_len.div_ceil(ROWS)).min(found.len()));
            let mut sums = parts.next().unwrap_or_default();
            parts.for_each(|part| add(&mut sums, part));
            sums
        });
        let sums: Vec<_> = sums.collect();
        let [dk, dv] = self.add_parts(k.len(), &tasks, sums);
        [dq, dk, dv]
    }

    /// A key head of a segment: writes dQ and gives dK and dV of the segment's keys (keys, d) each.
    ///
    /// # Safety
    /// `out_q` is as long as q, and nobody else uses the columns of this key head's queries in the segment's query rows.
    pub(super) unsafe fn exact_backward<T: Real>(
        &self,
        inputs: [&[T]; 5],
        (s, kv): Task<'_>,
        out_q: Shared<T>,
    ) -> (Vec<T>, Vec<T>) {
        let group = self.heads / self.kv_heads;
        let mut sums = <(Vec<T>, Vec<T>)>::default();
        for head in kv * group..(kv + 1) * group {
            for at in (0..s.q_len).step_by(ROWS) {
                // SAFETY: the caller's contract.
                let part = unsafe { self.part_backward(inputs, s, head, at..(at + ROWS).min(s.q_len), out_q) };
                match sums.0.is_empty() {
                    true => sums = part,
                    false => add(&mut sums, part),
                }
            }
        }
        sums
    }

    /// Some of a segment's query rows in one head: writes dQ and gives what they add to dK and dV of the segment's keys.
    ///
    /// # Safety
    /// `out_q` is as long as q, and nobody else uses the head's columns of these rows.
    unsafe fn part_backward<T: Real>(
        &self,
        [q, k, v, y, g]: [&[T]; 5],
        s: &Segment,
        head: usize,
        rows: Range<usize>,
        out_q: Shared<T>,
    ) -> (Vec<T>, Vec<T>) {
        let (d, kv_width) = (self.form.head_dim, self.kv_heads * self.form.head_dim);
        let column = self.key_column(head);
        let [k, v] = [k, v].map(|rows| Rows::new(s, rows, kv_width, (column, d), true));
        let size = s.key_count() * d;
        let (mut dk, mut dv) = (vec![T::zero(); size], vec![T::zero(); size]);
        let mut buffers = Buffers::new(d);
        for from in rows.clone().step_by(BLOCK) {
            let queries = Queries { segment: s, head, rows: from..(from + BLOCK).min(rows.end) };
            let first = s.q_start + from;
            let mut logs = [T::zero(); BLOCK];
            let kept = |row: usize| self.logs.get()?.get((first + row) * self.heads + head).copied();
            let known = (0..queries.rows.len()).all(|row| {
                let log = kept(row).filter(|log| !log.is_nan());
                logs[row] = T::from_f64(log.unwrap_or_default());
                log.is_some()
            });
            if !known {
                self.attend(&queries, (q, (&k, None)), &mut buffers, |row, _, log| logs[row] = log);
            }
            self.attend_backward(&queries, ([q, y, g], &k, &v), &logs, (&mut dk, &mut dv), &mut buffers, |row, dq| {
                let at = (first + row) * self.heads + head;
                // SAFETY: the caller's contract, and `of_shapes` checked the query rows to lie inside.
                unsafe { out_q.at(at * d).copy_from_nonoverlapping(dq.as_ptr(), d) };
            });
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
