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
//! ranks learnt better with `fixed` in our runs (`bench/dylora.sh`).
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

use candle_core::{Device, Result as TensorResult, Tensor, Var};
use lorimer_model::{Projection, Site};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::dropout::Dropout;
use super::entry::{Entry, Served};
use super::lora::{FLAGS, Lora, LoraConfig, Start, lora_file};
use crate::error::{Error, Result};
use crate::file::keys::FileKeys;
use crate::method::{Bias, Change, Delta, LowRank, Method, ParameterSource, Step};
use crate::settings::{configure, split_off};
use crate::targets::Targeting;
use crate::training::{Callback, RankSampling, Training};

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
        Training { callback: Some(Callback::RankSampling(self.sampling.clone())), ..Default::default() }
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
    fn change(&self, _base: &Projection, _rows: usize, step: &Step) -> TensorResult<Option<Change>> {
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
        Ok(Some(Change::LowRank(LowRank { a, b, scaling: self.scaling(rank, all) })))
    }

    fn mask(&self, x: &Tensor, step: &Step) -> TensorResult<Option<Tensor>> {
        self.dropout.mask(x, step)
    }

    fn rows_are_independent(&self, step: &Step) -> bool {
        self.dropout.is_off(step)
    }

    fn trainable(&self) -> Vec<(&'static str, &Var)> {
        vec![("lora_A", &self.a), ("lora_B", &self.b)]
    }

    fn stored(&self) -> TensorResult<Vec<(&'static str, Tensor)>> {
        Ok(vec![("lora_A.weight", self.a.detach()), ("lora_B.weight", self.b.detach().t()?.contiguous()?)])
    }
}
