//! # LoRA-Pro: gradients of A and B whose step is nearest the full gradient
//!
//! Wang et al. 2025, *LoRA-Pro: Are Low-Rank Adapters Properly Optimized?*, ICLR, arXiv 2407.18242, theorems 2.2 and 2.3. For `W' = W + s·B A`
//! with A (r, inputs), B (outputs, r) and plain gradients g_A = s·BᵀG, g_B = s·G Aᵀ of the full gradient G (which is never formed), a step moves
//! W' along `g̃ = s·B ĝ_A + s·ĝ_B A`. ‖g̃ − G‖ is least for
//! `ĝ_A = s⁻²(BᵀB)⁻¹ g_A + X A`, `ĝ_B = s⁻²(I − B(BᵀB)⁻¹Bᵀ) g_B (A Aᵀ)⁻¹ − B X`, whatever X (r, r) is; the X that keeps ĝ nearest g solves
//! `BᵀB X + X A Aᵀ = −s⁻²(BᵀB)⁻¹ g_A Aᵀ`. While B = 0: `ĝ_A = g_A`, `ĝ_B = s⁻² g_B (A Aᵀ)⁻¹`.
//!
//! Variants: `light` (AdamW on ĝ) and `full` (AdamW's moments of g̃ itself, (outputs, inputs) each; what they give is projected back to A and
//! B by the same formulas, and A and B take a plain step along it). `full` is what the authors' repository runs, with SGD at 2e-5, its default here;
//! `light` is the repository's first release (`step_efficient`) and takes LoRA's rates. δ = 1e-8 stands on the diagonals of both matrices that
//! are inverted, as there: it holds steps back while B is small.
//! Beside the repository: the scaling is the adapter's own where it writes 16/8; moments are corrected for their bias from the first step on, where
//! it counts from 2 (its first steps are 0.74, 0.79, … of these); gradients are clipped before the moments, where it clips the step.
//!
//! Trainable parameters of a projection: `r · (inputs + outputs)`.
//!
//! Meant for: coming closer to full fine-tuning at LoRA's file size. `light` costs r × r work only; `full` two moments of every target
//! weight. The file is an ordinary LoRA.
//!
//! ```
//! use lorimer_adapter::{Method, methods};
//! // It is LoRA with another optimizer.
//! let settings = serde_json::from_str(r#"{"r": 4, "variant": "full"}"#).unwrap();
//! let training = methods::build("lora-pro", &settings).unwrap().training();
//! assert_eq!(training.optimizer.unwrap().name(), "lora-pro-full");
//! ```

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use lorimer_model::Projection;
use lorimer_tensor::linalg::eigh;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::entry::{Entry, Part, Served};
use super::lora::{FLAGS, Lora, LoraConfig, lora_file};
use crate::delta::Delta;
use crate::error::{Error, Result};
use crate::method::Method;
use crate::parameter::Role;
use crate::settings::{configure, settings_of, split_off};
use crate::step::Step;
use crate::training::{AdamW, AdamWConfig, Module, Optimizer, OptimizerKind, ParamGroup, Training};

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "lora-pro",
    title: "LoRA whose step is nearest full fine-tuning's",
    paper: "arXiv 2407.18242",
    kind: "optimizer",
    variants: &["light", "full"],
    peft_type: "LORA",
    mergeable: true,
    served: Served::Batched,
    lr: 1e-3,
    parts: &[
        ("lora-pro", Part::Optimizer(|settings| Ok(Arc::new(LoraPro::given(settings)?)))),
        (
            "lora-pro-full",
            Part::Optimizer(|settings| {
                let mut settings = settings.clone();
                settings.insert("full".into(), true.into());
                Ok(Arc::new(LoraPro::given(&settings)?))
            }),
        ),
    ],
    flags: FLAGS,
    source: include_str!("lora_pro.rs"),
    laws: &[(r#"{"r": 3}"#, 0.0), (r#"{"r": 3, "variant": "full"}"#, 0.0)],
    build: |settings| {
        let mut settings = settings.clone();
        let mut own = split_off::<LoraPro>(&mut settings);
        match settings.remove("variant").as_ref().map(|v| v.as_str().unwrap_or_default()) {
            None => {}
            Some("light") => drop(own.insert("full".into(), Value::Bool(false))),
            Some("full") => drop(own.insert("full".into(), Value::Bool(true))),
            Some(_) => return Err(Error::Config("variant of lora-pro should be light or full".into())),
        }
        let optimizer: Option<Arc<dyn OptimizerKind>> = Some(Arc::new(LoraPro::given(&own)?));
        let mut lora = Lora::new("lora-pro", LoraConfig::given("lora-pro", &settings)?);
        lora.training = Training { optimizer, ..Default::default() };
        Ok(Box::new(lora) as Box<dyn Method>)
    },
    // Its files are ordinary LoRAs.
    recognises: |_| false,
    from_file: lora_file,
};

/// Settings of LoRA-Pro.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraPro {
    /// Moments of the equivalent full gradient, in place of those of A and B.
    pub full: bool,
    /// δ, added to the diagonals of BᵀB and A Aᵀ before they are inverted.
    pub delta: f64,
}

