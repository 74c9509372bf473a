//! Adapter folders read tensor by tensor, so that memory holds the shapes of all and the numbers of few.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use lorimer_model::weights::SafetensorsFile;

use crate::error::Result;
use crate::file::store::{ContentHash, StoredAdapter, WEIGHTS_FILE, check_finite, checked_names, read_settings};

/// One adapter's folder: its settings and the shapes of its tensors in memory, the tensors on disk.
pub(crate) struct StreamedAdapter {
    /// Configuration, manifest, and tensors that have the file's shapes and no numbers.
    pub stored: StoredAdapter,
    /// `sha256:…` over configuration and tensors.
    pub content_id: String,
    header: SafetensorsFile,
    data: Mutex<File>,
    data_start: u64,
}

impl StreamedAdapter {
    /// Opens a folder, reads all of it once for its content id, and keeps its shapes. `what`: what an adapter made of others cannot be, as
    /// `combined with others`.
    pub(crate) fn open(folder: &Path, what: &str) -> Result<Self> {
        let (config, manifest) = read_settings(folder)?;
        let path = folder.join(WEIGHTS_FILE);
        let header = SafetensorsFile::open(&path)?;
        let names = checked_names(&header)?;
        let io = |action| lorimer_model::Error::io(action, &path);
        let data = File::open(&path).map_err(io("read"))?;
        let length = data.metadata().map_err(io("read"))?.len();
        let Some(data_start) = length.checked_sub(header.metadata.data_len() as u64) else {
            return Err(lorimer_model::Error::invalid(&path, "changed while it was read").into());
        };
        let stored = StoredAdapter { path: folder.into(), config, tensors: BTreeMap::new(), manifest, parts: vec![] };
        stored.refuse_mixture(what)?;
        let mut file = Self { stored, content_id: String::new(), header, data: Mutex::new(data), data_start };
        let mut hash = ContentHash::new(&file.stored.config, &[]);
        for name in names {
            let (dtype, shape, bytes) = file.bytes(&name)?;
            let tensor = Tensor::from_raw_buffer(&bytes, dtype, &shape, &Device::Cpu)?;
            check_finite(&file.header.path, &name, &tensor)?;
            hash.tensor(&name, dtype, &shape, &bytes);
            let empty = Tensor::zeros((), dtype, &Device::Cpu)?.broadcast_as(shape)?;
            file.stored.tensors.insert(name, empty);
        }
        file.content_id = hash.finish();
        Ok(file)
    }

    /// Type, shape and bytes of a tensor.
    fn bytes(&self, name: &str) -> Result<(DType, Vec<usize>, Vec<u8>)> {
        let path = &self.header.path;
        let none = || lorimer_model::Error::invalid(path, format!("has no tensor `{name}`"));
        let info = self.header.metadata.info(name).ok_or_else(none)?;
        // The header was checked against the file's length, so the span is inside of it.
        let (start, end) = info.data_offsets;
        let (dtype, shape, _) = self.header.tensor(name)?.ok_or_else(none)?;
        let mut bytes = vec![0; end - start];
        let mut file = self.data.lock().unwrap_or_else(PoisonError::into_inner);
        let io = |action| lorimer_model::Error::io(action, path);
        file.seek(SeekFrom::Start(self.data_start + start as u64)).map_err(io("read"))?;
        file.read_exact(&mut bytes).map_err(io("read"))?;
        Ok((dtype, shape, bytes))
    }

    /// A tensor in its own type.
    pub(crate) fn tensor(&self, name: &str) -> Result<Tensor> {
        let (dtype, shape, bytes) = self.bytes(name)?;
        Ok(Tensor::from_raw_buffer(&bytes, dtype, &shape, &Device::Cpu)?)
    }
}

/// The content id of a folder that has just been written.
pub(crate) fn content_id_of(folder: &Path) -> Result<String> {
    Ok(StreamedAdapter::open(folder, "read tensor by tensor")?.content_id)
}
