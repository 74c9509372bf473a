//! OpenAI's call for vectors of texts, which a server of an encoder answers.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use candle_core::{Result as TensorResult, Tensor};
use lorimer_model::embed::{EmbedOptions, embed_tokens, encode};
use lorimer_model::{Adaptation, Projection, Site};
use lorimer_tensor::{Addition, Group, Paged, Segmented, project_segmented};
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::app::App;
use super::body::Body;
use super::error::{ApiError, Failure};
use super::fields::{Fields, unknown};
use super::request::{Common, Prompt};
use super::traced::call;
use crate::adapters::hosted::Hosted;
use crate::trace::span::list;

/// Most texts of a request.
const MAX_TEXTS: usize = 2048;
/// Fields of other servers that ask for nothing by their value.
const INERT: [(&str, &str); 3] = [("truncation_side", "right"), ("truncate", "NONE"), ("embed_dtype", "float32")];

/// `POST /v1/embeddings`.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct EmbeddingsRequest {
    /// A text or its tokens, one or several.
    pub input: Prompt,
    /// The base, an adapter, or BASE:ADAPTER.
    pub model: Option<String>,
    /// `float`, or `base64` for the numbers' little-endian bytes in single precision.
    pub encoding_format: Option<String>,
    /// Only so many of a vector's first numbers, at the length that the whole has.
    pub dimensions: Option<usize>,
    /// Only so many of a text's first tokens; -1 for as many as the model takes (vLLM). Longer texts are refused where it is not given.
    pub truncate_prompt_tokens: Option<i64>,
    /// For whom it is.
    pub user: Option<String>,
}

impl EmbeddingsRequest {
    fn read(mut body: Fields) -> Result<Self, ApiError> {
        let request = Self {
            input: body.needed("input")?,
            model: body.take("model")?,
            encoding_format: body.take("encoding_format")?,
            dimensions: body.take("dimensions")?,
            truncate_prompt_tokens: body.take("truncate_prompt_tokens")?,
            user: body.take("user")?,
        };
        let asks = |(name, value): &(String, &Value)| !INERT.iter().any(|(own, inert)| own == name && *value == inert);
        if let Some((name, _)) = body.rest().find(asks) {
            return Err(unknown(&name));
        }
        if !matches!(request.encoding_format.as_deref(), None | Some("float" | "base64")) {
            return Err(ApiError::field("encoding_format", "`encoding_format` should be float or base64"));
        }
        if request.input.count() > MAX_TEXTS {
            let message = format!("`input` has {} texts, at most {MAX_TEXTS} are taken", request.input.count());
            return Err(ApiError::field("input", message));
        }
        Ok(request)
    }

    /// Refuses texts that are too long whatever their tokens are.
    fn check(&self, app: &App) -> Result<(), ApiError> {
        match self.truncate_prompt_tokens {
            None => app.fits("input", self.input.longest().0),
            // Only their beginnings are encoded.
            Some(_) => Ok(()),
        }
    }

    /// Tokens of every text.
    fn tokens(&self, app: &App, options: &EmbedOptions) -> Result<Vec<Vec<u32>>, ApiError> {
        let most = match self.truncate_prompt_tokens {
            None | Some(-1) => options.max_tokens,
            Some(n) => usize::try_from(n).ok().filter(|n| (1..=options.max_tokens).contains(n)).ok_or_else(|| {
                let message = format!("`truncate_prompt_tokens` should be -1, or 1 to {}", options.max_tokens);
                ApiError::field("truncate_prompt_tokens", message)
            })?,
        };
        // One more than the model takes tells that a text is too long.
        let cut = if self.truncate_prompt_tokens.is_some() { most } else { most + 1 };
        let options = EmbedOptions { max_tokens: cut, ..options.clone() };
        let encoded = |texts: &[String]| {
            let beginnings: Vec<&str> = texts.iter().map(|text| beginning(text, app.longest)).collect();
            let all = encode(&app.base.text, &beginnings, &options)?;
            // What was not encoded counts only where that has tokens for all places.
            let whole = |((text, beginning), ids): ((&String, &&str), &Vec<u32>)| {
                text.len() == beginning.len() || ids.len() >= most
            };
            let lacks = texts.iter().zip(&beginnings).zip(&all).position(|one| !whole(one));
            Ok((all, lacks.map(|i| texts[i].len())))
        };
        let all = match &self.input {
            Prompt::Text(text) => encoded(std::slice::from_ref(text)),
            Prompt::Texts(texts) => encoded(texts),
            Prompt::Tokens(ids) => Ok((vec![ids.clone()], None)),
            Prompt::ManyTokens(all) => Ok((all.clone(), None)),
        };
        let (mut all, lacking) = all.map_err(|e: lorimer_model::Error| ApiError::field("input", e.to_string()))?;
        if let Some(bytes) = lacking {
            app.fits("input", bytes)?;
        }
        for (i, ids) in all.iter_mut().enumerate() {
            if self.truncate_prompt_tokens.is_some() {
                ids.truncate(most);
            }
            if ids.len() > most {
                let message = format!(
                    "text {i} of `input` has more than the {most} tokens that the model takes; shorten it or give `truncate_prompt_tokens`"
                );
                return Err(ApiError::field("input", message));
            }
            if ids.is_empty() {
                return Err(ApiError::field("input", format!("text {i} of `input` has no tokens")));
            }
        }
        Ok(all)
    }

