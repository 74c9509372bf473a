//! # FlyLoRA: a frozen sparse A projects and routes, the top-k columns of B act
//!
//! Zou et al. 2025, *FlyLoRA: Boosting Task Decoupling and Parameter Efficiency via Implicit Rank-Wise Mixture-of-Experts*, NeurIPS, arXiv
//! 2510.08396, eq. 8 to 11. A (r, inputs) is frozen and sparse: every row has p non-zeros at places drawn by lot, each N(0, 1/r²). With u = A x and a
//! bias d (r), the k ranks with the largest u + d act: `y = W x + (α/r) · Σ_{i among them} b_i u_i`. Only B (outputs, r) is trained. After each step
//! d moves towards an even use of the ranks: `d_i ← d_i + bias_u · sign(mean c − c_i)`, with c_i the rows of the step that chose i.
//!
//! Settings: `r`, `lora_alpha`, `top_k` (k), `bias_u`; `select`: `signed` (the equation and the authors' fork of PEFT) or `magnitude` (|u + d|, their
//! one-file version); `input_gradient`: `keep`, or `cut` as in their float code, which lets no gradient through A; `density`: the share of a row of A that
//! is not zero (unless given, their code's p = inputs // (r // k)); `a_seed`: the seed of A, in place of the run's.
//!
//! d moves once a step here, by the counts of all its micro-batches. The authors' code moves it in each forward, evaluation and recomputation
//! included: up to 32 times a step with their script. Rows are not shared between sequences in training, so that every token counts once.
//!
//! Which ranks act depends on the token, so no fixed weight gives the same (but for k = r): it cannot be merged, and is served as it is. The
//! authors' files say `LORA`, with `bias_u` and `top_k` in the configuration and a tensor `lora_topk_bias` a module. They are read, and written again as
//! `FLYLORA`; stock PEFT refuses both. What they do not say is whether gradients went through A: going on from one keeps them.
//!
//! Trainable parameters of a projection: `outputs · r`.
//!
//! Meant for: adapters that are averaged later (A of different seeds is nearly orthogonal; docs/comparison.md does not tell it from LoRA there); half of LoRA's trained parameters. Step time is LoRA's of
//! rank r and a little more.
//!
//! ```
//! use lorimer_adapter::example::gated;
//! // r = 2, k = 1, α = 2: A x = (1, 3) for x = (1, 3) and A = I; rank 1 is chosen, and column 1 of B acts.
//! let tensors: &[(&str, &[usize], &[f64])] =
//!     &[("lora_A.weight", &[2, 2], &[1., 0., 0., 1.]), ("lora_B.weight", &[2, 2], &[5., 1., 7., 2.]), ("lora_topk_bias", &[2], &[0., 0.])];
//! let y = gated("flylora", r#"{"r": 2, "lora_alpha": 2, "top_k": 1}"#, &[&[0., 0.], &[0., 0.]], tensors, &[1., 3.]);
//! assert_eq!(y, [3.0, 6.0]);
//! ```

use std::sync::Arc;

use candle_core::{DType, Device, Result as TensorResult, Tensor, Var};
use lorimer_model::{Projection, Site};
use lorimer_tensor::RankGate;
use rand::SeedableRng;
use rand::seq::index::sample;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::entry::{Entry, Served};
use super::random::normal;
use super::routing::{Balance, check_choice, check_rate, choose, top_k};
use crate::delta::{Change, Delta, GatedLowRank, LowRank};
use crate::dropout::{Dropout, check_dropout};
use crate::error::{Error, Result};
use crate::file::dialects::flylora::moved_base;
use crate::file::keys::FileKeys;
use crate::method::{Method, ParameterSource};
use crate::parameter::{Parameter, Role};
use crate::settings::{PeftKeys, configure, from_peft_json, peft_json};
use crate::step::{Step, site_seed};
use crate::targets::Targeting;

