//! What the server works with.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::http::StatusCode;
use futures_util::FutureExt;
use lorimer_model::Base;
use lorimer_model::embed::EmbedOptions;
use tokio::sync::Semaphore;

use super::error::ApiError;
use super::hub::Fetches;
use super::room::room;
use super::work_queue::{Loading, Readers, WorkQueue};
use crate::adapters::hosted::Hosted;
use crate::adapters::hub::{Hub, is_fetchable};
use crate::adapters::store::{Store, StoreError};
use crate::engine::worker::Worker;
use crate::generation::form::{Constraint, Form, Vocabulary};
use crate::trace::Exporter;

/// Bodies that are parsed and prompts that are encoded at a time, of small and of large requests each, and the seconds within which that has
/// to be done.
const TEXT: (usize, u64) = (2, 20);

/// Adapters that are fetched and read at a time (read one after the other, by the store's own threads), and the seconds for which a request
/// waits for one. A load goes on without those that gave up.
const LOADS: (usize, u64) = (32, 30);

/// Most adapters that are asked for and not there yet.
const MAX_LOADING: usize = 1024;

/// Forms of answers that are compiled at a time, and the seconds within which each has to be.
const FORMS: (usize, u64) = (2, 20);

/// Requests whose texts become vectors at a time, each on all threads, and the seconds for which one waits.
const EMBEDS: (usize, u64) = (1, 120);

/// Changes of names, and replays of golden prompts, at a time, and the seconds within which each has to be done.
const CHANGES: (usize, u64) = (2, 120);

