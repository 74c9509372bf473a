//! Loading, replacing and dropping adapters while the server runs.

use std::path::PathBuf;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::app::App;
use super::body::Body;
use super::error::{ApiError, Failure};
use crate::adapters::hosted::Hosted;
use crate::adapters::replay::replay;
use crate::adapters::store::{Put, Store};

/// |Δ log p| of golden prompts above which the log says so.
const GOLDEN_TOLERANCE: f64 = 0.05;

/// vLLM's `POST /v1/load_lora_adapter`.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Load {
    /// The name to give.
    lora_name: String,
    /// A folder below the folder of adapters.
    #[schema(value_type = String)]
    lora_path: PathBuf,
    /// Replace an adapter of that name.
    #[serde(default)]
    load_inplace: bool,
}

/// vLLM's `POST /v1/unload_lora_adapter`.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Unload {
    /// The name to take away.
    lora_name: String,
}

/// `PUT /v1/adapters/{name}`.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PutAdapter {
    /// Folder below the folder of adapters.
    #[schema(value_type = String)]
    path: PathBuf,
    /// `create` (the default), `upsert`, or `swap` with `content_id`.
    #[serde(default)]
    mode: Mode,
    /// With `swap`: what the name stands for until now.
    content_id: Option<String>,
}

/// When a name may be given.
#[derive(Default, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum Mode {
    #[default]
    Create,
    Upsert,
    Swap,
}

async fn give(app: &Arc<App>, name: &str, path: PathBuf, how: Put) -> Result<Arc<Hosted>, ApiError> {
    let (store, base, name) = (app.needed_store()?.clone(), app.base.clone(), name.to_string());
    if app.is_base(&name) {
        return Err(ApiError::invalid(format!("`{name}` is the base's own name")));
    }
    app.changes.within(move || Ok(store.put(base.model(), &name, &path, &how)?)).await
}

/// What is told of an adapter that was given a name; its golden prompts are replayed for it.
pub(super) async fn report(app: &Arc<App>, hosted: Arc<Hosted>) -> Result<Value, ApiError> {
    let (store, base) = (app.needed_store()?.clone(), app.base.clone());
    app.changes
        .within(move || {
            let golden = match store.aside(|| replay(base.model(), &hosted)) {
                Ok(golden) => golden,
                Err(problem) => {
                    tracing::warn!("golden prompts of {} were not replayed: {problem}", hosted.content_id);
                    None
                }
            };
            if let Some(difference) = golden.filter(|d| *d > GOLDEN_TOLERANCE) {
                tracing::warn!("golden prompts of {} differ by {difference:.3} in log p", hosted.content_id);
            }
            Ok(describe(&hosted, golden))
        })
        .await
}

fn describe(hosted: &Hosted, golden: Option<f64>) -> Value {
    json!({
        "golden_difference": golden.filter(|d| d.is_finite()),
        "content_id": hosted.content_id,
        "method": hosted.method,
        "rank": hosted.rank,
        "host_bytes": hosted.bytes(),
        "exact_modules": hosted.conversion.exact,
        "modules": hosted.conversion.modules,
        "conversion_error": hosted.conversion.error,
    })
}

/// A JSON object of a change of names: `persisted` is whether a server that is started later knows it too.
pub(super) fn changed(store: &Store, message: String, more: Value) -> Json<Value> {
    let not_kept = store.not_kept();
    let message = match &not_kept {
        None => message,
        Some(why) => format!("{message}, until this server ends: {why}"),
    };
    let mut body = done(message, more);
    body["persisted"] = not_kept.is_none().into();
    Json(body)
}

/// Gives a name to an adapter below the root.
#[utoipa::path(post, path = "/v1/load_lora_adapter", tag = "administration", request_body = Load, responses((status = 200, description = "Done", body = Object), (status = "4XX", description = "Refused; nothing has changed", body = Failure)))]
pub async fn load(State(app): State<Arc<App>>, Body(load): Body<Load>) -> Result<Json<Value>, ApiError> {
    let how = if load.load_inplace { Put::Upsert } else { Put::Create };
    let hosted = give(&app, &load.lora_name, load.lora_path, how).await?;
    let report = report(&app, hosted).await?;
    Ok(changed(app.needed_store()?, format!("LoRA adapter `{}` added", load.lora_name), report))
}

/// Takes a name away.
#[utoipa::path(post, path = "/v1/unload_lora_adapter", tag = "administration", request_body = Unload, responses((status = 200, description = "Done", body = Object), (status = "4XX", description = "Refused; nothing has changed", body = Failure)))]
pub async fn unload(State(app): State<Arc<App>>, Body(unload): Body<Unload>) -> Result<Json<Value>, ApiError> {
    let (store, name) = (app.needed_store()?.clone(), unload.lora_name);
    app.changes
        .within(move || {
            store.remove(&name)?;
            Ok(changed(&store, format!("LoRA adapter `{name}` removed"), Value::Null))
        })
        .await
}

/// Gives a name to an adapter, with a choice of when it may.
#[utoipa::path(put, path = "/v1/adapters/{name}", tag = "administration", params(("name" = String, Path, description = "The name; may hold `/`")), request_body = PutAdapter, responses((status = 200, description = "Done", body = Object), (status = "4XX", description = "Refused; nothing has changed", body = Failure)))]
pub async fn put(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    Body(put): Body<PutAdapter>,
) -> Result<Json<Value>, ApiError> {
    let how = match (put.mode, put.content_id) {
        (Mode::Create, None) => Put::Create,
        (Mode::Upsert, None) => Put::Upsert,
        (Mode::Swap, Some(content)) => Put::Swap(content),
        (Mode::Swap, None) => {
            return Err(ApiError::invalid("mode `swap` needs `content_id`, what the name stands for until now"));
        }
        (_, Some(_)) => return Err(ApiError::invalid("`content_id` goes with mode `swap`")),
    };
    let hosted = give(&app, &name, put.path, how).await?;
    let message = format!("`{name}` is {}", hosted.content_id);
    let report = report(&app, hosted).await?;
    Ok(changed(app.needed_store()?, message, report))
}

/// `DELETE /v1/adapters/{name}`.
#[utoipa::path(delete, path = "/v1/adapters/{name}", tag = "administration", params(("name" = String, Path, description = "The name; may hold `/`")), responses((status = 200, description = "Done", body = Object), (status = "4XX", description = "Refused; nothing has changed", body = Failure)))]
pub async fn remove(State(app): State<Arc<App>>, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    let store = app.needed_store()?.clone();
    app.changes
        .within(move || {
            store.remove(&name)?;
            Ok(changed(&store, format!("`{name}` removed"), Value::Null))
        })
        .await
}

/// `GET /v1/adapters`.
#[utoipa::path(get, path = "/v1/adapters", tag = "inference", responses((status = 200, description = "Names, contents, ranks, bytes and errors of conversion", body = Object)))]
pub async fn list(State(app): State<Arc<App>>) -> Json<Value> {
    let all: Vec<_> = app.store.iter().flat_map(|store| store.list()).collect();
    Json(json!({ "base": app.name, "adapters": all }))
}

/// A JSON object of an outcome.
fn done(message: String, more: Value) -> Value {
    let mut body = json!({ "status": "success", "message": message });
    if let (Some(body), Value::Object(more)) = (body.as_object_mut(), more) {
        body.extend(more);
    }
    body
}
