//! Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the half-split layout of Hugging Face
//! models: element `i` turns with element `i + head_dim/2`.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::kernels::real::Real;
use crate::kernels::slices::{rows_per_task, slice, with_slices};

/// Sines and cosines of one batch's rows, shared by all its layers. Cheap to clone.
#[derive(Clone)]
pub struct RotaryTable {
    rows: usize,
    half: usize,
    /// Width of one head, of which the first `2 · half` elements turn.
    head: usize,
    cos: Arc<Vec<f64>>,
    sin: Arc<Vec<f64>>,
}

impl RotaryTable {
    /// `positions` has one entry a row; `inverse_frequencies` has head_dim/2 entries (radians a position);
    /// `scale` multiplies sine and cosine (YaRN's attention factor; 1 elsewhere).
    pub fn new(positions: &[usize], inverse_frequencies: &[f64], scale: f64) -> Self {
        Self::chosen(positions, inverse_frequencies.len(), |_| inverse_frequencies, scale)
    }

    /// The same with frequencies of its own for each row: `of(row)` gives `half` of them.
    pub fn chosen<'a>(positions: &[usize], half: usize, of: impl Fn(usize) -> &'a [f64], scale: f64) -> Self {
        let angles = positions.iter().enumerate().flat_map(|(row, &p)| {
            // transformers forms the angle in f32; equal inputs must give equal angles at long positions.
            of(row)[..half].iter().map(move |&f| f64::from(p as f32 * f as f32))
        });
        let (cos, sin) = angles.map(|a| (a.cos() * scale, a.sin() * scale)).unzip();
        Self { rows: positions.len(), half, head: 2 * half, cos: Arc::new(cos), sin: Arc::new(sin) }
    }

    /// The same for heads of `head` elements, of which only the first `2 · inverse_frequencies.len()` turn.
    pub fn partial(self, head: usize) -> Self {
        Self { head: head.max(2 * self.half), ..self }
    }
}

/// Turns every head of every row: `x` (rows, heads·head_dim) f32 or f64 → the same shape.
pub fn rotary(x: &Tensor, table: &RotaryTable) -> Result<Tensor> {
    let op = Rotary::new(x, table)?;
    if !x.device().is_cpu() {
        return rotary_reference(x, table);
    }
    x.contiguous()?.apply_op1(op)
}

/// The reference form out of plain candle operations.
pub fn rotary_reference(x: &Tensor, table: &RotaryTable) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    let half = table.half;
    let of =
        |v: &[f64]| Tensor::from_slice(v, (rows, 1, half), &Device::Cpu)?.to_dtype(x.dtype())?.to_device(x.device());
    let (cos, sin) = (of(&table.cos)?, of(&table.sin)?);
    let x = x.reshape((rows, width / table.head, table.head))?;
    let (a, b) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
    let rest = x.narrow(2, 2 * half, table.head - 2 * half)?;
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    Tensor::cat(&[first, second, rest], 2)?.reshape((rows, width))
}

pub(crate) struct Rotary {
    table: RotaryTable,
    backwards: bool,
}

impl Rotary {
    pub(crate) fn new(x: &Tensor, table: &RotaryTable) -> Result<Self> {
        let (rows, width) = x.dims2()?;
        if rows != table.rows || width % table.head.max(1) != 0 || (table.head == 0 && width > 0) {
            candle_core::bail!(
                "rotary: x is ({rows}, {width}) but the table has {} rows for heads of {}",
                table.rows,
                table.head
            );
        }
        Ok(Self { table: table.clone(), backwards: false })
    }

    fn run<T: Real>(&self, x: &[T], width: usize) -> Vec<T> {
        let half = self.table.half;
        let mut y = vec![T::zero(); x.len()];
        if y.is_empty() {
            return y;
        }
        let rows = rows_per_task(self.table.rows);
        y.par_chunks_mut(rows * width).zip(x.par_chunks(rows * width)).enumerate().for_each(|(task, (y, x))| {
            for (r, (y, x)) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)).enumerate() {
                let at = (task * rows + r) * half;
                let (cos, sin) = (&self.table.cos[at..at + half], &self.table.sin[at..at + half]);
                for (y, x) in y.chunks_exact_mut(self.table.head).zip(x.chunks_exact(self.table.head)) {
                    y[2 * half..].copy_from_slice(&x[2 * half..]);
                    for i in 0..half {
                        let c = T::from_f64(cos[i]);
                        let s = T::from_f64(if self.backwards { -sin[i] } else { sin[i] });
                        y[i] = x[i] * c - x[i + half] * s;
                        y[i + half] = x[i + half] * c + x[i] * s;
                    }
                }
            }
        });
        y
    }
}

impl CustomOp1 for Rotary {
    fn name(&self) -> &'static str {
        "rotary"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, width) = layout.shape().dims2()?;
        let storage = match x {
            CpuStorage::F32(_) => CpuStorage::F32(self.run(slice::<f32>(x, layout)?, width)),
            CpuStorage::F64(_) => CpuStorage::F64(self.run(slice::<f64>(x, layout)?, width)),
            _ => candle_core::bail!("rotary: x must be f32 or f64"),
        };
        Ok((storage, layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        self.gradient(grad).map(Some)
    }
}

impl Rotary {
    /// The gradient of the input from that of the output: the transpose of a rotation is the rotation backwards.
    pub(crate) fn gradient(&self, grad: &Tensor) -> Result<Tensor> {
        let (_, width) = grad.dims2()?;
        let back = Rotary { table: self.table.clone(), backwards: true };
        match grad.dtype() {
            DType::F64 => {
                with_slices([grad], |[g]| Tensor::from_vec(back.run::<f64>(g, width), grad.shape(), grad.device()))
            }
            _ => with_slices([grad], |[g]| Tensor::from_vec(back.run::<f32>(g, width), grad.shape(), grad.device())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{assert_close, gradient_matches, random};

    fn table() -> RotaryTable {
        RotaryTable::new(&[0, 1, 2, 0, 1000], &[1.0, 0.1, 0.01], 1.0)
    }

    #[test]
    fn equals_the_reference() -> Result<()> {
        let x = random((5, 12), 1, DType::F32)?;
        assert_close(&rotary(&x, &table())?, &rotary_reference(&x, &table())?, 1e-6)
    }

    #[test]
    fn gradient_equals_central_differences() -> Result<()> {
        gradient_matches(&random((5, 6), 1, DType::F64)?, |x| rotary(x, &table()))
    }

    /// Heads of which only a part turns.
    #[test]
    fn a_part_of_each_head_turns() -> Result<()> {
        let table = table().partial(10);
        let x = random((5, 20), 1, DType::F64)?;
        let y = rotary(&x, &table)?;
        assert_close(&y, &rotary_reference(&x, &table)?, 1e-12)?;
        assert_close(&y.narrow(1, 16, 4)?, &x.narrow(1, 16, 4)?, 0.0)?;
        gradient_matches(&x, |x| rotary(x, &table))
    }
}
