//! # SMoRA: every rank is an expert that a small router chooses for each token
//!
//! Zhao et al. 2025, *Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning*, arXiv 2501.15103. A router
//! R (r/q, inputs) scores blocks of q ranks, p = σ(R x); with a bias b (r), the k = `activate_r` ranks with the largest v = p + b act, with gates
//! `g_i = k · e_i / Σ e` over the chosen: `y = W x + (α/k) · B (g ∘ (A x))`. A, B and R are trained; after each step b moves towards an even use of the ranks,
//! `b_i ← b_i + bias_update_rate · sign(mean c − c_i)`, with c_i the rows of the step that chose i. The scale is α/k, whatever r is: with equal scores
//! the change is a LoRA of the chosen ranks.
//!
//! Settings: `r`, `lora_alpha`, `activate_r` (k), `rank_partition` (q, which divides r and k), `bias_update_rate`; `gate`: `code` (e = v, as in the authors'
//! code) or `unbiased` (e = p, b decides the choice only); e is at least 1e-6, which the code does without; `train_router` false leaves R at its start, a control:
//! routing that learned nothing.
//!
//! With q = k one block acts and its gate is 1 whatever R says: the router has no gradient then, and is the one it began as. In the authors' code AdamW
//! moves b too, ten times as far as the rule; here the rule alone does. b moves once a step; rows are not shared between sequences in training,
//! so that every token counts once.
//!
//! Gates depend on the token, even with k = r, so no fixed weight gives the same: it cannot be merged, and is served as it is.
//!
//! Trainable parameters of a projection: `r · (inputs + outputs) + (r/q) · inputs`.
//!
//! Meant for: one adapter for unlike tasks. Step time is that of LoRA of rank r and r/q.
//!
//! ```
//! use lorimer_adapter::example::gated;
//! // r = 2, k = 1, α = 1: the router prefers rank 0 for x = (1, 0), whose gate is then 1.
//! let tensors: &[(&str, &[usize], &[f64])] = &[
//!     ("lora_A.weight", &[2, 2], &[2., 0., 0., 1.]),
//!     ("lora_B.weight", &[2, 2], &[1., 0., 3., 0.]),
//!     ("lora_router.weight", &[2, 2], &[1., 0., -1., 0.]),
//!     ("lora_biases", &[2], &[0., 0.]),
//! ];
//! let y = gated("smora", r#"{"r": 2, "lora_alpha": 1, "activate_r": 1}"#, &[&[0., 0.], &[0., 0.]], tensors, &[1., 0.]);
//! assert_eq!(y, [2.0, 6.0]);
//! ```

use std::sync::Arc;

use candle_core::{DType, Device, Result as TensorResult, Tensor, Var};
use lorimer_model::{Projection, Site};
use lorimer_tensor::RankGate;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::entry::{Entry, Served};
use super::random::kaiming;
use super::routing::{Balance, check_choice, check_rate, choose, top_k};
use crate::delta::{Change, Delta, GatedLowRank, LowRank};
use crate::dropout::{Dropout, check_dropout};
use crate::error::{Error, Result};
use crate::file::keys::FileKeys;
use crate::method::{Method, ParameterSource};
use crate::parameter::{Parameter, Role};
use crate::settings::{PeftKeys, configure, from_peft_json, peft_json};
use crate::step::Step;
use crate::targets::Targeting;

/// Least part of a chosen rank in the gates.
const FLOOR: f64 = 1e-6;

/// Keys of LoRA's configuration that the authors' files have beside ours.
const PEFT_KEYS: PeftKeys = PeftKeys {
    inert: &[
        "init_lora_weights",
        "epsilon_greedy",
        "dense_compute",
        "megatron_core",
        "use_rslora",
        "bias",
        "loftq_config",
    ],
    refused: &[
        ("use_dora", "makes it DoRA"),
        ("rank_pattern", "asks for other ranks, which the authors' code leaves out of account"),
        ("alpha_pattern", "asks for other α, which the authors' code leaves out of account"),
        ("megatron_config", "is for the layers of Megatron"),
        ("modules_to_save", "brings whole modules"),
    ],
};

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "smora",
    title: "Every rank an expert, chosen by a router for each token",
    paper: "arXiv 2501.15103",
    kind: "projection",
    variants: &[],
    peft_type: "SRMOLE",
    mergeable: false,
    served: Served::Batched,
    lr: 2e-3,
    parts: &[],
    flags: &[("rank", "r"), ("alpha", "lora_alpha"), ("dropout", "lora_dropout")],
    source: include_str!("smora.rs"),
    laws: &[
        (r#"{"r": 6, "activate_r": 2}"#, 0.0),
        (r#"{"r": 8, "activate_r": 4, "rank_partition": 2, "gate": "unbiased", "lora_dropout": 0.2}"#, 0.0),
    ],
    build: |settings| Smora::checked(configure("smora", settings)?),
    recognises: |config| config.get("peft_type").and_then(Value::as_str) == Some("SRMOLE"),
    from_file: |config| Smora::checked(from_peft_json("smora", config, &PEFT_KEYS)?),
};

/// SMoRA's settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Smora {
    /// Which modules.
    #[serde(flatten)]
    pub targeting: Targeting,
    /// Number of ranks.
    pub r: usize,
    /// α; the change is multiplied by α over `activate_r`.
    pub lora_alpha: f64,
    /// Ranks that act for a token.
    pub activate_r: usize,
    /// Ranks that share a score.
    pub rank_partition: usize,
    /// How far b moves after a step.
    pub bias_update_rate: f64,
    /// What the gates are made of.
    pub gate: Gates,
    /// Whether R is trained.
    pub train_router: bool,
    /// Probability of zeroing an element of x before A and R, in training.
    pub lora_dropout: f64,
}

