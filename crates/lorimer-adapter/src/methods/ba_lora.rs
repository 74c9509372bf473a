//! # BA-LoRA: three regularisers against what the base inherited
//!
//! Chang et al. 2024, *BA-LoRA: Bias-Alleviating Low-Rank Adaptation to Mitigate Catastrophic Inheritance in Large Language Models*,
//! arXiv 2408.04556: PiSSA's start (the r largest singular directions of W in B A, the rest frozen), and
//! `L = L_task + λ₁ L_CR + λ₂ L_DR + λ₃ L_SVDR` over logits Z (n, c) of the adapted and Z₀ of the frozen base at the supervised positions:
//!
//! - `nlg`: `L_CR = KL(softmax Z₀ ‖ softmax Z)` summed over the positions of a row and averaged over rows, `L_DR` = −(mean entropy of softmax Z);
//! - `nlu`: `L_CR` = mean squared difference of the numbers of ℓ2-normalised logits, `L_DR` = Σ of squared off-diagonal covariances of Z's columns,
//!   over c;
//! - both: `L_SVDR = −Σ_{i≤k} σ_i(Z) / Σ_i σ_i(Z)`.
//!
//! These are the normalisations of the authors' first code (cyp-jlu-ai/BA-LoRA), whose λ are the defaults. `version=2` is their second
//! (llm172/BA-LoRA): `L_CR` = T² KL(softmax Z₀/T ‖ softmax Z/T), a mean over positions, T = 2; the entropy of the 20 likeliest tokens among themselves;
//! `L_SVDR = −Σ_{i≤k} σ_i / ‖Z‖_F`; λ₁ falls along half a cosine to a tenth; λ₂ and λ₃ are zero for a fifth of the run and rise over the next
//! twentieth.
//!
//! All supervised positions take part. They are gone through in blocks of 1,024, so that no more logits are in memory at a time; singular values
//! and covariances are those of the blocks, averaged by their length.
//!
//! Singular values come from the n × n Gram matrix, and covariances too, so that nothing of size c × c is formed.
//!
//! Trainable parameters of a projection: `r · (inputs + outputs)`. The objective goes with any method (`--objective ba-lora`).
//!
//! Good for: training on noisy or unbalanced rows, where the base's behaviour elsewhere is to survive. A step costs a forward of the frozen
//! base more: about 4/3 of LoRA's. The file is the LoRA of rank 2r that PiSSA's conversion gives.
//!
//! ```
//! use lorimer_adapter::methods;
//! let settings = serde_json::from_str(r#"{"r": 4, "lambda2": 0.0}"#).unwrap();
//! let method = methods::build("ba-lora", &settings).unwrap();
//! assert!(method.training().objective.is_some());
//! assert_eq!(method.config()["init_lora_weights"], "pissa");
//! ```

use serde_json::json;

use super::entry::{Entry, Served};
use super::lora::{FLAGS, Lora, LoraConfig, lora_file};
use crate::method::Method;
use crate::settings::split_off;
use crate::training::{BaLora, Objective, Training};

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "ba-lora",
    title: "PiSSA with three regularisers",
    paper: "arXiv 2408.04556",
    kind: "objective",
    variants: &["nlg", "nlu"],
    peft_type: "LORA",
    mergeable: true,
    served: Served::Batched,
    lr: 2e-4,
    flags: FLAGS,
    source: include_str!("ba_lora.rs"),
    laws: &[(r#"{"r": 3}"#, 1e-12), (r#"{"r": 3, "task": "nlu", "init_lora_weights": true}"#, 0.0)],
    build: |settings| {
        let mut settings = settings.clone();
        let mut own = split_off::<BaLora>(&mut settings);
        if let Some(variant) = settings.remove("variant") {
            own.insert("task".into(), variant);
        }
        settings.entry("init_lora_weights").or_insert(json!("pissa"));
        let objective = Some(Objective::BaLora(BaLora::given(&own)?));
        let mut lora = Lora::new("ba-lora", LoraConfig::given("ba-lora", &settings)?);
        lora.training = Training { objective, ..Default::default() };
        Ok(Box::new(lora) as Box<dyn Method>)
    },
    // Its files are ordinary LoRAs.
    recognises: |_| false,
    from_file: lora_file,
};
