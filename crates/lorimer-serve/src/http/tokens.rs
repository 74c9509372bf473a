//! From texts to tokens and back: vLLM's and llama.cpp's `/tokenize` and `/detokenize`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::app::App;
use super::body::Body;
use super::error::{ApiError, Failure};
use super::fields::Fields;
use super::prompts::{chat_tokens, own_template, template_of};
use super::request::{Adapters, Common, Detokenize, TokenizeRequest};

/// The adapters that `model` names.
async fn named(app: &Arc<App>, model: Option<String>) -> Result<Adapters, ApiError> {
    let common = Common { model, ..Default::default() };
    app.adapters(common.adapters(app)?).await
}

/// `POST /tokenize`.
#[utoipa::path(post, path = "/tokenize", tag = "inference", request_body = TokenizeRequest, responses((status = 200, description = "`tokens` with their `count`, and `max_model_len`", body = Object), (status = "4XX", description = "Refused", body = Failure)))]
pub async fn tokenize(State(app): State<Arc<App>>, Body(fields): Body<Fields>) -> Result<Json<Value>, ApiError> {
    let TokenizeRequest { own, chat } = TokenizeRequest::read(fields)?;
    chat.fits(&app)?;
    app.fits("prompt", own.prompt.as_deref().or(own.content.as_deref()).map_or(0, str::len))?;
    let template = own_template(&named(&app, own.model.clone()).await?);
    let base = app.base.clone();
    app.text
        .within(move || {
            let text = &base.text;
            let plain = |field: &str, given: &str, special: bool| {
                let encoded = text.encode(given, special).map_err(|e| ApiError::field(field, e.to_string()))?;
                Ok::<_, ApiError>(encoded.ids)
            };
            let ids = match (&own.prompt, &own.content) {
                (Some(prompt), _) => plain("prompt", prompt, own.add_special_tokens.unwrap_or(true))?,
                (None, Some(content)) => plain("content", content, own.add_special.unwrap_or(false))?,
                (None, None) => {
                    let template = template_of(&base, template.as_deref(), &chat)?;
                    chat_tokens(text, template, &chat, own.add_special_tokens)?
                }
            };
            let pieces = own.with_pieces == Some(true);
            let piece = |id: u32| {
                let bytes = text.token_bytes(id);
                // Half a letter is its bytes.
                json!({ "id": id, "piece": String::from_utf8(bytes).map_or_else(|e| json!(e.into_bytes()), Value::from) })
            };
            let tokens = if pieces { ids.iter().map(|&id| piece(id)).collect() } else { json!(ids) };
            let written = || ids.iter().map(|&id| text.token(id)).collect::<Vec<_>>();
            Ok(Json(json!({
                "count": ids.len(),
                "max_model_len": base.model().shape().cached_positions(),
                "tokens": tokens,
                "token_strs": (own.return_token_strs == Some(true)).then(written),
            })))
        })
        .await
}

/// `POST /detokenize`.
#[utoipa::path(post, path = "/detokenize", tag = "inference", request_body = Detokenize, responses((status = 200, description = "Their text, as `prompt` and as `content`", body = Object), (status = "4XX", description = "Refused", body = Failure)))]
pub async fn detokenize(State(app): State<Arc<App>>, Body(fields): Body<Fields>) -> Result<Json<Value>, ApiError> {
    let request = Detokenize::of(fields)?;
    named(&app, request.model).await?;
    let ids = request.tokens.unwrap_or_default();
    app.in_vocabulary("tokens", &ids)?;
    let base = app.base.clone();
    app.text
        .within(move || {
            let text = base.text.decode(&ids, true).map_err(|e| ApiError::field("tokens", e.to_string()))?;
            Ok(Json(json!({ "prompt": text, "content": text })))
        })
        .await
}
