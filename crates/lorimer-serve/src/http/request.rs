//! What a chat or a completion asks for: every field is honoured, asks for nothing by its value, or is refused by name.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::app::App;
use super::client::client;
use super::error::ApiError;
use super::fields::{Field, Fields, Texts, unknown, wrong};
use crate::adapters::hosted::Hosted;
use crate::engine::Request;
use crate::engine::scheduler::Tenant;
use crate::generation::sampling::Sampling;
use crate::generation::stream::TextOptions;

/// Most choices of one request.
pub const MAX_CHOICES: usize = 16;
/// Most stop texts, and the longest.
const MAX_STOPS: (usize, usize) = (16, 200);
/// Most adapters of one request.
const MAX_ADAPTERS: usize = 16;
/// Most likely tokens that are told with each.
const MAX_LOGPROBS: usize = 20;
/// Most tokens whose logits are changed.
const MAX_BIASES: usize = 1024;

/// Structs whose fields `read` takes out of a body; null and absent are alike.
macro_rules! fields {
    ($(#[$about:meta])* $name:ident { $($(#[$doc:meta])* $field:ident: $kind:ty,)* }) => {
        $(#[$about])*
        #[derive(Clone, Debug, Default, Serialize, ToSchema)]
        pub struct $name {
            $($(#[$doc])* pub $field: Option<$kind>,)*
        }

        impl $name {
            /// Takes its fields out of a body.
            fn read(body: &mut Fields) -> Result<Self, ApiError> {
                Ok(Self { $($field: body.take(stringify!($field))?,)* })
            }
        }
    };
}

fields! {
    /// What chats and completions have in common.
    Common {
        /// The base, an adapter, or BASE:ADAPTER.
        model: String,
        /// An adapter (LoRAX).
        adapter_id: String,
        /// The same as `adapter_id`.
        adapter: String,
        /// A weighted sum of adapters (llama.cpp).
        lora: Vec<Weighted>,
        /// Most tokens of the answer; as many as there is room for where none are asked for.
        max_tokens: usize,
        /// The same, and goes before it.
        max_completion_tokens: usize,
        /// Tokens that the answer has before anything ends it (vLLM).
        min_tokens: usize,
        /// 0 takes the likeliest token; 1 where none is given.
        temperature: f64,
        /// Only the likeliest tokens that together reach this probability.
        top_p: f64,
        /// Only the k likeliest tokens; 0 or -1 for all.
        top_k: i64,
        /// Only tokens at least this times as likely as the likeliest.
        min_p: f64,
        /// Logits of tokens seen before are divided (if positive) or multiplied by this.
        repetition_penalty: f64,
        /// Taken off a token's logit for each time that the answer has it already.
        frequency_penalty: f64,
        /// Taken off the logit of a token that the answer has already.
        presence_penalty: f64,
        /// Added to the logits of tokens, which are named by their numbers; -100 to 100.
        #[schema(value_type = Option<Object>)]
        logit_bias: Map<String, Value>,
        /// The only tokens that may be drawn (vLLM).
        allowed_token_ids: Vec<u32>,
        /// The same seed draws the same tokens.
        seed: i64,
        /// Answers to each prompt, 1 to 16.
        n: usize,
        /// Texts that end the answer, up to 16.
        stop: Texts,
        /// Tokens that end the answer (vLLM).
        stop_token_ids: Vec<u32>,
        /// Whether the text or token that ends the answer is a part of it (vLLM).
        include_stop_str_in_output: bool,
        /// Whether special tokens are left out of the text (vLLM); true where it is not given.
        skip_special_tokens: bool,
        /// Whether to go on after the token that ends a text.
        ignore_eos: bool,
        /// Whether log-probabilities name tokens as `token_id:NUMBER` (vLLM).
        return_tokens_as_token_ids: bool,
        /// Whether the tokenizer puts its special tokens around the prompt (vLLM): true for completions, false for chats, whose template brings
        /// its own.
        add_special_tokens: bool,
        /// Only so many of the prompt's last tokens; -1 for as many as the model takes (vLLM).
        truncate_prompt_tokens: i64,
        /// Whether the answer comes as server-sent events.
        stream: bool,
        /// How the events are sent; only with `stream`.
        stream_options: StreamOptions,
        /// For whom it is: what a client gets is shared fairly among those that it names.
        user: String,
        /// For whom it is where there is no `user`.
        safety_identifier: String,
    }
}

fields! {
    /// Fields of chats alone.
    Chat {
        /// Messages with `role` and `content`, at least one.
        #[schema(value_type = Vec<Object>, required = true)]
        messages: Vec<Value>,
        /// Tools, handed to the chat template.
        #[schema(value_type = Option<Vec<Object>>)]
        tools: Vec<Value>,
        /// `auto`, or `none` for a prompt without the tools.
        #[schema(value_type = Option<String>)]
        tool_choice: Value,
        /// Whether to tell log-probabilities.
        logprobs: bool,
        /// How many of the likeliest tokens to tell with each, up to 20; only with `logprobs`.
        top_logprobs: usize,
        /// Variables of the chat template, such as `enable_thinking` (vLLM).
        #[schema(value_type = Option<Object>)]
        chat_template_kwargs: Map<String, Value>,
        /// Documents, handed to the chat template (vLLM).
        #[schema(value_type = Option<Vec<Object>>)]
        documents: Vec<Value>,
        /// Whether the prompt ends where the answer begins (vLLM); true where it is not given.
        add_generation_prompt: bool,
        /// Whether the answer goes on with the last message (vLLM).
        continue_final_message: bool,
    }
}

fields! {
    /// Fields of completions alone.
    Completion {
        /// A text or its tokens, one prompt or several.
        #[schema(value_type = Prompt, required = true)]
        prompt: Prompt,
        /// Whether the answer begins with the prompt.
        echo: bool,
        /// How many of the likeliest tokens to tell with each, up to 20; with `echo` those of the prompt too.
        logprobs: usize,
        /// Answers that are generated for each prompt; those `n` of them are given whose tokens are likeliest on average.
        best_of: usize,
    }
}

/// `POST /v1/chat/completions`.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChatRequest {
    /// Fields of chats alone.
    #[serde(flatten)]
    pub own: Chat,
    /// What chats and completions have in common.
    #[serde(flatten)]
    pub common: Common,
}

/// `POST /v1/completions`.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct CompletionRequest {
    /// Fields of completions alone.
    #[serde(flatten)]
    pub own: Completion,
    /// What chats and completions have in common.
    #[serde(flatten)]
    pub common: Common,
}

/// One of several adapters of a request.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Weighted {
    /// The adapter's name.
    id: String,
    /// What its change is multiplied by; 1 where none is given.
    #[schema(value_type = Option<f32>)]
    scale: f32,
}

impl Field for Weighted {
    fn read(value: Value, at: &str) -> Result<Self, ApiError> {
        let mut fields = Fields::read(value, at)?;
        let weighted = Self { id: fields.needed("id")?, scale: fields.take("scale")?.unwrap_or(1.0) };
        fields.done().map(|()| weighted)
    }
}

/// How a stream is sent.
#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub struct StreamOptions {
    /// Whether a last event tells the tokens.
    #[schema(value_type = Option<bool>)]
    pub include_usage: bool,
    /// Whether every event tells the tokens so far (vLLM).
    #[schema(value_type = Option<bool>)]
    pub continuous_usage_stats: bool,
}

