//! # VeRA: trained vectors on shared random matrices
//!
//! Kopiczko et al. 2023, *VeRA: Vector-based Random Matrix Adaptation*, arXiv 2310.11454, eq. 2: `y = W x + Λ_b B Λ_d A x` with A (r,
//! inputs) and B (outputs, r) random, frozen and shared by all projections (sized for the largest, sliced for the others), and the
//! diagonals λ_d (r), which starts at `d_initial`, and λ_b (outputs), which starts at zero.
//!
//! A and B follow from `projection_prng_key` by torch's generator, as in PEFT, so that files hold the vectors only (`save_projection`
//! false, our default; `--set save_projection=true` writes PEFT's full form).
//!
//! Trainable parameters of a projection: `r + outputs`.
//!
//! Meant for: files of some hundred kilobytes without a look at the base. Wants a high learning rate.
//!
//! Step time: LoRA's of rank r without the gradient of A; at r = 256 that is about 1.9 × the work of LoRA at rank 8 on SmolLM2-135M.
//!
//! ```
//! use lorimer_adapter::example::project;
//! // With λ_b = 0 nothing changes, whatever λ_d is.
//! let y = project("vera", r#"{"r": 2}"#, &[&[3., 4.], &[5., 6.]], &[("vera_lambda_d", &[7., 8.])], &[1., 1.]);
//! assert_eq!(y, [7.0, 11.0]);
//! ```

