//! From gradients to a step: the optimiser for an adapter, norms and clipping, which parameters decay.

use candle_core::{DType, Tensor};
use lorimer_adapter::Adapter;
use lorimer_adapter::methods::OptimizerChoice;
use lorimer_adapter::training::{AdamWConfig, Optimizer};
use lorimer_model::BaseModel;

use crate::error::{Error, Result};

/// Whether weight decay acts on a parameter of this name, by transformers' rule: on all but biases and norms.
pub fn decays(name: &str) -> bool {
    let name = name.to_lowercase();
    let norm = name.split('.').any(|part| part == "norm" || part.ends_with("_norm"));
    !norm && !["bias", "layernorm", "rmsnorm"].iter().any(|part| name.contains(part))
}

/// The optimiser of a choice for an adapter, or why the two do not go together.
///
/// # Errors
///
/// Fails if the optimiser needs parameters that the method does not train.
pub fn build(
    choice: &OptimizerChoice,
    config: AdamWConfig,
    model: &dyn BaseModel,
    adapter: &Adapter,
) -> Result<Box<dyn Optimizer>> {
    let method = adapter.method.name();
    if !choice.0.takes_any_parameter() && adapter.blocks().next().is_some() {
        return Err(Error::Settings(format!(
            "--optimizer {} is for changes of projections, and `{method}` changes blocks; use adamw",
            choice.0.name()
        )));
    }
    Ok(choice.0.build(config, method, &adapter.sites(model))?)
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
