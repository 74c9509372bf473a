//! The HTTP server: OpenAI's calls, vLLM's for adapters, our own for the same with compare-and-swap, health, metrics and a page.

mod admin;
mod answer;
mod app;
mod bodies;
mod body;
mod client;
mod embeddings;
pub mod error;
mod fields;
mod health;
mod hub;
mod metrics;
mod openai;
mod prompts;
mod request;
mod room;
mod shape;
mod timed;
mod tls;
mod tokens;
mod traced;
mod upload;
mod work_queue;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post, put};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tower::util::MapRequest;
use utoipa::OpenApi;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};

pub use self::app::{App, Keys};
use self::client::{CLIENT, Peer, named, permitted};
use self::error::ApiError;
use self::room::MAX_BODY;
use self::timed::Timed;
pub use self::tls::Tls;

/// Largest head of a request.
const MAX_HEAD: usize = 32 << 10;
/// Seconds in which the head of a request has to come.
const HEAD_SECONDS: u64 = 15;
/// Bounds of connections.
const BOUNDS: Bounds = Bounds { connections: 4096, patience: Duration::from_secs(30) };

/// Bounds of connections.
#[derive(Clone, Copy)]
struct Bounds {
    /// Most at a time.
    connections: usize,
    /// How long a client may take nothing of its answer.
    patience: Duration,
}

async fn inference(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let keys = match &app.keys.api {
        // The administrator may ask too.
        Some(_) => vec![&app.keys.api, &app.keys.admin],
        None => vec![],
    };
    match permitted(&app, request.headers(), &keys, "API") {
        Ok(key) => CLIENT.scope(named(&request, key), next.run(request)).await,
        Err(error) => error.into_response(),
    }
}

async fn administration(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let key = if app.keys.admin.is_some() { &app.keys.admin } else { &app.keys.api };
    match permitted(&app, request.headers(), &[key], "admin") {
        Ok(_) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

async fn page() -> Response {
    let policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'";
    let headers = [(header::CONTENT_SECURITY_POLICY, policy), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
    (headers, Html(include_str!("page.html"))).into_response()
}

/// The calls as an OpenAPI document.
#[derive(OpenApi)]
#[openapi(
    info(title = "Lorimer", description = "One base and its adapters; see docs/serving.md"),
    paths(
        openai::models,
        openai::model,
        openai::completions,
        openai::chat,
        embeddings::embeddings,
        tokens::tokenize,
        tokens::detokenize,
        admin::list,
        admin::load,
        admin::unload,
        admin::put,
        admin::remove,
        upload::upload,
        metrics::state,
        metrics::prometheus,
        health::health,
        health::live,
        health::ready,
        health::drain,
        health::undrain
    )
)]
struct Document;

/// The OpenAPI document of the server, JSON for people to read.
pub fn document() -> String {
    let mut document = Document::openapi();
    let key = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
    document.components.get_or_insert_default().add_security_scheme("key", key);
    // Without a key on this machine, with one elsewhere.
    let none = SecurityRequirement::default();
    document.security = Some(vec![none, SecurityRequirement::new("key", [""; 0])]);
    document.to_pretty_json().unwrap_or_default()
}

async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], document()).into_response()
}

/// Every call of the server.
pub fn router(app: Arc<App>) -> Router {
    let answers = Router::new()
        .route("/v1/models", get(openai::models))
        .route("/v1/models/{*name}", get(openai::model))
        .route("/v1/completions", post(openai::completions))
        .route("/v1/chat/completions", post(openai::chat))
        .route("/v1/embeddings", post(embeddings::embeddings))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route("/v1/adapters", get(admin::list))
        .route("/v1/state", get(metrics::state))
        .route_layer(from_fn_with_state(app.clone(), bodies::bounded))
        .route_layer(from_fn_with_state(app.clone(), inference))
        .route_layer(from_fn_with_state(app.clone(), traced::traced));
    let changes = Router::new()
        .route("/v1/load_lora_adapter", post(admin::load))
        .route("/v1/unload_lora_adapter", post(admin::unload))
        .route("/v1/adapters/{*name}", put(admin::put).delete(admin::remove))
        .route("/drain", post(health::drain).delete(health::undrain))
        .route_layer(from_fn_with_state(app.clone(), bodies::bounded))
        .route_layer(from_fn_with_state(app.clone(), administration))
        .route_layer(from_fn_with_state(app.clone(), traced::traced));
    // Files are not kept in memory, and are bounded where they are written.
    let files = Router::new()
        .route("/v1/adapters/{*name}", post(upload::upload))
        .route_layer(DefaultBodyLimit::disable())
        .route_layer(from_fn_with_state(app.clone(), administration))
        .route_layer(from_fn_with_state(app.clone(), traced::traced));
    // What probes and collectors of figures ask all the time is in no trace.
    let open = Router::new()
        .route("/health", get(health::health))
        .route("/livez", get(health::live))
        .route("/readyz", get(health::ready))
        .route("/metrics", get(metrics::prometheus))
        .route("/", get(page))
        .route("/openapi.json", get(openapi));
    let unknown = || async {
        ApiError::new(StatusCode::NOT_FOUND, "not_found", "there is no such call; see README and docs/serving.md")
    };
    let method = || async {
        ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "this path takes another method")
    };
    answers
        .merge(changes)
        .merge(files)
        .merge(open)
        .fallback(unknown)
        .method_not_allowed_fallback(method)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(app)
}

