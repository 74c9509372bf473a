//! What happens to a frozen model while it runs.

use std::ops::Deref;

use candle_core::{DType, Result, Tensor, bail};
use lorimer_tensor::{AttentionForm, CheckedGradient, Gradients, Ops, Segment, Segmented, Tape, project_segmented};

use crate::scope::BlockScope;
use crate::site::{Projection, Site};

/// Where a hidden state or an attention stands in the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// After the embedding, before the first layer.
    Embedded,
    /// After the attention's residual of layer `i`, before the norm of its unit.
    Attended(usize),
    /// In or after layer `i`, counted from 0.
    Layer(usize),
    /// After the final norm.
    Final,
}

/// One attention, ready to run: what a method may look at, change or replace.
pub struct AttentionCall<'a> {
    /// (rows, heads·head_dim), rotated.
    pub q: Tensor,
    /// (key rows, kv_heads·head_dim), rotated.
    pub k: Tensor,
    /// (key rows, kv_heads·head_dim).
    pub v: Tensor,
    /// Which rows belong together.
    pub segments: &'a [Segment],
    /// Heads, scale, which keys are seen, and the cap.
    pub form: AttentionForm,
}

impl AttentionCall<'_> {
    /// Plain attention: (rows, heads·head_dim).
    pub fn run(self, ops: Ops<'_>) -> Result<Tensor> {
        ops.attention((&self.q, &self.k, &self.v), self.segments, &self.form)
    }

    /// The same in a block, with its gradient on a tape low-rank where that is within a tolerance.
    ///
    /// # Errors
    /// The attention has no such gradient, or tensor operations fail.
    pub fn run_low_rank(self, ops: Ops<'_>, how: &CheckedGradient, layer: usize) -> Result<Tensor> {
        ops.attention_low_rank((&self.q, &self.k, &self.v), (self.segments, &self.form), how, layer)
    }
}

/// What a pass of a forward left for the one after it.
#[derive(Clone, Copy)]
pub struct PassDone<'a> {
    /// Hidden states after the end, of all rows (rows, hidden). No gradient goes through them.
    pub hidden: &'a Tensor,
    /// The rows (ascending) that the last block of the next pass gives, where it need not give all.
    pub needed: Option<&'a [u32]>,
}

/// What happens to a frozen model while it runs. Every default leaves the model as it is.
pub trait Adaptation {
    /// How many times the rows of one forward go through the model. Where that is more than once, [`Self::pass`] takes the place of this
    /// adaptation in each pass: see [`crate::earlier_passes`].
    fn passes(&self) -> usize {
        1
    }

    /// The adaptation of one pass of a forward, counted from 0, with what the pass before it left.
    ///
    /// # Errors
    /// An adaptation of one pass has no other.
    fn pass<'s>(&'s self, number: usize, _before: Option<&PassDone<'_>>) -> Result<Box<dyn Adaptation + 's>> {
        bail!("pass {number} of an adaptation that has one pass")
    }

    /// How operations are done: recorded on a tape for a fast backward, or in candle's graph.
    fn ops(&self) -> Ops<'_> {
        Ops::plain()
    }

    /// One frozen projection. `x` (rows, inputs) → (rows, outputs).
    fn project(&self, _site: &Site, base: &Projection, x: &Tensor) -> Result<Tensor> {
        base.forward_with(self.ops(), x)
    }

    /// Frozen projections that read the same `x`, to be computed together where that is quicker.
    fn project_all(&self, targets: &[(&Site, &Projection)], x: &Tensor) -> Result<Vec<Tensor>> {
        targets.iter().map(|(site, base)| self.project(site, base, x)).collect()
    }

    /// One attention. What it shows is put into the block's scope, for [`Self::attended`].
    fn attend(&self, _point: Point, call: AttentionCall<'_>, _block: &mut BlockScope<'_>) -> Result<Tensor> {
        call.run(self.ops())
    }

    /// The hidden state after the attention's residual of a block (rows, hidden), which a layer that follows the attention may change.
    fn attended(&self, h: Tensor, block: &mut BlockScope<'_>) -> Result<Tensor> {
        self.hidden(Point::Attended(block.layer()), h)
    }

    /// The adaptation of a block's gated unit, from what the unit reads (rows, hidden): it takes the place of this one in the unit's projections, so
    /// that what is made of the input once serves all of them. It lives as long as the unit's forward. None: this one.
    ///
    /// # Errors
    /// Whatever the adaptation makes of the input.
    fn unit<'s>(&'s self, _layer: usize, _x: &Tensor) -> Result<Option<Box<dyn Adaptation + 's>>> {
        Ok(None)
    }

    /// Before a block's backward: adds the gradients of what [`Self::unit`] made there of an auxiliary loss's.
    ///
    /// # Errors
    /// Tensor operations.
    fn unit_gradients(&self, _layer: usize, _gradients: &mut Gradients) -> Result<()> {
        Ok(())
    }

    /// A hidden state between layers or within one (rows, hidden): to record, to route on, to change.
    fn hidden(&self, _point: Point, h: Tensor) -> Result<Tensor> {
        Ok(h)
    }

    /// Whether [`Self::project`] may do anything but the frozen projection at this site.
    fn touches(&self, _site: &Site) -> bool {
        true
    }

    /// A whole parameter (embedding, norm) that takes the place of the frozen one, by its on-disk name.
    fn parameter(&self, _path: &str) -> Option<&Tensor> {
        None
    }
}

