//! # LoRA-SB: the first step of full fine-tuning, caught in a small square matrix
//!
//! Ponkshe et al. 2024, *Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning*,
//! arXiv 2411.19557, algorithm 1: LoRA-XS's form `y = W x + B R A x` with A (r, inputs), B (outputs, r) frozen and R (r, r) trained, but
//! started from data: the gradient of W is summed over some rows, `ΔW₁ = −η · sign(Σ ∇W)` is what AdamW's first step would do at its
//! rate η (the peak over the steps of the warm-up), and with
//! its best approximation of rank r, `ΔW₁ ≈ U S Vᵀ`: B = U_r, A = V_rᵀ, R = S_r. The start is that step away from the base. With A and B
//! orthonormal, R's gradient is the optimal projection of the full one, and no scaling is left to tune.
//!
//! Trainable parameters of a projection: `r²`.
//!
//! Files hold R, and A and B in bf16 (they are rounded to bf16 before training, so that nothing is lost); η and the number of rows
//! stand in the configuration.
//!
//! Meant for: LoRA-XS's sizes with a start that approximates the first step of full fine-tuning. Start: one forward and backward over `samples` rows, then an eigenproblem a
//! projection.
//!
//! Step time: LoRA's of the same rank, without the gradient of A.
//!
//! ```
//! // ΔW₁ of a gradient with entries 2 and −3 on the diagonal and η = 0.1: −0.1 · sign.
//! let step = lorimer_adapter::methods::lora_sb::first_step(&[2.0, 0.0, 0.0, -3.0], 0.1);
//! assert_eq!(step, [-0.1, 0.0, 0.0, 0.1]);
//! ```

use candle_core::{DType, Tensor};
use lorimer_model::{Projection, Site};
use lorimer_tensor::linalg::truncated_svd;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::entry::{Entry, Served};
use super::lora_xs::{SmallDelta, check_rank};
use crate::delta::Delta;
use crate::error::{Error, Result};
use crate::file::keys::FileKeys;
use crate::method::{Calibration, Method, ModuleStats, ParameterSource};
use crate::settings::{PeftKeys, configure, from_peft_json, peft_json};
use crate::targets::Targeting;

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "lora-sb",
    title: "LoRA-XS started from the first step of full fine-tuning",
    paper: "arXiv 2411.19557",
    kind: "projection",
    variants: &[],
    peft_type: "LORA_SB",
    mergeable: true,
    served: Served::Batched,
    lr: 5e-4,
    parts: &[],
    flags: &[("rank", "r"), ("lr", "init_lr")],
    source: include_str!("lora_sb.rs"),
    laws: &[
        // Its start is a step away from the base.
        (r#"{"r": 4, "samples": 3, "init_lr": 1e-3}"#, f64::INFINITY),
    ],
    build: |settings| LoraSbConfig::check(configure("lora-sb", settings)?),
    recognises: |config| config.get("peft_type").and_then(Value::as_str) == Some("LORA_SB"),
    from_file: |config| LoraSbConfig::check(from_peft_json("lora-sb", config, &PeftKeys::NONE)?),
};

/// Settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraSbConfig {
    /// Which modules.
    #[serde(flatten)]
    pub targeting: Targeting,
    /// Rank r.
    pub r: usize,
    /// η of the step that is caught; `train` gives the rate of its first step, `--lr` over the steps of the warm-up. `compare` gives all rates of a sweep the same.
    pub init_lr: f64,
    /// Rows of data whose gradients are summed.
    pub samples: usize,
}

impl Default for LoraSbConfig {
    fn default() -> Self {
        Self { targeting: Targeting::default(), r: 64, init_lr: 2e-4, samples: 170 }
    }
}

/// −η · sign of each number; the sign of zero is zero.
pub fn first_step(gradient: &[f64], rate: f64) -> Vec<f64> {
    gradient.iter().map(|g| if *g == 0.0 { 0.0 } else { -rate * g.signum() }).collect()
}

impl LoraSbConfig {
    fn check(self) -> Result<Box<dyn Method>> {
        if self.r == 0 || !(self.init_lr.is_finite() && self.init_lr > 0.0) {
            return Err(Error::Config("`r` should be at least 1 and `init_lr` above 0".into()));
        }
        if self.samples == 0 || self.samples > 1 << 20 {
            return Err(Error::Config("`samples` should be between 1 and 1048576".into()));
        }
        Ok(Box::new(LoraSb { config: self }))
    }
}

struct LoraSb {
    config: LoraSbConfig,
}

impl Method for LoraSb {
    fn name(&self) -> &'static str {
        "lora-sb"
    }

    fn targeting(&self) -> &Targeting {
        &self.config.targeting
    }

    fn config(&self) -> Map<String, Value> {
        peft_json("LORA_SB", &self.config)
    }

    fn calibration(&self) -> Calibration {
        Calibration::Gradients { samples: self.config.samples, batch_size: 8, absolute: false }
    }

    fn reduce_gradients(&self, site: &Site, _base: &Projection, gradient: &Tensor) -> Result<ModuleStats> {
        check_rank(self.config.r, site)?;
        let values = gradient.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        let step = Tensor::from_vec(first_step(&values, self.config.init_lr), gradient.shape(), gradient.device())?;
        let (u, s, vt) = truncated_svd(&step, self.config.r)?;
        let half = |t: Tensor| -> Result<Tensor> { Ok(t.to_dtype(DType::F32)?.to_dtype(DType::BF16)?) };
        Ok([("b", half(u)?), ("s", s.to_dtype(DType::F32)?), ("a", half(vt)?)]
            .into_iter()
            .map(|(name, t)| (name.to_string(), t))
            .collect())
    }

    fn file_keys(&self) -> FileKeys {
        FileKeys::of_modules(&["lora_R", "lora_A", "lora_B"])
    }

    fn attach(&self, site: &Site, _base: &Projection, source: &mut ParameterSource<'_>) -> Result<Box<dyn Delta>> {
        let r = self.config.r;
        check_rank(r, site)?;
        let (a_shape, b_shape) = ([r, site.inputs], [site.outputs, r]);
        let (small, a, b) = if source.is_file() {
            let missing = || Err(Error::Mismatch(format!("`{}` lacks its frozen factors", site.path)));
            let small = source.trainable("lora_R", &[r, r], |_| missing())?;
            (small, source.frozen("lora_A", &a_shape, missing)?, source.frozen("lora_B", &b_shape, missing)?)
        } else {
            let (a, s, b) = (source.found("a")?, source.found("s")?, source.found("b")?);
            if a.dims() != a_shape || b.dims() != b_shape || s.dims() != [r] {
                return Err(Error::Config(format!("`{}` was calibrated for another rank", site.path)));
            }
            let small = source
                .trainable("lora_R", &[r, r], |_| Ok(Tensor::eye(r, DType::F32, s.device())?.broadcast_mul(s)?))?;
            (
                small,
                source.frozen("lora_A", &a_shape, || Ok(a.clone()))?,
                source.frozen("lora_B", &b_shape, || Ok(b.clone()))?,
            )
        };
        Ok(Box::new(SmallDelta { r: small, a, b, scaling: 1.0, save_frozen: Some(DType::BF16) }))
    }

    fn parameters(&self, _site: &Site) -> Result<usize> {
        Ok(self.config.r * self.config.r)
    }

    fn activations_per_row(&self, _site: &Site) -> usize {
        self.config.r
    }

    fn activations_fixed(&self, site: &Site) -> usize {
        self.config.r * (site.inputs + 3 * site.outputs)
    }
}
