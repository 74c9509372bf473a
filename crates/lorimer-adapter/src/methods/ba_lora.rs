//! # BA-LoRA: three regularisers against what the base inherited
//!
//! Chang et al. 2024, *BA-LoRA: Bias-Alleviating Low-Rank Adaptation to Mitigate Catastrophic Inheritance in Large Language Models*,
//! arXiv 2408.04556: PiSSA's start (the r largest singular directions of W in B A, the rest frozen), and
//! `L = L_task + λ₁ L_CR + λ₂ L_DR + λ₃ L_SVDR` over logits Z (n, c) of the adapted and Z₀ of the frozen base at the supervised positions:
//!
//! - `nlg`: `L_CR = KL(softmax Z₀ ‖ softmax Z)` summed over the positions of a row and averaged over rows, `L_DR` = −(mean entropy of softmax Z);
//! - `nlu`: `L_CR` = mean squared difference of the numbers of ℓ2-normalised logits, `L_DR` = Σ of squared off-diagonal covariances of Z's columns,
//!   over c;
//! - both: `L_SVDR = −Σ_{i≤k} σ_i(Z) / Σ_i σ_i(Z)`.
//!
//! These are the normalisations of the authors' first code (cyp-jlu-ai/BA-LoRA), whose λ are the defaults. `version=2` is their second
//! (llm172/BA-LoRA): `L_CR` = T² KL(softmax Z₀/T ‖ softmax Z/T), a mean over positions, T = 2; the entropy of the 20 likeliest tokens among themselves;
//! `L_SVDR = −Σ_{i≤k} σ_i / ‖Z‖_F`; λ₁ falls along half a cosine to a tenth; λ₂ and λ₃ are zero for a fifth of the run and rise over the next
//! twentieth.
//!
//! All supervised positions take part. They are gone through in blocks of 1,024, so that no more logits are in memory at a time; singular values
//! and covariances are those of the blocks, averaged by their length.
//!
//! Singular values come from the n × n Gram matrix, and covariances too, so that nothing of size c × c is formed.
//!
//! Trainable parameters of a projection: `r · (inputs + outputs)`. The objective goes with any method (`--objective ba-lora`).
//!
//! Meant for: training on noisy or unbalanced rows, where the base's behaviour elsewhere is to survive. A step costs a forward of the frozen
//! base more: about 4/3 of LoRA's. The file is the LoRA of rank 2r that PiSSA's conversion gives.
//!
//! ```
//! use lorimer_adapter::methods;
//! let settings = serde_json::from_str(r#"{"r": 4, "lambda2": 0.0}"#).unwrap();
//! let method = methods::build("ba-lora", &settings).unwrap();
//! assert!(method.training().objective.is_some());
//! assert_eq!(method.config()["init_lora_weights"], "pissa");
//! ```

use std::sync::Arc;

use candle_core::{D, DType, Tensor};
use lorimer_tensor::linalg::eigh;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::entry::{Entry, Part, Served};
use super::largest::largest_places;
use super::lora::{FLAGS, Lora, LoraConfig, lora_file};
use crate::error::{Error, Result};
use crate::method::Method;
use crate::settings::{configure, settings_of, split_off};
use crate::training::{Moment, Objective, ObjectiveKind, Training};

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "ba-lora",
    title: "PiSSA with three regularisers",
    paper: "arXiv 2408.04556",
    kind: "objective",
    variants: &["nlg", "nlu"],
    peft_type: "LORA",
    mergeable: true,
    served: Served::Batched,
    lr: 2e-4,
    parts: &[("ba-lora", Part::Objective(|settings| Ok(Arc::new(BaLora::given(settings)?))))],
    flags: FLAGS,
    source: include_str!("ba_lora.rs"),
    laws: &[(r#"{"r": 3}"#, 1e-12), (r#"{"r": 3, "task": "nlu", "init_lora_weights": true}"#, 0.0)],
    build: |settings| {
        let mut settings = settings.clone();
        let mut own = split_off::<BaLora>(&mut settings);
        if let Some(variant) = settings.remove("variant") {
            own.insert("task".into(), variant);
        }
        settings.entry("init_lora_weights").or_insert(json!("pissa"));
        let objective: Option<Arc<dyn ObjectiveKind>> = Some(Arc::new(BaLora::given(&own)?));
        let mut lora = Lora::new("ba-lora", LoraConfig::given("ba-lora", &settings)?);
        lora.training = Training { objective, ..Default::default() };
        Ok(Box::new(lora) as Box<dyn Method>)
    },
    // Its files are ordinary LoRAs.
    recognises: |_| false,
    from_file: lora_file,
};

/// Settings of BA-LoRA.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BaLora {
    /// 1, or 2 for the authors' later form of the terms, which has other defaults: λ 0.025, 0.005, 0.005, k 10, temperature 2, top_k_entropy 20.
    pub version: usize,
    /// λ₁, of the consistency with the frozen base.
    pub lambda1: f64,
    /// λ₂, of diversity.
    pub lambda2: f64,
    /// λ₃, of the share of the largest singular values.
    pub lambda3: f64,
    /// Singular values that count as the largest.
    pub k: usize,
    /// Which form of the terms: `nlg` or `nlu`.
    pub task: BaLoraTask,
    /// Version 2: what logits are divided by for the consistency.
    pub temperature: f64,
    /// Version 2: the entropy is that of so many of the likeliest tokens; 0: of all.
    pub top_k_entropy: usize,
}

