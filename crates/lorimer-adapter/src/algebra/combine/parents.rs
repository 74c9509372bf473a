//! The adapters that are combined: their files, read tensor by tensor.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Tensor};
use serde_json::Value;

use super::memory::Sizes;
use super::site::{Part, Pool};
use crate::delta::LowRank;
use crate::error::{Error, Result};
use crate::file::convert::low_ranks;
use crate::file::dialects::peft;
use crate::file::load::account_of;
use crate::file::store::StoredAdapter;
use crate::file::streamed::StreamedAdapter;

/// Factors of one module in a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub rank: usize,
    pub inputs: usize,
    pub outputs: usize,
    pub scaling: f64,
}

/// One adapter that is combined.
pub(super) struct Parent {
    /// Its folder, read tensor by tensor.
    pub file: StreamedAdapter,
    /// Its modules' factors.
    pub modules: BTreeMap<String, Shape>,
}

impl Parent {
    /// Opens a folder.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        Ok(Self { file: StreamedAdapter::open(folder, "combined with others")?, modules: BTreeMap::new() })
    }

    /// How it is called in messages.
    pub(super) fn shown(&self) -> String {
        self.file.stored.path.display().to_string()
    }

    /// The folder's own name.
    pub(super) fn name(&self) -> String {
        self.file.stored.path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
    }

    /// What its files say.
    pub(super) fn stored(&self) -> &StoredAdapter {
        &self.file.stored
    }

    /// A text of its configuration.
    pub(super) fn text(&self, key: &str) -> Option<&str> {
        self.file.stored.config.get(key).and_then(Value::as_str)
    }

    /// Finds its modules, all of which must be plain low-rank factors; with `gated`, FlyLoRA's and SMoRA's too, with every rank acting.
    pub(super) fn find_modules(&mut self, gated: bool) -> Result<()> {
        let name = self.shown();
        let kind = self.text("peft_type").unwrap_or_default();
        let found = match (gated, kind) {
            (true, "FLYLORA" | "SRMOLE") => dense_factors(&self.file.stored)?,
            (false, "FLYLORA" | "SRMOLE") => {
                return Err(Error::Refused(format!(
                    "`{name}` chooses its ranks by the token, which no fixed change does: --method dense takes all its ranks as acting, --method tensors averages its tensors, and a weighted sum is served or evaluated with --adapter"
                )));
            }
            _ => low_ranks(&self.file.stored).map_err(|e| Error::Refused(format!("`{name}`: {e}")))?,
        };
        for (module, low) in found {
            let ((rank, inputs), (outputs, other)) = (low.a.dims2()?, low.b.dims2()?);
            if rank != other || rank == 0 {
                let text = format!("`{name}`: `{module}` has {rank} rows of A and {other} columns of B");
                return Err(Error::Mismatch(text));
            }
            if inputs == 0 || outputs == 0 {
                return Err(Error::Mismatch(format!("`{name}`: `{module}` has {inputs} inputs and {outputs} outputs")));
            }
            self.modules.insert(module, Shape { rank, inputs, outputs, scaling: low.scaling });
        }
        self.check_targets()
    }

    /// Refuses a file that lacks all tensors of a module which its configuration names.
    fn check_targets(&self) -> Result<()> {
        let Some(Value::Array(names)) = self.file.stored.config.get("target_modules") else { return Ok(()) };
        let held = |name: &str| self.modules.keys().any(|m| m == name || m.ends_with(&format!(".{name}")));
        match names.iter().filter_map(Value::as_str).find(|name| *name != "all-linear" && !held(name)) {
            None => Ok(()),
            Some(missing) => Err(Error::Mismatch(format!(
                "`{}` is not whole: its configuration names `{missing}`, of which the file has no tensors",
                self.shown()
            ))),
        }
    }

    /// Its change of a module, if it has one.
    fn part(&self, module: &str, weight: f64) -> Result<Option<Part>> {
        let Some(shape) = self.modules.get(module) else { return Ok(None) };
        let read =
            |key| -> Result<Tensor> { Ok(self.file.tensor(&peft::tensor_name(module, key))?.to_dtype(DType::F32)?) };
        Ok(Some(Part { a: read("lora_A.weight")?, b: read("lora_B.weight")?, scaling: shape.scaling, weight }))
    }
}

/// All parents with their weights.
pub(super) struct Parents {
    pub all: Vec<Parent>,
    pub weights: Vec<f64>,
}

impl Parents {
    /// The modules of any parent, in the order in which their tensors stand in a file.
    pub(super) fn modules(&self) -> Vec<String> {
        let mut names: Vec<String> = self.all.iter().flat_map(|p| p.modules.keys().cloned()).collect();
        names.sort_by_cached_key(|module| peft::tensor_name(module, "lora_A.weight"));
        names.dedup();
        names
    }

    /// How large what the parents have on a module is.
    pub(super) fn sizes(&self, module: &str) -> Sizes {
        let mut sizes = Sizes::default();
        for shape in self.all.iter().filter_map(|parent| parent.modules.get(module)) {
            let (ranks, parents) = (sizes.ranks + shape.rank, sizes.parents + 1);
            sizes = Sizes { ranks, parents, outputs: shape.outputs, inputs: shape.inputs };
        }
        sizes
    }

    /// What the parents have on a module; read from their files.
    pub(super) fn pool(&self, module: &str) -> Result<Pool> {
        let parts = self.all.iter().zip(&self.weights).map(|(parent, weight)| parent.part(module, *weight));
        Ok(Pool { path: module.into(), parts: parts.filter_map(Result::transpose).collect::<Result<_>>()? })
    }
}

/// The method's name of an adapter.
pub(super) fn method_of(stored: &StoredAdapter) -> Result<&'static str> {
    Ok(account_of(stored)?.0.name())
}

/// The factors of a FlyLoRA or SMoRA, by module, with α/r: FlyLoRA's formula for averages, and SMoRA's where every gate is as large as their mean
/// (k gates that sum to k are k/r on average, times α/k).
fn dense_factors(stored: &StoredAdapter) -> Result<BTreeMap<String, LowRank>> {
    let (method, account) = account_of(stored)?;
    account.refuse_unknown(method.name())?;
    let config = method.config();
    let number = |key: &str| config.get(key).and_then(Value::as_f64);
    let (Some(alpha), Some(rank)) = (number("lora_alpha"), number("r")) else {
        return Err(Error::Config(format!("`{}` has no r and lora_alpha", stored.path.display())));
    };
    let mut all = BTreeMap::new();
    for (module, tensors) in &account.modules {
        let (Some(a), Some(b)) = (tensors.get("lora_A.weight"), tensors.get("lora_B.weight")) else {
            let text = format!("`{}`: `{module}` lacks lora_A or lora_B", stored.path.display());
            return Err(Error::Mismatch(text));
        };
        if a.dims().len() != 2 || a.dim(0)? as f64 != rank {
            let text =
                format!("`{}`: `{module}` has A {:?}, its configuration rank {rank}", stored.path.display(), a.dims());
            return Err(Error::Mismatch(text));
        }
        all.insert(module.clone(), LowRank { a: a.clone(), b: b.clone(), scaling: alpha / rank });
    }
    Ok(all)
}
