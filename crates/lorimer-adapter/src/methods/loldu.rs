//! # LoLDU: only a diagonal is trained, between triangular factors of the weight
//!
//! Shi et al. 2024, *LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning*, arXiv
//! 2410.13618, eq. 5: W = P L D U by LU with partial pivoting, the first r columns of P L (outputs, r) and rows of the unit upper U (r,
//! inputs) frozen, `y = (W − ΔW(z₀)) x + σ · P L_r (z ∘ (U_r x))`. Trained: z (r), which starts at the first r of D's diagonal. σ = α/r stays as it is,
//! as in the published code, whose training takes `vector_z` alone (`--set train_sigma=true` trains it too, as the paper's text has it). α is 1
//! whatever r, as there. No residual is stored: the change is the difference of two diagonals, `P L_r diag(σ z − σ₀ z₀) U_r`, so the start is the
//! base exactly.
//!
//! `start` gives z other values, which are subtracted likewise: `ldu` (the diagonal), `uniform` (within ± half its mean), `normal` (its mean
//! and deviation), `constant` (its mean), `s_uniform` (within ±1), `s_normal` (standard normal), `ones`, `zeros`. (The published code
//! subtracts the diagonal for the last four all the same, so that their start is not the base; here it is.)
//!
//! Trainable parameters of a projection: `r` (`r + 1` with `train_sigma`).
//!
//! Files hold what is trained; the factors are found again from the base and held against a hash (`--set save_frozen=true` writes them).
//!
//! Meant for: the smallest adapters there are. AdamW's steps have the size of the learning rate whatever the gradient's, and move the weight by σ times
//! that: what counts is lr · α/r, so the rate goes up with r and down with α.
//!
//! Step time: LoRA's of the same rank, without the gradient of A.
//!
//! ```
//! use lorimer_adapter::example::project;
//! // W = [[2, 4], [1, 3]]: no row is exchanged, L = [[1, 0], [0.5, 1]], D = diag(2, 1), U = [[1, 2], [0, 1]]. With r = 1, σ = 1 and
//! // z = 3 in place of 2: ΔW = (1, 0.5)ᵀ · 1 · (1, 2), so W' = [[3, 6], [1.5, 4]].
//! let settings = r#"{"r": 1, "lora_alpha": 1}"#;
//! let y = project("loldu", settings, &[&[2., 4.], &[1., 3.]], &[("loldu_z", &[3.])], &[1., 1.]);
//! assert_eq!(y, [9.0, 5.5]);
//! ```

