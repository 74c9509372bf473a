//! The kernel for AVX2 and FMA in f32, with tiles in AVX-512 registers where the processor has those.

mod avx512;
mod scratch;

pub(crate) use avx512::{add_low_rank, attend_one};

use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::right::{plain, right_row};
use super::terms::{FEW_ROWS, Product, Right, Term};
use crate::kernels::cpu::{Level, level};
use crate::kernels::shared::Shared;
use crate::storage::{Blocks, View};
use scratch::{PANEL, Scratch};

/// Rows of a tile.
const TILE: usize = 6;
/// Columns of a task, or the storage's granule where that is more.
const TASK_COLUMNS: usize = 32;
/// Longest part of a sum that is packed at a time: a task's panels then stay in the second-level cache.
const DEPTH: usize = 1536;
/// Results up to this wide are cut by rows too.
const NARROW: usize = 128;
/// Rows of a task where rows are cut.
const TASK_ROWS: usize = 96;
/// Most rows whose dot products are formed at a time, and columns: 12 sums, three of the right side and one of the left.
const DOTS: (usize, usize) = (4, 3);
/// Numbers in a line of the cache.
const LINE: usize = 16;
/// Rows that packing asks for ahead.
const AHEAD: usize = 16;

struct Task {
    product: usize,
    rows: Range<usize>,
    columns: Range<usize>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Whether the processor can.
pub(crate) fn available() -> bool {
    level() >= Level::Avx2
}

/// Whether the processor has AVX-512's registers too.
pub(crate) fn has_512() -> bool {
    level() >= Level::Avx512
}

/// Computes all the products in one parallel part. Their shapes are checked, and the processor has AVX2 and FMA, and AVX-512 if
/// `use_512` says so.
pub(crate) fn run(products: &[Product<'_, f32>], outs: &[Shared<f32>], use_512: bool) {
    let mut tasks = Vec::new();
    for (product, p) in products.iter().enumerate() {
        let granule = p.terms.iter().filter(|t| !t.transposed).map(|t| granule(t.right)).max().unwrap_or(1);
        let width = TASK_COLUMNS.next_multiple_of(granule);
        // A product of no rows has no task, but a step all the same.
        let height = if p.columns <= NARROW { TASK_ROWS } else { p.rows.max(1) };
        for row in (0..p.rows).step_by(height) {
            for column in (0..p.columns).step_by(width) {
                let rows = row..(row + height).min(p.rows);
                tasks.push(Task { product, rows, columns: column..(column + width).min(p.columns) });
            }
        }
    }
    tasks.par_iter().with_max_len(1).for_each(|task| {
        SCRATCH.with_borrow_mut(|scratch| {
            // SAFETY: the caller saw to the processor and the shapes; tasks write to rows and columns of their own.
            unsafe { one(&products[task.product], outs[task.product], task, scratch, use_512) };
        });
    });
}

fn granule(right: Right<'_, f32>) -> usize {
    match right {
        Right::Slice(..) => 1,
        Right::Weight(view) => view.granule(),
    }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn one(p: &Product<'_, f32>, out: Shared<f32>, task: &Task, scratch: &mut Scratch, use_512: bool) {
    let (rows, columns) = (task.rows.len(), task.columns.len());
    // SAFETY: inside the result.
    let out = unsafe { out.at(task.rows.start * p.columns + task.columns.start) };
    let mut keep = p.keep();
    for term in &p.terms {
        let left = term.left[(task.rows.start * term.strides.0).min(term.left.len())..].as_ptr();
        if term.transposed && rows <= FEW_ROWS && term.strides.1 == 1 {
            let (shape, columns) = ((rows, p.columns), task.columns.clone());
            // SAFETY: as this function's.
            unsafe {
                match use_512 {
                    true => avx512::few(term, left, out, shape, columns, keep, scratch),
                    false => few(term, left, out, shape, columns, keep, scratch),
                }
            };
            keep = true;
            continue;
        }
        let unit = if term.transposed { granule(term.right) } else { 1 };
        let parts = term.depth.div_ceil(DEPTH).max(1);
        let step = term.depth.div_ceil(parts).next_multiple_of(8).next_multiple_of(unit);
        let mut start = 0;
        while start < term.depth {
            let depth = step.min(term.depth - start);
            let panels = columns.div_ceil(PANEL);
            scratch.packed.resize(panels * PANEL * depth, 0.0);
            pack(term, start..start + depth, task.columns.clone(), scratch);
            // SAFETY: the left side, the packed panels and the result are as long as the shapes say.
            unsafe {
                let left = left.add(start * term.strides.1);
                let strides = (term.strides.0, term.strides.1, p.columns);
                let (shape, packed) = ((rows, columns, depth), scratch.packed.as_ptr());
                match use_512 {
                    true => avx512::block(shape, left, packed, out, strides, keep),
                    false => block(shape, left, packed, out, strides, keep),
                }
            }
            keep = true;
            start += depth;
        }
        if term.depth == 0 && !keep {
            for row in 0..rows {
                // SAFETY: inside the result.
                unsafe { out.add(row * p.columns).write_bytes(0, columns) };
            }
            keep = true;
        }
    }
}

/// Asks for a line of memory. A hint: an address outside of memory is ignored.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn prefetch(address: *const f32) {
    // SAFETY: nothing is read; older compilers count the intrinsic as unsafe all the same.
    #[allow(unused_unsafe)]
    unsafe {
        _mm_prefetch::<_MM_HINT_T0>(address.cast());
    }
}

/// Dot products of few rows with rows of the right side. A result does not depend on how many rows there are.
#[target_feature(enable = "avx2,fma")]
unsafe fn few(
    term: &Term<'_, f32>,
    left: *const f32,
    out: *mut f32,
    (rows, stride): (usize, usize),
    columns: Range<usize>,
    keep: bool,
    scratch: &mut Scratch,
) {
    let depth = term.depth;
    if let Right::Weight(View::Blocks(blocks)) = term.right
        && blocks.has_dots()
    {
        let strides = (term.strides.0, stride);
        match rows {
            // SAFETY: the caller's.
            1 => return unsafe { few_blocks::<1>(blocks, left, out, strides, columns, keep) },
            // SAFETY: the caller's.
            2 => return unsafe { few_blocks::<2>(blocks, left, out, strides, columns, keep) },
            _ => {}
        }
    }
    scratch.expanded.resize(scratch.expanded.len().max(DOTS.1 * depth), 0.0);
    let parts = rows.div_ceil(DOTS.0).max(1);
    let (height, higher) = (rows / parts, rows % parts);
    // Reading the weight is what takes the time, so the next rows of it are asked for while these are multiplied.
    let ahead = plain(term.right).map_or(0, |(_, length)| DOTS.1 * length);
    for (j, column) in columns.clone().enumerate().step_by(DOTS.1) {
        let mut rooms = scratch.expanded.chunks_exact_mut(depth.max(1));
        let n = DOTS.1.min(columns.end - column);
        let mut w: [&[f32]; DOTS.1] = [&[]; DOTS.1];
        for (i, w) in w.iter_mut().enumerate() {
            // A column that is not there repeats the last one, and is not written.
            let column = column + i.min(n - 1);
            *w = right_row(term.right, column, depth, rooms.next().unwrap_or_default());
        }
        let w = w.map(<[f32]>::as_ptr);
        let mut row = 0;
        for part in 0..parts {
            let m = height + usize::from(part < higher);
            // SAFETY: the caller's shapes; the right rows are `depth` long.
            unsafe {
                let a = left.add(row * term.strides.0);
                let c = out.add(row * stride + j);
                let strides = (term.strides.0, stride);
                macro_rules! dots {
                    ($($m:literal)*) => {
                        match (m, part == 0 && ahead > 0) {
                            $(
                                ($m, true) => dots::<$m, true>(depth, a, w, c, strides, keep, n, ahead),
                                ($m, false) => dots::<$m, false>(depth, a, w, c, strides, keep, n, 0),
                            )*
                            _ => {}
                        }
                    };
                }
                dots!(1 2 3 4);
            }
            row += m;
        }
    }
}

/// [`few`] of M rows with blocks, without expanding them.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn few_blocks<const M: usize>(
    blocks: &Blocks,
    left: *const f32,
    out: *mut f32,
    (left_stride, stride): (usize, usize),
    columns: Range<usize>,
    keep: bool,
) {
    for (j, column) in columns.clone().enumerate().step_by(DOTS.1) {
        let n = DOTS.1.min(columns.end - column);
        // A column that is not there repeats the last one, and is not written.
        let rows = std::array::from_fn(|i| column + i.min(n - 1));
        // SAFETY: the caller's shapes and processor.
        unsafe {
            let sums = blocks.dots::<M>(rows, left, left_stride);
            for (k, sums) in sums.iter().enumerate().take(n) {
                for (i, sum) in sums.iter().enumerate() {
                    let c = out.add(i * stride + j + k);
                    *c = if keep { *c + sum } else { *sum };
                }
            }
        }
    }
}

/// Dot products of M rows with three of the right side, of which `n` count.
#[inline]
#[target_feature(enable = "avx2,fma")]
#[allow(clippy::too_many_arguments)]
unsafe fn dots<const M: usize, const AHEAD: bool>(
    depth: usize,
    a: *const f32,
    b: [*const f32; DOTS.1],
    c: *mut f32,
    (a_row, c_row): (usize, usize),
    keep: bool,
    n: usize,
    ahead: usize,
) {
    // SAFETY: the caller's pointers hold M rows of `depth` numbers, three rows of the right side, and M rows of n results.
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); DOTS.1]; M];
        let mut d = 0;
        while d + 8 <= depth {
            let b: [__m256; DOTS.1] = std::array::from_fn(|j| {
                if AHEAD && d.is_multiple_of(LINE) {
                    // A hint: an address outside of memory is ignored.
                    _mm_prefetch::<_MM_HINT_T0>(b[j].wrapping_add(d + ahead).cast());
                }
                _mm256_loadu_ps(b[j].add(d))
            });
            for (i, sums) in sums.iter_mut().enumerate() {
                let a = _mm256_loadu_ps(a.add(i * a_row + d));
                for (sum, &b) in sums.iter_mut().zip(&b) {
                    *sum = _mm256_fmadd_ps(a, b, *sum);
                }
            }
            d += 8;
        }
        let rest: [i32; 8] = std::array::from_fn(|i| if d + i < depth { -1 } else { 0 });
        let mask = _mm256_loadu_si256(rest.as_ptr().cast());
        if d < depth {
            let b: [__m256; DOTS.1] = std::array::from_fn(|j| _mm256_maskload_ps(b[j].add(d), mask));
            for (i, sums) in sums.iter_mut().enumerate() {
                let a = _mm256_maskload_ps(a.add(i * a_row + d), mask);
                for (sum, &b) in sums.iter_mut().zip(&b) {
                    *sum = _mm256_fmadd_ps(a, b, *sum);
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            for (j, &sum) in sums.iter().enumerate().take(n) {
                let four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
                let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                let one = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
                let c = c.add(i * c_row + j);
                *c = if keep { *c + one } else { one };
            }
        }
    }
}

