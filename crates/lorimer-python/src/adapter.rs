//! An adapter in memory.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lorimer::adapter::StoredAdapter;
use lorimer::adapter::file::inspect::inspect;
use lorimer::adapter::file::store::CONFIG_FILE;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use serde_json::Value;

use crate::problem::{Error, raised};
use crate::values::to_python;

/// An adapter in memory: its configuration (PEFT's `adapter_config.json`) and its tensors.
///
/// Read from a folder that PEFT or Lorimer wrote (`Adapter.load`), made from arrays (`Adapter.from_tensors`) or from a PEFT model
/// (`Adapter.from_peft`). It does not change.
#[pyclass(frozen, module = "lorimer")]
pub struct Adapter {
    pub(crate) stored: Arc<StoredAdapter>,
}

impl Adapter {
    fn new(stored: StoredAdapter) -> Self {
        Self { stored: Arc::new(stored) }
    }
}

#[pymethods]
impl Adapter {
    /// Reads an adapter folder.
    #[staticmethod]
    fn load(py: Python<'_>, folder: PathBuf) -> PyResult<Self> {
        py.detach(|| StoredAdapter::read(&folder)).map(Self::new).map_err(raised)
    }

    /// An adapter out of the bytes of a safetensors file and its configuration, PEFT's as a dict.
    #[staticmethod]
    fn from_safetensors(py: Python<'_>, data: &[u8], config: &Bound<'_, PyAny>) -> PyResult<Self> {
        let text: String = py.import("json")?.call_method1("dumps", (config,))?.extract()?;
        let config: Value = serde_json::from_str(&text).map_err(raised)?;
        let Value::Object(config) = config else {
            return Err(Error::new_err("the configuration should be a dict, as PEFT's adapter_config.json holds it"));
        };
        py.detach(|| StoredAdapter::from_bytes(config, data.to_vec())).map(Self::new).map_err(raised)
    }

    /// An adapter out of arrays by their full names (`base_model.model.….lora_A.weight`) and its configuration.
    #[staticmethod]
    fn from_tensors(py: Python<'_>, tensors: Py<PyAny>, config: &Bound<'_, PyAny>) -> PyResult<Self> {
        let data = py.import("lorimer._tensors")?.call_method1("encode", (tensors,))?;
        Self::from_safetensors(py, data.extract()?, config)
    }

    /// The adapter of a PEFT model, without a file in between.
    #[staticmethod]
    #[pyo3(signature = (model, adapter_name="default"))]
    fn from_peft(py: Python<'_>, model: Py<PyAny>, adapter_name: &str) -> PyResult<Self> {
        let parts = py.import("lorimer._peft")?.call_method1("parts", (model, adapter_name))?;
        let (tensors, config): (Py<PyAny>, Bound<'_, PyAny>) = parts.extract()?;
        Self::from_tensors(py, tensors, &config)
    }

    /// Puts the adapter on a transformers or PEFT model and gives the PEFT model, without a file in between.
    #[pyo3(signature = (model, adapter_name="default"))]
    fn to_peft(slf: Py<Self>, py: Python<'_>, model: Py<PyAny>, adapter_name: &str) -> PyResult<Py<PyAny>> {
        Ok(py.import("lorimer._peft")?.call_method1("attach", (slf, model, adapter_name))?.unbind())
    }

    /// PEFT's configuration.
    #[getter]
    fn config(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        to_python(py, &Value::Object(self.stored.config.clone()))
    }

    /// `sha256:…` over configuration and tensors.
    #[getter]
    fn id(&self, py: Python<'_>) -> PyResult<String> {
        py.detach(|| self.stored.content_id()).map_err(raised)
    }

    /// The folder that it was read from, if it was.
    #[getter]
    fn path(&self) -> Option<&Path> {
        Some(self.stored.path.as_path()).filter(|path| !path.as_os_str().is_empty())
    }

    /// The tensors as the bytes of a safetensors file.
    fn safetensors<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = py.detach(|| self.stored.tensor_bytes()).map_err(raised)?;
        Ok(PyBytes::new(py, &bytes))
    }

    /// The tensors as NumPy arrays by their full names.
    fn tensors<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        py.import("lorimer._tensors")?.call_method1("decode", (self.safetensors(py)?,))
    }

    /// Writes the folder that PEFT and Lorimer read. Refuses one that holds an adapter, unless `overwrite`.
    #[pyo3(signature = (folder, *, overwrite=false))]
    fn save(&self, py: Python<'_>, folder: PathBuf, overwrite: bool) -> PyResult<()> {
        if folder.join(CONFIG_FILE).exists() && !overwrite {
            let shown = folder.display();
            return Err(Error::new_err(format!(
                "`{shown}` holds an adapter; pass overwrite=True or choose another folder"
            )));
        }
        py.detach(|| self.stored.write(&folder, None)).map_err(raised)
    }

    /// What is in it: method, rank, and the norm and effective rank of each module's change.
    fn inspect(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let report = py.detach(|| inspect(&self.stored)).map_err(raised)?;
        to_python(py, &serde_json::to_value(report).map_err(raised)?)
    }

    fn __repr__(&self) -> String {
        let kind = self.stored.config.get("peft_type").and_then(Value::as_str).unwrap_or("adapter");
        format!("<lorimer.Adapter {kind}, {} tensors>", self.stored.tensors.len())
    }
}
