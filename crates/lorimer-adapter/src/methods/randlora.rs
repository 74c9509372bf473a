//! # RandLoRA: a full-rank update out of frozen random bases
//!
//! Albert et al. 2025, *RandLoRA: Full-rank parameter-efficient fine-tuning of large models*, arXiv 2502.00987, section 3. With d
//! the smaller and D the larger side of W, and N = ⌈d/r⌉ bases: `ΔW = (α/r) Σⱼ Bⱼ diag(Λ₋ⱼ) A diag(Γⱼ₋)` (or its transpose, so that Γ
//! acts on the smaller side). Frozen and shared by all projections (sized for the largest, sliced for the others): A (r, 1, d_max), B (D_max,
//! N_max, r). Trained in each: Λ (r, N), zero at the start, and Γ (N, d), at 1/max(N, d).
//!
//! The scale α/r with α = 20 r is PEFT's. The authors' own code has α/(r √N) with α = 2 r, which is 10 √N times less (42 times for r = 32 and d = 576,
//! 113 for d = 4096): `--set scale=authors` trains so. Its files say the same in PEFT's terms, with 1/√N in Γ, so that PEFT loads them.
//!
//! The bases follow from `projection_prng_key` by torch's generator, bit for bit as in PEFT, so that files hold Λ and Γ only
//! (`save_projection` false, our default; `--set save_projection=true` writes PEFT's full form).
//!
//! Trainable parameters of a projection: `N · (r + d)`; smaller r means more of them.
//!
//! Meant for: where low rank is the limit. Not where time is.
//!
//! Step time: the change has full rank, so that a row costs `N r (inputs + outputs)` multiply-adds, three times a step, where LoRA's
//! costs nearly nothing; or the weight is formed once a step for `outputs · inputs · N r`, which wins for many rows (the cheaper one is
//! taken). For 300 rows on SmolLM2-135M the floor is about 2.6× LoRA's step.
//!
//! ```
//! use lorimer_adapter::example::project;
//! // One base (r = 1, d = 1): ΔW = α · B λ A γ, and A and B of one number each over their deviation would be infinite, so
//! // two inputs: d = 1, D = 2. With λ = 0 nothing changes.
//! let settings = r#"{"r": 1, "randlora_alpha": 1}"#;
//! let y = project("randlora", settings, &[&[3., 4.], &[5., 6.]], &[("randlora_lambda", &[0., 0.])], &[1., 1.]);
//! assert_eq!(y, [7.0, 11.0]);
//! ```

