//! # TLoRA: the weight is transformed, and a compact residual added
//!
//! Tao et al. 2025, *Transformed Low-rank Adaptation via Tensor Decomposition and Its Applications to Text-to-image Models*, arXiv 2501.08727
//! (ICCV 2025), section 4: `W' = W T + R`. T (inputs, inputs) is a tensor-ring matrix: with inputs = I₁ ⋯ I_D and cores 𝒜ᵈ (I_d, I_d, R_t,
//! R_t), `T[(i₁…i_D), (j₁…j_D)] = trace(𝒜¹[i₁, j₁] ⋯ 𝒜ᴰ[i_D, j_D])`: dense and of full rank with D · I_d² · R_t² numbers. It starts as the
//! identity: every core has δ_ij at ring place (0, 0), the first has small noise elsewhere and the others nothing, so that T = I exactly and
//! gradients flow. R is a LoRA `B A` (`residual` lora) or a tensor ring over outputs and inputs (tr), in both cases zero at the start.
//!
//! `side=output` puts T on the other side: W' = T W + R. (Which side the paper's runs use could not be found out; there is no public code.)
//!
//! T is not formed in training: x is contracted with one core after the other. Where a width has no factors near each other (a prime, say), it
//! is padded with zeros to the next product; `inspect` shows the factors.
//!
//! Trainable parameters of a projection: `R_t² · Σ I_d²` and `r · (inputs + outputs)` (lora) or `r² · (Σ O_d + Σ I_d)` (tr).
//!
//! Meant for: very small adapters that turn the weight rather than add to it. A weight turned by a large rotation, of any form, is met with 0.73 to 0.85 of
//! the error of the best LoRA of as many parameters (rings of 2 on a 40 × 48 weight); one turned by a small rotation, near the identity, with the
//! same error (`crates/lorimer-train/tests/train/reproductions.rs`).
//!
//! Step time: T costs a row about `inputs · R_t² · Σ I_d` multiply-adds, three times a step, beside LoRA's two products with W: on
//! SmolLM2-135M its floor is about 1.5× LoRA's step.
//!
//! ```
//! use lorimer_adapter::example::project;
//! // inputs = 4 = 2 · 2, R_t = 1: T is the Kronecker product of its cores, here of a swap and the identity: (x₃, x₄, x₁, x₂).
//! let cores: &[(&str, &[f64])] = &[("tlora_core_0", &[0., 1., 1., 0.]), ("tlora_core_1", &[1., 0., 0., 1.])];
//! let y = project("tlora", r#"{"ring": 1, "r": 1}"#, &[&[1., 10., 100., 1000.]], cores, &[1., 2., 3., 4.]);
//! assert_eq!(y, [2143.0]);
//! ```

use std::collections::BTreeMap;

use candle_core::{Device, Result as TensorResult, Tensor, Var};
use lorimer_model::{Projection, Site};
use lorimer_tensor::{LowRankTerm, Ops, Part, frozen_linear};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::entry::{Entry, Served};
use super::random::{kaiming, normal};
use crate::delta::{Change, Delta, NotMergeable};
use crate::error::{Error, Result};
use crate::file::keys::FileKeys;
use crate::method::{Method, ParameterSource};
use crate::parameter::{Parameter, Role};
use crate::settings::{PeftKeys, configure, from_peft_json, peft_json};
use crate::step::Step;
use crate::targets::Targeting;

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "tlora",
    title: "A tensor-ring transform of the weight and a residual",
    paper: "arXiv 2501.08727",
    kind: "projection",
    variants: &["lora", "tr"],
    peft_type: "TLORA",
    mergeable: true,
    served: Served::Converted,
    lr: 5e-4,
    parts: &[],
    flags: &[("rank", "r")],
    source: include_str!("tlora.rs"),
    laws: &[
        (r#"{"r": 2}"#, 1e-12),
        (r#"{"r": 2, "variant": "tr", "factors": 3, "ring": 1}"#, 1e-12),
        (r#"{"r": 1, "side": "output", "ring": 3}"#, 1e-12),
    ],
    build: |settings| {
        let mut settings = settings.clone();
        if let Some(variant) = settings.remove("variant") {
            settings.insert("residual".into(), variant);
        }
        TloraConfig::check(configure("tlora", &settings)?)
    },
    recognises: |config| config.get("peft_type").and_then(Value::as_str) == Some("TLORA"),
    from_file: |config| TloraConfig::check(from_peft_json("tlora", config, &PeftKeys::NONE)?),
};

/// Form of the residual.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Residual {
    /// B A.
    #[default]
    Lora,
    /// A tensor ring.
    Tr,
}

/// Where T stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// W T.
    #[default]
    Input,
    /// T W.
    Output,
}

/// Settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TloraConfig {
    /// Which modules.
    #[serde(flatten)]
    pub targeting: Targeting,
    /// Rank of the residual: of B A, or of its ring.
    pub r: usize,
    /// R_t, the ring's rank in T.
    pub ring: usize,
    /// D, the number of T's cores: 2 or 3.
    pub factors: usize,
    /// Form of the residual.
    pub residual: Residual,
    /// Where T stands.
    pub side: Side,
    /// Deviation of the noise in the unused ring places of the first core.
    pub noise: f64,
}

impl Default for TloraConfig {
    fn default() -> Self {
        Self {
            targeting: Targeting::default(),
            r: 2,
            ring: 2,
            factors: 2,
            residual: Residual::Lora,
            side: Side::Input,
            noise: 0.02,
        }
    }
}

impl TloraConfig {
    fn check(self) -> Result<Box<dyn Method>> {
        let fail = |text: &str| Err(Error::Config(text.into()));
        if !(2..=3).contains(&self.factors) {
            return fail("`factors` should be 2 or 3");
        }
        if self.ring == 0 || self.ring > 64 || self.r == 0 || self.r > 1 << 12 {
            return fail("`ring` should be between 1 and 64 and `r` between 1 and 4096");
        }
        if self.residual == Residual::Tr && self.r > 64 {
            return fail("`r` should be at most 64 for a ring");
        }
        if !(0.0..10.0).contains(&self.noise) {
            return fail("`noise` should be at least 0 and below 10");
        }
        Ok(Box::new(Tlora { config: self }))
    }
}

struct Tlora {
    config: TloraConfig,
}

/// Most that the largest factor may be of the smallest before padding is better.
const SPREAD: usize = 4;

/// `count` factors as near to each other as can be, whose product is `n`, or a little more where `n` has none such.
pub fn factorise(n: usize, count: usize) -> Vec<usize> {
    fn exact(n: usize, count: usize) -> Vec<usize> {
        if count == 1 {
            return vec![n];
        }
        let root = (n as f64).powf(1.0 / count as f64);
        let first = (1..=root.round() as usize + 1).rev().find(|d| *d > 0 && n.is_multiple_of(*d)).unwrap_or(1);
        [vec![first], exact(n / first, count - 1)].concat()
    }
    fn padded(n: usize, count: usize) -> Vec<usize> {
        if count == 1 {
            return vec![n];
        }
        let first = (n as f64).powf(1.0 / count as f64).ceil() as usize;
        [vec![first], padded(n.div_ceil(first), count - 1)].concat()
    }
    let mut found = exact(n, count);
    let spread = |f: &[usize]| f.iter().max().copied().unwrap_or(1) > SPREAD * f.iter().min().copied().unwrap_or(1);
    if spread(&found) && n > SPREAD {
        found = padded(n, count);
    }
    found.sort_unstable();
    found
}

const CORES: [&str; 3] = ["tlora_core_0", "tlora_core_1", "tlora_core_2"];
const RING: [&str; 6] =
    ["tlora_ring_0", "tlora_ring_1", "tlora_ring_2", "tlora_ring_3", "tlora_ring_4", "tlora_ring_5"];
const FILE_KEYS: [&str; 11] =
    [CORES[0], CORES[1], CORES[2], RING[0], RING[1], RING[2], RING[3], RING[4], RING[5], "tlora_A", "tlora_B"];

impl Tlora {
    /// The width that T acts on.
    fn width(&self, site: &Site) -> usize {
        if self.config.side == Side::Input { site.inputs } else { site.outputs }
    }
}

