//! # LoRA-XS: a small square matrix between frozen singular vectors
//!
//! Bałazy et al. 2024, *LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters*, arXiv 2405.17604, section 3:
//! `y = W x + (α/r) · B R A x` with W ≈ U Σ Vᵀ, A = Σ_r V_rᵀ (r, inputs) and B = U_r (outputs, r) frozen, and R (r, r) trained from
//! N(0, σ²), σ = 1e-5 (`--set deviation=0` starts exactly at the base). The paper writes weights transposed (x W), so its A, which has the singular
//! values, is the one that the input meets first; the authors' code does the same. `--set singular_values=outputs` puts them on the other side, B = U_r Σ_r and
//! A = V_rᵀ, as files that Lorimer wrote before it had this setting have it. α is r unless given, as in the authors' runs on language models.
//!
//! Adapter folders that the authors' code saved (`…_lora_latent_mapping.weight` beside `lora_A` and `lora_B` in a file of type LORA) are read as they
//! are; their factors are in the file and are taken from it.
//!
//! Trainable parameters of a projection: `r²`, whatever its size.
//!
//! Files hold R only; A and B are found again from the base and held against a hash (`--set save_frozen=true` writes them too).
//! Since they come from W, the adapter belongs to the base in the storage it was trained with.
//!
//! Meant for: very many adapters of one base, or very little memory for the optimiser. Start: one symmetric eigenproblem a projection.
//!
//! Step time: LoRA's of the same rank, without the gradient of A.
//!
//! ```
//! use lorimer_adapter::example::project;
//! // W = diag(3, 2), r = 1: A = (3, 0), B = (1, 0)ᵀ, α/r = 1, R = 2: ΔW = diag(6, 0).
//! let settings = r#"{"r": 1, "lora_alpha": 1}"#;
//! let y = project("lora-xs", settings, &[&[3., 0.], &[0., 2.]], &[("lora_R", &[2.])], &[1., 1.]);
//! assert!((y[0] - 9.0).abs() < 1e-9 && (y[1] - 2.0).abs() < 1e-9);
//! ```

use candle_core::{DType, Result as TensorResult, Tensor, Var};
use lorimer_model::{Projection, Site};
use lorimer_tensor::linalg::truncated_svd;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::entry::{Entry, Served};
use super::random::normal;
use crate::delta::{Change, Delta};
use crate::error::{Error, Result};
use crate::file::keys::FileKeys;
use crate::method::{Method, ParameterSource};
use crate::parameter::{Parameter, Role};
use crate::settings::{PeftKeys, configure, from_peft_json, peft_json};
use crate::step::Step;
use crate::targets::Targeting;

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "lora-xs",
    title: "A small square matrix between frozen singular vectors",
    paper: "arXiv 2405.17604",
    kind: "projection",
    variants: &[],
    peft_type: "LORA_XS",
    mergeable: true,
    served: Served::Batched,
    lr: 5e-4,
    parts: &[],
    flags: &[("rank", "r"), ("alpha", "lora_alpha")],
    source: include_str!("lora_xs.rs"),
    laws: &[
        (r#"{"r": 4, "deviation": 0}"#, 0.0),
        (r#"{"r": 4, "save_frozen": true}"#, 1e-3),
        (r#"{"r": 4, "deviation": 0, "singular_values": "outputs"}"#, 0.0),
    ],
    build: |settings| {
        let mut settings = settings.clone();
        // α = r unless said otherwise.
        if let (Some(r), None) = (settings.get("r").cloned(), settings.get("lora_alpha")) {
            settings.insert("lora_alpha".into(), r);
        }
        LoraXsConfig::check(configure("lora-xs", &settings)?)
    },
    recognises: |config| config.get("peft_type").and_then(Value::as_str) == Some("LORA_XS"),
    from_file: |config| {
        let mut config = config.clone();
        // Files from before there was a choice.
        config.entry("singular_values").or_insert_with(|| "outputs".into());
        LoraXsConfig::check(from_peft_json("lora-xs", &config, &PeftKeys::NONE)?)
    },
};

/// Which factor the singular values stand in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SingularValues {
    /// A = Σ Vᵀ and B = U: the paper's and the authors' code's.
    #[default]
    Inputs,
    /// A = Vᵀ and B = U Σ.
    Outputs,
}

/// Settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraXsConfig {
    /// Which modules.
    #[serde(flatten)]
    pub targeting: Targeting,
    /// Rank r.
    pub r: usize,
    /// α; the change is multiplied by α/r.
    pub lora_alpha: f64,
    /// σ of R's start.
    pub deviation: f64,
    /// Which factor the singular values stand in: `inputs` (A = Σ Vᵀ) or `outputs` (B = U Σ).
    pub singular_values: SingularValues,
    /// Write A and B into the file too.
    pub save_frozen: bool,
}

impl Default for LoraXsConfig {
    fn default() -> Self {
        Self {
            targeting: Targeting::default(),
            r: 64,
            lora_alpha: 64.0,
            deviation: 1e-5,
            singular_values: SingularValues::Inputs,
            save_frozen: false,
        }
    }
}

