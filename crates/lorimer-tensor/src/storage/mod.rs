//! How a frozen weight is kept: as numbers, or in fewer bits that are expanded where a product needs them.

pub mod affine;
pub mod bits;
mod blocks;
pub mod blockwise;
pub mod levels;
pub mod mapped;
pub mod nf4;
pub mod normal_float;
pub mod panels;

use std::ops::{Deref, Range};
use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use candle_core::{CpuStorage, DType, Device, Layout, Result, Storage, Tensor};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use crate::kernels::cpu::{Level, level};
use crate::kernels::portable::half;
use crate::kernels::wide::wide;
use affine::Affine;
pub use blocks::Blocks;
use levels::Levels;
use normal_float::NfConfig;
use panels::Panels;

/// A frozen weight `(outputs, inputs)` in whatever storage the base uses. Cheap to clone.
#[derive(Clone, Debug)]
pub enum FrozenWeight {
    /// f32, f64, f16 or bf16, row-major.
    Dense(Tensor),
    /// GGUF blocks.
    Quantised(Arc<Blocks>),
    /// Indices of levels with scales of blocks: NormalFloat of 2, 3, 4 or 8 bits, FP4.
    Levels(Arc<Levels>),
    /// 4 bits with a scale and a zero point a group of inputs: GPTQ's and AWQ's.
    Affine(Arc<Affine>),
    /// 8 or 4 bits, laid out for products in whole numbers.
    Panels(Arc<Panels>),
}

impl FrozenWeight {
    /// The raw GGUF bytes of an `(outputs, inputs)` matrix.
    pub fn from_ggml(dtype: GgmlDType, bytes: &[u8], shape: (usize, usize)) -> Result<Self> {
        let inputs = shape.1;
        if !inputs.is_multiple_of(dtype.block_size()) {
            candle_core::bail!(
                "a {dtype:?} row holds blocks of {} values, and {inputs} inputs do not divide into them",
                dtype.block_size()
            );
        }
        Ok(Self::Quantised(Arc::new(Blocks::new(dtype, bytes.to_vec(), shape)?)))
    }

