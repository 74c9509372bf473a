//! # LLaVA-MoLE: in each block's MLP a token goes to one of a few LoRA experts
//!
//! Chen, Jie and Ma 2024, *LLaVA-MoLE: Sparse Mixture of LoRA Experts for Mitigating Data Conflicts in Instruction Finetuning MLLMs*, arXiv
//! 2401.16160: its experts in the language model; its pictures belong to a model with a vision tower. The MLP's projections have E pairs A_e
//! (r, inputs), B_e (outputs, r) each; one router R (E, hidden) with a bias a block reads the MLP's input h, and its choice serves all of them:
//! `p = softmax(R h + b)`, `e = argmax p`, `y = W z + (α/r) B_e A_e z`, with z = h for gate and up and the gated product for down. Other
//! projections have a plain LoRA.
//!
//! Settings: `r`, `lora_alpha`, `experts` (E, up to 32), `routing`, `balance` (w), `lora_dropout`. `routing`: `top1`, the paper's, which
//! multiplies by no p, so that only the balance term trains R; `dense`, `Σ_e p_e B_e A_e z`, as in the authors' script of inference; `top1-st`,
//! ours: top1 in the forward, with the gradient of a factor p_e.
//!
//! The balance term is the authors' code's: for each sample, over all positions of all blocks, P_e = mean p_e and C_e the share that chose e,
//! `L + w · Σ_e P_e C_e` averaged over samples; C has no gradient, and no factor E makes its least value 1. Since blocks are taken together, a
//! block that sends all tokens to one expert does not show in it: `log.jsonl` has `expert_shares`, block by block. w = 0.01 is not in their code
//! but in a re-implementation. With `dense` one mask of dropout serves all experts of a projection, where their code draws one each.
//!
//! An expert is chosen by the token, so no fixed weight gives the same for E > 1: it cannot be merged, is used alone and is served as it is.
//! With E = 1 there is no router, and it is LoRA: it merges, converts and serves as that.
//!
//! Trainable parameters: r · (inputs + outputs) of a projection with a plain LoRA, E times that in the MLP, and E · (hidden + 1) a block.
//!
//! Meant for: mixed tasks that want different answers to the same words. Step time is LoRA's of rank r and a little more for the routes.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use lorimer_adapter::unit::UnitRoute;
//! use lorimer_adapter::LowRank;
//! use lorimer_tensor::Ops;
//! # fn main() -> candle_core::Result<()> {
//! // Two experts of rank 1 on two inputs; the first row goes to expert 1, the second to expert 0.
//! let t = |rows: &[[f64; 2]]| Tensor::from_vec(rows.concat(), (rows.len(), 2), &Device::Cpu);
//! let column = |v: &[f64; 2]| Tensor::new(v, &Device::Cpu)?.unsqueeze(1);
//! let experts = [
//!     LowRank { a: t(&[[1., 0.]])?, b: column(&[1., 2.])?, scaling: 1.0 },
//!     LowRank { a: t(&[[0., 1.]])?, b: column(&[3., 4.])?, scaling: 1.0 },
//! ];
//! let route = UnitRoute::One { chosen: vec![1, 0], factors: None, experts: 2 };
//! let change = route.change(Ops::plain(), &t(&[[5., 6.], [7., 8.]])?, &experts)?;
//! assert_eq!(change.to_vec2::<f64>()?, [[18., 24.], [7., 14.]]);
//! # Ok(())
//! # }
//! ```

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{D, Device, Result as TensorResult, Tensor, Var};
use lorimer_model::{BlockScope, ModelShape, Projection, Site};
use lorimer_tensor::Ops;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::entry::{Entry, Served};
use super::random::{kaiming, uniform};
use crate::block::{BlockDelta, BlockSite};
use crate::delta::{Change, Delta, GatedLowRank, LowRank};
use crate::dropout::{Dropout, check_dropout};
use crate::error::{Error, Result};
use crate::file::keys::FileKeys;
use crate::method::{BlockMethod, Method, ParameterSource};
use crate::parameter::{Parameter, Role};
use crate::settings::{PeftKeys, configure, from_peft_json, peft_json};
use crate::step::Step;
use crate::targets::{Indices, Targeting};
use crate::training::Training;
use crate::unit::{UnitRoute, UnitRouter, largest_share, spread};

