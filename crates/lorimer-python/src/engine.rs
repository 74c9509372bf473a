//! Many prompts at once.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use lorimer::model::Base as Model;
use lorimer::serve::answers::{Asked, answer_all};
use lorimer::serve::engine::scheduler::Tenant;
use lorimer::serve::{EngineSettings, Hosted, Request, TextOptions, Worker};
use lorimer_cli::common;
use lorimer_cli::flags::parse_bytes;
use pyo3::prelude::*;
use serde_json::json;

use crate::adapter::Adapter;
use crate::background;
use crate::base::{Base, sampling_of};
use crate::problem::{Error, raised};
use crate::values::to_python;

/// An engine that answers many prompts at once, each with its own adapters, in one batch.
///
/// `memory`: bytes of the pool of keys, values and adapters, as a text (`512MB`, `2GiB`).
#[pyclass(frozen, subclass, module = "lorimer")]
pub struct Engine {
    base: Arc<Model>,
    worker: Worker,
    adapters: Mutex<BTreeMap<String, Arc<Hosted>>>,
}

/// A request of [`Engine::_generate`]: token ids, adapters by name with their weights, most tokens, sampling in JSON, seed, stop texts.
type Wanted = (Vec<u32>, Vec<(String, f32)>, Option<usize>, String, u64, Vec<String>);

impl Engine {
    fn wanted(&self, (prompt, named, max_tokens, sampling, seed, stop): Wanted) -> PyResult<Asked> {
        let known = self.adapters.lock().unwrap_or_else(PoisonError::into_inner);
        let find = |(name, weight): (String, f32)| match known.get(&name) {
            Some(hosted) => Ok((hosted.clone(), weight)),
            None => {
                let names: Vec<&str> = known.keys().map(String::as_str).collect();
                let there = if names.is_empty() { "none".into() } else { names.join(", ") };
                Err(Error::new_err(format!("no adapter `{name}` in this engine; it has {there}")))
            }
        };
        let names = named.iter().map(|(name, _)| name.clone()).collect();
        let request = Request {
            prompt,
            adapters: named.into_iter().map(find).collect::<PyResult<_>>()?,
            max_tokens,
            sampling: sampling_of(&sampling)?,
            seed,
            stop: self.base.text.eos_ids.clone(),
            log_probabilities: None,
            of_prompt: false,
            tenant: Tenant::default(),
            names,
            form: None,
        };
        Ok(Asked { request, options: TextOptions { stop, ..Default::default() } })
    }
}

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (base, *, memory="1GiB"))]
    fn new(py: Python<'_>, base: &Base, memory: &str) -> PyResult<Self> {
        let settings =
            EngineSettings { pool_bytes: parse_bytes(memory).map_err(Error::new_err)? as usize, ..Default::default() };
        let model = base.model.clone();
        let worker = py.detach(|| -> anyhow::Result<Worker> {
            model.config.decoder("an engine")?;
            Ok(Worker::start(model.clone(), settings)?)
        });
        Ok(Self { base: base.model.clone(), worker: worker.map_err(raised)?, adapters: Mutex::default() })
    }

    /// Puts an adapter into the engine, in the place of one of the same name.
    fn add(&self, py: Python<'_>, name: String, adapter: &Adapter) -> PyResult<()> {
        let (base, stored) = (self.base.clone(), adapter.stored.clone());
        let hosted = background::run(py, None, move |_| {
            let loaded = common::attach(&base, &stored)?;
            Hosted::new(base.model(), &loaded, stored.content_id()?, None).context("cannot be served")
        })?;
        self.adapters.lock().unwrap_or_else(PoisonError::into_inner).insert(name, Arc::new(hosted));
        Ok(())
    }

    /// Takes an adapter out. Whether there was one of the name.
    fn remove(&self, name: &str) -> bool {
        self.adapters.lock().unwrap_or_else(PoisonError::into_inner).remove(name).is_some()
    }

    /// Names of the adapters.
    #[getter]
    fn adapters(&self) -> Vec<String> {
        self.adapters.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    /// What the engine has done and holds.
    fn figures(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        to_python(py, &serde_json::to_value(self.worker.figures()).map_err(raised)?)
    }

    #[pyo3(signature = (requests, listener=None))]
    fn _generate(&self, py: Python<'_>, requests: Vec<Wanted>, listener: Option<Py<PyAny>>) -> PyResult<Py<PyAny>> {
        let asked = requests.into_iter().map(|wanted| self.wanted(wanted)).collect::<PyResult<Vec<_>>>()?;
        let (base, worker) = (self.base.clone(), self.worker.clone());
        let answers = background::run(py, listener, move |context| {
            let (total, mut done) = (asked.len(), 0);
            let mut tell = context.teller();
            let answers = answer_all(&worker, &base.text, asked, &context.stop, |at, answer| {
                done += 1;
                tell(json!({ "kind": "answer", "step": done, "total": total, "index": at, "text": answer.text }));
            })?;
            Ok(serde_json::to_value(answers.context("interrupted")?)?)
        })?;
        to_python(py, &answers)
    }

    fn __repr__(&self) -> String {
        let count = self.adapters.lock().unwrap_or_else(PoisonError::into_inner).len();
        format!("<lorimer.Engine of {count} adapters>")
    }
}