    /// The weight in NF4 with double quantisation.
    pub fn to_nf4(&self) -> Result<Self> {
        let values = self.dense(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        Ok(Self::Levels(Arc::new(nf4::quantise(&values, self.dims()?)?)))
    }

    /// The weight in LQ-LoRA's NormalFloat.
    ///
    /// # Errors
    ///
    /// Fails as [`normal_float::quantise`] does.
    pub fn to_normal_float(&self, config: &NfConfig) -> Result<Self> {
        let values = self.dense(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        Ok(Self::Levels(Arc::new(normal_float::quantise(&values, self.dims()?, config)?)))
    }

    /// The weight in 8 bits (4 where it is in 4), for products in whole numbers; GGUF's Q4_0, Q4_1 and Q8_0 exactly, others rounded.
    /// Fails where a value is not finite or a block's numbers are beyond half precision.
    pub fn to_panels(&self) -> Result<Self> {
        let shape = self.dims()?;
        let packed = match self {
            Self::Panels(panels) => return Ok(Self::Panels(panels.clone())),
            Self::Quantised(blocks) if let Some(bits) = blocks.affine_bits() => {
                Panels::pack(shape, bits == 4, |row, block| blocks.affine(row, block))?
            }
            _ => {
                let values = self.dense(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
                let block = |row: usize, block: usize| {
                    let start = row * shape.1 + block * panels::BLOCK;
                    panels::Block::of(&values[start..(start + panels::BLOCK).min((row + 1) * shape.1)])
                };
                Panels::pack(shape, false, block)?
            }
        };
        Ok(Self::Panels(Arc::new(packed)))
    }

    /// `(outputs, inputs)`.
    pub fn dims(&self) -> Result<(usize, usize)> {
        match self {
            Self::Dense(w) => w.dims2(),
            Self::Quantised(blocks) => Ok(blocks.shape()),
            Self::Levels(packed) => Ok(packed.shape()),
            Self::Affine(packed) => Ok(packed.shape()),
            Self::Panels(packed) => Ok(packed.shape()),
        }
    }

    /// The whole weight, `(outputs, inputs)`, in `dtype` (f32, f64, f16 or bf16).
    pub fn dense(&self, dtype: DType) -> Result<Tensor> {
        if let Self::Dense(w) = self {
            return w.to_dtype(dtype);
        }
        let (outputs, inputs) = self.dims()?;
        let guard = self.guard();
        let view = guard.view()?;
        let mut values = vec![0f32; outputs * inputs];
        values.par_chunks_mut(inputs.max(1)).enumerate().for_each(|(row, out)| view.expand(row, 0..inputs, out));
        Tensor::from_vec(values, (outputs, inputs), &Device::Cpu)?.to_dtype(dtype)
    }

    /// Single rows of the weight, expanded: (ids, inputs) in `dtype`. An embedding is this.
    pub fn rows(&self, ids: &[u32], dtype: DType) -> Result<Tensor> {
        let (outputs, inputs) = self.dims()?;
        if let Some(bad) = ids.iter().find(|&&id| id as usize >= outputs) {
            candle_core::bail!("row {bad} of a weight with {outputs} rows");
        }
        if let Self::Dense(w) = self {
            return w.index_select(&Tensor::from_slice(ids, ids.len(), w.device())?, 0)?.to_dtype(dtype);
        }
        let guard = self.guard();
        let view = guard.view()?;
        let mut rows = vec![0f32; ids.len() * inputs];
        for (&id, out) in ids.iter().zip(rows.chunks_mut(inputs.max(1))) {
            view.expand(id as usize, 0..inputs, out);
        }
        Tensor::from_vec(rows, (ids.len(), inputs), &Device::Cpu)?.to_dtype(dtype)
    }

    /// Bytes that the stored form takes.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Dense(w) => w.elem_count() * w.dtype().size_in_bytes(),
            Self::Quantised(blocks) => blocks.bytes(),
            Self::Levels(packed) => packed.bytes(),
            Self::Affine(packed) => packed.bytes(),
            Self::Panels(packed) => packed.bytes(),
        }
    }

    /// How it is stored, for people: `f32`, `bf16`, `Q4_1`, `nf4`, `affine4`, `int8`.
    pub fn storage_name(&self) -> String {
        match self {
            Self::Dense(w) => w.dtype().as_str().to_string(),
            Self::Quantised(blocks) => format!("{:?}", blocks.dtype()),
            Self::Levels(packed) => packed.name().to_string(),
            Self::Affine(_) => "affine4".to_string(),
            Self::Panels(packed) => format!("int{}", packed.bits()),
        }
    }

    /// Holds the weight for reading.
    pub(crate) fn guard(&self) -> Guard<'_> {
        match self {
            Self::Dense(w) => {
                let (storage, layout) = w.storage_and_layout();
                Guard::Dense(Box::new(storage), layout)
            }
            other => Guard::Packed(other),
        }
    }
}

/// A weight held for reading.
pub(crate) enum Guard<'a> {
    Dense(Box<dyn Deref<Target = Storage> + 'a>, &'a Layout),
    Packed(&'a FrozenWeight),
}