impl Field for StreamOptions {
    fn read(value: Value, at: &str) -> Result<Self, ApiError> {
        let mut fields = Fields::read(value, at)?;
        let mut flag = |name: &str| fields.take(name).map(Option::unwrap_or_default);
        let options =
            Self { include_usage: flag("include_usage")?, continuous_usage_stats: flag("continuous_usage_stats")? };
        if flag("include_obfuscation")? {
            let name = format!("{at}.include_obfuscation");
            return Err(ApiError::field(&name, format!("`{name}` is not offered; leave it out or false")));
        }
        fields.done().map(|()| options)
    }
}

/// A text or its tokens, one prompt or several.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Prompt {
    /// A text.
    Text(String),
    /// A text's tokens.
    Tokens(Vec<u32>),
    /// Texts.
    Texts(Vec<String>),
    /// Texts' tokens.
    ManyTokens(Vec<Vec<u32>>),
}

impl Field for Prompt {
    fn read(value: Value, at: &str) -> Result<Self, ApiError> {
        match &value {
            Value::String(_) => String::read(value, at).map(Self::Text),
            Value::Array(items) => match items.first() {
                Some(Value::String(_)) => Vec::read(value, at).map(Self::Texts),
                Some(Value::Number(_)) => Vec::read(value, at).map(Self::Tokens),
                Some(Value::Array(_)) => Vec::read(value, at).map(Self::ManyTokens),
                _ => Err(wrong(at, "a list of texts, of tokens or of lists of tokens", &value)),
            },
            _ => Err(wrong(at, "a text, its tokens, or a list of either", &value)),
        }
    }
}

