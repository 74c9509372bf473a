//! Golden prompts of an adapter, computed by the code that serves and held against what was recorded when it was trained.

use lorimer_adapter::Golden;
use lorimer_model::BaseModel;

use crate::adapters::hosted::Hosted;
use crate::engine::batched::{Batched, Rows, Used};
use crate::engine::pool::{Geometry, pool};
use crate::error::{Error, Result};

/// Most tokens that are computed for one adapter.
const MOST: usize = 512;

/// The largest |Δ log p| over an adapter's golden prompts, as many as fit into 512 tokens; None where none is recorded. An error where what is
/// recorded cannot be of this base.
///
/// # Errors
///
/// Fails if a recorded prompt does not fit the base, or if a tensor operation fails.
pub fn replay(model: &dyn BaseModel, hosted: &std::sync::Arc<Hosted>) -> Result<Option<f64>> {
    let vocabulary = model.shape().vocabulary;
    let fits = |g: &Golden| {
        g.first >= 1
            && g.first < g.tokens.len()
            && g.tokens.len() - g.first == g.log_probabilities.len()
            && g.tokens.len() <= model.shape().cached_positions()
            && g.tokens.iter().all(|&t| (t as usize) < vocabulary)
    };
    if !hosted.golden.iter().all(fits) {
        return Err(Error::Request("a golden prompt in the adapter's lorimer.json does not fit the base".into()));
    }
    let mut left = MOST;
    let taken = hosted.golden.iter().take_while(|g| {
        let room = g.tokens.len() <= left;
        left -= g.tokens.len().min(left);
        room
    });
    let mut worst: Option<f64> = None;
    for golden in taken {
        let found = log_probabilities(model, hosted, golden)?;
        for (now, then) in found.iter().zip(&golden.log_probabilities) {
            // What is not a number is as wrong as can be.
            let difference = Some(f64::from((now - then).abs())).filter(|d| !d.is_nan()).unwrap_or(f64::INFINITY);
            worst = Some(worst.unwrap_or(0.0).max(difference));
        }
    }
    Ok(worst)
}

/// log p of a golden prompt's recorded tokens.
fn log_probabilities(model: &dyn BaseModel, hosted: &std::sync::Arc<Hosted>, golden: &Golden) -> Result<Vec<f32>> {
    let geometry = Geometry::of(model.shape());
    let tokens = &golden.tokens[..golden.tokens.len() - 1];
    let more = hosted.pages_per_block(geometry);
    let kept = geometry.pages_with(tokens.len(), more);
    let pages = kept + hosted.pages(geometry);
    let (mut free, mut numbers) = pool(geometry, (pages + geometry.layers + 1) * geometry.page_bytes())?;
    let full = || Error::Pool("a pool made for a golden prompt is too small for it".into());
    let own = free.take(hosted.pages(geometry)).ok_or_else(full)?;
    numbers.write(&own, &hosted.numbers);
    let pages = free.take(kept).ok_or_else(full)?;
    let blocks: Vec<Vec<u32>> = pages.chunks((geometry.layers + more).max(1)).map(<[u32]>::to_vec).collect();
    let adapters = vec![Used { hosted, pages: &own, weight: 1.0 }];
    let rows = vec![Rows { count: tokens.len(), position: 0, blocks: &blocks, adapters }];
    let needed: Vec<u32> = (golden.first as u32 - 1..tokens.len() as u32).collect();
    let batch = Batched::new(numbers.all(), geometry, rows, &needed);
    let Some(logits) = batch.logits(model, tokens, &needed)? else { return Ok(Vec::new()) };
    let logits = logits.to_dtype(candle_core::DType::F32)?.to_vec2::<f32>()?;
    let of = |(row, &token): (&Vec<f32>, &u32)| crate::engine::log_probabilities(row, token, 0).0;
    Ok(logits.iter().zip(&golden.tokens[golden.first..]).map(of).collect())
}
