//! # Hydra: a parallel and a sequential low-rank branch
//!
//! Kim et al. 2023, *Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning*, arXiv 2309.06922, eq. 6: with h₀ = W x +
//! b, `y = h₀ + s · B_p A_p x + s · B_s A_s h₀`; A_p (r_p, inputs), B_p (outputs, r_p), A_s (r_s, outputs), B_s (outputs, r_s). The parallel
//! branch learns new features of the input, the sequential one combines those that the base has. Both B are zero at the start.
//!
//! Merged: W' = (I + s B_s A_s) W + s B_p A_p and b' = b + s B_s A_s b.
//!
//! It stands on the MLP's output projection alone (`down_proj`), as in the authors' runs on language (GLUE) and on CLIP; those on VTAB-1k put it on the
//! attention's output too (`--target-modules o_proj,down_proj`), and `--target-modules all-linear` puts it everywhere.
//!
//! r is shared out in halves unless `r_parallel` and `r_sequential` say otherwise (0 leaves a branch out); the GLUE runs have 4 and 8, the others 2 and
//! 2. Their branches on images have biases, which the paper's equation has not; here there are none.
//!
//! Trainable parameters of a projection: `r_p · (inputs + outputs) + 2 · r_s · outputs`.
//!
//! Meant for: tasks whose features the base has already. Not additive. `inspect` shows how near the branches' output spaces are
//! (largest cosine of their principal angles) and the condition of I + s B_s A_s, by which unmerging would have to divide.
//!
//! Step time: LoRA's of rank r_p + r_s; A_s W is formed once a step.
//!
//! ```
//! use lorimer_adapter::example::project;
//! // W = 2, s = 1: h₀ = 2 · 3 = 6, parallel 1 · 10 · 3 = 30, sequential 0.5 · 4 · 6 = 12.
//! let parameters: &[(&str, &[f64])] = &[
//!     ("hydra_A_parallel", &[10.]), ("hydra_B_parallel", &[1.]), ("hydra_A_sequential", &[4.]), ("hydra_B_sequential", &[0.5]),
//! ];
//! assert_eq!(project("hydra", r#"{"r": 2}"#, &[&[2.]], parameters, &[3.]), [48.0]);
//! ```

use std::collections::BTreeMap;

