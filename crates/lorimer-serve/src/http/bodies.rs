//! Bodies of requests: bounded each and together, in bytes and in time.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::app::App;
use super::error::ApiError;
use super::room::{MAX_BODY, SMALL_BODY};
use super::work_queue::LARGE;

/// Seconds in which the body of a request has to come.
const BODY_SECONDS: u64 = 30;

fn too_large() -> ApiError {
    let message = format!("the body is longer than {MAX_BODY} bytes");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
}

/// The whole body, with the room that it takes.
async fn read(
    room: &Arc<Semaphore>,
    headers: &HeaderMap,
    body: Body,
) -> Result<(Vec<u8>, Option<OwnedSemaphorePermit>), ApiError> {
    let length = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|n| n > MAX_BODY as u64) {
        return Err(too_large());
    }
    let (mut bytes, mut held): (Vec<u8>, Option<OwnedSemaphorePermit>) = (Vec::new(), None);
    let mut stream = body.into_data_stream();
    while let Some(part) = stream.next().await {
        let part = part.map_err(|e| {
            ApiError::new(StatusCode::BAD_REQUEST, "body_unreadable", format!("the body could not be read: {e}"))
        })?;
        let total = bytes.len() + part.len();
        if total > MAX_BODY {
            return Err(too_large());
        }
        // Beyond the first part, before it is kept.
        let wanted = total.saturating_sub(SMALL_BODY).div_ceil(SMALL_BODY);
        let more = wanted.saturating_sub(held.as_ref().map_or(0, OwnedSemaphorePermit::num_permits));
        if more > 0 {
            let permit =
                room.clone().try_acquire_many_owned(u32::try_from(more).unwrap_or(u32::MAX)).map_err(|_| {
                    let message = "too many large bodies are on their way; try again later";
                    ApiError {
                        retry_after: Some(1.0),
                        ..ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "overloaded", message)
                    }
                })?;
            match &mut held {
                Some(held) => held.merge(permit),
                None => held = Some(permit),
            }
        }
        bytes.extend_from_slice(&part);
    }
    Ok((bytes, held))
}

/// Reads the body before anything else is done with the request; what it takes counts until the answer begins, or the client goes away.
pub async fn bounded(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    let read = tokio::time::timeout(Duration::from_secs(BODY_SECONDS), read(&app.bodies, &parts.headers, body)).await;
    let late = |_| {
        let message = format!("the body did not come within {BODY_SECONDS} seconds");
        ApiError::new(StatusCode::REQUEST_TIMEOUT, "body_too_slow", message)
    };
    match read.map_err(late).and_then(|read| read) {
        Ok((bytes, _held)) => {
            let large = bytes.len() > SMALL_BODY;
            LARGE.scope(large, next.run(Request::from_parts(parts, Body::from(bytes)))).await
        }
        Err(error) => error.into_response(),
    }
}

/// Values of a JSON text, as far as they can be counted without reading it: commas and opening brackets outside of strings. Each takes
/// many times its bytes once it is read.
pub fn values(json: &[u8]) -> usize {
    let (mut count, mut inside, mut escaped) = (1, false, false);
    for &byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if inside => escaped = true,
            b'"' => inside = !inside,
            b',' | b'[' | b'{' if !inside => count += 1,
            _ => {}
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::room::{LARGE_BODIES, room};

    #[test]
    fn values_are_counted_outside_of_strings() {
        assert_eq!(values(br#"{"a": "1, [2], \", {", "b": [1, 2, 3]}"#), 6);
        assert_eq!(values(b"[[[["), 5);
    }

    /// Large bodies share their room, small ones always come in, and room comes back.
    #[test]
    fn bodies_are_bounded_together() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let room = room();
            let none = HeaderMap::new();
            let body = |n: usize| Body::from(vec![b' '; n]);
            let mut held = Vec::new();
            let refused = loop {
                match read(&room, &none, body(MAX_BODY)).await {
                    Ok(one) => held.push(one),
                    Err(error) => break error,
                }
            };
            assert_eq!((held.len(), refused.code), (LARGE_BODIES / MAX_BODY, "overloaded"));
            let (small, permit) = read(&room, &none, body(SMALL_BODY)).await.unwrap();
            assert!(small.len() == SMALL_BODY && permit.is_none());
            held.pop();
            held.push(read(&room, &none, body(MAX_BODY)).await.unwrap());
            held.clear();
            assert_eq!(room.available_permits(), LARGE_BODIES / SMALL_BODY);
            assert_eq!(read(&room, &none, body(MAX_BODY + 1)).await.unwrap_err().code, "body_too_large");
        });
    }
}
