//! # DiffoRA: learn which projections deserve an adapter
//!
//! Jiang et al. 2025, *DiffoRA: Enabling Parameter-Efficient Fine-Tuning via Differential Module Selection*, arXiv 2502.08905. Before the run a short search:
//! every projection (layer l, kind k) gets a gated update `y = W x + n·σ(γ_l)_k · (α/r) B A x`, σ a softmax over the n kinds of a layer, times n so that equal
//! gates are 1. Steps alternate: A and B on one half of the rows, γ on the other (first-order, as in differentiable architecture search). During the
//! search projections of one kind share A and B, which makes it cheap and steady. Then each layer keeps the ⌈ρ·n⌉ kinds of the largest γ, and
//! an ordinary LoRA is trained afresh on those, its rank raised so that the budget is that of rank r everywhere.
//!
//! Settings: `rho` (ρ), `search_steps`, `search_r`, `search_lr`, `gamma_lr`, `gate` (`softmax`, `sigmoid`), `sharing` (`kind`; `group`: within groups of
//! `group_layers` neighbouring layers; `none`). The paper leaves normalisation and sharing pattern open to reading; both are settings here.
//!
//! How well it finds what is there is tested on planted teachers of a tiny model, with these defaults and with a longer search, against what chance
//! finds (`the_search_finds_planted_projections`; numbers in docs/comparison.md). Longer searches find more.
//!
//! Trainable parameters of a projection: `r' · (inputs + outputs)` where it is chosen.
//!
//! Good for: a fixed budget that is better spent on some projections. The search costs `search_steps` steps twice, whatever the run's length; after it the step time is
//! less than LoRA's. The file is an ordinary LoRA with full names in `target_modules`; γ stands in `lorimer.json`.
//!
//! ```
//! use lorimer_adapter::methods::diffora::choose;
//! // Two layers of three kinds, half of each: the ⌈1.5⌉ = 2 largest.
//! assert_eq!(choose(&[&[0.1, 0.9, 0.5], &[2.0, 1.0, 1.5]], 0.5), [vec![1, 2], vec![0, 2]]);
//! ```

use std::collections::BTreeMap;

use candle_core::DType;
use lorimer_model::{Projection, Site};
use serde_json::{Map, Value, json};

