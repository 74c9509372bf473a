//! # DyLoRA: one training, every rank
//!
//! Valipour et al. 2023, *DyLoRA: Parameter-Efficient Tuning of Pretrained Models using Dynamic Search-Free Low-Rank Adaptation*, EACL,
//! arXiv 2210.07558, algorithm 1. Each step draws a rank b from `{rank_min … r}` and computes `y = W x + s · B_↓b A_↓b x` with the first b rows of A
//! (r, inputs) and columns of B (outputs, r). s is α/b (`scaling` = `rank`, the paper's and the
//! authors' code's, which multiplies both factors with the root of r/b), or α/r at every rank (`fixed`). All of these learn; with `frozen` only the b-th row and column do (faster, a little
//! worse). Rows that a step does not touch get no step of the optimiser: moments and step counts are kept a row. (The authors' code leaves them a
//! gradient of zero, so that AdamW's moments go on moving them.)
//!
//! Afterwards every b is an adapter: A_↓b, B_↓b, s. `lorimer resize --rank b` cuts the file, `lorimer eval --rank all` prints the whole curve.
//!
//! Settings: `r` (the largest), `rank_min`, `ranks` (a list in place of the range), `distribution` (`uniform`, or `geometric` with the chance of
//! each next rank times `ratio`), `scaling`, `frozen`. With `rank` a row's part in the output changes r-fold with the rank that is drawn; small
//! ranks learned better with `fixed` in our runs (`bench/dylora.sh`).
//!
//! Trainable parameters of a projection: `r · (inputs + outputs)`.
//!
//! Good for: not having to know the rank beforehand. Step time is LoRA's or less. The file is an ordinary LoRA of rank r.
//!
//! ```
//! use lorimer_adapter::example::project;
//! // r = 2, α = 2 at full rank: (α/2) · B A x, x = (1, 1). B is kept as its transpose in training.
//! let parameters: &[(&str, &[f64])] = &[("lora_A", &[1., 0., 0., 3.]), ("lora_B", &[1., 1., 1., 0.])];
//! let y = project("dylora", r#"{"r": 2, "lora_alpha": 2}"#, &[&[0., 0.], &[0., 0.]], parameters, &[1., 1.]);
//! assert_eq!(y, [4.0, 1.0]);
//! ```

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Result as TensorResult, Tensor, Var};
use lorimer_model::{Projection, Site};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::entry::{Entry, Served};
use super::lora::{FLAGS, Lora, LoraConfig, Start, lora_file};
use crate::delta::{Change, Delta};
use crate::dropout::Dropout;
use crate::error::{Error, Result};
use crate::file::keys::FileKeys;
use crate::method::{Bias, Method, ParameterSource};
use crate::parameter::{Named, Parameter, Role};
use crate::settings::{configure, split_off};
use crate::step::{SampledRank, Step, site_seed};
use crate::targets::Targeting;
use crate::training::{Callback, CallbackKind, RunShape, Training};

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "dylora",
    title: "LoRA trained for every rank at once",
    paper: "arXiv 2210.07558",
    kind: "control",
    variants: &[],
    peft_type: "LORA",
    mergeable: true,
    served: Served::Batched,
    lr: 2e-3,
    parts: &[],
    flags: FLAGS,
    source: include_str!("dylora.rs"),
    laws: &[(r#"{"r": 4}"#, 0.0), (r#"{"r": 3, "frozen": true, "scaling": "fixed", "lora_dropout": 0.2}"#, 0.0)],
    build: |settings| {
        let mut settings = settings.clone();
        let own: DyloraConfig = configure("dylora", &split_off::<DyloraConfig>(&mut settings))?;
        let lora = LoraConfig::given("dylora", &settings)?;
        if lora.use_dora || !lora.rank_pattern.is_empty() || Start::parse(&lora.init_lora_weights)?.moves_base() {
            return Err(Error::Config(
                "`dylora` takes one rank, LoRA's own form and a start that leaves the base".into(),
            ));
        }
        let sampling = own.sampling(lora.r)?;
        Ok(Box::new(Dylora { lora: Lora::new("dylora", lora), own, sampling }))
    },
    // Its files are ordinary LoRAs.
    recognises: |_| false,
    from_file: lora_file,
};

/// DyLoRA's settings beside LoRA's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DyloraConfig {
    /// The smallest rank that is drawn.
    pub rank_min: usize,
    /// The ranks that are drawn, in place of `rank_min … r`.
    pub ranks: Vec<usize>,
    /// How often each is drawn.
    pub distribution: Distribution,
    /// With `geometric`: the chance of a rank over that of the one before.
    pub ratio: f64,
    /// What the product is multiplied by.
    pub scaling: Scaling,
    /// Only the last row of A and column of B learn.
    pub frozen: bool,
}