impl Method for Tlora {
    fn name(&self) -> &'static str {
        "tlora"
    }

    fn targeting(&self) -> &Targeting {
        &self.config.targeting
    }

    fn config(&self) -> Map<String, Value> {
        peft_json("TLORA", &self.config)
    }

    fn file_keys(&self) -> FileKeys {
        FileKeys::of_modules(&FILE_KEYS)
    }

    fn attach(&self, site: &Site, _base: &Projection, source: &mut ParameterSource<'_>) -> Result<Box<dyn Delta>> {
        let (c, dtype) = (&self.config, source.dtype());
        let sides = factorise(self.width(site), c.factors);
        let mut cores = Vec::new();
        for (d, &side) in sides.iter().enumerate() {
            let shape = [side, side, c.ring, c.ring];
            cores.push(source.trainable(CORES[d], &shape, |rng| {
                let places = c.ring * c.ring;
                let noise = normal((side * side, places), rng)?.to_vec2::<f64>()?;
                let mut data = vec![0f64; side * side * places];
                for i in 0..side {
                    for j in 0..side {
                        let at = (i * side + j) * places;
                        if d == 0 {
                            (1..places).for_each(|k| data[at + k] = c.noise * noise[i * side + j][k]);
                        }
                        data[at] = if i == j { 1.0 } else { 0.0 };
                    }
                }
                Ok(Tensor::from_vec(data, &shape, &Device::Cpu)?)
            })?);
        }
        let residual = match c.residual {
            Residual::Lora => {
                let r = c.r;
                let a =
                    source.trainable("tlora_A", &[r, site.inputs], |rng| Ok(kaiming((r, site.inputs), dtype, rng)?))?;
                let zero = Tensor::zeros((site.outputs, r), dtype, &Device::Cpu)?;
                ResidualPart::Lora(a, source.trainable("tlora_B", &[site.outputs, r], |_| Ok(zero))?)
            }
            Residual::Tr => {
                let (outputs, inputs) = (factorise(site.outputs, c.factors), factorise(site.inputs, c.factors));
                let mut ring = Vec::new();
                let last = outputs.len() + inputs.len() - 1;
                for (k, &n) in outputs.iter().chain(&inputs).enumerate() {
                    let shape = [n, c.r, c.r];
                    ring.push(source.trainable(RING[k], &shape, |rng| {
                        // The last core is zero, the others keep the size of what passes through.
                        let scale = if k == last { 0.0 } else { (c.r as f64).powf(-0.5) };
                        Ok((normal((n, c.r * c.r), rng)? * scale)?.reshape(&shape)?)
                    })?);
                }
                ResidualPart::Tr { ring, outputs: outputs.len(), shape: (site.outputs, site.inputs) }
            }
        };
        Ok(Box::new(TloraDelta { cores, width: self.width(site), side: c.side, residual }))
    }

    fn parameters(&self, site: &Site) -> Result<usize> {
        let c = &self.config;
        let sum = |n: usize| factorise(n, c.factors).iter().sum::<usize>();
        let transform = c.ring * c.ring * factorise(self.width(site), c.factors).iter().map(|n| n * n).sum::<usize>();
        Ok(transform
            + match c.residual {
                Residual::Lora => c.r * (site.inputs + site.outputs),
                Residual::Tr => c.r * c.r * (sum(site.outputs) + sum(site.inputs)),
            })
    }

    fn activations_per_row(&self, site: &Site) -> usize {
        let width = self.width(site);
        let sides = factorise(width, self.config.factors);
        if sides.len() == 2 && sides[0] * sides[1] == width {
            return self.config.r;
        }
        (2 * self.config.ring * self.config.ring + 4) * width + 3 * site.outputs
    }

    fn remarks(&self, tensors: &BTreeMap<String, Tensor>) -> Result<Vec<(String, f64)>> {
        let sides = CORES.iter().filter_map(|key| Some((key, tensors.get(*key)?.dims().first().copied()?)));
        Ok(sides.map(|(key, n)| (key.replace("tlora_core", "factor"), n as f64)).collect())
    }
}

enum ResidualPart {
    /// A (r, inputs) and B (outputs, r).
    Lora(Var, Var),
    /// Cores (n, r, r): first those of the outputs.
    Tr { ring: Vec<Var>, outputs: usize, shape: (usize, usize) },
}

struct TloraDelta {
    /// (I_d, I_d, R_t, R_t).
    cores: Vec<Var>,
    width: usize,
    side: Side,
    residual: ResidualPart,
}

/// The products of the cores' matrices over all places: from (n₁, r, r), (n₂, r, r), … to (n₁ n₂ ⋯, r, r).
fn chain(cores: &[Tensor]) -> TensorResult<Tensor> {
    let mut product = cores[0].clone();
    for core in &cores[1..] {
        let ((m, r, _), (n, ..)) = (product.dims3()?, core.dims3()?);
        let right = core.transpose(0, 1)?.reshape((r, n * r))?;
        product = product.reshape((m * r, r))?.matmul(&right)?.reshape((m, r, n, r))?;
        product = product.transpose(1, 2)?.reshape((m * n, r, r))?;
    }
    Ok(product)
}

