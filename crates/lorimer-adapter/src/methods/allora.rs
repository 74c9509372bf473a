//! # ALLoRA: LoRA with an adaptive rate
//!
//! Huang and Balestriero 2024, *ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws*, arXiv 2410.09692: `y = W x + B A x` without
//! dropout and without α/r. In the backward, the gradient that reaches row i of the change's output is multiplied by
//! `c_i = 1 / √(‖B_i‖₂ + 1/η²)`, B_i (r) the i-th row of B (outputs, r): a row at zero learns η times as fast, one that has grown learns less.
//! c is computed anew each step, without gradient.
//!
//! Whether the norm under the root is squared in the final version is not certain: `norm` is `l2` (default) or `l2_squared`. AdamW divides
//! out what is constant in a parameter's gradients, and at B = 0 every c is η; with `post` (default) AdamW's step of
//! row i of B is multiplied by c_i too, which is what makes B leave zero quickly.
//!
//! Trainable parameters of a projection: `r · (inputs + outputs)`.
//!
//! Meant for: short runs, in place of tuning α and dropout; η² is the one number. Step time is LoRA's, and so is the file (`lora_alpha` = r).
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use lorimer_adapter::methods::lora::Allora;
//! // η² = 4: a row at zero gets η = 2; a row of norm 15/4 gets 1/√(15/4 + 1/4) = 1/2.
//! let b = Tensor::new(&[[0f64, 0.], [2.25, 3.]], &Device::Cpu).unwrap();
//! let c = Allora { eta2: 4.0, ..Default::default() }.factors(&b).unwrap();
//! assert_eq!(c.to_vec1::<f64>().unwrap(), [2.0, 0.5]);
//! ```

use std::sync::Arc;

use candle_core::{DType, Var};
use serde_json::json;

use super::entry::{Entry, Served};
use super::lora::{Allora, Lora, LoraConfig, lora_file};
use crate::error::{Error, Result};
use crate::method::Method;
use crate::parameter::{Named, Role};
use crate::settings::{configure, split_off};
use crate::training::{Callback, CallbackKind, RunShape};

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "allora",
    title: "LoRA with a rate that falls as a row grows",
    paper: "arXiv 2410.09692",
    kind: "optimizer",
    variants: &[],
    peft_type: "LORA",
    mergeable: true,
    served: Served::Batched,
    lr: 1e-3,
    parts: &[],
    flags: &[("rank", "r"), ("bias", "bias")],
    source: include_str!("allora.rs"),
    laws: &[(r#"{"r": 3}"#, 0.0), (r#"{"r": 2, "eta2": 8, "norm": "l2_squared", "post": false}"#, 0.0)],
    build: |settings| {
        let mut settings = settings.clone();
        let own: Allora = configure("allora", &split_off::<Allora>(&mut settings))?;
        own.check()?;
        let r = settings.get("r").cloned().unwrap_or(json!(8));
        for key in ["lora_alpha", "lora_dropout", "use_rslora", "use_dora"] {
            if settings.contains_key(key) {
                return Err(Error::Config(format!("`allora` has no {key}: eta2 takes its place")));
            }
        }
        settings.insert("lora_alpha".into(), r);
        let mut lora = Lora::new("allora", LoraConfig::given("allora", &settings)?);
        if !lora.config.rank_pattern.is_empty() || lora.config.init_lora_weights != json!(true) {
            return Err(Error::Config("`allora` takes one rank, and LoRA's own start".into()));
        }
        if own.post {
            lora.training.callback = Some(Arc::new(own.clone()));
        }
        lora.row_rate = Some(own);
        Ok(Box::new(lora) as Box<dyn Method>)
    },
    // Its files are ordinary LoRAs.
    recognises: |_| false,
    from_file: lora_file,
};

impl CallbackKind for Allora {
    fn build(&self, _run: RunShape, _parameters: &[Named<'_>]) -> Box<dyn Callback> {
        Box::new(RowRates(self.clone()))
    }
}

/// ALLoRA's factor on the step of each row of B.
struct RowRates(Allora);

impl Callback for RowRates {
    fn row_scale(&self, role: Role, var: &Var) -> Result<Option<Vec<f64>>> {
        match role {
            Role::B => Ok(Some(self.0.factors(var)?.to_dtype(DType::F64)?.to_vec1::<f64>()?)),
            _ => Ok(None),
        }
    }

    fn steps_rows_apart(&self) -> bool {
        true
    }
}