impl Prompt {
    /// Bytes of the longest text, and tokens of the longest list.
    fn longest(&self) -> (usize, usize) {
        match self {
            Self::Text(text) => (text.len(), 0),
            Self::Texts(texts) => (texts.iter().map(String::len).max().unwrap_or(0), 0),
            Self::Tokens(ids) => (0, ids.len()),
            Self::ManyTokens(all) => (0, all.iter().map(Vec::len).max().unwrap_or(0)),
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        match self {
            Self::Text(_) | Self::Tokens(_) => 1,
            Self::Texts(all) => all.len(),
            Self::ManyTokens(all) => all.len(),
        }
    }
}

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
    ("response_format", &[r#"{"type": "text"}"#], FORM),
    ("structured_outputs", &[], FORM),
    ("guided_json", &[], FORM),
    ("guided_regex", &[], FORM),
    ("guided_choice", &[], FORM),
    ("guided_grammar", &[], FORM),
    ("grammar", &["\"\""], FORM),
    ("json_schema", &[], FORM),
    ("suffix", &["\"\""], "text is not filled in between"),
    ("store", &["false"], "answers are not stored"),
    ("metadata", &["{}"], "answers are not stored"),
    ("service_tier", &["\"auto\"", "\"default\""], "there is one tier"),
    ("modalities", &[r#"["text"]"#], "answers are text"),
    ("audio", &[], "answers are text"),
    ("prediction", &[], "answers are not predicted"),
    ("functions", &["[]"], "give `tools`"),
    ("function_call", &["\"none\"", "\"auto\""], "give `tools`"),
    ("parallel_tool_calls", &["true"], "calls of tools are not restricted; answers come as the model writes them"),
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
const FORM: &str = "answers are not held to a form";
const SAMPLERS: &str = "see docs/serving.md for how tokens can be drawn";

/// Whether two JSON values say the same, 1 and 1.0 being one number.
fn alike(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

/// Refuses what is left of a body, except where it asks for nothing.
fn finish(body: &Fields) -> Result<(), ApiError> {
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

/// Refuses more log-probabilities than are told.
fn few(name: &str, n: Option<usize>) -> Result<(), ApiError> {
    match n {
        Some(n) if n > MAX_LOGPROBS => Err(ApiError::field(name, format!("`{name}` should be at most {MAX_LOGPROBS}"))),
        _ => Ok(()),
    }
}

impl ChatRequest {
    /// From a body.
    pub fn read(mut body: Fields) -> Result<Self, ApiError> {
        let request = Self { own: Chat::read(&mut body)?, common: Common::read(&mut body)? };
        finish(&body)?;
        let own = &request.own;
        if own.messages.as_ref().is_none_or(Vec::is_empty) {
            return Err(ApiError::field("messages", "`messages` should hold at least one message"));
        }
        few("top_logprobs", own.top_logprobs)?;
        if own.top_logprobs.is_some_and(|n| n > 0) && own.logprobs != Some(true) {
            return Err(ApiError::field("top_logprobs", "`top_logprobs` is told only where `logprobs` is true"));
        }
        if let Some(choice) = own.tool_choice.as_ref().filter(|c| *c != "auto" && *c != "none") {
            return Err(wrong("tool_choice", "\"auto\" or \"none\", since no call can be demanded", choice));
        }
        if own.continue_final_message == Some(true) && own.add_generation_prompt == Some(true) {
            let message = "`continue_final_message` and `add_generation_prompt` cannot both be true: the answer goes on with the last message or begins one";
            return Err(ApiError::field("continue_final_message", message));
        }
        request.common.check(1)?;
        Ok(request)
    }

    /// How many likely tokens to tell with each; None for no log-probabilities.
    pub fn log_probabilities(&self) -> Option<usize> {
        (self.own.logprobs == Some(true)).then(|| self.own.top_logprobs.unwrap_or(0))
    }
}

impl CompletionRequest {
    /// From a body.
    pub fn read(mut body: Fields) -> Result<Self, ApiError> {
        let request = Self { own: Completion::read(&mut body)?, common: Common::read(&mut body)? };
        finish(&body)?;
        let (own, n) = (&request.own, request.common.n.unwrap_or(1));
        let Some(prompt) = &own.prompt else { return Err(ApiError::field("prompt", "`prompt` is missing")) };
        few("logprobs", own.logprobs)?;
        if own.best_of.is_some_and(|best_of| best_of < n) {
            return Err(ApiError::field("best_of", "`best_of` should be at least `n`"));
        }
        if own.best_of.is_some_and(|best_of| best_of > n) && request.common.stream == Some(true) {
            return Err(ApiError::field("best_of", "the best answers are known only at the end; leave `stream` out"));
        }
        let each = own.best_of.unwrap_or(n);
        if each.saturating_mul(prompt.count()) > MAX_CHOICES {
            let message = format!("`n` or `best_of` times the prompts should be at most {MAX_CHOICES}");
            return Err(ApiError::field(if own.best_of.is_some() { "best_of" } else { "n" }, message));
        }
        // Without an answer the prompt's own log-probabilities are left.
        request.common.check(0)?;
        Ok(request)
    }
}

impl CompletionRequest {
    /// Refuses prompts that are too long, whatever their tokens are.
    pub fn check(&self, app: &App) -> Result<(), ApiError> {
        let (bytes, tokens) = self.own.prompt.as_ref().map_or((0, 0), Prompt::longest);
        if self.common.truncate_prompt_tokens.is_none() {
            app.base.model().check_cached_length(tokens).map_err(|e| ApiError::field("prompt", e.to_string()))?;
        }
        app.fits("prompt", bytes)
    }
}

/// Adapters with their weights, as the engine takes them, and their names.
pub type Adapters = (Vec<(Arc<Hosted>, f32)>, Vec<String>);

/// What is told of tokens, and how many answers are computed.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// How many likely tokens to tell with each; None for no log-probabilities.
    pub log_probabilities: Option<usize>,
    /// Whether of the prompt's tokens too.
    pub of_prompt: bool,
    /// Whether answers are ranked by the log-probabilities of their tokens.
    pub ranked: bool,
    /// Answers that are computed for each prompt.
    pub each: usize,
}

impl Common {
    /// Refuses what can be refused before anything is computed. `least` is the smallest number of tokens that may be asked for.
    fn check(&self, least: usize) -> Result<(), ApiError> {
        let asked = [("max_completion_tokens", self.max_completion_tokens), ("max_tokens", self.max_tokens)];
        for (name, asked) in asked {
            if asked.is_some_and(|n| n < least) {
                return Err(ApiError::field(name, format!("`{name}` should be at least {least}")));
            }
        }
        if self.max_tokens().zip(self.min_tokens).is_some_and(|(most, least)| least > most) {
            return Err(ApiError::field("min_tokens", "`min_tokens` should be at most `max_tokens`"));
        }
        if !(1..=MAX_CHOICES).contains(&self.n.unwrap_or(1)) {
            return Err(ApiError::field("n", format!("`n` should be from 1 to {MAX_CHOICES}")));
        }
        let (most, longest) = MAX_STOPS;
        let stops = self.stop.as_ref().map_or(&[][..], Texts::all);
        if stops.len() > most || stops.iter().any(|s| s.is_empty() || s.len() > longest) {
            let message = format!("`stop` should be at most {most} texts of 1 to {longest} bytes");
            return Err(ApiError::field("stop", message));
        }
        if self.stop_token_ids.as_ref().is_some_and(|ids| ids.len() > MAX_BIASES) {
            let message = format!("`stop_token_ids` should be at most {MAX_BIASES} tokens");
            return Err(ApiError::field("stop_token_ids", message));
        }
        if self.stream_options.is_some() && self.stream != Some(true) {
            return Err(ApiError::field("stream_options", "`stream_options` is taken only where `stream` is true"));
        }
        if self.truncate_prompt_tokens.is_some_and(|n| n < -1 || n == 0) {
            let message = "`truncate_prompt_tokens` should be at least 1, or -1 for as many as the model takes";
            return Err(ApiError::field("truncate_prompt_tokens", message));
        }
        if self.adapter.as_ref().zip(self.adapter_id.as_ref()).is_some_and(|(a, b)| a != b) {
            return Err(ApiError::field("adapter", "`adapter` and `adapter_id` mean the same; give one"));
        }
        if self.lora.as_ref().is_some_and(|all| all.len() > MAX_ADAPTERS) {
            return Err(ApiError::field("lora", format!("at most {MAX_ADAPTERS} adapters are put together")));
        }
        Ok(())
    }

    /// Most tokens of an answer, where there is a bound.
    fn max_tokens(&self) -> Option<usize> {
        self.max_completion_tokens.or(self.max_tokens)
    }

    /// Names of the adapters asked for, with their weights: by `lora`, `adapter_id`, `model` = `base:adapter`, or `model` = adapter.
    pub fn adapters(&self, app: &App) -> Result<Vec<(String, f32)>, ApiError> {
        let model = self.model.as_deref().unwrap_or_default();
        let base = model.is_empty() || app.is_base(model);
        if model != app.name && base && app.store.as_ref().is_some_and(|store| store.contains(model)) {
            let own = &app.name;
            let message = format!(
                "`{model}` stands for the base and for an adapter; ask for the base as `{own}`, for the adapter with `adapter_id` or as `{own}:{model}`"
            );
            return Err(ApiError::field("model", message));
        }
        let own = match base {
            true => None,
            false => Some(match model.split_once(':') {
                Some((base, name)) if app.is_base(base) => name.trim_start_matches(':').to_string(),
                _ => model.to_string(),
            }),
        };
        let mut named: Vec<(String, f32)> = Vec::new();
        for w in self.lora.iter().flatten() {
            named.push((w.id.clone(), w.scale));
        }
        named.extend(self.adapter_id.as_ref().or(self.adapter.as_ref()).map(|name| (name.clone(), 1.0)));
        // `model` may say the same again, as some clients do.
        named.extend(own.filter(|own| !named.iter().any(|(name, _)| name == own)).map(|name| (name, 1.0)));
        Ok(named)
    }

    fn sampling(&self, app: &App, ends: &[u32]) -> Result<Sampling, ApiError> {
        let top_k = match self.top_k.unwrap_or(0) {
            // Where -1 stands for all.
            -1 => 0,
            k => usize::try_from(k).map_err(|_| ApiError::field("top_k", "`top_k` should be 0 or more, or -1"))?,
        };
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(1.0),
            top_k,
            top_p: self.top_p.unwrap_or(1.0),
            min_p: self.min_p.unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
            frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
            logit_bias: self.biases(app)?,
            allowed: self.allowed(app)?,
            min_tokens: self.min_tokens.unwrap_or(0),
            ends: ends.to_vec(),
        };
        // It speaks as the command line does: `--top-p 2 should be …`.
        let named = |problem: String| {
            let (flag, rest) = problem.split_once(' ').unwrap_or((&problem, ""));
            let name = flag.trim_start_matches('-').replace('-', "_");
            ApiError::field(&name, format!("`{name}` {rest}"))
        };
        sampling.check().map(|()| sampling).map_err(named)
    }

    fn biases(&self, app: &App) -> Result<Vec<(u32, f32)>, ApiError> {
        let given = self.logit_bias.iter().flatten();
        if given.clone().count() > MAX_BIASES {
            return Err(ApiError::field("logit_bias", format!("`logit_bias` should be at most {MAX_BIASES} tokens")));
        }
        let of = |(token, bias): (&String, &Value)| {
            let at = format!("logit_bias.{}", token.chars().take(20).collect::<String>());
            let id = token.parse().map_err(|_| ApiError::field("logit_bias", format!("`{at}`: no token's number")))?;
            app.in_vocabulary("logit_bias", &[id])?;
            Ok((id, f32::read(bias.clone(), &at)?))
        };
        // A bias of null is none.
        given.filter(|(_, bias)| !bias.is_null()).map(of).collect()
    }

    fn allowed(&self, app: &App) -> Result<Option<Vec<u32>>, ApiError> {
        let Some(allowed) = &self.allowed_token_ids else { return Ok(None) };
        if allowed.is_empty() {
            return Err(ApiError::field("allowed_token_ids", "`allowed_token_ids` should hold at least one token"));
        }
        app.in_vocabulary("allowed_token_ids", allowed)?;
        Ok(Some(allowed.clone()))
    }

    /// How the answer's tokens become text.
    pub fn text(&self) -> TextOptions {
        TextOptions {
            stop: self.stop.as_ref().map_or(&[][..], Texts::all).to_vec(),
            keep_stop: self.include_stop_str_in_output.unwrap_or(false),
            special: !self.skip_special_tokens.unwrap_or(true),
            min_tokens: self.min_tokens.unwrap_or(0),
        }
    }

    /// Shortens a prompt as asked.
    pub fn truncate(&self, prompt: &mut Vec<u32>, longest: usize) {
        let keep = match self.truncate_prompt_tokens {
            None => return,
            // Room for the answer is left too.
            Some(-1) => longest.saturating_sub(self.max_tokens().unwrap_or(1).max(1)),
            Some(n) => usize::try_from(n).unwrap_or(usize::MAX),
        };
        prompt.drain(..prompt.len().saturating_sub(keep.max(1)));
    }

    /// The engine's requests, so many for each prompt.
    pub fn requests(
        &self,
        app: &App,
        prompts: Vec<Vec<u32>>,
        adapters: &Adapters,
        wanted: Wanted,
    ) -> Result<Vec<Request>, ApiError> {
        let mut stop = if self.ignore_eos == Some(true) { Vec::new() } else { app.base.text.eos_ids.clone() };
        let more = self.stop_token_ids.as_deref().unwrap_or_default();
        app.in_vocabulary("stop_token_ids", more)?;
        stop.extend(more);
        let sampling = self.sampling(app, &stop)?;
        let seed = self.seed.map_or_else(|| app.random(), |seed| seed as u64);
        let user = self.user.as_ref().or(self.safety_identifier.as_ref()).map_or("", String::as_str);
        let tenant = Tenant { client: client(), user: user.chars().take(100).collect::<String>().into() };
        let mut requests = Vec::new();
        for prompt in prompts {
            for i in 0..wanted.each {
                requests.push(Request {
                    prompt: prompt.clone(),
                    adapters: adapters.0.clone(),
                    max_tokens: self.max_tokens(),
                    sampling: sampling.clone(),
                    seed: seed.wrapping_add(i as u64),
                    stop: stop.clone(),
                    of_prompt: wanted.of_prompt,
                    log_probabilities: wanted.log_probabilities.or(wanted.ranked.then_some(0)),
                    tenant: tenant.clone(),
                    names: adapters.1.clone(),
                });
            }
        }
        Ok(requests)
    }
}