/// What the product is multiplied by at rank b.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scaling {
    /// α/b.
    #[default]
    Rank,
    /// α/r, whatever b is.
    Fixed,
}

/// How often each rank is drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Distribution {
    /// All alike.
    #[default]
    Uniform,
    /// Each by a ratio less often (or more) than the one before.
    Geometric,
}

impl Default for DyloraConfig {
    fn default() -> Self {
        Self {
            rank_min: 1,
            ranks: Vec::new(),
            distribution: Distribution::Uniform,
            ratio: 0.8,
            scaling: Scaling::Rank,
            frozen: false,
        }
    }
}

impl DyloraConfig {
    fn sampling(&self, r: usize) -> Result<RankSampling> {
        let ranks = if self.ranks.is_empty() { (self.rank_min..=r).collect() } else { self.ranks.clone() };
        let rising = ranks.windows(2).all(|w| w[0] < w[1]);
        if ranks.is_empty() || ranks[0] == 0 || !rising || ranks[ranks.len() - 1] > r {
            return Err(Error::Config(format!("the ranks of dylora should rise from at least 1 to at most r = {r}")));
        }
        if !(self.ratio.is_finite() && self.ratio > 0.0) {
            return Err(Error::Config(format!("ratio = {} should be above 0", self.ratio)));
        }
        let weights = match self.distribution {
            Distribution::Uniform => Vec::new(),
            Distribution::Geometric => (0..ranks.len()).map(|i| self.ratio.powi(i as i32)).collect(),
        };
        Ok(RankSampling { ranks, weights, frozen: self.frozen })
    }
}

struct Dylora {
    lora: Lora,
    own: DyloraConfig,
    sampling: RankSampling,
}

impl Method for Dylora {
    fn name(&self) -> &'static str {
        "dylora"
    }

    fn targeting(&self) -> &Targeting {
        self.lora.targeting()
    }

    fn bias(&self) -> Bias {
        self.lora.bias()
    }

    fn stored_config(&self) -> Map<String, Value> {
        self.lora.stored_config()
    }

    fn config(&self) -> Map<String, Value> {
        let mut config = self.lora.config();
        if let Ok(Value::Object(own)) = serde_json::to_value(&self.own) {
            config.extend(own);
        }
        config
    }

    fn training(&self) -> Training {
        Training { callback: Some(Arc::new(self.sampling.clone())), ..Default::default() }
    }

    fn file_keys(&self) -> FileKeys {
        self.lora.file_keys()
    }

    fn attach(&self, site: &Site, base: &Projection, source: &mut ParameterSource<'_>) -> Result<Box<dyn Delta>> {
        let (config, dtype) = (&self.lora.config, source.dtype());
        let start = Start::parse(&config.init_lora_weights)?;
        let a = source.trainable("lora_A.weight", &[config.r, site.inputs], |rng| {
            Ok(start.factors(config, (site, base), dtype, rng)?.0)
        })?;
        let b = Var::from_tensor(&Tensor::zeros((config.r, site.outputs), dtype, &Device::Cpu)?)?;
        let dropout = Dropout::new(config.lora_dropout, &site.path);
        let alpha = config.alpha(&site.path)?;
        let (fixed, root) = (self.own.scaling == Scaling::Fixed, config.use_rslora);
        Ok(Box::new(DyloraDelta { a, b, alpha, fixed, root, dropout }))
    }

    fn parameters(&self, site: &Site) -> Result<usize> {
        self.lora.parameters(site)
    }

    fn rows_are_independent(&self) -> bool {
        self.lora.rows_are_independent()
    }

    fn activations_per_row(&self, site: &Site) -> usize {
        self.lora.activations_per_row(site)
    }
}

struct DyloraDelta {
    /// (r, inputs).
    a: Var,
    /// Bᵀ (r, outputs), so that a rank is a row of both.
    b: Var,
    alpha: f64,
    /// Whether the scaling is that of the whole rank at every rank.
    fixed: bool,
    /// Whether α is over the root of the rank.
    root: bool,
    dropout: Dropout,
}

impl DyloraDelta {
    /// s at rank `rank` of `all`.
    fn scaling(&self, rank: usize, all: usize) -> f64 {
        let over = if self.fixed { all } else { rank } as f64;
        self.alpha / if self.root { over.sqrt() } else { over }
    }
}

