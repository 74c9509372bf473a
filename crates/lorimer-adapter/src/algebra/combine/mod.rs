//! Stored adapters combined into one, without a base and without a forward: sums, means, pruned and elected sums, clusters of units.
//!
//! Each combination is a line of [`COMBINATIONS`] and a function of what the parents have on one projection ([`site::Pool`]). Parents are read and
//! the result is written projection by projection, so memory holds a few projections. Every result is a plain LoRA of scaling 1, but that of
//! `tensors`, which is of the parents' method. How far it is from Σ weight · ΔW is measured in factored form and reported.

mod average;
mod bases;
mod dense;
mod elements;
pub mod entry;
mod lego;
mod linear;
mod memory;
mod parents;
pub mod settings;
pub mod site;
mod svd;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lorimer_model::files::{remove_folder, write_folder_atomic, write_json};
use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::file::bytes::Header;
use crate::file::convert::peft_config;
use crate::file::dialects::peft;
use crate::file::store::{CONFIG_FILE, MANIFEST_FILE, Manifest, WEIGHTS_FILE};
use crate::file::streamed::content_id_of;
use crate::file::writer::{carrying, write_tensors};
pub use entry::{Combination, Kind, Weights};
use parents::{Parent, Parents, method_of};
use settings::Settings;
use site::Made;
pub use svd::clamp;

/// Every combination, in the order of the help.
pub const COMBINATIONS: &[Combination] = &[
    linear::LINEAR,
    linear::CAT,
    linear::ZERO_PAD,
    svd::SVD,
    svd::COMPRESS,
    svd::TASK_ARITHMETIC,
    elements::MAGNITUDE_PRUNE,
    elements::TIES,
    elements::DARE_LINEAR,
    elements::DARE_TIES,
    dense::MAGNITUDE_PRUNE_SVD,
    dense::TIES_SVD,
    dense::DARE_LINEAR_SVD,
    dense::DARE_TIES_SVD,
    svd::KNOTS,
    lego::LEGO,
    average::DENSE,
    average::TENSORS,
];

/// Largest cosines between the A of parents, on average, below which LoRA-LEGO's clusters are their starts'.
const LEGO_LIKENESS: f64 = 0.2;
/// The mean cosine of rows of A with the first parent's below which one that is averaged with it tensor by tensor is not of its start.
const SAME_START: f64 = 0.5;

/// Most adapters that are combined at once.
const MAX_PARENTS: usize = 1000;

/// The registry's line for a name.
///
/// # Errors
///
/// Fails if there is none.
pub fn combination(name: &str) -> Result<&'static Combination> {
    COMBINATIONS.iter().find(|c| c.name == name).ok_or_else(|| {
        let name: String = name.chars().take(40).collect();
        let known: Vec<&str> = COMBINATIONS.iter().map(|c| c.name).collect();
        Error::Config(format!("there is no combination `{name}`; there are {}", known.join(", ")))
    })
}

/// An adapter that went into another.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ParentReport {
    /// Its folder's name.
    pub name: String,
    /// `sha256:…` over its configuration and tensors.
    pub content_id: String,
    /// The weight it was combined with.
    pub weight: f64,
    /// Modules of the result that it lacks.
    pub missing: usize,
}

/// What a combination gave.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Combined {
    /// Folder written.
    pub output: String,
    /// The combination's name.
    pub method: String,
    /// Modules written.
    pub modules: usize,
    /// The largest rank of a module; 0 for `tensors`.
    pub rank: usize,
    /// ‖ΔW' − Σ weight · ΔW‖ / ‖Σ weight · ΔW‖ over all modules (Frobenius); None for `tensors`, and where the sum is 0.
    pub error: Option<f64>,
    /// The module with the largest such error, and that.
    pub worst: Option<(String, f64)>,
    /// `sha256:…` of the result.
    pub content_id: String,
    /// What went in, in order.
    pub parents: Vec<ParentReport>,
}

/// What is to be combined.
pub struct Request<'a> {
    /// Folders in order, with the weights that were given.
    pub adapters: &'a [(PathBuf, Option<f64>)],
    /// The combination's name.
    pub method: &'a str,
    /// Its settings.
    pub settings: &'a Map<String, Value>,
    /// The folder to write.
    pub output: &'a Path,
    /// Whether an adapter that is there may be replaced.
    pub overwrite: bool,
}

/// Refuses to write where something is that is not to be replaced.
fn check_output(request: &Request<'_>) -> Result<()> {
    let output = request.output;
    let fail = |text: &str| Err(Error::Refused(format!("`{}` {text}", output.display())));
    if !output.exists() {
        return Ok(());
    }
    if !request.overwrite {
        return fail("exists; choose another --output, or pass --overwrite");
    }
    if !output.join(CONFIG_FILE).is_file() {
        return fail("holds no adapter, so it is not overwritten; choose another --output");
    }
    let real = |path: &Path| path.canonicalize().ok();
    let inside = |path: &Path| real(path).zip(real(output)).is_some_and(|(path, output)| path.starts_with(output));
    match request.adapters.iter().any(|(path, _)| inside(path)) {
        true => fail("holds one of the adapters that are combined; choose another --output"),
        false => Ok(()),
    }
}

