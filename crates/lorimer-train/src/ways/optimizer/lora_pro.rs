//! LoRA-Pro (Wang et al. 2025, arXiv 2407.18242, theorems 2.2 and 2.3): gradients of A and B whose step is nearest the full gradient.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Tensor, Var};
use lorimer_adapter::training::LoraPro;
use lorimer_tensor::linalg::eigh;
use rayon::prelude::*;

use super::{AdamW, AdamWConfig, Optimizer, ParamGroup};
use crate::error::Result;

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
