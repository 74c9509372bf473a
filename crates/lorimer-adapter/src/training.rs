//! How an adapter is trained, where that is more than AdamW on the loss of its task: settings of optimisers, callbacks and objectives.
//! A method brings them by [`crate::Method::training`]; their mathematics is in `lorimer-train`. On the command line a part is its name with
//! settings behind it: `galore:rank=64,scale=0.25`.

use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::row_rate::Allora;
use crate::settings::configure;

/// What a method's name stands for beside its form.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Training {
    /// From gradients to steps; None: AdamW.
    pub optimizer: Option<OptimizerKind>,
    /// What acts between the parts of a step.
    #[serde(rename = "control")]
    pub callback: Option<Callback>,
    /// What is minimised beside the loss of the task.
    pub objective: Option<Objective>,
}

/// Which optimiser, by the name that `--optimizer` takes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OptimizerKind {
    /// AdamW with moments in the parameters' type.
    #[default]
    #[serde(rename = "adamw")]
    AdamW,
    /// AdamW with block-wise 8-bit moments.
    #[serde(rename = "adamw-8bit")]
    AdamW8bit,
    /// AdamW in a low-rank space of each weight's gradient.
    Galore(Galore),
    /// Gradients of A and B changed so that the step of their product is nearest the full gradient.
    LoraPro(LoraPro),
}

/// Settings of GaLore.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Galore {
    /// Rank of the space.
    pub rank: usize,
    /// Steps between two looks for a new space: T.
    pub update_proj_gap: usize,
    /// What the step is multiplied by: α.
    pub scale: f64,
    /// Which side is projected.
    pub proj_type: GaloreProjection,
    /// 32, or 8 for block-wise 8-bit moments.
    pub bits: usize,
    /// Step each layer as soon as its gradient is there, and drop the gradient.
    pub per_layer: bool,
    /// Find the space by subspace iteration from the last one in place of an exact decomposition.
    pub randomized: bool,
}

impl Default for Galore {
    fn default() -> Self {
        Self {
            rank: 128,
            update_proj_gap: 200,
            scale: 0.25,
            proj_type: GaloreProjection::Std,
            bits: 32,
            per_layer: false,
            randomized: false,
        }
    }
}

/// Which side of a gradient (m, n) GaLore projects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GaloreProjection {
    /// The shorter: right singular vectors where m ≥ n, else left.
    #[default]
    Std,
    /// The longer.
    ReverseStd,
    /// Left singular vectors.
    Left,
    /// Right singular vectors.
    Right,
    /// Both.
    Full,
}

/// Settings of LoRA-Pro.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraPro {
    /// Moments of the equivalent full gradient, in place of those of A and B.
    pub full: bool,
    /// δ, added to the diagonals of BᵀB and A Aᵀ before they are inverted.
    pub delta: f64,
}

impl Default for LoraPro {
    fn default() -> Self {
        Self { full: false, delta: 1e-8 }
    }
}

/// What acts between the parts of a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Callback {
    /// A rank drawn for each step (DyLoRA).
    RankSampling(RankSampling),
    /// A factor on the step of each row of B (ALLoRA).
    RowRate(Allora),
    /// Soft threshold on gates after each step (SoRA).
    SoftThreshold(SoftThreshold),
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

/// How gates are thinned out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SoftThreshold {
    /// The threshold ξ of each stage.
    pub stages: Vec<f64>,
    /// Whether these are multiples of the gates' highest learning rate.
    pub of_rate: bool,
    /// Whether ξ is multiplied by the learning rate over its peak (the paper's), or stays (the reference code's).
    pub lr_scaled: bool,
    /// What becomes of a gate after each step.
    pub update: Update,
    /// The gates' highest learning rate; None: the run's.
    pub gate_lr: Option<f64>,
    /// λ of λ · Σ|g| / p in the loss, p the number of all gates.
    pub penalty: f64,
    /// In place of the threshold: gates drawn by lot are closed over the run until this share is left.
    pub random_keep: Option<f64>,
}

/// What becomes of a gate g after each step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Update {
    /// The reference code's: where |g| > ξ it loses ξ, and what is then below ξ is zero.
    #[default]
    Masked,
    /// sign(g) · max(|g| − ξ, 0), the paper's.
    Soft,
}

impl Update {
    /// What a gate becomes.
    pub fn of(self, g: f64, xi: f64) -> f64 {
        let size = g.abs();
        match self {
            Self::Soft if size > xi => (size - xi).copysign(g),
            Self::Soft => 0.0,
            Self::Masked => {
                let left = if size > xi { size - xi } else { size };
                if left < xi { 0.0 } else { left.copysign(g) }
            }
        }
    }
}

