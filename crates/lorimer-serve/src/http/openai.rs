//! OpenAI's calls: models, completions and chat completions, with the ways in which others name an adapter.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::answer::{Answers, Piece};
use super::error::{ApiError, Failure};
use super::{App, Body, client};
use crate::engine::{Request, Token};
use crate::generate::FinishReason;
use crate::hosted::Hosted;
use crate::sampling::Sampling;
use crate::scheduler::Tenant;

/// Most choices of one request.
pub(super) const MAX_CHOICES: usize = 16;
/// Most stop texts, and the longest.
const MAX_STOPS: (usize, usize) = (16, 200);
/// Most adapters of one request.
const MAX_ADAPTERS: usize = 16;
/// Most likely tokens that are told with each.
const MAX_LOGPROBS: usize = 20;
/// Tokens of an answer where none are asked for.
const DEFAULT_TOKENS: usize = 256;

/// One of several adapters of a request.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct Weighted {
    /// The adapter's name.
    id: String,
    /// What its change is multiplied by.
    #[serde(default = "one")]
    scale: f32,
}

fn one() -> f32 {
    1.0
}

/// One text or several.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    fn all(self) -> Vec<String> {
        match self {
            Self::One(one) => vec![one],
            Self::Many(many) => many,
        }
    }
}

/// How a stream is sent.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
struct StreamOptions {
    /// Whether a last event tells the tokens.
    #[serde(default)]
    include_usage: bool,
}

/// What chats and completions have in common.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct Common {
    /// The base, an adapter, or BASE:ADAPTER.
    model: Option<String>,
    /// An adapter (LoRAX); `adapter` means the same.
    #[serde(alias = "adapter")]
    adapter_id: Option<String>,
    /// A weighted sum of adapters (llama.cpp).
    lora: Option<Vec<Weighted>>,
    /// Most tokens of the answer.
    max_tokens: Option<usize>,
    /// The same, and goes before it.
    max_completion_tokens: Option<usize>,
    /// 0 takes the likeliest token; 1 where none is given.
    temperature: Option<f64>,
    /// Only the likeliest tokens that together reach this probability.
    top_p: Option<f64>,
    /// Only the k likeliest tokens; 0 or -1 for all.
    top_k: Option<i64>,
    /// Only tokens at least this times as likely as the likeliest.
    min_p: Option<f64>,
    /// Logits of tokens seen before are divided (if positive) or multiplied by this.
    repetition_penalty: Option<f64>,
    /// Taken off a token's logit for each time that the answer has it already.
    frequency_penalty: Option<f64>,
    /// Taken off the logit of a token that the answer has already.
    presence_penalty: Option<f64>,
    /// The same seed draws the same tokens.
    seed: Option<i64>,
    /// Answers to each prompt, 1 to 16.
    n: Option<usize>,
    /// Texts that end the answer, up to 16.
    stop: Option<OneOrMany>,
    /// Whether to go on after the token that ends a text.
    #[serde(default)]
    ignore_eos: bool,
    /// Whether the answer comes as server-sent events.
    #[serde(default)]
    stream: bool,
    stream_options: Option<StreamOptions>,
    /// For whom it is: what a client gets is shared fairly among those that it names.
    user: Option<String>,
}

/// `POST /v1/chat/completions`.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct ChatRequest {
    /// Messages with `role` and `content`, at least one.
    #[schema(value_type = Vec<Object>)]
    messages: Vec<Value>,
    /// Tools, handed to the chat template.
    #[schema(value_type = Option<Vec<Object>>)]
    tools: Option<Value>,
    /// Whether to tell log-probabilities.
    #[serde(default)]
    logprobs: bool,
    /// How many of the likeliest tokens to tell with each, up to 20.
    top_logprobs: Option<usize>,
    #[serde(flatten)]
    common: Common,
}

/// A text or its tokens, one prompt or several.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    ManyTokens(Vec<Vec<u32>>),
}

