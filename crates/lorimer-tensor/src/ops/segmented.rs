//! One frozen product for the rows of many adapters, and each adapter's low-rank change for its own rows.
//!
//! `y = x Wᵀ` is computed once for all rows; then rows `s` with adapters i get
//! `y_s ← y_s ∘ (1 + Σ w_i (o_i − 1)) + Σ w_i ((x_s A_iᵀ) B_i + c_i)`, and all rows W's bias (Chen et al. 2023,
//! *Punica*, arXiv 2310.18547, "SGMV"; Sheng et al. 2024, *S-LoRA*, arXiv 2311.03285, "MBGMM, MBGMV"). Every adapter has its own
//! rank r_i, so the work is `rows_i · 2 r_i (inputs + outputs)` and nothing is padded. Factors lie in pages of a pool. For a few rows (decoding)
//! they are read where they are; for more (prefill) they are copied together once a block of rows and multiplied by gemm.

use std::cell::RefCell;
use std::ops::Range;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use crate::kernels::products::kernel;
use crate::kernels::products::{Product, Right, Term, run};
use crate::kernels::shared::{Shared, Strides};
use crate::kernels::simd::sum2;
use crate::kernels::slices::{product, with_slices};
use crate::kernels::wide::wide;
use crate::storage::panels;
use crate::storage::{FrozenWeight, Guard, View};

/// Rows of a task.
const BLOCK: usize = 64;
/// Up to this many rows the factors are read where they are.
const FEW: usize = 4;

/// Vectors of one length, one after the other in pages of a pool.
#[derive(Clone, Copy, Debug)]
pub struct Paged<'a> {
    /// The pool's numbers.
    pub pool: &'a [f32],
    /// Numbers of a page.
    pub page: usize,
    /// The pages, in order, that the owner's numbers lie in.
    pub pages: &'a [u32],
    /// Where the first vector begins, in the owner's numbers.
    pub start: usize,
    /// How many vectors there are.
    pub count: usize,
    /// Numbers of a vector.
    pub length: usize,
}

impl Paged<'_> {
    /// An error unless all of it lies inside the pool.
    fn check(&self) -> Result<()> {
        let end = self.count.checked_mul(self.length).and_then(|n| n.checked_add(self.start));
        let pages = self.pool.len().checked_div(self.page).unwrap_or(0);
        let used = end.filter(|_| self.page > 0).and_then(|end| {
            let (first, last) = (self.start / self.page, end.div_ceil(self.page));
            self.pages.get(first.min(last)..last)
        });
        if used.is_none_or(|used| used.iter().any(|&p| p as usize >= pages)) {
            candle_core::bail!("segmented product: {} vectors of {} lie outside their pages", self.count, self.length);
        }
        Ok(())
    }

    /// Calls `f` with the pieces of vector `i`, each with the place of its first number in the vector.
    #[inline(always)]
    fn pieces(&self, i: usize, mut f: impl FnMut(usize, &[f32])) {
        let mut at = self.start + i * self.length;
        let mut done = 0;
        while done < self.length {
            let (page, inside) = (self.pages[at / self.page] as usize, at % self.page);
            let n = (self.page - inside).min(self.length - done);
            f(done, &self.pool[page * self.page + inside..][..n]);
            (at, done) = (at + n, done + n);
        }
    }

    /// Where the vectors are; what lies in two pages is copied to the end of `room`, which has capacity for all of it.
    fn vectors(&self, room: &mut Vec<f32>, to: &mut Vec<*const f32>) {
        to.clear();
        let (mut index, mut inside) = (self.start / self.page, self.start % self.page);
        for i in 0..self.count {
            if inside + self.length <= self.page {
                to.push(self.pool[self.pages[index] as usize * self.page + inside..][..self.length].as_ptr());
            } else {
                let start = room.len();
                assert!(room.capacity() - start >= self.length);
                self.pieces(i, |_, piece| room.extend_from_slice(piece));
                to.push(room[start..].as_ptr());
            }
            inside += self.length;
            while inside >= self.page {
                (index, inside) = (index + 1, inside - self.page);
            }
        }
    }

    /// All vectors, (count, length).
    fn gather(&self, to: &mut Vec<f32>) {
        to.clear();
        for i in 0..self.count {
            self.pieces(i, |_, piece| to.extend_from_slice(piece));
        }
    }

    /// All vectors as a tensor (count, length).
    fn tensor(&self) -> Result<Tensor> {
        let mut numbers = Vec::new();
        self.gather(&mut numbers);
        Tensor::from_vec(numbers, (self.count, self.length), &candle_core::Device::Cpu)
    }
}

