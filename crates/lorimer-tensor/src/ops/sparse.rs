//! A sparse change of a frozen weight: y = x Sᵀ with S (outputs, inputs) nearly empty and its entries trainable, and writing such entries
//! into a weight in place.
//!
//! Rows of a batch lie along the inner loops, some at a time: with xᵀ (inputs, rows) and gᵀ (outputs, rows), an entry's part of the forward
//! and of dx is a scaled row added to a row, and its gradient `dS_ij = Σ_t g_ti x_tj` a dot product, so that the full outer product is never
//! formed.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Result, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::kernels::products::{Out, Product, Right, Term, run};
use crate::kernels::real::Real;
use crate::kernels::slices::{slice, with_slice_list};

/// Where the entries of a sparse matrix (outputs, inputs) are: row by row, columns rising.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SparseIndex {
    shape: (usize, usize),
    /// First entry of each row, and the number of all.
    starts: Vec<u32>,
    /// Column of each entry.
    columns: Vec<u32>,
    /// The entries column by column: (row, place), and where each column's begin.
    by_column: Vec<(u32, u32)>,
    column_starts: Vec<u32>,
}

impl SparseIndex {
    /// From flat positions (row · inputs + column), which have to rise.
    pub fn new(flat: &[u32], (outputs, inputs): (usize, usize)) -> Result<Self> {
        let rising = flat.windows(2).all(|w| w[0] < w[1]);
        if !rising || flat.last().is_some_and(|&last| last as usize >= outputs * inputs) || outputs * inputs > 1 << 31 {
            candle_core::bail!("positions of a sparse ({outputs}, {inputs}) matrix should rise and lie inside it");
        }
        let mut starts = vec![0u32; outputs + 1];
        let mut column_starts = vec![0u32; inputs + 1];
        for &f in flat {
            starts[f as usize / inputs + 1] += 1;
            column_starts[f as usize % inputs + 1] += 1;
        }
        for counts in [&mut starts, &mut column_starts] {
            for i in 1..counts.len() {
                counts[i] += counts[i - 1];
            }
        }
        let mut next = column_starts.clone();
        let mut by_column = vec![(0, 0); flat.len()];
        for (place, &f) in flat.iter().enumerate() {
            let slot = &mut next[f as usize % inputs];
            by_column[*slot as usize] = (f / inputs as u32, place as u32);
            *slot += 1;
        }
        let columns = flat.iter().map(|f| f % inputs as u32).collect();
        Ok(Self { shape: (outputs, inputs), starts, columns, by_column, column_starts })
    }

    /// (outputs, inputs).
    pub fn shape(&self) -> (usize, usize) {
        self.shape
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.columns.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.columns.is_empty()
    }

    /// Flat positions, rising.
    pub fn flat(&self) -> Vec<u32> {
        let inputs = self.shape.1 as u32;
        let rows = (0..self.shape.0).flat_map(|row| self.row(row).map(move |place| (row as u32, place)));
        rows.map(|(row, place)| row * inputs + self.columns[place]).collect()
    }

    fn row(&self, row: usize) -> std::ops::Range<usize> {
        self.starts[row] as usize..self.starts[row + 1] as usize
    }

    fn column(&self, column: usize) -> &[(u32, u32)] {
        &self.by_column[self.column_starts[column] as usize..self.column_starts[column + 1] as usize]
    }

    /// S (outputs, inputs) as a matrix, in candle's graph.
    pub fn matrix(&self, values: &Tensor) -> Result<Tensor> {
        let (outputs, inputs) = self.shape;
        let flat = Tensor::from_vec(self.flat(), self.len(), &Device::Cpu)?;
        Tensor::zeros(outputs * inputs, values.dtype(), &Device::Cpu)?
            .index_add(&flat, values, 0)?
            .reshape((outputs, inputs))
    }
}

/// Rows that go through the entries together: what belongs to them of a whole input then stays in the second cache, and a sum in registers.
const TILE: usize = 32;
/// Outputs or inputs that one task takes.
const CHUNK: usize = 32;

/// (rows, columns) as tiles of [`TILE`] rows, each (columns, TILE), the last filled up with zeros.
fn tiled<T: Real>(x: &[T], (rows, columns): (usize, usize)) -> Vec<T> {
    let mut out = vec![T::from_f64(0.0); rows.div_ceil(TILE) * columns * TILE];
    out.par_chunks_mut((columns * TILE).max(1)).enumerate().for_each(|(tile, out)| {
        for (r, row) in x[tile * TILE * columns..].chunks_exact(columns.max(1)).take(TILE).enumerate() {
            row.iter().enumerate().for_each(|(c, &v)| out[c * TILE + r] = v);
        }
    });
    out
}