/// Combines adapters into a new folder, which is there whole or not at all. `progress` hears (done, all, name) of modules or tensors.
///
/// # Errors
///
/// Fails if there is no such combination, if a setting or weight is none of its, if an adapter is damaged or none that it takes, if adapters
/// belong to different bases, or if the folder exists or cannot be written.
pub fn combine(request: &Request<'_>, mut progress: impl FnMut(usize, usize, &str)) -> Result<Combined> {
    let combination = combination(request.method)?;
    let settings = Settings::given(combination.name, combination.takes, request.settings)?;
    if request.adapters.is_empty() || request.adapters.len() > MAX_PARENTS {
        let count = request.adapters.len();
        return Err(Error::Config(format!("{count} adapters, between 1 and {MAX_PARENTS} are combined")));
    }
    let weights = combination.weights_of(&request.adapters.iter().map(|(_, w)| *w).collect::<Vec<_>>())?;
    check_output(request)?;
    let mut all = request.adapters.par_iter().map(|(path, _)| Parent::open(path)).collect::<Result<Vec<_>>>()?;
    if !matches!(combination.kind, Kind::Tensors) {
        let gated = matches!(combination.kind, Kind::GatedSites(_));
        all.iter_mut().try_for_each(|parent| parent.find_modules(gated))?;
    }
    let parents = Parents { all, weights };
    bases::check(&parents)?;
    if matches!(combination.kind, Kind::Tensors) {
        average::check(&parents)?;
    }
    let mut made = None;
    carrying(|carry| {
        write_folder_atomic(request.output, |folder| {
            let combined = fill(folder, combination, &settings, &parents, &mut progress).map_err(&mut *carry)?;
            if request.overwrite && request.output.exists() {
                remove_folder(request.output)?;
            }
            made = Some(combined);
            Ok(())
        })
    })?;
    let none = || Error::Refused("nothing was combined".into());
    Ok(Combined { output: request.output.display().to_string(), ..made.ok_or_else(none)? })
}

/// What is known of the result when its tensors are written.
#[derive(Default)]
struct Account {
    modules: Map<String, Value>,
    ranks: BTreeMap<String, (usize, f64)>,
    wrong: f64,
    whole: f64,
    worst: Option<(String, f64)>,
}

impl Account {
    fn note(&mut self, module: &str, made: &Made, (wrong, whole): (f64, f64)) -> Result<()> {
        let rank = made.a.dim(0)?;
        let error = (whole > 0.0).then(|| (wrong / whole).sqrt());
        let mut report = Map::from_iter([("rank".to_string(), json!(rank)), ("error".to_string(), json!(error))]);
        report.extend(made.report.clone());
        self.modules.insert(module.into(), Value::Object(report));
        self.ranks.insert(module.into(), (rank, 1.0));
        self.wrong += wrong;
        self.whole += whole;
        if let Some(error) = error.filter(|e| self.worst.as_ref().is_none_or(|(_, worst)| e > worst)) {
            self.worst = Some((module.into(), error));
        }
        Ok(())
    }