/// Adapters that are received at a time, and the seconds within which each has to be.
const RECEIVED: (usize, u64) = (2, 1800);

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
    /// How texts become vectors, where the base is an encoder: then it answers no prompts.
    pub embed: Option<EmbedOptions>,
    /// Tokens that calls have to bring.
    pub keys: Keys,
    /// Whether only this machine can reach the server.
    pub loopback: bool,
    /// The vocabulary as forms of answers see it, from the first such request on.
    pub(super) vocabulary: OnceLock<Result<Vocabulary, String>>,
    /// Where spans go, if anywhere.
    pub(super) exporter: OnceLock<Exporter>,
    /// Where adapters come from that are not here, if they may.
    pub(super) hub: OnceLock<Arc<Fetches>>,
    /// Whether adapters may come as files.
    pub(super) uploads: AtomicBool,
    /// Whether requests should go elsewhere.
    pub(super) draining: AtomicBool,
    pub(super) started: u64,
    pub(super) random: AtomicU64,
    pub(super) text: Readers,
    pub(super) forms: WorkQueue,
    pub(super) embeds: WorkQueue,
    pub(super) loads: WorkQueue,
    pub(super) changes: WorkQueue,
    pub(super) received: WorkQueue,
    /// Adapters on their way into memory, by name.
    pub(super) loading: Mutex<HashMap<(String, u64), Loading>>,
    /// Whether the object store was slow to tell the last time.
    pub(super) slow: AtomicBool,
    /// Room for large bodies.
    pub(super) bodies: Arc<Semaphore>,
    /// Bytes of the longest prompt that can be one.
    pub(super) longest: usize,
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
        Self::embedding((base, None), name, store, worker, keys, loopback)
    }

    /// An app of an encoder, with how its texts become vectors.
    pub fn embedding(
        (base, embed): (Arc<Base>, Option<EmbedOptions>),
        name: String,
        store: Option<Arc<Store>>,
        worker: Worker,
        keys: Keys,
        loopback: bool,
    ) -> Arc<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let longest =
            base.model().shape().cached_positions().saturating_mul(base.text.longest_token().max(TOKEN_BYTES));
        let queue = |(at_once, seconds), what| WorkQueue::new(at_once, Duration::from_secs(seconds), what);
        Arc::new(Self {
            base,
            name,
            store,
            worker,
            embed,
            keys,
            loopback,
            vocabulary: OnceLock::new(),
            exporter: OnceLock::new(),
            hub: OnceLock::new(),
            uploads: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            started: now.as_secs(),
            random: AtomicU64::new(now.as_nanos() as u64 ^ (u64::from(std::process::id()) << 32)),
            text: Readers::new(TEXT.0, Duration::from_secs(TEXT.1), "reading the request"),
            forms: queue(FORMS, "compiling the form of the answer"),
            embeds: queue(EMBEDS, "embedding the texts"),
            loads: queue(LOADS, "loading the adapter"),
            changes: queue(CHANGES, "the change"),
            received: queue(RECEIVED, "the upload"),
            loading: Mutex::default(),
            slow: AtomicBool::new(false),
            bodies: room(),
            longest,
        })
    }

    /// Lets adapters come as files.
    pub fn allow_uploads(&self) {
        self.uploads.store(true, Ordering::Relaxed);
    }

    /// Lets adapters come from the hub, those of them that are here taking so many bytes at most.
    ///
    /// # Errors
    ///
    /// Fails if the folders of adapters cannot be listed.
    pub fn allow_hub(&self, space: u64) -> Result<(), StoreError> {
        if let Some(store) = &self.store {
            let _ = self.hub.set(Arc::new(Fetches::new(Hub::new(store, space)?)));
        }
        Ok(())
    }

    /// Exports spans from now on.
    pub fn export_to(&self, exporter: Exporter) {
        let _ = self.exporter.set(exporter);
    }

    /// Whether a name stands for the base alone.
    pub(super) fn is_base(&self, name: &str) -> bool {
        name == self.name || name == "base" || self.name.rsplit('/').next() == Some(name)
    }

    /// Refuses what asks an encoder for tokens.
    pub(super) fn predicts(&self) -> Result<(), ApiError> {
        if self.base.model().shape().causal {
            return Ok(());
        }
        let message = format!("`{}` is an encoder and predicts no tokens; ask /v1/embeddings", self.name);
        Err(ApiError::new(StatusCode::BAD_REQUEST, "not_a_decoder", message))
    }

    /// The beginning of an answer that a field asks to be held to a form.
    pub(super) async fn begin(self: &Arc<Self>, field: &'static str, form: Form) -> Result<Constraint, ApiError> {
        let app = self.clone();
        let begin = move || {
            let size = app.base.model().shape().vocabulary;
            let vocabulary = app.vocabulary.get_or_init(|| Vocabulary::new(&app.base.text, size));
            let begun = vocabulary.as_ref().map_err(String::clone).and_then(|vocabulary| vocabulary.begin(&form));
            begun.map_err(|problem| ApiError::field(field, format!("`{field}` cannot be followed: {problem}")))
        };
        self.forms.within(begin).await
    }

    /// Refuses tokens that the model does not have.
    pub(super) fn in_vocabulary(&self, field: &str, ids: &[u32]) -> Result<(), ApiError> {
        let size = self.base.model().shape().vocabulary;
        match ids.iter().find(|&&id| id as usize >= size) {
            Some(id) => {
                Err(ApiError::field(field, format!("`{field}`: token {id} is outside the vocabulary of {size}")))
            }
            None => Ok(()),
        }
    }

    /// A number that was not there before (splitmix64).
    pub(super) fn random(&self) -> u64 {
        let mut z = self.random.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Refuses texts that are too long for the context whatever their tokens are.
    pub(super) fn fits(&self, field: &str, bytes: usize) -> Result<(), ApiError> {
        if bytes <= self.longest {
            return Ok(());
        }
        let tokens = self.base.model().shape().cached_positions();
        let message = format!(
            "a text of {bytes} bytes cannot fit into the {tokens} tokens that the model is made for; shorten it"
        );
        Err(ApiError::field(field, message))
    }

    /// What is wrong with the place that the adapters come from, and with the engine.
    pub(super) fn problems(&self) -> Vec<String> {
        let store = self.store.as_ref().map(|store| store.problems()).unwrap_or_default();
        store.into_iter().chain(self.worker.problem()).collect()
    }

    pub(super) fn needed_store(&self) -> Result<&Arc<Store>, ApiError> {
        let message = "this server has no folder of adapters; start it with --adapters";
        self.store.as_ref().ok_or_else(|| ApiError::new(StatusCode::NOT_FOUND, "adapter_not_found", message))
    }

    /// Adapters by name, read where they are not in memory.
    pub(super) async fn adapters(
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

    pub(super) async fn adapter(self: &Arc<Self>, name: String) -> Result<Arc<Hosted>, ApiError> {
        let missing = match self.stored(name.clone()).await {
            Err(error) if error.code == "adapter_not_found" => error,
            there => return there,
        };
        match self.hub.get().filter(|_| is_fetchable(&name)) {
            Some(hub) => hub.wait(name, self.needed_store()?, &self.base).await,
            None => Err(missing),
        }
    }

    /// An adapter that is here, or in the object store.
    async fn stored(self: &Arc<Self>, name: String) -> Result<Arc<Hosted>, ApiError> {
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
    pub(super) fn load(self: &Arc<Self>, name: String, held: bool) -> Result<Loading, ApiError> {
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
            let loaded = app.loads.run(move || Ok(store.get(base.model(), &name)?)).await;
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