/// What the gates are made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gates {
    /// p + b.
    #[default]
    Code,
    /// p.
    Unbiased,
}

impl Default for Smora {
    fn default() -> Self {
        Self {
            targeting: Targeting::default(),
            r: 64,
            lora_alpha: 16.0,
            activate_r: 8,
            rank_partition: 1,
            bias_update_rate: 1e-5,
            gate: Gates::Code,
            train_router: true,
            lora_dropout: 0.0,
        }
    }
}

impl Smora {
    fn checked(self) -> Result<Box<dyn Method>> {
        let fail = |text: String| Err(Error::Config(text));
        if self.r == 0 || self.r > 1 << 16 {
            return fail(format!("r = {} should be between 1 and 65536", self.r));
        }
        check_choice("activate_r", self.activate_r, self.r)?;
        let q = self.rank_partition;
        if q == 0 || !self.r.is_multiple_of(q) || !self.activate_r.is_multiple_of(q) {
            return fail(format!(
                "rank_partition = {q} should divide r = {} and activate_r = {}",
                self.r, self.activate_r
            ));
        }
        check_rate("bias_update_rate", self.bias_update_rate)?;
        check_dropout("lora_dropout", self.lora_dropout)?;
        if !self.lora_alpha.is_finite() {
            return fail("lora_alpha should be a finite number".into());
        }
        Ok(Box::new(self))
    }
}

impl Method for Smora {
    fn name(&self) -> &'static str {
        "smora"
    }

    fn targeting(&self) -> &Targeting {
        &self.targeting
    }

    fn config(&self) -> Map<String, Value> {
        peft_json("SRMOLE", self)
    }

    fn file_keys(&self) -> FileKeys {
        FileKeys::of_modules(&["lora_A.weight", "lora_B.weight", "lora_router.weight", "lora_biases"])
    }

    fn attach(&self, site: &Site, _base: &Projection, source: &mut ParameterSource<'_>) -> Result<Box<dyn Delta>> {
        let (dtype, blocks) = (source.dtype(), self.r / self.rank_partition);
        let a = source.trainable("lora_A.weight", &[self.r, site.inputs], |rng| {
            Ok(kaiming((self.r, site.inputs), dtype, rng)?)
        })?;
        let router = source.trainable("lora_router.weight", &[blocks, site.inputs], |rng| {
            Ok(kaiming((blocks, site.inputs), dtype, rng)?)
        })?;
        let b = source.trainable("lora_B.weight", &[site.outputs, self.r], |_| {
            Ok(Tensor::zeros((site.outputs, self.r), dtype, &Device::Cpu)?)
        })?;
        let balance = Balance::attach(source, "lora_biases", self.r, self.bias_update_rate)?;
        let dropout = Dropout::new(self.lora_dropout, &site.path);
        Ok(Box::new(SmoraDelta { a, b, router, balance, own: self.clone(), dropout }))
    }

    fn parameters(&self, site: &Site) -> Result<usize> {
        let router = if self.train_router { self.r / self.rank_partition * site.inputs } else { 0 };
        Ok(self.r * (site.inputs + site.outputs) + router)
    }

    fn rows_are_independent(&self) -> bool {
        false
    }
}

struct SmoraDelta {
    /// (r, inputs).
    a: Var,
    /// (outputs, r).
    b: Var,
    /// R (r/q, inputs).
    router: Var,
    balance: Balance,
    own: Smora,
    dropout: Dropout,
}

impl SmoraDelta {
    /// p of rows (rows, inputs): (rows, r).
    fn scores(&self, x: &Tensor) -> TensorResult<Tensor> {
        let router = if self.own.train_router { self.router.as_tensor().clone() } else { self.router.detach() };
        let logits = x.matmul(&router.t()?)?;
        // The logistic function by way of tanh: 1/(1 + e^−z) has a gradient that is no number where e^−z overflows, as at a first token's
        // large hidden state.
        let p = (((logits * 0.5)?.tanh()? + 1.0)? * 0.5)?;
        let (rows, blocks) = p.dims2()?;
        match self.own.rank_partition {
            1 => Ok(p),
            q => p.unsqueeze(2)?.broadcast_as((rows, blocks, q))?.contiguous()?.reshape((rows, blocks * q)),
        }
    }
}

