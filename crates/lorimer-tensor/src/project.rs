//! The frozen projection `y = x Wᵀ`: a product whose backward never computes the weight's gradient.

use std::collections::hash_map::Entry;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor, WithDType};
use rayon::prelude::*;

use crate::raw::{Real, Shared, Strides, product, product_raw, slice, with_slices};
use crate::wide::{sum2, wide};

/// Rows of a weight that are expanded at a time when it is stored in fewer bits than it is used in.
const TILE_ROWS: usize = 128;
/// Up to this many rows of `x` the product is limited by reading the weight, not by arithmetic.
const FEW_ROWS: usize = 4;

/// A frozen weight `(outputs, inputs)` in whatever storage the base uses. Cheap to clone.
#[derive(Clone, Debug)]
pub enum FrozenWeight {
    /// f32, f64, f16 or bf16, row-major.
    Dense(Tensor),
    /// GGUF blocks, in tiles of whole rows.
    Quantised {
        /// Tiles of at most 128 rows each, in order.
        tiles: Arc<Vec<QTensor>>,
        /// `(outputs, inputs)`.
        shape: (usize, usize),
        /// The block type.
        dtype: GgmlDType,
    },
}

impl FrozenWeight {
    /// Cuts the raw GGUF bytes of an `(outputs, inputs)` matrix into tiles that keep their blocks.
    pub fn from_ggml(dtype: GgmlDType, bytes: &[u8], shape: (usize, usize)) -> Result<Self> {
        let (outputs, inputs) = shape;
        if !inputs.is_multiple_of(dtype.block_size()) {
            candle_core::bail!(
                "a {dtype:?} row holds blocks of {} values, and {inputs} inputs do not divide into them",
                dtype.block_size()
            );
        }
        let row_bytes = inputs / dtype.block_size() * dtype.type_size();
        if bytes.len() != outputs * row_bytes {
            candle_core::bail!("{outputs} rows of {row_bytes} bytes expected, found {} bytes", bytes.len());
        }
        let tiles = bytes
            .chunks(TILE_ROWS * row_bytes)
            .map(|chunk| {
                let rows = chunk.len() / row_bytes;
                candle_core::quantized::ggml_file::qtensor_from_ggml(dtype, chunk, vec![rows, inputs], &Device::Cpu)
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self::Quantised { tiles: Arc::new(tiles), shape, dtype })
    }

    /// `(outputs, inputs)`.
    pub fn dims(&self) -> Result<(usize, usize)> {
        match self {
            Self::Dense(w) => w.dims2(),
            Self::Quantised { shape, .. } => Ok(*shape),
        }
    }

    /// The whole weight, `(outputs, inputs)`, in `dtype` (f32, f64, f16 or bf16).
    pub fn dense(&self, dtype: DType) -> Result<Tensor> {
        match self {
            Self::Dense(w) => w.to_dtype(dtype),
            Self::Quantised { tiles, .. } => {
                let parts = tiles.iter().map(|t| t.dequantize(&Device::Cpu)).collect::<Result<Vec<_>>>()?;
                Tensor::cat(&parts, 0)?.to_dtype(dtype)
            }
        }
    }

    /// Single rows of the weight, expanded: (ids, inputs) in `dtype`. An embedding is this.
    pub fn rows(&self, ids: &[u32], dtype: DType) -> Result<Tensor> {
        let (outputs, inputs) = self.dims()?;
        if let Some(bad) = ids.iter().find(|&&id| id as usize >= outputs) {
            candle_core::bail!("row {bad} of a weight with {outputs} rows");
        }
        match self {
            Self::Dense(w) => w.index_select(&Tensor::from_slice(ids, ids.len(), w.device())?, 0)?.to_dtype(dtype),
            Self::Quantised { .. } => {
                let mut tiles = std::collections::HashMap::new();
                let mut rows = Vec::with_capacity(ids.len() * inputs);
                for &id in ids {
                    let (index, row) = (id as usize / TILE_ROWS, id as usize % TILE_ROWS);
                    let tile = match tiles.entry(index) {
                        Entry::Occupied(tile) => tile.into_mut(),
                        Entry::Vacant(slot) => slot.insert(self.tile(index)?),
                    };
                    rows.extend_from_slice(&tile[row * inputs..(row + 1) * inputs]);
                }
                Tensor::from_vec(rows, (ids.len(), inputs), &Device::Cpu)?.to_dtype(dtype)
            }
        }
    }

    /// Bytes that the stored form takes.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Dense(w) => w.elem_count() * w.dtype().size_in_bytes(),
            Self::Quantised { tiles, .. } => tiles.iter().map(QTensor::storage_size_in_bytes).sum(),
        }
    }

    /// How it is stored, for people: `f32`, `bf16`, `Q4_1`.
    pub fn storage_name(&self) -> String {
        match self {
            Self::Dense(w) => w.dtype().as_str().to_string(),
            Self::Quantised { dtype, .. } => format!("{dtype:?}"),
        }
    }

    /// Number of tiles of [`TILE_ROWS`] rows (the last may be shorter).
    fn tile_count(&self) -> Result<usize> {
        Ok(self.dims()?.0.div_ceil(TILE_ROWS))
    }

    /// Rows `TILE_ROWS·index ..` expanded to f32, for storages that are not f32 themselves.
    fn tile(&self, index: usize) -> Result<Vec<f32>> {
        let tile = match self {
            Self::Dense(w) => {
                let start = index * TILE_ROWS;
                w.narrow(0, start, TILE_ROWS.min(w.dim(0)? - start))?.to_dtype(DType::F32)?
            }
            Self::Quantised { tiles, .. } => tiles[index].dequantize(&Device::Cpu)?,
        };
        tile.flatten_all()?.to_vec1::<f32>()
    }
}

