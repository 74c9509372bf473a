//! What a model is to those who train, serve and measure it: projections with names, and a forward of blocks; and the one loop over them.

use std::ops::Range;

use candle_core::{DType, Result, Tensor, bail};
use lorimer_tensor::{Gradients, Segment, Tape};

use crate::adaptation::{Adaptation, LastPass, PassDone, Point};
use crate::batch::Batch;
use crate::layout::{Input, KvCache, Layout, ModelShape};
use crate::site::{Projection, Site};

/// A sequence is longer than the model is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLong {
    /// Tokens of the sequence.
    pub length: usize,
    /// Most tokens that the model is made for, or whose keys and values can be kept.
    pub most: usize,
    /// Whether it is only that keys and values cannot be kept: beyond so many tokens all positions turn otherwise (LongRoPE).
    pub cached: bool,
}

impl std::fmt::Display for TooLong {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { length, most, cached } = self;
        match cached {
            false => write!(f, "a sequence of {length} tokens is longer than the {most} the model is made for"),
            true => write!(
                f,
                "a sequence of {length} tokens is longer than the {most} after which this model (LongRoPE) turns all positions otherwise; up to there keys and values are kept, so ask for a shorter prompt or answer"
            ),
        }
    }
}

impl std::error::Error for TooLong {}

/// A frozen model that adapters attach to: its projections and other parameters by on-disk name, and its forward over packed rows: a stem
/// (embeddings), blocks, an end (the final norm), and what its hidden states are read by.
///
/// The loop over blocks is [`run_blocks`], whoever drives it.
pub trait BaseModel: Send + Sync {
    /// Its shape.
    fn shape(&self) -> &ModelShape;
    /// Every projection with its site, in the order of the forward.
    fn projections(&self) -> Vec<(&Site, &Projection)>;
    /// A frozen parameter that is no projection's (embedding, norm), in the compute type.
    fn parameter(&self, path: &str) -> Result<Option<Tensor>>;
    /// The other name of a parameter that stands in two places: the embedding's, of a head that is tied to it.
    fn shared_with(&self, _path: &str) -> Option<&str> {
        None
    }
    /// Names of the parameters that [`Self::parameter`] knows.
    fn parameter_names(&self) -> Vec<String>;
    /// On-disk names of the parameters that the stem reads, the token embedding first.
    fn stem_parameters(&self) -> Vec<String>;
    /// The type that activations are computed in.
    fn dtype(&self) -> DType;
    /// Bytes that the weights take in memory.
    fn bytes(&self) -> usize;

