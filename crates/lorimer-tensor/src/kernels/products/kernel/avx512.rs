//! The kernel's inner loops in AVX-512 registers.

use std::arch::x86_64::*;
use std::ops::Range;

use super::scratch::{PANEL, Scratch};
use crate::kernels::products::right::{plain, right_row};
use crate::kernels::products::terms::Term;
use crate::kernels::simd::softmax;

/// Most rows of a tile in the 32 registers: 14 rows of two, two of the right side, and one of the left.
const TILE: usize = 14;
/// Most rows whose dot products are formed at a time, and columns: 24 sums, four rows of the right side and one of the left.
const DOTS: (usize, usize) = (6, 4);

/// Dot products of few rows with rows of the right side, as [`super::few`]. A result does not depend on how many rows there are.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn few(
    term: &Term<'_, f32>,
    left: *const f32,
    out: *mut f32,
    (rows, stride): (usize, usize),
    columns: Range<usize>,
    keep: bool,
    scratch: &mut Scratch,
) {
    let depth = term.depth;
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
                dots!(1 2 3 4 5 6);
            }
            row += m;
        }
    }
}

/// Dot products of M rows with four of the right side, of which `n` count.
#[inline]
#[target_feature(enable = "avx512f")]
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
    // SAFETY: the caller's pointers hold M rows of `depth` numbers, four rows of the right side, and M rows of n results.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); DOTS.1]; M];
        let whole = depth / 16 * 16;
        let mut d = 0;
        while d < whole {
            let b = b.map(|b| {
                if AHEAD {
                    // A hint: an address outside of memory is ignored.
                    _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(d + ahead).cast());
                }
                _mm512_loadu_ps(b.add(d))
            });
            for (i, sums) in sums.iter_mut().enumerate() {
                let a = _mm512_loadu_ps(a.add(i * a_row + d));
                for (sum, &b) in sums.iter_mut().zip(&b) {
                    *sum = _mm512_fmadd_ps(a, b, *sum);
                }
            }
            d += 16;
        }
        if d < depth {
            let mask = ((1u32 << (depth - d)) - 1) as __mmask16;
            let b = b.map(|b| _mm512_maskz_loadu_ps(mask, b.add(d)));
            for (i, sums) in sums.iter_mut().enumerate() {
                let a = _mm512_maskz_loadu_ps(mask, a.add(i * a_row + d));
                for (sum, &b) in sums.iter_mut().zip(&b) {
                    *sum = _mm512_fmadd_ps(a, b, *sum);
                }
            }
        }
        for (i, &[s0, s1, s2, s3]) in sums.iter().enumerate() {
            // Four sums over sixteen lanes at once: pairs, then fours of lanes, then the four quarters.
            let t0 = _mm512_add_ps(_mm512_unpacklo_ps(s0, s1), _mm512_unpackhi_ps(s0, s1));
            let t1 = _mm512_add_ps(_mm512_unpacklo_ps(s2, s3), _mm512_unpackhi_ps(s2, s3));
            let (t0, t1) = (_mm512_castps_pd(t0), _mm512_castps_pd(t1));
            let low = _mm512_castpd_ps(_mm512_unpacklo_pd(t0, t1));
            let u = _mm512_add_ps(low, _mm512_castpd_ps(_mm512_unpackhi_pd(t0, t1)));
            let u = _mm512_add_ps(u, _mm512_shuffle_f32x4::<0b01_00_11_10>(u, u));
            let u = _mm512_add_ps(u, _mm512_shuffle_f32x4::<0b10_11_00_01>(u, u));
            let mask = ((1u32 << n) - 1) as __mmask16;
            let c = c.add(i * c_row);
            let u = if keep { _mm512_add_ps(u, _mm512_maskz_loadu_ps(mask, c)) } else { u };
            _mm512_mask_storeu_ps(c, mask, u);
        }
    }
}

