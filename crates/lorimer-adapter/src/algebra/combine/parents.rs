//! The adapters that are combined, and whether they belong together.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::site::{Part, Pool};
use crate::delta::LowRank;
use crate::error::{Error, Result};
use crate::file::convert::low_ranks;
use crate::file::dialects::peft;
use crate::file::load::account_of;
use crate::file::store::StoredAdapter;
use crate::file::streamed::StreamedAdapter;

/// Largest `tokenizer.json` beside an adapter that is compared.
const MAX_TOKENIZER: u64 = 64 << 20;

/// Factors of one module in a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
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

    fn text(&self, key: &str) -> Option<&str> {
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
            self.modules.insert(module, Shape { inputs, outputs, scaling: low.scaling });
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
    /// Refuses adapters of different bases, as far as their files tell.
    pub(super) fn check_bases(&self) -> Result<()> {
        let Some((first, others)) = self.all.split_first() else { return Ok(()) };
        let fail = |other: &Parent, text: String| {
            let (one, two) = (first.shown(), other.shown());
            Err(Error::Mismatch(format!("`{one}` and `{two}` belong to different bases: {text}")))
        };
        for other in others {
            let base = |p: &Parent| p.file.stored.manifest.as_ref().and_then(|m| m.base.clone());
            match (base(first), base(other)) {
                (Some(a), Some(b)) if a.fingerprint != b.fingerprint => {
                    return fail(
                        other,
                        format!("their weights are {} ({}) and {} ({})", a.name, a.fingerprint, b.name, b.fingerprint),
                    );
                }
                (Some(_), Some(_)) => {}
                _ => {
                    let end = |name: &str| name.trim_end_matches('/').rsplit(['/', '\\']).next().map(str::to_lowercase);
                    let (a, b) = (first.text("base_model_name_or_path"), other.text("base_model_name_or_path"));
                    if let (Some(a), Some(b)) = (a.filter(|a| !a.is_empty()), b.filter(|b| !b.is_empty()))
                        && end(a) != end(b)
                    {
                        return fail(
                            other,
                            format!(
                                "base_model_name_or_path is `{a}` and `{b}`; if that is one base, write the same name into both adapter_config.json"
                            ),
                        );
                    }
                }
            }
            let template = |p: &Parent| p.file.stored.manifest.as_ref().and_then(|m| m.chat_template.clone());
            if let (Some(a), Some(b)) = (template(first), template(other))
                && a != b
            {
                return fail(other, "they were trained with different chat templates".into());
            }
            if let (Some(a), Some(b)) = (tokenizer(&first.file.stored.path)?, tokenizer(&other.file.stored.path)?)
                && a != b
            {
                return fail(other, "the tokenizer.json beside them differ".into());
            }
            for (module, shape) in &other.modules {
                if let Some(own) = first.modules.get(module)
                    && (own.inputs, own.outputs) != (shape.inputs, shape.outputs)
                {
                    let sides = |s: &Shape| format!("{} inputs and {} outputs", s.inputs, s.outputs);
                    return fail(
                        other,
                        format!("`{module}` has {} in one and {} in the other", sides(own), sides(shape)),
                    );
                }
            }
        }
        self.check_sides()
    }

    /// Modules that the first parent lacks must fit among the others too.
    fn check_sides(&self) -> Result<()> {
        let mut seen: BTreeMap<&str, (&Parent, &Shape)> = BTreeMap::new();
        for parent in &self.all {
            for (module, shape) in &parent.modules {
                let (owner, own) = *seen.entry(module).or_insert((parent, shape));
                if (own.inputs, own.outputs) != (shape.inputs, shape.outputs) {
                    let (one, two) = (owner.shown(), parent.shown());
                    return Err(Error::Mismatch(format!(
                        "`{one}` and `{two}` belong to different bases: `{module}` has {} inputs and {} outputs in one, {} and {} in the other",
                        own.inputs, own.outputs, shape.inputs, shape.outputs
                    )));
                }
            }
        }
        Ok(())
    }

    /// The modules of any parent, in the order in which their tensors stand in a file.
    pub(super) fn modules(&self) -> Vec<String> {
        let mut names: Vec<String> = self.all.iter().flat_map(|p| p.modules.keys().cloned()).collect();
        names.sort_by_cached_key(|module| peft::tensor_name(module, "lora_A.weight"));
        names.dedup();
        names
    }

    /// What the parents have on a module; read from their files.
    pub(super) fn pool(&self, module: &str) -> Result<Pool> {
        let parts = self.all.iter().zip(&self.weights).map(|(parent, weight)| parent.part(module, *weight));
        Ok(Pool { path: module.into(), parts: parts.filter_map(Result::transpose).collect::<Result<_>>()? })
    }
}

/// The hash of the `tokenizer.json` beside an adapter, if there is one.
fn tokenizer(folder: &Path) -> Result<Option<Vec<u8>>> {
    let path: PathBuf = folder.join("tokenizer.json");
    match path.is_file() {
        true => Ok(Some(Sha256::digest(lorimer_model::files::read_bounded(&path, MAX_TOKENIZER)?).to_vec())),
        false => Ok(None),
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
