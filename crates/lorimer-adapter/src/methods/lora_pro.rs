//! # LoRA-Pro: gradients of A and B whose step is nearest the full gradient
//!
//! Wang et al. 2025, *LoRA-Pro: Are Low-Rank Adapters Properly Optimized?*, ICLR, arXiv 2407.18242, theorems 2.2 and 2.3. For `W' = W + s·B A`
//! with A (r, inputs), B (outputs, r) and plain gradients g_A = s·BᵀG, g_B = s·G Aᵀ of the full gradient G (which is never formed), a step moves
//! W' along `g̃ = s·B ĝ_A + s·ĝ_B A`. ‖g̃ − G‖ is least for
//! `ĝ_A = s⁻²(BᵀB)⁻¹ g_A + X A`, `ĝ_B = s⁻²(I − B(BᵀB)⁻¹Bᵀ) g_B (A Aᵀ)⁻¹ − B X`, whatever X (r, r) is; the X that keeps ĝ nearest g solves
//! `BᵀB X + X A Aᵀ = −s⁻²(BᵀB)⁻¹ g_A Aᵀ`. While B = 0: `ĝ_A = g_A`, `ĝ_B = s⁻² g_B (A Aᵀ)⁻¹`.
//!
//! Variants: `light` (AdamW on ĝ) and `full` (AdamW's moments of g̃ itself, (outputs, inputs) each; what they give is projected back to A and
//! B by the same formulas, and A and B take a plain step along it). `full` is what the authors' repository runs, with SGD at 2e-5, its default here;
//! `light` takes LoRA's rates. δ = 1e-8 stands on the diagonals of both matrices that are inverted, as there: it holds steps back while B is small.
//! Beside the repository: the scaling is the adapter's own where it writes 16/8; moments are corrected for their bias from the first step on, where
//! it counts from 2 (its first steps are 0.74, 0.79, … of these); gradients are clipped before the moments, where it clips the step.
//!
//! Trainable parameters of a projection: `r · (inputs + outputs)`.
//!
//! Good for: coming closer to full fine-tuning at LoRA's file size. `light` costs r × r work only; `full` two moments of every target
//! weight. The file is an ordinary LoRA.
//!
//! ```
//! use lorimer_adapter::{Method, methods};
//! // It is LoRA with another optimizer.
//! let settings = serde_json::from_str(r#"{"r": 4, "variant": "full"}"#).unwrap();
//! let training = methods::build("lora-pro", &settings).unwrap().training();
//! assert_eq!(training.optimizer.unwrap().name(), "lora-pro-full");
//! ```

use serde_json::Value;

use super::entry::{Entry, Served};
use super::lora::{FLAGS, Lora, LoraConfig, lora_file};
use crate::error::Error;
use crate::method::Method;
use crate::settings::split_off;
use crate::training::{LoraPro, OptimizerKind, Training};

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "lora-pro",
    title: "LoRA whose step is nearest full fine-tuning's",
    paper: "arXiv 2407.18242",
    kind: "optimizer",
    variants: &["light", "full"],
    peft_type: "LORA",
    mergeable: true,
    served: Served::Batched,
    lr: 1e-3,
    flags: FLAGS,
    source: include_str!("lora_pro.rs"),
    laws: &[(r#"{"r": 3}"#, 0.0), (r#"{"r": 3, "variant": "full"}"#, 0.0)],
    build: |settings| {
        let mut settings = settings.clone();
        let mut own = split_off::<LoraPro>(&mut settings);
        match settings.remove("variant").as_ref().map(|v| v.as_str().unwrap_or_default()) {
            None => {}
            Some("light") => drop(own.insert("full".into(), Value::Bool(false))),
            Some("full") => drop(own.insert("full".into(), Value::Bool(true))),
            Some(_) => return Err(Error::Config("variant of lora-pro should be light or full".into())),
        }
        let optimizer = Some(OptimizerKind::LoraPro(LoraPro::given(&own)?));
        let mut lora = Lora::new("lora-pro", LoraConfig::given("lora-pro", &settings)?);
        lora.training = Training { optimizer, ..Default::default() };
        Ok(Box::new(lora) as Box<dyn Method>)
    },
    // Its files are ordinary LoRAs.
    recognises: |_| false,
    from_file: lora_file,
};
