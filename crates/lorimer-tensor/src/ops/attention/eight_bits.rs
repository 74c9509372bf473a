//! Attention over keys and values in 8 bits: whole numbers of −127 to 127 and a scale for each token and head, its largest number by 127.
//!
//! A row of the pool has the scales of its heads and then the whole numbers, four in the place of one f32. They are expanded a few keys at a time for few
//! queries, a tile of them for many. What is written is what every query reads, that of the same step too, so that a token's output does not depend on
//! how its prompt was cut into steps.

use std::ops::Range;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::pool::{KeyDtype, KeyPool};
use super::tiles::{Buffers, FEW, MANY, Queries, Rows, TileSource};
use super::{Attention, BLOCK};
use crate::kernels::shared::Shared;
use crate::kernels::simd::{softmax, sum2};
use crate::kernels::slices::with_slices;
use crate::kernels::wide::wide;

/// The largest whole number.
const MOST: f32 = 127.0;
/// Keys that are expanded at a time for one query.
const SOME: usize = 32;

/// The bytes that numbers take.
fn bytes_of(numbers: &[f32]) -> &[i8] {
    // SAFETY: every byte of an f32 is initialised and a valid i8, which needs no alignment; the length in bytes is that of the slice.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), size_of_val(numbers)) }
}

/// The bytes that numbers take, to be written.
fn bytes_of_mut(numbers: &mut [f32]) -> &mut [i8] {
    // SAFETY: as in `bytes_of`; the slice is borrowed alone, and any four bytes are an f32.
    unsafe { std::slice::from_raw_parts_mut(numbers.as_mut_ptr().cast(), size_of_val(numbers)) }
}

/// Rounds the rows of `rows` (n, heads·head_dim), f32, into a pool of rows of `stride` numbers: row i to row `to[i]`.
pub fn store_rows_in_8_bits(
    (pool, stride): (&mut [f32], usize),
    (rows, head_dim): (&Tensor, usize),
    to: impl ExactSizeIterator<Item = usize>,
) -> Result<()> {
    let (n, width) = rows.dims2()?;
    let heads = width.checked_div(head_dim).unwrap_or(0);
    if to.len() != n || heads * head_dim != width || KeyDtype::Int8.row(heads, head_dim) > stride {
        candle_core::bail!("{n} rows of {width} for {} places of {stride} in the pool", to.len());
    }
    with_slices([rows], |[rows]: [&[f32]; 1]| {
        for (row, place) in rows.chunks_exact(width.max(1)).zip(to) {
            let at = place.saturating_mul(stride);
            let Some(to) = pool.get_mut(at..at.saturating_add(stride)) else {
                candle_core::bail!("row {place} is outside the pool")
            };
            let (scales, numbers) = to.split_at_mut(heads);
            let numbers = bytes_of_mut(numbers).chunks_exact_mut(head_dim.max(1));
            wide!(for ((x, to), scale) in row.chunks_exact(head_dim.max(1)).zip(numbers).zip(scales) {
                *scale = round(x, to);
            });
        }
        Ok(())
    })
}

/// Rounds a head's numbers; gives their scale. What is not finite leaves a scale that is not.
#[inline(always)]
fn round(x: &[f32], to: &mut [i8]) -> f32 {
    let largest = x.iter().fold(0f32, |most, x| if x.abs() > most || x.is_nan() { x.abs() } else { most });
    let inverse = MOST / largest;
    let inverse = if inverse.is_finite() { inverse } else { 0.0 };
    to.iter_mut().zip(x).for_each(|(to, x)| *to = (x * inverse).round_ties_even() as i8);
    // A largest number too small to divide by is none.
    if inverse == 0.0 && largest.is_finite() { 0.0 } else { largest / MOST }
}

/// Keys or values in 8 bits.
#[derive(Clone, Copy)]
pub(super) struct Rounded<'a> {
    numbers: &'a [f32],
    stride: usize,
    heads: usize,
    head_dim: usize,
}

impl<'a> Rounded<'a> {
    pub(super) fn new(numbers: &'a [f32], pool: &KeyPool<'_>, head_dim: usize) -> Self {
        Self { numbers, stride: pool.stride, heads: pool.width / head_dim, head_dim }
    }

    /// The numbers of one head in a row, into `x` (head_dim).
    #[inline(always)]
    fn expand(&self, row: usize, head: usize, x: &mut [f32]) {
        let row = &self.numbers[row * self.stride..][..self.stride];
        let (scale, whole) = (row[head], &bytes_of(&row[self.heads..])[head * self.head_dim..][..self.head_dim]);
        x.iter_mut().zip(whole).for_each(|(x, &n)| *x = f32::from(n) * scale);
    }

    /// p = scale · q·k for the keys of a head in some rows.
    pub(super) fn scores(&self, q: &[f32], (rows, head): (&[usize], usize), scale: f32, p: &mut [f32]) {
        let mut key = vec![0f32; self.head_dim];
        wide!(for (p, &row) in p.iter_mut().zip(rows) {
            self.expand(row, head, &mut key);
            *p = sum2(q, &key, |a, b| a * b) * scale;
        });
    }
}

/// Keys and values of one head of a segment, expanded a tile at a time.
struct Tiles<'a> {
    from: [Rounded<'a>; 2],
    /// The rows of the segment's keys in the pool.
    places: &'a [usize],
    head: usize,
    tile: [Rows<'static, f32>; 2],
}

impl TileSource<f32> for &mut Tiles<'_> {
    fn tile(&mut self, keys: &Range<usize>) -> (&Rows<'_, f32>, Option<&Rows<'_, f32>>) {
        for (i, (from, tile)) in self.from.iter().zip(&mut self.tile).enumerate() {
            tile.fill(keys, i == 0, |x| {
                wide!(for (x, &row) in x.chunks_exact_mut(from.head_dim).zip(&self.places[keys.clone()]) {
                    from.expand(row, self.head, x);
                });
            });
        }
        (&self.tile[0], Some(&self.tile[1]))
    }
}