impl Prompt {
    /// Refuses what is too many or too long, whatever its tokens are.
    fn check(&self, app: &App) -> Result<(), ApiError> {
        let (count, longest) = match self {
            Self::Text(text) => (1, text.len()),
            Self::Texts(texts) => (texts.len(), texts.iter().map(String::len).max().unwrap_or(0)),
            Self::Tokens(ids) => {
                app.base.model.check_length(ids.len()).map_err(|e| ApiError::invalid(e.to_string()))?;
                (1, 0)
            }
            Self::ManyTokens(all) => {
                let longest = all.iter().map(Vec::len).max().unwrap_or(0);
                app.base.model.check_length(longest).map_err(|e| ApiError::invalid(e.to_string()))?;
                (all.len(), 0)
            }
        };
        if count == 0 || count > MAX_CHOICES {
            return Err(ApiError::invalid(format!("{count} prompts, 1 to {MAX_CHOICES} are answered")));
        }
        app.fits(longest)
    }
}

/// `POST /v1/completions`.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct CompletionRequest {
    prompt: Prompt,
    /// Whether the answer begins with the prompt.
    #[serde(default)]
    echo: bool,
    /// How many of the likeliest tokens to tell with each, up to 20.
    logprobs: Option<usize>,
    #[serde(flatten)]
    common: Common,
}

/// Adapters with their weights, as the engine takes them, and their names.
type Adapters = (Vec<(Arc<Hosted>, f32)>, Vec<String>);

impl Common {
    /// Names of the adapters asked for, with their weights: by `lora`, `adapter_id`, `model` = `base:adapter`, or `model` = adapter.
    fn adapters(&self, app: &App) -> Result<Vec<(String, f32)>, ApiError> {
        let model = self.model.as_deref().unwrap_or_default();
        let base = model.is_empty() || app.is_base(model);
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
        named.extend(self.adapter_id.iter().map(|name| (name.clone(), 1.0)));
        // `model` may say the same again, as some clients do.
        named.extend(own.filter(|own| !named.iter().any(|(name, _)| name == own)).map(|name| (name, 1.0)));
        if named.len() > MAX_ADAPTERS {
            return Err(ApiError::invalid(format!(
                "{} adapters, at most {MAX_ADAPTERS} are put together",
                named.len()
            )));
        }
        Ok(named)
    }

    fn sampling(&self) -> Result<Sampling, ApiError> {
        let top_k = match self.top_k.unwrap_or(0) {
            // Where -1 stands for all.
            -1 => 0,
            k => usize::try_from(k).map_err(|_| ApiError::invalid(format!("top_k {k} should be 0 or more")))?,
        };
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(1.0),
            top_k,
            top_p: self.top_p.unwrap_or(1.0),
            min_p: self.min_p.unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
            frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
        };
        let named = |problem: String| ApiError::invalid(problem.trim_start_matches("--").replacen('-', "_", 1));
        sampling.check().map(|()| sampling).map_err(named)
    }

    fn stops(&self) -> Result<Vec<String>, ApiError> {
        let stops = self.stop.clone().map(OneOrMany::all).unwrap_or_default();
        if stops.len() > MAX_STOPS.0 || stops.iter().any(|s| s.is_empty() || s.len() > MAX_STOPS.1) {
            let (most, longest) = MAX_STOPS;
            return Err(ApiError::invalid(format!("stop should be at most {most} texts of 1 to {longest} bytes")));
        }
        Ok(stops)
    }

    /// The engine's requests: `n` for each prompt.
    fn requests(
        &self,
        app: &App,
        prompts: Vec<Vec<u32>>,
        adapters: &Adapters,
        log_probabilities: Option<usize>,
        tenant: &str,
    ) -> Result<Vec<Request>, ApiError> {
        let n = self.n.unwrap_or(1);
        if n == 0 || n.saturating_mul(prompts.len()) > MAX_CHOICES {
            return Err(ApiError::invalid(format!("n times the prompts should be from 1 to {MAX_CHOICES}")));
        }
        if log_probabilities.is_some_and(|n| n > MAX_LOGPROBS) {
            return Err(ApiError::invalid(format!("at most {MAX_LOGPROBS} log-probabilities are told with a token")));
        }
        let sampling = self.sampling()?;
        let seed = self.seed.map_or_else(|| app.random(), |seed| seed as u64);
        let asked = self.max_completion_tokens.or(self.max_tokens);
        let longest = app.base.model.config.max_positions;
        let mut requests = Vec::new();
        for prompt in prompts {
            // Unasked, an answer gets what room there is.
            let room = longest.saturating_sub(prompt.len());
            let max_tokens = asked.unwrap_or(DEFAULT_TOKENS.min(room).max(1));
            for i in 0..n {
                requests.push(Request {
                    prompt: prompt.clone(),
                    adapters: adapters.0.clone(),
                    max_tokens,
                    sampling: sampling.clone(),
                    seed: seed.wrapping_add(i as u64),
                    stop: if self.ignore_eos { Vec::new() } else { app.base.text.eos_ids.clone() },
                    log_probabilities,
                    tenant: Tenant { client: client(), user: tenant.into() },
                    names: adapters.1.clone(),
                });
            }
        }
        Ok(requests)
    }

    fn tenant(&self) -> String {
        self.user.as_deref().unwrap_or_default().chars().take(100).collect()
    }
}