/// `x Wᵀ`: `x` (rows, inputs) f32 or f64 → (rows, outputs). The backward gives the gradient of `x` only.
///
/// On a device other than the CPU this is [`frozen_linear_reference`].
pub fn frozen_linear(x: &Tensor, weight: &FrozenWeight) -> Result<Tensor> {
    let (rows, inputs) = x.dims2()?;
    let (outputs, expected) = weight.dims()?;
    if inputs != expected {
        candle_core::bail!("projection: x is ({rows}, {inputs}) but the weight is ({outputs}, {expected})");
    }
    if !x.device().is_cpu() {
        return frozen_linear_reference(x, weight);
    }
    x.contiguous()?.apply_op1(FrozenLinear { weight: weight.clone(), outputs })
}

/// The reference form: a plain product with the expanded weight.
pub fn frozen_linear_reference(x: &Tensor, weight: &FrozenWeight) -> Result<Tensor> {
    x.matmul(&weight.dense(x.dtype())?.to_device(x.device())?.t()?)
}

/// `g W`: the gradient of `x` from the gradient `g` (rows, outputs) of `x Wᵀ`; (rows, inputs).
pub fn frozen_backward_input(grad: &Tensor, weight: &FrozenWeight) -> Result<Tensor> {
    fn run<T: Real>(grad: &Tensor, weight: &FrozenWeight, shape: (usize, usize)) -> Result<Tensor> {
        let mut dx = vec![T::zero(); shape.0 * shape.1];
        frozen_accumulate_input(grad, weight, &mut dx, false)?;
        Tensor::from_vec(dx, shape, &Device::Cpu)
    }
    let shape = (grad.dim(0)?, weight.dims()?.1);
    match grad.dtype() {
        DType::F64 => run::<f64>(grad, weight, shape),
        _ => run::<f32>(grad, weight, shape),
    }
}

/// `dx = keep·dx + g W` with `keep` 0 or 1; `grad` (rows, outputs) of dx's type, `dx` (rows, inputs).
pub(crate) fn frozen_accumulate_input<T: Real>(
    grad: &Tensor,
    weight: &FrozenWeight,
    dx: &mut [T],
    keep: bool,
) -> Result<()> {
    let (rows, outputs) = grad.dims2()?;
    let (_, inputs) = weight.dims()?;
    let whole = |w: &Tensor, dx: &mut [T]| {
        with_slices([grad, w], |[g, w]: [&[T]; 2]| {
            let (shape, w_strides) = ((rows, inputs, outputs), Strides(inputs, 1));
            product(shape, dx, Strides(inputs, 1), keep, g, Strides(outputs, 1), w, w_strides, T::one(), true);
            Ok(())
        })
    };
    match weight {
        FrozenWeight::Dense(w) if w.dtype() == T::DTYPE => whole(w, dx),
        _ if T::DTYPE == DType::F64 => whole(&weight.dense(DType::F64)?, dx),
        _ => with_slices([grad], |[g]: [&[T]; 1]| {
            for index in 0..weight.tile_count()? {
                let start = index * TILE_ROWS;
                let tile: Vec<T> = weight.tile(index)?.into_iter().map(|v| T::from_f64(f64::from(v))).collect();
                let n = tile.len() / inputs.max(1);
                let (shape, strides) = ((rows, inputs, n), Strides(inputs, 1));
                let g = &g[start.min(g.len())..];
                product(shape, dx, strides, keep || index > 0, g, Strides(outputs, 1), &tile, strides, T::one(), true);
            }
            Ok(())
        }),
    }
}