impl Delta for DyloraDelta {
    fn change(&self, _base: &Projection, _rows: usize, step: &Step) -> TensorResult<Change> {
        let all = self.a.dim(0)?;
        let rank = step.rank.map_or(all, |s| s.rank.clamp(1, all));
        let frozen = step.rank.is_some_and(|s| s.frozen);
        let cut = |t: &Tensor| -> TensorResult<Tensor> {
            match (frozen, rank) {
                (false, _) if rank == all => Ok(t.clone()),
                (false, _) | (true, 1) => t.narrow(0, 0, rank),
                (true, _) => Tensor::cat(&[&t.narrow(0, 0, rank - 1)?.detach(), &t.narrow(0, rank - 1, 1)?], 0),
            }
        };
        let (a, b) = (cut(&self.a)?, cut(&self.b)?.t()?.contiguous()?);
        Ok(Change::low_rank(a, b, self.scaling(rank, all)))
    }

    fn dropout(&self) -> Option<&Dropout> {
        Some(&self.dropout)
    }

    fn parameters(&self) -> Vec<Parameter<'_>> {
        Parameter::pair(&self.a, &self.b).into()
    }

    fn stored(&self) -> TensorResult<Vec<(&'static str, Tensor)>> {
        Ok(vec![("lora_A.weight", self.a.detach()), ("lora_B.weight", self.b.detach().t()?.contiguous()?)])
    }
}

/// How ranks are drawn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RankSampling {
    /// The ranks, rising.
    pub ranks: Vec<usize>,
    /// Chance of each; empty: equal.
    pub weights: Vec<f64>,
    /// Only the last row of A and column of B learn.
    pub frozen: bool,
}

impl CallbackKind for RankSampling {
    fn build(&self, run: RunShape, _parameters: &[Named<'_>]) -> Box<dyn Callback> {
        Box::new(Ranks { settings: self.clone(), seed: run.seed })
    }
}

/// DyLoRA's rank a step.
struct Ranks {
    settings: RankSampling,
    seed: u64,
}

impl Callback for Ranks {
    fn rank(&self, step: usize) -> Option<SampledRank> {
        let s = &self.settings;
        let mut rng = ChaCha8Rng::seed_from_u64(site_seed(self.seed, &format!("rank {step}")));
        let total: f64 = s.weights.iter().sum();
        let place = match s.weights.is_empty() {
            true => rng.random_range(0..s.ranks.len()),
            false => {
                let mut left = rng.random_range(0.0..total);
                let found = s.weights.iter().position(|w| {
                    left -= w;
                    left < 0.0
                });
                found.unwrap_or(s.ranks.len() - 1)
            }
        };
        Some(SampledRank { rank: s.ranks[place], frozen: s.frozen })
    }

    fn rows(&self, step: usize, role: Role) -> Option<Range<usize>> {
        if !role.is_factor() {
            return None;
        }
        let SampledRank { rank, frozen } = self.rank(step)?;
        Some(if frozen { rank - 1..rank } else { 0..rank })
    }

    fn steps_rows_apart(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_follow_seed_and_step_and_their_chances() {
        let of = |weights: Vec<f64>, seed| Ranks {
            settings: RankSampling { ranks: vec![1, 2, 4], weights, frozen: false },
            seed,
        };
        let draw = |r: &Ranks| (0..3000).map(|step| r.rank(step).unwrap().rank).collect::<Vec<_>>();
        assert_eq!(draw(&of(vec![], 1)), draw(&of(vec![], 1)));
        assert_ne!(draw(&of(vec![], 1)), draw(&of(vec![], 2)));
        let share = |ranks: &[usize], r| ranks.iter().filter(|x| **x == r).count() as f64 / ranks.len() as f64;
        let (even, uneven) = (draw(&of(vec![], 3)), draw(&of(vec![0.6, 0.3, 0.1], 3)));
        for (r, chance) in [(1, 0.6), (2, 0.3), (4, 0.1)] {
            assert!((share(&even, r) - 1.0 / 3.0).abs() < 0.04);
            assert!((share(&uneven, r) - chance).abs() < 0.04);
        }
        assert_eq!(of(vec![], 1).rows(5, Role::A).map(|r| r.end), of(vec![], 1).rank(5).map(|r| r.rank));
        assert_eq!(of(vec![], 1).rows(5, Role::Whole), None);
    }
}
