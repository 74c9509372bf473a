//! Attention in tiles of keys that stay in a cache: the softmax of a row is carried from tile to tile (Milakov & Gimelshein 2018, arXiv 1805.02867), and the
//! backward forms each tile's weights again from the row's log-sum (Dao et al. 2022, "FlashAttention", arXiv 2205.14135).

use std::borrow::Cow;
use std::ops::Range;

use rayon::prelude::*;

use super::{Attention, BLOCK, Segment};
use crate::kernels::real::Real;
use crate::kernels::shared::{Shared, Strides};
use crate::kernels::simd::{exp_below, largest, sum2};
use crate::kernels::slices::product;
use crate::kernels::wide::wide;

/// Up to this many queries a segment's keys are read where they are, and not copied together for a product.
pub(super) const FEW: usize = 4;
/// From so many segments on, a task of few queries takes all heads that share keys.
pub(super) const MANY: usize = 4;
/// Keys whose scores are formed at a time.
pub(super) const TILE: usize = 256;
/// Numbers from one row of a turned tile to the next: not a power of two, whose rows would share the few sets of a cache that lines so far apart fall into.
const TURNED: usize = TILE + 16;

/// Keys or values of one head of a segment.
pub(super) struct Rows<'a, T: Real> {
    rows: Cow<'a, [T]>,
    /// Numbers from one row to the next.
    stride: usize,
    width: usize,
    /// Where kernels read columns: (width, [`TURNED`]) of each tile.
    turned: Vec<T>,
    /// The segment's key that the first row is of.
    first: usize,
}

/// Where the keys and values of a segment and head come from, tile by tile.
pub(super) trait TileSource<T: Real> {
    /// Rows with at least the keys and values (where an output is wanted) of a tile.
    fn tile(&mut self, keys: &Range<usize>) -> (&Rows<'_, T>, Option<&Rows<'_, T>>);
}

impl<T: Real> TileSource<T> for (&Rows<'_, T>, Option<&Rows<'_, T>>) {
    fn tile(&mut self, _: &Range<usize>) -> (&Rows<'_, T>, Option<&Rows<'_, T>>) {
        *self
    }
}

impl<'a, T: Real> Rows<'a, T> {
    /// Columns `column..column + width` of a segment's rows of a width. `turn`: scores are formed with them.
    pub(super) fn new(
        segment: &Segment,
        rows: &'a [T],
        row_width: usize,
        (column, width): (usize, usize),
        turn: bool,
    ) -> Self {
        let (rows, stride) = segment.key_rows(rows, row_width, column, width);
        let mut turned = Vec::new();
        if turn && T::has_tiles() {
            let count = segment.key_count();
            turned.resize(count.div_ceil(TILE) * width * TURNED, T::zero());
            for (tile, first) in turned.chunks_exact_mut(width * TURNED).zip((0..count).step_by(TILE)) {
                for (x, row) in tile.chunks_exact_mut(TURNED).enumerate() {
                    let own = rows[first * stride + x..].iter().step_by(stride);
                    row[..TILE].iter_mut().zip(own).for_each(|(to, from)| *to = *from);
                }
            }
        }
        Self { rows, stride, width, turned, first: 0 }
    }

    /// Room for the rows of one tile of a width.
    pub(super) fn of_tile(width: usize) -> Self {
        let rows = Cow::Owned(vec![T::zero(); TILE * width]);
        Self { rows, stride: width, width, turned: Vec::new(), first: 0 }
    }

    /// Has `fill` write the rows of the keys `keys`, at most a tile. `turn`: scores are formed with them.
    pub(super) fn fill(&mut self, keys: &Range<usize>, turn: bool, fill: impl FnOnce(&mut [T])) {
        let (rows, width) = (self.rows.to_mut(), self.width);
        self.first = keys.start;
        fill(&mut rows[..keys.len() * width]);
        if turn && T::has_tiles() {
            self.turned.resize(width * TURNED, T::zero());
            for (x, row) in self.turned.chunks_exact_mut(TURNED).enumerate() {
                let own = rows[x..].iter().step_by(width);
                row.iter_mut().zip(own).for_each(|(to, from)| *to = *from);
            }
        }
    }

    /// From a row on.
    fn from(&self, row: usize) -> &[T] {
        &self.rows[(row - self.first) * self.stride..]
    }

