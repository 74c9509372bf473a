//! # Bone (MiSS): block-affine and shard-sharing updates
//!
//! Kang 2024, *Bone: Block-Affine Adaptation of Large Language Models*, arXiv 2409.15371, sections 3.1 and 3.2; PEFT calls it
//! MiSS from 0.18 on. No pair of factors: one block b that is zero at the start, for W (outputs, inputs):
//!
//! - `row` (PEFT's default): b (r, outputs), `y = W x + bᵀ fold(x)`, where fold adds up the pieces of length r that x is cut
//!   into (the last one filled with zeros). It is LoRA whose A is the fixed 0/1 matrix of the fold.
//! - `mini`: b (r, mini_r), the same with b repeated along the outputs.
//! - `bat` (the paper's weight guide): b (outputs/r, r, r), `W'ᵢⱼ = Wᵢⱼ + Wᵢⱼ bᵢ + bᵢ` on the r × r blocks of W; r has to divide both
//!   sides of W.
//!
//! Trainable parameters of a projection: `r · outputs` (row, bat), `r · mini_r` (mini).
//!
//! Files: `miss_block` (`peft_type` MISS), and `bone_block` (BONE) as PEFT wrote up to 0.17; `--set peft_type=BONE` writes the latter.
//!
//! Meant for: the cheapest start there is, and fast first steps. `bat` is not additive: it cannot be scaled or summed.
//!
//! Step time: row and mini do LoRA's work without the gradient of A. bat forms W' (outputs · inputs · r multiply-adds) once a step
//! and needs the gradient of the whole weight: three products of the size of W a row where LoRA has two, so 1.5× LoRA's step is its
//! floor.
//!
//! ```
//! use lorimer_adapter::example::project;
//! // W = 0 (1, 4), r = 2, b = (10, 100): fold(1, 2, 3, 4) = (1 + 3, 2 + 4).
//! let y = project("bone", r#"{"r": 2}"#, &[&[0., 0., 0., 0.]], &[("miss_block", &[10., 100.])], &[1., 2., 3., 4.]);
//! assert_eq!(y, [640.0]);
//! // bat on one 1 × 1 block: W + W b + b with W = 3, b = 2.
//! let y = project("bone", r#"{"r": 1, "variant": "bat"}"#, &[&[3.]], &[("miss_block", &[2.])], &[1.]);
//! assert_eq!(y, [11.0]);
//! ```

