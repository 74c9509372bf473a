//! # X-LoRA: frozen LoRAs mixed by the token, from the model's own hidden state
//!
//! Buehler and Buehler 2024, *X-LoRA: Mixture of Low-Rank Adapter Experts*, arXiv 2402.07148. Experts i = 1…n are trained LoRAs of one base with
//! scalings sᵢ; they stay as they are, and only a small head is trained. A forward takes two passes. The first is the bare base (or every expert
//! at the weight `scaling_pass_value`) and gives H (tokens, hidden), the hidden states after the final norm. The head makes logits of them, and
//! these a weight λ for each token t, projection l and expert i: `λ = softmax(logits / softmax_temperature)`, or the logits themselves without
//! `enable_softmax`. The second pass is `y = W x + w · Σᵢ sᵢ Bᵢ Aᵢ (λ_{t,l,i} x)` with w = `global_scaling_weight`. No gradient goes through H.
//!
//! Settings, with PEFT's names: `layerwise_scalings` (λ for each projection, else one for all), `xlora_depth`, `xlora_size`, `xlora_dropout_p` (the
//! head: linear layers with ReLU and dropout between), `top_k_lora` (only the k largest λ count, as they are), `enable_softmax_topk` (a softmax
//! over these), `softmax_temperature`, `scaling_pass_value`, `global_scaling_weight`. `init`: `zero` (the head's last layer is zero: every expert
//! begins at 1/n; with `top_k_lora` the first k count until λ differ) or `peft` (as torch begins a linear layer, which on real models is far from
//! uniform). `bias_only`: a control, one λ for all tokens. Experts' own dropout is off.
//!
//! Experts are named by `--adapter`, in the order of λ: `lorimer train --method xlora --adapter a/ --adapter b/ --set layerwise_scalings=true`. They must
//! be plain LoRAs; a projection that an expert lacks is left out for it, and its λ goes to nobody. The file is PEFT's: the head's tensors, and the
//! way to each expert, or its name on the hub, which is looked up in the hub's cache. `lorimer.json` has each expert's content id and the projections' order, and another expert at the same place is refused.
//! PEFT 0.20 and 0.21 leave layers of the head out when they save it; such a file is refused. The authors' folders (`xlora_config.json`) are read.
//!
//! λ depends on the token, so no fixed weight gives the same, and it cannot be merged. `lorimer convert MIXTURE --to lora --gates mean --data rows.jsonl`
//! writes a static mixture: the experts' factors one after another with fixed λ (its means over the rows, projection by projection; `uniform`; or numbers), an
//! ordinary LoRA of rank Σrᵢ, and tells the loss of both on the rows. `lorimer inspect MIXTURE --text "…"` shows λ. It is decoded with two caches of keys and
//! values, one a pass; since λ of a token depends on the tokens before it only, that is exact.
//!
//! Trainable parameters: depth 1 `(hidden + 1) · m`; else `(hidden + 1) z + (depth − 2)(z + 1) z + (z + 1) m`, with z = `xlora_size` and m = n, or n times
//! the number of projections.
//!
//! Meant for: several LoRAs of one base and requests that need more than one of them. A step takes about 1.5 times LoRA's, a token twice.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use lorimer_adapter::methods::xlora::Gating;
//! // Three experts of which two count: λ = softmax(ln 4, 0, ln 5) = (0.4, 0.1, 0.5), and the second is left out.
//! let gating = Gating { softmax: true, temperature: 1.0, top_k: Some(2), softmax_top_k: false };
//! let logits = Tensor::new(&[[4f64.ln(), 0.0, 5f64.ln()]], &Device::Cpu)?;
//! let gates = gating.kept(&gating.scalings(&logits)?)?.to_vec2::<f64>()?;
//! assert!((gates[0][0] - 0.4).abs() < 1e-12 && gates[0][1] == 0.0 && (gates[0][2] - 0.5).abs() < 1e-12);
//! # Ok::<(), candle_core::Error>(())
//! ```

mod config;
mod experts;
mod gating;
mod head;

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{Result as TensorResult, Tensor};
use lorimer_model::{ModelShape, Projection, Site};
use serde_json::{Map, Value, json};

pub use self::config::{Init, XloraConfig};
use self::experts::{Expert, Joined, join};
pub use self::gating::Gating;
use self::head::{Head, shapes};
use super::entry::{Entry, Served};
use crate::delta::{Change, Delta, GatedLowRank, LowRank};
use crate::dropout::check_dropout;
use crate::error::{Error, Result};
use crate::file::keys::FileKeys;
use crate::file::mixture::{HEAD, MAX_DEPTH, is_mixture};
use crate::method::{CalibrationStats, Method, ParameterSource};
use crate::parameter::Parameter;
use crate::part::Part;
use crate::router::Router;
use crate::settings::{PeftKeys, configure, from_peft_json, peft_json};
use crate::step::Step;
use crate::targets::{Names, Targeting};

