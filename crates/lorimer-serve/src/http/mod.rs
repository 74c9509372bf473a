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
mod metrics;
mod openai;
mod prompts;
mod request;
mod room;
mod shape;
mod timed;
mod work_queue;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
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
use serde_json::json;
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

/// Largest head of a request.
const MAX_HEAD: usize = 32 << 10;
/// Seconds in which the head of a request has to come.
const HEAD_SECONDS: u64 = 15;
/// Seconds for which a client may take nothing of its answer.
const WRITE_SECONDS: u64 = 30;
/// Most connections at a time.
const MAX_CONNECTIONS: usize = 4096;

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

#[utoipa::path(get, path = "/health", tag = "operation", responses((status = 200, description = "New requests are taken", body = Object), (status = 503, description = "The server is stopping", body = error::Failure)))]
async fn health(State(app): State<Arc<App>>) -> Response {
    match app.worker.is_stopping() {
        true => error::stopping().into_response(),
        // A place of adapters that cannot be reached is no reason to start this server anew.
        false => axum::Json(json!({ "status": "ok", "problems": app.problems() })).into_response(),
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
        admin::list,
        admin::load,
        admin::unload,
        admin::put,
        admin::remove,
        metrics::state,
        metrics::prometheus,
        health
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
        .route("/v1/adapters", get(admin::list))
        .route("/v1/state", get(metrics::state))
        .route_layer(from_fn_with_state(app.clone(), bodies::bounded))
        .route_layer(from_fn_with_state(app.clone(), inference));
    let changes = Router::new()
        .route("/v1/load_lora_adapter", post(admin::load))
        .route("/v1/unload_lora_adapter", post(admin::unload))
        .route("/v1/adapters/{*name}", put(admin::put).delete(admin::remove))
        .route_layer(from_fn_with_state(app.clone(), bodies::bounded))
        .route_layer(from_fn_with_state(app.clone(), administration));
    let open = Router::new()
        .route("/health", get(health))
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
        .merge(open)
        .fallback(unknown)
        .method_not_allowed_fallback(method)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(app)
}

/// Serves until `shutdown`; then takes nothing new, and gives what is under way `grace` to end.
pub async fn serve(
    listener: TcpListener,
    app: Arc<App>,
    shutdown: impl Future<Output = ()>,
    grace: Duration,
) -> std::io::Result<()> {
    serve_at_most(MAX_CONNECTIONS, listener, app, shutdown, grace).await
}

async fn serve_at_most(
    most: usize,
    listener: TcpListener,
    app: Arc<App>,
    shutdown: impl Future<Output = ()>,
    grace: Duration,
) -> std::io::Result<()> {
    let router = router(app.clone());
    let connections = Arc::new(Semaphore::new(most));
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
        let stream = Timed::new(stream, Duration::from_secs(WRITE_SECONDS));
        let service = MapRequest::new(router.clone(), move |mut request: hyper::Request<hyper::body::Incoming>| {
            request.extensions_mut().insert(Peer(peer));
            request
        });
        let connection = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            // A client that breaks off or sends nonsense is its own affair.
            let _ = connection.await;
            drop(permit);
        });
    }
    app.worker.stop();
    drop(listener);
    let _ = tokio::time::timeout(grace, graceful.shutdown()).await;
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
mod tests {
    use std::path::Path;
    use std::time::Instant;

    use lorimer_model::{Base, OpenOptions};
    use tokio::net::TcpStream;

    use super::*;
    use crate::engine::worker::{StreamItem, Worker};
    use crate::engine::{EngineSettings, Request as Asked};
    use crate::generation::sampling::Sampling;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
    }

    fn app() -> Arc<App> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/tiny-llama");
        let base = Arc::new(Base::prepare(&path, &OpenOptions::default()).unwrap().load().unwrap());
        let settings = EngineSettings { pool_bytes: 4 << 20, ..Default::default() };
        let worker = Worker::start(base.clone(), settings).unwrap();
        App::new(base, "tiny".into(), None, worker, Keys::default(), true)
    }

    #[test]
    fn the_end_is_heard_while_every_connection_is_taken() {
        runtime().block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
            let stopped = async move { _ = stopped.await };
            let server = tokio::spawn(serve_at_most(2, listener, app(), stopped, Duration::from_millis(200)));
            let mut taken = Vec::new();
            for _ in 0..4 {
                taken.push(TcpStream::connect(address).await.unwrap());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            stop.send(()).unwrap();
            tokio::time::timeout(Duration::from_secs(5), server).await.expect("it ends").unwrap().unwrap();
        });
    }

    /// Whoever does not take his answer loses it, and the engine keeps no more of it than its queue.
    #[test]
    fn an_answer_that_nobody_takes_is_given_up() {
        runtime().block_on(async {
            let app = app();
            let request = Asked {
                prompt: vec![3, 4, 5],
                adapters: vec![],
                max_tokens: Some(500),
                sampling: Sampling::default(),
                seed: 0,
                stop: vec![],
                log_probabilities: None,
                of_prompt: false,
                tenant: Default::default(),
                names: vec![],
            };
            let mut ticket = app.worker.submit(request).await.unwrap();
            let begun = Instant::now();
            while app.worker.figures().cancelled == 0 {
                assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", app.worker.figures());
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            let mut items = Vec::new();
            while let Some(one) = ticket.next().await {
                items.push(one);
            }
            assert!(items.len() < 500 && items.last() == Some(&StreamItem::TooSlow), "{}", items.len());
        });
    }
}