/// What is minimised beside the loss of the task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// BA-LoRA's three regularisers.
    BaLora(BaLora),
}

/// Settings of BA-LoRA.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BaLora {
    /// 1, or 2 for the authors' later form of the terms, which has other defaults: λ 0.025, 0.005, 0.005, k 10, temperature 2, top_k_entropy 20.
    pub version: usize,
    /// λ₁, of the consistency with the frozen base.
    pub lambda1: f64,
    /// λ₂, of diversity.
    pub lambda2: f64,
    /// λ₃, of the share of the largest singular values.
    pub lambda3: f64,
    /// Singular values that count as the largest.
    pub k: usize,
    /// Which form of the terms: `nlg` or `nlu`.
    pub task: BaLoraTask,
    /// Version 2: what logits are divided by for the consistency.
    pub temperature: f64,
    /// Version 2: the entropy is that of so many of the likeliest tokens; 0: of all.
    pub top_k_entropy: usize,
}

impl Default for BaLora {
    fn default() -> Self {
        Self {
            version: 1,
            lambda1: 1e-4,
            lambda2: 3e-4,
            lambda3: 1e-4,
            k: 3,
            task: BaLoraTask::Nlg,
            temperature: 1.0,
            top_k_entropy: 0,
        }
    }
}

/// Which form BA-LoRA's terms have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BaLoraTask {
    /// Generation: divergence from the base's distribution, and entropy.
    #[default]
    Nlg,
    /// Understanding: distance of normalised logits, and their covariance.
    Nlu,
}

/// `name:key=value,key=value`.
fn parts(text: &str) -> Result<(&str, Map<String, Value>)> {
    let (name, rest) = text.split_once(':').unwrap_or((text, ""));
    let mut settings = Map::new();
    for pair in rest.split(',').filter(|p| !p.trim().is_empty()) {
        let (key, value) = pair.split_once('=').ok_or_else(|| {
            let pair: String = pair.chars().take(40).collect();
            Error::Config(format!("`{pair}` after `{name}:` should be key=value"))
        })?;
        let value = value.trim();
        settings.insert(key.trim().into(), serde_json::from_str(value).unwrap_or_else(|_| value.into()));
    }
    Ok((name.trim(), settings))
}

fn plain(name: &str, settings: &Map<String, Value>) -> Result<()> {
    match settings.keys().next() {
        Some(key) => Err(Error::Config(format!("`{name}` has no setting `{key}`"))),
        None => Ok(()),
    }
}

impl Galore {
    /// From settings by name.
    pub fn given(settings: &Map<String, Value>) -> Result<Self> {
        let g: Self = configure("galore", settings)?;
        if g.rank == 0 || g.rank > 1 << 16 || g.update_proj_gap == 0 {
            return Err(Error::Config("galore: rank should be between 1 and 65536, update_proj_gap at least 1".into()));
        }
        if !(g.scale.is_finite() && g.scale > 0.0) {
            return Err(Error::Config(format!("galore: scale = {} should be above 0", g.scale)));
        }
        if ![8, 32].contains(&g.bits) {
            return Err(Error::Config(format!("galore: bits = {} should be 32 or 8", g.bits)));
        }
        Ok(g)
    }
}

impl LoraPro {
    /// From settings by name.
    pub fn given(settings: &Map<String, Value>) -> Result<Self> {
        let p: Self = configure("lora-pro", settings)?;
        if !(0.0..=1.0).contains(&p.delta) {
            return Err(Error::Config(format!("lora-pro: delta = {} should be between 0 and 1", p.delta)));
        }
        Ok(p)
    }
}

impl BaLora {
    /// From settings by name.
    pub fn given(settings: &Map<String, Value>) -> Result<Self> {
        let mut b: Self = configure("ba-lora", settings)?;
        match b.version {
            1 if settings.contains_key("temperature") || settings.contains_key("top_k_entropy") => {
                return Err(Error::Config("ba-lora: temperature and top_k_entropy belong to version 2".into()));
            }
            1 => {}
            2 if b.task == BaLoraTask::Nlu => {
                return Err(Error::Config("ba-lora: version 2 has the task nlg only; use version 1 for nlu".into()));
            }
            2 => {
                let second = Self {
                    version: 2,
                    lambda1: 0.025,
                    lambda2: 0.005,
                    lambda3: 0.005,
                    k: 10,
                    task: BaLoraTask::Nlg,
                    temperature: 2.0,
                    top_k_entropy: 20,
                };
                let Ok(Value::Object(mut all)) = serde_json::to_value(second) else {
                    return Err(Error::Config("ba-lora: the defaults of version 2 cannot be written".into()));
                };
                all.extend(settings.clone());
                b = configure("ba-lora", &all)?;
            }
            other => return Err(Error::Config(format!("ba-lora: version = {other} should be 1 or 2"))),
        }
        if [b.lambda1, b.lambda2, b.lambda3].iter().any(|l| !l.is_finite()) || b.k == 0 {
            return Err(Error::Config("ba-lora: lambda1, lambda2 and lambda3 should be numbers, k at least 1".into()));
        }
        if !(b.temperature.is_finite() && b.temperature > 0.0) {
            return Err(Error::Config(format!("ba-lora: temperature = {} should be above 0", b.temperature)));
        }
        Ok(b)
    }
}