impl Default for LoraPro {
    fn default() -> Self {
        Self { full: false, delta: 1e-8 }
    }
}

impl LoraPro {
    /// From settings by name.
    pub fn given(settings: &Map<String, Value>) -> Result<Self> {
        let p: Self = configure("lora-pro", settings)?;
        if !(0.0..=1.0).contains(&p.delta) {
            return Err(Error::Config(format!("lora-pro: delta = {} should be between 0 and 1", p.delta)));
        }
        Ok(p)
    }
}

impl OptimizerKind for LoraPro {
    fn name(&self) -> &'static str {
        if self.full { "lora-pro-full" } else { "lora-pro" }
    }

    fn family(&self) -> &'static str {
        "lora-pro"
    }

    fn settings(&self) -> Map<String, Value> {
        settings_of(self)
    }

    /// With `full`, steps have the size of the rate in the weight itself, as those of full fine-tuning.
    fn learning_rate(&self) -> Option<f64> {
        self.full.then_some(2e-5)
    }

    fn build(&self, config: AdamWConfig, method: &str, modules: &[Module<'_>]) -> Result<Box<dyn Optimizer>> {
        let pair = |(site, base, delta): &Module<'_>| {
            let scaling = pair_scaling(base, *delta)?.ok_or_else(|| {
                Error::Config(format!(
                    "lora-pro corrects the gradients of LoRA's A and B, and `{method}` trains something else; use --method lora or eva"
                ))
            })?;
            Ok(Pair { module: site.path.clone(), scaling })
        };
        let pairs = modules.iter().map(pair).collect::<Result<Vec<_>>>()?;
        Ok(Box::new(LoraProOptimizer::new(self.clone(), config, pairs)))
    }

    fn bytes(&self, (outputs, inputs): (usize, usize), parameters: u64) -> f64 {
        match self.full {
            true => 8.0 * outputs as f64 * inputs as f64,
            false => self.bytes_per_number() * parameters as f64,
        }
    }
}

/// s, where A and B are all that is trained and ΔW = s · B A up to a constant.
fn pair_scaling(base: &Projection, delta: &dyn Delta) -> Result<Option<f64>> {
    let parameters = delta.parameters();
    let [a, b] = &parameters[..] else { return Ok(None) };
    let change = delta.change(base, 0, &Step::default())?;
    let Some(low) = change.factors().filter(|_| (a.role, b.role) == (Role::A, Role::B)) else { return Ok(None) };
    // A start that moves the base stands beside A and B in the factors; a B that is kept otherwise is no B.
    let fits = a.var.dims().get(1) == low.a.dims().get(1) && b.var.dims().first() == low.b.dims().first();
    Ok(fits.then_some(low.scaling))
}

/// A module with factors A and B, named `module.lora_A` and `module.lora_B`.
#[derive(Clone, Debug)]
pub struct Pair {
    /// Path.
    pub module: String,
    /// s in ΔW = s · B A.
    pub scaling: f64,
}

