//! The HTTP server: OpenAI's calls, vLLM's for adapters, our own for the same with compare-and-swap, health, metrics and a page.

mod admin;
mod answer;
pub mod error;
mod metrics;
mod openai;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, FromRequest, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post, put};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use lorimer_model::Base;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use utoipa::OpenApi;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};

use self::error::ApiError;
use crate::hosted::Hosted;
use crate::store::Store;
use crate::worker::Worker;

/// Largest body of a request.
const MAX_BODY: usize = 8 << 20;
/// Largest head of a request.
const MAX_HEAD: usize = 32 << 10;
/// Seconds in which the head of a request has to come.
const HEAD_SECONDS: u64 = 15;
/// Seconds in which the body of a request has to come.
const BODY_SECONDS: u64 = 30;
/// Most connections at a time.
const MAX_CONNECTIONS: usize = 4096;
/// Adapters that are read, and prompts that are encoded, at a time.
const BLOCKING: usize = 2;

/// Tokens that calls have to bring.
#[derive(Clone, Debug, Default)]
pub struct Keys {
    /// For answers; none for everybody.
    pub api: Option<String>,
    /// For changing adapters; none for everybody who may ask for answers.
    pub admin: Option<String>,
}

impl Keys {
    /// Refuses to be reached from other machines without keys.
    pub fn check(&self, host: IpAddr) -> Result<(), String> {
        if host.is_loopback() || (self.api.is_some() && self.admin.is_some()) {
            return Ok(());
        }
        Err(format!(
            "--host {host} can be reached from other machines; give --api-key and --admin-key, or use 127.0.0.1"
        ))
    }
}

/// What the server works with.
pub struct App {
    /// The base.
    pub base: Arc<Base>,
    /// The base's name.
    pub name: String,
    /// Adapters, if any are served.
    pub store: Option<Arc<Store>>,
    /// The engine.
    pub worker: Worker,
    /// Tokens that calls have to bring.
    pub keys: Keys,
    /// Whether only this machine can reach the server.
    pub loopback: bool,
    started: u64,
    random: AtomicU64,
    blocking: Semaphore,
}

impl App {
    /// An app; `loopback` if only this machine can reach it.
    pub fn new(
        base: Arc<Base>,
        name: String,
        store: Option<Arc<Store>>,
        worker: Worker,
        keys: Keys,
        loopback: bool,
    ) -> Arc<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Arc::new(Self {
            base,
            name,
            store,
            worker,
            keys,
            loopback,
            started: now.as_secs(),
            random: AtomicU64::new(now.as_nanos() as u64 ^ (u64::from(std::process::id()) << 32)),
            blocking: Semaphore::new(BLOCKING),
        })
    }

    /// Whether a name stands for the base alone.
    fn is_base(&self, name: &str) -> bool {
        name == self.name || name == "base" || self.name.rsplit('/').next() == Some(name)
    }

    /// A number that was not there before (splitmix64).
    fn random(&self) -> u64 {
        let mut z = self.random.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Runs work that takes a while away from the connections.
    async fn blocking<T: Send + 'static>(
        &self,
        f: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let _permit = self.blocking.acquire().await;
        let failed = |_| ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "failed", "the request could not be handled");
        tokio::task::spawn_blocking(f).await.map_err(failed)?
    }

    fn needed_store(&self) -> Result<&Arc<Store>, ApiError> {
        let message = "this server has no folder of adapters; start it with --adapters";
        self.store.as_ref().ok_or_else(|| ApiError::new(StatusCode::NOT_FOUND, "adapter_not_found", message))
    }

    /// Adapters by name, read where they are not in memory.
    async fn adapters(&self, named: Vec<(String, f32)>) -> Result<(Vec<(Arc<Hosted>, f32)>, Vec<String>), ApiError> {
        let names = named.iter().map(|(name, _)| name.clone()).collect();
        let mut adapters = Vec::new();
        for (name, weight) in named {
            let (store, base) = (self.needed_store()?.clone(), self.base.clone());
            let hosted = match store.cached(&name) {
                Some(hosted) => hosted,
                None => self.blocking(move || Ok(store.get(&base.model, &name)?)).await?,
            };
            adapters.push((hosted, weight));
        }
        Ok((adapters, names))
    }
}