impl ResidualPart {
    /// Low-rank factors (k, inputs) and (outputs, k) of R.
    fn factors(&self) -> TensorResult<(Tensor, Tensor)> {
        match self {
            Self::Lora(a, b) => Ok((a.as_tensor().clone(), b.as_tensor().clone())),
            // R[o, i] = Σ_ac L[o, a, c] M[i, c, a].
            Self::Tr { ring, outputs, shape } => {
                let all: Vec<Tensor> = ring.iter().map(|v| v.as_tensor().clone()).collect();
                let left = chain(&all[..*outputs])?.narrow(0, 0, shape.0)?.flatten(1, 2)?;
                let right = chain(&all[*outputs..])?.narrow(0, 0, shape.1)?.transpose(1, 2)?.flatten(1, 2)?;
                Ok((right.t()?.contiguous()?, left))
            }
        }
    }
}

impl TloraDelta {
    /// T x for every row of x (rows, width), core by core.
    fn transform(&self, x: &Tensor) -> TensorResult<Tensor> {
        let (rows, width) = x.dims2()?;
        let sides: Vec<usize> = self.cores.iter().map(|c| c.dim(0)).collect::<TensorResult<_>>()?;
        let ring = self.cores[0].dim(2)?;
        let padded: usize = sides.iter().product();
        let mut state = if padded > width { x.pad_with_zeros(1, 0, padded - width)? } else { x.clone() };
        let (mut before, mut after) = (rows * padded, 1);
        for (d, core) in self.cores.iter().enumerate().rev() {
            let (n, last) = (sides[d], d + 1 == sides.len());
            before /= n;
            // 𝒜[i, j, b, c], where c was summed with the cores behind and b will be with those before.
            state = if last {
                // (…, j) · (j, (i, b, c)).
                let core = core.permute((1, 0, 2, 3))?.reshape((n, n * ring * ring))?;
                state.reshape((before, n))?.matmul(&core)?
            } else {
                // (…, after, a, (j, c)) · ((j, c), (i, b)).
                let state = state.reshape((before, n, after, ring, ring))?.permute((0, 2, 4, 1, 3))?;
                let core = core.permute((1, 3, 0, 2))?.reshape((n * ring, n * ring))?;
                let moved = state.reshape((before * after * ring, n * ring))?.matmul(&core)?;
                let moved = moved.reshape((before, after, ring, n, ring))?.permute((0, 3, 1, 4, 2))?;
                if d == 0 {
                    // The ring closes: b = a.
                    let closed = moved.reshape((before * n * after, ring * ring))?;
                    let eye = Tensor::eye(ring, closed.dtype(), closed.device())?.reshape((ring * ring, 1))?;
                    closed.matmul(&eye)?
                } else {
                    moved.contiguous()?
                }
            };
            after *= n;
        }
        state.reshape((rows, padded))?.narrow(1, 0, width)?.contiguous()
    }

    /// T as a matrix (width, width).
    fn dense(&self) -> TensorResult<Tensor> {
        let sides: Vec<usize> = self.cores.iter().map(|c| c.dim(0)).collect::<TensorResult<_>>()?;
        let ring = self.cores[0].dim(2)?;
        let flat: TensorResult<Vec<Tensor>> = self.cores.iter().map(|c| c.flatten(0, 1)).collect();
        let eye = Tensor::eye(ring, self.cores[0].dtype(), &Device::Cpu)?;
        let traced = chain(&flat?)?.broadcast_mul(&eye)?.sum((1, 2))?;
        let places: Vec<usize> = sides.iter().flat_map(|&n| [n, n]).collect();
        let order: Vec<usize> = (0..sides.len()).map(|d| 2 * d).chain((0..sides.len()).map(|d| 2 * d + 1)).collect();
        let n: usize = sides.iter().product();
        let t = traced.reshape(places)?.permute(order)?.reshape((n, n))?;
        t.narrow(0, 0, self.width)?.narrow(1, 0, self.width)?.contiguous()
    }

    fn whole(&self, base: &Projection, x: &Tensor) -> TensorResult<Tensor> {
        let moved = match self.side {
            Side::Input => frozen_linear(&self.transform(x)?, &base.weight)?,
            Side::Output => self.transform(&frozen_linear(x, &base.weight)?)?,
        };
        let (a, b) = self.residual.factors()?;
        moved + x.matmul(&a.t()?)?.matmul(&b.t()?)?
    }
}

impl Delta for TloraDelta {
    fn change(&self, _base: &Projection, _rows: usize, _step: &Step) -> TensorResult<Change> {
        Ok(Change::Free)
    }

