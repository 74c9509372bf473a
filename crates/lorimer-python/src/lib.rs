//! The Python package `lorimer`: the subcommands, and objects for what is used more than once (a base, an adapter, an engine).
//!
//! What computes runs on a thread of its own, without Python's lock; the thread that called listens to its progress and to Ctrl-C. Numbers go over as the
//! bytes of safetensors files, which Python reads without copying them.

mod adapter;
mod background;
mod base;
mod engine;
mod log;
mod problem;
mod values;

use pyo3::prelude::*;

use problem::{Error, Interrupted, raised};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Runs a subcommand with the flags of a command line and gives what `--json` would print.
#[pyfunction]
#[pyo3(signature = (arguments, listener=None))]
fn run(py: Python<'_>, arguments: Vec<String>, listener: Option<Py<PyAny>>) -> PyResult<Py<PyAny>> {
    base::run(py, None, arguments, listener)
}

/// `key=value` settings as the flags of a subcommand: what a configuration file's lines are.
#[pyfunction]
fn flags(settings: &str) -> PyResult<Vec<String>> {
    let settings = serde_json::from_str(settings).map_err(raised)?;
    let flags = lorimer_cli::common::flags_of(&settings, "the settings").map_err(raised)?;
    Ok(flags.into_iter().map(|flag| flag.to_string_lossy().into_owned()).collect())
}

#[pymodule]
fn _lorimer(m: &Bound<'_, PyModule>) -> PyResult<()> {
    lorimer::tensor::memory::keep_freed_pages();
    log::start();
    lorimer::tensor::kernels::cpu::check().map_err(Error::new_err)?;
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    m.add("Error", m.py().get_type::<Error>())?;
    m.add("Interrupted", m.py().get_type::<Interrupted>())?;
    m.add_class::<adapter::Adapter>()?;
    m.add_class::<base::Base>()?;
    m.add_class::<engine::Engine>()?;
    m.add_function(wrap_pyfunction!(run, m)?)?;
    m.add_function(wrap_pyfunction!(flags, m)?)
}