use candle_core::{DType, Device, Result as TensorResult, Tensor, Var};
use lorimer_model::{Projection, Site};
use lorimer_tensor::scaled_bases;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::entry::{Entry, Served};
use super::mt19937::{TorchGenerator, over_deviation, over_deviation_bf16, tensor_bf16};
use super::slices::Slices;
use crate::delta::{Change, Delta, LowRank};
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
    name: "randlora",
    title: "Full-rank update out of frozen random bases",
    paper: "arXiv 2502.00987",
    kind: "projection",
    variants: &["dense", "sparse", "very_sparse"],
    peft_type: "RANDLORA",
    mergeable: true,
    served: Served::Converted,
    lr: 5e-4,
    parts: &[],
    flags: &[("rank", "r"), ("alpha", "randlora_alpha"), ("dropout", "randlora_dropout"), ("bias", "bias")],
    source: include_str!("randlora.rs"),
    laws: &[
        (r#"{"r": 3, "randlora_alpha": 6}"#, 1e-12),
        (r#"{"r": 4, "randlora_alpha": 8, "variant": "sparse", "save_projection": true}"#, 1e-12),
        (r#"{"r": 5, "randlora_alpha": 4, "variant": "very_sparse", "randlora_dropout": 0.2}"#, 1e-12),
        (r#"{"r": 3, "scale": "authors"}"#, 1e-12),
    ],
    build: |settings| {
        let mut settings = settings.clone();
        match settings.remove("variant").as_ref().map(|v| v.as_str().unwrap_or_default()) {
            None | Some("dense") => {}
            Some(name @ ("sparse" | "very_sparse")) => {
                settings.insert(name.into(), json!(true));
            }
            Some(_) => return Err(Error::Config("variant should be dense, sparse or very_sparse".into())),
        }
        let given = settings.contains_key("randlora_alpha");
        let mut config: RandLoraConfig = configure("randlora", &settings)?;
        if !given {
            config.randlora_alpha = config.r as f64 * if config.scale == Scale::Peft { 20.0 } else { 2.0 };
        }
        config.check()
    },
    recognises: |config| config.get("peft_type").and_then(Value::as_str) == Some("RANDLORA"),
    from_file: |config| RandLoraConfig::check(from_peft_json("randlora", config, &PeftKeys::NONE)?),
};

/// What the change is multiplied by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scale {
    /// α/r.
    #[default]
    Peft,
    /// α/(r √N).
    Authors,
}

/// PEFT's `RandLoraConfig`, with PEFT's keys.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RandLoraConfig {
    /// Which modules.
    #[serde(flatten)]
    pub targeting: Targeting,
    /// Rank of one base.
    pub r: usize,
    /// α; the change is multiplied by α/r. If not given twenty times r, with `scale=authors` twice r.
    pub randlora_alpha: f64,
    /// What the change is multiplied by: `peft` (α/r) or `authors` (α/(r √N)).
    pub scale: Scale,
    /// Probability of zeroing an element of x before the bases, in training.
    pub randlora_dropout: f64,
    /// Seed of the bases.
    pub projection_prng_key: u64,
    /// Write the bases into the file, as PEFT does by default.
    pub save_projection: bool,
    /// Bases of −1, 0 and 1 with probabilities 1/6, 2/3 and 1/6.
    pub sparse: bool,
    /// The same with 1/(2√d) for −1 and for 1.
    pub very_sparse: bool,
    /// Which biases are trained.
    pub bias: Bias,
    /// Λ zero (true), or random.
    pub init_weights: bool,
}

impl Default for RandLoraConfig {
    fn default() -> Self {
        Self {
            targeting: Targeting::default(),
            r: 32,
            randlora_alpha: 640.0,
            scale: Scale::Peft,
            randlora_dropout: 0.0,
            projection_prng_key: 0,
            save_projection: false,
            sparse: false,
            very_sparse: false,
            bias: Bias::None,
            init_weights: true,
        }
    }
}

impl RandLoraConfig {
    fn check(self) -> Result<Box<dyn Method>> {
        if self.r == 0 || self.r > 1 << 16 {
            return Err(Error::Config(format!("rank `r` = {} should be between 1 and {}", self.r, 1 << 16)));
        }
        if !self.randlora_alpha.is_finite() {
            return Err(Error::Config("randlora_alpha should be a finite number".into()));
        }
        check_dropout("randlora_dropout", self.randlora_dropout)?;
        Ok(Box::new(RandLora { config: self, given: (None, None), bases: None, slices: Slices::default() }))
    }
}

/// The shared bases.
struct Bases {
    /// (r, d_max).
    a: Tensor,
    /// (D_max, N_max, r).
    b: Tensor,
}

struct RandLora {
    config: RandLoraConfig,
    /// Bases out of a file.
    given: (Option<Tensor>, Option<Tensor>),
    bases: Option<Bases>,
    /// A's slices and the flattened B's, in the compute type.
    slices: Slices,
}

/// Most numbers in a base: those of a projection of a very large model.
const MAX_BASE: usize = 1 << 31;

impl RandLora {
    /// d, D and N of a projection.
    fn sizes(&self, site: &Site) -> (usize, usize, usize) {
        let (small, large) = (site.inputs.min(site.outputs), site.inputs.max(site.outputs));
        (small, large, small.div_ceil(self.config.r))
    }

    fn make(&self, small: usize, large: usize) -> Result<Bases> {
        let (r, c) = (self.config.r, &self.config);
        let n = small.div_ceil(r);
        if large.saturating_mul(n).saturating_mul(r) > MAX_BASE {
            return Err(Error::Config(format!("bases of ({large}, {n}, {r}) are too large")));
        }
        let mut torch = TorchGenerator::new(c.projection_prng_key);
        if !c.sparse && !c.very_sparse {
            let a = over_deviation_bf16(&torch.kaiming_bf16(r * small, small));
            let mut b = vec![half::bf16::ZERO; large * n * r];
            for j in 0..n {
                let slice = torch.kaiming_bf16(large * r, r);
                for (row, values) in slice.chunks(r).enumerate() {
                    b[(row * n + j) * r..][..r].copy_from_slice(values);
                }
            }
            let b = over_deviation_bf16(&b);
            return Ok(Bases {
                a: tensor_bf16(a, &[r, small], DType::BF16)?,
                b: tensor_bf16(b, &[large, n, r], DType::BF16)?,
            });
        }
        let sparsity = if c.very_sparse { (small as f64).sqrt() } else { 3.0 };
        // Compared in f32, as torch compares a tensor with a number.
        let (low, high) = ((1.0 / (2.0 * sparsity)) as f32, (1.0 - 1.0 / (2.0 * sparsity)) as f32);
        let ternary = |v: f32| match v {
            v if v < low => -1.0,
            v if v > high => 1.0,
            _ => 0.0,
        };
        let mut draw = |count| -> Vec<f32> { torch.rand(count).into_iter().map(ternary).collect() };
        let a = over_deviation(&draw(r * small));
        let b = over_deviation(&draw(large * n * r));
        Ok(Bases {
            a: Tensor::from_vec(a, (r, small), &Device::Cpu)?,
            b: Tensor::from_vec(b, (large, n, r), &Device::Cpu)?,
        })
    }
}

impl Method for RandLora {
    fn name(&self) -> &'static str {
        "randlora"
    }

    fn targeting(&self) -> &Targeting {
        &self.config.targeting
    }

    fn bias(&self) -> Bias {
        self.config.bias
    }

    fn config(&self) -> Map<String, Value> {
        let mut all = peft_json("RANDLORA", &self.config);
        // PEFT's is a whole number.
        if self.config.randlora_alpha.fract() == 0.0 {
            all.insert("randlora_alpha".into(), json!(self.config.randlora_alpha as i64));
        }
        if self.config.bias == Bias::LoraOnly {
            all.insert("bias".into(), json!("randlora_only"));
        }
        all
    }

    fn stored_config(&self) -> Map<String, Value> {
        // Files are in PEFT's terms.
        let mut all = self.config();
        all.shift_remove("scale");
        all
    }

    fn peft_lacks(&self) -> &'static [&'static str] {
        &["exclude_modules"]
    }

    fn take_shared(&mut self, name: &str, tensor: &Tensor) -> bool {
        match name.strip_prefix("base_model.").map(|n| n.strip_prefix("model.").unwrap_or(n)) {
            Some("randlora_A") => self.given.0 = Some(tensor.clone()),
            Some("randlora_B") => self.given.1 = Some(tensor.clone()),
            _ => return false,
        }
        true
    }

    fn resolve(&mut self, targeted: &[&Site], _stats: &CalibrationStats) -> Result<()> {
        // As in PEFT: the larger of all outputs and of all inputs, and then the smaller of the two.
        let outputs = targeted.iter().map(|s| s.outputs).max().unwrap_or(0);
        let inputs = targeted.iter().map(|s| s.inputs).max().unwrap_or(0);
        let (small, large) = (outputs.min(inputs), outputs.max(inputs));
        if small == 0 {
            return Ok(());
        }
        let (r, n) = (self.config.r, small.div_ceil(self.config.r));
        self.bases = Some(match (self.given.0.take(), self.given.1.take()) {
            (Some(a), Some(b)) => {
                if a.dims() != [r, 1, small] || b.dims() != [large, n, r] {
                    return Err(Error::Mismatch(format!(
                        "randlora_A has shape {:?} and randlora_B {:?}; the configuration and the base say [{r}, 1, {small}] and [{large}, {n}, {r}]",
                        a.dims(),
                        b.dims()
                    )));
                }
                Bases { a: a.squeeze(1)?, b }
            }
            _ => self.make(small, large)?,
        });
        Ok(())
    }

    fn shared(&self) -> TensorResult<Vec<(String, Tensor)>> {
        let Some(bases) = self.bases.as_ref().filter(|_| self.config.save_projection) else { return Ok(Vec::new()) };
        Ok(vec![
            ("base_model.randlora_A".into(), bases.a.unsqueeze(1)?),
            ("base_model.randlora_B".into(), bases.b.clone()),
        ])
    }

    fn file_keys(&self) -> FileKeys {
        FileKeys {
            // PEFT writes the shared bases once more for every module.
            module: &["randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"],
            block: &[],
            adapter: &[
                "base_model.randlora_A",
                "base_model.randlora_B",
                "base_model.model.randlora_A",
                "base_model.model.randlora_B",
            ],
        }
    }

    fn attach(&self, site: &Site, _base: &Projection, source: &mut ParameterSource<'_>) -> Result<Box<dyn Delta>> {
        let (small, large, n) = self.sizes(site);
        let (r, dtype) = (self.config.r, source.dtype());
        let bases = self.bases.as_ref().ok_or_else(|| Error::Config("randlora targets nothing".into()))?;
        if small > bases.a.dim(1)? || large > bases.b.dim(0)? {
            return Err(Error::Mismatch(format!("the shared bases are too small for `{}`", site.path)));
        }
        let lambda = source.trainable("randlora_lambda", &[r, n], |rng| match self.config.init_weights {
            true => Ok(Tensor::zeros((r, n), dtype, &Device::Cpu)?),
            false => Ok(super::random::normal((r, n), rng)?),
        })?;
        let gamma = source.trainable("randlora_gamma", &[n, small], |_| {
            let of = if self.config.init_weights { n.max(small) } else { large };
            Ok(Tensor::full(1.0 / of as f64, (n, small), &Device::Cpu)?)
        })?;
        let a =
            self.slices.get(('a', small, r), || Ok(bases.a.narrow(1, 0, small)?.to_dtype(dtype)?.contiguous()?))?;
        // PEFT writes the shared bases once more for every module.
        let (most, (depth, bases_n, _)) = (bases.a.dim(1)?, bases.b.dims3()?);
        source.optional("randlora_A", &[r, 1, most])?;
        source.optional("randlora_B", &[depth, bases_n, r])?;
        let wide = site.inputs > site.outputs;
        let b = self.slices.get((if wide { 't' } else { 'b' }, large, n), || {
            // As in PEFT, the places of the flattened B are counted (base, rank) and those of A ∘ Λ ∘ Γ (rank, base).
            let b = bases.b.narrow(0, 0, large)?.narrow(1, 0, n)?.to_dtype(dtype)?.flatten(1, 2)?;
            Ok(if wide { b.t()?.contiguous()? } else { b.contiguous()? })
        })?;
        let of_bases = if self.config.scale == Scale::Authors { (n as f64).powf(-0.5) } else { 1.0 };
        Ok(Box::new(RandLoraDelta {
            lambda,
            gamma,
            mark: b.narrow(0, 0, b.dim(0)?.min(8))?.contiguous()?,
            a,
            b,
            wide,
            scaling: self.config.randlora_alpha / r as f64 * of_bases,
            of_bases,
            dropout: Dropout::new(self.config.randlora_dropout, &site.path),
        }))
    }

    fn parameters(&self, site: &Site) -> Result<usize> {
        let (small, _, n) = self.sizes(site);
        Ok(n * (self.config.r + small))
    }

    fn rows_are_independent(&self) -> bool {
        self.config.randlora_dropout == 0.0
    }

    fn activations_per_row(&self, site: &Site) -> usize {
        let (small, _, _) = self.sizes(site);
        small + if self.config.randlora_dropout > 0.0 { site.inputs } else { 0 }
    }

    fn activations_fixed(&self, site: &Site) -> usize {
        let (small, _, n) = self.sizes(site);
        2 * self.config.r * n * small
    }
}