use candle_core::{DType, Device, Result as TensorResult, Tensor, Var};
use lorimer_model::{Projection, Site};
use lorimer_tensor::{frozen_left, linalg};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::entry::{Entry, Served};
use super::random::kaiming;
use crate::delta::{Change, Delta};
use crate::error::{Error, Result};
use crate::file::keys::FileKeys;
use crate::method::{Method, ParameterSource};
use crate::parameter::{Parameter, Role};
use crate::settings::{PeftKeys, configure, from_peft_json, peft_json};
use crate::step::Step;
use crate::targets::{Names, Targeting};

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "hydra",
    title: "A parallel and a sequential low-rank branch",
    paper: "arXiv 2309.06922",
    kind: "projection",
    variants: &["both", "parallel", "sequential"],
    peft_type: "HYDRA",
    mergeable: true,
    served: Served::Batched,
    lr: 2e-3,
    parts: &[],
    flags: &[("rank", "r")],
    source: include_str!("hydra.rs"),
    laws: &[
        (r#"{"r": 4, "s": 0.5, "target_modules": "all-linear"}"#, 0.0),
        (r#"{"r": 4}"#, 0.0),
        (r#"{"r": 2, "variant": "sequential", "target_modules": ["q_proj", "down_proj"]}"#, 0.0),
        (r#"{"r": 2, "variant": "parallel", "target_modules": "all-linear"}"#, 0.0),
    ],
    build: |settings| {
        let mut settings = settings.clone();
        let r = settings.get("r").and_then(Value::as_u64).unwrap_or(HydraConfig::default().r as u64);
        let ranks = match settings.remove("variant").as_ref().map(|v| v.as_str().unwrap_or_default()) {
            None | Some("both") => None,
            Some("parallel") => Some((r, 0)),
            Some("sequential") => Some((0, r)),
            Some(_) => return Err(Error::Config("variant should be both, parallel or sequential".into())),
        };
        if let Some((parallel, sequential)) = ranks {
            settings.insert("r_parallel".into(), parallel.into());
            settings.insert("r_sequential".into(), sequential.into());
        }
        HydraConfig::check(configure("hydra", &settings)?)
    },
    recognises: |config| config.get("peft_type").and_then(Value::as_str) == Some("HYDRA"),
    from_file: |config| HydraConfig::check(from_peft_json("hydra", config, &PeftKeys::NONE)?),
};

/// Settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct HydraConfig {
    /// Which modules.
    #[serde(flatten)]
    pub targeting: Targeting,
    /// Rank of both branches together.
    pub r: usize,
    /// Rank of the parallel branch, if it is not half of r.
    pub r_parallel: Option<usize>,
    /// Rank of the sequential branch, if it is not the rest.
    pub r_sequential: Option<usize>,
    /// s; multiplies both branches.
    pub s: f64,
}

impl Default for HydraConfig {
    fn default() -> Self {
        let targets = Names::List(vec!["down_proj".into()]);
        let targeting = Targeting { target_modules: targets, ..Default::default() };
        Self { targeting, r: 8, r_parallel: None, r_sequential: None, s: 1.0 }
    }
}

impl HydraConfig {
    /// (r_p, r_s).
    fn ranks(&self) -> (usize, usize) {
        let parallel = self.r_parallel.unwrap_or(self.r.div_ceil(2));
        (parallel, self.r_sequential.unwrap_or(self.r.saturating_sub(parallel)))
    }

    fn check(self) -> Result<Box<dyn Method>> {
        let (p, s) = self.ranks();
        if p + s == 0 || p.max(s) > 1 << 16 || !self.s.is_finite() {
            return Err(Error::Config(
                "the ranks of the branches should be between 1 and 65536, and `s` finite".into(),
            ));
        }
        Ok(Box::new(Hydra { config: self }))
    }
}

struct Hydra {
    config: HydraConfig,
}

const KEYS: [&str; 4] = ["hydra_A_parallel", "hydra_B_parallel", "hydra_A_sequential", "hydra_B_sequential"];

impl Method for Hydra {
    fn name(&self) -> &'static str {
        "hydra"
    }

    fn targeting(&self) -> &Targeting {
        &self.config.targeting
    }

    fn config(&self) -> Map<String, Value> {
        peft_json("HYDRA", &self.config)
    }

    fn file_keys(&self) -> FileKeys {
        FileKeys::of_modules(&KEYS)
    }

    fn attach(&self, site: &Site, _base: &Projection, source: &mut ParameterSource<'_>) -> Result<Box<dyn Delta>> {
        let dtype = source.dtype();
        let mut branch = |keys: (&'static str, &'static str), rank: usize, width: usize| -> Result<Option<Branch>> {
            if rank == 0 {
                return Ok(None);
            }
            let a = source.trainable(keys.0, &[rank, width], |rng| Ok(kaiming((rank, width), dtype, rng)?))?;
            let zero = Tensor::zeros((site.outputs, rank), dtype, &Device::Cpu)?;
            let b = source.trainable(keys.1, &[site.outputs, rank], |_| Ok(zero))?;
            let role_of_a = if keys.0 == KEYS[0] { Role::A } else { Role::Core };
            Ok(Some(Branch { keys, role_of_a, a, b }))
        };
        let (p, s) = self.config.ranks();
        let parallel = branch((KEYS[0], KEYS[1]), p, site.inputs)?;
        let sequential = branch((KEYS[2], KEYS[3]), s, site.outputs)?;
        Ok(Box::new(HydraDelta { parallel, sequential, s: self.config.s }))
    }

    fn parameters(&self, site: &Site) -> Result<usize> {
        let (p, s) = self.config.ranks();
        Ok(p * (site.inputs + site.outputs) + 2 * s * site.outputs)
    }

    fn not_additive(&self) -> Option<&'static str> {
        let sequential = self.config.ranks().1 > 0;
        sequential
            .then_some("its sequential branch works on the projection's output, which another adapter would change")
    }

    fn activations_per_row(&self, _site: &Site) -> usize {
        let (p, s) = self.config.ranks();
        p + s
    }

    fn activations_fixed(&self, site: &Site) -> usize {
        let (p, s) = self.config.ranks();
        (p + 2 * s) * site.inputs + (p + s) * site.outputs
    }

    fn remarks(&self, tensors: &BTreeMap<String, Tensor>) -> Result<Vec<(String, f64)>> {
        let get = |key: &str| tensors.get(key).map(|t| t.to_dtype(DType::F64)).transpose();
        let mut remarks = Vec::new();
        if let (Some(p), Some(s)) = (get(KEYS[1])?, get(KEYS[3])?) {
            let ((p, _), (s, _)) = (linalg::qr(&p)?, linalg::qr(&s)?);
            let (_, cosines, _) = linalg::svd(&p.t()?.contiguous()?.matmul(&s)?)?;
            remarks.push(("branch_cosine".into(), cosines.get(0)?.to_scalar::<f64>()?.min(1.0)));
        }
        if let (Some(a), Some(b)) = (get(KEYS[2])?, get(KEYS[3])?) {
            remarks.push(("sequential_condition".into(), condition(&a, &b, self.config.s)?));
        }
        Ok(remarks)
    }
}

