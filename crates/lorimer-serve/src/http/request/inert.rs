//! Fields of other servers that this one takes where their value asks for nothing.

use serde_json::Value;

use crate::http::error::ApiError;
use crate::http::fields::{Fields, unknown};

/// Fields of other servers that this one takes where their value asks for nothing (JSON; `*` is any), and what to do instead.
const INERT: &[(&str, &[&str], &str)] = &[
    ("echo", &["false"], "ask /v1/completions"),
    ("best_of", &["1"], "ask /v1/completions"),
    ("use_beam_search", &["false"], "beams are not searched"),
    ("length_penalty", &["1"], "beams are not searched"),
    ("early_stopping", &["false"], "beams are not searched"),
    ("spaces_between_special_tokens", &["true"], "leave it out"),
    ("prompt_logprobs", &[], "ask /v1/completions with `echo` and `logprobs`"),
    ("return_token_ids", &["false"], "ask for `logprobs` with `return_tokens_as_token_ids`"),
    ("bad_words", &["[]"], "ban tokens with `logit_bias`"),
    ("priority", &["0"], "requests are served by tenant; see `user`"),
    ("suffix", &["\"\""], "text is not filled in between"),
    ("store", &["false"], "answers are not stored"),
    ("metadata", &["{}"], "answers are not stored"),
    ("service_tier", &["\"auto\"", "\"default\""], "there is one tier"),
    ("modalities", &[r#"["text"]"#], "answers are text"),
    ("audio", &[], "answers are text"),
    ("prediction", &[], "answers are not predicted"),
    ("functions", &["[]"], "give `tools`"),
    ("function_call", &["\"none\"", "\"auto\""], "give `tools`"),
    ("parallel_tool_calls", &["*"], ""),
    ("reasoning_effort", &[], "hand it to a template that knows it, in `chat_template_kwargs`"),
    ("verbosity", &["\"medium\""], "say in a message how long the answer should be"),
    ("web_search_options", &[], "nothing is searched"),
    ("prompt_cache_key", &["*"], ""),
    ("prompt_cache_retention", &["\"in_memory\"", "\"in-memory\""], "prompts are kept while there is room"),
    ("chat_template", &[], "templates come with the base or the adapter"),
    ("mm_processor_kwargs", &["{}"], "the model reads text"),
    ("n_predict", &[], "give `max_tokens`"),
    ("repeat_penalty", &["1"], "give `repetition_penalty`, which counts prompt and answer"),
    ("repeat_last_n", &["*"], ""),
    ("typical_p", &["1"], SAMPLERS),
    ("tfs_z", &["1"], SAMPLERS),
    ("mirostat", &["0"], SAMPLERS),
    ("mirostat_tau", &["*"], ""),
    ("mirostat_eta", &["*"], ""),
    ("xtc_probability", &["0"], SAMPLERS),
    ("xtc_threshold", &["*"], ""),
    ("dry_multiplier", &["0"], SAMPLERS),
    ("dry_base", &["*"], ""),
    ("dry_allowed_length", &["*"], ""),
    ("dry_penalty_last_n", &["*"], ""),
    ("dry_sequence_breakers", &["*"], ""),
    ("dynatemp_range", &["0"], SAMPLERS),
    ("dynatemp_exponent", &["*"], ""),
    ("samplers", &[], SAMPLERS),
    ("n_keep", &["0"], "prompts are not shortened unasked; see `truncate_prompt_tokens`"),
    ("n_probs", &["0"], "give `logprobs`"),
    ("min_keep", &["0"], SAMPLERS),
    ("cache_prompt", &["true"], "start the server with --no-prefix-cache"),
    ("id_slot", &["-1"], "there are no slots"),
    ("timings_per_token", &["false"], "see /metrics"),
    ("return_progress", &["false"], "see /metrics"),
    ("post_sampling_probs", &["false"], "log-probabilities are those before sampling"),
];

const SAMPLERS: &str = "see docs/serving.md for how tokens can be drawn";

/// Whether two JSON values say the same, 1 and 1.0 being one number.
fn alike(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

/// Refuses what is left of a body, except where it asks for nothing.
pub(super) fn finish(body: &Fields) -> Result<(), ApiError> {
    for (name, value) in body.rest() {
        let Some((_, inert, instead)) = INERT.iter().find(|(known, ..)| *known == name) else {
            return Err(unknown(&name));
        };
        let nothing =
            |text: &&str| *text == "*" || serde_json::from_str(text).is_ok_and(|inert: Value| alike(&inert, value));
        if !inert.iter().any(nothing) {
            let taken = if inert.is_empty() { String::new() } else { format!(" except as {}", inert.join(" or ")) };
            return Err(ApiError::field(&name, format!("`{name}` is not supported{taken}: {instead}")));
        }
    }
    Ok(())
}