impl Default for BaLora {
    fn default() -> Self {
        Self {
            version: 1,
            lambda1: 1e-4,
            lambda2: 3e-4,
            lambda3: 1e-4,
            k: 3,
            task: BaLoraTask::Nlg,
            temperature: 1.0,
            top_k_entropy: 0,
        }
    }
}

/// Which form BA-LoRA's terms have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BaLoraTask {
    /// Generation: divergence from the base's distribution, and entropy.
    #[default]
    Nlg,
    /// Understanding: distance of normalised logits, and their covariance.
    Nlu,
}

impl BaLora {
    /// From settings by name.
    pub fn given(settings: &Map<String, Value>) -> Result<Self> {
        let mut b: Self = configure("ba-lora", settings)?;
        match b.version {
            1 if settings.contains_key("temperature") || settings.contains_key("top_k_entropy") => {
                return Err(Error::Config("ba-lora: temperature and top_k_entropy belong to version 2".into()));
            }
            1 => {}
            2 if b.task == BaLoraTask::Nlu => {
                return Err(Error::Config("ba-lora: version 2 has the task nlg only; use version 1 for nlu".into()));
            }
            2 => {
                let second = Self {
                    version: 2,
                    lambda1: 0.025,
                    lambda2: 0.005,
                    lambda3: 0.005,
                    k: 10,
                    task: BaLoraTask::Nlg,
                    temperature: 2.0,
                    top_k_entropy: 20,
                };
                let Ok(Value::Object(mut all)) = serde_json::to_value(second) else {
                    return Err(Error::Config("ba-lora: the defaults of version 2 cannot be written".into()));
                };
                all.extend(settings.clone());
                b = configure("ba-lora", &all)?;
            }
            other => return Err(Error::Config(format!("ba-lora: version = {other} should be 1 or 2"))),
        }
        if [b.lambda1, b.lambda2, b.lambda3].iter().any(|l| !l.is_finite()) || b.k == 0 {
            return Err(Error::Config("ba-lora: lambda1, lambda2 and lambda3 should be numbers, k at least 1".into()));
        }
        if !(b.temperature.is_finite() && b.temperature > 0.0) {
            return Err(Error::Config(format!("ba-lora: temperature = {} should be above 0", b.temperature)));
        }
        Ok(b)
    }
}

impl ObjectiveKind for BaLora {
    fn name(&self) -> &'static str {
        "ba-lora"
    }

    fn settings(&self) -> Map<String, Value> {
        settings_of(self)
    }

    fn build(&self) -> Box<dyn Objective> {
        Box::new(Regularisers(self.clone()))
    }
}

/// BA-LoRA's three terms (Chang et al. 2024, arXiv 2408.04556, sections 3.2 and 3.3), in the normalisations of the authors' code.
pub struct Regularisers(pub BaLora);

impl Regularisers {
    /// λ₁, λ₂ and λ₃ at a moment.
    fn weights(&self, at: &Moment) -> (f64, f64, f64) {
        let s = &self.0;
        if s.version == 1 {
            return (s.lambda1, s.lambda2, s.lambda3);
        }
        let falling = 0.5 * (1.0 + (std::f64::consts::PI * at.progress).cos());
        let (step, total) = at.step;
        let quiet = (0.2 * total as f64) as usize;
        let ramp = ((0.05 * total as f64) as usize).max(1);
        let focus = (step.saturating_sub(quiet) as f64 / ramp as f64).min(1.0);
        (s.lambda1 * (0.1 + 0.9 * falling), s.lambda2 * focus, s.lambda3 * focus)
    }
}

