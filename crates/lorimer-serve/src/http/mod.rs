//! The HTTP server: OpenAI's calls, vLLM's for adapters, our own for the same with compare-and-swap, health, metrics and a page.

mod admin;
mod answer;
mod bodies;
mod desk;
pub mod error;
mod fields;
mod metrics;
mod openai;
mod prompts;
mod request;
mod shape;
mod timed;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, FromRequest, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post, put};
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use lorimer_model::Base;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tower::util::MapRequest;
use utoipa::OpenApi;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};

use self::bodies::{MAX_BODY, SMALL_BODY};
use self::desk::{Desk, Readers};
use self::error::ApiError;
use self::fields::Fields;
use self::timed::Timed;
use crate::hosted::Hosted;
use crate::store::Store;
use crate::worker::Worker;

/// Largest head of a request.
const MAX_HEAD: usize = 32 << 10;
/// Seconds in which the head of a request has to come.
const HEAD_SECONDS: u64 = 15;
/// Seconds for which a client may take nothing of its answer.
const WRITE_SECONDS: u64 = 30;
/// Most connections at a time.
const MAX_CONNECTIONS: usize = 4096;
/// Bodies that are parsed and prompts that are encoded at a time, of small and of large requests each, and the seconds within which that has
/// to be done.
const TEXT: (usize, u64) = (2, 20);
/// Adapters that are fetched and read at a time (read one after the other, by the store's own threads), and the seconds for which a request
/// waits for one. A load goes on without those that gave up.
const LOADS: (usize, u64) = (32, 30);
/// Most adapters that are asked for and not there yet.
const MAX_LOADING: usize = 1024;
/// Changes of names, and replays of golden prompts, at a time, and the seconds within which each has to be done.
const CHANGES: (usize, u64) = (2, 120);
/// For how long a request for an adapter that is in memory waits for the object store to tell whether it has changed, where the store
/// was no slower the last time.
const LOOK: Duration = Duration::from_millis(50);
/// Least bytes that a token of a prompt may stand for, however short the tokenizer's are, before the prompt is refused by its length.
const TOKEN_BYTES: usize = 64;

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
    text: Readers,
    loads: Desk,
    changes: Desk,
    /// Adapters on their way into memory, by name.
    loading: Mutex<HashMap<(String, u64), Loading>>,
    /// Whether the object store was slow to tell the last time.
    slow: AtomicBool,
    /// Room for large bodies.
    bodies: Arc<Semaphore>,
    /// Bytes of the longest prompt that can be one.
    longest: usize,
}

