//! # NLoRA: three factors, started by Nyström's method, or only the middle one trained
//!
//! Guo et al. 2025, *NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models*, arXiv 2502.14482, sections 3.1 to 3.3:
//! `y = W x + (α/r) · B N A x` with A (r, inputs), N (r, r), B (outputs, r).
//!
//! - `slora` (structured): A and N uniform in ±1/√columns, B zero; all three trained.
//! - `nlora` (Nyström): A = W[rows, :], B = W[:, columns], N = the pseudo-inverse of W[rows, columns], so that B N A ≈ W (equal where
//!   W has rank r); all three trained, counted from that start, so that the start is the base.
//! - `inttune`: A and B as in `nlora` and frozen, N trained (`--set inttune_start=slora`: A, B and N random).
//!
//! `sampling` chooses rows and columns: `first` (the paper's), `uniform`, or `norm` (with probability by squared norm), by
//! `start_seed`. `--set start=code` does as the published code does instead: N = W[rows, columns] itself and nothing subtracted, so that the
//! start is not the base.
//!
//! Trainable parameters of a projection: `r · (inputs + outputs) + r²` (slora, nlora), `r²` (inttune).
//!
//! Files hold what is trained; slices of W are found again from the base and held against a hash.
//!
//! Meant for: a start from W that costs r³ instead of a singular value decomposition. Each variant wants a rate of its own: the pseudo-inverse makes
//! the gradients of `nlora` large, so that it takes 5e-6 where `slora` takes 1e-3 and `inttune`, whose N alone moves, 0.04/r (at 5e-6 it hardly learns).
//! With `start=code` `nlora` takes 1e-3. The authors' scripts have 2e-4 for all, at rank 128 on a model of 7B.
//!
//! Step time: LoRA's of rank r (slora, inttune) or 2r (nlora, whose start is subtracted).
//!
//! ```
//! use lorimer_adapter::example::project;
//! // slora, r = 1, α = 2: ΔW = 2 · b n a = 2 · (1, 3)ᵀ · 5 · (1, 1).
//! let settings = r#"{"r": 1, "lora_alpha": 2, "variant": "slora"}"#;
//! let parameters: &[(&str, &[f64])] = &[("lora_A", &[1., 1.]), ("lora_N", &[5.]), ("lora_B", &[1., 3.])];
//! let y = project("nlora", settings, &[&[0., 0.], &[0., 0.]], parameters, &[1., 2.]);
//! assert_eq!(y, [30.0, 90.0]);
//! ```

