//! Tensors of a base model by their Hugging Face names, out of safetensors, GGUF or memory.

mod file;
pub mod gguf;
pub mod packed;
mod raw;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use lorimer_tensor::FrozenWeight;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::files::{MAX_JSON_BYTES, is_plain_file_name, read_json};
pub use file::SafetensorsFile;
pub use raw::RawTensor;

use gguf::{Gguf, module_from_gguf, module_to_gguf, reorder_rows};
use packed::Packing;
use serde_json::Value;

/// In which type a base's projections are kept in memory. Computation is in f32 whatever it is. Weights that a safetensors checkpoint packs
/// (see [`packed`]) stay packed, and are not packed anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum LoadDtype {
    /// 4 bytes a weight; fastest.
    #[default]
    F32,
    /// 2 bytes a weight, 10 bits of mantissa.
    F16,
    /// 2 bytes a weight, 7 bits of mantissa.
    Bf16,
    /// As the file has it: 16-bit weights stay so, GGUF blocks stay quantised.
    Stored,
    /// NormalFloat-4 with double quantisation (QLoRA), 4.13 bits a weight; embedding and head as the file has them.
    Nf4,
    /// 8 bits a weight (4 where the file has Q4_0 or Q4_1), and serving multiplies in whole numbers, with activations in 16 bits.
    Int8,
}

impl LoadDtype {
    fn of(self, stored: DType) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
            Self::Stored | Self::Nf4 | Self::Int8 => stored,
        }
    }

    /// Whether a weight becomes NF4: all projections but embeddings and the head.
    fn packs(self, name: &str) -> bool {
        self == Self::Nf4 && !name.contains("embed") && !name.starts_with("lm_head.")
    }
}

enum Source {
    Safetensors { files: Vec<SafetensorsFile>, index: BTreeMap<String, usize> },
    Gguf(Box<Gguf>),
    Memory(HashMap<String, Tensor>),
}

/// A base model's tensors.
pub struct Weights {
    source: Source,
    /// What a safetensors checkpoint packs.
    packing: Option<Packing>,
    dtype: LoadDtype,
    origin: PathBuf,
}

impl Weights {
    /// A Hugging Face folder with `model.safetensors`, or `model.safetensors.index.json` and its shards.
    pub fn from_folder(folder: &Path, dtype: LoadDtype) -> Result<Self> {
        let index_path = folder.join("model.safetensors.index.json");
        let names: Vec<String> = if index_path.is_file() {
            #[derive(serde::Deserialize)]
            struct Index {
                weight_map: BTreeMap<String, String>,
            }
            let index: Index = read_json(&index_path, MAX_JSON_BYTES)?;
            let mut names: Vec<String> = index.weight_map.into_values().collect();
            names.sort();
            names.dedup();
            names
        } else {
            vec!["model.safetensors".to_string()]
        };
        let mut files = Vec::new();
        let mut index = BTreeMap::new();
        for name in names {
            if !is_plain_file_name(&name) {
                return Err(Error::invalid(
                    &index_path,
                    format!("shard name `{}` leaves the folder", name.escape_debug()),
                ));
            }
            let path = folder.join(&name);
            if !path.is_file() {
                let problem = format!("no weights found here: `{name}` is missing");
                return Err(Error::invalid(folder, problem));
            }
            let file = SafetensorsFile::open(&path)?;
            for tensor in file.names() {
                index.insert(tensor, files.len());
            }
            files.push(file);
        }
        let mut weights =
            Self { source: Source::Safetensors { files, index }, packing: None, dtype, origin: folder.to_path_buf() };
        weights.packing = weights.read_packing(folder)?;
        match &weights.packing {
            Some(packing) if matches!(dtype, LoadDtype::Nf4 | LoadDtype::Int8) => Err(Error::invalid(
                folder,
                format!("the weights are packed already, as {}; leave --dtype out", packing.method),
            )),
            _ => Ok(weights),
        }
    }

    /// What `config.json` says of packed weights.
    fn read_packing(&self, folder: &Path) -> Result<Option<Packing>> {
        let path = folder.join("config.json");
        let Source::Safetensors { index, .. } = &self.source else { return Ok(None) };
        if !path.is_file() {
            return Ok(None);
        }
        let config: Value = read_json(&path, MAX_JSON_BYTES)?;
        Packing::read(&config, &path, index.keys().map(String::as_str).collect(), &|name| self.raw(name))
    }