/// Keys of LoRA's configuration that the authors' files have beside ours.
const PEFT_KEYS: PeftKeys = PeftKeys {
    inert: &[
        "init_lora_weights",
        "loftq_config",
        "megatron_core",
        "corda_config",
        "eva_config",
        "use_qalora",
        "qalora_group_size",
        "bias",
    ],
    refused: &[
        ("use_dora", "makes it DoRA"),
        ("rank_pattern", "asks for other ranks"),
        ("alpha_pattern", "asks for other α"),
        ("lora_bias", "adds a bias to B"),
        ("use_rslora", "scales by α/√r"),
        ("megatron_config", "is for the layers of Megatron"),
        ("modules_to_save", "brings whole modules"),
    ],
};

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "flylora",
    title: "Frozen sparse A, the top-k ranks of each token act",
    paper: "arXiv 2510.08396",
    kind: "projection",
    variants: &[],
    peft_type: "FLYLORA",
    mergeable: false,
    served: Served::Batched,
    lr: 5e-3,
    parts: &[],
    flags: &[("rank", "r"), ("alpha", "lora_alpha"), ("dropout", "lora_dropout")],
    source: include_str!("flylora.rs"),
    laws: &[
        (r#"{"r": 6, "top_k": 2}"#, 0.0),
        (r#"{"r": 4, "top_k": 1, "select": "magnitude", "lora_dropout": 0.2}"#, 0.0),
    ],
    build: |settings| FlyLora::checked(configure("flylora", settings)?),
    recognises: |config| config.get("peft_type").and_then(Value::as_str) == Some("FLYLORA"),
    from_file: |config| {
        if moved_base(config) {
            return Err(Error::Config(
                "adapter_config.json has a start that moved the base (init_lora_weights), from which the adapter counts; a FlyLoRA whose A was drawn by lot (`sparse`, `gaussian`) is read".into(),
            ));
        }
        FlyLora::checked(from_peft_json("flylora", config, &PEFT_KEYS)?)
    },
};

/// FlyLoRA's settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FlyLora {
    /// Which modules.
    #[serde(flatten)]
    pub targeting: Targeting,
    /// Number of ranks.
    pub r: usize,
    /// α; the change is multiplied by α/r.
    pub lora_alpha: f64,
    /// Ranks that act for a token.
    pub top_k: usize,
    /// How far d moves after a step.
    pub bias_u: f64,
    /// What the chosen ranks are the largest of.
    pub select: Select,
    /// Whether gradients go through A to lower layers.
    pub input_gradient: InputGradient,
    /// Share of a row of A that is not zero; `null`: the authors' code's.
    pub density: Option<f64>,
    /// Seed of A; `null`: the run's.
    pub a_seed: Option<u64>,
    /// Probability of zeroing an element of x before A, in training.
    pub lora_dropout: f64,
}

/// What the chosen ranks are the largest of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Select {
    /// u + d.
    #[default]
    Signed,
    /// |u + d|.
    Magnitude,
}

/// Whether gradients go through A.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InputGradient {
    /// They do.
    #[default]
    Keep,
    /// They do not.
    Cut,
}

impl Default for FlyLora {
    fn default() -> Self {
        Self {
            targeting: Targeting::default(),
            r: 32,
            lora_alpha: 64.0,
            top_k: 8,
            bias_u: 1e-3,
            select: Select::Signed,
            input_gradient: InputGradient::Keep,
            density: None,
            a_seed: None,
            lora_dropout: 0.0,
        }
    }
}

impl FlyLora {
    fn checked(self) -> Result<Box<dyn Method>> {
        if self.r == 0 || self.r > 1 << 16 {
            return Err(Error::Config(format!("r = {} should be between 1 and 65536", self.r)));
        }
        check_choice("top_k", self.top_k, self.r)?;
        check_rate("bias_u", self.bias_u)?;
        check_dropout("lora_dropout", self.lora_dropout)?;
        if self.density.is_some_and(|share| !(share > 0.0 && share <= 1.0)) {
            return Err(Error::Config("density should be above 0 and at most 1".into()));
        }
        if !self.lora_alpha.is_finite() {
            return Err(Error::Config("lora_alpha should be a finite number".into()));
        }
        Ok(Box::new(self))
    }

    /// Non-zeros of a row of A.
    pub fn nonzeros(&self, inputs: usize) -> usize {
        let p = match self.density {
            Some(share) => (share * inputs as f64).round() as usize,
            None => inputs / (self.r / self.top_k),
        };
        p.clamp(1, inputs.max(1))
    }

    /// A new A, whose non-zeros follow from the seed and the site.
    fn projection(&self, site: &Site, dtype: DType, rng: &mut ChaCha8Rng) -> Result<Tensor> {
        let (r, n, p) = (self.r, site.inputs, self.nonzeros(site.inputs));
        let values = (normal((r, p), rng)? / r as f64)?.to_dtype(DType::F64)?.to_vec2::<f64>()?;
        let mut a = vec![0f64; r * n];
        for (row, values) in a.chunks_mut(n.max(1)).zip(values) {
            sample(rng, n, p).iter().zip(values).for_each(|(place, value)| row[place] = value);
        }
        Ok(Tensor::from_vec(a, (r, n), &Device::Cpu)?.to_dtype(dtype)?)
    }
}

