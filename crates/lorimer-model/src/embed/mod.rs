//! Texts to vectors, one each: by the hidden states of an encoder or of a decoder, packed without padding.

mod options;

use candle_core::{DType, Result as TensorResult, Tensor};
use lorimer_seam::{Adaptation, BaseModel, Batch, Inference};
use lorimer_tensor::Segment;
use rayon::prelude::*;

pub use self::options::{EmbedOptions, Pooling};
use crate::base::Base;
use crate::error::{Error, Result};
use crate::text::TextModel;

/// Token rows of a forward: what a layer makes of them stays in a core's cache.
const ROWS: usize = 512;

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
    let on = Inference::in_parallel(on);
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