use candle_core::{DType, Device, Result as TensorResult, Tensor, Var};
use lorimer_model::{Projection, Site};
use lorimer_tensor::linalg::pinv;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::entry::{Entry, Served};
use super::lora_xs::check_rank;
use super::random::kaiming;
use crate::delta::{Change, Delta};
use crate::error::{Error, Result};
use crate::file::keys::FileKeys;
use crate::method::{Method, ParameterSource};
use crate::parameter::{Parameter, Role};
use crate::settings::{PeftKeys, configure, from_peft_json, peft_json};
use crate::step::{Step, site_seed};
use crate::targets::Targeting;

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "nlora",
    title: "Three factors with a Nyström start, or the middle one alone",
    paper: "arXiv 2502.14482",
    kind: "projection",
    variants: &["nlora", "slora", "inttune"],
    peft_type: "NLORA",
    mergeable: true,
    served: Served::Batched,
    lr: 5e-6,
    parts: &[],
    flags: &[("rank", "r"), ("alpha", "lora_alpha"), ("init", "start")],
    source: include_str!("nlora.rs"),
    laws: &[
        (r#"{"r": 3}"#, 0.0),
        (r#"{"r": 3, "sampling": "uniform", "start_seed": 4}"#, 0.0),
        (r#"{"r": 3, "variant": "slora"}"#, 0.0),
        (r#"{"r": 3, "variant": "inttune", "sampling": "norm"}"#, 0.0),
        (r#"{"r": 4, "variant": "inttune", "inttune_start": "slora"}"#, 0.0),
        // What the published code starts from is not the base.
        (r#"{"r": 2, "start": "code"}"#, f64::INFINITY),
    ],
    build: |settings| {
        let mut settings = settings.clone();
        if let (Some(r), None) = (settings.get("r").cloned(), settings.get("lora_alpha")) {
            settings.insert("lora_alpha".into(), r);
        }
        NloraConfig::check(configure("nlora", &settings)?)
    },
    recognises: |config| config.get("peft_type").and_then(Value::as_str) == Some("NLORA"),
    from_file: |config| NloraConfig::check(from_peft_json("nlora", config, &PeftKeys::NONE)?),
};

/// What is trained and how it begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variant {
    /// All three, from slices of W.
    #[default]
    Nlora,
    /// All three, from random A and N.
    Slora,
    /// N alone.
    Inttune,
}

/// What the Nyström start is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// N is the pseudo-inverse, and the start is subtracted.
    #[default]
    Paper,
    /// N is the slice itself, and nothing is subtracted.
    Code,
}

/// Which rows and columns of W are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sampling {
    /// The first.
    #[default]
    First,
    /// Any, with equal probability.
    Uniform,
    /// Any, with probability by squared norm.
    Norm,
}

/// Settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NloraConfig {
    /// Which modules.
    #[serde(flatten)]
    pub targeting: Targeting,
    /// Rank r.
    pub r: usize,
    /// α; the change is multiplied by α/r.
    pub lora_alpha: f64,
    /// What is trained and how it begins.
    pub variant: Variant,
    /// What the Nyström start is.
    pub start: Start,
    /// With `inttune`: what A, B and N begin as.
    pub inttune_start: Variant,
    /// Which rows and columns of W are taken.
    pub sampling: Sampling,
    /// Singular values below this times the largest count as zero in the pseudo-inverse.
    pub rcond: f64,
    /// Seed of sampling and of frozen random factors.
    pub start_seed: u64,
}

impl Default for NloraConfig {
    fn default() -> Self {
        Self {
            targeting: Targeting::default(),
            r: 8,
            lora_alpha: 8.0,
            variant: Variant::Nlora,
            start: Start::Paper,
            inttune_start: Variant::Nlora,
            sampling: Sampling::First,
            rcond: 1e-6,
            start_seed: 0,
        }
    }
}

impl NloraConfig {
    fn check(self) -> Result<Box<dyn Method>> {
        let fail = |text: &str| Err(Error::Config(text.into()));
        if self.r == 0 || !self.lora_alpha.is_finite() || !(0.0..1.0).contains(&self.rcond) {
            return fail("`r` should be at least 1, `lora_alpha` finite and `rcond` at least 0 and below 1");
        }
        if self.inttune_start == Variant::Inttune {
            return fail("inttune_start should be nlora or slora");
        }
        Ok(Box::new(Nlora { config: self }))
    }
}

struct Nlora {
    config: NloraConfig,
}

/// `count` different places of `weights.len()`, in rising order.
fn sample(weights: &[f64], count: usize, sampling: Sampling, rng: &mut ChaCha8Rng) -> Vec<u32> {
    // The largest of log(u)/w are a weighted sample without replacement (Efraimidis and Spirakis 2006).
    let key = |rng: &mut ChaCha8Rng, w: f64| match sampling {
        Sampling::First => 0.0,
        Sampling::Uniform => (1.0 - rng.random::<f64>()).ln(),
        Sampling::Norm => (1.0 - rng.random::<f64>()).ln() / w.max(1e-300),
    };
    let mut keys: Vec<(f64, u32)> = weights.iter().enumerate().map(|(i, w)| (key(rng, *w), i as u32)).collect();
    keys.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut places: Vec<u32> = keys.into_iter().take(count).map(|(_, i)| i).collect();
    places.sort_unstable();
    places
}

impl Nlora {
    fn nystrom(&self, site: &Site, base: &Projection) -> Result<[Tensor; 3]> {
        let (c, r) = (&self.config, self.config.r);
        let w = base.dense(DType::F64)?;
        let mut rng = ChaCha8Rng::seed_from_u64(site_seed(c.start_seed, &site.path));
        let norms = |axis| -> Result<Vec<f64>> { Ok(w.sqr()?.sum(axis)?.to_vec1::<f64>()?) };
        let rows = Tensor::new(sample(&norms(1)?, r, c.sampling, &mut rng), &Device::Cpu)?;
        let columns = Tensor::new(sample(&norms(0)?, r, c.sampling, &mut rng), &Device::Cpu)?;
        let (a, b) = (w.index_select(&rows, 0)?, w.index_select(&columns, 1)?);
        let core = a.index_select(&columns, 1)?.contiguous()?;
        let n = match c.start {
            Start::Paper => pinv(&core, c.rcond)?,
            Start::Code => core,
        };
        Ok([a, n, b])
    }

    /// Random A and N; B zero, or random too where it is frozen, since nothing could be trained behind a zero.
    fn structured(&self, site: &Site, frozen: bool, rng: &mut ChaCha8Rng) -> Result<[Tensor; 3]> {
        let r = self.config.r;
        let a = kaiming((r, site.inputs), DType::F64, rng)?;
        let n = kaiming((r, r), DType::F64, rng)?;
        let b = match frozen {
            true => kaiming((site.outputs, r), DType::F64, rng)?,
            false => Tensor::zeros((site.outputs, r), DType::F64, &Device::Cpu)?,
        };
        Ok([a, n, b])
    }
}

impl Method for Nlora {
    fn name(&self) -> &'static str {
        "nlora"
    }

    fn targeting(&self) -> &Targeting {
        &self.config.targeting
    }

    fn config(&self) -> Map<String, Value> {
        peft_json("NLORA", &self.config)
    }

    fn learning_rate(&self) -> Option<f64> {
        match (self.config.variant, self.config.start) {
            (Variant::Slora, _) => Some(1e-3),
            // Sweeps at ranks 8, 16 and 64 end at 1e-2 (5e-3 as good), 2e-3 and 5e-4.
            (Variant::Inttune, _) => Some(0.04 / self.config.r as f64),
            (Variant::Nlora, Start::Code) => Some(1e-3),
            // The registry's line: the pseudo-inverse makes gradients large.
            (Variant::Nlora, Start::Paper) => None,
        }
    }

    fn file_keys(&self) -> FileKeys {
        FileKeys::of_modules(&["lora_A", "lora_N", "lora_B"])
    }

    fn attach(&self, site: &Site, base: &Projection, source: &mut ParameterSource<'_>) -> Result<Box<dyn Delta>> {
        let (c, r, dtype) = (&self.config, self.config.r, source.dtype());
        check_rank(r, site)?;
        let shapes = [[r, site.inputs], [r, r], [site.outputs, r]];
        let scaling = c.lora_alpha / r as f64;
        if c.variant == Variant::Slora {
            let mut start = None;
            let a = source.trainable("lora_A", &shapes[0], |rng| {
                let [a, n, b] = self.structured(site, false, rng)?;
                start = Some((n, b));
                Ok(a)
            })?;
            let (n, b) = start.unzip();
            let none = || Error::Config("no start".into());
            let n = source.trainable("lora_N", &shapes[1], |_| n.ok_or_else(none))?;
            let b = source.trainable("lora_B", &shapes[2], |_| b.ok_or_else(none))?;
            return Ok(Box::new(NloraDelta { outer: Outer::Trained(a, b), n, origin: None, scaling }));
        }
        let start = match (c.variant, c.inttune_start) {
            (Variant::Inttune, Variant::Slora) => {
                self.structured(site, true, &mut ChaCha8Rng::seed_from_u64(site_seed(c.start_seed, &site.path)))?
            }
            _ => self.nystrom(site, base)?,
        };
        let exact = |t: &Tensor| t.to_dtype(dtype)?.contiguous();
        let [a0, n0, b0] = [exact(&start[0])?, exact(&start[1])?, exact(&start[2])?];
        let subtract = c.start == Start::Paper || (c.variant, c.inttune_start) == (Variant::Inttune, Variant::Slora);
        if c.variant == Variant::Inttune {
            let n = source.trainable("lora_N", &shapes[1], |_| Ok(n0.clone()))?;
            let origin = subtract.then_some((a0.clone(), n0, b0.clone()));
            return Ok(Box::new(NloraDelta { outer: Outer::Frozen(a0, b0), n, origin, scaling }));
        }
        let a = source.trainable("lora_A", &shapes[0], |_| Ok(a0.copy()?))?;
        let n = source.trainable("lora_N", &shapes[1], |_| Ok(n0.copy()?))?;
        let b = source.trainable("lora_B", &shapes[2], |_| Ok(b0.copy()?))?;
        let origin = subtract.then_some((a0, n0, b0));
        Ok(Box::new(NloraDelta { outer: Outer::Trained(a, b), n, origin, scaling }))
    }

    fn parameters(&self, site: &Site) -> Result<usize> {
        let r = self.config.r;
        Ok(match self.config.variant {
            Variant::Inttune => r * r,
            _ => r * (site.inputs + site.outputs) + r * r,
        })
    }

    fn activations_per_row(&self, _site: &Site) -> usize {
        if self.config.variant == Variant::Nlora { 2 * self.config.r } else { self.config.r }
    }

    fn activations_fixed(&self, site: &Site) -> usize {
        let sides = site.inputs + site.outputs;
        match self.config.variant {
            Variant::Slora => self.config.r * 2 * site.outputs,
            Variant::Nlora => self.config.r * (3 * sides + 2 * site.outputs),
            Variant::Inttune => self.config.r * (sides + 2 * site.outputs),
        }
    }
}

