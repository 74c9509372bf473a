//! # LoRA: low-rank adaptation
//!
//! Hu et al. 2021, *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv 2106.09685, eq. 3:
//! `y = W x + (α/r) · B A x` with A (r, inputs), B (outputs, r). rsLoRA (Kalajdzievski 2023, arXiv 2312.03732)
//! puts α/√r in place of α/r.
//!
//! Trainable parameters of a projection: `r · (inputs + outputs)`.
//!
//! Starts (`init_lora_weights`): `true` (A uniform in ±1/√inputs, B zero), `gaussian` (A normal with σ = 1/r, B zero),
//! `orthogonal` (A and B random with B A = 0), `pissa` and `pissa_niter_N` (Meng et al. 2024, arXiv 2404.02948: the r
//! largest singular directions of W), `olora` (Büyükakyüz 2024, arXiv 2406.01775: the first r of Q and R), `eva` (directions of
//! the data, see its page). `pissa` and `olora` begin with B₀A₀ ≠ 0 and adapt the residual W − (α/r)·B₀A₀; here the base stays as it
//! is and the change is (α/r)·(B A − B₀A₀), saved as the LoRA of rank 2r that it is, so that the file works on the original base.
//!
//! Good for: everything, as the first thing to try.
//!
//! ```
//! use lorimer_adapter::example::project;
//! // r = 1, α = 2: ΔW = 2 · (1, 3)ᵀ (1, 1), so for x = (1, 2): 2 · 3 · (1, 3).
//! let parameters: &[(&str, &[f64])] = &[("lora_A", &[1., 1.]), ("lora_B", &[1., 3.])];
//! let y = project("lora", r#"{"r": 1, "lora_alpha": 2}"#, &[&[0., 0.], &[0., 0.]], parameters, &[1., 2.]);
//! assert_eq!(y, [6.0, 18.0]);
//! ```