/// Widest layer within the head.
const MAX_SIZE: usize = 1 << 16;

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "xlora",
    title: "Frozen LoRAs mixed by the token, from the hidden state",
    paper: "arXiv 2402.07148",
    kind: "projection",
    variants: &[],
    peft_type: "XLORA",
    mergeable: false,
    served: Served::Batched,
    lr: 5e-4,
    parts: &[],
    flags: &[("dropout", "xlora_dropout_p"), ("init", "init")],
    source: concat!(include_str!("xlora.rs"), include_str!("xlora/config.rs")),
    // They need experts: see tests/xlora.rs.
    laws: &[],
    build: |settings| {
        if settings.contains_key("adapters") {
            return Err(Error::Config("the experts of `xlora` are named by --adapter, in their order".into()));
        }
        Xlora::checked(configure("xlora", settings)?)
    },
    recognises: is_mixture,
    from_file: |config| {
        let mut config = config.clone();
        config.shift_remove("adapters");
        let mut found: XloraConfig = from_peft_json("xlora", &config, &PeftKeys::NONE)?;
        found.init = Init::Zero;
        Xlora::checked(found)
    },
};

/// X-LoRA: its settings, and its experts once they are known.
struct Xlora {
    config: XloraConfig,
    targeting: Targeting,
    parts: Vec<Part>,
    experts: Vec<Expert>,
    /// Hidden width and projections of the base that it is for.
    hidden: usize,
    sites: Vec<String>,
    /// The head's tensors of a file.
    head: BTreeMap<String, Tensor>,
}

impl Xlora {
    fn checked(config: XloraConfig) -> Result<Box<dyn Method>> {
        let fail = |text: String| Err(Error::Config(text));
        if config.use_trainable_adapters {
            return fail("use_trainable_adapters trains the experts too, whose files then are not those that it names; only the head is trained here".into());
        }
        if config.xlora_depth == 0 || config.xlora_depth > MAX_DEPTH {
            return fail(format!("xlora_depth = {} should be between 1 and {MAX_DEPTH}", config.xlora_depth));
        }
        if config.xlora_size == 0 || config.xlora_size > MAX_SIZE {
            return fail(format!("xlora_size = {} should be between 1 and {MAX_SIZE}", config.xlora_size));
        }
        check_dropout("xlora_dropout_p", config.xlora_dropout_p)?;
        if !(config.softmax_temperature.is_finite() && config.softmax_temperature > 0.0) {
            return fail(format!("softmax_temperature = {} should be above 0", config.softmax_temperature));
        }
        if !config.scaling_pass_value.is_finite() || !config.global_scaling_weight.is_finite() {
            return fail("scaling_pass_value and global_scaling_weight should be finite numbers".into());
        }
        if config.top_k_lora == Some(0) {
            return fail("top_k_lora = 0 should be at least 1".into());
        }
        let (targeting, parts, experts) = Default::default();
        let (hidden, sites, head) = Default::default();
        Ok(Box::new(Self { config, targeting, parts, experts, hidden, sites, head }))
    }

    /// What PEFT reads of the configuration, with the experts as given.
    fn peft(&self, expert: impl Fn(&Part) -> String) -> Map<String, Value> {
        let mut all = peft_json("XLORA", &self.config);
        for own in ["init", "bias_only"] {
            all.shift_remove(own);
        }
        let adapters = self.parts.iter().enumerate().map(|(i, part)| (i.to_string(), json!(expert(part))));
        all.insert("adapters".into(), adapters.collect::<Map<_, _>>().into());
        if self.hidden > 0 {
            all.insert("hidden_size".into(), self.hidden.into());
        }
        all
    }
}

impl Method for Xlora {
    fn file_keys(&self) -> FileKeys {
        FileKeys { adapter: &[HEAD], ..FileKeys::default() }
    }