/// A (r, inputs) and B (outputs, r).
enum Outer {
    Trained(Var, Var),
    Frozen(Tensor, Tensor),
}

struct NloraDelta {
    outer: Outer,
    /// (r, r).
    n: Var,
    /// A₀, N₀ and B₀, where the start is subtracted.
    origin: Option<(Tensor, Tensor, Tensor)>,
    scaling: f64,
}

impl Delta for NloraDelta {
    fn change(&self, _base: &Projection, _rows: usize, _step: &Step) -> TensorResult<Change> {
        let low = match (&self.outer, &self.origin) {
            (Outer::Trained(a, b), None) => (a.as_tensor().clone(), b.matmul(&self.n)?),
            (Outer::Trained(a, b), Some((a0, n0, b0))) => {
                // B N A − B₀N₀A₀ in terms that are small where the change is: (B (N − N₀) + (B − B₀) N₀) A + B₀N₀ (A − A₀).
                let first = (b.matmul(&(self.n.as_tensor() - n0)?)? + (b.as_tensor() - b0)?.matmul(n0)?)?;
                let a = Tensor::cat(&[a.as_tensor().clone(), (a.as_tensor() - a0)?], 0)?;
                (a, Tensor::cat(&[first, b0.matmul(n0)?], 1)?)
            }
            (Outer::Frozen(a, b), None) => (a.clone(), b.matmul(&self.n)?),
            // B N₀ and B N would each round, their difference of one product does not.
            (Outer::Frozen(a, b), Some((_, n0, _))) => (a.clone(), b.matmul(&(self.n.as_tensor() - n0)?)?),
        };
        Ok(Change::low_rank(low.0, low.1, self.scaling))
    }