/// The projections of a gated MLP, by the last part of their path.
const UNIT: [&str; 4] = ["gate_proj", "up_proj", "gate_up_proj", "down_proj"];

macro_rules! expert_keys {
    ($($e:literal)*) => {
        /// Keys of each expert's A and B, without and with `.weight`.
        const EXPERTS: &[[&str; 4]] = &[$([
            concat!("experts.", $e, ".lora_A"),
            concat!("experts.", $e, ".lora_B"),
            concat!("experts.", $e, ".lora_A.weight"),
            concat!("experts.", $e, ".lora_B.weight"),
        ]),*];
        /// All names of tensors of a module.
        const MODULE_KEYS: &[&str] = &[
            "lora_A.weight",
            "lora_B.weight",
            $(concat!("experts.", $e, ".lora_A.weight"), concat!("experts.", $e, ".lora_B.weight"),)*
        ];
    };
}

expert_keys!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31);

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "llava-mole",
    title: "In each MLP a token goes to one of a few LoRA experts",
    paper: "arXiv 2401.16160",
    kind: "projection",
    variants: &[],
    peft_type: "LLAVA_MOLE",
    mergeable: false,
    served: Served::Batched,
    lr: 2e-4,
    parts: &[],
    flags: &[("rank", "r"), ("alpha", "lora_alpha"), ("dropout", "lora_dropout")],
    source: include_str!("llava_mole.rs"),
    laws: &[
        (r#"{"r": 3, "experts": 3, "lora_dropout": 0.0}"#, 0.0),
        (r#"{"r": 3, "experts": 2, "routing": "dense", "balance": 0.5, "lora_dropout": 0.2}"#, 0.0),
        (
            r#"{"r": 2, "experts": 3, "lora_alpha": 4, "routing": "top1-st", "target_modules": ["q_proj", "up_proj", "down_proj"]}"#,
            0.0,
        ),
    ],
    build: |settings| LlavaMole::checked(configure("llava-mole", settings)?),
    recognises: |config| config.get("peft_type").and_then(Value::as_str) == Some("LLAVA_MOLE"),
    from_file: |config| LlavaMole::checked(from_peft_json("llava-mole", config, &PeftKeys::NONE)?),
};

/// LLaVA-MoLE's settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LlavaMole {
    /// Which modules.
    #[serde(flatten)]
    pub targeting: Targeting,
    /// Rank of each expert, and of each plain LoRA.
    pub r: usize,
    /// α; changes are multiplied by α/r.
    pub lora_alpha: f64,
    /// E: experts of each projection of an MLP.
    pub experts: usize,
    /// How tokens go to experts.
    pub routing: Routing,
    /// w: what the balance term is multiplied by.
    pub balance: f64,
    /// Probability of zeroing an element of a change's input, in training.
    pub lora_dropout: f64,
    /// The blocks with an MLP that has experts, once that is known.
    #[serde(skip)]
    routed: Option<BTreeSet<usize>>,
}

/// How tokens go to experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Routing {
    /// To the one with the largest p.
    #[default]
    #[serde(rename = "top1")]
    Top1,
    /// The same, with the gradient of a factor p.
    #[serde(rename = "top1-st")]
    Top1Straight,
    /// To all, each times its p.
    #[serde(rename = "dense")]
    Dense,
}

impl Default for LlavaMole {
    fn default() -> Self {
        Self {
            targeting: Targeting::default(),
            r: 32,
            lora_alpha: 64.0,
            experts: 3,
            routing: Routing::Top1,
            balance: 1e-2,
            lora_dropout: 0.05,
            routed: None,
        }
    }
}

fn in_unit(site: &Site) -> bool {
    UNIT.contains(&site.role.as_str())
}