    /// Rows to the first block's input (rows, hidden). `positions`: of each row in its sequence.
    fn stem(&self, input: Input<'_>, positions: &[usize], on: &dyn Adaptation) -> Result<Tensor>;
    /// What every block needs to know of the rows. With `needed` (ascending), the last block may give these rows only: see [`Layout::last`].
    fn layout(&self, positions: &[usize], segments: &[Segment], needed: Option<&[u32]>) -> Layout;
    /// One block: hidden states (rows, hidden) → (rows, hidden).
    fn block(
        &self,
        i: usize,
        h: &Tensor,
        layout: &Layout,
        on: &dyn Adaptation,
        cache: Option<&mut KvCache>,
    ) -> Result<Tensor>;
    /// After the last block.
    fn end(&self, h: &Tensor, on: &dyn Adaptation) -> Result<Tensor>;
    /// Hidden states after the end (rows, hidden) to logits (rows, vocabulary).
    fn logits(&self, _hidden: &Tensor, _on: &dyn Adaptation) -> Result<Tensor> {
        bail!("a `{}` model has no head that predicts tokens", self.shape().model_type)
    }
    /// Σ −log p of one target for each row of hidden states after the end, with smoothed labels:
    /// [`lorimer_tensor::smoothed_cross_entropy`].
    fn smoothed_loss(&self, hidden: &Tensor, targets: &[u32], smoothing: f64, on: &dyn Adaptation) -> Result<Tensor> {
        on.ops().cross_entropy(&self.logits(hidden, on)?, targets, smoothing)
    }

    /// [`Self::smoothed_loss`] without smoothing.
    fn loss(&self, hidden: &Tensor, targets: &[u32], on: &dyn Adaptation) -> Result<Tensor> {
        self.smoothed_loss(hidden, targets, 0.0, on)
    }

    /// Refuses sequences that the model is not made for.
    fn check_length(&self, length: usize) -> std::result::Result<(), TooLong> {
        let most = self.shape().max_positions;
        if length > most { Err(TooLong { length, most, cached: false }) } else { Ok(()) }
    }

    /// Refuses sequences whose keys and values cannot be kept from the first token to the last.
    fn check_cached_length(&self, length: usize) -> std::result::Result<(), TooLong> {
        self.check_length(length)?;
        match self.shape().rotary_border {
            Some(most) if length > most => Err(TooLong { length, most, cached: true }),
            _ => Ok(()),
        }
    }

    /// The first block's input for token rows, as the adaptation leaves it.
    fn embed(&self, tokens: &[u32], positions: &[usize], on: &dyn Adaptation) -> Result<Tensor> {
        on.hidden(Point::Embedded, self.stem(Input::Tokens(tokens), positions, on)?)
    }

    /// Token rows to hidden states after the end (rows, hidden).
    fn hidden(&self, batch: &Batch, on: &dyn Adaptation) -> Result<Tensor> {
        self.hidden_from(Input::Tokens(&batch.tokens), &batch.positions, &batch.segments, on, None)
    }

    /// The next tokens of a sequence whose earlier ones are in `cache`, which then holds these too. Tokens that bring the sequence over
    /// [`ModelShape::rotary_border`] are refused unless they begin it.
    fn hidden_cached(&self, tokens: &[u32], cache: &mut KvCache, on: &dyn Adaptation) -> Result<Tensor> {
        let (past, n) = (cache.length, tokens.len());
        if past > 0 && self.shape().rotary_border.is_some_and(|border| past <= border && past + n > border) {
            self.check_cached_length(past + n).map_err(candle_core::Error::wrap)?;
        }
        let positions: Vec<usize> = (past..past + n).collect();
        let segment = Segment { q_start: 0, q_len: n, keys: vec![(0, past + n)] };
        let h = self.hidden_from(Input::Tokens(tokens), &positions, &[segment], on, Some(cache))?;
        cache.length += n;
        Ok(h)
    }

    /// Rows to hidden states after the end (rows, hidden), in as many passes as the adaptation takes.
    fn hidden_from(
        &self,
        input: Input<'_>,
        positions: &[usize],
        segments: &[Segment],
        on: &dyn Adaptation,
        mut cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        let mut bottom = |on: &dyn Adaptation| Ok((0, on.hidden(Point::Embedded, self.stem(input, positions, on)?)?));
        let earlier = cache.as_deref_mut().map(|cache| &mut cache.earlier);
        let before = earlier_passes(self, on, (positions, segments), &mut bottom, earlier)?;
        let on = &*last_pass(on, before.as_ref(), None)?;
        let layout = self.layout(positions, segments, None);
        let (first, h) = bottom(on)?;
        let h = run_blocks(self, h, first..self.shape().layers.len(), &layout, on, cache, |_, _| {})?;
        self.end(&h, on)
    }
}

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

/// The first block that a pass computes, and its input.
pub type Bottom<'b> = &'b mut dyn FnMut(&dyn Adaptation) -> Result<(usize, Tensor)>;

/// Runs the passes of a forward before its last. Gives the hidden states after the end of the last of them (rows, hidden), without a
/// gradient; None where one pass is all there is ([`Adaptation::passes`]). `caches`: of keys and values, one a pass, which it fills.
///
/// # Errors
/// What the model or the adaptation fails with.
pub fn earlier_passes<M: BaseModel + ?Sized>(
    model: &M,
    on: &dyn Adaptation,
    (positions, segments): (&[usize], &[Segment]),
    bottom: Bottom<'_>,
    mut caches: Option<&mut Vec<KvCache>>,
) -> Result<Option<Tensor>> {
    let mut hidden: Option<Tensor> = None;
    for number in 0..on.passes().saturating_sub(1) {
        let done = hidden.as_ref().map(|hidden| PassDone { hidden, needed: None });
        let pass = on.pass(number, done.as_ref())?;
        let cache = caches.as_deref_mut().map(|caches| {
            caches.resize_with(caches.len().max(number + 1), KvCache::default);
            &mut caches[number]
        });
        let h = whole_pass(model, pass.as_ref(), (positions, segments), bottom, cache)?;
        if let Some(caches) = caches.as_deref_mut() {
            caches[number].length += positions.len();
        }
        hidden = Some(h);
    }
    Ok(hidden)
}

/// One pass before the last: hidden states of all rows after the end (rows, hidden), without a gradient.
///
/// # Errors
/// What the model or the adaptation fails with.
pub fn whole_pass<M: BaseModel + ?Sized>(
    model: &M,
    pass: &dyn Adaptation,
    (positions, segments): (&[usize], &[Segment]),
    bottom: Bottom<'_>,
    cache: Option<&mut KvCache>,
) -> Result<Tensor> {
    let layout = model.layout(positions, segments, None);
    let (first, h) = bottom(pass)?;
    let h = run_blocks(model, h, first..model.shape().layers.len(), &layout, pass, cache, |_, _| {})?;
    Ok(model.end(&h, pass)?.detach())
}

/// The adaptation of the last pass, after what [`earlier_passes`] gave. `needed`: the rows that its last block gives, where these are not all.
///
/// # Errors
/// What the adaptation fails with.
pub fn last_pass<'a>(on: &'a dyn Adaptation, before: Option<&Tensor>, needed: Option<&[u32]>) -> Result<LastPass<'a>> {
    Ok(match before {
        None => LastPass::Only(on),
        Some(hidden) => LastPass::After(on.pass(on.passes() - 1, Some(&PassDone { hidden, needed }))?),
    })
}

/// The inputs of a forward's blocks, from which the backward computes each block again, the last first.
pub struct Recompute {
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
        layout: &Layout,
        on: &dyn Adaptation,
    ) -> Result<(Self, Tensor)> {
        let (first, mut inputs) = (blocks.start.max(keep_from), Vec::new());
        let keep = |i: usize, h: &Tensor| {
            if i >= keep_from {
                inputs.push(h.clone());
            }
        };
        let h = run_blocks(model, h, blocks, layout, on, None, keep)?;
        Ok((Self { first, inputs }, h))
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
        layout: &Layout,
        (tape, on): (&Tape, &dyn Adaptation),
        gradient: Tensor,
        follow: bool,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let (Some(i), Some(input)) = (self.next(), self.inputs.pop()) else { return Ok(None) };
        if follow {
            tape.track(&input);
        }
        let output = model.block(i, &input, layout, on, None)?;
        on.unit_gradients(i, gradients)?;
        if tape.tracks(&output) {
            tape.backward(&output, gradient, gradients)?;
        }
        Ok(gradients.remove(&input))
    }
}
