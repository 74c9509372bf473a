//! A safetensors file whose tensors are written one after another, before all their shapes are known.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use candle_core::Tensor;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::file::bytes::{raw_bytes, safetensors_dtype};

/// Bytes that one tensor takes in the header beside its name: type, two sides of at most 20 digits, two offsets of the same.
const ENTRY: usize = 160;

/// Room is left for the header, and what of it is not needed is filled with blanks, as the format allows.
pub(super) struct TensorWriter<'a> {
    file: std::io::BufWriter<&'a mut File>,
    path: &'a Path,
    room: usize,
    header: Map<String, Value>,
    at: usize,
}

impl<'a> TensorWriter<'a> {
    /// For tensors of these names.
    pub(super) fn new(file: &'a mut File, path: &'a Path, names: &[String]) -> Result<Self> {
        let room = (64 + names.iter().map(|name| name.len() + ENTRY).sum::<usize>()).next_multiple_of(8);
        let mut file = std::io::BufWriter::new(file);
        let start = SeekFrom::Start(8 + room as u64);
        file.seek(start).map_err(lorimer_model::Error::io("write", path))?;
        let header = Map::from_iter([("__metadata__".to_string(), json!({ "format": "pt" }))]);
        Ok(Self { file, path, room, header, at: 0 })
    }

    /// Appends a tensor.
    pub(super) fn push(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        let bytes = raw_bytes(tensor)?;
        self.file.write_all(&bytes).map_err(lorimer_model::Error::io("write", self.path))?;
        let end = self.at + bytes.len();
        let dtype = safetensors_dtype(tensor.dtype())?;
        let entry = json!({ "dtype": dtype, "shape": tensor.dims(), "data_offsets": [self.at, end] });
        self.header.insert(name.into(), entry);
        self.at = end;
        Ok(())
    }

    /// Writes the header.
    pub(super) fn finish(mut self) -> Result<()> {
        let mut header = Value::Object(self.header).to_string().into_bytes();
        if header.len() > self.room {
            return Err(Error::Mismatch("the header of the file is longer than the room for it".into()));
        }
        header.resize(self.room, b' ');
        let io = lorimer_model::Error::io("write", self.path);
        let write = |file: &mut std::io::BufWriter<&mut File>| -> std::io::Result<()> {
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&(self.room as u64).to_le_bytes())?;
            file.write_all(&header)?;
            file.flush()
        };
        Ok(write(&mut self.file).map_err(io)?)
    }
}