fn dense_forward<T: Real>(x: &[T], w: &[T], (rows, outputs, inputs): (usize, usize, usize)) -> Vec<T> {
    let mut y = vec![T::zero(); rows * outputs];
    if rows <= FEW_ROWS {
        let out = Shared(y.as_mut_ptr());
        let chunk = outputs.div_ceil(rayon::current_num_threads() * 2).max(1);
        w.par_chunks(chunk * inputs.max(1)).enumerate().for_each(|(c, w)| {
            for (j, w) in w.chunks_exact(inputs).enumerate() {
                for (r, x) in x.chunks_exact(inputs).enumerate() {
                    // SAFETY: each (row, output) pair belongs to one task and lies inside `y`.
                    unsafe { *out.at(r * outputs + c * chunk + j) = wide(|| sum2(x, w, |a, b| a * b)) };
                }
            }
        });
        return y;
    }
    let (m, n, k) = (rows, outputs, inputs);
    product((m, n, k), &mut y, Strides(n, 1), false, x, Strides(k, 1), w, Strides(1, k), T::one(), true);
    y
}

struct FrozenLinear {
    weight: FrozenWeight,
    outputs: usize,
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, inputs) = layout.shape().dims2()?;
        let outputs = self.outputs;
        let shape = Shape::from((rows, outputs));
        let storage = match (storage, &self.weight) {
            (CpuStorage::F64(_), weight) => {
                let (x, w) = (slice::<f64>(storage, layout)?, weight.dense(DType::F64)?);
                let y = with_slices([&w], |[w]| Ok(dense_forward(x, w, (rows, outputs, inputs))))?;
                f64::to_cpu_storage_owned(y)
            }
            (CpuStorage::F32(_), FrozenWeight::Dense(w)) if w.dtype() == DType::F32 => {
                let x = slice::<f32>(storage, layout)?;
                f32::to_cpu_storage_owned(with_slices([w], |[w]| Ok(dense_forward(x, w, (rows, outputs, inputs))))?)
            }
            (CpuStorage::F32(_), weight) => {
                let x = slice::<f32>(storage, layout)?;
                let mut y = vec![0f32; rows * outputs];
                let out = Shared(y.as_mut_ptr());
                (0..weight.tile_count()?).into_par_iter().try_for_each(|index| -> Result<()> {
                    let (tile, start) = (weight.tile(index)?, index * TILE_ROWS);
                    let n = tile.len() / inputs.max(1);
                    // SAFETY: this task alone writes columns start..start+n of `y`; `x` and `tile` are whole.
                    unsafe {
                        product_raw(
                            (rows, n, inputs),
                            out.at(start),
                            Strides(outputs, 1),
                            false,
                            x.as_ptr(),
                            Strides(inputs, 1),
                            tile.as_ptr(),
                            Strides(1, inputs),
                            1.0,
                            false,
                        )
                    };
                    Ok(())
                })?;
                f32::to_cpu_storage_owned(y)
            }
            _ => candle_core::bail!("projection: x must be f32 or f64"),
        };
        Ok((storage, shape))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(frozen_backward_input(grad, &self.weight)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{assert_close, gradient_matches, random};

    #[test]
    fn forward_equals_the_reference_in_every_storage() -> Result<()> {
        let w = random((200, 64), 1, DType::F32)?;
        let quantised = QTensor::quantize(&w, GgmlDType::Q8_0)?;
        let weights = [
            FrozenWeight::Dense(w.clone()),
            FrozenWeight::Dense(w.to_dtype(DType::BF16)?),
            FrozenWeight::Dense(w.to_dtype(DType::F16)?),
            FrozenWeight::from_ggml(GgmlDType::Q8_0, &quantised.data()?, (200, 64))?,
        ];
        for weight in &weights {
            for rows in [1, 3, 37] {
                let x = random((rows, 64), 2, DType::F32)?;
                assert_close(&frozen_linear(&x, weight)?, &frozen_linear_reference(&x, weight)?, 1e-5)?;
                let g = random((rows, 200), 3, DType::F32)?;
                assert_close(&frozen_backward_input(&g, weight)?, &g.matmul(&weight.dense(DType::F32)?)?, 1e-5)?;
            }
        }
        Ok(())
    }

    #[test]
    fn gradient_equals_central_differences() -> Result<()> {
        let weight = FrozenWeight::Dense(random((5, 7), 1, DType::F64)?);
        gradient_matches(&random((6, 7), 2, DType::F64)?, |x| frozen_linear(x, &weight))
    }
}