impl LoraXsConfig {
    fn check(self) -> Result<Box<dyn Method>> {
        if self.r == 0 || !self.lora_alpha.is_finite() || !(0.0..1e3).contains(&self.deviation) {
            return Err(Error::Config(
                "`r` should be at least 1, `lora_alpha` finite and `deviation` between 0 and 1000".into(),
            ));
        }
        Ok(Box::new(LoraXs { config: self }))
    }
}

/// Refuses a rank that a projection does not have.
pub(super) fn check_rank(r: usize, site: &Site) -> Result<()> {
    let most = site.inputs.min(site.outputs);
    match r <= most {
        true => Ok(()),
        false => Err(Error::Config(format!(
            "rank {r} is more than `{}` ({}, {}) has; it needs at most {most}",
            site.path, site.outputs, site.inputs
        ))),
    }
}

struct LoraXs {
    config: LoraXsConfig,
}

impl Method for LoraXs {
    fn name(&self) -> &'static str {
        "lora-xs"
    }

    fn targeting(&self) -> &Targeting {
        &self.config.targeting
    }

    fn config(&self) -> Map<String, Value> {
        peft_json("LORA_XS", &self.config)
    }

    fn file_keys(&self) -> FileKeys {
        FileKeys::of_modules(&["lora_R", "lora_A", "lora_B"])
    }

    fn attach(&self, site: &Site, base: &Projection, source: &mut ParameterSource<'_>) -> Result<Box<dyn Delta>> {
        let c = &self.config;
        let r = c.r;
        check_rank(r, site)?;
        let small = source.trainable("lora_R", &[r, r], |rng| Ok((normal((r, r), rng)? * c.deviation)?))?;
        let mut factors = None;
        let mut of = |first: bool| -> Result<Tensor> {
            if factors.is_none() {
                let (u, s, vt) = truncated_svd(&base.dense(DType::F64)?, r)?;
                factors = Some(match c.singular_values {
                    SingularValues::Inputs => (vt.broadcast_mul(&s.unsqueeze(1)?)?, u),
                    SingularValues::Outputs => (vt, u.broadcast_mul(&s)?),
                });
            }
            let found = factors.as_ref().map(|(a, b)| if first { a.clone() } else { b.clone() });
            found.ok_or_else(|| Error::Config("no factors".into()))
        };
        let a = source.frozen("lora_A", &[r, site.inputs], || of(true))?;
        let b = source.frozen("lora_B", &[site.outputs, r], || of(false))?;
        let scaling = c.lora_alpha / r as f64;
        Ok(Box::new(SmallDelta { r: small, a, b, scaling, save_frozen: c.save_frozen.then_some(source.dtype()) }))
    }

    fn parameters(&self, _site: &Site) -> Result<usize> {
        Ok(self.config.r * self.config.r)
    }

    fn activations_per_row(&self, _site: &Site) -> usize {
        self.config.r
    }

    fn activations_fixed(&self, site: &Site) -> usize {
        self.config.r * (site.inputs + 3 * site.outputs)
    }
}

/// s·B R A with A and B frozen: LoRA-XS's and LoRA-SB's form.
pub(super) struct SmallDelta {
    /// R (r, r).
    pub(super) r: Var,
    /// (r, inputs).
    pub(super) a: Tensor,
    /// (outputs, r).
    pub(super) b: Tensor,
    pub(super) scaling: f64,
    /// The type in which A and B are written, if they are.
    pub(super) save_frozen: Option<DType>,
}

impl Delta for SmallDelta {
    fn change(&self, _base: &Projection, _rows: usize, _step: &Step) -> TensorResult<Change> {
        let b = self.b.matmul(&self.r)?;
        Ok(Change::low_rank(self.a.clone(), b, self.scaling))
    }

    fn parameters(&self) -> Vec<Parameter<'_>> {
        vec![Parameter::new("lora_R", &self.r, Role::Core)]
    }

    fn frozen(&self) -> Vec<(&'static str, &Tensor)> {
        vec![("lora_A", &self.a), ("lora_B", &self.b)]
    }

    fn stored(&self) -> TensorResult<Vec<(&'static str, Tensor)>> {
        let mut all = vec![("lora_R", self.r.detach())];
        if let Some(dtype) = self.save_frozen {
            all.push(("lora_A", self.a.to_dtype(dtype)?));
            all.push(("lora_B", self.b.to_dtype(dtype)?));
        }
        Ok(all)
    }

    fn has_effect(&self, base: &Projection) -> TensorResult<bool> {
        // R starts at noise of 1e-5, which is nothing yet beside W.
        let dense = base.dense(self.a.dtype())?;
        let merged = self.merged(base)?.unwrap_or_else(|_| dense.clone());
        Ok(crate::delta::largest(&(merged - &dense)?)? > 1e-4 * crate::delta::largest(&dense)?)
    }
}
