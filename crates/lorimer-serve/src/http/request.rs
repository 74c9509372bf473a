//! What a chat or a completion asks for: every field is honoured, asks for nothing by its value, or is refused by name.

mod ask;
mod form;
mod inert;
mod tools;

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use self::inert::finish;
use super::app::App;
use super::error::ApiError;
use super::fields::{Field, Fields, Texts, wrong};
use crate::adapters::hosted::Hosted;

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
        /// What the answer is held to: `{"type": "json_object"}`, or `{"type": "json_schema", "json_schema": {"name": …, "schema": …}}`.
        #[schema(value_type = Option<Object>)]
        response_format: Value,
        /// The same with one of `json` (a schema), `json_object`, `regex`, `choice` and `grammar` (in Lark's syntax, or llama.cpp's) (vLLM).
        #[schema(value_type = Option<Object>)]
        structured_outputs: Value,
        /// A JSON schema that the answer fits (vLLM).
        #[schema(value_type = Option<Object>)]
        guided_json: Value,
        /// The same (llama.cpp).
        #[schema(value_type = Option<Object>)]
        json_schema: Value,
        /// A regular expression that the whole answer matches (vLLM).
        guided_regex: String,
        /// Texts of which the answer is one (vLLM).
        guided_choice: Vec<String>,
        /// A grammar in Lark's syntax, or in llama.cpp's, that gives the answer (vLLM).
        guided_grammar: String,
        /// A grammar in llama.cpp's syntax (GBNF) that gives the answer (llama.cpp).
        grammar: String,
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
        /// `auto`, `none` for a prompt without the tools, `required`, or `{"type": "function", "function": {"name": …}}`.
        #[schema(value_type = Option<Object>)]
        tool_choice: Value,
        /// Whether the answer may call several tools; it ends after the first call where this is false.
        parallel_tool_calls: bool,
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

fields! {
    /// Fields of `POST /tokenize` beside those of a conversation.
    Tokenize {
        /// The base, an adapter, or BASE:ADAPTER: whose chat template writes `messages`.
        model: String,
        /// A text; either this or `messages` (vLLM).
        prompt: String,
        /// The same (llama.cpp).
        content: String,
        /// Whether the tokenizer puts its special tokens around the text (vLLM): true for `prompt`, false for `messages`, whose template brings its own.
        add_special_tokens: bool,
        /// The same for `content` (llama.cpp); false where it is not given.
        add_special: bool,
        /// Whether to tell the tokens as the vocabulary writes them, in `token_strs` (vLLM).
        return_token_strs: bool,
        /// Whether `tokens` are objects with `id` and `piece` (llama.cpp).
        with_pieces: bool,
    }
}

fields! {
    /// `POST /detokenize`.
    Detokenize {
        /// The base or an adapter.
        model: String,
        /// Tokens.
        #[schema(required = true)]
        tokens: Vec<u32>,
    }
}

/// `POST /tokenize`: a text, or a conversation.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct TokenizeRequest {
    /// Its own fields.
    #[serde(flatten)]
    pub own: Tokenize,
    /// Fields of a conversation.
    #[serde(flatten)]
    pub chat: Chat,
}

impl TokenizeRequest {
    /// From a body.
    pub fn read(mut body: Fields) -> Result<Self, ApiError> {
        let request = Self { own: Tokenize::read(&mut body)?, chat: Chat::read(&mut body)? };
        finish(&body)?;
        let given = [request.own.prompt.is_some(), request.own.content.is_some(), request.chat.messages.is_some()];
        if given.iter().filter(|given| **given).count() != 1 {
            return Err(ApiError::field(
                "prompt",
                "one of `prompt`, `content` and `messages` says what becomes tokens",
            ));
        }
        Ok(request)
    }
}

impl Detokenize {
    /// From a body.
    pub fn of(mut body: Fields) -> Result<Self, ApiError> {
        let request = Self::read(&mut body)?;
        finish(&body)?;
        match request.tokens {
            Some(_) => Ok(request),
            None => Err(ApiError::field("tokens", "`tokens` is missing")),
        }
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
    pub(super) fn longest(&self) -> (usize, usize) {
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
        own.demanded()?;
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
