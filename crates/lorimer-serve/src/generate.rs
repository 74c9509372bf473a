//! One prompt, one answer.

use candle_core::DType;
use lorimer_model::{Adaptation, Inference, KvCache, Llama, TextModel};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::sampling::Sampling;

/// Prompt tokens that go through the model at a time.
const PREFILL: usize = 512;

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end-of-turn token or a stop text.
    Stop,
    /// The limit of tokens.
    Length,
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

/// Answers a prompt. `stream` hears pieces of text as soon as they are certain not to begin a stop text.
#[allow(clippy::too_many_arguments)]
pub fn generate(
    model: &Llama,
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
    model.check_length(prompt.len().saturating_add(max_tokens))?;
    let adaptation = Inference(adaptation);
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut cache = KvCache::default();
    let (mut seen, mut generated) = (prompt.to_vec(), Vec::new());
    let mut hidden = None;
    for part in prompt.chunks(PREFILL) {
        hidden = Some(model.hidden_cached(part, &mut cache, &adaptation)?);
    }
    let (mut answer, mut shown) = (String::new(), 0);
    let mut finish_reason = FinishReason::Length;
    let longest_stop = stop.iter().map(String::len).max().unwrap_or(0);
    while generated.len() < max_tokens {
        let Some(h) = &hidden else { break };
        let last = h.narrow(0, h.dim(0)? - 1, 1)?;
        let logits = model.logits(&last, &adaptation)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let token = sampling.draw(&logits, &seen, &mut rng);
        generated.push(token);
        seen.push(token);
        if text.eos_ids.contains(&token) {
            finish_reason = FinishReason::Stop;
            break;
        }
        answer = text.decode(&generated, false)?;
        if let Some(at) = stop.iter().filter(|s| !s.is_empty()).filter_map(|s| answer.find(s.as_str())).min() {
            answer.truncate(at);
            finish_reason = FinishReason::Stop;
            break;
        }
        // A replacement character at the end is half of a letter whose other bytes are still to come.
        let certain = answer.trim_end_matches('\u{fffd}').len().saturating_sub(longest_stop.saturating_sub(1));
        let certain = (0..=certain).rev().find(|&i| answer.is_char_boundary(i)).unwrap_or(0);
        if certain > shown {
            stream(&answer[shown..certain]);
            shown = certain;
        }
        if generated.len() < max_tokens {
            hidden = Some(model.hidden_cached(&[token], &mut cache, &adaptation)?);
        }
    }
    if answer.len() > shown {
        stream(&answer[shown..]);
    }
    Ok(Generation { text: answer, tokens: generated.len(), finish_reason, prompt_tokens: prompt.len() })
}