    fn output(&self, ops: Ops<'_>, base: &Projection, x: &Tensor, _step: &Step) -> TensorResult<Tensor> {
        let parameters: Vec<&Tensor> = self.parameters().into_iter().map(|p| p.var.as_tensor()).collect();
        let (first, second) = match &self.cores[..] {
            [first, second] if ops.is_recorded() && first.dim(0)? * second.dim(0)? == self.width => (first, second),
            _ => return ops.subgraph(&[x], &parameters, |t| self.whole(base, &t[0])),
        };
        let moved = match self.side {
            Side::Input => ops.linear(&ops.ring_transform(x, first, second)?, &base.weight)?,
            Side::Output => ops.ring_transform(&ops.linear(x, &base.weight)?, first, second)?,
        };
        let factors = ops.subgraph_all(&[], &parameters, |_| {
            let (a, b) = self.residual.factors()?;
            Ok(vec![a, b])
        })?;
        let (a, b) = (factors[0].clone(), factors[1].clone());
        let low_rank = Some(LowRankTerm::new(a, b, 1.0));
        let residual = &ops.project(x, &[Part { weight: None, low_rank }])?[0];
        ops.add(&moved, residual)
    }

    fn free_weight(&self, base: &Projection) -> TensorResult<Result<Tensor, NotMergeable>> {
        let t = self.dense()?;
        let w = base.dense(t.dtype())?;
        let moved = if self.side == Side::Input { w.matmul(&t)? } else { t.matmul(&w)? };
        let (a, b) = self.residual.factors()?;
        Ok(Ok((moved + b.matmul(&a)?)?))
    }

    fn parameters(&self) -> Vec<Parameter<'_>> {
        let core = |(key, var)| Parameter::new(key, var, Role::Core);
        let mut all: Vec<_> = CORES.into_iter().zip(&self.cores).map(core).collect();
        match &self.residual {
            ResidualPart::Lora(a, b) => {
                all.extend([Parameter::new("tlora_A", a, Role::A), Parameter::new("tlora_B", b, Role::B)])
            }
            ResidualPart::Tr { ring, .. } => all.extend(RING.into_iter().zip(ring).map(core)),
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;
    use lorimer_tensor::FrozenWeight;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;
    use serde_json::json;

    use super::*;
    use crate::delta::largest;
    use crate::method::CalibrationStats;

    #[test]
    fn factors_are_near_each_other_or_padded() {
        assert_eq!(factorise(576, 2), [24, 24]);
        assert_eq!(factorise(1536, 2), [32, 48]);
        assert_eq!(factorise(1536, 3), [8, 12, 16]);
        let prime = factorise(131, 2);
        assert!(prime.iter().product::<usize>() >= 131 && prime[1] <= 2 * prime[0], "{prime:?}");
    }

    /// Core by core is the dense product, whatever the number of factors; at the start both are the identity; after a random step T is
    /// dense and of full rank.
    #[test]
    fn core_by_core_equals_the_dense_transform() -> Result<()> {
        for (factors, width) in [(2, 12), (3, 12), (2, 13), (3, 8)] {
            let mut rng = ChaCha8Rng::seed_from_u64(6);
            let base =
                Projection { weight: FrozenWeight::Dense(kaiming((5, width), DType::F64, &mut rng)?), bias: None };
            let site = Site::new("p", (5, width));
            let stats = CalibrationStats::new();
            let settings = json!({ "factors": factors, "ring": 3 });
            let config = settings.as_object().unwrap();
            let tlora = Tlora { config: configure("tlora", config)? };
            let mut source = ParameterSource::start(&site, DType::F64, 0, &stats);
            let attached = tlora.attach(&site, &base, &mut source)?;
            let vars: Vec<Var> = attached.trainable().into_iter().map(|(_, v)| v.clone()).collect();
            let cores = vars[..factors].to_vec();
            let residual = ResidualPart::Lora(vars[factors].clone(), vars[factors + 1].clone());
            let delta = TloraDelta { cores, width, side: Side::Input, residual };
            let eye = Tensor::eye(width, DType::F64, &Device::Cpu)?;
            assert!(largest(&(delta.dense()? - &eye)?)? < 1e-12);
            let x = kaiming((4, width), DType::F64, &mut rng)?;
            assert!(largest(&(delta.transform(&x)? - &x)?)? < 1e-12);
            for core in &delta.cores {
                let step = (normal((core.elem_count(), 1), &mut rng)?.reshape(core.shape())? * 0.1)?;
                core.set(&(core.as_tensor() + step)?)?;
            }
            let t = delta.dense()?;
            let expected = x.matmul(&t.t()?)?;
            assert!(largest(&(delta.transform(&x)? - expected)?)? < 1e-12);
            let (_, s, _) = lorimer_tensor::linalg::svd(&t)?;
            assert!(s.to_vec1::<f64>()?.iter().all(|s| *s > 1e-6), "full rank");
            assert!(t.abs()?.flatten_all()?.min(0)?.to_scalar::<f64>()? > 0.0, "dense");
        }
        Ok(())
    }
}