use candle_core::{Device, Result as TensorResult, Tensor, Var};
use lorimer_model::{Projection, Site};
use lorimer_tensor::scaled_bases;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::entry::{Entry, Served};
use super::mt19937::TorchGenerator;
use super::slices::Slices;
use crate::delta::{Change, Delta};
use crate::dropout::{Dropout, check_dropout};
use crate::error::{Error, Result};
use crate::file::keys::FileKeys;
use crate::method::{Bias, CalibrationStats, Method, ParameterSource};
use crate::parameter::{Parameter, Role};
use crate::settings::{PeftKeys, configure, from_peft_json, peft_json};
use crate::step::Step;
use crate::targets::Targeting;

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "vera",
    title: "Trained vectors on shared random matrices",
    paper: "arXiv 2310.11454",
    kind: "projection",
    variants: &[],
    peft_type: "VERA",
    mergeable: true,
    served: Served::Batched,
    lr: 1e-2,
    parts: &[],
    flags: &[("rank", "r"), ("dropout", "vera_dropout"), ("bias", "bias")],
    source: include_str!("vera.rs"),
    laws: &[
        (r#"{"r": 12}"#, 0.0),
        (r#"{"r": 9, "save_projection": true, "projection_prng_key": 5, "bias": "all"}"#, 0.0),
        (r#"{"r": 12, "vera_dropout": 0.2}"#, 0.0),
    ],
    build: |settings| VeraConfig::check(configure("vera", settings)?),
    recognises: |config| config.get("peft_type").and_then(Value::as_str) == Some("VERA"),
    from_file: |config| {
        VeraConfig::check(from_peft_json("vera", config, &PeftKeys { inert: &["init_weights"], refused: &[] })?)
    },
};

/// PEFT's `VeraConfig`, with PEFT's keys.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VeraConfig {
    /// Which modules.
    #[serde(flatten)]
    pub targeting: Targeting,
    /// Rank of the shared matrices.
    pub r: usize,
    /// Seed of the shared matrices.
    pub projection_prng_key: u64,
    /// Write the shared matrices into the file, as PEFT does by default.
    pub save_projection: bool,
    /// Probability of zeroing an element of x before A, in training.
    pub vera_dropout: f64,
    /// What λ_d starts at.
    pub d_initial: f64,
    /// Which biases are trained.
    pub bias: Bias,
}

impl Default for VeraConfig {
    fn default() -> Self {
        Self {
            targeting: Targeting::default(),
            r: 256,
            projection_prng_key: 0,
            save_projection: false,
            vera_dropout: 0.0,
            d_initial: 0.1,
            bias: Bias::None,
        }
    }
}

impl VeraConfig {
    fn check(self) -> Result<Box<dyn Method>> {
        if self.r == 0 || self.r > 1 << 16 || !self.d_initial.is_finite() {
            return Err(Error::Config("`r` should be between 1 and 65536, and `d_initial` finite".into()));
        }
        check_dropout("vera_dropout", self.vera_dropout)?;
        Ok(Box::new(Vera { config: self, given: (None, None), shared: None, slices: Slices::default() }))
    }
}

struct Vera {
    config: VeraConfig,
    /// A and B out of a file.
    given: (Option<Tensor>, Option<Tensor>),
    /// A (r, most inputs) and B (most outputs, r).
    shared: Option<(Tensor, Tensor)>,
    /// Their slices in the compute type.
    slices: Slices,
}

impl Method for Vera {
    fn name(&self) -> &'static str {
        "vera"
    }

    fn targeting(&self) -> &Targeting {
        &self.config.targeting
    }

    fn bias(&self) -> Bias {
        self.config.bias
    }

    fn config(&self) -> Map<String, Value> {
        let mut all = peft_json("VERA", &self.config);
        if self.config.bias == Bias::LoraOnly {
            all.insert("bias".into(), json!("vera_only"));
        }
        all
    }

    fn peft_lacks(&self) -> &'static [&'static str] {
        &["exclude_modules"]
    }

    fn take_shared(&mut self, name: &str, tensor: &Tensor) -> bool {
        match name {
            "base_model.vera_A" => self.given.0 = Some(tensor.clone()),
            "base_model.vera_B" => self.given.1 = Some(tensor.clone()),
            _ => return false,
        }
        true
    }

    fn resolve(&mut self, targeted: &[&Site], _stats: &CalibrationStats) -> Result<()> {
        let r = self.config.r;
        let inputs = targeted.iter().map(|s| s.inputs).max().unwrap_or(0);
        let outputs = targeted.iter().map(|s| s.outputs).max().unwrap_or(0);
        self.shared = Some(match (self.given.0.take(), self.given.1.take()) {
            (Some(a), Some(b)) if a.dims() == [r, inputs] && b.dims() == [outputs, r] => (a, b),
            (Some(a), Some(b)) => {
                return Err(Error::Mismatch(format!(
                    "vera_A has shape {:?} and vera_B {:?}; the configuration and the base say [{r}, {inputs}] and [{outputs}, {r}]",
                    a.dims(),
                    b.dims()
                )));
            }
            _ => {
                let mut torch = TorchGenerator::new(self.config.projection_prng_key);
                // torch's Kaiming for a = 0: uniform in ±√3 · √2/√fan_in.
                let bound = |fan_in: usize| 3f64.sqrt() * (2f64.sqrt() / (fan_in.max(1) as f64).sqrt());
                let a = torch.uniform(r * inputs, bound(inputs));
                let b = torch.uniform(outputs * r, bound(r));
                (Tensor::from_vec(a, (r, inputs), &Device::Cpu)?, Tensor::from_vec(b, (outputs, r), &Device::Cpu)?)
            }
        });
        Ok(())
    }

    fn shared(&self) -> TensorResult<Vec<(String, Tensor)>> {
        let Some((a, b)) = self.shared.as_ref().filter(|_| self.config.save_projection) else { return Ok(Vec::new()) };
        Ok(vec![("base_model.vera_A".into(), a.clone()), ("base_model.vera_B".into(), b.clone())])
    }

    fn file_keys(&self) -> FileKeys {
        FileKeys {
            module: &["vera_lambda_d", "vera_lambda_b", "vera_A", "vera_B"],
            block: &[],
            adapter: &["base_model.vera_A", "base_model.vera_B", "base_model.model.vera_A", "base_model.model.vera_B"],
        }
    }

    fn attach(&self, site: &Site, _base: &Projection, source: &mut ParameterSource<'_>) -> Result<Box<dyn Delta>> {
        let (r, dtype) = (self.config.r, source.dtype());
        let (a, b) = self.shared.as_ref().ok_or_else(|| Error::Config("vera targets nothing".into()))?;
        if site.inputs > a.dim(1)? || site.outputs > b.dim(0)? {
            return Err(Error::Mismatch(format!("the shared matrices are too small for `{}`", site.path)));
        }
        // PEFT writes them once more for every module.
        source.optional("vera_A", a.dims())?;
        source.optional("vera_B", b.dims())?;
        let lambda_d =
            source.trainable("vera_lambda_d", &[r], |_| Ok(Tensor::full(self.config.d_initial, r, &Device::Cpu)?))?;
        let zero = Tensor::zeros(site.outputs, dtype, &Device::Cpu)?;
        let lambda_b = source.trainable("vera_lambda_b", &[site.outputs], |_| Ok(zero))?;
        let slice = |t: &Tensor, axis: usize, length: usize| -> Result<Tensor> {
            Ok(t.narrow(axis, 0, length)?.to_dtype(dtype)?.contiguous()?)
        };
        let a = self.slices.get(('a', site.inputs, r), || slice(a, 1, site.inputs))?;
        let b = self.slices.get(('b', site.outputs, r), || slice(b, 0, site.outputs))?;
        let dropout = Dropout::new(self.config.vera_dropout, &site.path);
        Ok(Box::new(VeraDelta { lambda_b, lambda_d, mark: a.narrow(0, 0, 1)?.contiguous()?, a, b, dropout }))
    }

    fn parameters(&self, site: &Site) -> Result<usize> {
        Ok(self.config.r + site.outputs)
    }

    fn rows_are_independent(&self) -> bool {
        self.config.vera_dropout == 0.0
    }

    fn activations_per_row(&self, site: &Site) -> usize {
        self.config.r + if self.config.vera_dropout > 0.0 { site.inputs } else { 0 }
    }

    fn activations_fixed(&self, site: &Site) -> usize {
        self.config.r * site.outputs
    }
}

struct VeraDelta {
    /// (outputs).
    lambda_b: Var,
    /// (r).
    lambda_d: Var,
    /// (r, inputs).
    a: Tensor,
    /// (outputs, r).
    b: Tensor,
    /// A's first row, which stands for both.
    mark: Tensor,
    dropout: Dropout,
}

impl Delta for VeraDelta {
    fn change(&self, _base: &Projection, _rows: usize, _step: &Step) -> TensorResult<Change> {
        // Both diagonals on B, so that A stays as it is and needs no gradient.
        let b = scaled_bases(&self.b, &self.lambda_b.unsqueeze(1)?, &self.lambda_d.unsqueeze(0)?)?;
        Ok(Change::low_rank(self.a.clone(), b, 1.0))
    }

    fn dropout(&self) -> Option<&Dropout> {
        Some(&self.dropout)
    }

    fn parameters(&self) -> Vec<Parameter<'_>> {
        vec![
            Parameter::new("vera_lambda_b", &self.lambda_b, Role::Magnitude),
            Parameter::new("vera_lambda_d", &self.lambda_d, Role::Magnitude),
        ]
    }

    fn frozen(&self) -> Vec<(&'static str, &Tensor)> {
        vec![("vera_A", &self.mark)]
    }
}