    fn name(&self) -> &'static str {
        "xlora"
    }

    fn targeting(&self) -> &Targeting {
        &self.targeting
    }

    fn stored_config(&self) -> Map<String, Value> {
        self.peft(|part| part.path.display().to_string())
    }

    fn config(&self) -> Map<String, Value> {
        let mut all = self.peft(|part| part.content_id.clone());
        all.insert("init".into(), json!(self.config.init));
        all.insert("bias_only".into(), json!(self.config.bias_only));
        all
    }

    fn mixes(&self) -> bool {
        true
    }

    fn take_parts(&mut self, parts: &[Part]) -> Result<()> {
        let (n, config) = (parts.len(), &self.config);
        if n == 0 {
            return Err(Error::Config("`xlora` mixes trained LoRAs; name at least one with --adapter".into()));
        }
        if let Some(k) = config.top_k_lora.filter(|&k| k > n) {
            return Err(Error::Config(format!("top_k_lora = {k} should be at most the number of experts, {n}")));
        }
        if config.top_k_lora.is_some_and(|k| k < n) && config.scaling_pass_value != 0.0 {
            return Err(Error::Config(
                "scaling_pass_value gives all experts the same weight, among which top_k_lora cannot choose; set one of them only".into(),
            ));
        }
        self.experts = parts.iter().enumerate().map(|(i, part)| Expert::of(i, part)).collect::<Result<_>>()?;
        let modules: BTreeSet<&String> = self.experts.iter().flat_map(Expert::modules).collect();
        let list = modules.into_iter().cloned().collect();
        self.targeting = Targeting { target_modules: Names::List(list), ..Targeting::default() };
        self.parts = parts.to_vec();
        Ok(())
    }

    fn parts(&self) -> &[Part] {
        &self.parts
    }

    fn bind(&mut self, shape: &ModelShape, sites: &[&Site]) -> Result<()> {
        if self.experts.is_empty() {
            return self.take_parts(&[]);
        }
        if let Some(own) = self.config.hidden_size.filter(|&own| own != shape.hidden) {
            return Err(Error::Mismatch(format!(
                "hidden_size = {own}, the base's hidden states are {} wide",
                shape.hidden
            )));
        }
        self.experts.iter().try_for_each(|expert| expert.check(shape, sites))?;
        self.hidden = shape.hidden;
        Ok(())
    }

    fn resolve(&mut self, targeted: &[&Site], _stats: &CalibrationStats) -> Result<()> {
        self.sites = targeted.iter().map(|site| site.path.clone()).collect();
        Ok(())
    }

    fn take_shared(&mut self, name: &str, tensor: &Tensor) -> bool {
        let own = name.starts_with(HEAD);
        if own {
            self.head.insert(name.to_string(), tensor.clone());
        }
        own
    }

    fn router(&self, source: &mut ParameterSource<'_>) -> Result<Option<Box<dyn Router>>> {
        let of = (self.hidden, self.sites.as_slice(), self.experts.len());
        Ok(Some(Box::new(Head::new(&self.config, of, &self.head, source)?)))
    }

    fn router_parameters(&self, hidden: usize, sites: usize) -> Option<usize> {
        let layers = shapes(&self.config, hidden, sites, self.experts.len());
        Some(match (self.config.bias_only, layers.last()) {
            (true, Some((outputs, _))) => *outputs,
            _ => layers.into_iter().map(|(outputs, inputs)| outputs * (inputs + 1)).sum(),
        })
    }

    fn attach(&self, site: &Site, _base: &Projection, source: &mut ParameterSource<'_>) -> Result<Box<dyn Delta>> {
        let joined = join(&self.experts, &site.path, self.config.global_scaling_weight, source.dtype())?;
        Ok(Box::new(XloraDelta(joined)))
    }

    fn parameters(&self, _site: &Site) -> Result<usize> {
        Ok(0)
    }

    fn rows_are_independent(&self) -> bool {
        self.config.xlora_dropout_p == 0.0 || self.config.xlora_depth == 1
    }

    fn not_additive(&self) -> Option<&'static str> {
        Some("its weights are made for its own experts, in two passes over the rows")
    }

    fn activations_per_row(&self, site: &Site) -> usize {
        let ranks: usize = self.experts.iter().map(|expert| expert.rank(&site.path)).sum();
        // u, its gates and their product, λ and what softmax keeps of it, and the change.
        4 * ranks + 6 * self.experts.len() + site.outputs
    }

    fn activations_fixed(&self, site: &Site) -> usize {
        let ranks: usize = self.experts.iter().map(|expert| expert.rank(&site.path)).sum();
        ranks * (site.inputs + site.outputs + self.experts.len())
    }
}

/// The experts of one projection.
struct XloraDelta(Joined);

impl Delta for XloraDelta {
    fn change(&self, _base: &Projection, _rows: usize, _step: &Step) -> TensorResult<Change> {
        let factors = LowRank { a: self.0.a.clone(), b: self.0.b.clone(), scaling: 1.0 };
        Ok(Change::Gated(GatedLowRank { factors, input_gradient: true }))
    }

    fn route_gates(&self, route: &Tensor) -> TensorResult<Tensor> {
        route.matmul(&self.0.spread)
    }

    fn parameters(&self) -> Vec<Parameter<'_>> {
        Vec::new()
    }

    fn has_effect(&self, _base: &Projection) -> TensorResult<bool> {
        Ok(crate::delta::largest(&self.0.b)? > 0.0)
    }
}