    fn parameters(&self) -> Vec<Parameter<'_>> {
        match &self.outer {
            Outer::Trained(a, b) => vec![
                Parameter::new("lora_A", a, Role::A),
                Parameter::new("lora_N", &self.n, Role::Core),
                Parameter::new("lora_B", b, Role::B),
            ],
            Outer::Frozen(..) => vec![Parameter::new("lora_N", &self.n, Role::Core)],
        }
    }

    fn frozen(&self) -> Vec<(&'static str, &Tensor)> {
        match (&self.outer, &self.origin) {
            (_, Some((a, n, b))) => vec![("lora_A", a), ("lora_N", n), ("lora_B", b)],
            (Outer::Frozen(a, b), None) => vec![("lora_A", a), ("lora_B", b)],
            (Outer::Trained(..), None) => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use lorimer_tensor::FrozenWeight;
    use serde_json::json;

    use super::*;
    use crate::delta::largest;
    use crate::method::CalibrationStats;

    fn attach(settings: Value, w: &Tensor) -> Result<Box<dyn Delta>> {
        let base = Projection { weight: FrozenWeight::Dense(w.clone()), bias: None };
        let method = crate::methods::build("nlora", settings.as_object().unwrap())?;
        let site = Site::new("p", w.dims2()?);
        let stats = CalibrationStats::new();
        method.attach(&site, &base, &mut ParameterSource::start(&site, DType::F64, 0, &stats))
    }

    /// Where W has rank r, B N A = W (Nyström's identity), whichever rows and columns are taken.
    #[test]
    fn a_matrix_of_rank_r_is_given_back() -> Result<()> {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let w = kaiming((9, 3), DType::F64, &mut rng)?.matmul(&kaiming((3, 7), DType::F64, &mut rng)?)?;
        for sampling in ["first", "uniform", "norm"] {
            let delta = attach(json!({ "r": 3, "lora_alpha": 3, "sampling": sampling }), &w)?;
            let t: Vec<&Tensor> = delta.frozen().into_iter().map(|(_, t)| t).collect();
            let product = t[2].matmul(t[1])?.matmul(t[0])?;
            assert!(largest(&(product - &w)?)? < 1e-9 * largest(&w)?, "{sampling}");
        }
        Ok(())
    }

    #[test]
    fn the_codes_start_is_not_the_base() -> Result<()> {
        let w = kaiming((6, 5), DType::F64, &mut ChaCha8Rng::seed_from_u64(3))?;
        let base = Projection { weight: FrozenWeight::Dense(w.clone()), bias: None };
        assert!(attach(json!({ "r": 2, "start": "code" }), &w)?.has_effect(&base)?);
        assert!(!attach(json!({ "r": 2 }), &w)?.has_effect(&base)?);
        Ok(())
    }
}
