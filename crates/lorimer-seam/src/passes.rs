//! Forwards that take more than one pass over their rows: the one place where the passes before the last are run.

use std::ops::Deref;

use candle_core::{Result, Tensor};
use lorimer_tensor::Segment;

use crate::adaptation::{Adaptation, PassDone};
use crate::layout::KvCache;
use crate::model::{BaseModel, run_blocks};

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
