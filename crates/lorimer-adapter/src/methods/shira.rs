//! # SHiRA: sparse high-rank adapters
//!
//! Bhardwaj et al. 2024, *Sparse High Rank Adapters*, NeurIPS, arXiv 2406.13175, section 3: a mask of k entries of W (outputs, inputs) is chosen once, and
//! only these are trained: `y = (W + S) x` with S sparse and zero at the start. k is `r · (inputs + outputs)` (as many as LoRA of rank r; PEFT's
//! rule) or `density · inputs · outputs`.
//!
//! Masks (`mask_type`): `random`; `struct` (the diagonal, then whole rows and columns in turn); `wm` (the largest |W|); `grad` (the largest Σ|∂L/∂W|
//! over some batches); `snip` (the largest |W| · Σ|∂L/∂W|); `block` (random runs of 16 neighbours: a cache line of f32, which
//! switches fastest). With `parts` = n and `part` = i, random masks of one `random_seed` are disjoint for different i.
//!
//! Trainable parameters of a projection: k.
//!
//! Meant for: switching adapters under one base in milliseconds (`lorimer switch`: k numbers are written, nothing is multiplied, and the base comes
//! back bit for bit), and for adding several adapters up with little interference. In training only k gradients, moments and values exist; an
//! entry's gradient is one dot product.
//!
//! Step time is near LoRA's at a density of about 1 %: the frozen products are the same, and an entry costs a row of multiply-adds three times.
//!
//! The file is PEFT's (`shira_weight` (k), `shira_indices` (2, k)), 12 bytes an entry. `form` = `compact` (or `compact_f16`) writes rising positions as
//! differences in 7-bit groups, about 5 (3) bytes an entry at 1 %; `lorimer convert --to peft` and `--to compact` change between them. PEFT counts
//! entries by r, so with a density its file is filled up with zeros to the least r that holds the entries of every projection.
//!
//! ```
//! use lorimer_adapter::methods::shira::{decode, encode};
//! // Rising positions by their differences, 7 bits a byte.
//! assert_eq!(encode(&[3, 5, 400]), [3, 2, 0x8b, 0x03]);
//! assert_eq!(decode(&[3, 2, 0x8b, 0x03], 401).unwrap(), [3, 5, 400]);
//! ```

use std::collections::HashSet;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use lorimer_model::{Projection, Site};
use lorimer_tensor::SparseIndex;
use rand::seq::index;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

mod delta;
mod positions;
mod reform;

pub use delta::ShiraDelta;
pub use positions::{decode, encode};
use positions::{expand, largest, structured};
pub use reform::Form;
use reform::reform_module;

