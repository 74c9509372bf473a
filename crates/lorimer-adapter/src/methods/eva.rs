//! # EVA: explained variance adaptation
//!
//! Paischer et al. 2024, *One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation*, arXiv 2410.07170,
//! section 3: LoRA, `y = W x + (α/r_l) · B A x` with A (r_l, inputs), B (outputs, r_l), whose A are the first right-singular vectors of the
//! projection's inputs on the training data and whose B is zero. The ranks r_l follow from the data too: all components of all
//! projections are sorted by the share of their projection's variance that they explain, and the first Σ r of them are kept, at most
//! ρ·r a projection. A projection that gets none is dropped. α is scaled with the rank, so that α/r_l stays α/r.
//!
//! The inputs are taken batch by batch (incremental principal components: mean-free, merged by the SVD of `[Σ Vᵀ; X; mean
//! correction]`) until the components that are needed have a cosine above τ with what they were a batch ago.
//!
//! Trainable parameters of a projection: `r_l · (inputs + outputs)`.
//!
//! Good for: LoRA where a short look at the data first (some batches, no backward) is welcome; the file is an ordinary LoRA.
//!
//! Served as LoRA. Step time is LoRA's.
//!
//! ```
//! // Two projections, budget 3: the first explains 70 % and 20 % with two directions, the second 60 % and 30 %.
//! let ranks = lorimer_adapter::methods::eva::allocate(&[&[0.7, 0.2], &[0.6, 0.3]], 3);
//! assert_eq!(ranks, [1, 2]);
//! ```

use candle_core::{DType, Tensor};
use lorimer_model::Site;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::lora::{FLAGS, Lora, LoraConfig, lora_file};
use super::{Entry, Served};
use crate::error::{Error, Result};
use crate::method::{Calibration, CalibrationStats, ParameterSource, split_off};
use crate::targets::Names;

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "eva",
    title: "LoRA started in the data's directions, rank by variance",
    paper: "arXiv 2410.07170",
    kind: "start",
    variants: &[],
    peft_type: "LORA",
    mergeable: true,
    served: Served::Batched,
    lr: 5e-4,
    flags: FLAGS,
    source: include_str!("eva.rs"),
    laws: &[
        (r#"{"r": 3, "use_label_mask": false, "batch_size": 3}"#, 0.0),
        (r#"{"r": 2, "rho": 1, "whiten": true, "max_batches": 3}"#, 0.0),
    ],
    build: |settings| {
        let mut settings = settings.clone();
        settings.insert("init_lora_weights".into(), json!("eva"));
        let mut own = match settings.remove("eva_config") {
            Some(Value::Object(given)) => given,
            _ => Map::new(),
        };
        // Its own settings may stand beside LoRA's.
        own.extend(split_off::<EvaConfig>(&mut settings));
        settings.insert("eva_config".into(), Value::Object(own));
        Ok(Box::new(Lora::new("eva", LoraConfig::given("eva", &settings)?)))
    },
    // Its files are ordinary LoRAs.
    recognises: |_| false,
    from_file: lora_file,
};

/// PEFT's `EvaConfig`, and how much data is looked at.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvaConfig {
    /// ρ: a projection gets at most ρ·r; 1 leaves the ranks as they are.
    pub rho: f64,
    /// τ: cosine from which on a component holds still.
    pub tau: f64,
    /// Only positions whose token is learnt.
    pub use_label_mask: bool,
    /// What PEFT marks other positions with; ours are marked by the data.
    pub label_mask_value: i64,
    /// Divide each direction by the root of its singular value.
    pub whiten: bool,
    /// Scale α with the rank.
    pub adjust_scaling_factors: bool,
    /// Rows of data at a time.
    pub batch_size: usize,
    /// Batches after which what there is will do.
    pub max_batches: usize,
}

impl Default for EvaConfig {
    fn default() -> Self {
        Self {
            rho: 2.0,
            tau: 0.99,
            use_label_mask: true,
            label_mask_value: -100,
            whiten: false,
            adjust_scaling_factors: true,
            batch_size: 16,
            max_batches: 64,
        }
    }
}

