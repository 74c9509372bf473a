//! Tensors as the bytes of a safetensors file.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use serde_json::{Map, Value, json};

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

/// Bytes that one tensor takes in the header beside its name: type, two sides of at most 20 digits, two offsets of the same.
const ENTRY: usize = 160;

/// The header of a file whose tensors lie in the order in which they were named, as PEFT writes it (`format: pt`).
pub struct Header {
    entries: Map<String, Value>,
    end: usize,
}

impl Default for Header {
    fn default() -> Self {
        Self { entries: Map::from_iter([("__metadata__".to_string(), json!({ "format": "pt" }))]), end: 0 }
    }
}

impl Header {
    /// Names the next tensor; gives its bytes.
    ///
    /// # Errors
    ///
    /// Fails if files do not hold the type, or if the name is there already.
    pub fn push(&mut self, name: &str, dtype: DType, shape: &[usize]) -> Result<usize> {
        let length = shape.iter().product::<usize>() * dtype.size_in_bytes();
        let offsets = [self.end, self.end + length];
        let entry = json!({ "dtype": safetensors_dtype(dtype)?, "shape": shape, "data_offsets": offsets });
        if self.entries.insert(name.into(), entry).is_some() {
            return Err(Error::Mismatch(format!("tensor `{name}` is to be written twice")));
        }
        self.end = offsets[1];
        Ok(length)
    }

    /// Bytes that it needs, without its own length: a multiple of 8.
    pub fn room(&self) -> usize {
        Value::from(self.entries.clone()).to_string().len().next_multiple_of(8)
    }

    /// Room that is enough for tensors of these names with at most two sides.
    pub fn room_for(names: &[String]) -> usize {
        (64 + names.iter().map(|name| name.len() + ENTRY).sum::<usize>()).next_multiple_of(8)
    }

    /// What a file begins with: the header's length, and the header filled with blanks up to `room`, as the format allows.
    ///
    /// # Errors
    ///
    /// Fails if it does not fit in.
    pub fn bytes(self, room: usize) -> Result<Vec<u8>> {
        let text = Value::from(self.entries).to_string();
        if text.len() > room {
            return Err(Error::Mismatch("the header of the file is longer than the room for it".into()));
        }
        let mut bytes = (room as u64).to_le_bytes().to_vec();
        bytes.extend(text.into_bytes());
        bytes.resize(8 + room, b' ');
        Ok(bytes)
    }
}

/// A safetensors file in memory, its tensors in the order that the format's own crate gives them: by type, the widest first, then by name.
///
/// # Errors
///
/// Fails if a tensor is of a type that adapter files do not hold.
pub fn safetensors_bytes(tensors: &BTreeMap<String, Tensor>) -> Result<Vec<u8>> {
    let dtypes = tensors.values().map(|t| safetensors_dtype(t.dtype())).collect::<Result<Vec<_>>>()?;
    let mut order: Vec<_> = dtypes.into_iter().zip(tensors).collect();
    order.sort_by(|(a, (a_name, _)), (b, (b_name, _))| b.cmp(a).then(a_name.cmp(b_name)));
    let mut header = Header::default();
    for (_, (name, tensor)) in &order {
        header.push(name, tensor.dtype(), tensor.dims())?;
    }
    let room = header.room();
    let mut bytes = header.bytes(room)?;
    for (_, (_, tensor)) in order {
        bytes.extend(raw_bytes(tensor)?);
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::Device;

    use super::*;

    fn tensors() -> BTreeMap<String, Tensor> {
        let of = |name: &str, shape: &[usize], dtype: DType| {
            let count: usize = shape.iter().product();
            let values: Vec<f32> = (0..count).map(|i| i as f32 - 2.0).collect();
            let t = Tensor::from_vec(values, shape, &Device::Cpu).unwrap().abs().unwrap().to_dtype(dtype).unwrap();
            (name.to_string(), t)
        };
        BTreeMap::from([
            of("b.\"quoted\"", &[3, 2], DType::F32),
            of("a", &[5], DType::F16),
            of("ä", &[], DType::F32),
            of("empty", &[0, 4], DType::F64),
            of("z", &[7], DType::U8),
            of("i", &[2, 1, 3], DType::I64),
        ])
    }

    /// To be seen to fail: tensors in the order of their names alone, a header without blanks.
    #[test]
    fn bytes_are_those_of_the_formats_own_crate() {
        for some in [tensors(), BTreeMap::new()] {
            let raw: BTreeMap<&str, Vec<u8>> = some.iter().map(|(n, t)| (n.as_str(), raw_bytes(t).unwrap())).collect();
            let view = |(name, t): (&String, &Tensor)| {
                let dtype = safetensors_dtype(t.dtype()).unwrap();
                let bytes = raw.get(name.as_str()).unwrap();
                (name.clone(), safetensors::tensor::TensorView::new(dtype, t.dims().to_vec(), bytes).unwrap())
            };
            let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
            let expected = safetensors::serialize(some.iter().map(view), Some(metadata)).unwrap();
            assert_eq!(safetensors_bytes(&some).unwrap(), expected);
        }
    }
}
