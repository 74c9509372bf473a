//! X-LoRA's configuration, with PEFT's keys.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::gating::Gating;

/// X-LoRA's settings, with PEFT's keys.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct XloraConfig {
    /// Width of the base's hidden states; `null`: whatever the base's is.
    pub hidden_size: Option<usize>,
    /// The experts' folders by number, in a file; given apart here.
    pub adapters: Map<String, Value>,
    /// Whether λ is a softmax over the experts.
    pub enable_softmax: bool,
    /// Whether those that count have a softmax of their own.
    pub enable_softmax_topk: bool,
    /// What logits are divided by before the softmax.
    pub softmax_temperature: f64,
    /// λ for each projection.
    pub layerwise_scalings: bool,
    /// How many experts count for a token.
    pub top_k_lora: Option<usize>,
    /// Linear layers of the head.
    pub xlora_depth: usize,
    /// Width within the head.
    pub xlora_size: usize,
    /// Dropout within the head, in training.
    pub xlora_dropout_p: f64,
    /// Whether the experts are trained too, which is refused.
    pub use_trainable_adapters: bool,
    /// Every expert's weight in the first pass.
    pub scaling_pass_value: f64,
    /// What multiplies the experts' sum.
    pub global_scaling_weight: f64,
    /// How the head begins.
    pub init: Init,
    /// A control: only the last layer's bias is trained. With `init` zero, λ is then the same for all tokens.
    pub bias_only: bool,
}

/// How the head begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    /// With a last layer of zeros.
    #[default]
    Zero,
    /// As torch begins linear layers.
    Peft,
}

impl Default for XloraConfig {
    fn default() -> Self {
        Self {
            hidden_size: None,
            adapters: Map::new(),
            enable_softmax: true,
            enable_softmax_topk: false,
            softmax_temperature: 1.0,
            layerwise_scalings: false,
            top_k_lora: None,
            xlora_depth: 1,
            xlora_size: 2048,
            xlora_dropout_p: 0.2,
            use_trainable_adapters: false,
            scaling_pass_value: 0.0,
            global_scaling_weight: 1.0,
            init: Init::Zero,
            bias_only: false,
        }
    }
}

impl XloraConfig {
    /// How weights come out of the head's numbers.
    pub fn gating(&self) -> Gating {
        Gating {
            softmax: self.enable_softmax,
            temperature: self.softmax_temperature,
            top_k: self.top_k_lora,
            softmax_top_k: self.enable_softmax_topk,
        }
    }
}