/// What [`tiled`] made, row by row again.
fn untiled<T: Real>(tiles: &[T], (rows, columns): (usize, usize)) -> Vec<T> {
    let mut out = vec![T::from_f64(0.0); rows * columns];
    out.par_chunks_mut((columns * TILE).max(1)).enumerate().for_each(|(tile, out)| {
        let own = &tiles[tile * columns * TILE..(tile + 1) * columns * TILE];
        for (r, row) in out.chunks_exact_mut(columns.max(1)).enumerate() {
            row.iter_mut().enumerate().for_each(|(c, v)| *v = own[c * TILE + r]);
        }
    });
    out
}

/// The numbers of one column in a tile.
fn lane<T>(tile: &[T], column: usize) -> &[T; TILE] {
    let lanes = tile.as_chunks::<TILE>().0;
    &lanes[column]
}

fn add_scaled<T: Real>(sum: &mut [T; TILE], scale: T, x: &[T; TILE]) {
    for i in 0..TILE {
        sum[i] += scale * x[i];
    }
}

fn dot<T: Real>(a: &[T; TILE], b: &[T; TILE]) -> T {
    const LANES: usize = 8;
    let mut sums = [T::from_f64(0.0); LANES];
    for (a, b) in a.as_chunks::<LANES>().0.iter().zip(b.as_chunks::<LANES>().0) {
        for i in 0..LANES {
            sums[i] += a[i] * b[i];
        }
    }
    sums.into_iter().fold(T::from_f64(0.0), |all, s| all + s)
}

/// Fills tiles (columns, TILE) of a result, some columns of a tile at a time: `fill` adds up one column in a tile.
fn over_tiles<T: Real>(rows: usize, columns: usize, fill: impl Fn(usize, usize, &mut [T; TILE]) + Sync) -> Vec<T> {
    let mut out = vec![T::from_f64(0.0); rows.div_ceil(TILE) * columns * TILE];
    let tiles = out.par_chunks_mut((columns * TILE).max(1)).enumerate();
    tiles.for_each(|(tile, out)| {
        out.par_chunks_mut(CHUNK * TILE).enumerate().for_each(|(chunk, out)| {
            for (c, sum) in out.as_chunks_mut::<TILE>().0.iter_mut().enumerate() {
                fill(tile, chunk * CHUNK + c, sum);
            }
        });
    });
    out
}

/// x Sᵀ (rows, outputs) for `x` (rows, inputs) and the entries' values.
pub(crate) fn forward<T: Real>(x: &Tensor, values: &Tensor, index: &SparseIndex) -> Result<Tensor> {
    let ((rows, inputs), (outputs, expected)) = (x.dims2()?, index.shape);
    if inputs != expected || values.dims() != [index.len()] {
        candle_core::bail!("sparse product: x is ({rows}, {inputs}), the matrix ({outputs}, {expected})");
    }
    let out = with_slice_list(&[x, values], |s: &[&[T]]| {
        let (x, values) = (tiled(s[0], (rows, inputs)), s[1]);
        let y = over_tiles(rows, outputs, |tile, i, sum| {
            let x = &x[tile * inputs * TILE..(tile + 1) * inputs * TILE];
            for place in index.row(i) {
                add_scaled(sum, values[place], lane(x, index.columns[place] as usize));
            }
        });
        Ok(untiled(&y, (rows, outputs)))
    })?;
    Tensor::from_vec(out, (rows, outputs), &Device::Cpu)
}

/// dx (rows, inputs) if it is wanted, and the gradient of the values.
pub(crate) fn backward<T: Real>(
    g: &Tensor,
    x: &Tensor,
    values: &Tensor,
    index: &SparseIndex,
    wants_x: bool,
) -> Result<(Option<Tensor>, Tensor)> {
    let ((rows, inputs), (outputs, _)) = (x.dims2()?, index.shape);
    let (dx, dv) = with_slice_list(&[g, x, values], |s: &[&[T]]| {
        let (g, x, values) = (tiled(s[0], (rows, outputs)), tiled(s[1], (rows, inputs)), s[2]);
        let mut dv = vec![T::from_f64(0.0); index.len()];
        let mut pieces = Vec::new();
        let mut left = dv.as_mut_slice();
        for first in (0..outputs).step_by(CHUNK) {
            let own = first..(first + CHUNK).min(outputs);
            let length = index.starts[own.end] as usize - index.starts[own.start] as usize;
            let (piece, others) = left.split_at_mut(length);
            pieces.push((own, piece));
            left = others;
        }
        pieces.into_par_iter().for_each(|(own, dv)| {
            for (g, x) in g.chunks_exact(outputs * TILE).zip(x.chunks_exact(inputs * TILE)) {
                let mut sums = dv.iter_mut();
                for i in own.clone() {
                    let g = lane(g, i);
                    for (place, dv) in index.row(i).zip(&mut sums) {
                        *dv += dot(g, lane(x, index.columns[place] as usize));
                    }
                }
            }
        });
        let dx = wants_x.then(|| {
            let dx = over_tiles(rows, inputs, |tile, j, sum| {
                let g = &g[tile * outputs * TILE..(tile + 1) * outputs * TILE];
                for &(row, place) in index.column(j) {
                    add_scaled(sum, values[place as usize], lane(g, row as usize));
                }
            });
            untiled(&dx, (rows, inputs))
        });
        Ok((dx, dv))
    })?;
    let dx = dx.map(|dx| Tensor::from_vec(dx, (rows, inputs), &Device::Cpu)).transpose()?;
    Ok((dx, Tensor::from_vec(dv, index.len(), &Device::Cpu)?))
}