impl LlavaMole {
    fn checked(self) -> Result<Box<dyn Method>> {
        let fail = |text: String| Err(Error::Config(text));
        if self.r == 0 || self.r > 1 << 16 {
            return fail(format!("r = {} should be between 1 and 65536", self.r));
        }
        if !(1..=EXPERTS.len()).contains(&self.experts) {
            return fail(format!("experts = {} should be between 1 and {}", self.experts, EXPERTS.len()));
        }
        if !(self.balance.is_finite() && self.balance >= 0.0) {
            return fail(format!("balance = {} should be a number of at least 0", self.balance));
        }
        check_dropout("lora_dropout", self.lora_dropout)?;
        if !self.lora_alpha.is_finite() {
            return fail("lora_alpha should be a finite number".into());
        }
        Ok(Box::new(self))
    }

    fn scaling(&self) -> f64 {
        self.lora_alpha / self.r as f64
    }

    /// A and B of a change, new or out of a file.
    fn pair(&self, site: &Site, source: &mut ParameterSource<'_>, keys: [&'static str; 2]) -> Result<(Var, Var)> {
        let (r, dtype) = (self.r, source.dtype());
        let a = source.trainable(keys[0], &[r, site.inputs], |rng| Ok(kaiming((r, site.inputs), dtype, rng)?))?;
        let zeros = |_: &mut ChaCha8Rng| Ok(Tensor::zeros((site.outputs, r), dtype, &Device::Cpu)?);
        Ok((a, source.trainable(keys[1], &[site.outputs, r], zeros)?))
    }
}

impl Method for LlavaMole {
    fn name(&self) -> &'static str {
        "llava-mole"
    }

    fn targeting(&self) -> &Targeting {
        &self.targeting
    }

    fn config(&self) -> Map<String, Value> {
        peft_json("LLAVA_MOLE", self)
    }

    fn training(&self) -> Training {
        Training { router_balance: if self.experts > 1 { self.balance } else { 0.0 }, ..Training::default() }
    }

    fn file_keys(&self) -> FileKeys {
        match self.experts {
            1 => FileKeys::of_modules(MODULE_KEYS),
            _ => FileKeys { module: MODULE_KEYS, block: &["mlp.router."], adapter: &[] },
        }
    }

    fn bind(&mut self, shape: &ModelShape, sites: &[&Site]) -> Result<()> {
        match sites.iter().any(|site| site.role == "down_proj") {
            true => Ok(()),
            false => Err(Error::Config(format!(
                "`llava-mole` puts experts on a gated MLP (gate_proj, up_proj, down_proj), and a `{}` model has none",
                shape.model_type
            ))),
        }
    }

    fn resolve(&mut self, targeted: &[&Site], _: &crate::method::CalibrationStats) -> Result<()> {
        let routed: BTreeSet<usize> = targeted.iter().filter(|s| in_unit(s)).filter_map(|s| s.layer).collect();
        if routed.is_empty() {
            return Err(Error::Config(format!(
                "`llava-mole` puts experts on {}, of which target_modules names none; without them it is `lora`",
                UNIT.join(", ")
            )));
        }
        self.routed = Some(routed);
        Ok(())
    }

    fn attach(&self, site: &Site, _base: &Projection, source: &mut ParameterSource<'_>) -> Result<Box<dyn Delta>> {
        let mut pairs = Vec::new();
        match in_unit(site) {
            true => {
                for keys in &EXPERTS[..self.experts] {
                    pairs.push((self.pair(site, source, [keys[2], keys[3]])?, *keys));
                }
            }
            false => {
                let keys = ["lora_A", "lora_B", "lora_A.weight", "lora_B.weight"];
                pairs.push((self.pair(site, source, [keys[2], keys[3]])?, keys));
            }
        }
        let experts = pairs.into_iter().map(|((a, b), keys)| Expert { a, b, keys }).collect();
        let dropout = Dropout::new(self.lora_dropout, &site.path);
        Ok(Box::new(MoleDelta { experts, scaling: self.scaling(), rank: self.r, dropout, path: site.path.clone() }))
    }

    fn blocks(&self) -> Option<&dyn BlockMethod> {
        (self.experts > 1).then_some(self as &dyn BlockMethod)
    }

    fn parameters(&self, site: &Site) -> Result<usize> {
        let pairs = if in_unit(site) { self.experts } else { 1 };
        Ok(pairs * self.r * (site.inputs + site.outputs))
    }

    fn rows_are_independent(&self) -> bool {
        self.experts == 1 && self.lora_dropout == 0.0
    }

    fn not_additive(&self) -> Option<&'static str> {
        (self.experts > 1).then_some("the rows of a block's MLP have one route, which is its router's")
    }

    fn low_rank_alpha(&self, _module: &str) -> Result<Option<f64>> {
        Ok(Some(self.lora_alpha))
    }

    fn low_rank(&self, module: &str, tensors: &BTreeMap<String, Tensor>) -> Result<Option<LowRank>> {
        let pair = |a: &str, b: &str| Some((tensors.get(a)?, tensors.get(b)?));
        let own = pair("lora_A.weight", "lora_B.weight");
        let own = own.or_else(|| pair(EXPERTS[0][2], EXPERTS[0][3]).filter(|_| self.experts == 1));
        let Some((a, b)) = own else { return Ok(None) };
        if a.dims().len() != 2 || b.dims().len() != 2 || a.dim(0)? != self.r || b.dim(1)? != self.r {
            return Err(Error::Mismatch(format!(
                "`{module}`: lora_A {:?} and lora_B {:?} do not have the rank {} of the configuration",
                a.dims(),
                b.dims(),
                self.r
            )));
        }
        Ok(Some(LowRank { a: a.clone(), b: b.clone(), scaling: self.scaling() }))
    }
}