impl FromStr for OptimizerKind {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, mut settings) = parts(text)?;
        match name {
            "adamw" => plain(name, &settings).map(|()| Self::AdamW),
            "adamw-8bit" => plain(name, &settings).map(|()| Self::AdamW8bit),
            "galore" => Ok(Self::Galore(Galore::given(&settings)?)),
            "galore-8bit" => {
                settings.insert("bits".into(), 8.into());
                Ok(Self::Galore(Galore::given(&settings)?))
            }
            "lora-pro" => Ok(Self::LoraPro(LoraPro::given(&settings)?)),
            "lora-pro-full" => {
                settings.insert("full".into(), true.into());
                Ok(Self::LoraPro(LoraPro::given(&settings)?))
            }
            _ => {
                let name: String = name.chars().take(40).collect();
                Err(Error::Config(format!(
                    "there is no optimizer `{name}`; there are adamw, adamw-8bit, galore, galore-8bit, lora-pro, lora-pro-full"
                )))
            }
        }
    }
}

impl FromStr for Objective {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, settings) = parts(text)?;
        match name {
            "ba-lora" => Ok(Self::BaLora(BaLora::given(&settings)?)),
            _ => {
                let name: String = name.chars().take(40).collect();
                Err(Error::Config(format!("there is no objective `{name}`; there is ba-lora")))
            }
        }
    }
}

impl OptimizerKind {
    /// Its name on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            Self::AdamW => "adamw",
            Self::AdamW8bit => "adamw-8bit",
            Self::Galore(g) if g.bits == 8 => "galore-8bit",
            Self::Galore(_) => "galore",
            Self::LoraPro(p) if p.full => "lora-pro-full",
            Self::LoraPro(_) => "lora-pro",
        }
    }

    /// The learning rate that training with it takes unless told otherwise, where that is its own and not the method's.
    pub fn learning_rate(&self) -> Option<f64> {
        match self {
            // Its steps have the size of the rate in the weight itself, as those of full fine-tuning.
            Self::LoraPro(p) if p.full => Some(2e-5),
            _ => None,
        }
    }

    /// Its name with its settings: what [`str::parse`] reads.
    pub fn spec(&self) -> String {
        let settings = match self {
            Self::AdamW | Self::AdamW8bit => return self.name().into(),
            Self::Galore(g) => serde_json::to_value(g),
            Self::LoraPro(p) => serde_json::to_value(p),
        };
        let fields = settings.ok().and_then(|v| v.as_object().cloned()).unwrap_or_default();
        let show = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_string);
        let pairs: Vec<String> = fields.iter().map(|(k, v)| format!("{k}={}", show(v))).collect();
        format!("{}:{}", self.name(), pairs.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_read_with_their_settings() {
        let g: OptimizerKind = "galore-8bit:rank=4, proj_type=left".parse().unwrap();
        let expected = Galore { rank: 4, proj_type: GaloreProjection::Left, bits: 8, ..Default::default() };
        assert_eq!(g, OptimizerKind::Galore(expected));
        assert_eq!(g.spec().parse::<OptimizerKind>().unwrap(), g);
        for bad in ["sgd", "adamw:x=1", "galore:rank", "galore:rank=0", "galore:speed=2", "lora-pro:delta=9"] {
            assert!(bad.parse::<OptimizerKind>().is_err(), "{bad}");
        }
        for bad in ["k=0", "version=3", "temperature=2", "version=2,task=nlu", "version=2,temperature=0", "lambda4=1"] {
            assert!(format!("ba-lora:{bad}").parse::<Objective>().is_err(), "{bad}");
        }
        let Objective::BaLora(second) = "ba-lora:version=2,lambda3=0.1".parse().unwrap();
        assert_eq!((second.lambda1, second.lambda3, second.k, second.top_k_entropy), (0.025, 0.1, 10, 20));
    }
}