/// Attention of one query in up to six heads that share keys: softmax(q Kᵀ · scale) V with the keys and values at `places`. q and `out`
/// (heads, d), d a multiple of 16. A head's result does not depend on the others.
#[target_feature(enable = "avx512f")]
pub(crate) fn attend_one(
    (q, d): (&[f32], usize),
    (keys, values, places): (&[f32], &[f32], &[usize]),
    scale: f32,
    out: &mut [f32],
) {
    let (heads, seen) = (q.len() / d, places.len());
    assert!(heads <= DOTS.0 && q.len() == heads * d && out.len() == q.len() && d.is_multiple_of(16));
    assert!(places.iter().all(|at| at + d <= keys.len() && at + d <= values.len()), "attention: a key outside");
    let mut p = vec![0f32; heads * seen];
    for (i, some) in places.chunks(DOTS.1).enumerate() {
        let k: [*const f32; DOTS.1] = std::array::from_fn(|j| keys[some[j.min(some.len() - 1)]..].as_ptr());
        let c = p[i * DOTS.1..].as_mut_ptr();
        let (a, strides, n) = (q.as_ptr(), (d, seen), some.len());
        macro_rules! dots {
            ($($m:literal)*) => {
                match heads {
                    // SAFETY: q has so many rows, the keys are inside (asserted), and p has room for n numbers a row.
                    $($m => unsafe { dots::<$m, false>(d, a, k, c, strides, false, n, 0) },)*
                    _ => {}
                }
            };
        }
        dots!(1 2 3 4 5 6);
    }
    for p in p.chunks_exact_mut(seen.max(1)) {
        p.iter_mut().for_each(|p| *p *= scale);
        softmax(p);
    }
    let values: Vec<*const f32> = places.iter().map(|&at| values[at..].as_ptr()).collect();
    // SAFETY: p is (heads, seen), every value has d numbers (asserted), and so has every row of `out`.
    unsafe { weighted((heads, d), &p, &values, (out.as_mut_ptr(), d), false) };
}

/// `y ← y + w (x Aᵀ) B` for up to six rows: x (rows, inputs), y (rows, outputs), A and B as their vectors. A row's result does not depend on the
/// others.
///
/// # Safety
/// Every vector of `a` has `inputs` numbers and every one of `b` `outputs`.
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn add_low_rank(
    (x, inputs): (&[f32], usize),
    (a, b): (&[*const f32], &[*const f32]),
    weight: f32,
    (y, outputs): (&mut [f32], usize),
    down: &mut [f32],
) {
    let (rows, rank) = (x.len() / inputs, a.len());
    assert!(rows <= DOTS.0 && y.len() == rows * outputs && down.len() == rows * rank && b.len() == rank);
    for (i, some) in a.chunks(DOTS.1).enumerate() {
        let w: [*const f32; DOTS.1] = std::array::from_fn(|j| some[j.min(some.len() - 1)]);
        let (a, c, n) = (x.as_ptr(), down[i * DOTS.1..].as_mut_ptr(), some.len());
        macro_rules! dots {
            ($($m:literal)*) => {
                match rows {
                    // SAFETY: x has so many rows, the vectors are the caller's, and `down` has room for n numbers a row.
                    $($m => unsafe { dots::<$m, true>(inputs, a, w, c, (inputs, rank), false, n, DOTS.1 * inputs) },)*
                    _ => {}
                }
            };
        }
        dots!(1 2 3 4 5 6);
    }
    down.iter_mut().for_each(|u| *u *= weight);
    // SAFETY: the caller's vectors; y has so many rows.
    unsafe { weighted((rows, outputs), down, b, (y.as_mut_ptr(), outputs), true) };
}

/// Σ p v for up to six rows of p (rows, values), each over all of the values' d numbers.
///
/// # Safety
/// Every value has d numbers, and so has every row of `out`.
#[target_feature(enable = "avx512f")]
unsafe fn weighted(
    (rows, d): (usize, usize),
    p: &[f32],
    values: &[*const f32],
    (out, stride): (*mut f32, usize),
    keep: bool,
) {
    let mut column = 0;
    while column < d {
        let wide = d - column >= 64;
        let n = (d - column).min(if wide { 64 } else { 16 });
        macro_rules! columns {
            ($($m:literal)*) => {
                match (rows, wide) {
                    $(
                        // SAFETY: as this function's; n columns are inside.
                        ($m, true) => unsafe { weighted_columns::<$m, 4>(p, values, column, (out, stride), keep, n) },
                        // SAFETY: as above.
                        ($m, false) => unsafe { weighted_columns::<$m, 1>(p, values, column, (out, stride), keep, n) },
                    )*
                    _ => {}
                }
            };
        }
        columns!(1 2 3 4 5 6);
        column += n;
    }
}

