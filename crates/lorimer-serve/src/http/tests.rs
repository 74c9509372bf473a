//! The whole of HTTP over an engine in this process, so that parts of it can be made to fail.

use std::path::Path;
use std::time::Instant;

use axum::body::{Body, to_bytes};
use lorimer_model::embed::EmbedOptions;
use lorimer_model::{Base, OpenOptions};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tower::ServiceExt;

use super::*;
use crate::engine::fault::Fault;
use crate::engine::scheduler::Policy;
use crate::engine::worker::{StreamItem, Ticket, Worker};
use crate::engine::{EngineSettings, Request as Asked};
use crate::generation::sampling::Sampling;

mod bounds;
mod failures;

/// Longest that anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn base(name: &str) -> Arc<Base> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens").join(name);
    Arc::new(Base::prepare(&path, &OpenOptions::default()).unwrap().load().unwrap())
}

fn app_with(policy: Policy, keys: Keys) -> Arc<App> {
    let base = base("tiny-llama");
    let settings = EngineSettings { pool_bytes: 4 << 20, policy, ..Default::default() };
    let worker = Worker::start(base.clone(), settings).unwrap();
    App::new(base, "tiny".into(), None, worker, keys, true)
}

fn app() -> Arc<App> {
    app_with(Policy::default(), Keys::default())
}

fn plain(prompt: Vec<u32>, max_tokens: usize) -> Asked {
    Asked {
        prompt,
        adapters: vec![],
        max_tokens: Some(max_tokens),
        sampling: Sampling::default(),
        seed: 0,
        stop: vec![],
        log_probabilities: None,
        of_prompt: false,
        tenant: Default::default(),
        names: vec![],
        form: None,
    }
}

/// Status and body.
async fn get(app: &Arc<App>, path: &str) -> (u16, Value) {
    let request = Request::builder().uri(path).body(Body::empty()).unwrap();
    let answer = router(app.clone()).oneshot(request).await.unwrap();
    let status = answer.status().as_u16();
    (status, serde_json::from_slice(&to_bytes(answer.into_body(), usize::MAX).await.unwrap()).unwrap())
}

/// The answer to a call with a JSON body, from a client of this address and with this key.
async fn post_from(app: &Arc<App>, (ip, key): (&str, &str), path: &str, body: &Value) -> Response {
    let request = Request::builder().method("POST").uri(path).header(header::CONTENT_TYPE, "application/json");
    let request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
    let request = request.extension(Peer(ip.parse().unwrap())).body(Body::from(body.to_string())).unwrap();
    tokio::time::timeout(PATIENCE, router(app.clone()).oneshot(request)).await.expect("an answer").unwrap()
}

async fn text(answer: Response) -> (u16, String) {
    let status = answer.status().as_u16();
    let body = tokio::time::timeout(PATIENCE, to_bytes(answer.into_body(), usize::MAX)).await.expect("a whole answer");
    (status, String::from_utf8(body.unwrap().to_vec()).unwrap())
}

/// Status and JSON of an answer.
async fn post(app: &Arc<App>, path: &str, body: &Value) -> (u16, Value) {
    let (status, body) = text(post_from(app, ("127.0.0.1", ""), path, body).await).await;
    (status, serde_json::from_str(&body).unwrap_or_else(|e| panic!("{e}: {body}")))
}

/// Code and message of an error.
fn error((status, body): &(u16, Value)) -> (u16, &str, &str) {
    (*status, body["error"]["code"].as_str().unwrap_or_default(), body["error"]["message"].as_str().unwrap_or_default())
}

/// Waits until something holds of the figures, which are a fifth of a second old at most.
async fn figures(app: &App, what: &str, holds: impl Fn(&crate::engine::worker::Figures) -> bool) {
    let begun = Instant::now();
    while !holds(&app.worker.figures()) {
        assert!(begun.elapsed() < PATIENCE, "{what}: {:?}", app.worker.figures());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