/// A JSON body, with errors as sentences.
pub struct Body<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
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
        let length = request.headers().get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
        if length.is_some_and(|n| n > MAX_BODY as u64) {
            let message = format!("the body is longer than {MAX_BODY} bytes");
            return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message));
        }
        let read = tokio::time::timeout(Duration::from_secs(BODY_SECONDS), Bytes::from_request(request, state)).await;
        let late = |_| {
            let message = format!("the body did not come within {BODY_SECONDS} seconds");
            ApiError::new(StatusCode::REQUEST_TIMEOUT, "body_too_slow", message)
        };
        let bytes = read.map_err(late)?.map_err(|rejection| {
            let message = format!("the body could not be read: {}", rejection.body_text());
            ApiError::new(rejection.status(), "body_unreadable", message)
        })?;
        let parsed = serde_json::from_slice(&bytes);
        parsed.map(Body).map_err(|e| ApiError::invalid(format!("the body is not what was expected: {e}")))
    }
}

/// Compares without telling by its time where two keys differ.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (kind, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    kind.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// Lets calls through that bring one of the tokens.
fn permitted(app: &App, headers: &HeaderMap, keys: &[&Option<String>], what: &str) -> Result<(), ApiError> {
    if app.loopback {
        // A name that is led to this machine by somebody else's DNS does not get in.
        let host = headers.get(header::HOST).and_then(|h| h.to_str().ok()).unwrap_or("localhost");
        let name = host.rsplit_once(':').filter(|(_, port)| port.parse::<u16>().is_ok()).map_or(host, |(name, _)| name);
        let literal: Option<IpAddr> = name.trim_matches(['[', ']']).parse().ok();
        if !name.eq_ignore_ascii_case("localhost") && !literal.is_some_and(|ip| ip.is_loopback()) {
            let message = "this server answers to localhost only";
            return Err(ApiError::new(StatusCode::FORBIDDEN, "wrong_host", message));
        }
    }
    let mut wanted = keys.iter().filter_map(|key| key.as_ref()).peekable();
    if wanted.peek().is_none() {
        return Ok(());
    }
    let given = bearer(headers);
    if given.is_some_and(|given| wanted.any(|key| same(given.as_bytes(), key.as_bytes()))) {
        return Ok(());
    }
    let message = format!("this call needs `Authorization: Bearer` with the {what} key");
    Err(ApiError::new(StatusCode::UNAUTHORIZED, "unauthorized", message))
}

async fn inference(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let keys = match &app.keys.api {
        // The administrator may ask too.
        Some(_) => vec![&app.keys.api, &app.keys.admin],
        None => vec![],
    };
    match permitted(&app, request.headers(), &keys, "API") {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

async fn administration(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let key = if app.keys.admin.is_some() { &app.keys.admin } else { &app.keys.api };
    match permitted(&app, request.headers(), &[key], "admin") {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

#[utoipa::path(get, path = "/health", tag = "operation", responses((status = 200, description = "New requests are taken", body = Object), (status = 503, description = "The server is stopping", body = error::Failure)))]
async fn health(State(app): State<Arc<App>>) -> Response {
    match app.worker.is_stopping() {
        true => error::stopping().into_response(),
        false => axum::Json(json!({ "status": "ok" })).into_response(),
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
        .route("/v1/adapters", get(admin::list))
        .route("/v1/state", get(metrics::state))
        .route_layer(from_fn_with_state(app.clone(), inference));
    let changes = Router::new()
        .route("/v1/load_lora_adapter", post(admin::load))
        .route("/v1/unload_lora_adapter", post(admin::unload))
        .route("/v1/adapters/{*name}", put(admin::put).delete(admin::remove))
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
    let router = router(app.clone());
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let graceful = GracefulShutdown::new();
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(Duration::from_secs(HEAD_SECONDS)).max_buf_size(MAX_HEAD);
    tokio::pin!(shutdown);
    loop {
        let Ok(permit) = connections.clone().acquire_owned().await else { break };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut shutdown => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Too many open files, say: those that are open go on, and room comes.
                tracing::warn!("a connection was not accepted: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let connection = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router.clone()));
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

/// A JSON object of an outcome.
fn done(message: String, more: Value) -> Value {
    let mut body = json!({ "status": "success", "message": message });
    if let (Some(body), Value::Object(more)) = (body.as_object_mut(), more) {
        body.extend(more);
    }
    body
}
