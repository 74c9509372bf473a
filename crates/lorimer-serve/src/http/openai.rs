//! OpenAI's calls: models, completions and chat completions, with the ways in which others name an adapter.

use std::convert::Infallible;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::answer::{Answers, Piece};
use super::app::App;
use super::body::Body;
use super::error::{ApiError, Failure};
use super::fields::Fields;
use super::prompts::{Given, chat_tokens, own_template, prompt, template_of};
use super::request::{Adapters, ChatRequest, Common, CompletionRequest, Prompt, StreamOptions, Wanted};
use super::shape::{Before, Kind, Place, Shape};
use super::traced::call;
use crate::generation::form::Form;
use crate::generation::generate::FinishReason;
use crate::generation::stream::TextOptions;
use crate::generation::tools::{CallReader, Dialect};
use crate::trace::span::list;

/// `POST /v1/chat/completions`.
#[utoipa::path(post, path = "/v1/chat/completions", tag = "inference", request_body = ChatRequest, responses((status = 200, description = "OpenAI's `chat.completion`, or server-sent `chat.completion.chunk` events", body = Object), (status = "4XX", description = "Refused", body = Failure), (status = 503, description = "Overloaded or stopping; `Retry-After` says for how long", body = Failure)))]
pub async fn chat(State(app): State<Arc<App>>, Body(fields): Body<Fields>) -> Result<Response, ApiError> {
    app.predicts()?;
    let request = ChatRequest::read(fields)?;
    request.own.fits(&app)?;
    let adapters = app.adapters(request.common.adapters(&app)?).await?;
    let (base, common, log_probabilities) = (app.base.clone(), request.common.clone(), request.log_probabilities());
    let (n, own) = (common.n.unwrap_or(1), request.own);
    let (callable, demanded, parallel) = (own.callable(), own.demanded()?, own.parallel_tool_calls.unwrap_or(true));
    let template = own_template(&adapters);
    let (prompt, dialect) = app
        .text
        .within(move || {
            let template = template_of(&base, template.as_deref(), &own)?;
            let dialect = Dialect::of(template.source());
            let mut ids = chat_tokens(&base.text, template, &own, request.common.add_special_tokens)?;
            request.common.truncate(&mut ids, base.model().shape().cached_positions());
            Ok((ids, dialect))
        })
        .await?;
    let mut form = common.form()?;
    if let Some((tools, one)) = demanded {
        if let Some((field, _)) = form {
            let message = format!(
                "`{field}` and a `tool_choice` that demands a call both say what the answer is to be; give one"
            );
            return Err(ApiError::field("tool_choice", message));
        }
        let dialect = dialect.ok_or_else(|| {
            ApiError::field(
                "tool_choice",
                "the chat template does not say how calls of tools are written, so that none can be demanded",
            )
        })?;
        let calls = dialect.form(&tools, one || !parallel, &app.base.text);
        form = Some(("tool_choice", calls.map_err(|problem| ApiError::field("tool_choice", problem))?));
    }
    let dialect = dialect.filter(|_| !callable.is_empty());
    let mut text = common.text();
    text.special |= dialect.is_some_and(Dialect::is_special);
    let calls = dialect.map(|dialect| CallReader::new(dialect, &callable, parallel));
    let wanted = Wanted { log_probabilities, of_prompt: false, ranked: false, each: n };
    respond(&app, Kind::Chat, &common, vec![(prompt, Before::default())], adapters, (wanted, form, text, calls)).await
}

/// `POST /v1/completions`.
#[utoipa::path(post, path = "/v1/completions", tag = "inference", request_body = CompletionRequest, responses((status = 200, description = "OpenAI's `text_completion`, whole or as server-sent events", body = Object), (status = "4XX", description = "Refused", body = Failure), (status = 503, description = "Overloaded or stopping; `Retry-After` says for how long", body = Failure)))]
pub async fn completions(State(app): State<Arc<App>>, Body(fields): Body<Fields>) -> Result<Response, ApiError> {
    app.predicts()?;
    let request = CompletionRequest::read(fields)?;
    request.check(&app)?;
    let adapters = app.adapters(request.common.adapters(&app)?).await?;
    let (own, common, base) = (request.own, request.common.clone(), app.base.clone());
    let (echo, n) = (own.echo.unwrap_or(false), common.n.unwrap_or(1));
    let prompts = app
        .text
        .within(move || {
            let whole = match own.prompt.unwrap_or(Prompt::Texts(Vec::new())) {
                Prompt::Text(text) => vec![Given::Text(text)],
                Prompt::Texts(texts) => texts.into_iter().map(Given::Text).collect(),
                Prompt::Tokens(ids) => vec![Given::Tokens(ids)],
                Prompt::ManyTokens(all) => all.into_iter().map(Given::Tokens).collect(),
            };
            let prompts = whole
                .into_iter()
                .map(|given| prompt(&base.text, &request.common, given, echo, base.model().shape().cached_positions()));
            prompts.collect::<Result<Vec<_>, _>>()
        })
        .await?;
    let each = own.best_of.unwrap_or(n);
    let wanted =
        Wanted { log_probabilities: own.logprobs, of_prompt: echo && own.logprobs.is_some(), ranked: each > n, each };
    let asked = (wanted, common.form()?, common.text(), None);
    respond(&app, Kind::Completion, &common, prompts, adapters, asked).await
}

