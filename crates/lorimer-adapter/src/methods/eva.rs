//! # EVA: explained variance adaptation
//!
//! Paischer et al. 2024, *One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation*, arXiv 2410.07170,
//! section 3: LoRA, `y = W x + (α/r_l) · B A x` with A (r_l, inputs), B (outputs, r_l), whose A are the first right-singular vectors of the
//! projection's inputs on the training data and whose B is zero. The ranks r_l follow from the data too: all components of all
//! projections are sorted by the share of their projection's variance that they explain, and the first Σ r of them are kept, at most
//! ρ·r a projection. A projection that gets none is dropped. α is scaled with the rank, so that α/r_l stays α/r.
//!
//! The inputs are taken batch by batch (incremental principal components: mean-free, merged by the SVD of `[Σ Vᵀ; X; mean
//! correction]`) until the components that are needed have a cosine above τ with what they were a batch ago.
//!
//! Trainable parameters of a projection: `r_l · (inputs + outputs)`.
//!
//! Meant for: LoRA where a short look at the data first (some batches, no backward) is welcome; the file is an ordinary LoRA.
//!
//! Served as LoRA. Step time is LoRA's.
//!
//! ```
//! // Two projections, budget 3: the first explains 70 % and 20 % with two directions, the second 60 % and 30 %.
//! let ranks = lorimer_adapter::methods::lora::allocate(&[&[0.7, 0.2], &[0.6, 0.3]], 3);
//! assert_eq!(ranks, [1, 2]);
//! ```

use serde_json::{Map, Value, json};

use super::entry::{Entry, Served};
use super::lora::{EvaConfig, FLAGS, Lora, LoraConfig, lora_file};
use crate::settings::split_off;

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "eva",
    title: "LoRA started in the data's directions, rank by variance",
    paper: "arXiv 2410.07170",
    kind: "start",
    variants: &[],
    peft_type: "LORA",
    mergeable: true,
    served: Served::Batched,
    lr: 5e-4,
    parts: &[],
    flags: FLAGS,
    source: include_str!("eva.rs"),
    laws: &[
        (r#"{"r": 3, "use_label_mask": false, "batch_size": 3}"#, 0.0),
        (r#"{"r": 2, "rho": 1, "whiten": true, "max_batches": 3}"#, 0.0),
    ],
    build: |settings| {
        let mut settings = settings.clone();
        settings.insert("init_lora_weights".into(), json!("eva"));
        let mut own = match settings.remove("eva_config") {
            Some(Value::Object(given)) => given,
            _ => Map::new(),
        };
        // Its own settings may stand beside LoRA's.
        own.extend(split_off::<EvaConfig>(&mut settings));
        settings.insert("eva_config".into(), Value::Object(own));
        Ok(Box::new(Lora::new("eva", LoraConfig::given("eva", &settings)?)))
    },
    // Its files are ordinary LoRAs.
    recognises: |_| false,
    from_file: lora_file,
};