impl BlockMethod for LlavaMole {
    fn module(&self) -> &'static str {
        "mlp.router"
    }

    fn what(&self) -> &'static str {
        "a router sends each token to experts of its own, which no fixed weight does"
    }

    fn targets(&self, layer: usize) -> bool {
        match (&self.routed, &self.targeting.layers_to_transform) {
            (Some(routed), _) => routed.contains(&layer),
            (None, Some(Indices::One(i))) => *i == layer,
            (None, Some(Indices::Many(list))) => list.is_empty() || list.contains(&layer),
            (None, None) => true,
        }
    }

    fn attach(&self, block: &BlockSite, source: &mut ParameterSource<'_>) -> Result<Option<Box<dyn BlockDelta>>> {
        if !self.targets(block.layer) {
            return Ok(None);
        }
        let (n, hidden, dtype) = (self.experts, block.site.inputs, source.dtype());
        let weight = source.trainable("weight", &[n, hidden], |rng| Ok(kaiming((n, hidden), dtype, rng)?))?;
        let bound = (hidden.max(1) as f64).powf(-0.5);
        let bias = source.trainable("bias", &[n], |rng| Ok(uniform((1, n), bound, dtype, rng)?.squeeze(0)?))?;
        Ok(Some(Box::new(MoleRouter { weight, bias, routing: self.routing })))
    }

    fn parameters(&self, block: &BlockSite) -> usize {
        self.experts * (block.site.inputs + 1)
    }

    fn activations_per_row(&self, _block: &BlockSite) -> usize {
        6 * self.experts
    }
}

/// A and B of one expert, or of the plain LoRA of another projection.
struct Expert {
    /// (r, inputs).
    a: Var,
    /// (outputs, r).
    b: Var,
    /// Their keys, and those in a file.
    keys: [&'static str; 4],
}

struct MoleDelta {
    experts: Vec<Expert>,
    scaling: f64,
    rank: usize,
    dropout: Dropout,
    path: String,
}

impl Delta for MoleDelta {
    fn change(&self, _base: &Projection, _rows: usize, _step: &Step) -> TensorResult<Change> {
        if let [only] = &self.experts[..] {
            return Ok(Change::low_rank(only.a.as_tensor().clone(), only.b.as_tensor().clone(), self.scaling));
        }
        let a: Vec<&Tensor> = self.experts.iter().map(|e| e.a.as_tensor()).collect();
        let b: Vec<&Tensor> = self.experts.iter().map(|e| e.b.as_tensor()).collect();
        let factors = LowRank { a: Tensor::cat(&a, 0)?, b: Tensor::cat(&b, 1)?.contiguous()?, scaling: self.scaling };
        Ok(Change::Gated(GatedLowRank { factors, input_gradient: true }))
    }