impl Attention {
    /// The output from q, and keys and values in 8 bits.
    pub(super) fn forward_in_8_bits(&self, q: &[f32], pool: &KeyPool<'_>) -> Vec<f32> {
        let values = &pool.numbers[pool.values_at * pool.stride..];
        let from = [pool.numbers, values].map(|rows| Rounded::new(rows, pool, self.form.head_dim));
        let (q_width, d, group) = (self.q_width(), self.form.head_dim, self.heads / self.kv_heads);
        let mut y = vec![0f32; q.len()];
        let out = Shared(y.as_mut_ptr());
        let places: Vec<Vec<usize>> = self.segments.iter().map(|s| s.rows().collect()).collect();
        let with_places = || self.segments.iter().zip(&places);
        let blocks = with_places().filter(|(s, _)| s.q_len > FEW).flat_map(|(segment, places)| {
            (0..self.heads).flat_map(move |head| {
                let rows = (0..segment.q_len).step_by(BLOCK).map(move |at| at..(at + BLOCK).min(segment.q_len));
                rows.map(move |rows| (places, Queries { segment, head, rows }))
            })
        });
        let blocks: Vec<_> = blocks.collect();
        // Heads that share keys expand them together, unless there would be hardly a task for every thread.
        let together = if self.segments.len() < MANY { 1 } else { group };
        let singles = with_places()
            .filter(|(s, _)| s.q_len <= FEW)
            .flat_map(|(s, places)| (0..self.heads).step_by(together).map(move |head| (s, places, head)));
        let singles: Vec<_> = singles.collect();
        let many = || {
            blocks.par_iter().rev().with_max_len(8).for_each_init(
                || (Buffers::new(d), Tiles { from, places: &[], head: 0, tile: [Rows::of_tile(d), Rows::of_tile(d)] }),
                |(buffers, tiles), (places, queries)| {
                    (tiles.places, tiles.head) = (places, queries.head / group);
                    let first = queries.segment.q_start + queries.rows.start;
                    self.attend(queries, (q, tiles), buffers, |row, output, _| {
                        let at = (first + row) * q_width + queries.head * d;
                        // SAFETY: the segments' query rows are disjoint (checked in `of_shapes`) and each task owns one head's columns of some of them.
                        unsafe { out.at(at).copy_from_nonoverlapping(output.as_ptr(), d) };
                    });
                },
            );
        };
        let single = || {
            singles.par_iter().with_max_len(1).for_each(|&(s, places, head)| {
                for i in 0..s.q_len {
                    let at = (s.q_start + i) * q_width + head * d;
                    // SAFETY: as above: this task's row and columns.
                    let out = unsafe { std::slice::from_raw_parts_mut(out.at(at), together * d) };
                    let seen = self.form.seen((places.len() + i).saturating_sub(s.q_len), places.len());
                    self.one_query_in_8_bits(&q[at..at + together * d], from, (&places[seen], head / group), out);
                }
            });
        };
        rayon::join(many, single);
        y
    }

    /// The attention of one query in heads that share keys (heads·d), its keys and values in some rows. A head's result does not depend on the others.
    fn one_query_in_8_bits(
        &self,
        q: &[f32],
        [k, v]: [Rounded<'_>; 2],
        (rows, head): (&[usize], usize),
        out: &mut [f32],
    ) {
        let (d, scale, n) = (self.form.head_dim, self.form.scale as f32, rows.len());
        let mut p = vec![0f32; q.len() / d * n];
        let mut room = vec![0f32; SOME * d];
        for (i, some) in rows.chunks(SOME).enumerate() {
            wide!({
                some.iter().zip(room.chunks_exact_mut(d)).for_each(|(&row, x)| k.expand(row, head, x));
                for (q, p) in q.chunks_exact(d).zip(p.chunks_exact_mut(n)) {
                    for (p, key) in p[i * SOME..].iter_mut().zip(room.chunks_exact(d)).take(some.len()) {
                        *p = sum2(q, key, |a, b| a * b) * scale;
                    }
                }
            });
        }
        if let Some(cap) = self.form.cap.map(|cap| cap as f32) {
            p.iter_mut().for_each(|p| *p = (*p / cap).tanh() * cap);
        }
        p.chunks_exact_mut(n.max(1)).for_each(softmax);
        out.fill(0.0);
        for (i, some) in rows.chunks(SOME).enumerate() {
            wide!({
                some.iter().zip(room.chunks_exact_mut(d)).for_each(|(&row, x)| v.expand(row, head, x));
                for (out, p) in out.chunks_exact_mut(d).zip(p.chunks_exact(n)) {
                    // Some columns at a time, whose sums stay in registers.
                    for (part, out) in out.chunks_mut(32).enumerate() {
                        let mut sums = [0f32; 32];
                        sums[..out.len()].copy_from_slice(out);
                        for (x, &p) in room.chunks_exact(d).zip(&p[i * SOME..][..some.len()]) {
                            let x = &x[part * 32..][..out.len()];
                            match <&[f32; 32]>::try_from(x) {
                                Ok(x) => sums.iter_mut().zip(x).for_each(|(sum, &x)| *sum += p * x),
                                Err(_) => sums.iter_mut().zip(x).for_each(|(sum, &x)| *sum += p * x),
                            }
                        }
                        out.copy_from_slice(&sums[..out.len()]);
                    }
                }
            });
        }
    }
}

#[cfg(test)]
mod tests;
