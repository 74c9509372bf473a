//! # Full fine-tuning
//!
//! Every targeted weight W (outputs, inputs) is a trainable copy: `y = W' x`, W' = W at the start. The base itself stays as it is, on disk and in
//! memory. With `modules_to_save` embeddings and norms are trained too.
//!
//! Trainable parameters of a projection: `inputs · outputs`.
//!
//! Meant for: the yardstick of every other method, continued pre-training with GaLore (`--method galore`), and tunes that are to be kept as a
//! LoRA afterwards (`lorimer extract --rank k` writes the nearest one). The file holds the whole weights (`full_weight`); `lorimer merge`
//! writes the model.
//!
//! Step time: the weights' gradients are as much work as the inputs', so half more than LoRA's (1.5×); memory: weights, gradients and moments,
//! 16 bytes a parameter.
//!
//! ```
//! use lorimer_adapter::example::project;
//! let y = project("full", "{}", &[&[1., 0.], &[0., 1.]], &[("full_weight", &[2., 0., 0., 3.])], &[1., 1.]);
//! assert_eq!(y, [2.0, 3.0]);
//! ```

use candle_core::{Result as TensorResult, Var};
use lorimer_model::{Projection, Site};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::entry::{Entry, Served};
use crate::delta::{Change, Delta};
use crate::error::Result;
use crate::file::keys::FileKeys;
use crate::method::{Bias, Method, ParameterSource};
use crate::parameter::{Parameter, Role};
use crate::settings::{PeftKeys, configure, from_peft_json, peft_json};
use crate::step::Step;
use crate::targets::Targeting;
use crate::training::Training;

/// The registry's line.
pub const ENTRY: Entry = Entry {
    name: "full",
    title: "Full fine-tuning",
    paper: "",
    kind: "projection",
    variants: &[],
    peft_type: "FULL",
    mergeable: true,
    served: Served::Converted,
    lr: 1e-4,
    parts: &[],
    flags: &[("bias", "bias")],
    source: include_str!("full.rs"),
    laws: &[("{}", 1e-12), (r#"{"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"}"#, 1e-12)],
    build: |settings| {
        Ok(Box::new(Full { config: configure("full", settings)?, name: "full", training: Training::default() }))
    },
    recognises: |config| config.get("peft_type").and_then(Value::as_str) == Some("FULL"),
    from_file: |config| {
        let config = from_peft_json("full", config, &PeftKeys::NONE)?;
        Ok(Box::new(Full { config, name: "full", training: Training::default() }))
    },
};

/// Settings of full fine-tuning.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FullConfig {
    /// Which modules.
    #[serde(flatten)]
    pub targeting: Targeting,
    /// Which biases are trained.
    pub bias: Bias,
}

/// Trainable copies of weights.
pub(super) struct Full {
    pub(super) config: FullConfig,
    pub(super) name: &'static str,
    pub(super) training: Training,
}

impl Method for Full {
    fn name(&self) -> &'static str {
        self.name
    }

    fn targeting(&self) -> &Targeting {
        &self.config.targeting
    }

    fn bias(&self) -> Bias {
        self.config.bias
    }

    fn config(&self) -> Map<String, Value> {
        peft_json("FULL", &self.config)
    }

    fn training(&self) -> Training {
        self.training.clone()
    }

    fn file_keys(&self) -> FileKeys {
        FileKeys::of_modules(&["full_weight"])
    }

    fn attach(&self, site: &Site, base: &Projection, source: &mut ParameterSource<'_>) -> Result<Box<dyn Delta>> {
        let dtype = source.dtype();
        let weight =
            source.trainable("full_weight", &[site.outputs, site.inputs], |_| Ok(base.dense(dtype)?.copy()?))?;
        Ok(Box::new(FullDelta { weight }))
    }

    fn parameters(&self, site: &Site) -> Result<usize> {
        Ok(site.inputs * site.outputs)
    }

    fn activations_per_row(&self, _site: &Site) -> usize {
        0
    }
}

struct FullDelta {
    weight: Var,
}

impl Delta for FullDelta {
    fn change(&self, _base: &Projection, _rows: usize, _step: &Step) -> TensorResult<Change> {
        Ok(Change::Weight(self.weight.as_tensor().clone()))
    }

    fn parameters(&self) -> Vec<Parameter<'_>> {
        vec![Parameter::new("full_weight", &self.weight, Role::Weight)]
    }

    fn has_effect(&self, base: &Projection) -> TensorResult<bool> {
        let change = (self.weight.as_tensor() - base.dense(self.weight.dtype())?)?;
        Ok(crate::delta::largest(&change)? > 0.0)
    }
}