impl Method for FlyLora {
    fn name(&self) -> &'static str {
        "flylora"
    }

    fn targeting(&self) -> &Targeting {
        &self.targeting
    }

    fn config(&self) -> Map<String, Value> {
        peft_json("FLYLORA", self)
    }

    fn file_keys(&self) -> FileKeys {
        FileKeys::of_modules(&["lora_A.weight", "lora_B.weight", "lora_topk_bias"])
    }

    fn attach(&self, site: &Site, _base: &Projection, source: &mut ParameterSource<'_>) -> Result<Box<dyn Delta>> {
        let dtype = source.dtype();
        let mut rng = match self.a_seed {
            Some(seed) => ChaCha8Rng::seed_from_u64(site_seed(seed, &site.path)),
            None => source.rng(),
        };
        let shape = [self.r, site.inputs];
        let a = match source.is_file() {
            // A file says what was drawn; another draw would be another adapter.
            true => source
                .trainable("lora_A.weight", &shape, |_| Err(Error::Config("no start".into())))?
                .as_detached_tensor(),
            false => self.projection(site, dtype, &mut rng)?,
        };
        let b = source.trainable("lora_B.weight", &[site.outputs, self.r], |_| {
            Ok(Tensor::zeros((site.outputs, self.r), dtype, &Device::Cpu)?)
        })?;
        let balance = Balance::attach(source, "lora_topk_bias", self.r, self.bias_u)?;
        let dropout = Dropout::new(self.lora_dropout, &site.path);
        let scaling = self.lora_alpha / self.r as f64;
        Ok(Box::new(FlyDelta {
            a,
            b,
            balance,
            scaling,
            k: self.top_k,
            select: self.select,
            cut: self.input_gradient == InputGradient::Cut,
            dropout,
        }))
    }

    fn parameters(&self, site: &Site) -> Result<usize> {
        Ok(site.outputs * self.r)
    }

    fn rows_are_independent(&self) -> bool {
        false
    }
}

struct FlyDelta {
    /// (r, inputs), frozen.
    a: Tensor,
    /// (outputs, r).
    b: Var,
    balance: Balance,
    scaling: f64,
    k: usize,
    select: Select,
    cut: bool,
    dropout: Dropout,
}

impl Delta for FlyDelta {
    fn change(&self, _base: &Projection, _rows: usize, _step: &Step) -> TensorResult<Change> {
        let factors = LowRank { a: self.a.clone(), b: self.b.as_tensor().clone(), scaling: self.scaling };
        // Where every rank acts it is a low-rank change like any other.
        Ok(match self.k == self.b.dim(1)? && !self.cut {
            true => Change::LowRank(factors),
            false => Change::Gated(GatedLowRank { factors, input_gradient: !self.cut }),
        })
    }

    fn dropout(&self) -> Option<&Dropout> {
        Some(&self.dropout)
    }

    fn gates(&self, _x: &Tensor, u: &Tensor, step: &Step) -> TensorResult<Tensor> {
        let scores = u.detach().broadcast_add(&self.balance.bias.as_detached_tensor())?;
        let scores = if self.select == Select::Magnitude { scores.abs()? } else { scores };
        let (mask, counts) = top_k(&scores, self.k)?;
        self.balance.note(step, counts);
        Ok(mask)
    }

    fn rank_gate(&self) -> TensorResult<Option<Arc<dyn RankGate>>> {
        let bias = self.balance.bias.as_detached_tensor().to_dtype(DType::F32)?.to_vec1::<f32>()?;
        Ok(Some(Arc::new(FlyGate { bias, k: self.k, magnitude: self.select == Select::Magnitude })))
    }

    fn after_step(&self) -> TensorResult<()> {
        self.balance.after_step()
    }

    /// Every token of the data counts once, so rows are not shared in training.
    fn rows_are_independent(&self, step: &Step) -> bool {
        step.training.is_none()
    }

    fn parameters(&self) -> Vec<Parameter<'_>> {
        vec![
            Parameter::new("lora_B", &self.b, Role::B),
            Parameter::new("lora_topk_bias", &self.balance.bias, Role::Buffer),
        ]
    }

    fn stored(&self) -> TensorResult<Vec<(&'static str, Tensor)>> {
        let bias = self.balance.bias.as_detached_tensor();
        Ok(vec![("lora_A.weight", self.a.clone()), ("lora_B.weight", self.b.detach()), ("lora_topk_bias", bias)])
    }

    fn has_effect(&self, _base: &Projection) -> TensorResult<bool> {
        Ok(crate::delta::largest(&self.b)? > 0.0)
    }
}

/// The choice, as it is served.
#[derive(Debug)]
struct FlyGate {
    bias: Vec<f32>,
    k: usize,
    magnitude: bool,
}

impl RankGate for FlyGate {
    fn apply(&self, _first: usize, _x: &[f32], _inputs: usize, u: &mut [f32]) {
        let rank = self.bias.len();
        let (mut scores, mut chosen) = (vec![0f32; rank], vec![false; rank]);
        for u in u.chunks_exact_mut(rank.max(1)) {
            for ((score, &u), &d) in scores.iter_mut().zip(u.iter()).zip(&self.bias) {
                *score = if self.magnitude { (u + d).abs() } else { u + d };
            }
            choose(&scores, self.k, &mut chosen);
            u.iter_mut().zip(&chosen).filter(|(_, chosen)| !**chosen).for_each(|(u, _)| *u = 0.0);
        }
    }

    fn bytes(&self) -> usize {
        self.bias.len() * size_of::<f32>()
    }
}
