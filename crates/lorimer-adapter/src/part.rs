//! Another adapter that an adapter is made of.

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::Tensor;
use serde_json::{Map, Value};

use crate::pruning::origin::BaseIdentity;

/// Another adapter, as its file holds it, that an adapter is made of and leaves as it is: an expert of a mixture.
#[derive(Clone, Debug)]
pub struct Part {
    /// Its folder.
    pub path: PathBuf,
    /// Its `adapter_config.json`.
    pub config: Map<String, Value>,
    /// Its tensors by their full names.
    pub tensors: BTreeMap<String, Tensor>,
    /// `sha256:…` over configuration and tensors.
    pub content_id: String,
    /// The base that it was trained on, where its `lorimer.json` says so.
    pub base: Option<BaseIdentity>,
}