impl Delta for SmoraDelta {
    fn change(&self, _base: &Projection, _rows: usize, _step: &Step) -> TensorResult<Change> {
        let scaling = self.own.lora_alpha / self.own.activate_r as f64;
        let factors = LowRank { a: self.a.as_tensor().clone(), b: self.b.as_tensor().clone(), scaling };
        Ok(Change::Gated(GatedLowRank { factors, input_gradient: true }))
    }

    fn dropout(&self) -> Option<&Dropout> {
        Some(&self.dropout)
    }

    fn gates(&self, x: &Tensor, _u: &Tensor, step: &Step) -> TensorResult<Tensor> {
        let p = self.scores(x)?;
        let v = p.broadcast_add(&self.balance.bias.detach())?;
        let (mask, counts) = top_k(&v, self.own.activate_r)?;
        self.balance.note(step, counts);
        let e = if self.own.gate == Gates::Code { v } else { p };
        let e = (e.maximum(&(e.ones_like()? * FLOOR)?)? * mask)?;
        e.broadcast_div(&e.sum_keepdim(1)?)? * self.own.activate_r as f64
    }

    fn rank_gate(&self) -> TensorResult<Option<Arc<dyn RankGate>>> {
        let numbers = |t: &Tensor| t.detach().to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
        let (router, bias) = (numbers(&self.router)?, numbers(&self.balance.bias)?);
        let (k, q) = (self.own.activate_r, self.own.rank_partition);
        Ok(Some(Arc::new(Router { router, bias, k, q, biased: self.own.gate == Gates::Code })))
    }

    fn after_step(&self) -> TensorResult<()> {
        self.balance.after_step()
    }

    /// Every token of the data counts once, so rows are not shared in training.
    fn rows_are_independent(&self, step: &Step) -> bool {
        step.training.is_none()
    }

    fn parameters(&self) -> Vec<Parameter<'_>> {
        let mut all = Vec::from(Parameter::pair(&self.a, &self.b));
        all.push(Parameter::new("lora_biases", &self.balance.bias, Role::Buffer));
        if self.own.train_router {
            all.push(Parameter::new("lora_router", &self.router, Role::Router));
        }
        all
    }

    fn stored(&self) -> TensorResult<Vec<(&'static str, Tensor)>> {
        Ok(vec![
            ("lora_A.weight", self.a.detach()),
            ("lora_B.weight", self.b.detach()),
            ("lora_router.weight", self.router.detach()),
            ("lora_biases", self.balance.bias.detach()),
        ])
    }

    fn has_effect(&self, _base: &Projection) -> TensorResult<bool> {
        Ok(crate::delta::largest(&self.b)? > 0.0)
    }
}

/// The router, as it is served.
#[derive(Debug)]
struct Router {
    /// (r/q, inputs).
    router: Vec<f32>,
    bias: Vec<f32>,
    k: usize,
    q: usize,
    biased: bool,
}

impl RankGate for Router {
    fn apply(&self, _first: usize, x: &[f32], inputs: usize, u: &mut [f32]) {
        let rank = self.bias.len();
        let (mut p, mut v, mut chosen) = (vec![0f32; rank], vec![0f32; rank], vec![false; rank]);
        for (x, u) in x.chunks_exact(inputs.max(1)).zip(u.chunks_exact_mut(rank.max(1))) {
            for (row, p) in self.router.chunks_exact(inputs.max(1)).zip(p.chunks_exact_mut(self.q)) {
                // In eight sums, which keeps rounding small and lets the compiler use wide registers.
                let mut sums = [0f32; 8];
                let (rows, rest) = (row.as_chunks::<8>(), x.as_chunks::<8>());
                for (a, b) in rows.0.iter().zip(rest.0) {
                    sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += a * b);
                }
                let tail: f32 = rows.1.iter().zip(rest.1).map(|(a, b)| a * b).sum();
                p.fill(1.0 / (1.0 + (-(sums.iter().sum::<f32>() + tail)).exp()));
            }
            v.iter_mut().zip(&p).zip(&self.bias).for_each(|((v, p), b)| *v = p + b);
            choose(&v, self.k, &mut chosen);
            let e = if self.biased { &v } else { &p };
            let part = |i: usize| if chosen[i] { e[i].max(FLOOR as f32) } else { 0.0 };
            let sum: f32 = (0..rank).map(part).sum();
            u.iter_mut().enumerate().for_each(|(i, u)| *u *= self.k as f32 * part(i) / sum);
        }
    }

    fn bytes(&self) -> usize {
        (self.router.len() + self.bias.len()) * size_of::<f32>()
    }
}