/// What is done to a weight in place.
enum Change<'a> {
    /// Numbers written at positions.
    Write(&'a [u32], &'a [f32]),
    /// Numbers times a scale added at positions, and what was there kept.
    Exchange(&'a [u32], &'a [f32], f32, Mutex<&'a mut [f32]>),
    /// scale · B A added, with B (outputs, rank), A (rank, inputs).
    Product(&'a Tensor, &'a Tensor, f64),
    /// All numbers of another tensor of the shape.
    Copy(&'a Tensor),
}

impl InplaceOp1 for Change<'_> {
    fn name(&self) -> &'static str {
        "change-weight"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("a weight that is not contiguous")
        };
        if let Self::Write(positions, _) | Self::Exchange(positions, ..) = self
            && positions.last().is_some_and(|&p| p as usize >= end - start)
        {
            candle_core::bail!("a position outside the weight");
        }
        match (self, storage) {
            (Self::Write(positions, values), CpuStorage::F32(w)) => {
                let w = &mut w[start..end];
                positions.iter().zip(*values).for_each(|(&p, &v)| w[p as usize] = v);
            }
            (Self::Write(positions, values), CpuStorage::BF16(w)) => {
                let w = &mut w[start..end];
                positions.iter().zip(*values).for_each(|(&p, &v)| w[p as usize] = bf16::from_f32(v));
            }
            (Self::Write(positions, values), CpuStorage::F16(w)) => {
                let w = &mut w[start..end];
                positions.iter().zip(*values).for_each(|(&p, &v)| w[p as usize] = f16::from_f32(v));
            }
            (Self::Exchange(positions, values, scale, old), CpuStorage::F32(w)) => {
                let (w, mut old) = (&mut w[start..end], old.lock().unwrap_or_else(PoisonError::into_inner));
                for ((&p, &v), old) in positions.iter().zip(*values).zip(old.iter_mut()) {
                    let w = &mut w[p as usize];
                    *old = *w;
                    *w += scale * v;
                }
            }
            (Self::Exchange(positions, values, scale, old), CpuStorage::BF16(w)) => {
                let (w, mut old) = (&mut w[start..end], old.lock().unwrap_or_else(PoisonError::into_inner));
                for ((&p, &v), old) in positions.iter().zip(*values).zip(old.iter_mut()) {
                    *old = w[p as usize].to_f32();
                    w[p as usize] = bf16::from_f32(*old + scale * v);
                }
            }
            (Self::Exchange(positions, values, scale, old), CpuStorage::F16(w)) => {
                let (w, mut old) = (&mut w[start..end], old.lock().unwrap_or_else(PoisonError::into_inner));
                for ((&p, &v), old) in positions.iter().zip(*values).zip(old.iter_mut()) {
                    *old = w[p as usize].to_f32();
                    w[p as usize] = f16::from_f32(*old + scale * v);
                }
            }
            (Self::Product(b, a, scale), CpuStorage::F32(w)) => {
                let ((outputs, rank), (_, inputs)) = (b.dims2()?, a.dims2()?);
                let b = (*b * *scale)?;
                let w = &mut w[start..end];
                with_slice_list(&[&b, a], |s: &[&[f32]]| {
                    let terms = vec![Term::backward(s[0], rank, Right::Slice(s[1], inputs))];
                    run(vec![Product { out: Out::Into(w, true), rows: outputs, columns: inputs, terms }])
                })?;
            }
            (Self::Copy(from), CpuStorage::F32(w)) => {
                let (from, layout) = from.storage_and_layout();
                let candle_core::Storage::Cpu(from) = &*from else {
                    candle_core::bail!("a weight on the CPU is expected")
                };
                let from = slice::<f32>(from, layout)?;
                w[start..end].copy_from_slice(from);
            }
            _ => candle_core::bail!("weights are changed in place in f32, bf16 and f16 only"),
        }
        Ok(())
    }
}

