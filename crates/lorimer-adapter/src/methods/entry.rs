//! What a line of the registry says of a method.

use std::sync::Arc;

use serde_json::{Map, Value};

use crate::error::Result;
use crate::method::Method;
use crate::training::search::Search;
use crate::training::{ObjectiveKind, OptimizerKind};

/// How a method is served beside others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Served {
    /// In one batch with other adapters.
    Batched,
    /// Converted to a low-rank form at load.
    Converted,
    /// Not at all.
    Refused,
}

/// Makes a method out of a configuration.
pub type Build = fn(&Map<String, Value>) -> Result<Box<dyn Method>>;

/// Makes a part of training out of its settings.
pub type Made<T> = fn(&Map<String, Value>) -> Result<Arc<T>>;

/// A part of training that a method's file brings, to be named apart from the method.
#[derive(Clone, Copy)]
pub enum Part {
    /// What `--optimizer` takes.
    Optimizer(Made<dyn OptimizerKind>),
    /// What `--objective` takes.
    Objective(Made<dyn ObjectiveKind>),
    /// What runs before the adapter is attached ([`crate::Calibration::Search`]).
    Search(Search),
}

/// One line of the registry.
pub struct Entry {
    /// What `--method` takes.
    pub name: &'static str,
    /// In words.
    pub title: &'static str,
    /// Where it was published.
    pub paper: &'static str,
    /// `projection`, `block`, `start`, `optimizer`, `control` or `objective`.
    pub kind: &'static str,
    /// Values of `--set variant=…`.
    pub variants: &'static [&'static str],
    /// `peft_type` in `adapter_config.json`.
    pub peft_type: &'static str,
    /// Whether a plain weight gives the same output.
    pub mergeable: bool,
    /// How it is served.
    pub served: Served,
    /// Learning rate that `train` takes unless told otherwise; settings may want another: [`super::learning_rate`].
    pub lr: f64,
    /// Parts of training by the name that the command line takes.
    pub parts: &'static [(&'static str, Part)],
    /// The command line's flags that the method has, each with the setting it stands for.
    pub flags: &'static [(&'static str, &'static str)],
    /// Its source, whose header is its page in `docs/`.
    pub source: &'static str,
    /// Settings that the laws are held against, each with how far the start may be from the base (infinite where a start is
    /// meant to be elsewhere).
    pub laws: &'static [(&'static str, f64)],
    /// Builds the method from settings with PEFT's keys; unknown keys are errors.
    pub build: Build,
    /// Whether an `adapter_config.json` is this method's.
    pub recognises: fn(&Map<String, Value>) -> bool,
    /// Builds the method from an `adapter_config.json`.
    pub from_file: Build,
}