/// Packs (depth, columns) of the right side into panels of 16 columns, each (depth, 16), short ones filled with zeros.
#[target_feature(enable = "avx2,fma")]
fn pack(term: &Term<'_, f32>, depths: Range<usize>, columns: Range<usize>, scratch: &mut Scratch) {
    let depth = depths.len();
    let Scratch { packed, expanded } = scratch;
    let panels = packed.chunks_exact_mut(PANEL * depth);
    if term.transposed {
        for (panel, first) in panels.zip(columns.clone().step_by(PANEL)) {
            let n = PANEL.min(columns.end - first);
            match (plain(term.right), term.right) {
                (Some((values, length)), _) => {
                    transpose(&values[first * length + depths.start..], length, n, depth, panel);
                }
                (None, Right::Weight(view)) => {
                    expanded.resize(PANEL * depth, 0.0);
                    for (i, row) in expanded.chunks_exact_mut(depth).take(n).enumerate() {
                        view.expand(first + i, depths.clone(), row);
                    }
                    transpose(expanded, depth, n, depth, panel);
                }
                (None, Right::Slice(..)) => {}
            }
        }
        return;
    }
    let width = columns.len();
    expanded.resize(expanded.len().max(width), 0.0);
    for (i, row) in depths.enumerate() {
        let values = match (plain(term.right), term.right) {
            (Some((values, length)), _) => {
                // A row is a page further on, where the processor's own prefetching does not reach.
                for column in columns.clone().step_by(LINE) {
                    let ahead = values.as_ptr().wrapping_add((row + AHEAD) * length + column);
                    prefetch(ahead);
                }
                &values[row * length + columns.start..][..width]
            }
            (None, Right::Weight(view)) => {
                view.expand(row, columns.clone(), expanded);
                &expanded[..width]
            }
            (None, Right::Slice(..)) => return,
        };
        for (c, values) in values.chunks(PANEL).enumerate() {
            let to = &mut packed[c * PANEL * depth + i * PANEL..][..PANEL];
            match <&[f32; PANEL]>::try_from(values) {
                Ok(values) => to.copy_from_slice(values),
                Err(_) => {
                    to[..values.len()].copy_from_slice(values);
                    to[values.len()..].fill(0.0);
                }
            }
        }
    }
}