/// The base model as it is.
pub struct Frozen;
impl Adaptation for Frozen {
    fn touches(&self, _: &Site) -> bool {
        false
    }
}

/// The adaptation of a forward's last pass.
pub enum LastPass<'a> {
    /// Of the only one.
    Only(&'a dyn Adaptation),
    /// After others.
    After(Box<dyn Adaptation + 'a>),
}

impl<'a> Deref for LastPass<'a> {
    type Target = dyn Adaptation + 'a;

    fn deref(&self) -> &Self::Target {
        match self {
            Self::Only(on) => *on,
            Self::After(on) => on.as_ref(),
        }
    }
}

/// Another adaptation without gradients: the graph is cut after every projection and layer, so that memory stays at one
/// layer's.
pub struct Inference<'a> {
    on: LastPass<'a>,
    /// One that follows nothing: operations on it run on all threads.
    tape: Option<Tape>,
}

impl<'a> Inference<'a> {
    /// In candle's operations.
    pub fn of(on: &'a dyn Adaptation) -> Self {
        Self { on: LastPass::Only(on), tape: None }
    }

    /// In operations that run on all threads; projections that nothing is done to are computed together with their biases. Passes before the last are
    /// as in [`Self::of`].
    pub fn in_parallel(on: &'a dyn Adaptation) -> Self {
        Self { on: LastPass::Only(on), tape: Some(Tape::new([])) }
    }
}

impl Adaptation for Inference<'_> {
    fn passes(&self) -> usize {
        self.on.passes()
    }

    fn pass<'s>(&'s self, number: usize, before: Option<&PassDone<'_>>) -> Result<Box<dyn Adaptation + 's>> {
        Ok(Box::new(Inference { on: LastPass::After(self.on.pass(number, before)?), tape: None }))
    }

    fn ops(&self) -> Ops<'_> {
        self.tape.as_ref().map_or(Ops::plain(), Ops::recorded)
    }

    fn project(&self, site: &Site, base: &Projection, x: &Tensor) -> Result<Tensor> {
        match self.tape {
            Some(_) => {
                let mut all = self.project_all(&[(site, base)], x)?;
                all.pop().ok_or_else(|| candle_core::Error::Msg("no projection".into()))
            }
            None => Ok(self.on.project(site, base, x)?.detach()),
        }
    }

    fn project_all(&self, targets: &[(&Site, &Projection)], x: &Tensor) -> Result<Vec<Tensor>> {
        if self.tape.is_none() {
            return targets.iter().map(|(site, base)| self.project(site, base, x)).collect();
        }
        if x.dtype() != DType::F32 || targets.iter().any(|(site, _)| self.on.touches(site)) {
            return Ok(self.on.project_all(targets, x)?.into_iter().map(|t| t.detach()).collect());
        }
        let mut parts = Vec::new();
        for &(_, Projection { weight, bias }) in targets {
            parts.push(Segmented { weight, bias: bias.as_ref(), groups: Vec::new() });
        }
        project_segmented(x, &parts)
    }

    fn attend(&self, point: Point, call: AttentionCall<'_>, block: &mut BlockScope<'_>) -> Result<Tensor> {
        Ok(self.on.attend(point, call, block)?.detach())
    }

    fn attended(&self, h: Tensor, block: &mut BlockScope<'_>) -> Result<Tensor> {
        Ok(self.on.attended(h, block)?.detach())
    }

    fn unit<'s>(&'s self, layer: usize, x: &Tensor) -> Result<Option<Box<dyn Adaptation + 's>>> {
        let Some(unit) = self.on.unit(layer, x)? else { return Ok(None) };
        let tape = self.tape.as_ref().map(|_| Tape::new([]));
        Ok(Some(Box::new(Inference { on: LastPass::After(unit), tape })))
    }

    fn hidden(&self, point: Point, h: Tensor) -> Result<Tensor> {
        Ok(self.on.hidden(point, h)?.detach())
    }

    fn touches(&self, site: &Site) -> bool {
        self.on.touches(site)
    }

    fn parameter(&self, path: &str) -> Option<&Tensor> {
        self.on.parameter(path)
    }
}