    /// The mean over modules of a figure that the combination reports.
    fn mean(&self, figure: &str) -> Option<f64> {
        let values: Vec<f64> = self.modules.values().filter_map(|report| report.get(figure)?.as_f64()).collect();
        (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
    }
}

/// Fills the folder of the result.
fn fill(
    folder: &Path,
    combination: &Combination,
    settings: &Settings,
    parents: &Parents,
    progress: &mut dyn FnMut(usize, usize, &str),
) -> Result<Combined> {
    let mut account = Account::default();
    let path = folder.join(WEIGHTS_FILE);
    match combination.kind {
        Kind::Tensors => write_means(&path, parents, progress)?,
        _ => write_sites(&path, (combination, settings), parents, &mut account, progress)?,
    }
    let none = || Error::Refused("there is no adapter to combine".into());
    let first = &parents.all.first().ok_or_else(none)?.file.stored;
    let is_lora = !matches!(combination.kind, Kind::Tensors);
    let config = match is_lora {
        true => peft_config(&account.ranks, bases::name(parents).unwrap_or_default())?,
        false => averaged_config(parents, &first.config),
    };
    write_json(&folder.join(CONFIG_FILE), &config)?;
    let likeness = if is_lora { account.mean("likeness") } else { average::likeness(parents)? };
    match likeness {
        Some(likeness) if is_lora && likeness < LEGO_LIKENESS => tracing::warn!(
            "the adapters' A have little in common (largest cosines of {likeness:.2} on average): they began with different seeds, and clusters follow the start, not what was trained"
        ),
        Some(likeness) if !is_lora && likeness < SAME_START => tracing::warn!(
            "the adapters' A are not of one start (of one of them a cosine of {likeness:.2} with the first's on average), so that the mean of their tensors is no mean of what they do; `dense` averages the changes themselves"
        ),
        _ => {}
    }
    let modules = parents.modules();
    let reports = parent_reports(parents, &modules);
    let content_id = content_id_of(folder)?;
    let error = (account.whole > 0.0).then(|| (account.wrong / account.whole).sqrt());
    let manifests = || parents.all.iter().filter_map(|p| p.file.stored.manifest.as_ref());
    let manifest = Manifest {
        format: 1,
        content_id: content_id.clone(),
        method: if is_lora { "lora" } else { method_of(first)? }.to_string(),
        lorimer: env!("CARGO_PKG_VERSION").to_string(),
        base: manifests().find_map(|m| m.base.clone()),
        chat_template: manifests().find_map(|m| m.chat_template.clone()),
        training: json!({
            "combination": combination.name, "settings": settings.taken(combination.takes), "parents": reports,
            "error": error, "modules": account.modules, "likeness": likeness,
        }),
        golden: Vec::new(),
        frozen: BTreeMap::new(),
        xlora: None,
    };
    write_json(&folder.join(MANIFEST_FILE), &manifest)?;
    Ok(Combined {
        output: String::new(),
        method: combination.name.into(),
        modules: if is_lora { modules.len() } else { first.tensors.len() },
        rank: account.ranks.values().map(|(rank, _)| *rank).max().unwrap_or(0),
        error,
        worst: account.worst,
        content_id,
        parents: reports,
    })
}

/// What is reported of the parents.
fn parent_reports(parents: &Parents, modules: &[String]) -> Vec<ParentReport> {
    let one = |(parent, weight): (&Parent, &f64)| ParentReport {
        name: parent.name(),
        content_id: parent.file.content_id.clone(),
        weight: *weight,
        missing: modules.iter().filter(|m| !parent.modules.contains_key(*m)).count(),
    };
    parents.all.iter().zip(&parents.weights).map(one).collect()
}

/// The parents' configuration, without the seed of an A that is none of theirs, and with the base's name that any of them knows.
fn averaged_config(parents: &Parents, first: &Map<String, Value>) -> Map<String, Value> {
    let mut config = first.clone();
    if let Some(name) = bases::name(parents) {
        config.insert("base_model_name_or_path".into(), name.into());
    }
    let seed = |map: &Map<String, Value>| map.get("a_seed").cloned().unwrap_or_default();
    if parents.all.iter().any(|p| seed(&p.file.stored.config) != seed(first)) {
        config.insert("a_seed".into(), Value::Null);
    }
    config
}

fn write_means(path: &Path, parents: &Parents, progress: &mut dyn FnMut(usize, usize, &str)) -> Result<()> {
    let names: Vec<String> =
        parents.all.first().map(|p| p.file.stored.tensors.keys().cloned().collect()).unwrap_or_default();
    write_tensors(path, Header::room_for(&names), |out| {
        for (done, name) in names.iter().enumerate() {
            out.push(name, &average::tensor(parents, name)?)?;
            progress(done + 1, names.len(), name);
        }
        Ok(())
    })
}

fn write_sites(
    path: &Path,
    (combination, settings): (&Combination, &Settings),
    parents: &Parents,
    account: &mut Account,
    progress: &mut dyn FnMut(usize, usize, &str),
) -> Result<()> {
    const KEYS: [&str; 2] = ["lora_A.weight", "lora_B.weight"];
    let modules = parents.modules();
    let names: Vec<String> = modules.iter().flat_map(|m| KEYS.map(|key| peft::tensor_name(m, key))).collect();
    let sizes = modules.iter().map(|module| (module.as_str(), parents.sizes(module)));
    let at_once = memory::at_once(combination, sizes, rayon::current_num_threads())?;
    let make = |module: &String| -> Result<(Made, (f64, f64))> {
        let pool = parents.pool(module)?;
        let none = || Error::Refused(format!("`{}` does not go by projections", combination.name));
        let made = combination.site(&pool, settings).ok_or_else(none)??;
        let (wrong, whole) = pool.squared_error(&made)?;
        match wrong.is_finite() && whole.is_finite() {
            true => Ok((made, (wrong, whole))),
            false => Err(Error::Refused(format!(
                "the combination on `{module}` is not finite: weights or scalings are too large"
            ))),
        }
    };
    write_tensors(path, Header::room_for(&names), |out| {
        let mut done = 0;
        for some in modules.chunks(at_once) {
            let made = some.par_iter().map(make).collect::<Result<Vec<_>>>()?;
            for (module, (made, error)) in some.iter().zip(made) {
                for (key, tensor) in KEYS.iter().zip([&made.a, &made.b]) {
                    out.push(&peft::tensor_name(module, key), tensor)?;
                }
                account.note(module, &made, error)?;
                done += 1;
                progress(done, modules.len(), module);
            }
        }
        Ok(())
    })
}
