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
//! Meant for: everything, as the first thing to try.
//!
//! ```
//! use lorimer_adapter::example::project;
//! // r = 1, α = 2: ΔW = 2 · (1, 3)ᵀ (1, 1), so for x = (1, 2): 2 · 3 · (1, 3).
//! let parameters: &[(&str, &[f64])] = &[("lora_A", &[1., 1.]), ("lora_B", &[1., 3.])];
//! let y = project("lora", r#"{"r": 1, "lora_alpha": 2}"#, &[&[0., 0.], &[0., 0.]], parameters, &[1., 2.]);
//! assert_eq!(y, [6.0, 18.0]);
//! ```

mod config;
mod delta;
mod dora;
mod eva;
mod factors;
mod method;
mod ranks;
mod start;

use super::entry::{Entry, Served};
pub use crate::row_rate::{Allora, RowNorm};

pub use config::LoraConfig;
pub(crate) use config::{FLAGS, is_lora};
pub use eva::EvaConfig;
pub(crate) use method::{Lora, lora_file};
pub use ranks::allocate;
pub(crate) use start::Start;

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
    parts: &[],
    flags: FLAGS,
    source: concat!(include_str!("lora.rs"), include_str!("lora/config.rs")),
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
