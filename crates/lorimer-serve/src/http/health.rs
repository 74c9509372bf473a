//! Whether the server lives, takes requests, or is to be left alone: what load balancers and Kubernetes ask.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::app::App;
use super::client::same_site;
use super::error::{ApiError, Failure, engine_failed, stopping};

/// Refuses where only a new start helps.
fn works(app: &App) -> Result<(), ApiError> {
    match app.worker.problem() {
        Some(problem) => Err(ApiError { status: StatusCode::SERVICE_UNAVAILABLE, ..engine_failed(&problem) }),
        None => Ok(()),
    }
}

/// `GET /health`: what other servers have under this name.
#[utoipa::path(get, path = "/health", tag = "operation", responses((status = 200, description = "New requests are taken", body = Object), (status = 503, description = "The server is stopping, or its engine has ended", body = Failure)))]
pub async fn health(State(app): State<Arc<App>>) -> Response {
    if app.worker.is_stopping() {
        return stopping().into_response();
    }
    if let Err(problem) = works(&app) {
        return problem.into_response();
    }
    // A place of adapters that cannot be reached is no reason to start this server anew.
    Json(json!({ "status": "ok", "problems": app.problems() })).into_response()
}

/// `GET /livez`: whether a new start would not help.
#[utoipa::path(get, path = "/livez", tag = "operation", responses((status = 200, description = "The server works, or ends in order", body = Object), (status = 503, description = "Its engine has ended: start it anew", body = Failure)))]
pub async fn live(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    works(&app).map(|()| Json(json!({ "status": "ok" })))
}

/// `GET /readyz`: whether requests should come here.
#[utoipa::path(get, path = "/readyz", tag = "operation", responses((status = 200, description = "Requests should come here", body = Object), (status = 503, description = "They should go elsewhere: the server is drained, is stopping, or its engine has ended", body = Failure)))]
pub async fn ready(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    if app.worker.is_stopping() {
        return Err(stopping());
    }
    works(&app)?;
    if app.draining.load(Ordering::Relaxed) {
        let message = "the server is being drained: it answers what comes, and nothing more should";
        return Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "draining", message));
    }
    Ok(Json(json!({ "status": "ok" })))
}

fn drained(app: &App, draining: bool) -> Json<Value> {
    app.draining.store(draining, Ordering::Relaxed);
    let engine = app.worker.figures().engine;
    Json(json!({ "draining": draining, "running": engine.running, "waiting": engine.waiting }))
}

/// `POST /drain`: not ready from now on; requests that come all the same are answered.
#[utoipa::path(post, path = "/drain", tag = "administration", responses((status = 200, description = "`draining`, and the requests that are left", body = Object), (status = "4XX", description = "Refused", body = Failure)))]
pub async fn drain(State(app): State<Arc<App>>, headers: HeaderMap) -> Result<Json<Value>, ApiError> {
    same_site(&headers)?;
    Ok(drained(&app, true))
}

/// `DELETE /drain`: ready again.
#[utoipa::path(delete, path = "/drain", tag = "administration", responses((status = 200, description = "`draining`, and the requests that are there", body = Object), (status = "4XX", description = "Refused", body = Failure)))]
pub async fn undrain(State(app): State<Arc<App>>) -> Json<Value> {
    drained(&app, false)
}