use candle_core::{DType, Device, Result as TensorResult, Tensor, Var};
use lorimer_model::{Projection, Site};
use lorimer_tensor::block_affine;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::entry::{Entry, Served};
use super::random::kaiming;
use super::slices::Slices;
use crate::delta::{Change, Delta};
use crate::dropout::{Dropout, check_dropout};
use crate::error::{Error, Result};
use crate::file::keys::FileKeys;
use crate::method::{Bias, Method, ParameterSource};
use crate::parameter::{Parameter, Role};
use crate::settings::{PeftKeys, configure, from_peft_json, peft_json};
use crate::step::Step;
use crate::targets::Targeting;

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "bone",
    title: "Block-affine update of the weight by itself (MiSS)",
    paper: "arXiv 2409.15371",
    kind: "projection",
    variants: &["row", "bat", "mini"],
    peft_type: "MISS",
    mergeable: true,
    served: Served::Batched,
    lr: 5e-4,
    parts: &[],
    flags: &[("rank", "r"), ("dropout", "miss_dropout"), ("bias", "bias"), ("init", "init_weights")],
    source: include_str!("bone.rs"),
    laws: &[
        (r#"{"r": 3}"#, 0.0),
        (r#"{"r": 4, "bias": "lora_only", "peft_type": "BONE"}"#, 0.0),
        (r#"{"r": 5, "miss_dropout": 0.3}"#, 0.0),
        (r#"{"r": 4, "variant": "mini", "mini_r": 4}"#, 0.0),
        (r#"{"r": 4, "variant": "bat"}"#, 1e-12),
        (r#"{"r": 2, "variant": "bat", "peft_type": "BONE", "modules_to_save": ["model.norm"]}"#, 1e-12),
    ],
    build: |settings| {
        let mut settings = settings.clone();
        if let Some(variant) = settings.remove("variant") {
            settings.insert("init_weights".into(), if variant == json!("row") { json!(true) } else { variant });
        }
        BoneConfig::check(configure("bone", &settings)?)
    },
    recognises: |config| matches!(config.get("peft_type").and_then(Value::as_str), Some("MISS" | "BONE")),
    from_file: |config| BoneConfig::check(from_peft_json("bone", config, &PeftKeys::NONE)?),
};

/// PEFT's `MissConfig`, with PEFT's keys.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct BoneConfig {
    /// Which modules.
    #[serde(flatten)]
    pub targeting: Targeting,
    /// Length of the pieces, or side of the blocks.
    pub r: usize,
    /// Probability of zeroing an element of x before the fold, in training.
    pub miss_dropout: f64,
    /// With `mini`: outputs after which b repeats itself.
    pub mini_r: usize,
    /// true (row), `bat` or `mini`; false starts row at random.
    pub init_weights: Value,
    /// Which biases are trained.
    pub bias: Bias,
    /// `MISS`, or `BONE` for PEFT up to 0.17.
    pub peft_type: String,
}

impl Default for BoneConfig {
    fn default() -> Self {
        Self {
            targeting: Targeting::default(),
            r: 64,
            miss_dropout: 0.0,
            mini_r: 1,
            init_weights: Value::Bool(true),
            bias: Bias::None,
            peft_type: "MISS".into(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variant {
    Row,
    Mini,
    Bat,
}

impl BoneConfig {
    fn check(self) -> Result<Box<dyn Method>> {
        let variant = match &self.init_weights {
            Value::Bool(_) => Variant::Row,
            Value::String(s) if s == "bat" => Variant::Bat,
            Value::String(s) if s == "mini" => Variant::Mini,
            other => {
                let shown: String = other.to_string().chars().take(40).collect();
                return Err(Error::Config(format!("init_weights {shown} is not one of true (row), bat, mini")));
            }
        };
        if self.r == 0 || self.mini_r == 0 {
            return Err(Error::Config("`r` and `mini_r` should be at least 1".into()));
        }
        check_dropout("miss_dropout", self.miss_dropout)?;
        if variant == Variant::Bat && self.miss_dropout > 0.0 {
            return Err(Error::Config("bat changes the weight itself: miss_dropout has nothing to act on".into()));
        }
        if !matches!(self.peft_type.as_str(), "MISS" | "BONE") {
            return Err(Error::Config("peft_type should be MISS or BONE".into()));
        }
        if self.peft_type == "BONE" && (variant == Variant::Mini || self.miss_dropout > 0.0) {
            return Err(Error::Config("BONE files know neither mini nor dropout; use peft_type MISS".into()));
        }
        Ok(Box::new(Bone { config: self, variant, folds: Slices::default() }))
    }
}

struct Bone {
    config: BoneConfig,
    variant: Variant,
    /// The fold's matrix by the number of inputs: all projections of a width share one.
    folds: Slices,
}

/// (r, inputs), 1 where input i goes to place i mod r.
fn fold(r: usize, inputs: usize, dtype: DType) -> TensorResult<Tensor> {
    let mut data = vec![0f32; r * inputs];
    (0..inputs).for_each(|i| data[i % r * inputs + i] = 1.0);
    Tensor::from_vec(data, (r, inputs), &Device::Cpu)?.to_dtype(dtype)
}

/// The divisor of both that is nearest to `r`.
fn nearest_divisor(r: usize, site: &Site) -> usize {
    let divides = |d: &usize| site.inputs.is_multiple_of(*d) && site.outputs.is_multiple_of(*d);
    (1..=site.inputs.min(site.outputs)).filter(divides).min_by_key(|d| d.abs_diff(r)).unwrap_or(1)
}

impl Bone {
    fn shape(&self, site: &Site) -> Result<Vec<usize>> {
        let (r, c) = (self.config.r, &self.config);
        let fail = |text: String| Err(Error::Config(text));
        match self.variant {
            Variant::Bat if !site.inputs.is_multiple_of(r) || !site.outputs.is_multiple_of(r) => fail(format!(
                "bat cuts `{}` ({}, {}) into blocks of {r}, which does not divide both; the nearest r that does is {}",
                site.path,
                site.outputs,
                site.inputs,
                nearest_divisor(r, site)
            )),
            Variant::Bat => Ok(vec![site.outputs / r, r, r]),
            _ if r > site.inputs => fail(format!("r = {r} is more than the {} inputs of `{}`", site.inputs, site.path)),
            Variant::Mini if !site.outputs.is_multiple_of(c.mini_r) => {
                fail(format!("mini_r = {} does not divide the {} outputs of `{}`", c.mini_r, site.outputs, site.path))
            }
            Variant::Mini => Ok(vec![r, c.mini_r]),
            Variant::Row => Ok(vec![r, site.outputs]),
        }
    }

    fn key(&self) -> &'static str {
        if self.config.peft_type == "BONE" { "bone_block" } else { "miss_block" }
    }
}

impl Method for Bone {
    fn name(&self) -> &'static str {
        "bone"
    }

    fn targeting(&self) -> &Targeting {
        &self.config.targeting
    }

    fn bias(&self) -> Bias {
        self.config.bias
    }

    fn stored_config(&self) -> Map<String, Value> {
        let mut all = self.config();
        let bone = self.config.peft_type == "BONE";
        if self.config.bias == Bias::LoraOnly {
            all.insert("bias".into(), json!(if bone { "bone_only" } else { "MiSS_only" }));
        }
        if bone {
            all.shift_remove("mini_r");
            all.shift_remove("miss_dropout");
        }
        all
    }

    fn config(&self) -> Map<String, Value> {
        peft_json(&self.config.peft_type, &self.config)
    }

    fn file_keys(&self) -> FileKeys {
        FileKeys::of_modules(if self.key() == "bone_block" { &["bone_block"] } else { &["miss_block"] })
    }

    fn attach(&self, site: &Site, _base: &Projection, source: &mut ParameterSource<'_>) -> Result<Box<dyn Delta>> {
        let (shape, dtype, r) = (self.shape(site)?, source.dtype(), self.config.r);
        let random = self.config.init_weights == json!(false);
        let block = source.trainable(self.key(), &shape, |rng| match random {
            true => Ok(kaiming((shape[0], shape[1]), dtype, rng)?),
            false => Ok(Tensor::zeros(&shape[..], dtype, &Device::Cpu)?),
        })?;
        if self.variant == Variant::Bat {
            return Ok(Box::new(Bat { block, key: self.key() }));
        }
        let fold = self.folds.get(('f', site.inputs, r), || Ok(fold(r, site.inputs, dtype)?))?;
        let dropout = Dropout::new(self.config.miss_dropout, &site.path);
        Ok(Box::new(Row { block, key: self.key(), fold, repeats: site.outputs / shape[1], dropout }))
    }

    fn parameters(&self, site: &Site) -> Result<usize> {
        Ok(self.shape(site)?.iter().product())
    }

    fn rows_are_independent(&self) -> bool {
        self.config.miss_dropout == 0.0
    }

    fn not_additive(&self) -> Option<&'static str> {
        (self.variant == Variant::Bat).then_some("bat multiplies the weight by its block, so changes do not add up")
    }

    fn activations_per_row(&self, site: &Site) -> usize {
        match self.variant {
            Variant::Bat => 0,
            _ if self.config.miss_dropout > 0.0 => self.config.r + site.inputs,
            _ => self.config.r,
        }
    }

    fn activations_fixed(&self, site: &Site) -> usize {
        if self.variant == Variant::Bat { site.inputs * site.outputs } else { self.config.r * site.outputs }
    }
}

/// `row` and `mini`.
struct Row {
    /// (r, outputs), or (r, mini_r).
    block: Var,
    key: &'static str,
    fold: Tensor,
    repeats: usize,
    dropout: Dropout,
}

impl Delta for Row {
    fn change(&self, _base: &Projection, _rows: usize, _step: &Step) -> TensorResult<Change> {
        let b = self.block.t()?;
        let b = if self.repeats == 1 { b.contiguous()? } else { b.repeat((self.repeats, 1))? };
        Ok(Change::low_rank(self.fold.clone(), b, 1.0))
    }

    fn dropout(&self) -> Option<&Dropout> {
        Some(&self.dropout)
    }

    fn parameters(&self) -> Vec<Parameter<'_>> {
        vec![Parameter::new(self.key, &self.block, Role::Core)]
    }
}

/// The block-affine form.
struct Bat {
    /// (outputs/r, r, r).
    block: Var,
    key: &'static str,
}

impl Delta for Bat {
    fn change(&self, base: &Projection, _rows: usize, _step: &Step) -> TensorResult<Change> {
        let weight = base.dense(self.block.dtype())?;
        Ok(Change::Weight(block_affine(&weight, &self.block)?))
    }

    fn parameters(&self) -> Vec<Parameter<'_>> {
        vec![Parameter::new(self.key, &self.block, Role::Core)]
    }
}

#[cfg(test)]
mod tests {
    use lorimer_tensor::FrozenWeight;

    use super::*;
    use crate::method::CalibrationStats;

    /// W' − b solved with (I + b) gives W back (card's unmerge).
    #[test]
    fn bat_can_be_taken_back() -> Result<()> {
        let mut rng = rand::SeedableRng::seed_from_u64(1);
        let w = kaiming((8, 12), DType::F64, &mut rng)?;
        let base = Projection { weight: FrozenWeight::Dense(w.clone()), bias: None };
        let settings = json!({ "r": 4, "variant": "bat" });
        let method = crate::methods::build("bone", settings.as_object().unwrap())?;
        let site = Site::new("p", (8, 12));
        let stats = CalibrationStats::new();
        let delta = method.attach(&site, &base, &mut ParameterSource::start(&site, DType::F64, 0, &stats))?;
        let b = (kaiming((8, 4), DType::F64, &mut rng)? * 0.3)?.reshape((2, 4, 4))?;
        delta.trainable()[0].1.set(&b)?;
        let merged = delta.merged(&base)?.unwrap();
        for i in 0..2 {
            let guide = (b.get(i)? + Tensor::eye(4, DType::F64, &Device::Cpu)?)?;
            let inverse = lorimer_tensor::linalg::pinv(&guide, 1e-12)?;
            for j in 0..3 {
                let block = |t: &Tensor| t.narrow(0, 4 * i, 4)?.narrow(1, 4 * j, 4)?.contiguous();
                let back = (block(&merged)? - b.get(i)?)?.matmul(&inverse)?;
                assert!(crate::delta::largest(&(back - block(&w)?)?)? < 1e-10);
            }
        }
        Ok(())
    }

    #[test]
    fn bat_names_the_nearest_block() {
        let settings = json!({ "r": 5, "variant": "bat" });
        let method = crate::methods::build("bone", settings.as_object().unwrap()).unwrap();
        let error = method.parameters(&Site::new("p", (8, 12))).unwrap_err().to_string();
        assert!(error.contains("is 4"), "{error}");
    }
}