/// Serves until `shutdown`; then is not ready for the time `drain`, takes nothing new after it, and gives what is under way `grace` to end.
pub async fn serve(
    listener: TcpListener,
    app: Arc<App>,
    tls: Option<Tls>,
    shutdown: impl Future<Output = ()>,
    (drain, grace): (Duration, Duration),
) -> std::io::Result<()> {
    let drained = async {
        shutdown.await;
        app.draining.store(true, Ordering::Relaxed);
        tokio::time::sleep(drain).await;
    };
    serve_within(BOUNDS, (listener, tls), app.clone(), drained, grace).await
}

async fn serve_within(
    bounds: Bounds,
    (listener, tls): (TcpListener, Option<Tls>),
    app: Arc<App>,
    shutdown: impl Future<Output = ()>,
    grace: Duration,
) -> std::io::Result<()> {
    let router = router(app.clone());
    let connections = Arc::new(Semaphore::new(bounds.connections));
    let graceful = GracefulShutdown::new();
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(Duration::from_secs(HEAD_SECONDS)).max_buf_size(MAX_HEAD);
    tokio::pin!(shutdown);
    loop {
        // With every connection taken, too, it has to be heard that the server is to stop.
        let (permit, accepted) = tokio::select! {
            biased;
            () = &mut shutdown => break,
            accepted = async {
                let permit = connections.clone().acquire_owned().await;
                (permit, listener.accept().await)
            } => accepted,
        };
        let (stream, peer) = match accepted {
            Ok((stream, peer)) => (stream, peer.ip()),
            Err(error) => {
                // Too many open files, say: those that are open go on, and room comes.
                tracing::warn!("a connection was not accepted: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let stream = Timed::new(stream, bounds.patience);
        let service = MapRequest::new(router.clone(), move |mut request: hyper::Request<hyper::body::Incoming>| {
            request.extensions_mut().insert(Peer(peer));
            request
        });
        let service = TowerToHyperService::new(service);
        let acceptor = tls.as_ref().map(Tls::acceptor);
        let (builder, watcher) = (builder.clone(), graceful.watcher());
        tokio::spawn(async move {
            // A client that breaks off or sends nonsense is its own affair.
            match acceptor {
                None => _ = watcher.watch(builder.serve_connection(TokioIo::new(stream), service)).await,
                Some(acceptor) => {
                    let shaken = tokio::time::timeout(Duration::from_secs(HEAD_SECONDS), acceptor.accept(stream)).await;
                    if let Ok(Ok(stream)) = shaken {
                        let _ = watcher.watch(builder.serve_connection(TokioIo::new(stream), service)).await;
                    }
                }
            }
            drop(permit);
        });
    }
    app.worker.stop();
    drop(listener);
    let _ = tokio::time::timeout(grace, graceful.shutdown()).await;
    if let Some(exporter) = app.exporter.get() {
        exporter.finish().await;
    }
    Ok(())
}

/// The address to listen at.
pub fn address(host: &str, port: u16) -> Result<SocketAddr, String> {
    let host = if host == "localhost" { "127.0.0.1" } else { host };
    let ip: IpAddr =
        host.parse().map_err(|_| format!("--host `{host}` should be an IP address, as 127.0.0.1 or 0.0.0.0"))?;
    Ok(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests;