use super::entry::{Entry, Served};
use super::lora::{FLAGS, Lora, LoraConfig, lora_file};
use crate::error::{Error, Result};
use crate::file::keys::FileKeys;
use crate::method::{Bias, Calibration, CalibrationStats, Delta, Method, ParameterSource};
use crate::search::DifforaConfig;
use crate::settings::{configure, split_off};
use crate::targets::{Names, Targeting};

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "diffora",
    title: "LoRA on the projections that a search chose",
    paper: "arXiv 2502.08905",
    kind: "control",
    variants: &[],
    peft_type: "LORA",
    mergeable: true,
    served: Served::Batched,
    lr: 2e-3,
    flags: FLAGS,
    source: concat!(include_str!("diffora.rs"), include_str!("../search.rs")),
    laws: &[
        (r#"{"r": 2, "search_steps": 4}"#, 0.0),
        (r#"{"r": 2, "search_steps": 3, "gate": "sigmoid", "sharing": "none", "rho": 0.3}"#, 0.0),
    ],
    build: |settings| {
        let mut settings = settings.clone();
        let own: DifforaConfig = configure("diffora", &split_off::<DifforaConfig>(&mut settings))?;
        own.check()?;
        let lora = LoraConfig::given("diffora", &settings)?;
        if !lora.rank_pattern.is_empty() || !lora.alpha_pattern.is_empty() {
            return Err(Error::Config(
                "`diffora` gives ranks itself: rank_pattern and alpha_pattern have no place".into(),
            ));
        }
        Ok(Box::new(Diffora { given: lora.clone(), lora: Lora::new("diffora", lora), own, gammas: BTreeMap::new() }))
    },
    // Its files are ordinary LoRAs.
    recognises: |_| false,
    from_file: lora_file,
};

impl DifforaConfig {
    fn check(&self) -> Result<()> {
        let fail = |text: &str| Err(Error::Config(text.into()));
        if !(self.rho > 0.0 && self.rho <= 1.0) {
            return fail("rho should be above 0 and at most 1");
        }
        if !(self.search_lr > 0.0 && self.gamma_lr > 0.0 && self.search_lr.is_finite() && self.gamma_lr.is_finite()) {
            return fail("search_lr and gamma_lr should be above 0");
        }
        let counts = [self.search_steps, self.search_r, self.search_batch_size, self.group_layers];
        if counts.iter().any(|c| *c == 0 || *c > 1 << 16) {
            return fail("search_steps, search_r, search_batch_size and group_layers should be between 1 and 65536");
        }
        Ok(())
    }
}

/// For each layer the places of the ⌈ρ·n⌉ largest of its n numbers, rising; of equal ones the first.
pub fn choose(gammas: &[&[f64]], rho: f64) -> Vec<Vec<usize>> {
    let of = |layer: &&[f64]| {
        let mut order: Vec<usize> = (0..layer.len()).collect();
        order.sort_by(|&a, &b| layer[b].total_cmp(&layer[a]));
        order.truncate((rho * layer.len() as f64).ceil() as usize);
        order.sort_unstable();
        order
    };
    gammas.iter().map(of).collect()
}

struct Diffora {
    /// LoRA as it was asked for.
    given: LoraConfig,
    /// LoRA on what was chosen.
    lora: Lora,
    own: DifforaConfig,
    gammas: BTreeMap<String, f64>,
}

impl Method for Diffora {
    fn name(&self) -> &'static str {
        "diffora"
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
        let mut config = Lora::new("diffora", self.given.clone()).config();
        if let Ok(Value::Object(own)) = serde_json::to_value(&self.own) {
            config.extend(own);
        }
        config
    }

    fn calibration(&self) -> Calibration {
        Calibration::Search(self.own.clone())
    }

    fn calibration_report(&self) -> Value {
        json!({ "gamma": self.gammas })
    }

    fn resolve(&mut self, targeted: &[&Site], stats: &CalibrationStats) -> Result<()> {
        if stats.is_empty() {
            return Ok(());
        }
        let mut layers: BTreeMap<Option<usize>, Vec<(&Site, f64)>> = BTreeMap::new();
        for site in targeted {
            let gamma = stats.get(&site.path).and_then(|f| f.get("gamma"));
            let gamma =
                gamma.ok_or_else(|| Error::Config(format!("the search found nothing about `{}`", site.path)))?;
            let gamma = gamma.to_dtype(DType::F64)?.flatten_all()?.get(0)?.to_scalar::<f64>()?;
            self.gammas.insert(site.path.clone(), gamma);
            layers.entry(site.layer).or_default().push((site, gamma));
        }
        let numbers: Vec<Vec<f64>> = layers.values().map(|l| l.iter().map(|(_, g)| *g).collect()).collect();
        let chosen = choose(&numbers.iter().map(Vec::as_slice).collect::<Vec<_>>(), self.own.rho);
        let kept = layers.values().zip(&chosen).flat_map(|(sites, places)| places.iter().map(|&i| sites[i].0));
        let kept: Vec<&Site> = kept.collect();
        let size = |sites: &[&Site]| sites.iter().map(|s| s.inputs + s.outputs).sum::<usize>().max(1) as f64;
        let config = &mut self.lora.config;
        let raised = ((self.given.r as f64 * size(targeted) / size(&kept)).round() as usize).max(1);
        let share = raised as f64 / self.given.r as f64;
        config.lora_alpha = self.given.lora_alpha * if config.use_rslora { share.sqrt() } else { share };
        config.r = raised;
        config.targeting.target_modules = Names::List(kept.iter().map(|site| site.path.clone()).collect());
        (config.targeting.exclude_modules, config.targeting.layers_to_transform) = (None, None);
        Ok(())
    }

    fn file_keys(&self) -> FileKeys {
        self.lora.file_keys()
    }

    fn attach(&self, site: &Site, base: &Projection, source: &mut ParameterSource<'_>) -> Result<Box<dyn Delta>> {
        self.lora.attach(site, base, source)
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
