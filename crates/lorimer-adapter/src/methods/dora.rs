//! # DoRA: weight-decomposed low-rank adaptation
//!
//! Liu et al. 2024, *DoRA: Weight-Decomposed Low-Rank Adaptation*, arXiv 2402.09353, eq. 5 and section 4.3:
//! `W' = m · (W + s·B A) / ‖W + s·B A‖` with one norm and one magnitude m a row, the norm held constant in the gradient.
//!
//! Trainable parameters of a projection: `r · (inputs + outputs) + outputs`.
//!
//! The norm of a row is found without forming W + s·B A:
//! `‖Wᵢ‖² + 2s·Bᵢ·(A Wᵢᵀ) + s²·Bᵢ (A Aᵀ) Bᵢᵀ`, at the cost of one product of A with W.
//!
//! Meant for: low ranks, where its paper finds it better than LoRA (docs/comparison.md does not tell them apart), at somewhat more time (one product of A with W a step).
//!
//! ```
//! use lorimer_adapter::example::project;
//! // W = (3, 4) has the norm 5; with m = 10 and no change of direction W' = (6, 8).
//! let y = project("dora", r#"{"r": 1}"#, &[&[3., 4.]], &[("lora_magnitude_vector", &[10.])], &[1., 1.]);
//! assert!((y[0] - 14.0).abs() < 1e-9);
//! ```

use serde_json::Value;

use super::entry::{Entry, Served};
use super::lora::{Lora, LoraConfig, is_lora};
use crate::error::Result;
use crate::method::Method;

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "dora",
    title: "Weight-decomposed low-rank adaptation",
    paper: "arXiv 2402.09353",
    kind: "projection",
    variants: &[],
    peft_type: "LORA",
    mergeable: true,
    served: Served::Batched,
    lr: 2e-3,
    parts: &[],
    flags: super::lora::FLAGS,
    source: include_str!("dora.rs"),
    laws: &[(r#"{"r": 3}"#, 1e-12), (r#"{"r": 2, "target_modules": ".*self_attn.*", "bias": "lora_only"}"#, 1e-12)],
    build: |settings| {
        let mut settings = settings.clone();
        settings.insert("use_dora".into(), Value::Bool(true));
        method(LoraConfig::given("dora", &settings)?)
    },
    recognises: |config| is_lora(config, true),
    from_file: |config| method(LoraConfig::from_file(config)?),
};

fn method(config: LoraConfig) -> Result<Box<dyn Method>> {
    Ok(Box::new(Lora::new("dora", config)))
}