use super::entry::{Entry, Served};
use crate::delta::Delta;
use crate::error::{Error, Result};
use crate::file::account::FileAccount;
use crate::file::dialects::peft;
use crate::file::keys::FileKeys;
use crate::file::store::StoredAdapter;
use crate::method::{Calibration, CalibrationStats, Method, ModuleStats, ParameterSource};
use crate::settings::{PeftKeys, configure, from_peft_json, peft_json};
use crate::step::site_seed;
use crate::targets::Targeting;

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "shira",
    title: "Sparse high-rank adapter",
    paper: "arXiv 2406.13175",
    kind: "projection",
    variants: &["random", "struct", "wm", "grad", "snip", "block"],
    peft_type: "SHIRA",
    mergeable: true,
    served: Served::Converted,
    lr: 2e-3,
    parts: &[],
    flags: &[("rank", "r")],
    source: include_str!("shira.rs"),
    laws: &[
        (r#"{"r": 2}"#, 0.0),
        (r#"{"r": 3, "mask_type": "struct", "form": "compact"}"#, 0.0),
        (r#"{"density": 0.2, "mask_type": "wm"}"#, 0.0),
        (r#"{"r": 1, "mask_type": "grad", "samples": 3}"#, 0.0),
        (r#"{"r": 1, "mask_type": "snip", "samples": 3}"#, 0.0),
        (r#"{"density": 0.3, "mask_type": "block", "form": "compact"}"#, 0.0),
        (r#"{"density": 0.1, "random_seed": 4, "part": 2, "parts": 3}"#, 0.0),
    ],
    build: |settings| {
        let mut settings = settings.clone();
        if let Some(variant) = settings.remove("variant") {
            settings.insert("mask_type".into(), variant);
        }
        Ok(Box::new(Shira::new(configure::<ShiraConfig>("shira", &settings)?.checked()?)))
    },
    recognises: |config| config.get("peft_type").and_then(Value::as_str) == Some("SHIRA"),
    from_file: |config| {
        let config: ShiraConfig = from_peft_json("shira", config, &PeftKeys::NONE)?;
        Ok(Box::new(Shira::new(config.checked()?)))
    },
};

/// PEFT's `ShiraConfig`, and what it lacks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ShiraConfig {
    /// Which modules.
    #[serde(flatten)]
    pub targeting: Targeting,
    /// As many entries as LoRA of this rank has parameters.
    pub r: usize,
    /// Share of the weight's entries, in place of `r`.
    pub density: Option<f64>,
    /// How the entries are chosen.
    pub mask_type: Mask,
    /// Seed of random masks [default: the run's].
    pub random_seed: Option<u64>,
    /// Zero at the start.
    pub init_weights: bool,
    /// For disjoint masks: which part.
    pub part: usize,
    /// For disjoint masks: of how many.
    pub parts: usize,
    /// With `grad` and `snip`: rows of data that are looked at.
    pub samples: usize,
    /// With `grad` and `snip`: rows at a time.
    pub batch_size: usize,
    /// How the file holds entries.
    pub form: Form,
}

/// How the entries are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mask {
    /// Uniformly.
    #[default]
    Random,
    /// The diagonal, whole rows and columns.
    Struct,
    /// The largest weights.
    Wm,
    /// The largest gradients.
    Grad,
    /// The largest products of both.
    Snip,
    /// Random runs of 16.
    Block,
}

impl Default for ShiraConfig {
    fn default() -> Self {
        Self {
            targeting: Targeting::default(),
            r: 32,
            density: None,
            mask_type: Mask::Random,
            random_seed: None,
            init_weights: true,
            part: 0,
            parts: 1,
            samples: 64,
            batch_size: 8,
            form: Form::Peft,
        }
    }
}

/// Neighbours of a `block` mask's run: 64 bytes of f32.
const RUN: usize = 16;

impl ShiraConfig {
    fn checked(self) -> Result<Self> {
        let fail = |text: String| Err(Error::Config(text));
        if self.r == 0 || self.r > 1 << 16 {
            return fail(format!("r = {} should be between 1 and 65536", self.r));
        }
        if self.density.is_some_and(|d| !(d > 0.0 && d <= 1.0)) {
            return fail(format!("density = {} should be above 0 and at most 1", self.density.unwrap_or_default()));
        }
        if self.parts == 0 || self.part >= self.parts || self.parts > 1 << 16 {
            return fail(format!("part = {} should be below parts = {}", self.part, self.parts));
        }
        if self.parts > 1 && self.mask_type != Mask::Random {
            return fail("disjoint parts are for mask_type random".into());
        }
        if self.samples == 0 || self.batch_size == 0 || self.batch_size > 1 << 16 {
            return fail("samples and batch_size of shira should be at least 1".into());
        }
        Ok(self)
    }

    /// k on a projection.
    pub fn count(&self, site: &Site) -> Result<usize> {
        let all = site.inputs * site.outputs;
        let k = match self.density {
            Some(density) => ((density * all as f64).round() as usize).max(1),
            None => self.r * (site.inputs + site.outputs),
        };
        match k.checked_mul(self.parts).is_some_and(|most| most <= all) {
            true => Ok(k),
            false => Err(Error::Config(format!(
                "shira: {} times {k} entries of `{}`, which has {all}; lower r or density",
                self.parts, site.path
            ))),
        }
    }

    /// The entries' positions, rising.
    fn mask(
        &self,
        site: &Site,
        base: &Projection,
        source: &ParameterSource<'_>,
        rng: &mut ChaCha8Rng,
    ) -> Result<Vec<u32>> {
        let (k, all) = (self.count(site)?, site.inputs * site.outputs);
        let mut rng = match self.random_seed {
            Some(seed) => ChaCha8Rng::seed_from_u64(site_seed(seed, &site.path)),
            None => ChaCha8Rng::seed_from_u64(rng.random()),
        };
        let mut positions: Vec<u32> = match self.mask_type {
            Mask::Random => {
                let drawn = index::sample(&mut rng, all, k * self.parts).into_vec();
                drawn[self.part * k..(self.part + 1) * k].iter().map(|&p| p as u32).collect()
            }
            Mask::Struct => structured(k, (site.outputs, site.inputs), &mut rng),
            Mask::Wm => largest(&base.dense(DType::F32)?, k)?,
            Mask::Grad | Mask::Snip => source.found("positions")?.to_dtype(DType::U32)?.to_vec1::<u32>()?,
            Mask::Block => {
                let runs = index::sample(&mut rng, all.div_ceil(RUN), k.div_ceil(RUN).min(all.div_ceil(RUN)));
                let entries = runs.into_iter().flat_map(|run| run * RUN..((run + 1) * RUN).min(all));
                let mut entries: Vec<u32> = entries.take(k).map(|p| p as u32).collect();
                // The last run of a weight may be shorter than the others.
                let have: HashSet<u32> = entries.iter().copied().collect();
                let missing = k - entries.len();
                entries.extend((0..all as u32).filter(|p| !have.contains(p)).take(missing));
                entries
            }
        };
        positions.sort_unstable();
        Ok(positions)
    }
}

/// Names of a module's tensors: PEFT's, and the compact form's positions.
const FILE_KEYS: &[&str] = &["shira_weight", "shira_indices", "shira_positions"];

/// A sparse adapter's file in another form. No base is needed: a compact file says each module's width.
pub fn reform(stored: &StoredAdapter, form: Form) -> Result<StoredAdapter> {
    if !(ENTRY.recognises)(&stored.config) {
        return Err(Error::Refused(format!("`{}` is no sparse adapter (shira)", stored.path.display())));
    }
    let density = stored.config.get("density").is_some_and(|d| !d.is_null());
    if density && form == Form::Peft {
        return Err(Error::Refused(format!(
            "`{}` has its entries by density, which PEFT's form cannot say (it counts them by r); use --to lora, or merge it",
            stored.path.display()
        )));
    }
    let account = FileAccount::new(stored, &FileKeys::of_modules(FILE_KEYS));
    account.refuse_unknown("shira")?;
    let mut tensors = stored.tensors.clone();
    for (module, own) in &account.modules {
        own.keys().for_each(|key| drop(tensors.remove(&peft::tensor_name(module, key))));
        let reformed = reform_module(module, own, form)?.into_iter();
        tensors.extend(reformed.map(|(key, tensor)| (peft::tensor_name(module, key), tensor)));
    }
    let mut config = stored.config.clone();
    config.insert("form".into(), serde_json::to_value(form).unwrap_or_default());
    let mut reformed = StoredAdapter { path: stored.path.clone(), config, tensors, manifest: None, parts: Vec::new() };
    if let Some(before) = &stored.manifest {
        let mut manifest = before.clone();
        // Values in f16 answer a little differently.
        if form == Form::CompactF16 {
            manifest.golden.clear();
        }
        manifest.frozen.clear();
        manifest.content_id = reformed.content_id()?;
        reformed.manifest = Some(manifest);
    }
    Ok(reformed)
}

struct Shira {
    config: ShiraConfig,
    /// With a density and PEFT's form: the r that the file says, with which there is room for all entries of every projection.
    fit: Option<usize>,
}

impl Shira {
    fn new(config: ShiraConfig) -> Self {
        Self { config, fit: None }
    }

    /// The least r whose r·(inputs + outputs) entries hold those of each projection and are no more than it has.
    fn fit(&self, sites: &[&Site]) -> Result<Option<usize>> {
        let mut fit = 1;
        for site in sites {
            fit = fit.max(self.config.count(site)?.div_ceil(site.inputs + site.outputs));
        }
        Ok(sites.iter().all(|s| fit * (s.inputs + s.outputs) <= s.inputs * s.outputs).then_some(fit))
    }

    /// Positions out of a file.
    fn positions(&self, site: &Site, source: &mut ParameterSource<'_>, k: usize) -> Result<Vec<u32>> {
        let wrong = |what: &str| {
            Error::Mismatch(format!("tensor `{}.{what}` does not hold positions of its weight", site.path))
        };
        if let Some(bytes) = source.any("shira_positions")? {
            if bytes.dtype() != DType::U8 || bytes.dims().len() != 1 {
                return Err(wrong("shira_positions"));
            }
            let (width, positions) = expand(&bytes.to_vec1::<u8>()?).ok_or_else(|| wrong("shira_positions"))?;
            let inside = positions.last().is_none_or(|p| ((p / width) as usize) < site.outputs);
            if positions.len() != k || width as usize > site.inputs || !inside {
                return Err(wrong("shira_positions"));
            }
            return Ok(positions.into_iter().map(|p| p / width * site.inputs as u32 + p % width).collect());
        }
        let Some(indices) = source.optional("shira_indices", &[2, k])? else {
            return Err(Error::Mismatch(format!("tensor `{}.shira_indices` is missing", site.path)));
        };
        // PEFT writes int32, and float32 on Windows.
        let indices = indices.to_dtype(DType::F64)?.to_vec2::<f64>()?;
        let position = |(row, column): (&f64, &f64)| {
            let fits = |v: f64, end: usize| v >= 0.0 && v < end as f64 && v.fract() == 0.0;
            (fits(*row, site.outputs) && fits(*column, site.inputs))
                .then(|| *row as u32 * site.inputs as u32 + *column as u32)
        };
        let positions = indices[0].iter().zip(&indices[1]).map(position).collect::<Option<Vec<u32>>>();
        positions.ok_or_else(|| wrong("shira_indices"))
    }
}

impl Method for Shira {
    fn name(&self) -> &'static str {
        "shira"
    }

    fn targeting(&self) -> &Targeting {
        &self.config.targeting
    }

    fn config(&self) -> Map<String, Value> {
        let mut config = peft_json("SHIRA", &self.config);
        config.insert("fan_in_fan_out".into(), false.into());
        config
    }

    fn peft_lacks(&self) -> &'static [&'static str] {
        &["exclude_modules", "layers_to_transform", "layers_pattern"]
    }

    fn stored_config(&self) -> Map<String, Value> {
        let mut config = self.config();
        // PEFT counts entries by r alone.
        if let Some(r) = self.fit {
            config.extend([("r".into(), r.into()), ("density".into(), Value::Null)]);
            config.extend([("part".into(), 0.into()), ("parts".into(), 1.into())]);
        }
        config
    }

    fn resolve(&mut self, targeted: &[&Site], _stats: &CalibrationStats) -> Result<()> {
        if self.config.density.is_some() && self.config.form == Form::Peft {
            self.fit = self.fit(targeted)?;
        }
        Ok(())
    }

    fn calibration(&self) -> Calibration {
        match self.config.mask_type {
            Mask::Grad | Mask::Snip => Calibration::Gradients {
                samples: self.config.samples,
                batch_size: self.config.batch_size,
                absolute: true,
            },
            _ => Calibration::Nothing,
        }
    }

    fn reduce_gradients(&self, site: &Site, base: &Projection, gradient: &Tensor) -> Result<ModuleStats> {
        let score = match self.config.mask_type {
            Mask::Snip => (base.dense(gradient.dtype())?.abs()? * gradient)?,
            _ => gradient.clone(),
        };
        let mut positions = largest(&score, self.config.count(site)?)?;
        positions.sort_unstable();
        let k = positions.len();
        Ok(ModuleStats::from([("positions".to_string(), Tensor::from_vec(positions, k, &Device::Cpu)?)]))
    }

    fn file_keys(&self) -> FileKeys {
        FileKeys::of_modules(FILE_KEYS)
    }

    fn attach(&self, site: &Site, base: &Projection, source: &mut ParameterSource<'_>) -> Result<Box<dyn Delta>> {
        let (k, dtype) = (self.config.count(site)?, source.dtype());
        let shape = (site.outputs, site.inputs);
        let (positions, values) = if source.is_file() {
            let positions = self.positions(site, source, k)?;
            let none = |_: &mut ChaCha8Rng| Err(Error::Config("a file gives its tensors".into()));
            (positions, source.trainable("shira_weight", &[k], none)?.as_tensor().clone())
        } else {
            if self.config.form == Form::Peft && self.config.density.is_some() && self.fit.is_none() {
                return Err(Error::Config(format!(
                    "density = {} has no r with which PEFT could read the file; lower it, or add --set form=compact, which only Lorimer reads",
                    self.config.density.unwrap_or_default()
                )));
            }
            let mut rng = source.rng();
            let positions = self.config.mask(site, base, source, &mut rng)?;
            let values = match self.config.init_weights {
                true => Tensor::zeros(k, dtype, &Device::Cpu)?,
                false => super::random::normal((1, k), &mut rng)?.flatten_all()?.to_dtype(dtype)?,
            };
            (positions, values)
        };
        // PEFT's own masks rise; another's may not.
        let mut order: Vec<u32> = (0..positions.len() as u32).collect();
        order.sort_by_key(|&i| positions[i as usize]);
        let sorted: Vec<u32> = order.iter().map(|&i| positions[i as usize]).collect();
        let values = values.index_select(&Tensor::from_vec(order, k, &Device::Cpu)?, 0)?;
        let index = SparseIndex::new(&sorted, shape)
            .map_err(|_| Error::Mismatch(format!("`{}`: two entries of shira_indices are the same", site.path)))?;
        let entries = self.fit.map_or(k, |r| r * (site.inputs + site.outputs));
        let (values, index) = (Var::from_tensor(&values)?, Arc::new(index));
        Ok(Box::new(ShiraDelta { values, index, form: self.config.form, entries }))
    }

    fn parameters(&self, site: &Site) -> Result<usize> {
        self.config.count(site)
    }

    fn activations_per_row(&self, _site: &Site) -> usize {
        0
    }

    /// Positions by row and by column.
    fn activations_fixed(&self, site: &Site) -> usize {
        3 * self.config.count(site).unwrap_or(0)
    }
}
