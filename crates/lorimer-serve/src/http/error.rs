//! Errors as OpenAI's clients read them, with stable codes.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::json;
use utoipa::ToSchema;

use crate::adapters::store::{Code, StoreError};
use crate::engine::Failure as Cause;
use crate::engine::scheduler::Refusal;
use crate::engine::worker::Declined;

/// What clients read of an error.
#[derive(Serialize, ToSchema)]
pub struct Failure {
    error: FailureDetails,
}

/// Kind, code and sentence of an error.
#[derive(Serialize, ToSchema)]
struct FailureDetails {
    /// One sentence: what, where, and what to do.
    message: String,
    /// `invalid_request_error`, `authentication_error` or `server_error`.
    r#type: &'static str,
    /// The field of the request that the error is about, where it is about one.
    param: Option<String>,
    /// Stable, for programs.
    code: &'static str,
}

/// An answer that is none.
#[derive(Clone, Debug)]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// Stable code.
    pub code: &'static str,
    /// One sentence.
    pub message: String,
    /// The field of the request that it is about.
    pub param: Option<String>,
    /// Seconds after which to try again.
    pub retry_after: Option<f64>,
}

impl ApiError {
    /// An error of a status with a code.
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), param: None, retry_after: None }
    }

    /// A request that cannot be served as it is.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request", message)
    }

    /// A request that cannot be served as it is because of one of its fields.
    pub fn field(name: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(name.into()), ..Self::invalid(message) }
    }

    /// The object that clients read.
    pub fn body(&self) -> serde_json::Value {
        let kind = match self.status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => "authentication_error",
            status if status.is_client_error() => "invalid_request_error",
            _ => "server_error",
        };
        let (message, param) = (self.message.clone(), self.param.clone());
        json!(Failure { error: FailureDetails { message, r#type: kind, param, code: self.code } })
    }
}

/// The code of an error, beside its answer.
#[derive(Clone, Copy)]
pub struct ErrorCode(pub &'static str);

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        response.extensions_mut().insert(ErrorCode(self.code));
        if let Some(seconds) = self.retry_after {
            let value = HeaderValue::from(seconds.ceil().clamp(1.0, 3600.0) as u64);
            response.headers_mut().insert(header::RETRY_AFTER, value);
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        let (status, code) = match error.code {
            Code::AdapterNotFound => (StatusCode::NOT_FOUND, "adapter_not_found"),
            Code::InvalidName => (StatusCode::BAD_REQUEST, "invalid_name"),
            Code::PathRefused => (StatusCode::FORBIDDEN, "path_refused"),
            Code::AdapterExists => (StatusCode::CONFLICT, "adapter_exists"),
            Code::ContentChanged => (StatusCode::CONFLICT, "content_changed"),
            Code::AdapterInvalid => (StatusCode::UNPROCESSABLE_ENTITY, "adapter_invalid"),
            Code::LimitExceeded => (StatusCode::UNPROCESSABLE_ENTITY, "limit_exceeded"),
            // The place of adapters may be there again in a moment.
            Code::StoreFailed => (StatusCode::SERVICE_UNAVAILABLE, "store_failed"),
        };
        let retry_after = (status == StatusCode::SERVICE_UNAVAILABLE).then_some(5.0);
        Self { retry_after, ..Self::new(status, code, error.message) }
    }
}

/// What a refusal of the scheduler is called.
pub fn refused(refusal: Refusal, retry_after: f64) -> ApiError {
    let (status, code, message) = match refusal {
        Refusal::QueueFull => {
            (StatusCode::SERVICE_UNAVAILABLE, "queue_full", "too many requests are waiting; try again later")
        }
        Refusal::TooLate => (
            StatusCode::SERVICE_UNAVAILABLE,
            "overloaded",
            "the first token would come later than this server promises; try again later",
        ),
        Refusal::TooLarge => (
            StatusCode::UNPROCESSABLE_ENTITY,
            "too_large",
            "prompt, answer and adapters do not fit into the server's pool; ask for fewer tokens",
        ),
    };
    let retry_after = (status == StatusCode::SERVICE_UNAVAILABLE).then_some(retry_after);
    ApiError { retry_after, ..ApiError::new(status, code, message) }
}

/// A request that could not be computed, by the number that the log has.
pub fn failed(id: u64, cause: &Cause) -> ApiError {
    let (status, code) = match cause {
        Cause::Defect(_) => (StatusCode::INTERNAL_SERVER_ERROR, "computation_failed"),
        Cause::NotFinite(_) => (StatusCode::UNPROCESSABLE_ENTITY, "not_finite"),
        Cause::Form(_) => (StatusCode::UNPROCESSABLE_ENTITY, "form_failed"),
    };
    ApiError::new(status, code, format!("request {id} could not be computed: {cause}"))
}

impl From<Declined> for ApiError {
    fn from(declined: Declined) -> Self {
        match declined {
            Declined::Invalid(message) => Self::invalid(message),
            Declined::Refused(refusal, retry_after) => refused(refusal, retry_after),
            Declined::Stopping => stopping(),
            Declined::Failed(problem) => engine_failed(&problem),
        }
    }
}

/// What could not be heard of the engine, through no fault of a request.
pub fn engine_failed(problem: &str) -> ApiError {
    let message = format!("{problem}; the server's log has more");
    ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "engine_failed", message)
}

/// An answer that is not whole, though nothing was told of why.
pub fn cut_off() -> ApiError {
    engine_failed("the answer broke off")
}

/// A client that does not take its answer.
pub fn too_slow() -> ApiError {
    let message = "the answer was given up because its client takes it too slowly";
    ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "client_too_slow", message)
}

/// The server is shutting down.
pub fn stopping() -> ApiError {
    let message = "the server is shutting down; try another, or again later";
    ApiError { retry_after: Some(5.0), ..ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "stopping", message) }
}
