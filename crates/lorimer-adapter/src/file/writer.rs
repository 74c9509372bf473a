//! A safetensors file, written tensor by tensor.

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::Path;

use candle_core::{DType, Tensor};
use lorimer_model::files::write_atomic_with;

use crate::error::{Error, Result};
use crate::file::bytes::{Header, raw_bytes};

/// Writes tensors one after another, and the header into the room before them once all are there.
pub struct TensorWriter<'a> {
    file: BufWriter<&'a mut File>,
    path: &'a Path,
    room: usize,
    header: Header,
}

impl TensorWriter<'_> {
    /// Appends a tensor's bytes.
    ///
    /// # Errors
    ///
    /// Fails if they are not as many as type and shape say, if they cannot be written, or as [`Header::push`] does.
    pub fn push_bytes(&mut self, name: &str, dtype: DType, shape: &[usize], bytes: &[u8]) -> Result<()> {
        let length = self.header.push(name, dtype, shape)?;
        if bytes.len() != length {
            return Err(Error::Mismatch(format!("tensor `{name}` has {} bytes, {length} were expected", bytes.len())));
        }
        Ok(self.file.write_all(bytes).map_err(lorimer_model::Error::io("write", self.path))?)
    }

    /// Appends a tensor.
    ///
    /// # Errors
    ///
    /// Fails if files do not hold its type, or if it cannot be written.
    pub fn push(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        self.push_bytes(name, tensor.dtype(), tensor.dims(), &raw_bytes(tensor)?)
    }

    fn finish(mut self) -> Result<()> {
        let header = self.header.bytes(self.room)?;
        let mut write = || {
            self.file.seek(SeekFrom::Start(0))?;
            self.file.write_all(&header)?;
            self.file.flush()
        };
        Ok(write().map_err(lorimer_model::Error::io("write", self.path))?)
    }
}

/// Writes a file whole or not at all; `fill` appends its tensors, whose header takes at most `room` bytes.
///
/// # Errors
///
/// Fails if `fill` does, if the header takes more, or if the file cannot be written.
pub fn write_tensors(path: &Path, room: usize, fill: impl FnOnce(&mut TensorWriter<'_>) -> Result<()>) -> Result<()> {
    carrying(|carry| {
        write_atomic_with(path, |file| {
            let write = || -> Result<()> {
                let mut file = BufWriter::new(file);
                let start = SeekFrom::Start(8 + room as u64);
                file.seek(start).map_err(lorimer_model::Error::io("write", path))?;
                let mut out = TensorWriter { file, path, room, header: Header::default() };
                fill(&mut out)?;
                out.finish()
            };
            write().map_err(carry)
        })
    })
}

/// Writes by a function of `lorimer-model`, whose errors cannot hold this crate's: what `carry` is given is what comes out.
pub(crate) fn carrying(
    write: impl FnOnce(&mut dyn FnMut(Error) -> lorimer_model::Error) -> lorimer_model::Result<()>,
) -> Result<()> {
    let mut carried = None;
    let written = write(&mut |error| {
        let text = error.to_string();
        carried = Some(error);
        lorimer_model::Error::Unsupported(text)
    });
    match carried {
        Some(error) => Err(error),
        None => Ok(written?),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use candle_core::Device;

    use super::*;

    fn tensors() -> BTreeMap<String, Tensor> {
        let of = |name: &str, shape: &[usize], dtype: DType| {
            (name.to_string(), Tensor::ones(shape, dtype, &Device::Cpu).unwrap())
        };
        BTreeMap::from([of("b", &[3, 2], DType::F32), of("a", &[5], DType::F16), of("z", &[0, 4], DType::F64)])
    }

    #[test]
    fn a_streamed_file_holds_the_same_in_any_room() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let all = tensors();
        let mut header = Header::default();
        for (name, t) in &all {
            header.push(name, t.dtype(), t.dims()).unwrap();
        }
        let names: Vec<String> = all.keys().cloned().collect();
        let least = header.room();
        for room in [least, least + 8, Header::room_for(&names)] {
            write_tensors(&path, room, |out| all.iter().try_for_each(|(name, t)| out.push(name, t))).unwrap();
            let bytes = std::fs::read(&path).unwrap();
            assert_eq!(bytes[..8], (room as u64).to_le_bytes());
            let found = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            assert_eq!(found.len(), all.len());
            for (name, t) in &all {
                let view = found.tensor(name).unwrap();
                assert_eq!((view.shape(), view.data()), (t.dims(), &raw_bytes(t).unwrap()[..]));
            }
        }
        // Nothing of a file that did not come to its end; the one before stays.
        let before = std::fs::read(&path).unwrap();
        let told = write_tensors(&path, 16, |out| out.push("a", &all["a"])).unwrap_err().to_string();
        assert!(told.contains("room"), "{told}");
        let told = write_tensors(&path, least, |out| out.push_bytes("a", DType::F32, &[2], &[0; 7])).unwrap_err();
        assert!(told.to_string().contains("7 bytes, 8 were expected"), "{told}");
        let twice = |out: &mut TensorWriter<'_>| (0..2).try_for_each(|_| out.push("a", &all["a"]));
        let told = write_tensors(&path, least, twice).unwrap_err();
        assert!(told.to_string().contains("twice"), "{told}");
        let refused = write_tensors(&path, least, |_| Err(Error::Refused("no".into()))).unwrap_err();
        assert!(matches!(refused, Error::Refused(_)));
        assert!(std::fs::read(&path).unwrap() == before && std::fs::read_dir(folder.path()).unwrap().count() == 1);
    }
}
