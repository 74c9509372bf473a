//! A base in memory.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Result, bail};
use lorimer::adapter::{Adapter as Loaded, Attached, StoredAdapter};
use lorimer::model::pull::{PullOptions, pull};
use lorimer::model::{Base as Model, LoadDtype, OpenOptions};
use lorimer::serve::{Sampling, generate};
use lorimer::train::{EncodeOptions, evaluate, find_choices};
use lorimer_cli::common;
use lorimer_cli::host::{self, Host};
use pyo3::prelude::*;
use serde_json::{Value, json};

use crate::adapter::Adapter;
use crate::background::{self, Context};
use crate::problem::{Error, Interrupted, raised};
use crate::values::to_python;

/// An adapter and its weight.
type Weighted = (Py<Adapter>, f64);

/// A base model in memory, for training, evaluation, generation and engines.
///
/// `model`: an alias (`smollm2-135m`), a Hugging Face hub id, a folder or a `.gguf` file; it is fetched where it is not there. `dtype`: `f32`, `f16`, `bf16`,
/// `stored`, `nf4` or `int8`, in which weights are kept. `tokenizer`: a `tokenizer.json` in the place of the model's own.
#[pyclass(frozen, subclass, module = "lorimer")]
pub struct Base {
    pub(crate) model: Arc<Model>,
    kept: LoadDtype,
    /// As it was asked for.
    asked: String,
    dtype: String,
    tokenizer: Option<PathBuf>,
    name: String,
}

/// Adapters that are read, to be put on a base.
pub fn stored(adapters: &[Weighted]) -> Vec<(Arc<StoredAdapter>, f64)> {
    adapters.iter().map(|(adapter, weight)| (adapter.get().stored.clone(), *weight)).collect()
}

fn attach(base: &Model, adapters: &[(Arc<StoredAdapter>, f64)]) -> Result<Vec<(Loaded, f64)>> {
    adapters.iter().map(|(stored, weight)| Ok((common::attach(base, stored)?, *weight))).collect()
}

/// Runs a subcommand, on a base that is loaded where there is one.
pub fn run(
    py: Python<'_>,
    base: Option<(Arc<Model>, LoadDtype)>,
    arguments: Vec<String>,
    listener: Option<Py<PyAny>>,
) -> PyResult<Py<PyAny>> {
    let result = background::run(py, listener, move |context: Context| {
        let host = Host { stop: context.stop.clone(), base, tell: Box::new(context.teller()) };
        let all = std::iter::once("lorimer".to_string()).chain(arguments).map(Into::into).collect();
        let (result, printed) = host::with(host, || lorimer::program::call(all));
        Ok((result?, printed, context.stop.load(Ordering::Relaxed)))
    })?;
    match result {
        (true, Some(printed), _) => to_python(py, &printed),
        (true, None, _) => Ok(py.None()),
        (false, Some(printed), _) => {
            let error = Error::new_err("the result is not what was asked for; `result` has it");
            error.value(py).setattr("result", to_python(py, &printed)?)?;
            Err(error)
        }
        (false, None, _) => Err(Interrupted::new_err("interrupted; the same call with resume=True goes on from there")),
    }
}

#[pymethods]
impl Base {
    #[new]
    #[pyo3(signature = (model=PathBuf::from("smollm2-135m"), *, dtype="f32".to_string(), tokenizer=None))]
    fn new(py: Python<'_>, model: PathBuf, dtype: String, tokenizer: Option<PathBuf>) -> PyResult<Self> {
        let Some(asked) = model.to_str().map(str::to_string) else {
            return Err(Error::new_err("the model's name is not UTF-8 text"));
        };
        let (wanted, kind, own) = (asked.clone(), dtype.clone(), tokenizer.clone());
        let (model, kept, name) = background::run(py, None, move |_| {
            let dtype = common::dtype_of(&kind)?;
            let pulled = pull(&wanted, PullOptions::default())?;
            let base = Model::open(&pulled.path, &OpenOptions { dtype, tokenizer: own })?;
            Ok((Arc::new(base), dtype, pulled.name))
        })?;
        Ok(Self { model, kept, asked, dtype, tokenizer, name })
    }

    /// Hub id or path, as an adapter's configuration names it.
    #[getter]
    fn name(&self) -> &str {
        &self.name
    }

    /// The folder or file that it was read from.
    #[getter]
    fn path(&self) -> &Path {
        &self.model.path
    }

    /// In which type its weights are kept.
    #[getter]
    fn dtype(&self) -> &str {
        &self.dtype
    }

    /// Identity of the weights.
    #[getter]
    fn fingerprint(&self) -> &str {
        &self.model.fingerprint
    }

    /// Tokens of the vocabulary.
    #[getter]
    fn vocabulary(&self) -> usize {
        self.model.text.vocabulary()
    }

    /// Token ids of a text; `special` adds what the tokenizer puts around it and reads special tokens.
    #[pyo3(signature = (text, *, special=true))]
    fn encode(&self, text: &str, special: bool) -> PyResult<Vec<u32>> {
        self.model.text.encode(text, special).map(|e| e.ids).map_err(raised)
    }