    fn experts(&self) -> Vec<LowRank> {
        if self.experts.len() == 1 {
            return Vec::new();
        }
        let low = |Expert { a, b, .. }: &Expert| LowRank {
            a: a.as_tensor().clone(),
            b: b.as_tensor().clone(),
            scaling: self.scaling,
        };
        self.experts.iter().map(low).collect()
    }

    fn dropout(&self) -> Option<&Dropout> {
        Some(&self.dropout)
    }

    fn gates(&self, _x: &Tensor, _u: &Tensor, _step: &Step) -> TensorResult<Tensor> {
        candle_core::bail!("`{}` has experts, and no route of its block's MLP to choose among them", self.path)
    }

    fn route_gates(&self, route: &Tensor) -> TensorResult<Tensor> {
        spread(route, self.rank)
    }

    fn parameters(&self) -> Vec<Parameter<'_>> {
        let mut all = Vec::new();
        for Expert { a, b, keys } in &self.experts {
            all.extend([Parameter::new(keys[0], a, Role::A), Parameter::new(keys[1], b, Role::B)]);
        }
        all
    }

    fn stored(&self) -> TensorResult<Vec<(&'static str, Tensor)>> {
        let pair = |e: &Expert| [(e.keys[2], e.a.detach()), (e.keys[3], e.b.detach())];
        Ok(self.experts.iter().flat_map(pair).collect())
    }

    fn has_effect(&self, _base: &Projection) -> TensorResult<bool> {
        for expert in &self.experts {
            if crate::delta::largest(&expert.b)? > 0.0 {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// R and its bias.
#[derive(Debug)]
struct MoleRouter {
    /// (E, hidden).
    weight: Var,
    /// (E).
    bias: Var,
    routing: Routing,
}

impl UnitRouter for MoleRouter {
    fn shares(&self, ops: Ops<'_>, x: &Tensor) -> TensorResult<Tensor> {
        let logits = ops.add_bias(&ops.dense(x, self.weight.as_tensor())?, self.bias.as_tensor())?;
        ops.subgraph(&[&logits], &[], |t| {
            let powers = t[0].broadcast_sub(&t[0].max_keepdim(D::Minus1)?.detach())?.exp()?;
            powers.broadcast_div(&powers.sum_keepdim(D::Minus1)?)
        })
    }

    fn route(&self, ops: Ops<'_>, shares: &Tensor) -> TensorResult<UnitRoute> {
        let experts = shares.dim(1)?;
        let one = |factors| Ok(UnitRoute::One { chosen: largest_share(shares)?, factors, experts });
        match self.routing {
            Routing::Top1 => one(None),
            // 1 + p − sg(p).
            Routing::Top1Straight => one(Some(ops.subgraph(&[shares], &[], |t| (&t[0] - t[0].detach())? + 1.0)?)),
            Routing::Dense => Ok(UnitRoute::All(shares.clone())),
        }
    }

    fn trained(&self) -> Vec<&Var> {
        vec![&self.weight, &self.bias]
    }
}

impl BlockDelta for MoleRouter {
    fn unit_router(&self) -> Option<&dyn UnitRouter> {
        Some(self)
    }

    fn attended(&self, _: Ops<'_>, h: &Tensor, _: &mut BlockScope<'_>, _: &Step) -> TensorResult<Tensor> {
        Ok(h.clone())
    }

    fn kept_width(&self) -> usize {
        0
    }

    fn reads_other_rows(&self) -> bool {
        false
    }

    /// Every position of every sample counts in the balance, so rows are not shared in training.
    fn rows_are_independent(&self, step: &Step) -> bool {
        step.training.is_none()
    }

    /// By itself it changes nothing: its experts do.
    fn has_effect(&self) -> TensorResult<bool> {
        Ok(false)
    }

    fn parameters(&self) -> Vec<Parameter<'_>> {
        vec![Parameter::new("weight", &self.weight, Role::Router), Parameter::new("bias", &self.bias, Role::Router)]
    }
}