/// Condition number of I + s B A, found on the span of B's columns and A's rows; elsewhere it is the identity.
fn condition(a: &Tensor, b: &Tensor, s: f64) -> Result<f64> {
    let (q, _) = linalg::qr(&Tensor::cat(&[b, &a.t()?.contiguous()?], 1)?)?;
    let inner = q.t()?.contiguous()?.matmul(b)?.matmul(&a.matmul(&q)?)?;
    let inner = ((inner * s)? + Tensor::eye(q.dim(1)?, DType::F64, &Device::Cpu)?)?;
    let (_, values, _) = linalg::svd(&inner)?;
    let values = values.to_vec1::<f64>()?;
    let whole = if q.dim(1)? < q.dim(0)? { Some(1.0) } else { None };
    let all = || values.iter().copied().chain(whole);
    Ok(all().fold(0.0, f64::max) / all().fold(f64::INFINITY, f64::min))
}

struct Branch {
    keys: (&'static str, &'static str),
    /// [`Role::A`] where A is the change's own factor; before the base's weight it is not.
    role_of_a: Role,
    a: Var,
    b: Var,
}

struct HydraDelta {
    parallel: Option<Branch>,
    sequential: Option<Branch>,
    s: f64,
}

impl Delta for HydraDelta {
    fn change(&self, base: &Projection, _rows: usize, _step: &Step) -> TensorResult<Change> {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        if let Some(branch) = &self.parallel {
            a.push(branch.a.as_tensor().clone());
            b.push(branch.b.as_tensor().clone());
        }
        if let Some(branch) = &self.sequential {
            a.push(frozen_left(&branch.a, &base.weight)?);
            b.push(branch.b.as_tensor().clone());
        }
        Ok(Change::low_rank(Tensor::cat(&a, 0)?, Tensor::cat(&b, 1)?, self.s))
    }

    fn bias_change(&self, base: &Projection) -> TensorResult<Option<Tensor>> {
        let (Some(bias), Some(branch)) = (&base.bias, &self.sequential) else { return Ok(None) };
        let bias = bias.to_dtype(branch.a.dtype())?.unsqueeze(1)?;
        Ok(Some((branch.b.matmul(&branch.a.matmul(&bias)?)?.squeeze(1)? * self.s)?))
    }

    fn parameters(&self) -> Vec<Parameter<'_>> {
        let branches = [&self.parallel, &self.sequential].into_iter().flatten();
        branches
            .flat_map(|b| [Parameter::new(b.keys.0, &b.a, b.role_of_a), Parameter::new(b.keys.1, &b.b, Role::B)])
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use lorimer_tensor::FrozenWeight;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;
    use serde_json::json;

    use super::*;
    use crate::delta::largest;
    use crate::method::CalibrationStats;

    /// Unmerging solves with I + s B_s A_s; the condition that `inspect` shows is that matrix's.
    #[test]
    fn the_base_comes_back_by_solving() -> Result<()> {
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let w = kaiming((6, 5), DType::F64, &mut rng)?;
        let base = Projection { weight: FrozenWeight::Dense(w.clone()), bias: None };
        let settings = json!({ "r": 4, "s": 0.5 });
        let method = crate::methods::build("hydra", settings.as_object().unwrap())?;
        let site = Site::new("p", (6, 5));
        let stats = CalibrationStats::new();
        let delta = method.attach(&site, &base, &mut ParameterSource::start(&site, DType::F64, 0, &stats))?;
        let mut tensors = BTreeMap::new();
        for (key, var) in delta.trainable() {
            var.set(&kaiming(var.dims2()?, DType::F64, &mut rng)?)?;
            tensors.insert(key.to_string(), var.as_tensor().clone());
        }
        let get = |key: usize| tensors[KEYS[key]].clone();
        let factor = ((get(3).matmul(&get(2))? * 0.5)? + Tensor::eye(6, DType::F64, &Device::Cpu)?)?;
        let rest = (delta.merged(&base)?.unwrap() - (get(1).matmul(&get(0))? * 0.5)?)?;
        let back = linalg::pinv(&factor, 1e-12)?.matmul(&rest)?;
        assert!(largest(&(back - &w)?)? < 1e-10);
        let (_, values, _) = linalg::svd(&factor)?;
        let values = values.to_vec1::<f64>()?;
        let remarks: BTreeMap<_, _> = method.remarks(&tensors)?.into_iter().collect();
        assert!((remarks["sequential_condition"] - values[0] / values[5]).abs() < 1e-9);
        assert!((0.0..=1.0).contains(&remarks["branch_cosine"]));
        Ok(())
    }
}