impl Objective for Regularisers {
    fn value(&self, logits: &Tensor, base: &Tensor, at: &Moment) -> candle_core::Result<Tensor> {
        let s = &self.0;
        let (lambda1, lambda2, lambda3) = self.weights(at);
        let mut terms = Vec::new();
        if lambda1 != 0.0 {
            let (term, factor) = match (s.version, s.task) {
                (1, BaLoraTask::Nlg) => (divergence(base, logits)?, at.positions_per_row),
                (1, BaLoraTask::Nlu) => (normalised_distance(base, logits)?, 1.0),
                _ => {
                    let cooled = |t: &Tensor| t / s.temperature;
                    (divergence(&cooled(base)?, &cooled(logits)?)?, s.temperature * s.temperature)
                }
            };
            terms.push((term * (lambda1 * factor))?);
        }
        if lambda2 != 0.0 {
            let term = match s.task {
                BaLoraTask::Nlg if s.top_k_entropy > 0 => entropy(&largest(logits, s.top_k_entropy)?)?.neg()?,
                BaLoraTask::Nlg => entropy(logits)?.neg()?,
                BaLoraTask::Nlu => covariance(logits)?,
            };
            terms.push((term * lambda2)?);
        }
        // The second code looks at a matrix with at least two rows.
        if lambda3 != 0.0 && (s.version == 1 || logits.dim(0)? > 1) {
            terms.push((singular_share(logits, s.k, s.version == 2)? * -lambda3)?);
        }
        let zero = Tensor::zeros((), logits.dtype(), logits.device())?;
        terms.into_iter().try_fold(zero, |sum, term| sum + term.to_dtype(logits.dtype())?)
    }
}

fn log_softmax(z: &Tensor) -> candle_core::Result<Tensor> {
    let shifted = z.broadcast_sub(&z.max_keepdim(D::Minus1)?.detach())?;
    shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)
}

/// KL(softmax p ‖ softmax q), a mean over rows.
pub fn divergence(p: &Tensor, q: &Tensor) -> candle_core::Result<Tensor> {
    let (p, q) = (log_softmax(p)?, log_softmax(q)?);
    (p.exp()? * (p - q)?)?.sum(D::Minus1)?.mean_all()
}

/// Mean entropy of softmax z, in nats.
pub fn entropy(z: &Tensor) -> candle_core::Result<Tensor> {
    let z = log_softmax(z)?;
    (z.exp()? * &z)?.sum(D::Minus1)?.mean_all()?.neg()
}

/// Mean over all numbers of (a/‖a‖ − b/‖b‖)², a and b row by row.
pub fn normalised_distance(a: &Tensor, b: &Tensor) -> candle_core::Result<Tensor> {
    let unit = |t: &Tensor| t.broadcast_div(&(t.sqr()?.sum_keepdim(D::Minus1)?.sqrt()? + 1e-12)?);
    (unit(a)? - unit(b)?)?.sqr()?.mean_all()
}

/// Σ of squared off-diagonal covariances of the columns of (n, c), over c, by way of the n × n products of the centred rows.
pub fn covariance(z: &Tensor) -> candle_core::Result<Tensor> {
    let (n, c) = z.dims2()?;
    let z = z.broadcast_sub(&z.mean_keepdim(0)?)?;
    let part = 1.0 / (n.max(2) - 1) as f64;
    let all = (z.matmul(&z.t()?)? * part)?.sqr()?.sum_all()?;
    let own = (z.sqr()?.sum(0)? * part)?.sqr()?.sum_all()?;
    (all - own)? / c as f64
}

/// The k largest numbers of each row of (n, c).
pub fn largest(z: &Tensor, k: usize) -> candle_core::Result<Tensor> {
    let (n, c) = z.dims2()?;
    let k = k.min(c);
    let values = z.detach().to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    let places: Vec<u32> = values.par_chunks(c.max(1)).flat_map_iter(|row| largest_places(row, k)).collect();
    z.contiguous()?.gather(&Tensor::from_vec(places, (n, k), z.device())?, 1)
}