/// `n` rows of `depth` numbers, `length` apart, to (depth, 16).
#[target_feature(enable = "avx2,fma")]
fn transpose(from: &[f32], length: usize, n: usize, depth: usize, to: &mut [f32]) {
    let mut done = 0;
    if n == PANEL && depth > 0 {
        assert!((PANEL - 1) * length + depth <= from.len() && depth * PANEL <= to.len());
        while done + 8 <= depth {
            for half in [0, 8] {
                // SAFETY: the assertion above bounds both sides.
                unsafe {
                    let source = from.as_ptr().add(half * length + done);
                    transpose_8x8(source, length, to.as_mut_ptr().add(done * PANEL + half));
                }
            }
            done += 8;
        }
    }
    for d in done..depth {
        let to = &mut to[d * PANEL..][..PANEL];
        for (j, to) in to.iter_mut().enumerate() {
            *to = if j < n { from[j * length + d] } else { 0.0 };
        }
    }
}

/// Eight rows of eight numbers, `length` apart, to eight rows [`PANEL`] apart.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn transpose_8x8(from: *const f32, length: usize, to: *mut f32) {
    // SAFETY: the caller's pointers hold eight rows of eight.
    unsafe {
        let r: [__m256; 8] = std::array::from_fn(|i| _mm256_loadu_ps(from.add(i * length)));
        let t: [__m256; 8] = std::array::from_fn(|i| match i % 2 {
            0 => _mm256_unpacklo_ps(r[i], r[i + 1]),
            _ => _mm256_unpackhi_ps(r[i - 1], r[i]),
        });
        for half in [0, 4] {
            let (a, b, c, d) = (t[half], t[half + 1], t[half + 2], t[half + 3]);
            let u = [
                _mm256_shuffle_ps::<0x44>(a, c),
                _mm256_shuffle_ps::<0xEE>(a, c),
                _mm256_shuffle_ps::<0x44>(b, d),
                _mm256_shuffle_ps::<0xEE>(b, d),
            ];
            // Each holds column i of rows half.. in its lower four lanes, and column i + 4 in its upper.
            for (i, u) in u.into_iter().enumerate() {
                _mm_storeu_ps(to.add(i * PANEL + half), _mm256_castps256_ps128(u));
                _mm_storeu_ps(to.add((i + 4) * PANEL + half), _mm256_extractf128_ps::<1>(u));
            }
        }
    }
}