use candle_core::{DType, Device, Result as TensorResult, Tensor, Var};
use lorimer_model::{Projection, Site};
use lorimer_tensor::linalg::lu;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::entry::{Entry, Served};
use super::lora_xs::check_rank;
use super::random::{normal, uniform};
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
    name: "loldu",
    title: "A diagonal between triangular factors of the weight",
    paper: "arXiv 2410.13618",
    kind: "projection",
    variants: &["ldu", "uniform", "normal", "constant", "s_uniform", "s_normal", "ones", "zeros"],
    peft_type: "LOLDU",
    mergeable: true,
    served: Served::Batched,
    lr: 5e-2,
    parts: &[],
    flags: &[("rank", "r"), ("alpha", "lora_alpha"), ("init", "start")],
    source: include_str!("loldu.rs"),
    laws: &[
        (r#"{"r": 6}"#, 0.0),
        (r#"{"r": 6, "train_sigma": true, "lora_alpha": 3}"#, 0.0),
        (r#"{"r": 4, "variant": "uniform", "save_frozen": true}"#, 0.0),
        (r#"{"r": 4, "variant": "normal"}"#, 0.0),
        (r#"{"r": 8, "start": "constant"}"#, 0.0),
        (r#"{"r": 8, "start": "ones"}"#, 0.0),
        (r#"{"r": 8, "start": "zeros"}"#, 0.0),
        (r#"{"r": 8, "start": "s_uniform", "start_seed": 2}"#, 0.0),
        (r#"{"r": 8, "start": "s_normal"}"#, 0.0),
    ],
    build: |settings| {
        let mut settings = settings.clone();
        if let Some(variant) = settings.remove("variant") {
            settings.insert("start".into(), variant);
        }
        LolduConfig::check(configure("loldu", &settings)?)
    },
    recognises: |config| config.get("peft_type").and_then(Value::as_str) == Some("LOLDU"),
    from_file: |config| {
        let mut config = config.clone();
        // Files from before there was a choice.
        config.entry("train_sigma").or_insert(true.into());
        LolduConfig::check(from_peft_json("loldu", &config, &PeftKeys::NONE)?)
    },
};

/// How z begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// At W's own diagonal.
    #[default]
    Ldu,
    /// Uniform within ± half the diagonal's mean.
    Uniform,
    /// Normal with the diagonal's mean and deviation.
    Normal,
    /// At the diagonal's mean.
    Constant,
    /// Uniform within ±1.
    SUniform,
    /// Standard normal.
    SNormal,
    /// At one.
    Ones,
    /// At zero.
    Zeros,
}

/// Settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LolduConfig {
    /// Which modules.
    #[serde(flatten)]
    pub targeting: Targeting,
    /// Length r of the diagonal.
    pub r: usize,
    /// α; σ is α/r.
    pub lora_alpha: f64,
    /// Train σ too.
    pub train_sigma: bool,
    /// How z begins.
    pub start: Start,
    /// Seed of a random start.
    pub start_seed: u64,
    /// Write the frozen factors into the file too.
    pub save_frozen: bool,
}

impl Default for LolduConfig {
    fn default() -> Self {
        Self {
            targeting: Targeting::default(),
            r: 64,
            lora_alpha: 1.0,
            train_sigma: false,
            start: Start::Ldu,
            start_seed: 0,
            save_frozen: false,
        }
    }
}

impl LolduConfig {
    fn check(self) -> Result<Box<dyn Method>> {
        if self.r == 0 || !self.lora_alpha.is_finite() {
            return Err(Error::Config("`r` should be at least 1 and `lora_alpha` finite".into()));
        }
        Ok(Box::new(Loldu { config: self }))
    }
}

struct Loldu {
    config: LolduConfig,
}

/// P L_r (outputs, r), the diagonal (r) and unit U_r (r, inputs).
fn factors(w: &Tensor, r: usize) -> Result<(Tensor, Tensor, Tensor)> {
    let (l, u) = lu(w)?;
    let u = u.narrow(0, 0, r)?;
    let rows = u.to_vec2::<f64>()?;
    let diagonal: Vec<f64> = (0..r).map(|i| rows[i][i]).collect();
    // A zero pivot (W of lower rank) leaves its row zero.
    let inverse: Vec<f64> = diagonal.iter().map(|d| if *d == 0.0 { 0.0 } else { 1.0 / d }).collect();
    let unit = u.broadcast_mul(&Tensor::from_vec(inverse, (r, 1), &Device::Cpu)?)?;
    Ok((l.narrow(1, 0, r)?.contiguous()?, Tensor::from_vec(diagonal, r, &Device::Cpu)?, unit))
}

impl Method for Loldu {
    fn name(&self) -> &'static str {
        "loldu"
    }

    fn targeting(&self) -> &Targeting {
        &self.config.targeting
    }

    fn config(&self) -> Map<String, Value> {
        peft_json("LOLDU", &self.config)
    }

    fn file_keys(&self) -> FileKeys {
        FileKeys::of_modules(&["loldu_z", "loldu_sigma", "loldu_L", "loldu_U", "loldu_D"])
    }

    fn attach(&self, site: &Site, base: &Projection, source: &mut ParameterSource<'_>) -> Result<Box<dyn Delta>> {
        let c = &self.config;
        let r = c.r;
        check_rank(r, site)?;
        let b = source.optional("loldu_L", &[site.outputs, r])?;
        let a = source.optional("loldu_U", &[r, site.inputs])?;
        let diagonal = source.optional("loldu_D", &[r])?;
        let (b, diagonal, a) = match (b, diagonal, a) {
            (Some(b), Some(d), Some(a)) => (b, d, a),
            _ => factors(&base.dense(DType::F64)?, r)?,
        };
        let values = diagonal.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let mean = values.iter().sum::<f64>() / r as f64;
        let squares: f64 = values.iter().map(|v| (v - mean) * (v - mean)).sum();
        let deviation = (squares / (r as f64 - 1.0).max(1.0)).sqrt();
        let mut rng = ChaCha8Rng::seed_from_u64(site_seed(c.start_seed, &site.path));
        let start = match c.start {
            Start::Ldu => diagonal.clone(),
            Start::Uniform => uniform((1, r), mean.abs().max(1e-12) / 2.0, DType::F64, &mut rng)?.squeeze(0)?,
            Start::Normal => ((normal((1, r), &mut rng)?.squeeze(0)? * deviation)? + mean)?,
            Start::SUniform => uniform((1, r), 1.0, DType::F64, &mut rng)?.squeeze(0)?,
            Start::SNormal => normal((1, r), &mut rng)?.squeeze(0)?,
            Start::Constant => Tensor::full(mean, r, &Device::Cpu)?,
            Start::Ones => Tensor::ones(r, DType::F64, &Device::Cpu)?,
            Start::Zeros => Tensor::zeros(r, DType::F64, &Device::Cpu)?,
        };
        let scaling = c.lora_alpha / r as f64;
        let z = source.trainable("loldu_z", &[r], |_| Ok(start.clone()))?;
        let sigma0 = Tensor::new(&[scaling], &Device::Cpu)?.to_dtype(source.dtype())?;
        let sigma = match c.train_sigma {
            true => Sigma::Trained(source.trainable("loldu_sigma", &[1], |_| Ok(sigma0.copy()?))?),
            false => Sigma::Fixed(sigma0.clone()),
        };
        let exact = |t: Tensor| t.to_dtype(source.dtype())?.contiguous();
        // As training computes σ z at the start, so that the difference is zero to the last bit.
        let z0 = exact(start)?;
        Ok(Box::new(LolduDelta {
            z,
            sigma,
            origin: z0.broadcast_mul(&sigma0)?,
            a: exact(a)?,
            b: exact(b)?,
            diagonal: exact(diagonal)?,
            save_frozen: c.save_frozen,
        }))
    }

    fn parameters(&self, _site: &Site) -> Result<usize> {
        Ok(self.config.r + usize::from(self.config.train_sigma))
    }

    fn activations_per_row(&self, _site: &Site) -> usize {
        self.config.r
    }

    fn activations_fixed(&self, site: &Site) -> usize {
        self.config.r * (site.inputs + 3 * site.outputs)
    }
}

/// σ (1).
enum Sigma {
    Trained(Var),
    Fixed(Tensor),
}

struct LolduDelta {
    /// z (r).
    z: Var,
    sigma: Sigma,
    /// σ₀ z₀ (r).
    origin: Tensor,
    /// U_r (r, inputs).
    a: Tensor,
    /// P L_r (outputs, r).
    b: Tensor,
    /// The first r of D (r).
    diagonal: Tensor,
    save_frozen: bool,
}

impl Delta for LolduDelta {
    fn change(&self, _base: &Projection, _rows: usize, _step: &Step) -> TensorResult<Change> {
        let sigma = match &self.sigma {
            Sigma::Trained(sigma) => sigma.as_tensor(),
            Sigma::Fixed(sigma) => sigma,
        };
        let moved = (self.z.as_tensor().broadcast_mul(sigma)? - &self.origin)?;
        let b = self.b.broadcast_mul(&moved)?;
        Ok(Change::low_rank(self.a.clone(), b, 1.0))
    }

    fn parameters(&self) -> Vec<Parameter<'_>> {
        let mut all = vec![Parameter::new("loldu_z", &self.z, Role::Magnitude)];
        if let Sigma::Trained(sigma) = &self.sigma {
            all.push(Parameter::new("loldu_sigma", sigma, Role::Magnitude));
        }
        all
    }

    fn frozen(&self) -> Vec<(&'static str, &Tensor)> {
        vec![("loldu_L", &self.b), ("loldu_U", &self.a), ("loldu_D", &self.diagonal)]
    }

    fn stored(&self) -> TensorResult<Vec<(&'static str, Tensor)>> {
        let mut all: Vec<_> = self.trainable().into_iter().map(|(key, var)| (key, var.detach())).collect();
        if self.save_frozen {
            all.extend(self.frozen().into_iter().map(|(key, t)| (key, t.clone())));
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_factors_give_the_weight_back() -> Result<()> {
        let w = uniform((9, 6), 1.0, DType::F64, &mut ChaCha8Rng::seed_from_u64(1))?;
        let (l, d, u) = factors(&w, 6)?;
        let again = l.broadcast_mul(&d)?.matmul(&u)?;
        assert!(crate::delta::largest(&(again - &w)?)? < 1e-12);
        Ok(())
    }

    #[test]
    fn unknown_starts_are_refused() {
        let settings = json!({ "start": "high" });
        assert!(crate::methods::build("loldu", settings.as_object().unwrap()).is_err());
    }
}