/// A symmetric positive matrix by its eigenvalues and eigenvectors.
struct Spectrum {
    values: Vec<f64>,
    vectors: Tensor,
}

impl Spectrum {
    fn of(gram: &Tensor) -> candle_core::Result<Self> {
        let (values, vectors) = eigh(gram)?;
        Ok(Self { values: values.into_iter().map(|v| v.max(0.0)).collect(), vectors })
    }

    /// The inverse with δ on the diagonal; directions in which there is nothing, and no δ, are left out.
    fn inverse(&self, delta: f64) -> candle_core::Result<Tensor> {
        let n = self.values.len();
        let invert = |v: &f64| if v + delta > 0.0 { 1.0 / (v + delta) } else { 0.0 };
        let inverse = Tensor::from_vec(self.values.iter().map(invert).collect(), (1, n), &Device::Cpu)?;
        self.vectors.broadcast_mul(&inverse)?.matmul(&self.vectors.t()?)
    }
}

/// X with P X + X Q = C for symmetric positive P and Q: in their eigenvectors it is a division.
fn sylvester(p: &Spectrum, q: &Spectrum, c: &Tensor) -> candle_core::Result<Tensor> {
    let inside = p.vectors.t()?.matmul(c)?.matmul(&q.vectors)?;
    let sums: Vec<f64> =
        p.values.iter().flat_map(|a| q.values.iter().map(move |b| (a + b).max(f64::MIN_POSITIVE))).collect();
    let sums = Tensor::from_vec(sums, (p.values.len(), q.values.len()), &Device::Cpu)?;
    p.vectors.matmul(&(inside / sums)?)?.matmul(&q.vectors.t()?)
}

/// ĝ_A (r, inputs) and ĝ_B (outputs, r) from the plain gradients, all in f64. Without `free`, X is zero: the same step of the product,
/// another share between A and B.
pub fn corrected(
    (a, b): (&Tensor, &Tensor),
    (ga, gb): (&Tensor, &Tensor),
    scaling: f64,
    delta: f64,
    free: bool,
) -> candle_core::Result<(Tensor, Tensor)> {
    let part = 1.0 / (scaling * scaling);
    let of_a = Spectrum::of(&a.matmul(&a.t()?)?)?;
    let gb_right = (gb.matmul(&of_a.inverse(delta)?)? * part)?;
    let bb = b.t()?.matmul(b)?;
    if bb.abs()?.max_all()?.to_scalar::<f64>()? == 0.0 {
        return Ok((ga.clone(), gb_right));
    }
    let of_b = Spectrum::of(&bb)?;
    let inverse = of_b.inverse(delta)?;
    let ga_left = (inverse.matmul(ga)? * part)?;
    let along = b.matmul(&inverse.matmul(&b.t()?.matmul(&gb_right)?)?)?;
    let gb_left = (gb_right - along)?;
    if !free {
        return Ok((ga_left, gb_left));
    }
    let x = sylvester(&of_b, &of_a, &ga_left.matmul(&a.t()?)?.neg()?)?;
    Ok(((ga_left + x.matmul(a)?)?, (gb_left - b.matmul(&x)?)?))
}

/// s·B ĝ_A + s·ĝ_B A: which way the product moves.
pub fn equivalent(
    (a, b): (&Tensor, &Tensor),
    (ga, gb): (&Tensor, &Tensor),
    scaling: f64,
) -> candle_core::Result<Tensor> {
    (b.matmul(ga)? + gb.matmul(a)?)? * scaling
}

/// AdamW on corrected gradients, or (full) plain steps along AdamW's direction of the equivalent full gradient.
pub struct LoraProOptimizer {
    settings: LoraPro,
    adam: AdamW,
    pairs: Vec<Pair>,
}

impl LoraProOptimizer {
    /// One that has taken no step.
    pub fn new(settings: LoraPro, config: AdamWConfig, pairs: Vec<Pair>) -> Self {
        Self { settings, adam: AdamW::new(config, false), pairs }
    }
}

