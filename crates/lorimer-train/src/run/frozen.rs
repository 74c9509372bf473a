//! What the frozen lower layers give, kept from epoch to epoch where only upper layers are adapted.
//!
//! Below the first adapted layer nothing changes while an adapter is trained, so every row's hidden states there are computed once,
//! before the first step, and read ever after. They are computed in the file's order, so that a resumed run has the same.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use candle_core::{Device, Tensor};
use lorimer_adapter::Attached;
use lorimer_model::{Adaptation, BaseModel, Batch, run_blocks};
use lorimer_tensor::Tape;
use lorimer_tensor::storage::mapped::MappedFile;
use serde::{Deserialize, Serialize};

use crate::data::encode::Example;
use crate::error::Result;

/// Where the output of frozen lower layers is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FrozenCache {
    /// In memory up to 1 GiB, else on disk up to 16 GiB, else nowhere.
    #[default]
    Auto,
    /// Nowhere: it is computed in every step.
    Off,
    /// In memory, whatever it takes.
    Memory,
    /// In a file in the run's folder, which is gone when the process is.
    Disk,
}

const MOST_IN_MEMORY: u64 = 1 << 30;
const MOST_ON_DISK: u64 = 16 << 30;

impl FrozenCache {
    /// What `Auto` comes to for so many bytes.
    pub(crate) fn resolved(self, bytes: u64) -> Self {
        match (self, bytes) {
            (Self::Auto, 0..=MOST_IN_MEMORY) => Self::Memory,
            (Self::Auto, ..=MOST_ON_DISK) => Self::Disk,
            (Self::Auto, _) => Self::Off,
            (given, _) => given,
        }
    }
}

enum Store {
    Memory(Vec<f32>),
    Disk(MappedFile),
}

/// Hidden states of all training rows at the input of the first layer that an adapter touches.
pub struct FrozenLower {
    layers: usize,
    width: usize,
    /// First token of each row among all tokens.
    starts: Vec<usize>,
    store: Store,
}

/// Number of layers below the first one that the adapter touches; at least one layer is left above.
pub fn frozen_layers(model: &dyn BaseModel, attached: &Attached<'_>) -> usize {
    let layer = |path: &str| path.split('.').find_map(|part| part.parse::<usize>().ok());
    let all = model.shape().layers.len();
    let sites = model.projections().into_iter().filter(|(site, _)| attached.touches(site));
    let sites = sites.map(|(site, _)| site.layer.unwrap_or(all));
    let names = model.parameter_names().into_iter().filter(|name| attached.parameter(name).is_some());
    let stem = model.stem_parameters();
    let names = names.map(|name| if stem.contains(&name) { 0 } else { layer(&name).unwrap_or(all) });
    sites.chain(names).chain(attached.first_block()).min().unwrap_or(all).min(all.saturating_sub(1))
}

/// Bytes that the hidden states of all rows take.
pub fn cache_bytes(model: &dyn BaseModel, rows: &[Example]) -> u64 {
    let tokens: u64 = rows.iter().map(|e| e.tokens.len() as u64).sum();
    tokens * model.shape().hidden as u64 * 4
}

impl FrozenLower {
    /// Computes the hidden states of all rows, `size` rows at a time; `None` where nothing is to be kept. `progress` hears of rows
    /// that are done.
    pub fn build(
        model: &dyn BaseModel,
        attached: &Attached<'_>,
        rows: &[Example],
        size: usize,
        cache: FrozenCache,
        folder: &Path,
        mut progress: impl FnMut(usize),
    ) -> Result<Option<Self>> {
        let layers = frozen_layers(model, attached);
        let cache = cache.resolved(cache_bytes(model, rows));
        if layers == 0 || cache == FrozenCache::Off || model.dtype() != candle_core::DType::F32 {
            return Ok(None);
        }
        let width = model.shape().hidden;
        let mut starts = vec![0];
        for e in rows {
            starts.push(starts[starts.len() - 1] + e.tokens.len());
        }
        let problem = |e: std::io::Error| lorimer_model::Error::io("write the cache of frozen layers in", folder)(e);
        let mut memory = Vec::new();
        let mut file: Option<BufWriter<File>> = None;
        if cache == FrozenCache::Disk {
            std::fs::create_dir_all(folder).map_err(problem)?;
            file = Some(BufWriter::new(tempfile::tempfile_in(folder).map_err(problem)?));
        }
        for (i, rows) in rows.chunks(size.max(1)).enumerate() {
            let batch = model.shape().batch(rows.iter().map(|e| e.tokens.as_slice()));
            let hidden = rayon::scope(|_| below(model, attached, &batch, layers))?;
            let hidden = hidden.flatten_all()?.to_vec1::<f32>()?;
            for at in batch.rows.iter().flatten() {
                let row = &hidden[*at as usize * width..][..width];
                match &mut file {
                    None => memory.extend_from_slice(row),
                    Some(file) => row.iter().try_for_each(|v| file.write_all(&v.to_le_bytes())).map_err(problem)?,
                }
            }
            progress((i * size + rows.len()).min(starts.len() - 1));
        }
        let store = match file {
            None => Store::Memory(memory),
            Some(file) => {
                let file = file.into_inner().map_err(|e| problem(e.into_error()))?;
                Store::Disk(MappedFile::of(&file).map_err(problem)?)
            }
        };
        Ok(Some(Self { layers, width, starts, store }))
    }

    /// Number of layers whose output this is.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// Hidden states for the rows of a batch that was made of the rows at `places` of the training set, or of what they begin
    /// with.
    pub(crate) fn assemble(&self, places: &[usize], batch: &Batch) -> Result<Tensor> {
        let width = self.width;
        let mut hidden = vec![0f32; batch.tokens.len() * width];
        for (&place, rows) in places.iter().zip(&batch.rows) {
            for (i, &row) in rows.iter().enumerate() {
                let out = &mut hidden[row as usize * width..][..width];
                let from = (self.starts[place] + i) * width;
                match &self.store {
                    Store::Memory(all) => out.copy_from_slice(&all[from..from + width]),
                    Store::Disk(bytes) => {
                        let (values, _) = bytes[from * 4..(from + width) * 4].as_chunks::<4>();
                        out.iter_mut().zip(values).for_each(|(out, v)| *out = f32::from_le_bytes(*v));
                    }
                }
            }
        }
        Ok(Tensor::from_vec(hidden, (batch.tokens.len(), width), &Device::Cpu)?)
    }
}

/// Hidden states (rows, width) after the first `layers` layers.
fn below(model: &dyn BaseModel, attached: &Attached<'_>, batch: &Batch, layers: usize) -> candle_core::Result<Tensor> {
    let blank = Tape::new([]);
    let on = attached.recorded(&blank);
    let layout = model.layout(&batch.positions, &batch.segments, None);
    let h = model.embed(&batch.tokens, &batch.positions, &on)?;
    run_blocks(model, h, 0..layers, &layout, &on, None, |_, _| {})
}
