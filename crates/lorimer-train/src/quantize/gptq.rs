//! GPTQ's rounding (Frantar et al. 2023, "GPTQ", arXiv:2210.17323): 4 bits that change what a matrix gives on its inputs as little as they can.
//!
//! Columns are rounded one after the other. What rounding a column loses is taken from the columns to its right, as far as the inputs are alike: with
//! `H = mean x xᵀ + λ I` and U the upper Cholesky factor of H⁻¹, rounding w_j to q takes `(w_j − q)/U_jj · U_jk` from each later w_k. λ is 0.01 of the mean of
//! H's diagonal. A group's grid is that of its weights as they are when its first column's turn comes. Columns come in the order that they have.

use candle_core::{DType, Device, Result as TensorResult, Tensor};
use lorimer_tensor::linalg::inverse_cholesky;
use lorimer_tensor::storage::affine::{Affine, Grid};
use rayon::prelude::*;

use crate::error::{Error, Result};

/// λ as a part of the mean of H's diagonal.
pub const DAMPING: f64 = 0.01;
/// Rows that are rounded together, so that U is read once for all of them.
const ROWS: usize = 16;

/// `Σ x xᵀ` of inputs that come batch by batch.
#[derive(Clone, Debug)]
pub struct Inputs {
    sum: Tensor,
    count: usize,
}

impl Inputs {
    /// None so far, of so many features.
    ///
    /// # Errors
    ///
    /// Fails if a tensor operation fails.
    pub fn new(width: usize) -> TensorResult<Self> {
        Ok(Self { sum: Tensor::zeros((width, width), DType::F64, &Device::Cpu)?, count: 0 })
    }

    /// Adds inputs (rows, width).
    ///
    /// # Errors
    ///
    /// Fails if they are of another width.
    pub fn add(&mut self, x: &Tensor) -> TensorResult<()> {
        let x = x.to_dtype(DType::F32)?.contiguous()?;
        self.sum = (&self.sum + x.t()?.matmul(&x)?.to_dtype(DType::F64)?)?;
        self.count += x.dim(0)?;
        Ok(())
    }

    /// `mean x xᵀ` (width, width); f64.
    ///
    /// # Errors
    ///
    /// Fails if a tensor operation fails.
    pub fn mean(&self) -> TensorResult<Tensor> {
        &self.sum / self.count.max(1) as f64
    }
}

/// U of `H = mean x xᵀ + λ I`, row by row.
fn factor(mean: &Tensor) -> Result<Vec<f32>> {
    let n = mean.dim(0)?;
    let eye = Tensor::eye(n, DType::F64, &Device::Cpu)?;
    let diagonal = (mean * &eye)?.sum_all()?.to_scalar::<f64>()? / n.max(1) as f64;
    if !diagonal.is_finite() || diagonal < 0.0 {
        return Err(Error::Settings("what it reads is not finite".into()));
    }
    // Inputs that are all zero say nothing: each weight is rounded for itself.
    let damped = if diagonal > 0.0 { (mean + (eye * (DAMPING * diagonal))?)? } else { eye };
    Ok(inverse_cholesky(&damped)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?)
}

/// Rounds some rows of `inputs` weights each: codes, and the grids of each row.
fn rows(
    rows: &[f32],
    factor: &[f32],
    inputs: usize,
    (group, symmetric): (usize, bool),
) -> TensorResult<(Vec<u8>, Vec<Grid>)> {
    let (groups, count) = (inputs.div_ceil(group), rows.len() / inputs);
    let mut rows = rows.to_vec();
    let mut codes = vec![0; rows.len()];
    let mut grids = vec![Grid::of(&[], symmetric)?; count * groups];
    for (column, line) in factor.chunks_exact(inputs).enumerate() {
        let line = &line[column..];
        for (number, row) in rows.chunks_exact_mut(inputs).enumerate() {
            let row = &mut row[column..];
            let grid = &mut grids[number * groups + column / group];
            if column.is_multiple_of(group) {
                *grid = Grid::of(&row[..group.min(row.len())], symmetric)?;
            }
            let code = grid.code(row[0]);
            codes[number * inputs + column] = code;
            let error = (row[0] - grid.weight(code)) / line[0];
            row.iter_mut().zip(line).skip(1).for_each(|(w, u)| *w -= error * u);
        }
    }
    Ok((codes, grids))
}

/// Rounds a matrix (outputs, inputs) whose inputs have `mean x xᵀ` = `mean` (inputs, inputs).
///
/// # Errors
///
/// Fails if a number is not finite, if the values do not fit the shape, if `group` is 0, or if `mean` is not that of inputs.
pub fn round(values: &[f32], shape: (usize, usize), mean: &Tensor, group: usize, symmetric: bool) -> Result<Affine> {
    let (outputs, inputs) = shape;
    if group == 0 || outputs.checked_mul(inputs) != Some(values.len()) || mean.dims2()? != (inputs, inputs) {
        return Err(Error::Settings(format!(
            "{} weights in groups of {group} of a matrix {shape:?} whose inputs have a mean {:?}",
            values.len(),
            mean.shape()
        )));
    }
    let factor = factor(mean)?;
    let rounded = values.par_chunks((ROWS * inputs).max(1)).map(|part| rows(part, &factor, inputs, (group, symmetric)));
    let rounded = rounded.collect::<TensorResult<Vec<_>>>()?;
    let codes: Vec<u8> = rounded.iter().flat_map(|(codes, _)| codes).copied().collect();
    let grids: Vec<Grid> = rounded.iter().flat_map(|(_, grids)| grids).copied().collect();
    Ok(Affine::of_grids(shape, |output, input| codes[output * inputs + input], &grids, group)?)
}

/// `mean ‖D x‖²` of a matrix D (outputs, inputs) whose inputs have `mean x xᵀ` = `mean`.
///
/// # Errors
///
/// Fails if the shapes do not fit.
pub fn squared(d: &Tensor, mean: &Tensor) -> Result<f64> {
    let d = d.to_dtype(DType::F32)?;
    let product = d.matmul(&mean.to_dtype(DType::F32)?)?;
    Ok((product * &d)?.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?.max(0.0))
}
