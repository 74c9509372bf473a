//! LoRA's configuration, with PEFT's keys.

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::eva::EvaConfig;
use super::start::Start;
use crate::dropout::check_dropout;
use crate::error::{Error, Result};
use crate::method::Bias;
use crate::settings::{PeftKeys, configure, from_peft_json};
use crate::targets::{Targeting, pattern_value};

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
pub(crate) const FLAGS: &[(&str, &str)] = &[
    ("rank", "r"),
    ("alpha", "lora_alpha"),
    ("dropout", "lora_dropout"),
    ("rslora", "use_rslora"),
    ("bias", "bias"),
    ("init", "init_lora_weights"),
];

/// Whether a file's configuration is LoRA's, with `use_dora` as asked.
pub(crate) fn is_lora(config: &Map<String, Value>, dora: bool) -> bool {
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
    pub(crate) fn given(method: &str, settings: &Map<String, Value>) -> Result<Self> {
        let mut settings = settings.clone();
        if let (Some(r), None) = (settings.get("r").and_then(Value::as_u64), settings.get("lora_alpha")) {
            settings.insert("lora_alpha".into(), json!(2 * r));
        }
        let config: Self = configure(method, &settings)?;
        config.checked()
    }

    /// From a file that PEFT (or we) wrote. Keys of PEFT's that ask for something else are refused while set.
    pub(crate) fn from_file(config: &Map<String, Value>) -> Result<Self> {
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
    pub(crate) fn peft_json(&self) -> Map<String, Value> {
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
    pub(crate) fn stored(&self) -> Result<Self> {
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