struct RandLoraDelta {
    /// Λ (r, N).
    lambda: Var,
    /// Γ (N, d).
    gamma: Var,
    /// (r, d).
    a: Tensor,
    /// (D, N·r), transposed where there are more inputs than outputs.
    b: Tensor,
    /// Its first rows, which stand for it.
    mark: Tensor,
    /// More inputs than outputs.
    wide: bool,
    scaling: f64,
    /// The part of the scaling that PEFT does not have.
    of_bases: f64,
    dropout: Dropout,
}

impl Delta for RandLoraDelta {
    fn change(&self, base: &Projection, rows: usize, _step: &Step) -> TensorResult<Change> {
        let (small, depth) = (self.a.dim(1)?, self.lambda.elem_count());
        let large = if self.wide { base.weight.dims()?.1 } else { base.weight.dims()?.0 };
        let (scaled, b) = (scaled_bases(&self.a, &self.lambda, &self.gamma)?, self.b.clone());
        let (a, b) = if self.wide { (b, scaled.t()?.contiguous()?) } else { (scaled, b) };
        let low = LowRank { a, b, scaling: self.scaling };
        // Multiply-adds of a step: three products of a row with both factors (one of them less for the frozen one), against
        // forming the weight, its factors' gradient, and the gradient of the whole weight.
        let factored = rows * depth * (3 * small + 2 * large);
        let whole = 2 * large * small * depth + rows * large * small;
        if factored <= whole || self.dropout_is_on() {
            return Ok(Change::LowRank(low));
        }
        let change = (low.b.matmul(&low.a)? * low.scaling)?;
        Ok(Change::Weight((base.dense(change.dtype())? + change)?))
    }

