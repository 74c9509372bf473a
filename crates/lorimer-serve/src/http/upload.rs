//! Adapters that come as files.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Json;
use axum::extract::multipart::{Multipart, MultipartError, MultipartRejection};
use axum::extract::{OriginalUri, Path, State};
use axum::http::{HeaderMap, StatusCode};
use lorimer_model::Error;
use lorimer_model::files::is_plain_file_name;
use serde_json::Value;
use tokio::sync::mpsc;

use super::admin::{changed, report};
use super::app::App;
use super::client::same_site;
use super::error::{ApiError, Failure};
use crate::adapters::store::Put;

/// Most files of an adapter.
const MAX_FILES: usize = 32;
/// Seconds in which the next bytes have to come.
const CHUNK_SECONDS: u64 = 30;
/// Parts of files that wait to be written.
const PARTS: usize = 4;

/// What is to be written.
enum Part {
    /// A file begins.
    File(String),
    /// More of it.
    Bytes(axum::body::Bytes),
    /// All is there.
    End,
}

fn unreadable(problem: &MultipartError) -> ApiError {
    ApiError::new(
        StatusCode::BAD_REQUEST,
        "body_unreadable",
        format!("the form could not be read: {}", problem.body_text()),
    )
}

/// Hands on the files of a form.
async fn send(mut form: Multipart, most: u64, parts: mpsc::Sender<Part>) -> Result<(), ApiError> {
    let late = |_| {
        let message = format!("nothing came for {CHUNK_SECONDS} seconds");
        ApiError::new(StatusCode::REQUEST_TIMEOUT, "body_too_slow", message)
    };
    let patience = Duration::from_secs(CHUNK_SECONDS);
    let (mut names, mut total): (Vec<String>, u64) = (Vec::new(), 0);
    loop {
        let next = tokio::time::timeout(patience, form.next_field()).await.map_err(late)?;
        let Some(mut field) = next.map_err(|e| unreadable(&e))? else { break };
        let name = field.file_name().unwrap_or_default().to_string();
        if !is_plain_file_name(&name) || name.starts_with('.') || names.contains(&name) || names.len() >= MAX_FILES {
            let shown: String = name.chars().take(60).flat_map(char::escape_debug).collect();
            let message = format!(
                "`{shown}`: each part of the form should be a file of the adapter, with a name of its own and no folder, {MAX_FILES} at most"
            );
            return Err(ApiError::invalid(message));
        }
        names.push(name.clone());
        // Who writes may have ended, and says why.
        if parts.send(Part::File(name)).await.is_err() {
            return Ok(());
        }
        loop {
            let next = tokio::time::timeout(patience, field.chunk()).await.map_err(late)?;
            let Some(bytes) = next.map_err(|e| unreadable(&e))? else { break };
            total += bytes.len() as u64;
            if total > most {
                let message = format!("the files are longer than {most} bytes");
                return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message));
            }
            if parts.send(Part::Bytes(bytes)).await.is_err() {
                return Ok(());
            }
        }
    }
    let _ = parts.send(Part::End).await;
    Ok(())
}

/// `POST /v1/adapters/{name}/upload`: the files of an adapter as a form (`multipart/form-data`), one part each.
#[utoipa::path(post, path = "/v1/adapters/{name}/upload", tag = "administration", params(("name" = String, Path, description = "The name; may hold `/`"), ("mode" = Option<String>, Query, description = "`create` (the default) or `upsert`")), responses((status = 200, description = "Done", body = Object), (status = "4XX", description = "Refused; nothing has changed", body = Failure)))]
pub async fn upload(
    State(app): State<Arc<App>>,
    Path(path): Path<String>,
    OriginalUri(uri): OriginalUri,
    headers: HeaderMap,
    form: Result<Multipart, MultipartRejection>,
) -> Result<Json<Value>, ApiError> {
    let Some(name) = path.strip_suffix("/upload").map(str::to_string) else {
        let message = "this path takes another method";
        return Err(ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message));
    };
    if !app.uploads.load(Ordering::Relaxed) {
        let message = "this server takes no files; it is started with --allow-uploads to take them";
        return Err(ApiError::new(StatusCode::FORBIDDEN, "upload_disabled", message));
    }
    same_site(&headers)?;
    let form = form.map_err(|e| {
        ApiError::new(
            StatusCode::BAD_REQUEST,
            "not_a_form",
            format!("the body should be a form with files: {}", e.body_text()),
        )
    })?;
    let how = match uri.query() {
        None | Some("" | "mode=create") => Put::Create,
        Some("mode=upsert") => Put::Upsert,
        Some(_) => return Err(ApiError::field("mode", "the query should be `mode=create` or `mode=upsert`")),
    };
    if app.is_base(&name) {
        return Err(ApiError::invalid(format!("`{name}` is the base's own name")));
    }
    let (store, base) = (app.needed_store()?.clone(), app.base.clone());
    let most = store.max_upload();
    let (sender, mut parts) = mpsc::channel(PARTS);
    let given = name.clone();
    let receiving = app.received.within(move || {
        let fill = |folder: &std::path::Path| {
            let mut file: Option<(std::path::PathBuf, File)> = None;
            loop {
                match parts.blocking_recv() {
                    Some(Part::Bytes(bytes)) => {
                        if let Some((path, file)) = &mut file {
                            file.write_all(&bytes).map_err(Error::io("write", path))?;
                        }
                    }
                    next => {
                        if let Some((path, file)) = file.take() {
                            file.sync_all().map_err(Error::io("write", &path))?;
                        }
                        match next {
                            Some(Part::File(name)) => {
                                let path = folder.join(name);
                                file =
                                    Some((path.clone(), File::create_new(&path).map_err(Error::io("write", &path))?));
                            }
                            Some(_) => return Ok(()),
                            None => return Err(Error::Unsupported("the files did not come to their end".into())),
                        }
                    }
                }
            }
        };
        Ok(store.receive(base.model(), &given, &how, fill)?)
    });
    let (sent, received) = tokio::join!(send(form, most, sender), receiving);
    sent?;
    let report = report(&app, received?).await?;
    Ok(changed(app.needed_store()?, format!("LoRA adapter `{name}` added"), report))
}
