//! Products of few rows for every processor: dot products with the weight where it lies, or expanded some rows at a time. Loops over arrays, which the
//! compiler puts into the vector registers of the target's baseline.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::right::right_row;
use super::terms::{FEW_ROWS, Product, Term};
use crate::kernels::portable::multiply_add;
use crate::kernels::shared::Shared;

/// Most rows whose dot products are formed at a time, and columns.
const DOTS: (usize, usize) = (4, 3);
/// Numbers of a register.
const LANES: usize = 4;
/// Columns of a task.
const TASK_COLUMNS: usize = 36;

/// The lanes of the sums of M rows.
type Lanes<const M: usize> = [[[f32; LANES]; DOTS.1]; M];

thread_local! {
    static EXPANDED: RefCell<Vec<f32>> = RefCell::default();
}

/// Computes all the products in one parallel part, where they are such; else `false`, and nothing is done. Their shapes are checked. `F`: products and
/// additions are rounded once.
pub(super) fn run<const F: bool>(products: &[Product<'_, f32>], outs: &[Shared<f32>]) -> bool {
    let few = |term: &Term<'_, f32>| term.transposed && term.strides.1 == 1;
    if !products.iter().all(|p| p.rows <= FEW_ROWS && p.terms.iter().all(few)) {
        return false;
    }
    let columns = |p: &Product<'_, f32>| (0..p.columns).step_by(TASK_COLUMNS);
    let tasks: Vec<_> = products.iter().zip(outs).flat_map(|(p, &out)| columns(p).map(move |c| (p, out, c))).collect();
    tasks.par_iter().with_max_len(1).for_each(|&(p, out, column)| {
        let columns = column..(column + TASK_COLUMNS).min(p.columns);
        let put = |row: usize, column: usize, sum: f32, keep: bool| {
            // SAFETY: inside the result; each task writes to columns of its own.
            unsafe {
                let to = out.at(row * p.columns + column);
                *to = if keep { *to + sum } else { sum };
            }
        };
        EXPANDED.with_borrow_mut(|expanded| {
            for (i, term) in p.terms.iter().enumerate() {
                let keep = p.keep() || i > 0;
                dots::<F>(term, p.rows, columns.clone(), expanded, |row, column, sum| put(row, column, sum, keep));
            }
        });
    });
    true
}

/// Dot products of the left side's rows with rows of the right side. A result does not depend on how many rows there are.
fn dots<const F: bool>(
    term: &Term<'_, f32>,
    rows: usize,
    columns: Range<usize>,
    expanded: &mut Vec<f32>,
    mut put: impl FnMut(usize, usize, f32),
) {
    let depth = term.depth;
    expanded.resize(expanded.len().max(DOTS.1 * depth), 0.0);
    for column in columns.clone().step_by(DOTS.1) {
        let count = DOTS.1.min(columns.end - column);
        let mut rooms = expanded.chunks_exact_mut(depth.max(1));
        // A column that is not there repeats the last one, and is not written.
        let right: [&[f32]; DOTS.1] = std::array::from_fn(|i| {
            right_row(term.right, column + i.min(count - 1), depth, rooms.next().unwrap_or_default())
        });
        let left = |row: usize| &term.left[(row * term.strides.0).min(term.left.len())..][..depth];
        for row in (0..rows).step_by(DOTS.0) {
            let mut sums: Lanes<{ DOTS.0 }> = Default::default();
            macro_rules! lanes {
                ($($m:literal)*) => {
                    match DOTS.0.min(rows - row) {
                        $($m => sums[..$m].copy_from_slice(&lanes::<$m, F>(std::array::from_fn(|i| left(row + i)), right)),)*
                        _ => {}
                    }
                };
            }
            lanes!(1 2 3 4);
            for (row, sums) in (row..rows).zip(&sums) {
                let left = left(row).as_chunks::<LANES>().1;
                for ((column, sums), right) in (column..column + count).zip(sums).zip(right) {
                    let right = right.as_chunks::<LANES>().1;
                    let sum = (sums[0] + sums[2]) + (sums[1] + sums[3]);
                    put(row, column, left.iter().zip(right).fold(sum, |sum, (&a, &b)| multiply_add::<F>(a, b, sum)));
                }
            }
        }
    }
}

/// The lanes of M rows' dot products, without what fills no register. A function of its own: where the lanes are also added up the compiler lays them out
/// for that, and is slower.
#[inline(never)]
fn lanes<const M: usize, const F: bool>(left: [&[f32]; M], right: [&[f32]; DOTS.1]) -> Lanes<M> {
    let mut sums: Lanes<M> = [Default::default(); M];
    let depth = right[0].len();
    let (left, right) = (left.map(|row| row[..depth].as_chunks().0), right.map(|row| row[..depth].as_chunks().0));
    for d in 0..depth / LANES {
        let right: [&[f32; LANES]; DOTS.1] = right.map(|row| &row[d]);
        for (sums, left) in sums.iter_mut().zip(&left) {
            let left: &[f32; LANES] = &left[d];
            for (sums, right) in sums.iter_mut().zip(right) {
                for (lane, sum) in sums.iter_mut().enumerate() {
                    *sum = multiply_add::<F>(left[lane], right[lane], *sum);
                }
            }
        }
    }
    sums
}