    /// The text of token ids.
    #[pyo3(signature = (tokens, *, special=false))]
    fn decode(&self, tokens: Vec<u32>, special: bool) -> PyResult<String> {
        self.model.text.decode(&tokens, special).map_err(raised)
    }

    /// The token ids of a conversation (`[{"role": …, "content": …}]`) by the base's chat template.
    fn chat(&self, py: Python<'_>, messages: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
        let text: String = py.import("json")?.call_method1("dumps", (messages,))?.extract()?;
        let messages: Vec<Value> = serde_json::from_str(&text).map_err(raised)?;
        let text = self.model.text.needed_template().and_then(|t| t.render(&messages, None, true)).map_err(raised)?;
        self.encode(&text, false)
    }

    /// Runs a subcommand on this base.
    #[pyo3(signature = (subcommand, arguments, listener=None))]
    fn _run(
        &self,
        py: Python<'_>,
        subcommand: String,
        arguments: Vec<String>,
        listener: Option<Py<PyAny>>,
    ) -> PyResult<Py<PyAny>> {
        let mut all: Vec<String> = subcommand.split_whitespace().map(str::to_string).collect();
        all.extend([format!("--model={}", self.asked), format!("--dtype={}", self.dtype)]);
        all.extend(self.tokenizer.iter().map(|path| format!("--tokenizer={}", path.display())));
        all.extend(arguments);
        run(py, Some((self.model.clone(), self.kept)), all, listener)
    }

    #[pyo3(signature = (data, adapters, options, listener=None))]
    fn _evaluate(
        &self,
        py: Python<'_>,
        data: PathBuf,
        adapters: Vec<Weighted>,
        options: &str,
        listener: Option<Py<PyAny>>,
    ) -> PyResult<Py<PyAny>> {
        let (base, adapters) = (self.model.clone(), stored(&adapters));
        let options: Value = serde_json::from_str(options).map_err(raised)?;
        let value = background::run(py, listener, move |context| {
            let encode = EncodeOptions {
                format: options["format"].as_str().map(|f| f.parse()).transpose().map_err(anyhow::Error::msg)?,
                max_length: options["max_length"].as_u64().unwrap_or(1024) as usize,
                skip_bad_rows: options["skip_bad_rows"].as_bool().unwrap_or(false),
                limit: options["limit"].as_u64().map(|n| n as usize),
                ..Default::default()
            };
            base.config.decoder("`evaluate`")?;
            let (rows, _) = common::load_data(&data, &base.text, &encode)?;
            let given: Vec<String> = serde_json::from_value(options["choices"].clone()).unwrap_or_default();
            let choices = if given.is_empty() { find_choices(&rows) } else { given };
            let attached = attach(&base, &adapters)?;
            let total = rows.len();
            let tell = |done: usize| context.tell(json!({ "kind": "row", "step": done, "total": total }));
            let e = evaluate(base.model(), &base.text, &common::attached(&attached)?, &rows, &choices, tell)?;
            Ok(serde_json::to_value(&e)?)
        })?;
        to_python(py, &value)
    }

    #[pyo3(signature = (prompt, adapters, max_tokens, sampling, seed, stop, listener=None))]
    #[allow(clippy::too_many_arguments)]
    fn _generate(
        &self,
        py: Python<'_>,
        prompt: Vec<u32>,
        adapters: Vec<Weighted>,
        max_tokens: usize,
        sampling: &str,
        seed: u64,
        stop: Vec<String>,
        listener: Option<Py<PyAny>>,
    ) -> PyResult<Py<PyAny>> {
        let (base, adapters, sampling) = (self.model.clone(), stored(&adapters), sampling_of(sampling)?);
        let value = background::run(py, listener, move |context| {
            base.config.decoder("`generate`")?;
            if let Some(&token) = prompt.iter().find(|&&token| token as usize >= base.model().shape().vocabulary) {
                bail!("token {token} is beyond the vocabulary of {}", base.model().shape().vocabulary);
            }
            let attached = attach(&base, &adapters)?;
            let attached: Attached<'_> = common::attached(&attached)?;
            let heard = |piece: &str| context.tell(json!(piece));
            let g = generate(base.model(), &base.text, &attached, &prompt, max_tokens, &sampling, seed, &stop, heard)?;
            Ok(serde_json::to_value(&g)?)
        })?;
        to_python(py, &value)
    }

    fn __repr__(&self) -> String {
        format!("<lorimer.Base {} in {}>", self.name, self.dtype)
    }
}

/// Sampling settings out of JSON.
pub fn sampling_of(text: &str) -> PyResult<Sampling> {
    let mut all = serde_json::to_value(Sampling::default()).map_err(raised)?;
    let given: Value = serde_json::from_str(text).map_err(raised)?;
    for (key, value) in given.as_object().into_iter().flatten() {
        all[key] = value.clone();
    }
    let sampling: Sampling = serde_json::from_value(all).map_err(|e| Error::new_err(format!("sampling: {e}")))?;
    sampling.check().map_err(Error::new_err)?;
    Ok(sampling)
}