impl Optimizer for LoraProOptimizer {
    fn step_with(
        &mut self,
        parameters: &[(String, &Var)],
        gradients: &[Option<Tensor>],
        how: &dyn Fn(&str) -> Result<ParamGroup>,
        rate: f64,
    ) -> Result<()> {
        let place: HashMap<&str, usize> = parameters.iter().enumerate().map(|(i, (n, _))| (n.as_str(), i)).collect();
        let of = |pair: &Pair| {
            let at = |key: &str| place.get(format!("{}.{key}", pair.module).as_str()).copied();
            Some((at("lora_A")?, at("lora_B")?))
        };
        let f64s = |t: &Tensor| t.to_dtype(DType::F64);
        let factors = |(i, j): (usize, usize)| -> Result<(Tensor, Tensor)> {
            Ok((f64s(parameters[i].1.as_tensor())?, f64s(parameters[j].1.as_tensor())?))
        };
        let (full, delta) = (self.settings.full, self.settings.delta);
        let mut gradients = gradients.to_vec();
        // The first look at every pair: the adjusted gradients themselves, or with `full` the direction of the product.
        let first = |pair: &Pair| -> Result<Option<(usize, usize, Tensor, Tensor)>> {
            let Some((i, j)) = of(pair) else { return Ok(None) };
            let (Some(ga), Some(gb)) = (&gradients[i], &gradients[j]) else { return Ok(None) };
            let (a, b) = factors((i, j))?;
            let (ga, gb) = corrected((&a, &b), (&f64s(ga)?, &f64s(gb)?), pair.scaling, delta, !full)?;
            Ok(Some((i, j, ga, gb)))
        };
        let found = self.pairs.par_iter().map(first).collect::<Result<Vec<_>>>()?;
        for (pair, found) in self.pairs.iter().zip(found) {
            let Some((i, j, ga, gb)) = found else { continue };
            let dtype = parameters[i].1.dtype();
            if !full {
                (gradients[i], gradients[j]) = (Some(ga.to_dtype(dtype)?), Some(gb.to_dtype(dtype)?));
                continue;
            }
            let ((a, b), s) = (factors((i, j))?, pair.scaling);
            let g = equivalent((&a, &b), (&ga, &gb), s)?.to_dtype(dtype)?;
            let g = f64s(&self.adam.direction(&format!("{}.lora_pro", pair.module), &g)?)?;
            let (ga, gb) = ((b.t()?.matmul(&g)? * s)?, (g.matmul(&a.t()?)? * s)?);
            let (ga, gb) = corrected((&a, &b), (&ga, &gb), s, delta, true)?;
            for (k, old, step) in [(i, a, ga), (j, b, gb)] {
                let (name, var) = &parameters[k];
                let how = how(name)?;
                let rate = rate * how.rate;
                let keep = if how.decay { 1.0 - rate * self.adam.config.weight_decay } else { 1.0 };
                var.set(&((old * keep)? - (step * rate)?)?.to_dtype(dtype)?)?;
                gradients[k] = None;
            }
        }
        self.adam.step_with(parameters, &gradients, how, rate)
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        self.adam.state()
    }

    fn restore(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        self.adam.restore(state)
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};

    use super::*;

    fn random(rows: usize, columns: usize, seed: u64) -> Tensor {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let data: Vec<f64> = (0..rows * columns).map(|_| rng.random_range(-1.0..1.0)).collect();
        Tensor::from_vec(data, (rows, columns), &Device::Cpu).unwrap()
    }

    fn norm(t: &Tensor) -> f64 {
        t.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt()
    }

    /// A, B, G and the plain gradients of A and B at s = 1.7.
    fn case() -> (Tensor, Tensor, Tensor, Tensor, Tensor) {
        let (a, b, g) = (random(3, 8, 1), random(6, 3, 2), random(6, 8, 3));
        let ga = (b.t().unwrap().matmul(&g).unwrap() * 1.7).unwrap();
        let gb = (g.matmul(&a.t().unwrap()).unwrap() * 1.7).unwrap();
        (a, b, g, ga, gb)
    }

