//! Layer by layer through a model that is being rounded: what a matrix reads comes out of the layers before it as they are rounded.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use candle_core::{Result as TensorResult, Tensor, TensorId};
use lorimer_model::{Adaptation, BaseModel, Batch, Frozen, Inference, Layout, Projection, Site};
use lorimer_tensor::FrozenWeight;

use super::gptq::Inputs;
use crate::data::encode::Example;
use crate::error::{Error, Result};

/// Rows of the data in a forward.
const BATCH: usize = 4;

/// A model whose first layers are rounded, with the hidden states of all rows before one of its layers. They take rows × hidden numbers in f32.
pub(super) struct Sequential<'a> {
    model: &'a dyn BaseModel,
    parts: Vec<(Layout, Tensor)>,
    /// Rounded projections of the layer.
    rounded: HashMap<String, Projection>,
    /// Set from outside to stop between forwards.
    stop: &'a AtomicBool,
}

/// Takes rounded projections in the place of the model's, and lets inputs be seen.
struct Watched<'a> {
    rounded: &'a HashMap<String, Projection>,
    see: &'a (dyn Fn(&Site, &Tensor) -> TensorResult<()> + Sync),
}

impl Adaptation for Watched<'_> {
    fn project(&self, site: &Site, base: &Projection, x: &Tensor) -> TensorResult<Tensor> {
        (self.see)(site, x)?;
        self.rounded.get(&site.path).unwrap_or(base).forward(x)
    }
}

impl<'a> Sequential<'a> {
    /// Before the first layer.
    pub(super) fn new(model: &'a dyn BaseModel, rows: &[&Example], stop: &'a AtomicBool) -> Result<Self> {
        let rows: Vec<&[u32]> = rows.iter().map(|row| row.tokens.as_slice()).filter(|row| !row.is_empty()).collect();
        if rows.is_empty() {
            return Err(Error::Settings("no row for the inputs of projections has a token".into()));
        }
        for row in &rows {
            model.check_length(row.len()).map_err(|e| Error::Settings(e.to_string()))?;
        }
        let part = |rows: &[&[u32]]| {
            let batch = Batch::pack(rows.iter().copied());
            let h = model.embed(&batch.tokens, &batch.positions, &Frozen)?.detach();
            Ok((model.layout(&batch.positions, &batch.segments, None), h))
        };
        let parts = rows.chunks(BATCH).map(part).collect::<TensorResult<_>>()?;
        Ok(Self { model, parts, rounded: HashMap::new(), stop })
    }

    /// One part through a layer as far as it is rounded.
    fn run(
        &self,
        layer: usize,
        (layout, h): &(Layout, Tensor),
        see: &(dyn Fn(&Site, &Tensor) -> TensorResult<()> + Sync),
    ) -> TensorResult<Tensor> {
        let watched = Watched { rounded: &self.rounded, see };
        Ok(self.model.block(layer, h, layout, &Inference::of(&watched), None)?.detach())
    }

    /// Paths of the layer's projections that read the same input, in the order of the forward.
    pub(super) fn inputs_of(&self, layer: usize) -> Result<Vec<Vec<String>>> {
        let seen: Mutex<Vec<(TensorId, Vec<String>)>> = Mutex::default();
        let see = |site: &Site, x: &Tensor| {
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            match seen.iter_mut().find(|(id, _)| *id == x.id()) {
                Some((_, paths)) => paths.push(site.path.clone()),
                None => seen.push((x.id(), vec![site.path.clone()])),
            }
            Ok(())
        };
        for part in self.parts.iter().take(1) {
            self.run(layer, part, &see)?;
        }
        Ok(seen.into_inner().unwrap_or_else(PoisonError::into_inner).into_iter().map(|(_, paths)| paths).collect())
    }

    /// All parts through a layer as far as it is rounded; None where `stop` was set.
    fn run_all(
        &self,
        layer: usize,
        see: &(dyn Fn(&Site, &Tensor) -> TensorResult<()> + Sync),
    ) -> Result<Option<Vec<Tensor>>> {
        let mut outputs = Vec::new();
        for part in &self.parts {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            outputs.push(self.run(layer, part, see)?);
        }
        Ok(Some(outputs))
    }

    /// `mean x xᵀ` of what a projection reads; None where `stop` was set.
    pub(super) fn mean(&self, layer: usize, path: &str, width: usize) -> Result<Option<Tensor>> {
        let inputs = Mutex::new(Inputs::new(width)?);
        let see = |site: &Site, x: &Tensor| match site.path == path {
            true => inputs.lock().unwrap_or_else(PoisonError::into_inner).add(x),
            false => Ok(()),
        };
        let seen = self.run_all(layer, &see)?;
        let mean = inputs.into_inner().unwrap_or_else(PoisonError::into_inner).mean()?;
        Ok(seen.map(|_| mean))
    }

    /// From here on a projection of the layer has this weight.
    pub(super) fn put(&mut self, path: &str, weight: FrozenWeight) {
        let base = self.model.projections().into_iter().find(|(site, _)| site.path == path);
        let bias = base.and_then(|(_, projection)| projection.bias.clone());
        self.rounded.insert(path.to_string(), Projection { weight, bias });
    }

    /// On to the next layer; false where `stop` was set.
    pub(super) fn advance(&mut self, layer: usize) -> Result<bool> {
        let Some(next) = self.run_all(layer, &|_, _| Ok(()))? else { return Ok(false) };
        self.parts.iter_mut().zip(next).for_each(|((_, h), next)| *h = next);
        self.rounded.clear();
        Ok(true)
    }
}