/// All tiles of a task: `left` (rows, depth) by packed panels.
#[target_feature(enable = "avx2,fma")]
unsafe fn block(
    (rows, columns, depth): (usize, usize, usize),
    left: *const f32,
    packed: *const f32,
    out: *mut f32,
    strides: (usize, usize, usize),
    keep: bool,
) {
    for row in (0..rows).step_by(TILE) {
        for column in (0..columns).step_by(PANEL) {
            let n = PANEL.min(columns - column);
            // SAFETY: the tile lies inside the caller's matrices.
            unsafe {
                let a = left.add(row * strides.0);
                let b = packed.add(column * depth);
                let c = out.add(row * strides.2 + column);
                match (rows - row, n <= 8) {
                    (1, false) => tile::<1, 2>(depth, a, b, c, strides, keep, n),
                    (2, false) => tile::<2, 2>(depth, a, b, c, strides, keep, n),
                    (3, false) => tile::<3, 2>(depth, a, b, c, strides, keep, n),
                    (4, false) => tile::<4, 2>(depth, a, b, c, strides, keep, n),
                    (5, false) => tile::<5, 2>(depth, a, b, c, strides, keep, n),
                    (_, false) => tile::<TILE, 2>(depth, a, b, c, strides, keep, n),
                    (1, true) => tile::<1, 1>(depth, a, b, c, strides, keep, n),
                    (2, true) => tile::<2, 1>(depth, a, b, c, strides, keep, n),
                    (3, true) => tile::<3, 1>(depth, a, b, c, strides, keep, n),
                    (4, true) => tile::<4, 1>(depth, a, b, c, strides, keep, n),
                    (5, true) => tile::<5, 1>(depth, a, b, c, strides, keep, n),
                    (_, true) => tile::<TILE, 1>(depth, a, b, c, strides, keep, n),
                }
            }
        }
    }
}