impl Guard<'_> {
    /// An error for a weight without inputs, whose number of outputs its numbers do not tell.
    pub(crate) fn view(&self) -> Result<View<'_>> {
        let view = self.numbers()?;
        match view.shape() {
            (_, 0) => candle_core::bail!("a frozen weight has no inputs"),
            _ => Ok(view),
        }
    }

    fn numbers(&self) -> Result<View<'_>> {
        Ok(match self {
            Self::Packed(FrozenWeight::Quantised(blocks)) => View::Blocks(blocks),
            Self::Packed(FrozenWeight::Levels(packed)) => View::Levels(packed),
            Self::Packed(FrozenWeight::Affine(packed)) => View::Affine(packed),
            Self::Packed(FrozenWeight::Panels(packed)) => View::Panels(packed),
            Self::Packed(FrozenWeight::Dense(_)) => candle_core::bail!("a dense weight is not packed"),
            Self::Dense(storage, layout) => {
                let (_, inputs) = layout.shape().dims2()?;
                let Some((start, end)) = layout.contiguous_offsets() else {
                    candle_core::bail!("a frozen weight must be contiguous");
                };
                match &***storage {
                    Storage::Cpu(CpuStorage::F32(w)) => View::F32(&w[start..end], inputs),
                    Storage::Cpu(CpuStorage::F64(w)) => View::F64(&w[start..end], inputs),
                    Storage::Cpu(CpuStorage::F16(w)) => View::F16(&w[start..end], inputs),
                    Storage::Cpu(CpuStorage::BF16(w)) => View::Bf16(&w[start..end], inputs),
                    _ => candle_core::bail!("a frozen weight on the CPU must be f64, f32, f16 or bf16"),
                }
            }
        })
    }
}

/// Row-major numbers to read, with the length of a row.
#[derive(Clone, Copy)]
pub(crate) enum View<'a> {
    F32(&'a [f32], usize),
    F64(&'a [f64], usize),
    F16(&'a [f16], usize),
    Bf16(&'a [bf16], usize),
    Blocks(&'a Blocks),
    Levels(&'a Levels),
    Affine(&'a Affine),
    Panels(&'a Panels),
}

impl View<'_> {
    /// (outputs, inputs).
    pub(crate) fn shape(&self) -> (usize, usize) {
        let of = |length: usize, inputs: usize| (length.checked_div(inputs).unwrap_or(0), inputs);
        match self {
            Self::F32(w, inputs) => of(w.len(), *inputs),
            Self::F64(w, inputs) => of(w.len(), *inputs),
            Self::F16(w, inputs) => of(w.len(), *inputs),
            Self::Bf16(w, inputs) => of(w.len(), *inputs),
            Self::Blocks(blocks) => blocks.shape(),
            Self::Levels(packed) => packed.shape(),
            Self::Affine(packed) => packed.shape(),
            Self::Panels(packed) => packed.shape(),
        }
    }

    /// Columns that can only be expanded together.
    pub(crate) fn granule(&self) -> usize {
        match self {
            Self::Blocks(blocks) => blocks.dtype().block_size(),
            // Any column will do; whole blocks save scales.
            Self::Levels(packed) => packed.block().min(64),
            Self::Panels(_) => panels::BLOCK,
            _ => 1,
        }
    }

    /// Columns of a row as f32. The first column is a multiple of the granule.
    #[inline]
    pub(crate) fn expand(&self, row: usize, columns: Range<usize>, out: &mut [f32]) {
        let part = |inputs: usize| row * inputs + columns.start..row * inputs + columns.end;
        match self {
            Self::F32(w, inputs) => out[..columns.len()].copy_from_slice(&w[part(*inputs)]),
            Self::F64(w, inputs) => out.iter_mut().zip(&w[part(*inputs)]).for_each(|(o, &v)| *o = v as f32),
            Self::F16(w, inputs) => match level() {
                Level::Plain => out.iter_mut().zip(&w[part(*inputs)]).for_each(|(o, v)| *o = half(v.to_bits())),
                _ => w[part(*inputs)].convert_to_f32_slice(&mut out[..columns.len()]),
            },
            Self::Bf16(w, inputs) => {
                let bits = |(o, v): (&mut f32, &bf16)| *o = f32::from_bits(u32::from(v.to_bits()) << 16);
                wide!(out.iter_mut().zip(&w[part(*inputs)]).for_each(bits));
            }
            Self::Blocks(blocks) => blocks.expand(row, columns, out),
            Self::Levels(packed) => packed.expand(row, columns, out),
            Self::Affine(packed) => packed.expand(row, columns, out),
            Self::Panels(packed) => packed.expand(row, columns, out),
        }
    }
}