fn reason(finish: FinishReason) -> &'static str {
    match finish {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

/// How one of the two calls writes its answers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Chat,
    Completion,
}

/// What goes around every piece.
struct Shape {
    kind: Kind,
    id: String,
    created: u64,
    model: String,
    prompt_tokens: usize,
    logprobs: bool,
}

impl Shape {
    fn new(app: &App, kind: Kind, model: Option<&String>, requests: &[Request], logprobs: bool, n: usize) -> Self {
        let prefix = if kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
        Self {
            kind,
            id: format!("{prefix}-{:016x}", app.random()),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            model: model.cloned().unwrap_or_else(|| app.name.clone()),
            prompt_tokens: requests.iter().step_by(n.max(1)).map(|r| r.prompt.len()).sum(),
            logprobs,
        }
    }

    fn envelope(&self, object: &str, choices: Value) -> Value {
        json!({ "id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices })
    }

    fn usage(&self, completion: usize) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
        })
    }

    /// Log-probabilities of some tokens in the form of the call; `offset` is the number of characters before the first of them.
    fn logprobs(&self, app: &App, tokens: &[Token], offset: usize) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        let text = |id: u32| app.base.text.decode(&[id], true).unwrap_or_default();
        let told = |(id, p): (u32, f32)| json!({ "token": text(id), "logprob": p, "bytes": text(id).as_bytes() });
        let own = |t: &Token| (t.token, t.log_probability.unwrap_or(0.0));
        match self.kind {
            Kind::Chat => {
                let one = |t: &Token| {
                    let mut entry = told(own(t));
                    entry["top_logprobs"] = t.top.iter().map(|&top| told(top)).collect();
                    entry
                };
                json!({ "content": tokens.iter().map(one).collect::<Vec<_>>() })
            }
            Kind::Completion => json!({
                "text_offset": tokens.iter().scan(offset, |at, t| {
                    Some(std::mem::replace(at, *at + text(t.token).chars().count()))
                }).collect::<Vec<_>>(),
                "tokens": tokens.iter().map(|t| text(t.token)).collect::<Vec<_>>(),
                "token_logprobs": tokens.iter().map(|t| own(t).1).collect::<Vec<_>>(),
                "top_logprobs": tokens.iter().map(|t| {
                    t.top.iter().map(|&(id, p)| (text(id), p)).collect::<BTreeMap<_, _>>()
                }).collect::<Vec<_>>(),
            }),
        }
    }

    /// A whole choice.
    fn choice(
        &self,
        app: &App,
        (index, offset): (usize, usize),
        text: &str,
        tokens: &[Token],
        finish: FinishReason,
    ) -> Value {
        let logprobs = self.logprobs(app, tokens, offset);
        match self.kind {
            Kind::Chat => json!({
                "index": index,
                "message": { "role": "assistant", "content": text },
                "logprobs": logprobs,
                "finish_reason": reason(finish),
            }),
            Kind::Completion => {
                json!({ "index": index, "text": text, "logprobs": logprobs, "finish_reason": reason(finish) })
            }
        }
    }

    /// A piece of a choice, for a stream; `offset` is the number of characters before its tokens.
    fn chunk(&self, app: &App, piece: &Piece, first: bool, offset: usize) -> Value {
        let (logprobs, finish) = (self.logprobs(app, &piece.tokens, offset), piece.finish.map(reason));
        match self.kind {
            Kind::Chat => {
                let mut delta = json!({ "content": piece.text });
                if first {
                    delta["role"] = "assistant".into();
                }
                let choice =
                    json!({ "index": piece.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish });
                self.envelope("chat.completion.chunk", json!([choice]))
            }
            Kind::Completion => {
                let choice =
                    json!({ "index": piece.index, "text": piece.text, "logprobs": logprobs, "finish_reason": finish });
                self.envelope("text_completion", json!([choice]))
            }
        }
    }

    fn object(&self) -> &'static str {
        match self.kind {
            Kind::Chat => "chat.completion",
            Kind::Completion => "text_completion",
        }
    }
}