    /// As many numbers as are asked for; a vector of length 1 keeps it.
    fn cut(&self, vector: &mut Vec<f32>, normalize: bool) -> Result<(), ApiError> {
        let Some(n) = self.dimensions else { return Ok(()) };
        if n == 0 || n > vector.len() {
            let message = format!("`dimensions` should be 1 to {}, which the model gives", vector.len());
            return Err(ApiError::field("dimensions", message));
        }
        vector.truncate(n);
        if normalize {
            let length = vector.iter().map(|v| v * v).sum::<f32>().sqrt().max(1e-12);
            vector.iter_mut().for_each(|v| *v /= length);
        }
        Ok(())
    }
}

/// A text's first letters, of so many bytes at most.
fn beginning(text: &str, bytes: usize) -> &str {
    let end = (0..=bytes.min(text.len())).rev().find(|&at| text.is_char_boundary(at));
    &text[..end.unwrap_or(0)]
}

/// A vector in the form that a request asks for.
fn written(vector: &[f32], format: Option<&str>) -> Value {
    match format {
        Some("base64") => STANDARD.encode(vector.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>()).into(),
        _ => json!(vector),
    }
}

/// Adapters as they are hosted, on all rows of a forward.
struct OnAll<'a>(&'a [(Arc<Hosted>, f32)]);

impl Adaptation for OnAll<'_> {
    fn touches(&self, site: &Site) -> bool {
        self.0.iter().any(|(hosted, _)| hosted.places.contains_key(&site.path))
    }

    fn project(&self, site: &Site, base: &Projection, x: &Tensor) -> TensorResult<Tensor> {
        let additions = self.0.iter().filter_map(|(hosted, weight)| {
            let place = hosted.places.get(&site.path)?;
            let of = |start, count, length| Paged {
                pool: &hosted.numbers,
                page: hosted.numbers.len(),
                pages: &[0],
                start,
                count,
                length,
            };
            Some(Addition {
                a: of(place.a, place.rank, site.inputs),
                b: of(place.b, place.rank, site.outputs),
                output_scale: place.output_scale.map(|at| of(at, 1, site.outputs)),
                bias: place.bias.map(|at| of(at, 1, site.outputs)),
                gate: place.gate.and_then(|i| Some(hosted.gates.get(i)?.as_ref())),
                weight: *weight,
            })
        });
        let groups = vec![Group { rows: 0..x.dim(0)?, additions: additions.collect() }];
        let mut all = project_segmented(x, &[Segmented { weight: &base.weight, bias: base.bias.as_ref(), groups }])?;
        all.pop().ok_or_else(|| candle_core::Error::Msg("no projection".into()))
    }
}

/// `POST /v1/embeddings`.
#[utoipa::path(post, path = "/v1/embeddings", tag = "inference", request_body = EmbeddingsRequest, responses((status = 200, description = "OpenAI's list of `embedding`s", body = Object), (status = "4XX", description = "Refused", body = Failure), (status = 503, description = "Overloaded or stopping; `Retry-After` says for how long", body = Failure)))]
pub async fn embeddings(State(app): State<Arc<App>>, Body(fields): Body<Fields>) -> Result<Json<Value>, ApiError> {
    let Some(options) = app.embed.clone() else {
        let message = format!(
            "`{}` predicts tokens and gives no vectors of texts; ask /v1/completions, or serve an encoder",
            app.name
        );
        return Err(ApiError::new(StatusCode::BAD_REQUEST, "not_an_encoder", message));
    };
    if app.worker.is_stopping() {
        return Err(super::error::stopping());
    }
    let request = EmbeddingsRequest::read(fields)?;
    request.check(&app)?;
    let named = Common { model: request.model.clone(), ..Default::default() }.adapters(&app)?;
    let (adapters, names) = app.adapters(named).await?;
    let (all, own, encoding) = (app.clone(), request.clone(), options.clone());
    let tokens = app.text.within(move || own.tokens(&all, &encoding)).await?;
    for ids in &tokens {
        app.in_vocabulary("input", ids)?;
    }
    let count: usize = tokens.iter().map(Vec::len).sum();
    let model = request.model.as_ref().unwrap_or(&app.name);
    if let Some(call) = call() {
        let more = vec![
            ("gen_ai.usage.input_tokens", Some(count.into())),
            ("gen_ai.embeddings.dimension.count", request.dimensions.map(Into::into)),
            ("lorimer.adapters", (!names.is_empty()).then(|| list(names.iter().map(String::as_str)))),
        ];
        call.asked("embeddings", (model.as_str(), model.as_str()), more);
    }
    let (base, normalize) = (app.base.clone(), options.normalize);
    let computed = app.embeds.within(move || {
        embed_tokens(base.model(), &OnAll(&adapters), &tokens, &options)
            .map_err(|e| ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "computation_failed", e.to_string()))
    });
    let mut data = Vec::new();
    for (index, mut vector) in computed.await?.into_iter().enumerate() {
        if !vector.iter().all(|v| v.is_finite()) {
            let message = format!("the vector of text {index} is not finite");
            return Err(ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "not_finite", message));
        }
        request.cut(&mut vector, normalize)?;
        data.push(json!({ "object": "embedding", "index": index, "embedding": written(&vector, request.encoding_format.as_deref()) }));
    }
    let usage = json!({ "prompt_tokens": count, "total_tokens": count });
    Ok(Json(json!({ "object": "list", "data": data, "model": model, "usage": usage })))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Little-endian bytes in RFC 4648's base64, padded.
    #[test]
    fn base64_is_rfc_4648s() {
        let texts = ["", "AACAPw==", "AACAPwAAAMA=", "AAAAAAAAAAAAAAAA"];
        for (vector, text) in [vec![], vec![1.0], vec![1.0, -2.0], vec![0.0; 3]].iter().zip(texts) {
            assert_eq!(written(vector, Some("base64")), json!(text));
        }
        assert_eq!(written(&[1.0, -2.0], None), json!([1.0, -2.0]));
    }
}