async fn respond(
    app: &Arc<App>,
    kind: Kind,
    common: &Common,
    prompts: Vec<(Vec<u32>, Before)>,
    adapters: Adapters,
    (wanted, form, text, calls): (Wanted, Option<(&'static str, Form)>, TextOptions, Option<CallReader>),
) -> Result<Response, ApiError> {
    let n = common.n.unwrap_or(1);
    let prompt_tokens = prompts.iter().map(|(ids, _)| ids.len()).sum();
    let (ids, before): (Vec<_>, Vec<_>) = prompts.into_iter().unzip();
    let form = match form {
        Some((field, form)) => Some(app.begin(field, form).await?),
        None => None,
    };
    let requests = common.requests(app, ids, &adapters, (wanted, form))?;
    let choices = requests.len();
    let shape = Shape::new(app, kind, common, prompt_tokens, wanted.log_probabilities.is_some());
    if let Some(call) = call() {
        let (id, model) = shape.names();
        let operation = if kind == Kind::Chat { "chat" } else { "text_completion" };
        let own = [
            // vLLM's name of it, and OpenTelemetry's.
            ("gen_ai.request.id", Some(id.into())),
            ("gen_ai.response.id", Some(id.into())),
            ("gen_ai.usage.input_tokens", Some(prompt_tokens.into())),
            ("lorimer.adapters", (!adapters.1.is_empty()).then(|| list(adapters.1.iter().map(String::as_str)))),
        ];
        call.asked(operation, (model, model), own.into_iter().chain(common.attributes()).collect());
    }
    let mut answers = Answers::start(&app.worker, &app.base, requests, text, calls).await?;
    if common.stream == Some(true) {
        // Refusals are known with the first piece, and then still have a status of their own.
        let first = answers.next().await.unwrap_or_else(|| Err(super::error::cut_off()))?;
        let options = common.stream_options.unwrap_or_default();
        return Ok(stream(app.clone(), shape, answers, first, (choices, wanted.each), options, before));
    }
    let mut whole: Vec<Piece> = vec![Piece::default(); choices];
    while let Some(piece) = answers.next().await {
        let piece = piece?;
        let of = &mut whole[piece.index];
        of.text.push_str(&piece.text);
        of.calls.1.extend(piece.calls.1);
        of.prompt.extend(piece.prompt);
        of.tokens.extend(piece.tokens);
        of.finish = of.finish.or(piece.finish);
    }
    let generated = whole.iter().map(|piece| piece.tokens.len()).sum();
    let mut kept: Vec<(Piece, &Before)> = Vec::new();
    for (of_prompt, before) in whole.chunks_mut(wanted.each).zip(&before) {
        if wanted.ranked {
            of_prompt.sort_by(|a, b| likelihood(b).total_cmp(&likelihood(a)));
        }
        for piece in of_prompt.iter_mut().take(n) {
            let finish = piece.finish.or(Some(FinishReason::Length));
            kept.push((Piece { index: kept.len(), finish, ..std::mem::take(piece) }, before));
        }
    }
    if let Some(call) = call() {
        call.chose(kept.iter().filter_map(|(piece, _)| piece.finish.map(FinishReason::name)).collect());
    }
    Ok(Json(shape.whole(app, &kept, generated)).into_response())
}

/// Mean log p of an answer's tokens.
fn likelihood(piece: &Piece) -> f64 {
    let sum: f64 = piece.tokens.iter().filter_map(|t| t.log_probability).map(f64::from).sum();
    if piece.tokens.is_empty() { f64::NEG_INFINITY } else { sum / piece.tokens.len() as f64 }
}

/// Server-sent events, one a piece, `[DONE]` at the end.
fn stream(
    app: Arc<App>,
    shape: Shape,
    answers: Answers,
    first: Piece,
    (choices, each): (usize, usize),
    options: StreamOptions,
    before: Vec<Before>,
) -> Response {
    enum Next {
        Piece(Piece),
        Wait,
        Done,
        Over,
    }
    struct Sending {
        app: Arc<App>,
        shape: Shape,
        answers: Answers,
        next: Next,
        begun: Vec<bool>,
        /// Where each choice's text is.
        places: Vec<Place>,
        /// Tokens of each choice so far.
        generated: Vec<usize>,
        options: StreamOptions,
        before: Vec<Before>,
        each: usize,
    }
    let (begun, generated) = (vec![false; choices], vec![0; choices]);
    let places = (0..choices).map(|i| before.get(i / each).map(Before::end).unwrap_or_default()).collect();
    let next = Next::Piece(first);
    let start = Sending { app, shape, answers, next, begun, places, generated, options, before, each };
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
                Some(Ok(piece)) => {
                    let i = piece.index;
                    s.generated[i] += piece.tokens.len();
                    let first = !std::mem::replace(&mut s.begun[i], true);
                    let before = &s.before[i / s.each];
                    let chunk = s.shape.chunk(&s.app, &piece, before, &mut s.places[i], first);
                    match s.options.continuous_usage_stats {
                        true => s.shape.with_usage(chunk, Some(s.generated[i])),
                        false if s.options.include_usage => s.shape.with_usage(chunk, None),
                        false => chunk,
                    }
                }
                Some(Err(error)) => {
                    s.next = Next::Done;
                    error.body()
                }
                None if s.options.include_usage => {
                    s.next = Next::Done;
                    s.shape.last(s.generated.iter().sum())
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