/// `POST /v1/chat/completions`.
#[utoipa::path(post, path = "/v1/chat/completions", tag = "inference", request_body = ChatRequest, responses((status = 200, description = "OpenAI's `chat.completion`, or server-sent `chat.completion.chunk` events", body = Object), (status = "4XX", description = "Refused", body = Failure), (status = 503, description = "Overloaded or stopping; `Retry-After` says for how long", body = Failure)))]
pub async fn chat(State(app): State<Arc<App>>, Body(request): Body<ChatRequest>) -> Result<Response, ApiError> {
    if request.messages.is_empty() {
        return Err(ApiError::invalid("messages should hold at least one message"));
    }
    app.fits(request.messages.iter().chain(&request.tools).map(length).sum())?;
    let adapters = app.adapters(request.common.adapters(&app)?).await?;
    let template = adapters.0.iter().find_map(|(a, _)| a.template.is_some().then(|| a.clone()));
    let (base, messages, tools) = (app.base.clone(), request.messages.clone(), request.tools.clone());
    let prompt = app
        .text
        .within(move || {
            let template = match template.as_ref().and_then(|a| a.template.as_ref()) {
                Some(own) => own,
                None => base.text.needed_template().map_err(|e| ApiError::invalid(e.to_string()))?,
            };
            let messages: Vec<Value> = messages.iter().map(plain_content).collect();
            let text = template.render(&messages, tools.as_ref(), true);
            let encoded = text.and_then(|text| base.text.encode(&text, false));
            encoded.map(|e| e.ids).map_err(|e| ApiError::invalid(e.to_string()))
        })
        .await?;
    let told = request.logprobs.then(|| request.top_logprobs.unwrap_or(0));
    respond(&app, Kind::Chat, &request.common, vec![prompt], adapters, told, None).await
}

/// Bytes of the texts in a value.
fn length(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(all) => all.iter().map(length).sum(),
        Value::Object(all) => all.iter().map(|(name, value)| name.len() + length(value)).sum(),
        _ => 0,
    }
}

/// Content that comes in parts as one text, which is what templates of text models take.
fn plain_content(message: &Value) -> Value {
    let mut message = message.clone();
    if let Some(Value::Array(parts)) = message.get("content") {
        let text: Vec<&str> = parts.iter().filter_map(|p| p.get("text")?.as_str()).collect();
        message["content"] = text.concat().into();
    }
    message
}

