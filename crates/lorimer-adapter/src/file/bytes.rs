//! Tensors as the bytes of a safetensors file.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};

use crate::error::{Error, Result};

/// Little-endian bytes of a CPU tensor.
///
/// # Errors
///
/// Fails if the tensor is of a type that adapter files do not hold.
pub fn raw_bytes(t: &Tensor) -> Result<Vec<u8>> {
    fn le<T, const N: usize>(values: &[T], bytes: impl Fn(&T) -> [u8; N]) -> Vec<u8> {
        let mut out = vec![0; values.len() * N];
        out.chunks_exact_mut(N).zip(values).for_each(|(out, v)| out.copy_from_slice(&bytes(v)));
        out
    }
    let flat = t.flatten_all()?;
    Ok(match t.dtype() {
        DType::U8 => flat.to_vec1::<u8>()?,
        DType::U32 => le(&flat.to_vec1::<u32>()?, |v| v.to_le_bytes()),
        DType::I32 => le(&flat.to_vec1::<i32>()?, |v| v.to_le_bytes()),
        DType::I64 => le(&flat.to_vec1::<i64>()?, |v| v.to_le_bytes()),
        DType::F64 => le(&flat.to_vec1::<f64>()?, |v| v.to_le_bytes()),
        DType::F32 => le(&flat.to_vec1::<f32>()?, |v| v.to_le_bytes()),
        DType::F16 => le(&flat.to_vec1::<half::f16>()?, |v| v.to_le_bytes()),
        DType::BF16 => le(&flat.to_vec1::<half::bf16>()?, |v| v.to_le_bytes()),
        other => return Err(Error::Mismatch(format!("tensors of type {other:?} are not stored in adapters"))),
    })
}

/// The safetensors name of a tensor's type.
///
/// # Errors
///
/// Fails if adapter files do not hold the type.
pub fn safetensors_dtype(dtype: DType) -> Result<safetensors::Dtype> {
    Ok(match dtype {
        DType::U8 => safetensors::Dtype::U8,
        DType::U32 => safetensors::Dtype::U32,
        DType::I32 => safetensors::Dtype::I32,
        DType::I64 => safetensors::Dtype::I64,
        DType::F64 => safetensors::Dtype::F64,
        DType::F32 => safetensors::Dtype::F32,
        DType::F16 => safetensors::Dtype::F16,
        DType::BF16 => safetensors::Dtype::BF16,
        other => return Err(Error::Mismatch(format!("tensors of type {other:?} cannot be written"))),
    })
}

/// A safetensors file in memory, as PEFT writes it (`format: pt`).
///
/// # Errors
///
/// Fails if a tensor is of a type that adapter files do not hold.
pub fn safetensors_bytes(tensors: &BTreeMap<String, Tensor>) -> Result<Vec<u8>> {
    let data = tensors.iter().map(|(n, t)| Ok((n, safetensors_dtype(t.dtype())?, t.dims().to_vec(), raw_bytes(t)?)));
    let data = data.collect::<Result<Vec<_>>>()?;
    let broken = |e: safetensors::SafeTensorError| Error::Mismatch(format!("cannot write safetensors: {e}"));
    let views = data.iter().map(|(name, dtype, shape, bytes)| {
        Ok((name.as_str(), safetensors::tensor::TensorView::new(*dtype, shape.clone(), bytes).map_err(broken)?))
    });
    let metadata = std::collections::HashMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::serialize(views.collect::<Result<Vec<_>>>()?, Some(metadata)).map_err(broken)
}