    #[test]
    fn the_closed_form_is_the_minimiser() -> candle_core::Result<()> {
        let (a, b, g, ga, gb) = case();
        let (ha, hb) = corrected((&a, &b), (&ga, &gb), 1.7, 0.0, true)?;
        let distance = |ga: &Tensor, gb: &Tensor| norm(&(equivalent((&a, &b), (ga, gb), 1.7).unwrap() - &g).unwrap());
        let least = distance(&ha, &hb);
        assert!(least < distance(&ga, &gb));
        for seed in 10..60 {
            let nudge =
                |t: &Tensor, s| (t + (random(t.dim(0).unwrap(), t.dim(1).unwrap(), s) * 0.01).unwrap()).unwrap();
            assert!(least <= distance(&nudge(&ha, seed), &nudge(&hb, seed + 100)) + 1e-12);
        }
        // The step of the product does not depend on X.
        let (xa, xb) = corrected((&a, &b), (&ga, &gb), 1.7, 0.0, false)?;
        let one = equivalent((&a, &b), (&ha, &hb), 1.7)?;
        assert!(norm(&(one - equivalent((&a, &b), (&xa, &xb), 1.7)?)?) < 1e-9);
        // Descent, for X = 0.
        let along = (xa * &ga)?.sum_all()?.to_scalar::<f64>()? + (xb * &gb)?.sum_all()?.to_scalar::<f64>()?;
        assert!(along >= 0.0);
        Ok(())
    }

    #[test]
    fn sylvester_is_solved_and_the_first_step_is_its_formula() -> candle_core::Result<()> {
        let (a, b, _, ga, gb) = case();
        let (p, q) = (b.t()?.matmul(&b)?, a.matmul(&a.t()?)?);
        let c = random(3, 3, 9);
        let x = sylvester(&Spectrum::of(&p)?, &Spectrum::of(&q)?, &c)?;
        assert!(norm(&((p.matmul(&x)? + x.matmul(&q)?)? - &c)?) < 1e-10);
        let zero = b.zeros_like()?;
        let (ha, hb) = corrected((&a, &zero), (&ga, &gb), 1.7, 0.0, true)?;
        assert_eq!(norm(&(ha - &ga)?), 0.0);
        let expected = (gb.matmul(&Spectrum::of(&q)?.inverse(0.0)?)? / (1.7 * 1.7))?;
        assert!(norm(&(hb - expected)?) < 1e-12);
        Ok(())
    }

    /// With B A able to be any weight, the full variant walks as AdamW on the weight does.
    #[test]
    fn full_rank_follows_full_adamw() -> Result<()> {
        let (target, steps) = (random(6, 6, 4), 30);
        let (a, b) = (Var::from_tensor(&random(6, 6, 5))?, Var::from_tensor(&random(6, 6, 6))?);
        let weight = Var::from_tensor(&(b.matmul(&a)? * 1.7)?)?;
        let config = AdamWConfig::default();
        let pairs = vec![Pair { module: "m".into(), scaling: 1.7 }];
        let mut pro = LoraProOptimizer::new(LoraPro { full: true, delta: 0.0 }, config, pairs);
        let mut plain = AdamW::new(config, false);
        let parameters = [("m.lora_A".to_string(), &a), ("m.lora_B".to_string(), &b)];
        for step in 0..steps {
            let product = (b.matmul(&a)? * 1.7)?;
            let g = (&product - &target)?;
            let gradients = [(b.t()?.matmul(&g)? * 1.7)?, (g.matmul(&a.t()?)? * 1.7)?].map(Some);
            pro.step(&parameters, &gradients, 1e-3)?;
            let g = (weight.as_tensor() - &target)?;
            plain.step(&[("w".to_string(), &weight)], &[Some(g)], 1e-3)?;
            let apart = norm(&((b.matmul(&a)? * 1.7)? - weight.as_tensor())?);
            assert!(apart < 1e-3, "step {step}: {apart}");
        }
        Ok(())
    }
}
