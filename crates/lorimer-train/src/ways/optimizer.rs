//! Optimisers: from gradients to new parameters.

use candle_core::{DType, Tensor};
use lorimer_adapter::Adapter;
pub use lorimer_adapter::training::OptimizerKind;

use crate::error::{Error, Result};

mod adamw;
mod galore;
pub mod lora_pro;
mod stepping;

pub use adamw::{AdamW, AdamWConfig};
pub use galore::GaloreOptimizer;
pub use lora_pro::{LoraProOptimizer, Pair};
pub use stepping::{Optimizer, ParamGroup};

/// Whether weight decay acts on a parameter of this name, by transformers' rule: on all but biases and norms.
pub fn decays(name: &str) -> bool {
    let name = name.to_lowercase();
    let norm = name.split('.').any(|part| part == "norm" || part.ends_with("_norm"));
    !norm && !["bias", "layernorm", "rmsnorm"].iter().any(|part| name.contains(part))
}

/// The optimiser of a kind for an adapter, or why the two do not go together.
pub fn build(kind: &OptimizerKind, config: AdamWConfig, adapter: &Adapter) -> Result<Box<dyn Optimizer>> {
    let method = adapter.method.name();
    Ok(match kind {
        OptimizerKind::AdamW => Box::new(AdamW::new(config, false)),
        OptimizerKind::AdamW8bit => Box::new(AdamW::new(config, true)),
        OptimizerKind::Galore(settings) => {
            let other =
                adapter.deltas().any(|(_, delta)| delta.trainable().iter().any(|(key, _)| *key != "full_weight"));
            if other || adapter.blocks().next().is_some() {
                return Err(Error::Settings(format!(
                    "galore projects gradients of whole weights, which `{method}` does not train; use --method full or --method galore"
                )));
            }
            Box::new(GaloreOptimizer::new(settings.clone(), config))
        }
        OptimizerKind::LoraPro(settings) => {
            let other = || {
                Error::Settings(format!(
                    "lora-pro corrects the gradients of LoRA's A and B, and `{method}` trains something else; use --method lora or eva"
                ))
            };
            if adapter.blocks().next().is_some() {
                return Err(other());
            }
            let pair = |(path, delta): (&str, &dyn lorimer_adapter::Delta)| {
                let scaling = delta.pair_scaling().ok_or_else(other)?;
                Ok(Pair { module: path.to_string(), scaling })
            };
            let pairs = adapter.deltas().map(pair).collect::<Result<Vec<_>>>()?;
            Box::new(LoraProOptimizer::new(settings.clone(), config, pairs))
        }
    })
}

/// Σ of the squares of all gradients.
pub(crate) fn squares(gradients: &[Option<Tensor>]) -> Result<f64> {
    let mut squares = 0.0;
    for g in gradients.iter().flatten() {
        squares += g.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?;
    }
    Ok(squares)
}

/// Refuses a gradient that is no number.
pub(crate) fn check_norm(norm: f64) -> Result<f64> {
    match norm.is_finite() {
        true => Ok(norm),
        false => Err(Error::Diverged(format!("the gradient is {norm}; lower --lr, or look for damaged data"))),
    }
}

/// Scales gradients of norm `norm` so that it is at most `limit` (0: no limit).
pub(crate) fn shrink(gradients: &mut [Option<Tensor>], norm: f64, limit: f64) -> Result<()> {
    let factor = limit / (norm + 1e-6);
    if limit > 0.0 && factor < 1.0 {
        for g in gradients.iter_mut().flatten() {
            *g = (&*g * factor)?;
        }
    }
    Ok(())
}

/// Norm of all gradients together, and the gradients scaled so that it is at most `limit` (0: no limit), as torch's
/// `clip_grad_norm_`.
pub fn clip(gradients: &mut [Option<Tensor>], limit: f64) -> Result<f64> {
    let norm = check_norm(squares(gradients)?.sqrt())?;
    shrink(gradients, norm, limit)?;
    Ok(norm)
}

#[cfg(test)]
mod tests {
    use super::decays;

    /// The patterns of transformers' `get_decay_parameter_names`: bias, layernorm, rmsnorm, norm and …_norm as whole parts.
    #[test]
    fn biases_and_norms_do_not_decay() {
        for name in [
            "model.layers.0.self_attn.q_proj.lora_A",
            "model.layers.0.self_attn.q_proj.lora_magnitude_vector",
            "model.layers.0.mlp.down_proj.full_weight",
            "model.embed_tokens.weight",
            "model.normal.weight",
        ] {
            assert!(decays(name), "{name}");
        }
        for name in [
            "model.layers.0.self_attn.q_proj.bias",
            "model.layers.0.input_layernorm.weight",
            "model.layers.0.self_attn.q_norm.weight",
            "model.norm.weight",
            "model.RMSNorm_1.weight",
        ] {
            assert!(!decays(name), "{name}");
        }
    }
}
