//! How important heads and channels are, by the loss of some rows.

use std::collections::HashMap;

use lorimer_adapter::algebra::slice::salience;
use lorimer_adapter::methods;
use lorimer_adapter::pruning::Kind;
use lorimer_model::{BaseModel, Projection};
use serde_json::Map;

use super::{Sum, gradients};
use crate::data::encode::Example;
use crate::error::Result;

/// The importance of each layer's key-value heads (with their query heads) and channels: Σ |W ⊙ ∂L/∂W| over the rows and columns of all projections
/// that a unit has, for the mean loss L of `rows` (LLM-Pruner, Ma et al. 2023, arXiv 2305.11627, first order). Gradients exist one layer at a time.
/// `progress` hears of layers done, and of how many.
///
/// # Errors
///
/// Fails if no row has a supervised token, or if a tensor operation fails.
pub fn unit_importance(
    model: &dyn BaseModel,
    rows: &[&Example],
    batch_size: usize,
    progress: impl FnMut(usize, usize),
) -> Result<Vec<(Vec<f64>, Vec<f64>)>> {
    let shapes = &model.shape().layers;
    let mut all: Vec<_> = shapes.iter().map(|s| (vec![0.0; s.kv_heads], vec![0.0; s.inner])).collect();
    // Only its targets are asked for: all projections of layers.
    let method = methods::build("lora", &Map::new())?;
    let bases: HashMap<&str, &Projection> =
        model.projections().into_iter().map(|(site, base)| (site.path.as_str(), base)).collect();
    let add = |layer: Vec<(&lorimer_model::Site, candle_core::Tensor)>| {
        for (site, gradient) in layer {
            let (Some(i), Some(base)) = (site.layer, bases.get(site.path.as_str())) else { continue };
            let weight = base.dense(gradient.dtype())?;
            let Some((kind, found)) = salience(site, &shapes[i], &weight, &gradient)? else { continue };
            let sums = if kind == Kind::Channel { &mut all[i].1 } else { &mut all[i].0 };
            sums.iter_mut().zip(found).for_each(|(sum, own)| *sum += own);
        }
        Ok(())
    };
    gradients(model, method.as_ref(), rows, (batch_size, Sum::Plain), add, progress)?;
    Ok(all)
}