/// Gates of a low-rank change, row by row: what u = x Aᵀ is multiplied by before B. The result for a row depends on that row alone.
pub trait RankGate: Send + Sync + std::fmt::Debug {
    /// Multiplies `u` (rows, rank) by the gates of rows with input `x` (rows, inputs), which are the rows from `first` on of all that are
    /// computed together.
    fn apply(&self, first: usize, x: &[f32], inputs: usize, u: &mut [f32]);
    /// Bytes that it takes.
    fn bytes(&self) -> usize;
}

/// What one adapter does to the output of a projection.
#[derive(Clone, Copy, Debug)]
pub struct Addition<'a> {
    /// A: r vectors of `inputs`.
    pub a: Paged<'a>,
    /// Bᵀ: r vectors of `outputs`, scaling included.
    pub b: Paged<'a>,
    /// o: what the frozen output is multiplied by (one vector of `outputs`).
    pub output_scale: Option<Paged<'a>>,
    /// c: what is added to every row (one vector of `outputs`).
    pub bias: Option<Paged<'a>>,
    /// What u = x Aᵀ is multiplied by, where that depends on x.
    pub gate: Option<&'a dyn RankGate>,
    /// w.
    pub weight: f32,
}

/// Rows of one or more adapters.
#[derive(Clone, Debug)]
pub struct Group<'a> {
    /// Which rows of x.
    pub rows: Range<usize>,
    /// What is added there, in order.
    pub additions: Vec<Addition<'a>>,
}

/// One frozen weight and the groups of rows that get more than its product. Groups are in order and apart from each other.
pub struct Segmented<'a> {
    /// W (outputs, inputs).
    pub weight: &'a FrozenWeight,
    /// Its bias (outputs), added last.
    pub bias: Option<&'a Tensor>,
    /// The groups.
    pub groups: Vec<Group<'a>>,
}

fn check(x: (usize, usize), part: &Segmented<'_>) -> Result<()> {
    let (outputs, inputs) = part.weight.dims()?;
    if inputs != x.1 {
        candle_core::bail!("segmented product: x is {x:?} but the weight is ({outputs}, {inputs})");
    }
    let mut end = 0;
    for group in &part.groups {
        if group.rows.start < end || group.rows.end < group.rows.start || group.rows.end > x.0 {
            candle_core::bail!("segmented product: rows {:?} are out of order or beyond {}", group.rows, x.0);
        }
        end = group.rows.end;
        for Addition { a, b, output_scale, bias, .. } in &group.additions {
            a.check()?;
            b.check()?;
            if a.count != b.count || a.length != inputs || b.length != outputs {
                candle_core::bail!(
                    "segmented product: factors ({}, {}) and ({}, {}) do not fit a weight of ({outputs}, {inputs})",
                    a.count,
                    a.length,
                    b.count,
                    b.length
                );
            }
            for vector in output_scale.iter().chain(bias) {
                vector.check()?;
                if (vector.count, vector.length) != (1, outputs) {
                    candle_core::bail!("segmented product: a vector of {} for {outputs} outputs", vector.length);
                }
            }
        }
    }
    Ok(())
}

