//! A body of JSON.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use serde::de::DeserializeOwned;

use super::app::App;
use super::error::ApiError;
use super::fields::Fields;
use super::room::SMALL_BODY;
use super::{bodies, request};

/// A JSON object as the body, with errors as sentences. A field that is null counts as absent.
pub struct Body<T>(pub T);

impl<T: DeserializeOwned + Send + 'static> FromRequest<Arc<App>> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        // A page of another site can send forms and plain text without being asked, but not this.
        let json = request.headers().get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok());
        if !json.is_some_and(|t| t.split(';').next().is_some_and(|t| t.trim().eq_ignore_ascii_case("application/json")))
        {
            let status = StatusCode::UNSUPPORTED_MEDIA_TYPE;
            return Err(ApiError::new(
                status,
                "not_json",
                "the body should be JSON, with `Content-Type: application/json`",
            ));
        }
        let bytes = Bytes::from_request(request, app).await.map_err(|rejection| {
            let message = format!("the body could not be read: {}", rejection.body_text());
            ApiError::new(rejection.status(), "body_unreadable", message)
        })?;
        let most =
            app.base.model().shape().cached_positions().saturating_mul(request::MAX_CHOICES).saturating_add(SMALL_BODY);
        let large = bytes.len() > SMALL_BODY;
        let parse = move || {
            let values = bodies::values(&bytes);
            if values > most {
                return Err(ApiError::invalid(format!("the body holds {values} values, at most {most} are read")));
            }
            let unexpected =
                |e: serde_json::Error| ApiError::invalid(format!("the body is not what was expected: {e}"));
            let fields = serde_json::from_slice::<Fields>(&bytes).map_err(unexpected)?.checked()?;
            serde_json::from_value(fields.into_value()).map(Body).map_err(unexpected)
        };
        if large { app.text.within(parse).await } else { parse() }
    }
}