    /// A tensor as it lies in a safetensors file; None where there is none, or where that is not what the base is.
    ///
    /// # Errors
    ///
    /// Fails if the tensor is of a type that is not read.
    pub fn raw(&self, name: &str) -> Result<Option<RawTensor<'_, DType>>> {
        match &self.source {
            Source::Safetensors { files, index } => index.get(name).map_or(Ok(None), |&i| files[i].tensor(name)),
            _ => Ok(None),
        }
    }

    /// How weights are packed in a safetensors checkpoint: `lorimer-nf`, `bitsandbytes`, `gptq`, `awq`; None where none is.
    pub fn packing(&self) -> Option<&str> {
        self.packing.as_ref().map(|packing| packing.method.as_str())
    }

    /// A GGUF file.
    pub fn from_gguf(file: Gguf, dtype: LoadDtype) -> Self {
        let origin = file.path.clone();
        Self { source: Source::Gguf(Box::new(file)), packing: None, dtype, origin }
    }

    /// Tensors in memory (tests, tiny models): f32, or f64 throughout.
    pub fn from_memory(tensors: HashMap<String, Tensor>) -> Self {
        let source = Source::Memory(tensors);
        Self { source, packing: None, dtype: LoadDtype::Stored, origin: PathBuf::from("memory") }
    }

    /// The same tensors, kept in another way.
    pub fn kept_as(self, dtype: LoadDtype) -> Self {
        Self { dtype, ..self }
    }

    /// The files that the tensors come from.
    pub fn origin(&self) -> &Path {
        &self.origin
    }

    /// The safetensors shards, where that is what the base is and none of its weights is packed.
    pub fn shards(&self) -> Option<&[SafetensorsFile]> {
        match &self.source {
            Source::Safetensors { files, .. } if self.packing.is_none() => Some(files),
            _ => None,
        }
    }

    /// The GGUF file, where that is what the base is.
    pub fn gguf(&self) -> Option<&Gguf> {
        match &self.source {
            Source::Gguf(file) => Some(file),
            _ => None,
        }
    }

    /// How weights are kept.
    pub fn load_dtype(&self) -> LoadDtype {
        self.dtype
    }

    /// Bytes of the files.
    pub fn file_bytes(&self) -> u64 {
        match &self.source {
            Source::Safetensors { files, .. } => files.iter().map(|f| f.bytes.len() as u64).sum(),
            Source::Gguf(file) => file.file_bytes(),
            Source::Memory(_) => 0,
        }
    }

    /// The type that activations are computed in.
    pub fn compute_dtype(&self) -> DType {
        match &self.source {
            Source::Memory(tensors) if tensors.values().any(|t| t.dtype() == DType::F64) => DType::F64,
            _ => DType::F32,
        }
    }

    /// Whether a tensor is there, by its Hugging Face name.
    pub fn has(&self, name: &str) -> bool {
        match &self.source {
            Source::Safetensors { index, .. } => {
                self.packed_shape(name).is_some() || (index.contains_key(name) && !self.is_part(name))
            }
            Source::Gguf(file) => gguf_name(file, name).is_some_and(|n| file.content.tensor_infos.contains_key(&n)),
            Source::Memory(tensors) => tensors.contains_key(name),
        }
    }

    /// Hugging Face names of all tensors, in order; names that the family does not know stay as they are.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = match &self.source {
            Source::Safetensors { index, .. } => {
                let packed = self.packing.iter().flat_map(Packing::names);
                let plain = index.keys().map(String::as_str).filter(|name| !self.is_part(name));
                packed.chain(plain).map(str::to_string).collect::<BTreeSet<_>>().into_iter().collect()
            }
            Source::Memory(tensors) => tensors.keys().cloned().collect(),
            Source::Gguf(file) => {
                let hf = |name: &String| {
                    let (module, kind) = name.rsplit_once('.')?;
                    Some(format!("{}.{kind}", module_from_gguf(file.architecture(), module)?))
                };
                file.content.tensor_infos.keys().map(|n| hf(n).unwrap_or_else(|| n.clone())).collect()
            }
        };
        names.sort();
        names
    }

    /// A frozen weight of the given shape, kept as [`LoadDtype`] says.
    pub fn weight(&self, name: &str, shape: (usize, usize)) -> Result<FrozenWeight> {
        let weight = self.weight_unpacked(name, shape)?;
        if self.packed_shape(name).is_some() {
            return Ok(weight);
        }
        Ok(match self.dtype {
            LoadDtype::Int8 => weight.to_panels()?,
            dtype if dtype.packs(name) => weight.to_nf4()?,
            _ => weight,
        })
    }

    /// A table that is read by rows: never packed, in the compute type.
    pub fn table(&self, name: &str, shape: (usize, usize)) -> Result<FrozenWeight> {
        let weight = self.weight_unpacked(name, shape)?;
        Ok(FrozenWeight::Dense(weight.dense(self.compute_dtype())?))
    }

    /// Bytes that [`Self::weight`] would take in memory under `dtype`, found without reading it.
    pub fn weight_bytes(&self, name: &str, shape: (usize, usize), dtype: LoadDtype) -> Result<usize> {
        let (outputs, inputs) = shape;
        self.check(name, &[outputs, inputs])?;
        if let Some(bytes) = self.packing.as_ref().and_then(|packing| packing.bytes(name)) {
            return Ok(bytes);
        }
        if dtype.packs(name) {
            return Ok(lorimer_tensor::storage::nf4::bytes(shape));
        }
        if dtype == LoadDtype::Int8 {
            let four_bits = match &self.source {
                Source::Gguf(file) => file.tensor(&gguf_name(file, name).unwrap_or_default())?.map(|(kind, ..)| kind),
                _ => None,
            };
            let four_bits = matches!(four_bits, Some(GgmlDType::Q4_0 | GgmlDType::Q4_1));
            return Ok(lorimer_tensor::storage::panels::bytes(shape, four_bits));
        }
        let of = |stored: DType| outputs * inputs * dtype.of(stored).size_in_bytes();
        let stored = match &self.source {
            Source::Gguf(file) => match file.tensor(&gguf_name(file, name).unwrap_or_default())? {
                Some((GgmlDType::F32, ..)) => DType::F32,
                Some((GgmlDType::F16, ..)) => DType::F16,
                Some((GgmlDType::BF16, ..)) => DType::BF16,
                Some((_, _, bytes)) if matches!(dtype, LoadDtype::Stored | LoadDtype::Nf4) => return Ok(bytes.len()),
                _ => DType::F32,
            },
            Source::Safetensors { files, index } => match index.get(name).and_then(|&i| files[i].metadata.info(name)) {
                Some(info) if info.dtype == safetensors::Dtype::F64 => return Ok(outputs * inputs * 8),
                Some(info) if info.dtype == safetensors::Dtype::F16 => DType::F16,
                Some(info) if info.dtype == safetensors::Dtype::BF16 => DType::BF16,
                _ => DType::F32,
            },
            Source::Memory(tensors) => tensors.get(name).map_or(DType::F32, Tensor::dtype),
        };
        Ok(of(stored))
    }

    fn packed_shape(&self, name: &str) -> Option<(usize, usize)> {
        self.packing.as_ref()?.shape(name)
    }

    fn is_part(&self, name: &str) -> bool {
        self.packing.as_ref().is_some_and(|packing| packing.is_part(name))
    }

    fn weight_unpacked(&self, name: &str, shape: (usize, usize)) -> Result<FrozenWeight> {
        let (outputs, inputs) = shape;
        self.check(name, &[outputs, inputs])?;
        let path = self.origin.join("config.json");
        if let Some(packing) = &self.packing
            && let Some(weight) = packing.load(name, &path, &|name| self.raw(name))?
        {
            return Ok(weight);
        }
        match &self.source {
            Source::Gguf(file) => {
                let stored = gguf_name(file, name).unwrap_or_default();
                let Some((dtype, _, bytes)) = file.tensor(&stored)? else { return Err(self.missing(name)) };
                let order = file.row_order(&stored)?;
                if order.as_ref().is_some_and(|o| o.len() != outputs) {
                    return Err(self.wrong_shape(name, &[outputs, inputs], &[outputs, inputs]));
                }
                let bytes = reorder_rows(bytes, order.as_deref());
                let plain = match dtype {
                    GgmlDType::F32 => Some(DType::F32),
                    GgmlDType::F16 => Some(DType::F16),
                    GgmlDType::BF16 => Some(DType::BF16),
                    _ => None,
                };
                if let Some(stored) = plain {
                    let t = Tensor::from_raw_buffer(&bytes, stored, &[outputs, inputs], &Device::Cpu)?;
                    return Ok(FrozenWeight::Dense(t.to_dtype(self.dtype.of(stored))?));
                }
                let blocks = FrozenWeight::from_ggml(dtype, &bytes, shape)?;
                Ok(match self.dtype {
                    LoadDtype::Stored | LoadDtype::Int8 => blocks,
                    // What is packed anew is expanded first.
                    LoadDtype::Nf4 if !self.dtype.packs(name) => blocks,
                    other => FrozenWeight::Dense(blocks.dense(other.of(DType::F32))?),
                })
            }
            _ => {
                let t = self.load(name)?;
                let dtype = if t.dtype() == DType::F64 { DType::F64 } else { self.dtype.of(t.dtype()) };
                Ok(FrozenWeight::Dense(t.to_dtype(dtype)?))
            }
        }
    }

    /// A vector (norm, bias) in the compute type.
    pub fn vector(&self, name: &str, length: usize) -> Result<Tensor> {
        self.check(name, &[length])?;
        match &self.source {
            Source::Gguf(file) => {
                let stored = gguf_name(file, name).unwrap_or_default();
                let Some((dtype, _, bytes)) = file.tensor(&stored)? else { return Err(self.missing(name)) };
                let t = candle_core::quantized::ggml_file::qtensor_from_ggml(dtype, bytes, vec![length], &Device::Cpu)?
                    .dequantize(&Device::Cpu)?;
                let t = (t - file.offset(&stored))?;
                match file.row_order(&stored)? {
                    Some(order) if order.len() == length => {
                        let order: Vec<u32> = order.into_iter().map(|i| i as u32).collect();
                        Ok(t.index_select(&Tensor::from_vec(order, length, &Device::Cpu)?, 0)?)
                    }
                    _ => Ok(t),
                }
            }
            _ => Ok(self.load(name)?.to_dtype(self.compute_dtype())?),
        }
    }

    fn load(&self, name: &str) -> Result<Tensor> {
        let found = match &self.source {
            Source::Safetensors { files, index } => match index.get(name) {
                Some(&i) => files[i].load(name)?,
                None => None,
            },
            Source::Memory(tensors) => tensors.get(name).cloned(),
            Source::Gguf(_) => None,
        };
        let found = found.ok_or_else(|| self.missing(name))?;
        match found.dtype().is_float() {
            true => Ok(found),
            false => {
                Err(Error::invalid(&self.origin, format!("tensor `{name}` holds integers where weights are expected")))
            }
        }
    }

    /// Shape of a tensor, without reading it.
    pub fn shape(&self, name: &str) -> Result<Option<Vec<usize>>> {
        if let Some((outputs, inputs)) = self.packed_shape(name) {
            return Ok(Some(vec![outputs, inputs]));
        }
        Ok(match &self.source {
            Source::Safetensors { files, index } => {
                index.get(name).and_then(|&i| files[i].metadata.info(name)).map(|info| info.shape.clone())
            }
            Source::Gguf(file) => match gguf_name(file, name) {
                Some(stored) => file.tensor(&stored)?.map(|(_, dims, _)| dims),
                None => None,
            },
            Source::Memory(tensors) => tensors.get(name).map(|t| t.dims().to_vec()),
        })
    }

    fn check(&self, name: &str, expected: &[usize]) -> Result<()> {
        match self.shape(name)? {
            None => Err(self.missing(name)),
            Some(found) if found == expected => Ok(()),
            Some(found) => Err(self.wrong_shape(name, expected, &found)),
        }
    }

    fn missing(&self, name: &str) -> Error {
        Error::invalid(&self.origin, format!("the base model's tensor `{name}` is missing"))
    }

    fn wrong_shape(&self, name: &str, expected: &[usize], found: &[usize]) -> Error {
        Error::invalid(
            &self.origin,
            format!("tensor `{name}` has shape {found:?}, the configuration says {expected:?}"),
        )
    }

    /// Identity of the weights: a hash over every tensor's name, type, shape and first and last 2 KiB.
    pub fn fingerprint(&self) -> Result<String> {
        let mut hash = Sha256::new();
        let mut feed = |name: &str, kind: &str, shape: &[usize], bytes: &[u8]| {
            hash.update(name.as_bytes());
            hash.update(format!("|{kind}|{shape:?}|").as_bytes());
            hash.update(&bytes[..bytes.len().min(2048)]);
            hash.update(&bytes[bytes.len().saturating_sub(2048)..]);
        };
        match &self.source {
            Source::Safetensors { files, index } => {
                for (name, &i) in index {
                    if let Some(info) = files[i].metadata.info(name) {
                        let start = files[i].data_start;
                        let bytes = files[i].bytes.get(start + info.data_offsets.0..start + info.data_offsets.1);
                        feed(name, &format!("{:?}", info.dtype), &info.shape, bytes.unwrap_or_default());
                    }
                }
            }
            Source::Gguf(file) => {
                let names: std::collections::BTreeSet<_> = file.content.tensor_infos.keys().collect();
                for name in names {
                    if let Some((dtype, dims, bytes)) = file.tensor(name)? {
                        feed(name, &format!("{dtype:?}"), &dims, bytes);
                    }
                }
            }
            Source::Memory(tensors) => {
                let names: std::collections::BTreeSet<_> = tensors.keys().collect();
                for name in names {
                    let t = &tensors[name];
                    let values = t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
                    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                    feed(name, t.dtype().as_str(), t.dims(), &bytes);
                }
            }
        }
        Ok(format!("sha256:{}", hex(&hash.finalize())))
    }
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// `model.layers.3.self_attn.q_proj.weight` → `blk.3.attn_q.weight`.
fn gguf_name(file: &Gguf, name: &str) -> Option<String> {
    let (module, kind) = name.rsplit_once('.')?;
    Some(format!("{}.{kind}", module_to_gguf(file.architecture(), module)?))
}