/// `POST /v1/completions`.
#[utoipa::path(post, path = "/v1/completions", tag = "inference", request_body = CompletionRequest, responses((status = 200, description = "OpenAI's `text_completion`, whole or as server-sent events", body = Object), (status = "4XX", description = "Refused", body = Failure), (status = 503, description = "Overloaded or stopping; `Retry-After` says for how long", body = Failure)))]
pub async fn completions(
    State(app): State<Arc<App>>,
    Body(request): Body<CompletionRequest>,
) -> Result<Response, ApiError> {
    request.prompt.check(&app)?;
    let adapters = app.adapters(request.common.adapters(&app)?).await?;
    let (base, prompt) = (app.base.clone(), request.prompt.clone());
    let (prompts, texts) = app
        .text
        .within(move || {
            let encode = |text: &String| {
                base.text.encode(text, true).map(|e| e.ids).map_err(|e| ApiError::invalid(e.to_string()))
            };
            let decode = |ids: &Vec<u32>| base.text.decode(ids, false).unwrap_or_default();
            Ok(match prompt {
                Prompt::Text(text) => (vec![encode(&text)?], vec![text]),
                Prompt::Texts(texts) => (texts.iter().map(encode).collect::<Result<Vec<_>, _>>()?, texts),
                Prompt::Tokens(ids) => (vec![ids.clone()], vec![decode(&ids)]),
                Prompt::ManyTokens(all) => (all.clone(), all.iter().map(decode).collect()),
            })
        })
        .await?;
    let echo = request.echo.then_some(texts);
    respond(&app, Kind::Completion, &request.common, prompts, adapters, request.logprobs, echo).await
}

async fn respond(
    app: &Arc<App>,
    kind: Kind,
    common: &Common,
    prompts: Vec<Vec<u32>>,
    adapters: Adapters,
    log_probabilities: Option<usize>,
    echo: Option<Vec<String>>,
) -> Result<Response, ApiError> {
    let (n, stops, tenant) = (common.n.unwrap_or(1), common.stops()?, common.tenant());
    let requests = common.requests(app, prompts, &adapters, log_probabilities, &tenant)?;
    let choices = requests.len();
    let shape = Shape::new(app, kind, common.model.as_ref(), &requests, log_probabilities.is_some(), n);
    let mut answers = Answers::start(&app.worker, &app.base, requests, stops).await?;
    let echoed = move |index: usize| echo.as_ref().and_then(|all| all.get(index / n)).cloned().unwrap_or_default();
    if common.stream {
        // Refusals are known with the first piece, and then still have a status of their own.
        let first = answers.next().await.unwrap_or_else(|| Err(super::error::stopping()))?;
        let usage = common.stream_options.as_ref().is_some_and(|o| o.include_usage);
        return Ok(stream(app.clone(), shape, answers, first, (choices, usage), echoed));
    }
    let mut texts: Vec<(String, Vec<Token>, Option<FinishReason>)> =
        (0..choices).map(|i| (echoed(i), Vec::new(), None)).collect();
    let offsets: Vec<usize> = texts.iter().map(|(text, ..)| text.chars().count()).collect();
    while let Some(piece) = answers.next().await {
        let piece = piece?;
        let (text, tokens, finish) = &mut texts[piece.index];
        text.push_str(&piece.text);
        tokens.extend(piece.tokens);
        *finish = finish.or(piece.finish);
    }
    let generated = texts.iter().map(|(_, tokens, _)| tokens.len()).sum();
    let all = texts.iter().zip(offsets).enumerate().map(|(i, ((text, tokens, finish), offset))| {
        shape.choice(app, (i, offset), text, tokens, finish.unwrap_or(FinishReason::Length))
    });
    let mut body = shape.envelope(shape.object(), all.collect());
    body["usage"] = shape.usage(generated);
    Ok(Json(body).into_response())
}