/// M rows by W registers of columns, of which `n` numbers count.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn tile<const M: usize, const W: usize>(
    depth: usize,
    mut a: *const f32,
    b: *const f32,
    c: *mut f32,
    (a_row, a_depth, c_row): (usize, usize, usize),
    keep: bool,
    n: usize,
) {
    // SAFETY: the caller's pointers hold M rows, `depth` by 16 packed numbers, and M rows of n results.
    unsafe {
        // The result's lines come from memory while the sums are formed.
        for i in 0..M {
            prefetch(c.wrapping_add(i * c_row));
            prefetch(c.wrapping_add(i * c_row + n - 1));
        }
        let mut sums = [[_mm256_setzero_ps(); W]; M];
        for d in 0..depth {
            let b: [__m256; W] = std::array::from_fn(|w| _mm256_loadu_ps(b.add(d * PANEL + w * 8)));
            for (i, sums) in sums.iter_mut().enumerate() {
                let a = _mm256_broadcast_ss(&*a.add(i * a_row));
                for (sum, &b) in sums.iter_mut().zip(&b) {
                    *sum = _mm256_fmadd_ps(a, b, *sum);
                }
            }
            a = a.add(a_depth);
        }
        for (i, sums) in sums.iter().enumerate() {
            let c = c.add(i * c_row);
            if n == W * 8 {
                for (w, &sum) in sums.iter().enumerate() {
                    let c = c.add(w * 8);
                    let sum = if keep { _mm256_add_ps(sum, _mm256_loadu_ps(c)) } else { sum };
                    _mm256_storeu_ps(c, sum);
                }
            } else {
                let mut row = [0f32; PANEL];
                for (w, &sum) in sums.iter().enumerate() {
                    _mm256_storeu_ps(row.as_mut_ptr().add(w * 8), sum);
                }
                for (j, &sum) in row.iter().enumerate().take(n) {
                    *c.add(j) = if keep { *c.add(j) + sum } else { sum };
                }
            }
        }
    }
}