#[derive(Default)]
struct Scratch {
    factor: Vec<f32>,
    /// x aᵀ of some rows (rows, rank).
    down: Vec<f32>,
    /// Where vectors are, between gathering them and the product that reads them.
    vectors: [Vec<*const f32>; 2],
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// The outputs (rows, outputs) of projections that read the same `x` (rows, inputs), in f32 on the CPU.
pub fn project_segmented(x: &Tensor, parts: &[Segmented<'_>]) -> Result<Vec<Tensor>> {
    let (rows, inputs) = x.dims2()?;
    for part in parts {
        check((rows, inputs), part)?;
    }
    let guards: Vec<_> = parts.iter().map(|part| part.weight.guard()).collect();
    let mut outputs = with_slices([x], |[x]: [&[f32]; 1]| {
        let mut outputs = frozen(x, (rows, inputs), &guards)?;
        let mut tasks: Vec<(usize, &Group<'_>, Range<usize>)> = Vec::new();
        for (i, part) in parts.iter().enumerate() {
            // Nothing is added to outputs that there are none of.
            let groups = part.groups.iter().filter(|g| !g.additions.is_empty() && !outputs[i].is_empty());
            for group in groups {
                for start in group.rows.clone().step_by(BLOCK) {
                    tasks.push((i, group, start..(start + BLOCK).min(group.rows.end)));
                }
            }
        }
        let widths: Vec<usize> = outputs.iter().map(|y| y.len() / rows.max(1)).collect();
        let shared: Vec<Shared<f32>> = outputs.iter_mut().map(|y| Shared(y.as_mut_ptr())).collect();
        tasks.par_iter().with_max_len(1).for_each(|(i, group, rows)| {
            let width = widths[*i];
            // SAFETY: the rows of groups are disjoint (checked) and inside the output; each task has its own block of them.
            let y = unsafe { std::slice::from_raw_parts_mut(shared[*i].at(rows.start * width), rows.len() * width) };
            let x = &x[rows.start * inputs..rows.end * inputs];
            SCRATCH.with_borrow_mut(|scratch| {
                scale(&group.additions, width, y, scratch);
                group.additions.iter().for_each(|addition| add((rows.start, x), (inputs, width), addition, y, scratch));
            });
        });
        Ok(outputs)
    })?;
    let of = |(y, part): (&mut Vec<f32>, &Segmented<'_>)| {
        let y = Tensor::from_vec(std::mem::take(y), (rows, part.weight.dims()?.0), x.device())?;
        part.bias.map_or_else(|| Ok(y.clone()), |bias| y.broadcast_add(bias))
    };
    outputs.iter_mut().zip(parts).map(of).collect()
}

/// The frozen products: in whole numbers where all the weights are laid out for that, else they are expanded.
fn frozen(x: &[f32], (rows, inputs): (usize, usize), weights: &[Guard<'_>]) -> Result<Vec<Vec<f32>>> {
    let views = weights.iter().map(Guard::view).collect::<Result<Vec<_>>>()?;
    let packed = views.iter().map(|view| match view {
        View::Panels(packed) => Some(*packed),
        _ => None,
    });
    if let Some(packed) = packed.collect::<Option<Vec<_>>>() {
        return Ok(panels::products(x, inputs, &packed));
    }
    let products = views
        .iter()
        .map(|&view| Product::new((rows, view.shape().0), vec![Term::forward(x, inputs, Right::Weight(view))]));
    run(products.collect())
}

/// `y ← y ∘ (1 + Σ w (o − 1))`, where there is an o.
fn scale(additions: &[Addition<'_>], outputs: usize, y: &mut [f32], scratch: &mut Scratch) {
    if additions.iter().all(|a| a.output_scale.is_none()) {
        return;
    }
    let factor = &mut scratch.factor;
    factor.clear();
    factor.resize(outputs, 1.0);
    for Addition { output_scale, weight, .. } in additions {
        if let Some(o) = output_scale {
            o.pieces(0, |at, o| factor[at..].iter_mut().zip(o).for_each(|(f, o)| *f += weight * (o - 1.0)));
        }
    }
    for y in y.chunks_exact_mut(outputs) {
        y.iter_mut().zip(factor.iter()).for_each(|(y, f)| *y *= f);
    }
}

/// `y ← y + w ((x Aᵀ) B + c)` for the rows of `x`, which are those from `first` on.
fn add(
    (first, x): (usize, &[f32]),
    (inputs, outputs): (usize, usize),
    addition: &Addition<'_>,
    y: &mut [f32],
    scratch: &mut Scratch,
) {
    let Addition { a, b, bias, gate, weight, .. } = addition;
    let rows = y.len() / outputs;
    if let Some(bias) = bias {
        for y in y.chunks_exact_mut(outputs) {
            bias.pieces(0, |at, c| y[at..].iter_mut().zip(c).for_each(|(y, c)| *y += weight * c));
        }
    }
    let rank = a.count;
    if rank == 0 || inputs == 0 {
        return;
    }
    let Scratch { factor, down, vectors } = scratch;
    down.clear();
    down.resize(rows * rank, 0.0);
    if rows <= FEW {
        #[cfg(target_arch = "x86_64")]
        if kernel::has_512() && gate.is_none() {
            factor.clear();
            // Vectors that lie in two pages are copied together; they do not move while there is room.
            factor.reserve(rank * (inputs + outputs));
            a.vectors(factor, &mut vectors[0]);
            b.vectors(factor, &mut vectors[1]);
            // SAFETY: the processor can; the vectors are as long as x's and y's rows (checked).
            return unsafe {
                kernel::add_low_rank((x, inputs), (&vectors[0], &vectors[1]), *weight, (y, outputs), down)
            };
        }
        wide!({
            for j in 0..rank {
                a.pieces(j, |at, piece| {
                    for (x, down) in x.chunks_exact(inputs).zip(down.chunks_exact_mut(rank)) {
                        down[j] += sum2(&x[at..at + piece.len()], piece, |x, a| x * a);
                    }
                });
            }
            if let Some(gate) = gate {
                gate.apply(first, x, inputs, down);
            }
            down.iter_mut().for_each(|u| *u *= weight);
            for j in 0..rank {
                b.pieces(j, |at, piece| {
                    for (y, down) in y.chunks_exact_mut(outputs).zip(down.chunks_exact(rank)) {
                        let u = down[j];
                        y[at..at + piece.len()].iter_mut().zip(piece).for_each(|(y, b)| *y += u * b);
                    }
                });
            }
        });
        return;
    }
    let (wide_x, wide_y, down_strides) = (Strides(inputs, 1), Strides(outputs, 1), Strides(rank, 1));
    a.gather(factor);
    // Gates choose by u as it is.
    let scale = if gate.is_some() { 1.0 } else { *weight };
    product((rows, rank, inputs), down, down_strides, false, x, wide_x, factor, Strides(1, inputs), scale, false);
    if let Some(gate) = gate {
        gate.apply(first, x, inputs, down);
        down.iter_mut().for_each(|u| *u *= weight);
    }
    b.gather(factor);
    product((rows, outputs, rank), y, wide_y, true, down, down_strides, factor, Strides(outputs, 1), 1.0, false);
}

/// The reference form out of plain candle operations.
pub fn project_segmented_reference(x: &Tensor, parts: &[Segmented<'_>]) -> Result<Vec<Tensor>> {
    let one = |part: &Segmented<'_>| {
        check(x.dims2()?, part)?;
        let w = part.weight.dense(x.dtype())?.t()?;
        let mut pieces = Vec::new();
        let mut at = 0;
        let end = Group { rows: x.dim(0)?..x.dim(0)?, additions: vec![] };
        for group in part.groups.iter().chain([&end]) {
            // Rows between two groups are the frozen product.
            for (rows, additions) in [(at..group.rows.start, &[][..]), (group.rows.clone(), &group.additions[..])] {
                if rows.is_empty() {
                    continue;
                }
                let x = x.narrow(0, rows.start, rows.len())?;
                let frozen = x.matmul(&w)?;
                let mut y = frozen.clone();
                for Addition { a, b, output_scale, bias, gate, weight } in additions {
                    if let Some(scale) = output_scale {
                        y = (y + (frozen.broadcast_mul(&(scale.tensor()? - 1.0)?)? * f64::from(*weight))?)?;
                    }
                    if let Some(bias) = bias {
                        y = y.broadcast_add(&(bias.tensor()? * f64::from(*weight))?)?;
                    }
                    if a.count > 0 {
                        let mut u = x.matmul(&a.tensor()?.t()?)?;
                        if let Some(gate) = gate {
                            let mut numbers = u.flatten_all()?.to_vec1::<f32>()?;
                            gate.apply(rows.start, &x.flatten_all()?.to_vec1::<f32>()?, x.dim(1)?, &mut numbers);
                            u = Tensor::from_vec(numbers, u.shape(), u.device())?;
                        }
                        y = (y + (u.matmul(&b.tensor()?)? * f64::from(*weight))?)?;
                    }
                }
                pieces.push(y);
            }
            at = group.rows.end;
        }
        let y = Tensor::cat(&pieces, 0)?;
        part.bias.map_or_else(|| Ok(y.clone()), |bias| y.broadcast_add(bias))
    };
    parts.iter().map(one).collect()
}

/// Copies the rows of `rows` (n, width), f32, into a pool of rows of `stride` numbers, which may be more: row i to row `to[i]`.
pub fn store_rows(
    (pool, stride): (&mut [f32], usize),
    rows: &Tensor,
    to: impl ExactSizeIterator<Item = usize>,
) -> Result<()> {
    let (n, width) = rows.dims2()?;
    if to.len() != n || width > stride {
        candle_core::bail!("{n} rows of {width} for {} places of {stride} in the pool", to.len());
    }
    with_slices([rows], |[rows]: [&[f32]; 1]| {
        for (row, place) in rows.chunks_exact(width.max(1)).zip(to) {
            let at = place.saturating_mul(stride);
            match pool.get_mut(at..at.saturating_add(width)) {
                Some(to) => to.copy_from_slice(row),
                None => candle_core::bail!("row {place} is outside the pool"),
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests;
