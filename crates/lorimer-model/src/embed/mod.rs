//! Texts to vectors, one each: by the hidden states of an encoder or of a decoder, packed without padding.

mod options;

use candle_core::{DType, Result as TensorResult, Tensor};
use lorimer_seam::{
    Adaptation, AttentionCall, BaseModel, Batch, BlockScope, LastPass, PassDone, Point, Projection, Site,
};
use lorimer_tensor::{Ops, Segment, Segmented, Tape, project_segmented};
use rayon::prelude::*;

pub use self::options::{EmbedOptions, Pooling};
use crate::base::Base;
use crate::error::{Error, Result};
use crate::text::TextModel;

/// Token rows of a forward: what a layer makes of them stays in a core's cache.
const ROWS: usize = 512;

/// An adaptation without gradients. On a tape that follows nothing operations run on all threads, and projections that nothing is done to are
/// computed together with their biases.
struct Swift<'a> {
    on: LastPass<'a>,
    tape: Tape,
    fused: bool,
}

impl Adaptation for Swift<'_> {
    fn passes(&self) -> usize {
        self.on.passes()
    }

    fn pass<'s>(&'s self, number: usize, before: Option<&PassDone<'_>>) -> TensorResult<Box<dyn Adaptation + 's>> {
        self.on.pass(number, before)
    }

    fn ops(&self) -> Ops<'_> {
        Ops::recorded(&self.tape)
    }

    fn project(&self, site: &Site, base: &Projection, x: &Tensor) -> TensorResult<Tensor> {
        let mut all = self.project_all(&[(site, base)], x)?;
        all.pop().ok_or_else(|| candle_core::Error::Msg("no projection".into()))
    }

    fn project_all(&self, targets: &[(&Site, &Projection)], x: &Tensor) -> TensorResult<Vec<Tensor>> {
        if !self.fused || targets.iter().any(|(site, _)| self.on.touches(site)) {
            return self.on.project_all(targets, x)?.into_iter().map(|t| Ok(t.detach())).collect();
        }
        let mut parts = Vec::new();
        for &(_, Projection { weight, bias }) in targets {
            parts.push(Segmented { weight, bias: bias.as_ref(), groups: Vec::new() });
        }
        project_segmented(x, &parts)
    }

    fn attend(&self, point: Point, call: AttentionCall<'_>, block: &mut BlockScope<'_>) -> TensorResult<Tensor> {
        Ok(self.on.attend(point, call, block)?.detach())
    }

    fn attended(&self, h: Tensor, block: &mut BlockScope<'_>) -> TensorResult<Tensor> {
        Ok(self.on.attended(h, block)?.detach())
    }

    fn unit<'s>(&'s self, layer: usize, x: &Tensor) -> TensorResult<Option<Box<dyn Adaptation + 's>>> {
        let Some(unit) = self.on.unit(layer, x)? else { return Ok(None) };
        Ok(Some(Box::new(Swift { on: LastPass::After(unit), tape: Tape::new([]), fused: self.fused })))
    }

    fn hidden(&self, point: Point, h: Tensor) -> TensorResult<Tensor> {
        Ok(self.on.hidden(point, h)?.detach())
    }

    fn touches(&self, site: &Site) -> bool {
        self.on.touches(site)
    }

    fn parameter(&self, path: &str) -> Option<&Tensor> {
        self.on.parameter(path)
    }
}

/// Vectors of texts, in their order.
///
/// # Errors
/// A text that has no tokens, and whatever the model refuses.
pub fn embed<S: AsRef<str> + Sync>(
    base: &Base,
    on: &dyn Adaptation,
    texts: &[S],
    options: &EmbedOptions,
) -> Result<Vec<Vec<f32>>> {
    embed_tokens(base.model(), on, &encode(&base.text, texts, options)?, options)
}

/// Tokens of texts, each cut to what the options allow.
pub fn encode<S: AsRef<str> + Sync>(text: &TextModel, texts: &[S], options: &EmbedOptions) -> Result<Vec<Vec<u32>>> {
    let one = |given: &S| {
        let mut given = format!("{}{}", options.prompt, given.as_ref());
        if options.lowercase {
            given = given.to_lowercase();
        }
        text.encode_cut(&given, options.max_tokens)
    };
    texts.par_iter().map(one).collect()
}

/// Vectors of texts' tokens, in their order; texts of like lengths go through the model together.
pub fn embed_tokens(
    model: &dyn BaseModel,
    on: &dyn Adaptation,
    texts: &[Vec<u32>],
    options: &EmbedOptions,
) -> Result<Vec<Vec<f32>>> {
    if let Some(i) = texts.iter().position(Vec::is_empty) {
        return Err(Error::Unsupported(format!("text {i} has no tokens, of which there is no vector")));
    }
    let mut order: Vec<usize> = (0..texts.len()).collect();
    order.sort_by_key(|&i| texts[i].len());
    let mut found = vec![Vec::new(); texts.len()];
    let on = Swift { on: LastPass::Only(on), tape: Tape::new([]), fused: model.dtype() == DType::F32 };
    let mut rest = order.as_slice();
    while !rest.is_empty() {
        let mut rows = 0;
        let fits = |&&i: &&usize| {
            rows += texts[i].len();
            rows <= ROWS
        };
        let n = rest.iter().take_while(fits).count().max(1);
        let (now, later) = rest.split_at(n);
        let batch: Vec<&[u32]> = now.iter().map(|&i| texts[i].as_slice()).collect();
        let vectors = vectors(model, &on, &batch, options)?.to_dtype(DType::F32)?.to_vec2()?;
        now.iter().zip(vectors).for_each(|(&i, vector)| found[i] = vector);
        rest = later;
    }
    Ok(found)
}

/// One forward: (texts, hidden), with the gradients that the adaptation records.
pub fn vectors(
    model: &dyn BaseModel,
    on: &dyn Adaptation,
    texts: &[&[u32]],
    options: &EmbedOptions,
) -> TensorResult<Tensor> {
    for text in texts {
        model.check_length(text.len()).map_err(candle_core::Error::wrap)?;
    }
    let batch = Batch::pack(texts.iter().copied());
    let hidden = model.hidden(&batch, on)?;
    on.ops().subgraph(&[&hidden], &[], |t| {
        let one = |segment: &Segment| {
            let (start, n) = (segment.q_start, segment.q_len);
            match options.pooling {
                Pooling::Mean => t[0].narrow(0, start, n)?.mean_keepdim(0),
                Pooling::Max => t[0].narrow(0, start, n)?.max_keepdim(0),
                Pooling::Cls => t[0].narrow(0, start, 1),
                Pooling::Last => t[0].narrow(0, start + n - 1, 1),
            }
        };
        let all = Tensor::cat(&batch.segments.iter().map(one).collect::<TensorResult<Vec<_>>>()?, 0)?;
        match options.normalize {
            true => all.broadcast_div(&all.sqr()?.sum_keepdim(1)?.sqrt()?.maximum(1e-12)?),
            false => Ok(all),
        }
    })
}
