//! One safetensors file.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use lorimer_tensor::storage::mapped::MappedFile;

use super::raw::RawTensor;
use crate::error::{Error, Result};
use crate::files::MAX_HEADER_BYTES;

/// A file's bytes: mapped, or read into memory.
pub(super) enum Bytes {
    Mapped(MappedFile),
    Read(Vec<u8>),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(file) => file,
            Self::Read(bytes) => bytes,
        }
    }
}

/// One safetensors file, its header checked.
pub struct SafetensorsFile {
    /// Where it is.
    pub path: PathBuf,
    /// Names, types, shapes and offsets.
    pub metadata: safetensors::tensor::Metadata,
    pub(super) bytes: Bytes,
    pub(super) data_start: usize,
}

impl SafetensorsFile {
    /// Maps a file and checks its header: bounded in size, offsets contiguous, shapes as long as their spans.
    pub fn open(path: &Path) -> Result<Self> {
        let mapped = MappedFile::open(path).map_err(Error::io("read", path))?;
        Self::of(path, Bytes::Mapped(mapped))
    }

    /// [`Self::open`] for a file of at most `limit` bytes that others may change meanwhile: it is read first, and what was read is used.
    pub fn read(path: &Path, limit: u64) -> Result<Self> {
        Self::of(path, Bytes::Read(crate::files::read_bounded(path, limit)?))
    }

    /// [`Self::open`] for bytes in memory, which errors call `name`.
    pub fn from_bytes(name: &str, bytes: Vec<u8>) -> Result<Self> {
        Self::of(Path::new(name), Bytes::Read(bytes))
    }

    fn of(path: &Path, bytes: Bytes) -> Result<Self> {
        let length = bytes.first_chunk::<8>().map(|b| u64::from_le_bytes(*b));
        match length {
            Some(n) if n <= MAX_HEADER_BYTES => {}
            Some(n) => {
                return Err(Error::invalid(
                    path,
                    format!("a header of {n} bytes, at most {MAX_HEADER_BYTES} are read"),
                ));
            }
            None => return Err(Error::invalid(path, "is too short for a safetensors file")),
        }
        let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes)
            .map_err(|e| Error::invalid(path, format!("is not a valid safetensors file: {e}")))?;
        let data_start = header + 8;
        if metadata.data_len() != bytes.len() - data_start {
            return Err(Error::invalid(
                path,
                format!(
                    "is not a valid safetensors file: its tensors take {} bytes, the file has {} for them",
                    metadata.data_len(),
                    bytes.len() - data_start
                ),
            ));
        }
        Ok(Self { path: path.to_path_buf(), metadata, bytes, data_start })
    }

    /// Type, shape and bytes of a tensor.
    pub fn tensor(&self, name: &str) -> Result<Option<RawTensor<'_, DType>>> {
        let Some(info) = self.metadata.info(name) else { return Ok(None) };
        let dtype = match info.dtype {
            safetensors::Dtype::F64 => DType::F64,
            safetensors::Dtype::F32 => DType::F32,
            safetensors::Dtype::F16 => DType::F16,
            safetensors::Dtype::BF16 => DType::BF16,
            safetensors::Dtype::U8 => DType::U8,
            safetensors::Dtype::U32 => DType::U32,
            safetensors::Dtype::I32 => DType::I32,
            safetensors::Dtype::I64 => DType::I64,
            other => {
                return Err(Error::invalid(
                    &self.path,
                    format!(
                        "tensor `{name}` has type {other:?}; f64, f32, f16, bf16 and integers of 8 (unsigned), 32 and 64 bits are read"
                    ),
                ));
            }
        };
        let (start, end) = (self.data_start + info.data_offsets.0, self.data_start + info.data_offsets.1);
        let bytes = self
            .bytes
            .get(start..end)
            .ok_or_else(|| Error::invalid(&self.path, format!("tensor `{name}` lies beyond the end of the file")))?;
        Ok(Some((dtype, info.shape.clone(), bytes)))
    }

    /// A tensor in its own type.
    pub fn load(&self, name: &str) -> Result<Option<Tensor>> {
        Ok(match self.tensor(name)? {
            Some((dtype, shape, bytes)) => Some(Tensor::from_raw_buffer(bytes, dtype, &shape, &Device::Cpu)?),
            None => None,
        })
    }

    /// Names of all tensors, in order.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.metadata.tensors().into_keys().collect();
        names.sort();
        names
    }
}