/// An adapter on its way into memory, for all who wait for it.
type Loading = Shared<BoxFuture<'static, Result<Arc<Hosted>, ApiError>>>;

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
        let longest = base.model.config.max_positions.saturating_mul(base.text.longest_token().max(TOKEN_BYTES));
        let desk = |(at_once, seconds), what| Desk::new(at_once, Duration::from_secs(seconds), what);
        Arc::new(Self {
            base,
            name,
            store,
            worker,
            keys,
            loopback,
            started: now.as_secs(),
            random: AtomicU64::new(now.as_nanos() as u64 ^ (u64::from(std::process::id()) << 32)),
            text: Readers::new(TEXT.0, Duration::from_secs(TEXT.1), "reading the request"),
            loads: desk(LOADS, "loading the adapter"),
            changes: desk(CHANGES, "the change"),
            loading: Mutex::default(),
            slow: AtomicBool::new(false),
            bodies: bodies::room(),
            longest,
        })
    }

    /// Whether a name stands for the base alone.
    fn is_base(&self, name: &str) -> bool {
        name == self.name || name == "base" || self.name.rsplit('/').next() == Some(name)
    }

    /// Refuses tokens that the model does not have.
    fn in_vocabulary(&self, field: &str, ids: &[u32]) -> Result<(), ApiError> {
        let size = self.base.model.config.vocab_size;
        match ids.iter().find(|&&id| id as usize >= size) {
            Some(id) => {
                Err(ApiError::field(field, format!("`{field}`: token {id} is outside the vocabulary of {size}")))
            }
            None => Ok(()),
        }
    }

    /// A number that was not there before (splitmix64).
    fn random(&self) -> u64 {
        let mut z = self.random.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Refuses texts that are too long for the context whatever their tokens are.
    fn fits(&self, field: &str, bytes: usize) -> Result<(), ApiError> {
        if bytes <= self.longest {
            return Ok(());
        }
        let tokens = self.base.model.config.max_positions;
        let message = format!(
            "a prompt of {bytes} bytes cannot fit into the {tokens} tokens that the model is made for; shorten it"
        );
        Err(ApiError::field(field, message))
    }

    /// What is wrong with the place that the adapters come from.
    fn problems(&self) -> Vec<String> {
        self.store.as_ref().map(|store| store.problems()).unwrap_or_default()
    }

    fn needed_store(&self) -> Result<&Arc<Store>, ApiError> {
        let message = "this server has no folder of adapters; start it with --adapters";
        self.store.as_ref().ok_or_else(|| ApiError::new(StatusCode::NOT_FOUND, "adapter_not_found", message))
    }

    /// Adapters by name, read where they are not in memory.
    async fn adapters(
        self: &Arc<Self>,
        named: Vec<(String, f32)>,
    ) -> Result<(Vec<(Arc<Hosted>, f32)>, Vec<String>), ApiError> {
        let names = named.iter().map(|(name, _)| name.clone()).collect();
        let mut adapters = Vec::new();
        for (name, weight) in named {
            adapters.push((self.adapter(name).await?, weight));
        }
        Ok((adapters, names))
    }

    async fn adapter(self: &Arc<Self>, name: String) -> Result<Arc<Hosted>, ApiError> {
        let store = self.needed_store()?;
        if let Some(hosted) = store.cached(&name) {
            return Ok(hosted);
        }
        let held = store.held(&name);
        let loading = self.load(name, held.is_some())?;
        let Some(held) = held else { return self.loads.wait(loading).await };
        // It may have changed where it comes from. That is asked in any case, and waited for where the answer comes at once.
        let patience = if self.slow.load(Ordering::Relaxed) { Duration::ZERO } else { LOOK };
        match tokio::time::timeout(patience, loading).await {
            Ok(Err(error)) if !error.status.is_server_error() => Err(error),
            Ok(Ok(hosted)) => Ok(hosted),
            Ok(Err(_)) | Err(_) => Ok(held),
        }
    }

    /// Reads an adapter, once for all who ask meanwhile; `held`: it is in memory, and the store is asked whether it has changed.
    fn load(self: &Arc<Self>, name: String, held: bool) -> Result<Loading, ApiError> {
        // Who asks after a name was changed does not wait with those who asked before.
        let key = (name.clone(), self.needed_store()?.version());
        let mut all = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(loading) = all.get(&key) {
            return Ok(loading.clone());
        }
        if all.len() >= MAX_LOADING {
            return Err(self.loads.late());
        }
        let (app, store, own) = (self.clone(), self.needed_store()?.clone(), key.clone());
        let task = tokio::spawn(async move {
            let begun = Instant::now();
            let base = app.base.clone();
            let loaded = app.loads.run(move || Ok(store.get(&base.model, &name)?)).await;
            // One that is read from this machine's disk tells nothing of the store.
            if held {
                app.slow.store(begun.elapsed() > LOOK, Ordering::Relaxed);
            }
            app.loading.lock().unwrap_or_else(PoisonError::into_inner).remove(&own);
            loaded
        });
        let ended = |_| ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "failed", "the adapter was not loaded");
        let loading = async move { task.await.map_err(ended)? }.boxed().shared();
        all.insert(key, loading.clone());
        Ok(loading)
    }
}

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
        let most = app.base.model.config.max_positions.saturating_mul(request::MAX_CHOICES).saturating_add(SMALL_BODY);
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

/// Compares without telling by its time where two keys differ.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (kind, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    kind.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// The other end of a connection.
#[derive(Clone, Copy)]
struct Peer(IpAddr);

tokio::task_local! {
    /// Who asks: what fairness goes by, since it cannot be made up.
    static CLIENT: Arc<str>;
}

/// The client whose request is handled.
fn client() -> Arc<str> {
    CLIENT.try_with(Arc::clone).unwrap_or_default()
}

/// A client by the machine that it connects from and the key that it brought, where one is needed.
fn named(request: &Request, key: Option<usize>) -> Arc<str> {
    let ip = match request.extensions().get::<Peer>() {
        Some(Peer(IpAddr::V4(ip))) => ip.to_string(),
        // Whoever has one such address has all that differ in their last 64 bits.
        Some(Peer(IpAddr::V6(ip))) => ip.segments()[..4].iter().map(|s| format!("{s:x}:")).collect(),
        None => String::new(),
    };
    format!("{ip}/{}", key.map_or(String::new(), |key| key.to_string())).into()
}

/// Lets calls through that bring one of the tokens. Which it was; None where none is needed.
fn permitted(app: &App, headers: &HeaderMap, keys: &[&Option<String>], what: &str) -> Result<Option<usize>, ApiError> {
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
        return Ok(None);
    }
    let given = bearer(headers);
    if let Some(which) = given.and_then(|given| wanted.position(|key| same(given.as_bytes(), key.as_bytes()))) {
        return Ok(Some(which));
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

/// A JSON object of an outcome.
fn done(message: String, more: Value) -> Value {
    let mut body = json!({ "status": "success", "message": message });
    if let (Some(body), Value::Object(more)) = (body.as_object_mut(), more) {
        body.extend(more);
    }
    body
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use lorimer_model::OpenOptions;
    use tokio::net::TcpStream;

    use super::*;
    use crate::engine::{EngineSettings, Request as Asked};
    use crate::sampling::Sampling;
    use crate::worker::Heard;

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
            let mut heard = Vec::new();
            while let Some(one) = ticket.next().await {
                heard.push(one);
            }
            assert!(heard.len() < 500 && heard.last() == Some(&Heard::TooSlow), "{}", heard.len());
        });
    }
}