/// Σ of the k largest singular values of (n, c) over the sum of all, or over the root of the sum of their squares. The vectors come from the n × n
/// Gram matrix and are constants of the graph: σ_i = u_iᵀ Z v_i then has the value and, with u_i v_iᵀ, the gradient of the singular value.
pub fn singular_share(z: &Tensor, k: usize, frobenius: bool) -> candle_core::Result<Tensor> {
    let wide = z.dim(0)? <= z.dim(1)?;
    let fixed = z.detach().to_dtype(DType::F64)?;
    let fixed = if wide { fixed } else { fixed.t()?.contiguous()? };
    let n = fixed.dim(0)?;
    let (values, u) = eigh(&fixed.matmul(&fixed.t()?)?)?;
    // Values rise; what rounding made of a zero has no direction.
    let largest = values.last().copied().unwrap_or(0.0).max(0.0);
    let inverse: Vec<f64> = values.iter().map(|v| if *v > 1e-14 * largest { v.powf(-0.5) } else { 0.0 }).collect();
    let side = |from: usize| -> candle_core::Result<Tensor> {
        // Σ_i u_i v_iᵀ = Σ_i u_i u_iᵀ Z / σ_i over i ≥ from.
        let u = u.narrow(1, from, n - from)?;
        let scale = Tensor::from_slice(&inverse[from..], (1, n - from), u.device())?;
        let directions = u.broadcast_mul(&scale)?.matmul(&u.t()?)?.matmul(&fixed)?;
        let directions = if wide { directions } else { directions.t()?.contiguous()? };
        (z * directions.to_dtype(z.dtype())?.detach())?.sum_all()
    };
    let all = if frobenius { z.sqr()?.sum_all()?.sqrt()? } else { side(0)? };
    side(n - k.min(n))?.div(&all)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};
    use lorimer_tensor::linalg::svd;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn random(rows: usize, columns: usize, seed: u64) -> Tensor {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let data: Vec<f64> = (0..rows * columns).map(|_| rng.random_range(-2.0..2.0)).collect();
        Tensor::from_vec(data, (rows, columns), &Device::Cpu).unwrap()
    }

    fn number(t: &Tensor) -> f64 {
        t.to_scalar::<f64>().unwrap()
    }

    type Term = fn(&Tensor) -> candle_core::Result<Tensor>;

    #[test]
    fn gradients_equal_central_differences() -> candle_core::Result<()> {
        let terms: [(&str, Term); 7] = [
            ("divergence", |z| divergence(&random(5, 9, 3), z)),
            ("entropy", entropy),
            ("entropy of the largest", |z| entropy(&largest(z, 4)?)),
            ("distance", |z| normalised_distance(&random(5, 9, 3), z)),
            ("covariance", covariance),
            ("share, wide", |z| singular_share(z, 2, false)),
            ("share, tall", |z| singular_share(&z.t()?.contiguous()?, 2, true)),
        ];
        for (name, term) in terms {
            let (z, direction) = (random(5, 9, 1), random(5, 9, 2));
            let var = Var::from_tensor(&z)?;
            let grads = term(var.as_tensor())?.backward()?;
            let along = number(&(grads.get(&var).unwrap() * &direction)?.sum_all()?);
            let at = |h: f64| term(&(&z + (&direction * h).unwrap()).unwrap()).map(|t| number(&t));
            let numeric = (at(1e-6)? - at(-1e-6)?) / 2e-6;
            assert!((numeric - along).abs() < 1e-7, "{name}: {numeric} against {along}");
        }
        Ok(())
    }

    #[test]
    fn terms_have_their_values() -> candle_core::Result<()> {
        let z = random(5, 9, 1);
        assert!(number(&divergence(&z, &z)?).abs() < 1e-15);
        assert!(number(&divergence(&random(5, 9, 2), &z)?) > 0.0);
        let even = Tensor::zeros((4, 7), DType::F64, &Device::Cpu)?;
        assert!((number(&entropy(&even)?) - 7f64.ln()).abs() < 1e-14);
        let (_, s, _) = svd(&z)?;
        let s = s.to_vec1::<f64>()?;
        let expected = s[..2].iter().sum::<f64>() / s.iter().sum::<f64>();
        assert!((number(&singular_share(&z, 2, false)?) - expected).abs() < 1e-12);
        let low = random(5, 2, 4).matmul(&random(2, 9, 5))?;
        assert!((number(&singular_share(&low, 2, false)?) - 1.0).abs() < 1e-6);
        // The covariance by its definition.
        let centred = z.broadcast_sub(&z.mean_keepdim(0)?)?;
        let c = (centred.t()?.matmul(&centred)? / 4.0)?.to_vec2::<f64>()?;
        let off: f64 = (0..9)
            .flat_map(|i| (0..9).map(move |j| (i, j)))
            .filter(|(i, j)| i != j)
            .map(|(i, j)| c[i][j].powi(2))
            .sum();
        assert!((number(&covariance(&z)?) - off / 9.0).abs() < 1e-12);
        Ok(())
    }
}