use candle_core::{DType, Device, Result as TensorResult, Tensor, Var};
use indexmap::IndexMap;
use lorimer_model::{Projection, Site};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::allora::Allora;
use super::dropout::{Dropout, check_dropout};
use super::eva::{self, EvaConfig};
use super::lora_start::Start;
use super::{Entry, Served, dora};
use crate::error::{Error, Result};
use crate::method::{
    Bias, Calibration, CalibrationStats, Change, Delta, LowRank, Method, ParameterSource, PeftKeys, Step, configure,
    from_peft_json,
};
use crate::targets::{Targeting, pattern_value};
use crate::training::Training;

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "lora",
    title: "Low-rank adaptation",
    paper: "arXiv 2106.09685",
    kind: "projection",
    variants: &[],
    peft_type: "LORA",
    mergeable: true,
    served: Served::Batched,
    lr: 2e-3,
    flags: FLAGS,
    source: include_str!("lora.rs"),
    laws: &[
        (r#"{"r": 3}"#, 0.0),
        (r#"{"r": 2, "use_rslora": true, "target_modules": ["q_proj", "down_proj"]}"#, 0.0),
        (r#"{"r": 4, "init_lora_weights": "gaussian", "layers_to_transform": [1]}"#, 0.0),
        (r#"{"r": 4, "init_lora_weights": "orthogonal"}"#, 1e-12),
        (r#"{"r": 3, "init_lora_weights": "pissa"}"#, 1e-12),
        (r#"{"r": 3, "init_lora_weights": "pissa_niter_4"}"#, 1e-12),
        (r#"{"r": 3, "init_lora_weights": "olora", "use_rslora": true}"#, 1e-12),
        (r#"{"r": 3, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 5}, "bias": "all"}"#, 0.0),
        (r#"{"r": 2, "modules_to_save": ["lm_head", "model.norm"], "exclude_modules": ["k_proj"]}"#, 1e-12),
        (r#"{"r": 3, "lora_dropout": 0.3}"#, 0.0),
    ],
    build: |settings| Ok(Box::new(Lora::new("lora", LoraConfig::given("lora", settings)?))),
    recognises: |config| is_lora(config, false),
    from_file: lora_file,
};

/// Keys of PEFT's `LoraConfig` that [`LoraConfig`] does not have.
const PEFT_KEYS: PeftKeys = PeftKeys {
    // They are of use with a key or a start that is refused, or in training only.
    inert: &["megatron_core", "qalora_group_size", "corda_config", "lora_ga_config", "loftq_config", "eva_config"],
    refused: &[
        ("layer_replication", "repeats layers of the base"),
        ("trainable_token_indices", "trains single rows of the embedding"),
        ("target_parameters", "adapts parameters that are no linear layers"),
        ("lora_bias", "gives B a bias"),
        ("use_qalora", "averages the input over groups"),
        ("use_bdlora", "makes A or B of blocks"),
        ("alora_invocation_tokens", "acts from certain tokens on"),
        ("arrow_config", "chooses among adapters by the token"),
        ("megatron_config", "is for the layers of Megatron"),
        ("kasa_config", "takes small singular values out of the base"),
        ("velora_config", "trains with compressed activations and keeps them beside A and B"),
        ("monteclora_config", "draws A at random around its mean"),
        ("ensure_weight_tying", "gives a tied head and embedding one change"),
    ],
};

/// Whether a configuration names a module that may be tied to another: the embedding or the head.
fn names_tied(config: &Map<String, Value>) -> bool {
    let tied = |name: &str| matches!(name.rsplit('.').next(), Some("embed_tokens" | "lm_head"));
    let of = |key: &str| match config.get(key) {
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).any(tied),
        // A regular expression may mean any module.
        Some(Value::String(_)) => true,
        _ => false,
    };
    of("modules_to_save") || of("target_modules")
}

/// What the command line's flags set.
pub(super) const FLAGS: &[(&str, &str)] = &[
    ("rank", "r"),
    ("alpha", "lora_alpha"),
    ("dropout", "lora_dropout"),
    ("rslora", "use_rslora"),
    ("bias", "bias"),
    ("init", "init_lora_weights"),
];

/// An ordinary LoRA out of a file, for methods that write such.
pub(super) fn lora_file(config: &Map<String, Value>) -> Result<Box<dyn Method>> {
    Ok(Box::new(Lora::new("lora", LoraConfig::from_file(config)?)))
}

/// Whether a file's configuration is LoRA's, with `use_dora` as asked.
pub(super) fn is_lora(config: &Map<String, Value>, dora: bool) -> bool {
    config.get("peft_type").and_then(Value::as_str) == Some("LORA")
        && config.get("use_dora").and_then(Value::as_bool).unwrap_or(false) == dora
}

/// α of a file that names none.
const PEFT_ALPHA: f64 = 8.0;

/// Largest rank that is accepted.
const MAX_RANK: usize = 1 << 16;

/// PEFT's `LoraConfig`, with PEFT's keys.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraConfig {
    /// Which modules.
    #[serde(flatten)]
    pub targeting: Targeting,
    /// Rank r.
    pub r: usize,
    /// α; the change is multiplied by α/r.
    pub lora_alpha: f64,
    /// Probability of zeroing an element of x before A, in training.
    pub lora_dropout: f64,
    /// α/√r in place of α/r.
    pub use_rslora: bool,
    /// DoRA: magnitude and direction apart.
    pub use_dora: bool,
    /// Which biases are trained.
    pub bias: Bias,
    /// How A and B begin: true, false, `gaussian`, `orthogonal`, `pissa`, `pissa_niter_N`, `olora`, `eva`.
    pub init_lora_weights: Value,
    /// Settings of the start `eva`.
    pub eva_config: Option<EvaConfig>,
    /// Other ranks for modules whose path a pattern matches.
    pub rank_pattern: IndexMap<String, usize>,
    /// Other α for modules whose path a pattern matches.
    pub alpha_pattern: IndexMap<String, f64>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            targeting: Targeting::default(),
            r: 8,
            lora_alpha: 16.0,
            lora_dropout: 0.0,
            use_rslora: false,
            use_dora: false,
            bias: Bias::None,
            init_lora_weights: Value::Bool(true),
            eva_config: None,
            rank_pattern: IndexMap::new(),
            alpha_pattern: IndexMap::new(),
        }
    }
}

/// α as PEFT writes it: a whole number where it is one.
fn alpha_json(alpha: f64) -> Value {
    if alpha.fract() == 0.0 && alpha.abs() < 1e15 { json!(alpha as i64) } else { json!(alpha) }
}

impl LoraConfig {
    pub(super) fn given(method: &str, settings: &Map<String, Value>) -> Result<Self> {
        let mut settings = settings.clone();
        if let (Some(r), None) = (settings.get("r").and_then(Value::as_u64), settings.get("lora_alpha")) {
            settings.insert("lora_alpha".into(), json!(2 * r));
        }
        let config: Self = configure(method, &settings)?;
        config.checked()
    }

    /// From a file that PEFT (or we) wrote. Keys of PEFT's that ask for something else are refused while set.
    pub(super) fn from_file(config: &Map<String, Value>) -> Result<Self> {
        let mut given = config.clone();
        given.remove("eva_config");
        // EVA and MiCA leave the base as it is, so the file's tensors are all there is to know.
        if matches!(given.get("init_lora_weights").and_then(Value::as_str), Some("eva" | "mica")) {
            given.remove("init_lora_weights");
        }
        if given.get("ensure_weight_tying") == Some(&Value::Bool(true)) && !names_tied(&given) {
            given.remove("ensure_weight_tying");
        }
        if given.get("lora_alpha").is_none_or(Value::is_null) {
            given.insert("lora_alpha".into(), json!(PEFT_ALPHA));
        }
        let config: Self = from_peft_json("lora", &given, &PEFT_KEYS)?;
        if matches!(Start::parse(&config.init_lora_weights)?, Start::Pissa(Some(_))) {
            return Err(Error::Config(
                "adapter_config.json says `pissa_niter_N`: its start was random and cannot be formed again; save it in PEFT with `path_initial_model_for_weight_conversion`".into(),
            ));
        }
        config.checked()
    }

    fn checked(self) -> Result<Self> {
        for (name, rank) in [("r", self.r)].into_iter().chain(self.rank_pattern.iter().map(|(k, &r)| (k.as_str(), r))) {
            if rank == 0 || rank > MAX_RANK {
                let name: String = name.chars().take(60).collect();
                return Err(Error::Config(format!("rank `{name}` = {rank} should be between 1 and {MAX_RANK}")));
            }
        }
        if let Some(alpha) = [self.lora_alpha].iter().chain(self.alpha_pattern.values()).find(|a| !a.is_finite()) {
            return Err(Error::Config(format!("lora_alpha = {alpha} should be a finite number")));
        }
        check_dropout("lora_dropout", self.lora_dropout)?;
        let start = Start::parse(&self.init_lora_weights)?;
        match (&self.eva_config, start) {
            (Some(eva), Start::Eva) => eva.check()?,
            (Some(_), _) => return Err(Error::Config("eva_config is for init_lora_weights eva".into())),
            (None, _) => {}
        }
        if self.use_dora && start.moves_base() {
            return Err(Error::Config(format!(
                "init_lora_weights {} does not combine with DoRA: DoRA's magnitudes belong to the original base, which this start moves",
                self.init_lora_weights
            )));
        }
        if start == Start::Orthogonal && (self.r % 2 == 1 || self.rank_pattern.values().any(|r| r % 2 == 1)) {
            return Err(Error::Config("init_lora_weights orthogonal needs even ranks".into()));
        }
        Ok(self)
    }

    /// Rank of a module.
    pub fn rank(&self, module: &str) -> Result<usize> {
        Ok(pattern_value(&self.rank_pattern, module)?.unwrap_or(self.r))
    }

    /// α of a module.
    pub fn alpha(&self, module: &str) -> Result<f64> {
        Ok(pattern_value(&self.alpha_pattern, module)?.unwrap_or(self.lora_alpha))
    }

    /// What B A is multiplied by on a module.
    pub fn scaling(&self, module: &str) -> Result<f64> {
        let rank = self.rank(module)? as f64;
        let alpha = self.alpha(module)?;
        Ok(alpha / if self.use_rslora { rank.sqrt() } else { rank })
    }

    /// All of PEFT's keys in PEFT's order, for `adapter_config.json`.
    fn peft_json(&self) -> Map<String, Value> {
        let patterns: Map<String, Value> =
            self.alpha_pattern.iter().map(|(k, &v)| (k.clone(), alpha_json(v))).collect();
        let t = &self.targeting;
        let object = json!({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "auto_mapping": null, "inference_mode": true,
            "r": self.r, "lora_alpha": alpha_json(self.lora_alpha), "lora_dropout": self.lora_dropout,
            "target_modules": t.target_modules, "exclude_modules": t.exclude_modules,
            "layers_to_transform": t.layers_to_transform, "layers_pattern": t.layers_pattern,
            "modules_to_save": t.modules_to_save, "rank_pattern": self.rank_pattern, "alpha_pattern": patterns,
            "bias": self.bias, "init_lora_weights": self.init_lora_weights,
            "use_rslora": self.use_rslora, "use_dora": self.use_dora, "fan_in_fan_out": false,
        });
        let Value::Object(mut map) = object else { return Map::new() };
        if let Some(eva) = &self.eva_config {
            map.insert("eva_config".into(), json!(eva));
        }
        map
    }

    /// The configuration that describes the stored form: twice the rank where the start moved the base.
    fn stored(&self) -> Result<Self> {
        let mut config = self.clone();
        if Start::parse(&self.init_lora_weights)?.moves_base() {
            let factor = if self.use_rslora { 2f64.sqrt() } else { 2.0 };
            config.r *= 2;
            config.rank_pattern.values_mut().for_each(|r| *r *= 2);
            config.lora_alpha *= factor;
            config.alpha_pattern.values_mut().for_each(|a| *a *= factor);
        }
        config.init_lora_weights = Value::Bool(true);
        config.eva_config = None;
        Ok(config)
    }
}

/// LoRA and, with `use_dora`, DoRA.
pub(super) struct Lora {
    pub(super) config: LoraConfig,
    pub(super) name: &'static str,
    /// How it is trained.
    pub(super) training: Training,
    /// ALLoRA's factor on gradients.
    pub(super) adaptive: Option<Allora>,
}

impl Lora {
    pub(super) fn new(name: &'static str, config: LoraConfig) -> Self {
        Self { config, name, training: Training::default(), adaptive: None }
    }

    fn eva(&self) -> Option<EvaConfig> {
        let is_eva = Start::parse(&self.config.init_lora_weights).is_ok_and(|s| s == Start::Eva);
        is_eva.then(|| self.config.eva_config.clone().unwrap_or_default())
    }
}

impl Method for Lora {
    fn name(&self) -> &'static str {
        self.name
    }

    fn targeting(&self) -> &Targeting {
        &self.config.targeting
    }

    fn bias(&self) -> Bias {
        self.config.bias
    }

    fn stored_config(&self) -> Map<String, Value> {
        // The start was parsed when the configuration was checked, so `stored` cannot fail.
        self.config.stored().unwrap_or_else(|_| self.config.clone()).peft_json()
    }

    fn config(&self) -> Map<String, Value> {
        self.config.peft_json()
    }

    fn training(&self) -> Training {
        self.training.clone()
    }

    fn learning_rate(&self) -> Option<f64> {
        self.training.optimizer.as_ref()?.learning_rate()
    }

    fn calibration(&self) -> Calibration {
        self.eva().map_or(Calibration::Nothing, |eva| eva.calibration())
    }

    fn components(&self, site: &Site) -> Result<usize> {
        Ok(self.eva().map_or(0, |eva| eva.most(self.config.rank(&site.path).unwrap_or(0))))
    }

    fn allocate(&self, explained: &[(&Site, &[f64])]) -> Result<Vec<usize>> {
        let budget = explained.iter().map(|(site, _)| self.config.rank(&site.path)).sum::<Result<usize>>()?;
        Ok(eva::allocate(&explained.iter().map(|(_, shares)| *shares).collect::<Vec<_>>(), budget))
    }

    fn resolve(&mut self, targeted: &[&Site], stats: &CalibrationStats) -> Result<()> {
        match self.eva() {
            Some(eva) if !stats.is_empty() => eva.resolve(&mut self.config, targeted, stats),
            _ => Ok(()),
        }
    }

    fn attach(&self, site: &Site, base: &Projection, source: &mut ParameterSource<'_>) -> Result<Box<dyn Delta>> {
        let (rank, dtype) = (self.config.rank(&site.path)?, source.dtype());
        let start = Start::parse(&self.config.init_lora_weights)?;
        let shapes = ([rank, site.inputs], [site.outputs, rank]);
        let (a, b) = if source.is_file() {
            let none = |_: &mut ChaCha8Rng| Err(Error::Config("a file gives its tensors".into()));
            let a = source.trainable("lora_A.weight", &shapes.0, none)?;
            (a, source.trainable("lora_B.weight", &shapes.1, none)?)
        } else if let (Start::Eva, Some(eva)) = (start, self.eva()) {
            let a = eva.start(source, rank)?;
            let b = Tensor::zeros((site.outputs, rank), dtype, &Device::Cpu)?;
            (Var::from_tensor(&a.to_dtype(dtype)?.contiguous()?)?, Var::from_tensor(&b)?)
        } else {
            let mut b = None;
            let a = source.trainable("lora_A.weight", &shapes.0, |rng| {
                let (a, start_b) = start.factors(&self.config, (site, base), dtype, rng)?;
                b = Some(start_b);
                Ok(a)
            })?;
            (a, source.trainable("lora_B.weight", &shapes.1, |_| b.ok_or(Error::Config("no start".into())))?)
        };
        // A file that PEFT saved without conversion counts from the start that PEFT forms again at load.
        let origin = match (start.moves_base(), source.is_file()) {
            (false, _) => None,
            (true, false) => Some((a.copy()?.detach(), b.copy()?.detach())),
            (true, true) if source.brings_weight() => {
                return Err(Error::Refused(format!(
                    "`{}`: the file holds a weight that init_lora_weights {} has moved already; save the adapter in PEFT with `path_initial_model_for_weight_conversion`",
                    site.path, self.config.init_lora_weights
                )));
            }
            (true, true) => {
                Some(start.factors(&self.config, (site, base), dtype, &mut rand::SeedableRng::seed_from_u64(0))?)
            }
        };
        let scaling = self.config.scaling(&site.path)?;
        let dropout = Dropout::new(self.config.lora_dropout, &site.path);
        let low_rank = LoraDelta { scaling, dropout, a, b, origin, adaptive: self.adaptive.clone() };
        Ok(match self.config.use_dora {
            true => Box::new(dora::DoraDelta::new(low_rank, base, site, source)?),
            false => Box::new(low_rank),
        })
    }

    fn parameters(&self, site: &Site) -> Result<usize> {
        let magnitudes = if self.config.use_dora { site.outputs } else { 0 };
        Ok(self.config.rank(&site.path)? * (site.inputs + site.outputs) + magnitudes)
    }

    fn rows_are_independent(&self) -> bool {
        self.config.lora_dropout == 0.0
    }

    fn activations_per_row(&self, site: &Site) -> usize {
        let rank = self.config.rank(&site.path).unwrap_or_default();
        let moved = Start::parse(&self.config.init_lora_weights).is_ok_and(Start::moves_base);
        match (self.config.use_dora, moved) {
            (true, _) if self.config.lora_dropout > 0.0 => site.inputs + 6 * site.outputs + 2 * rank,
            (true, _) => rank + site.outputs,
            (false, true) => 2 * rank,
            (false, false) if self.config.lora_dropout > 0.0 => rank + site.inputs,
            (false, false) => rank,
        }
    }

    fn low_rank_alpha(&self, module: &str) -> Result<Option<f64>> {
        self.config.alpha(module).map(Some)
    }

    fn low_rank(&self, module: &str, tensors: &std::collections::BTreeMap<String, Tensor>) -> Result<Option<LowRank>> {
        let (Some(a), Some(b)) = (tensors.get("lora_A.weight"), tensors.get("lora_B.weight")) else { return Ok(None) };
        let rank = self.config.rank(module)?;
        if a.dims().len() != 2 || b.dims().len() != 2 || a.dim(0)? != rank || b.dim(1)? != rank {
            return Err(Error::Mismatch(format!(
                "`{module}`: lora_A {:?} and lora_B {:?} do not have the rank {rank} of the configuration",
                a.dims(),
                b.dims()
            )));
        }
        Ok(Some(LowRank { a: a.clone(), b: b.clone(), scaling: self.config.scaling(module)? }))
    }
}

/// A, B and their scaling on one projection.
pub(super) struct LoraDelta {
    pub(super) a: Var,
    pub(super) b: Var,
    pub(super) scaling: f64,
    pub(super) dropout: Dropout,
    /// A₀ and B₀, where the start moved the base.
    origin: Option<(Tensor, Tensor)>,
    adaptive: Option<Allora>,
}

impl LoraDelta {
    /// scaling · (x Aᵀ) Bᵀ, less the same of A₀ and B₀.
    pub(super) fn product(&self, x: &Tensor) -> TensorResult<Tensor> {
        // The scaling goes onto the low-rank factor, where it costs next to nothing.
        let part = |a: &Tensor, b: &Tensor| (x.matmul(&a.t()?)? * self.scaling)?.matmul(&b.t()?);
        match &self.origin {
            Some((a, b)) => part(&self.a, &self.b)? - part(a, b)?,
            None => part(&self.a, &self.b),
        }
    }

    /// scaling · (B A − B₀A₀), (outputs, inputs).
    pub(super) fn weight_change(&self) -> TensorResult<Tensor> {
        let mut change = self.b.matmul(&self.a)?;
        if let Some((a, b)) = &self.origin {
            change = (change - b.matmul(a)?)?;
        }
        (change * self.scaling)?.detach().copy()
    }
}

impl Delta for LoraDelta {
    fn change(&self, _base: &Projection, _rows: usize, _step: &Step) -> TensorResult<Option<Change>> {
        let (mut a, mut b) = (self.a.as_tensor().clone(), self.b.as_tensor().clone());
        if let Some((a0, b0)) = &self.origin {
            (a, b) = (Tensor::cat(&[&a, a0], 0)?, Tensor::cat(&[&b, &b0.neg()?], 1)?);
        }
        Ok(Some(Change::LowRank(LowRank { a, b, scaling: self.scaling })))
    }

    fn mask(&self, x: &Tensor, step: &Step) -> TensorResult<Option<Tensor>> {
        self.dropout.mask(x, step)
    }

    fn gradient_scale(&self) -> TensorResult<Option<Tensor>> {
        self.adaptive.as_ref().map(|adaptive| adaptive.factors(&self.b)).transpose()
    }

    fn step_scale(&self, key: &str) -> TensorResult<Option<Tensor>> {
        match &self.adaptive {
            Some(adaptive) if adaptive.post && key == "lora_B" => self.gradient_scale(),
            _ => Ok(None),
        }
    }

    fn pair_scaling(&self) -> Option<f64> {
        Some(self.scaling)
    }

    fn rows_are_independent(&self, step: &Step) -> bool {
        self.dropout.is_off(step)
    }

    fn trainable(&self) -> Vec<(&'static str, &Var)> {
        vec![("lora_A", &self.a), ("lora_B", &self.b)]
    }

    fn stored(&self) -> TensorResult<Vec<(&'static str, Tensor)>> {
        let (mut a, mut b) = (self.a.detach(), self.b.detach());
        if let Some((a0, b0)) = &self.origin {
            a = Tensor::cat(&[&a, a0], 0)?;
            b = Tensor::cat(&[&b, &b0.neg()?], 1)?;
        }
        Ok(vec![("lora_A.weight", a), ("lora_B.weight", b)])
    }

    fn has_effect(&self, _base: &Projection) -> TensorResult<bool> {
        let sum = |t: Tensor| -> TensorResult<f64> { t.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>() };
        if self.origin.is_some() {
            return Ok(sum(self.weight_change()?.abs()?)? > 0.0);
        }
        // ‖B A‖² = Σ (BᵀB)∘(A Aᵀ), against ‖B‖²‖A‖², so that rounding in an orthogonal pair is no effect.
        let (a, b) = (self.a.detach(), self.b.detach());
        let (aa, bb) = (a.matmul(&a.t()?)?, b.t()?.matmul(&b)?);
        let product = sum((aa * bb)?)?;
        Ok(product > 1e-12 * sum(a.sqr()?)? * sum(b.sqr()?)?)
    }
}