    fn dropout(&self) -> Option<&Dropout> {
        Some(&self.dropout)
    }

    fn parameters(&self) -> Vec<Parameter<'_>> {
        vec![
            Parameter::new("randlora_lambda", &self.lambda, Role::Magnitude),
            Parameter::new("randlora_gamma", &self.gamma, Role::Magnitude),
        ]
    }

    fn frozen(&self) -> Vec<(&'static str, &Tensor)> {
        vec![("randlora_A", &self.a), ("randlora_B", &self.mark)]
    }

    fn stored(&self) -> TensorResult<Vec<(&'static str, Tensor)>> {
        // The change is linear in Γ, which PEFT keeps a projection, where α is one for all.
        let gamma = self.gamma.detach();
        let gamma = if self.of_bases == 1.0 { gamma } else { (gamma * self.of_bases)? };
        Ok(vec![("randlora_lambda", self.lambda.detach()), ("randlora_gamma", gamma)])
    }
}

impl RandLoraDelta {
    fn dropout_is_on(&self) -> bool {
        !self.dropout.is_off(&Step::training(0))
    }
}

#[cfg(test)]
mod tests {
    use lorimer_tensor::FrozenWeight;
    use lorimer_tensor::linalg::svd;
    use rand::SeedableRng;

    use super::super::random::normal;
    use super::*;

    /// ΔW of random Λ and Γ has full rank, for more outputs and for more inputs.
    #[test]
    fn the_change_has_full_rank() -> Result<()> {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        for shape in [(9, 6), (6, 9), (7, 7)] {
            let base = Projection { weight: FrozenWeight::Dense(normal(shape, &mut rng)?), bias: None };
            let mut method = crate::methods::build("randlora", json!({ "r": 2 }).as_object().unwrap())?;
            let (site, stats) = (Site::new("p", shape), CalibrationStats::new());
            method.resolve(&[&site], &stats)?;
            let delta = method.attach(&site, &base, &mut ParameterSource::start(&site, DType::F64, 0, &stats))?;
            for (_, var) in delta.trainable() {
                var.set(&normal(var.dims2()?, &mut rng)?)?;
            }
            let change = (delta.merged(&base)?.unwrap() - base.dense(DType::F64)?)?;
            let (_, s, _) = svd(&change)?;
            let s = s.to_vec1::<f64>()?;
            assert!(s.iter().all(|v| *v > 1e-6 * s[0]), "{shape:?}: {s:?}");
        }
        Ok(())
    }
}
