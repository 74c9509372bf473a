//! Reading the goldens, and the tiny models that they were made with.
#![allow(dead_code)]

use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use lorimer_model::weights::SafetensorsFile;
use lorimer_model::{Adaptation, BaseModel, Batch, Decoder, LoadDtype};
use serde_json::Value;

pub fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens").join(name)
}

pub fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

pub struct Golden(pub SafetensorsFile);

impl Golden {
    pub fn open(name: &str) -> Self {
        Self(SafetensorsFile::open(&folder(name).join("golden.safetensors")).unwrap())
    }
    pub fn get(&self, name: &str) -> Tensor {
        self.0.load(name).unwrap().unwrap_or_else(|| panic!("golden `{name}`"))
    }
    /// Token rows (sequences, length).
    pub fn tokens(&self) -> Vec<Vec<u32>> {
        let t = self.get("tokens").to_dtype(DType::U32).unwrap();
        if t.dims().len() == 1 { vec![t.to_vec1().unwrap()] } else { t.to_vec2().unwrap() }
    }
}

pub fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let d = (a.to_dtype(DType::F64).unwrap() - b.to_dtype(DType::F64).unwrap()).unwrap();
    d.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f64>().unwrap()
}

pub fn tiny(name: &str) -> Decoder {
    let (config, weights) = lorimer_model::base::open_weights(&folder(name), LoadDtype::F32).unwrap();
    Decoder::load(config.decoder("a test").unwrap().clone(), &weights).unwrap()
}

pub fn logits(model: &dyn BaseModel, adaptation: &dyn Adaptation, rows: &[Vec<u32>]) -> Tensor {
    let hidden = model.hidden(&Batch::pack(rows.iter().map(Vec::as_slice)), adaptation).unwrap();
    model.logits(&hidden, adaptation).unwrap()
}
