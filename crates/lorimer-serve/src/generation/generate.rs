//! One prompt, one answer.

use candle_core::{DType, Tensor};
use lorimer_model::{Adaptation, BaseModel, Inference, KvCache, TextModel};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::generation::sampling::Sampling;
use crate::generation::stream::{TextOptions, TextStream};

/// Prompt tokens that go through the model at a time.
const PREFILL: usize = 512;

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end-of-turn token or a stop text.
    Stop,
    /// The form that the answer is held to is complete; the last token is a part of it.
    Complete,
    /// The answer ends, and calls tools.
    ToolCalls,
    /// The limit of tokens.
    Length,
}

impl FinishReason {
    /// In OpenAI's words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop | Self::Complete => "stop",
            Self::ToolCalls => "tool_calls",
            Self::Length => "length",
        }
    }
}

/// An answer.
#[derive(Clone, Debug, Serialize)]
pub struct Generation {
    /// The text, stop text left out.
    pub text: String,
    /// Number of generated tokens, the ending one included.
    pub tokens: usize,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Number of prompt tokens.
    pub prompt_tokens: usize,
}

/// Hidden states of those of `seen` that the cache lacks, up to the last; it then holds all. Where the sequence has crossed the border up to
/// which keys stand ([`lorimer_model::ModelShape::rotary_border`]), all are computed again.
pub fn extend(
    model: &dyn BaseModel,
    seen: &[u32],
    cache: &mut KvCache,
    on: &dyn Adaptation,
) -> candle_core::Result<Tensor> {
    // Tokens that have to be computed at a time, so that their number tells which side they are on.
    let mut first = PREFILL;
    if !model.shape().prefixes_stand(seen.len()) && model.shape().prefixes_stand(cache.len()) {
        *cache = KvCache::default();
        first = PREFILL.max(model.shape().cached_positions().saturating_add(1));
    }
    let rest = &seen[cache.len()..];
    let (begin, rest) = rest.split_at(first.min(rest.len()));
    let mut hidden = model.hidden_cached(begin, cache, on)?;
    for part in rest.chunks(PREFILL) {
        hidden = model.hidden_cached(part, cache, on)?;
    }
    Ok(hidden)
}

/// Answers a prompt. `stream` hears pieces of text as soon as they are certain not to begin a stop text.
#[allow(clippy::too_many_arguments)]
pub fn generate(
    model: &dyn BaseModel,
    text: &TextModel,
    adaptation: &dyn Adaptation,
    prompt: &[u32],
    max_tokens: usize,
    sampling: &Sampling,
    seed: u64,
    stop: &[String],
    mut stream: impl FnMut(&str),
) -> Result<Generation, lorimer_model::Error> {
    if prompt.is_empty() {
        return Err(lorimer_model::Error::Unsupported("the prompt is empty; there is nothing to go on from".into()));
    }
    model.check_length(prompt.len().saturating_add(max_tokens)).map_err(lorimer_model::Error::from)?;
    let adaptation = Inference::of(adaptation);
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut cache = KvCache::default();
    let (mut seen, mut generated) = (prompt.to_vec(), 0);
    let mut hidden = Some(extend(model, &seen, &mut cache, &adaptation)?);
    let options = TextOptions { stop: stop.to_vec(), ..Default::default() };
    let (mut answer, mut pieces) = (String::new(), TextStream::new(text, &options, prompt));
    let mut finish_reason = FinishReason::Length;
    let mut show = |piece: String| {
        if !piece.is_empty() {
            stream(&piece);
            answer.push_str(&piece);
        }
    };
    while generated < max_tokens {
        let Some(h) = &hidden else { break };
        let last = h.narrow(0, h.dim(0)? - 1, 1)?;
        let logits = model.logits(&last, &adaptation)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let token = sampling.draw(&logits, seen.split_at(prompt.len()), &mut rng);
        generated += 1;
        seen.push(token);
        if text.eos_ids.contains(&token) {
            finish_reason = FinishReason::Stop;
            break;
        }
        show(pieces.push(token)?);
        if pieces.stopped() {
            finish_reason = FinishReason::Stop;
            break;
        }
        if generated < max_tokens {
            hidden = Some(extend(model, &seen, &mut cache, &adaptation)?);
        }
    }
    show(pieces.finish()?);
    if pieces.stopped() {
        finish_reason = FinishReason::Stop;
    }
    Ok(Generation { text: answer, tokens: generated, finish_reason, prompt_tokens: prompt.len() })
}
