//! Changes of whole blocks: a trained layer that follows a frozen block's attention, with what it sees of the attention, or a router of its gated
//! unit.

use candle_core::{Result as TensorResult, Tensor, Var};
use lorimer_model::{BlockScope, LayerShape, ModelShape, Site};
use lorimer_tensor::{EdgeRule, Ops};

use crate::error::{Error, Result};
use crate::parameter::Parameter;
use crate::step::Step;
use crate::unit::UnitRouter;

/// A block of a model, as the place of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockSite {
    /// The layer's module: its path below the block's, its inputs and outputs the width of the hidden state.
    pub site: Site,
    /// The block, counted from 0.
    pub layer: usize,
    /// Number of blocks.
    pub layers: usize,
    /// The block's heads and widths.
    pub shape: LayerShape,
}

impl BlockSite {
    /// All blocks of a model with these projections, for layers whose module is called `module`.
    ///
    /// # Errors
    ///
    /// Fails if the model is no decoder: in one that reads both ways a row's edges would come from rows after it.
    pub fn all<'a>(shape: &ModelShape, sites: impl IntoIterator<Item = &'a Site>, module: &str) -> Result<Vec<Self>> {
        if !shape.causal {
            return Err(Error::Config(format!(
                "`{module}` belongs to the blocks of models that predict tokens, and a `{}` model reads both ways",
                shape.model_type
            )));
        }
        let mut paths = vec![None; shape.layers.len()];
        for site in sites {
            let Some(layer) = site.layer else { continue };
            if let Some(path @ None) = paths.get_mut(layer) {
                let end = site.path.split('.').scan(0, |end, part| {
                    *end += part.len() + 1;
                    Some((*end - 1, part))
                });
                *path = end.into_iter().find(|(_, part)| part.parse() == Ok(layer)).map(|(end, _)| &site.path[..end]);
            }
        }
        let blocks = paths.into_iter().enumerate().zip(&shape.layers).filter_map(|((layer, path), own)| {
            let site = Site::new(&format!("{}.{module}", path?), (shape.hidden, shape.hidden));
            Some(Self { site, layer, layers: shape.layers.len(), shape: *own })
        });
        Ok(blocks.collect())
    }
}

/// A layer that a method put on one block.
pub trait BlockDelta: std::fmt::Debug + Send + Sync {
    /// Which edges of the attention's map it wants to see: [`BlockScope::edges`].
    fn edges(&self) -> Option<EdgeRule> {
        None
    }
    /// What routes the rows of the block's gated unit, where it does that and nothing after the attention.
    fn unit_router(&self) -> Option<&dyn UnitRouter> {
        None
    }
    /// The hidden state after the attention's residual, `h` (rows, hidden), with the layer's change, in recorded operations.
    fn attended(&self, ops: Ops<'_>, h: &Tensor, block: &mut BlockScope<'_>, step: &Step) -> TensorResult<Tensor>;
    /// Numbers that it keeps of each token for those after it: the width of what it gives to [`BlockScope::keep`], 0 where it keeps nothing.
    fn kept_width(&self) -> usize;
    /// Whether a row's change depends on other rows of its sequence, so that the last block has to be computed whole.
    fn reads_other_rows(&self) -> bool;
    /// Whether the change of a row depends on nothing but what its sequence has before it: see [`crate::Delta::rows_are_independent`].
    fn rows_are_independent(&self, _step: &Step) -> bool {
        true
    }
    /// Whether any output changes.
    fn has_effect(&self) -> TensorResult<bool>;
    /// Its parameters, in a fixed order.
    fn parameters(&self) -> Vec<Parameter<'_>>;
    /// The parameters that gradients move, by their keys in the file.
    fn trainable(&self) -> Vec<(&'static str, &Var)> {
        Parameter::trained(self.parameters())
    }
    /// After the optimiser's step: moves the buffers.
    fn after_step(&self) -> TensorResult<()> {
        Ok(())
    }
    /// What the file holds for this module, by key below the module's path.
    fn stored(&self) -> TensorResult<Vec<(&'static str, Tensor)>> {
        Ok(Parameter::stored(self.parameters()))
    }
}