/// Ranks out of the shares of variance that each projection's directions explain (falling): the `budget` largest win, ties go to
/// the earlier projection.
pub fn allocate(explained: &[&[f64]], budget: usize) -> Vec<usize> {
    let mut all: Vec<(usize, f64)> =
        explained.iter().enumerate().flat_map(|(i, shares)| shares.iter().map(move |s| (i, *s))).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1));
    let mut ranks = vec![0; explained.len()];
    all.iter().take(budget).for_each(|(i, _)| ranks[*i] += 1);
    ranks
}

impl EvaConfig {
    pub(super) fn check(&self) -> Result<()> {
        let fail = |text: String| Err(Error::Config(text));
        if !(1.0..=1000.0).contains(&self.rho) {
            return fail(format!("rho = {} should be between 1 and 1000", self.rho));
        }
        if !(0.0..=1.0).contains(&self.tau) {
            return fail(format!("tau = {} should be between 0 and 1", self.tau));
        }
        if self.batch_size == 0 || self.batch_size > 1 << 16 || self.max_batches == 0 {
            return fail("batch_size and max_batches of eva_config should be at least 1".into());
        }
        Ok(())
    }

    pub(super) fn calibration(&self) -> Calibration {
        Calibration::Inputs {
            threshold: self.tau,
            supervised_only: self.use_label_mask,
            batch_size: self.batch_size,
            max_batches: self.max_batches,
        }
    }

    /// The most directions that a projection of rank `rank` may get.
    pub(super) fn most(&self, rank: usize) -> usize {
        (rank as f64 * self.rho).round_ties_even() as usize
    }

    /// Gives the ranks out.
    pub(super) fn resolve(&self, config: &mut LoraConfig, targeted: &[&Site], stats: &CalibrationStats) -> Result<()> {
        let mut shares = Vec::new();
        let mut budget = 0;
        for site in targeted {
            let found = stats.get(&site.path).and_then(|f| f.get("explained"));
            let found =
                found.ok_or_else(|| Error::Config(format!("`{}` has not been calibrated for eva", site.path)))?;
            shares.push(found.to_dtype(DType::F64)?.to_vec1::<f64>()?);
            budget += config.rank(&site.path)?;
        }
        let ranks = allocate(&shares.iter().map(Vec::as_slice).collect::<Vec<_>>(), budget);
        let mut given = config.clone();
        (given.rank_pattern, given.alpha_pattern) = Default::default();
        for (site, rank) in targeted.iter().zip(&ranks).filter(|(_, rank)| **rank > 0) {
            let before = config.rank(&site.path)?;
            let mut alpha = config.alpha(&site.path)?;
            if self.adjust_scaling_factors {
                alpha *= *rank as f64 / before as f64;
            }
            if *rank != given.r {
                given.rank_pattern.insert(site.path.clone(), *rank);
            }
            if alpha != given.lora_alpha {
                given.alpha_pattern.insert(site.path.clone(), alpha);
            }
        }
        if ranks.contains(&0) {
            let kept = targeted.iter().zip(&ranks).filter(|(_, rank)| **rank > 0);
            given.targeting.target_modules = Names::List(kept.map(|(site, _)| site.path.clone()).collect());
            (given.targeting.exclude_modules, given.targeting.layers_to_transform) = (None, None);
        }
        *config = given;
        Ok(())
    }

    /// A (rank, inputs).
    pub(super) fn start(&self, source: &ParameterSource<'_>, rank: usize) -> Result<Tensor> {
        let a = source.found("components")?;
        if a.dim(0)? < rank {
            return Err(Error::Config(format!("the data gave {} directions where {rank} are needed", a.dim(0)?)));
        }
        let a = a.narrow(0, 0, rank)?;
        if !self.whiten {
            return Ok(a);
        }
        let roots = source.found("singular")?.narrow(0, 0, rank)?.sqrt()?.unsqueeze(1)?;
        Ok(a.broadcast_div(&roots.to_dtype(a.dtype())?)?)
    }
}