    /// (m, keys) = scale · (m, width) (keys, width)ᵀ for keys of one tile.
    fn products(&self, (m, keys): (usize, &Range<usize>), out: &mut [T], left: &[T], left_strides: Strides, scale: T) {
        let shape = (m, keys.len(), self.width);
        if self.turned.is_empty() {
            let right = Strides(1, self.stride);
            product(
                shape,
                out,
                Strides(keys.len(), 1),
                false,
                left,
                left_strides,
                self.from(keys.start),
                right,
                scale,
                false,
            );
            return;
        }
        let start = keys.start - self.first;
        let right = &self.turned[start / TILE * self.width * TURNED + start % TILE..];
        T::tile_product(shape, (out, keys.len()), false, (left, left_strides), (right, TURNED), scale);
    }
}

/// (m, n) += (m, k) (k, n): rows of the right side and of the result are so many numbers apart.
fn add_product<T: Real>(
    shape: (usize, usize, usize),
    (out, stride): (&mut [T], usize),
    (left, left_strides): (&[T], Strides),
    (right, right_stride): (&[T], usize),
) {
    if !T::tile_product(shape, (&mut *out, stride), true, (left, left_strides), (right, right_stride), T::one()) {
        let strides = (Strides(stride, 1), Strides(right_stride, 1));
        product(shape, out, strides.0, true, left, left_strides, right, strides.1, T::one(), false);
    }
}

/// Up to [`BLOCK`] queries of a segment and head.
pub(super) struct Queries<'a> {
    pub segment: &'a Segment,
    pub head: usize,
    /// Rows of the segment.
    pub rows: Range<usize>,
}

/// A tile: some keys, and those of the queries that see any of them.
struct Tile {
    keys: Range<usize>,
    rows: Range<usize>,
}

/// What tiles are formed in.
pub(super) struct Buffers<T> {
    scores: Vec<T>,
    slopes: Vec<T>,
    gradients: Vec<T>,
    outputs: Vec<T>,
}

impl<T: Real> Buffers<T> {
    pub(super) fn new(width: usize) -> Self {
        let tile = || vec![T::zero(); BLOCK * TILE];
        Self { scores: tile(), slopes: Vec::new(), gradients: Vec::new(), outputs: vec![T::zero(); BLOCK * width] }
    }
}

