//! The loop over a model's blocks, and its reverse.

use std::ops::Range;

use candle_core::{Result, Tensor};
use lorimer_tensor::{Gradients, Tape};

use crate::adaptation::Adaptation;
use crate::model::{BaseModel, KvCache, Layout};

/// From the input `h` of the first of some blocks to the output of the last. `each` sees every block's input.
pub fn run_blocks<M: BaseModel + ?Sized>(
    model: &M,
    mut h: Tensor,
    blocks: Range<usize>,
    layout: &Layout,
    on: &dyn Adaptation,
    mut cache: Option<&mut KvCache>,
    mut each: impl FnMut(usize, &Tensor),
) -> Result<Tensor> {
    for i in blocks {
        each(i, &h);
        h = model.block(i, &h, layout, on, cache.as_deref_mut())?;
    }
    Ok(h)
}

/// The inputs of a forward's blocks, from which the backward computes each block again, the last first.
pub struct Recompute {
    layout: Layout,
    /// The block whose input is the first that is kept.
    first: usize,
    inputs: Vec<Tensor>,
}

impl Recompute {
    /// Runs the blocks, keeping the inputs of those from `keep_from` on; gives the output of the last too.
    pub fn forward<M: BaseModel + ?Sized>(
        model: &M,
        h: Tensor,
        (blocks, keep_from): (Range<usize>, usize),
        layout: Layout,
        on: &dyn Adaptation,
    ) -> Result<(Self, Tensor)> {
        let (first, mut inputs) = (blocks.start.max(keep_from), Vec::new());
        let keep = |i: usize, h: &Tensor| {
            if i >= keep_from {
                inputs.push(h.clone());
            }
        };
        let h = run_blocks(model, h, blocks, &layout, on, None, keep)?;
        Ok((Self { layout, first, inputs }, h))
    }

    /// The block that is computed again next, if any is left.
    pub fn next(&self) -> Option<usize> {
        (self.first + self.inputs.len()).checked_sub(1).filter(|_| !self.inputs.is_empty())
    }

    /// Computes the next block again, recorded on `tape` by `on`, and takes the gradient of its output back to its parameters and, with
    /// `follow`, to its input, whose gradient is given where one arrives.
    pub fn backward<M: BaseModel + ?Sized>(
        &mut self,
        model: &M,
        (tape, on): (&Tape, &dyn Adaptation),
        gradient: Tensor,
        follow: bool,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let (Some(i), Some(input)) = (self.next(), self.inputs.pop()) else { return Ok(None) };
        if follow {
            tape.track(&input);
        }
        let output = model.block(i, &input, &self.layout, on, None)?;
        if tape.tracks(&output) {
            tape.backward(&output, gradient, gradients)?;
        }
        Ok(gradients.remove(&input))
    }
}
