//! # GaLore: full-parameter training with the optimiser's state in a low-rank space
//!
//! Zhao et al. 2024, *GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection*, ICML, arXiv 2403.03507, algorithm 2. The
//! targeted weights are trained whole (see `full`). For a gradient G (m, n), every T steps: P is the first r right singular
//! vectors (r, n) where m ≥ n and `R = G Pᵀ` (m, r), else the first r left ones (m, r) and `R = PᵀG` (r, n). AdamW's moments are those of R; what
//! they give, N, goes back: `W ← W − lr · α · N P` (or P N), with decoupled weight decay on W. Moments stay when P changes, as in the reference.
//!
//! Settings: `rank` (r), `update_proj_gap` (T), `scale` (α), `proj_type` (`std`, `reverse_std`, `left`, `right`, `full`), `bits` (8: block-wise
//! 8-bit moments), `per_layer` (each layer is stepped as soon as its gradient exists and the gradient dropped, with layers computed
//! again in the backward; the limit on the gradient's norm then uses the last step's norm), `randomized` (subspace iteration from the last P
//! in place of an exact decomposition). Embeddings and norms (`modules_to_save`) get plain AdamW.
//!
//! Trainable parameters of a projection: `inputs · outputs`. State: `2·r·max(m, n) + r·min(m, n)` numbers in place of `2·m·n`.
//!
//! Good for: pre-training and full fine-tuning in the memory of LoRA. Step time as `full`, and a decomposition of every weight's gradient
//! every T steps (its share is printed).
//!
//! ```
//! use lorimer_adapter::methods;
//! let settings = serde_json::from_str(r#"{"rank": 4, "bits": 8}"#).unwrap();
//! assert_eq!(methods::build("galore", &settings).unwrap().training().optimizer.unwrap().name(), "galore-8bit");
//! ```

use super::entry::{Entry, Served};
use super::full::{self, Full};
use crate::method::Method;
use crate::settings::{configure, split_off};
use crate::training::{Galore, OptimizerKind, Training};

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "galore",
    title: "Full training, moments in a low-rank space",
    paper: "arXiv 2403.03507",
    kind: "optimizer",
    variants: &[],
    peft_type: "FULL",
    mergeable: true,
    served: Served::Converted,
    lr: 2e-3,
    flags: &[("rank", "rank"), ("bias", "bias")],
    source: include_str!("galore.rs"),
    laws: &[(r#"{"rank": 4}"#, 1e-12), (r#"{"rank": 4, "proj_type": "full", "update_proj_gap": 10}"#, 1e-12)],
    build: |settings| {
        let mut settings = settings.clone();
        let own = split_off::<Galore>(&mut settings);
        let optimizer = Some(OptimizerKind::Galore(Galore::given(&own)?));
        let training = Training { optimizer, ..Default::default() };
        Ok(Box::new(Full { config: configure("galore", &settings)?, name: "galore", training }) as Box<dyn Method>)
    },
    // Its files are those of full fine-tuning.
    recognises: |_| false,
    from_file: full::ENTRY.from_file,
};