/// Server-sent events, one a piece, `[DONE]` at the end.
fn stream(
    app: Arc<App>,
    shape: Shape,
    answers: Answers,
    first: Piece,
    (choices, usage): (usize, bool),
    echoed: impl Fn(usize) -> String + Send + 'static,
) -> Response {
    enum Next {
        Piece(Piece),
        Wait,
        Done,
        Over,
    }
    struct Sending<E> {
        app: Arc<App>,
        shape: Shape,
        answers: Answers,
        next: Next,
        begun: Vec<bool>,
        /// Characters of each choice so far.
        offsets: Vec<usize>,
        generated: usize,
        usage: bool,
        echoed: E,
    }
    let begun = vec![false; choices];
    let offsets = (0..choices).map(|i| echoed(i).chars().count()).collect();
    let start = Sending { app, shape, answers, next: Next::Piece(first), begun, offsets, generated: 0, usage, echoed };
    let events = futures_util::stream::unfold(start, |mut s| async move {
        loop {
            let piece = match std::mem::replace(&mut s.next, Next::Wait) {
                Next::Over => return None,
                Next::Done => {
                    s.next = Next::Over;
                    return Some((Ok::<_, Infallible>(Event::default().data("[DONE]")), s));
                }
                Next::Piece(piece) => Some(Ok(piece)),
                Next::Wait => s.answers.next().await,
            };
            let data = match piece {
                Some(Ok(mut piece)) => {
                    s.generated += piece.tokens.len();
                    let first = !std::mem::replace(&mut s.begun[piece.index], true);
                    if first {
                        piece.text.insert_str(0, &(s.echoed)(piece.index));
                    }
                    let data = s.shape.chunk(&s.app, &piece, first, s.offsets[piece.index]);
                    let told = |t: &Token| s.app.base.text.decode(&[t.token], true).unwrap_or_default().chars().count();
                    s.offsets[piece.index] += piece.tokens.iter().map(told).sum::<usize>();
                    data
                }
                Some(Err(error)) => {
                    s.next = Next::Done;
                    error.body()
                }
                None if s.usage => {
                    s.next = Next::Done;
                    let object = if s.shape.kind == Kind::Chat { "chat.completion.chunk" } else { "text_completion" };
                    let mut last = s.shape.envelope(object, json!([]));
                    last["usage"] = s.shape.usage(s.generated);
                    last
                }
                None => {
                    s.next = Next::Done;
                    continue;
                }
            };
            return Some((Ok(Event::default().data(data.to_string())), s));
        }
    });
    Sse::new(events).keep_alive(KeepAlive::default()).into_response()
}

/// `GET /v1/models`.
#[utoipa::path(get, path = "/v1/models", tag = "inference", responses((status = 200, description = "The base and its adapters", body = Object)))]
pub async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    let entry = |id: &str, parent: Option<&str>, root: &str| json!({ "id": id, "object": "model", "created": app.started, "owned_by": "lorimer", "root": root, "parent": parent });
    let mut data = vec![entry(&app.name, None, &app.name)];
    for listed in app.store.iter().flat_map(|store| store.list()) {
        data.push(entry(&listed.name, Some(&app.name), &listed.name));
    }
    Json(json!({ "object": "list", "data": data }))
}

/// `GET /v1/models/{name}`.
#[utoipa::path(get, path = "/v1/models/{name}", tag = "inference", params(("name" = String, Path, description = "The base or an adapter; may hold `/`")), responses((status = 200, description = "A model", body = Object), (status = 404, description = "There is none", body = Failure)))]
pub async fn model(
    State(app): State<Arc<App>>,
    axum::extract::Path(name): axum::extract::Path<String>,
) -> Result<Json<Value>, ApiError> {
    let is_base = app.is_base(&name);
    if !is_base && !app.store.as_ref().is_some_and(|store| store.contains(&name)) {
        let message = "there is no model of that name; GET /v1/models lists what there is";
        return Err(ApiError::new(StatusCode::NOT_FOUND, "adapter_not_found", message));
    }
    let parent = (!is_base).then_some(&app.name);
    Ok(Json(json!({
        "id": name, "object": "model", "created": app.started, "owned_by": "lorimer", "root": name, "parent": parent,
    })))
}