impl Attention {
    /// The output from q, k and v.
    pub(super) fn forward<T: Real>(&self, q: &[T], k: &[T], v: &[T]) -> Vec<T> {
        let (q_width, kv_stride) = (self.q_width(), self.kv_stride);
        let d = self.form.head_dim;
        let mut y = vec![T::zero(); q.len()];
        let mut logs = vec![f64::NAN; q.len() / d];
        let (out, out_logs) = (Shared(y.as_mut_ptr()), Shared(logs.as_mut_ptr()));
        let group = self.heads / self.kv_heads;
        // Heads that share keys read them together, unless there would be hardly a task for every thread.
        let together = if self.segments.len() < MANY { 1 } else { group };
        let (few, many): (Vec<&Segment>, Vec<&Segment>) = self.segments.iter().partition(|s| s.q_len <= FEW);
        // Keys and values of a head, next to each other where they lie in several spans.
        let heads = many.par_iter().flat_map_iter(|&s| (0..self.kv_heads).map(move |kv| (s, kv)));
        let of = |(s, kv): (&Segment, usize)| {
            [(k, true), (v, false)].map(|(rows, turn)| Rows::new(s, rows, kv_stride, (kv * d, d), turn))
        };
        let gathered: Vec<[Rows<'_, T>; 2]> = heads.map(of).collect();
        let blocks = many.iter().enumerate().flat_map(|(i, &segment)| {
            (0..self.heads).flat_map(move |head| {
                let rows = (0..segment.q_len).step_by(BLOCK).map(move |at| at..(at + BLOCK).min(segment.q_len));
                rows.map(move |rows| (i, Queries { segment, head, rows }))
            })
        });
        // What takes longest first.
        let blocks: Vec<_> = blocks.collect();
        let singles = few.iter().flat_map(|&s| (0..self.heads).step_by(together).map(move |head| (s, head)));
        let singles: Vec<_> = singles.collect();
        let many = || {
            blocks.par_iter().rev().with_max_len(8).for_each_init(
                || Buffers::new(d),
                |buffers, (i, queries)| {
                    let [k, v] = &gathered[i * self.kv_heads + queries.head / group];
                    let first = queries.segment.q_start + queries.rows.start;
                    self.attend(queries, (q, (k, Some(v))), buffers, |row, output, log| {
                        let at = (first + row) * self.heads + queries.head;
                        // SAFETY: the segments' query rows are disjoint (checked in `new`) and each task owns one head's columns of some of them.
                        unsafe {
                            out.at(at * d).copy_from_nonoverlapping(output.as_ptr(), d);
                            *out_logs.at(at) = log.to_f64();
                        }
                    });
                },
            );
        };
        let single = || {
            singles.par_iter().with_max_len(1).for_each(|&(s, head)| {
                let column = self.key_column(head);
                let places: Vec<usize> = s.rows().map(|row| row * kv_stride + column).collect();
                for i in 0..s.q_len {
                    let at = (s.q_start + i) * q_width + head * d;
                    // SAFETY: as above: this task's row and columns.
                    let out = unsafe { std::slice::from_raw_parts_mut(out.at(at), together * d) };
                    let seen = self.form.seen((places.len() + i).saturating_sub(s.q_len), places.len());
                    let places = &places[seen];
                    self.one_query(&q[at..at + together * d], (k, v, places), out);
                }
            });
        };
        rayon::join(many, single);
        let _ = self.logs.set(logs);
        y
    }

    /// The keys that each of some queries sees.
    fn seen(&self, queries: &Queries<'_>) -> impl Fn(usize) -> Range<usize> + use<> {
        let (count, before) = (queries.segment.key_count(), queries.rows.start);
        let (form, length) = (self.form, queries.segment.q_len);
        move |row| form.seen((before + row + count).saturating_sub(length), count)
    }

    fn tiles(&self, queries: &Queries<'_>) -> impl Iterator<Item = Tile> + use<> {
        let (seen, n) = (self.seen(queries), queries.rows.len());
        let (first, end) = (seen(0).start, seen(n - 1).end);
        (first / TILE * TILE..end).step_by(TILE).map(move |at| {
            let keys = at.max(first)..(at + TILE).min(end);
            let sees = |row: &usize| seen(*row).start < keys.end && seen(*row).end > keys.start;
            // Positions go up, so that those who see a key stand next to each other.
            let start = (0..n).find(sees).unwrap_or(n);
            let rows = start..(start..n).find(|row| !sees(row)).unwrap_or(n);
            Tile { keys, rows }
        })
    }

    /// Scores of a tile, row after row. With a cap: in `slopes`, what it does to the gradient of each.
    fn scores<T: Real>(
        &self,
        queries: &Queries<'_>,
        tile: &Tile,
        (q, k): (&[T], &Rows<'_, T>),
        (scores, slopes): (&mut [T], Option<&mut Vec<T>>),
    ) {
        let (q_width, d, width) = (self.q_width(), self.form.head_dim, tile.keys.len());
        let row = queries.segment.q_start + queries.rows.start + tile.rows.start;
        let (q, scale) = (&q[row * q_width + queries.head * d..], T::from_f64(self.form.scale));
        k.products((tile.rows.len(), &tile.keys), scores, q, Strides(q_width, 1), scale);
        if let Some(cap) = self.form.cap.map(T::from_f64) {
            let all = scores[..tile.rows.len() * width].iter_mut();
            let bent = all.map(|score| {
                let t = (*score / cap).tanh();
                *score = t * cap;
                T::one() - t * t
            });
            match slopes {
                Some(slopes) => {
                    slopes.clear();
                    slopes.extend(bent);
                }
                None => bent.for_each(drop),
            }
        }
    }

    /// The output of some queries: `put` takes each row's number, its output (d) and the logarithm of the sum of its exponentials.
    pub(super) fn attend<T: Real>(
        &self,
        queries: &Queries<'_>,
        (q, mut source): (&[T], impl TileSource<T>),
        buffers: &mut Buffers<T>,
        mut put: impl FnMut(usize, &[T], T),
    ) {
        let (d, n, seen) = (self.form.head_dim, queries.rows.len(), self.seen(queries));
        let (mut tops, mut sums) = ([T::neg_infinity(); BLOCK], [T::zero(); BLOCK]);
        let Buffers { scores, outputs, .. } = buffers;
        outputs[..n * d].fill(T::zero());
        for tile in self.tiles(queries) {
            let (k, v) = source.tile(&tile.keys);
            self.scores(queries, &tile, (q, k), (scores, None));
            let width = tile.keys.len();
            for (row, scores) in tile.rows.clone().zip(scores.chunks_exact_mut(width)) {
                let seen = seen(row);
                let (start, end) = (seen.start.max(tile.keys.start), seen.end.min(tile.keys.end));
                let (start, end) = (start - tile.keys.start, end - tile.keys.start);
                let before = tops[row];
                let top = num_traits::Float::max(largest(&scores[start..end]), before);
                let sum = exp_below(&mut scores[start..end], top);
                scores[..start].fill(T::zero());
                scores[end..].fill(T::zero());
                if top > before {
                    let shrunk = (before - top).exp();
                    sums[row] *= shrunk;
                    outputs[row * d..][..d].iter_mut().for_each(|o| *o *= shrunk);
                    tops[row] = top;
                }
                sums[row] += sum;
            }
            let Some(v) = v else { continue };
            let (shape, outputs) = ((tile.rows.len(), d, width), &mut outputs[tile.rows.start * d..]);
            add_product(shape, (outputs, d), (scores, Strides(width, 1)), (v.from(tile.keys.start), v.stride));
        }
        for row in 0..n {
            let inverse = sums[row].recip();
            let output = &mut outputs[row * d..][..d];
            output.iter_mut().for_each(|o| *o *= inverse);
            put(row, output, tops[row] + sums[row].ln());
        }
    }

    /// The backward of some queries: adds to dK and dV of the segment's keys (keys, d), and gives `put` each row's number and its dQ (d). `y` and `g` are the
    /// output and its gradient, `logs` the logarithm of each row's sum.
    ///
    /// dV = Pᵀ dO, dS = P∘(dO Vᵀ − rowsum(dO∘O))·scale (times the cap's slope), dQ = dS K, dK = dSᵀ Q.
    pub(super) fn attend_backward<T: Real>(
        &self,
        queries: &Queries<'_>,
        ([q, y, g], k, v): ([&[T]; 3], &Rows<'_, T>, &Rows<'_, T>),
        logs: &[T],
        (dk, dv): (&mut [T], &mut [T]),
        buffers: &mut Buffers<T>,
        mut put: impl FnMut(usize, &[T]),
    ) {
        let (q_width, d, n, seen) = (self.q_width(), self.form.head_dim, queries.rows.len(), self.seen(queries));
        let scale = T::from_f64(self.form.scale);
        let first = (queries.segment.q_start + queries.rows.start) * q_width + queries.head * d;
        let place = |row: usize| first + row * q_width;
        let along: Vec<T> =
            (0..n).map(|row| sum2(&g[place(row)..][..d], &y[place(row)..][..d], |g, y| g * y)).collect();
        let Buffers { scores, slopes, gradients, outputs } = buffers;
        gradients.resize(BLOCK * TILE, T::zero());
        outputs[..n * d].fill(T::zero());
        for tile in self.tiles(queries) {
            let width = tile.keys.len();
            self.scores(queries, &tile, (q, k), (scores, self.form.cap.map(|_| &mut *slopes)));
            let (rows, at) = (tile.rows.len(), place(tile.rows.start));
            v.products((rows, &tile.keys), gradients, &g[at..], Strides(q_width, 1), T::one());
            for (i, row) in tile.rows.clone().enumerate() {
                let (p, ds) = (&mut scores[i * width..][..width], &mut gradients[i * width..][..width]);
                let seen = seen(row);
                let (start, end) = (seen.start.max(tile.keys.start), seen.end.min(tile.keys.end));
                let (start, end) = (start - tile.keys.start, end - tile.keys.start);
                let (log, along) = (logs[row], along[row]);
                wide!({
                    for (p, ds) in p[start..end].iter_mut().zip(&mut ds[start..end]) {
                        *p = (*p - log).exp_fast();
                        *ds = *p * (*ds - along) * scale;
                    }
                });
                for outside in [0..start, end..width] {
                    p[outside.clone()].fill(T::zero());
                    ds[outside].fill(T::zero());
                }
            }
            if self.form.cap.is_some() {
                gradients.iter_mut().zip(slopes.iter()).for_each(|(ds, slope)| *ds *= *slope);
            }
            let (keys, turned) = (tile.keys.start * d, Strides(1, width));
            let outputs = &mut outputs[tile.rows.start * d..];
            let own_k = (k.from(tile.keys.start), k.stride);
            add_product((rows, d, width), (outputs, d), (gradients, Strides(width, 1)), own_k);
            add_product((width, d, rows), (&mut dk[keys..], d), (gradients, turned), (&q[at..], q_width));
            add_product((width, d, rows), (&mut dv[keys..], d), (scores, turned), (&g[at..], q_width));
        }
        (0..n).for_each(|row| put(row, &outputs[row * d..][..d]));
    }
}