/// [`weighted`] for M rows and W registers of columns; in one register, n columns of it.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn weighted_columns<const M: usize, const W: usize>(
    p: &[f32],
    values: &[*const f32],
    column: usize,
    (out, stride): (*mut f32, usize),
    keep: bool,
    n: usize,
) {
    let mask = ((1u32 << n.min(16)) - 1) as __mmask16;
    // SAFETY: as the caller says.
    unsafe {
        let out = out.add(column);
        let mut sums = [[_mm512_setzero_ps(); W]; M];
        if keep {
            for (i, sums) in sums.iter_mut().enumerate() {
                for (w, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm512_maskz_loadu_ps(mask, out.add(i * stride + w * 16));
                }
            }
        }
        for (j, v) in values.iter().enumerate() {
            let v: [__m512; W] = std::array::from_fn(|w| _mm512_maskz_loadu_ps(mask, v.add(column + w * 16)));
            for (i, sums) in sums.iter_mut().enumerate() {
                let p = _mm512_set1_ps(*p.as_ptr().add(i * values.len() + j));
                sums.iter_mut().zip(&v).for_each(|(sum, &v)| *sum = _mm512_fmadd_ps(p, v, *sum));
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            for (w, &sum) in sums.iter().enumerate() {
                _mm512_mask_storeu_ps(out.add(i * stride + w * 16), mask, sum);
            }
        }
    }
}

/// All tiles of a task, as [`super::block`]. Rows are cut into tiles as like each other as can be, so that none has few.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn block(
    (rows, columns, depth): (usize, usize, usize),
    left: *const f32,
    packed: *const f32,
    out: *mut f32,
    strides: (usize, usize, usize),
    keep: bool,
) {
    let tiles = rows.div_ceil(TILE);
    let (height, higher) = (rows / tiles.max(1), rows % tiles.max(1));
    let mut row = 0;
    for i in 0..tiles {
        let m = height + usize::from(i < higher);
        for column in (0..columns).step_by(2 * PANEL) {
            let n = (2 * PANEL).min(columns - column);
            // SAFETY: the tile lies inside the caller's matrices; its panels follow each other.
            unsafe {
                let a = left.add(row * strides.0);
                let b = packed.add(column * depth);
                let c = out.add(row * strides.2 + column);
                macro_rules! tiles {
                    ($($m:literal)*) => {
                        match (m, n <= PANEL) {
                            $(
                                ($m, true) => tile::<$m, 1>(depth, a, b, c, strides, keep, n),
                                ($m, false) => tile::<$m, 2>(depth, a, b, c, strides, keep, n),
                            )*
                            _ => {}
                        }
                    };
                }
                tiles!(1 2 3 4 5 6 7 8 9 10 11 12 13 14);
            }
        }
        row += m;
    }
}

/// M rows by W panels of 16 columns, of which `n` numbers count.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn tile<const M: usize, const W: usize>(
    depth: usize,
    mut a: *const f32,
    b: *const f32,
    c: *mut f32,
    (a_row, a_depth, c_row): (usize, usize, usize),
    keep: bool,
    n: usize,
) {
    // SAFETY: the caller's pointers hold M rows, W panels of `depth` by 16 packed numbers, and M rows of n results.
    unsafe {
        for i in 0..M {
            for w in 0..W {
                _mm_prefetch::<_MM_HINT_T0>(c.wrapping_add(i * c_row + w * PANEL).cast());
            }
        }
        let mut sums = [[_mm512_setzero_ps(); W]; M];
        for d in 0..depth {
            let b: [__m512; W] = std::array::from_fn(|w| _mm512_loadu_ps(b.add((w * depth + d) * PANEL)));
            for (i, sums) in sums.iter_mut().enumerate() {
                let a = _mm512_set1_ps(*a.add(i * a_row));
                for (sum, &b) in sums.iter_mut().zip(&b) {
                    *sum = _mm512_fmadd_ps(a, b, *sum);
                }
            }
            a = a.add(a_depth);
        }
        for (i, sums) in sums.iter().enumerate() {
            for (w, &sum) in sums.iter().enumerate() {
                let c = c.add(i * c_row + w * PANEL);
                let count = (n - w * PANEL).min(PANEL);
                let mask = (((1u32 << count) - 1) & 0xffff) as __mmask16;
                let sum = if keep { _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, c)) } else { sum };
                _mm512_mask_storeu_ps(c, mask, sum);
            }
        }
    }
}