/// Writes `values` at flat `positions` (rising) of a weight in place: whoever shares the tensor sees them.
pub fn write_entries(weight: &Tensor, positions: &[u32], values: &[f32]) -> Result<()> {
    if positions.len() != values.len() {
        candle_core::bail!("{} positions and {} values", positions.len(), values.len());
    }
    weight.inplace_op1(&Change::Write(positions, values))
}

/// Adds `scale` · `values` at flat `positions` (rising) of a weight in place, and gives what was there to `old`, whose length is theirs.
pub fn exchange_entries(weight: &Tensor, positions: &[u32], values: &[f32], scale: f32, old: &mut [f32]) -> Result<()> {
    if positions.len() != values.len() || positions.len() != old.len() {
        candle_core::bail!("{} positions, {} values and room for {}", positions.len(), values.len(), old.len());
    }
    weight.inplace_op1(&Change::Exchange(positions, values, scale, Mutex::new(old)))
}

/// Adds `scale · b a` to a weight (outputs, inputs) in place: how a LoRA is fused.
pub fn add_product(weight: &Tensor, b: &Tensor, a: &Tensor, scale: f64) -> Result<()> {
    let ((outputs, inputs), (rows, rank), (other, columns)) = (weight.dims2()?, b.dims2()?, a.dims2()?);
    if (rows, columns, other) != (outputs, inputs, rank) {
        candle_core::bail!("B ({rows}, {rank}) and A ({other}, {columns}) do not fit a weight ({outputs}, {inputs})");
    }
    weight.inplace_op1(&Change::Product(b, a, scale))
}

/// Copies all numbers of `from` into a weight in place.
pub fn copy_into(weight: &Tensor, from: &Tensor) -> Result<()> {
    if weight.dims() != from.dims() {
        candle_core::bail!("weights of {:?} and {:?}", weight.dims(), from.dims());
    }
    weight.inplace_op1(&Change::Copy(from))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::{DType, Var};

    use super::*;
    use crate::check::{assert_close, random};
    use crate::ops::Ops;
    use crate::tape::{Gradients, Tape};

    fn positions(shape: (usize, usize)) -> Vec<u32> {
        (0..(shape.0 * shape.1) as u32).filter(|p| p.wrapping_mul(2_654_435_761) % 11 == 0).collect()
    }

    #[test]
    fn outputs_and_gradients_equal_the_masked_product() -> Result<()> {
        for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-5)] {
            let index = Arc::new(SparseIndex::new(&positions((33, 24)), (33, 24))?);
            assert_eq!(index.flat(), positions((33, 24)));
            let x = Var::from_tensor(&random((37, 24), 1, dtype)?)?;
            let values = Var::from_tensor(&random((1, index.len()), 2, dtype)?.flatten_all()?)?;
            let seed = random((37, 33), 3, dtype)?;
            let expected_y = x.matmul(&index.matrix(&values)?.t()?)?;
            let expected = (&expected_y * &seed)?.sum_all()?.backward()?;
            let tape = Tape::new([x.as_tensor(), values.as_tensor()]);
            let y = Ops::recorded(&tape).sparse(&x, &values, &index)?;
            assert_close(&y, &expected_y, tolerance)?;
            let mut found = Gradients::default();
            tape.backward(&y, seed, &mut found)?;
            for var in [&x, &values] {
                let (a, b) = (found.get(var), expected.get(var));
                assert_close(a.expect("a gradient"), b.expect("a gradient"), tolerance)?;
            }
        }
        assert!(SparseIndex::new(&[3, 3], (2, 2)).is_err());
        assert!(SparseIndex::new(&[1, 4], (2, 2)).is_err());
        Ok(())
    }

    #[test]
    fn weights_are_changed_in_place() -> Result<()> {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let weight = random((9, 7), 1, DType::F32)?.to_dtype(dtype)?;
            let (shared, before) = (weight.clone(), weight.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?);
            let at = positions((9, 7));
            let mut old = vec![0.0; at.len()];
            exchange_entries(&weight, &at, &vec![0.5; at.len()], 2.0, &mut old)?;
            let now = shared.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            for (i, (a, b)) in now.iter().zip(&before).enumerate() {
                let change = if at.contains(&(i as u32)) { 1.0 } else { 0.0 };
                assert!((a - b - change).abs() < 0.01);
            }
            write_entries(&weight, &at, &old)?;
            assert_eq!(shared.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?, before);
            assert!(write_entries(&weight, &[63], &[1.0]).is_err());
        }
        let (weight, b, a) =
            (random((9, 7), 1, DType::F32)?, random((9, 3), 2, DType::F32)?, random((3, 7), 3, DType::F32)?);
        let expected = (&weight + (b.matmul(&a)? * 0.5)?)?;
        add_product(&weight, &b, &a, 0.5)?;
        assert_close(&weight, &expected, 1e-6)
    }
}
