//! Adapters in an object store (S3-compatible, or what else `object_store` knows by URL), mirrored to a folder of this machine on demand.
//!
//! An adapter is what lies below PREFIX/NAME/ with an `adapter_config.json`. Its files are fetched when it is first asked for, into a folder
//! named after their entity tags, and again when those change; what was fetched survives the process. Only the few files that an adapter
//! has are fetched, up to the bound on files. Adapters that it is made of are fetched with it, each as the adapter of the store that it is.
//!
//! Nobody waits for the store who can do without: what was looked at within [`KNOWN`] is used as it is, and looked at again beside the
//! request. While the store does not answer, what is here is served, and it is asked again after a second, two, four … up to a minute.

mod parts;
mod remote;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lorimer_model::files::{check_writable, create_folder};
use object_store::aws::AmazonS3Builder;
use object_store::path::Path as Key;
use object_store::{
    ClientOptions, Error, ObjectStore, ObjectStoreScheme, PutMode, PutOptions, PutPayload, RetryConfig,
};
use url::Url;

use crate::adapters::found::Found;
use crate::adapters::names::{Code, StoreError, check_name};
use crate::adapters::registry::{self, Registry, Written};

/// For how long an adapter is taken to be what it was when last looked at.
pub const FRESH: Duration = Duration::from_secs(2);
/// For how long after the last look an adapter is used while it is looked at again.
pub const KNOWN: Duration = Duration::from_secs(60);
/// How often names that other servers gave are asked for.
pub const NAMES: Duration = Duration::from_secs(5);
/// How long the store has to begin an answer, and between two parts of one.
const PATIENCE: Duration = Duration::from_secs(5);
/// Times that it is asked.
const TRIES: usize = 3;
/// How long the store has at start, and to tell of an adapter that is here already.
const SHORT: Duration = Duration::from_secs(10);
/// How long fetching an adapter may take.
const LONG: Duration = Duration::from_secs(60);
/// Failures in a row from which on the store is taken not to answer.
const FAILURES: u32 = 3;
/// Longest time until a store that does not answer is asked again.
const MOST_WAIT: Duration = Duration::from_secs(60);
/// Times that names are written again because another server came before.
const CONFLICTS: usize = 20;
/// That there was no answer.
const LATE: &str = "the object store does not answer in time";
/// Largest configuration and manifest.
const MAX_TEXT: u64 = 16 << 20;

/// An object store and the folder that mirrors it.
pub struct Mirror {
    shared: Arc<Shared>,
    /// There until the end.
    runtime: Option<tokio::runtime::Runtime>,
}

/// What the threads that fetch have too.
struct Shared {
    store: Box<dyn ObjectStore>,
    /// The URL that it was opened by.
    address: String,
    prefix: Key,
    root: PathBuf,
    /// The folder that the URL names, if it is one of this machine: its names change under a lock.
    local: Option<PathBuf>,
    max_file_bytes: u64,
    /// Where adapters were found.
    looked: Mutex<HashMap<PathBuf, Looked>>,
    outage: Mutex<Outage>,
    news: Mutex<News>,
    any_news: AtomicBool,
}

/// An adapter as it was fetched: its folder, and the names of the adapters that it is made of.
#[derive(Clone)]
struct Fetched {
    folder: PathBuf,
    parts: Vec<PathBuf>,
}

/// Where an adapter was found.
struct Looked {
    when: Instant,
    fetched: Fetched,
    /// Whether somebody looks again.
    again: bool,
}

/// Whether the store answers.
#[derive(Default)]
struct Outage {
    failures: u32,
    until: Option<Instant>,
    problem: String,
}

/// What was found beside requests and nobody has taken up yet.
#[derive(Default)]
struct News {
    registry: Option<Registry>,
    listing: Option<Vec<String>>,
    /// Of the registry that was read last.
    tag: Option<String>,
}

impl Drop for Mirror {
    fn drop(&mut self) {
        // Wherever that is, another runtime's thread included.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn failed(message: impl Into<String>) -> StoreError {
    StoreError { code: Code::StoreFailed, message: message.into() }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether a failure is the store's answer, and not that there is none.
fn is_answer(error: &Error) -> bool {
    matches!(
        error,
        Error::NotFound { .. }
            | Error::InvalidPath { .. }
            | Error::AlreadyExists { .. }
            | Error::Precondition { .. }
            | Error::NotModified { .. }
            | Error::NotImplemented { .. }
            | Error::NotSupported { .. }
            | Error::PermissionDenied { .. }
            | Error::Unauthenticated { .. }
    )
}

/// The store at a URL. Of the environment only `AWS_…` counts: other names are other programs'.
fn open_store(url: &Url, address: &str) -> object_store::Result<(Box<dyn ObjectStore>, Key)> {
    let (scheme, prefix) = ObjectStoreScheme::parse(url)?;
    if scheme != ObjectStoreScheme::AmazonS3 {
        return object_store::parse_url_opts(url, None::<(String, String)>);
    }
    // A body may take as long as it comes.
    let client = ClientOptions::new().with_connect_timeout(PATIENCE).with_timeout_disabled();
    let retry = RetryConfig { max_retries: 2, retry_timeout: 2 * PATIENCE, ..Default::default() };
    let builder = AmazonS3Builder::new().with_url(address).with_client_options(client).with_retry(retry);
    let variables = std::env::vars_os().filter_map(|(name, value)| {
        let name = name.to_str()?.strip_prefix("AWS_")?.to_ascii_lowercase();
        Some((format!("aws_{name}").parse().ok()?, value.to_str()?.to_string()))
    });
    let builder = variables.fold(builder, |builder, (key, value)| builder.with_config(key, value));
    Ok((Box::new(builder.build()?), Key::parse(prefix)?))
}

impl Mirror {
    /// The store at a URL (`s3://bucket/prefix`), set up from the environment (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`,
    /// `AWS_ENDPOINT`, `AWS_ALLOW_HTTP` …), mirrored below `root`.
    ///
    /// # Errors
    ///
    /// Fails if the address is no URL of a known kind, or if `root` cannot be created.
    pub fn open(address: &str, root: &Path, max_file_bytes: u64) -> Result<Self, StoreError> {
        let url = Url::parse(address).map_err(|e| failed(format!("`{address}` is no URL: {e}")))?;
        lorimer_model::http::install_ring();
        let (store, prefix) =
            open_store(&url, address).map_err(|e| failed(format!("`{address}` cannot be opened: {e}")))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("mirror")
            .enable_all()
            .build()
            .map_err(|e| failed(format!("the threads that fetch adapters cannot be started: {e}")))?;
        create_folder(root).map_err(|e| failed(e.to_string()))?;
        let root = root.canonicalize().map_err(|e| failed(format!("`{}`: {e}", root.display())))?;
        if let Err(problem) = check_writable(&root) {
            tracing::warn!("only adapters that were fetched before can be served, since {problem}");
        }
        let shared = Shared {
            store,
            address: address.to_string(),
            prefix,
            root,
            local: (url.scheme() == "file").then(|| url.to_file_path().ok()).flatten(),
            max_file_bytes,
            looked: Mutex::default(),
            outage: Mutex::default(),
            news: Mutex::default(),
            any_news: AtomicBool::new(false),
        };
        Ok(Self { shared: Arc::new(shared), runtime: Some(runtime) })
    }

    /// The folder that mirrors.
    pub fn root(&self) -> &Path {
        &self.shared.root
    }

    /// Why the store is taken not to answer, if it is.
    pub fn problem(&self) -> Option<String> {
        let outage = lock(&self.shared.outage);
        (outage.failures >= FAILURES).then(|| outage.problem.clone())
    }

    fn wait<T>(&self, longest: Duration, what: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        let runtime = self.runtime.as_ref().ok_or_else(|| failed("the object store is closed"))?;
        let timed = runtime.block_on(async { tokio::time::timeout(longest, what).await });
        timed.unwrap_or_else(|_| {
            self.shared.failing(LATE);
            Err(failed(LATE))
        })
    }

    /// Names of the adapters in the store, `most` at most, and the names that servers gave; from then on those are asked for every [`NAMES`].
    /// Where the store does not answer, what was here last, and both once it does. Fails where it answers that it may not be read.
    ///
    /// # Errors
    ///
    /// Fails if the store answers and may not be read, or if the registry is damaged.
    pub fn begin(&self, most: usize) -> Result<(Vec<String>, Registry), StoreError> {
        let first = self.wait(SHORT, async {
            let listing = self.shared.list(most).await?;
            let registry = self.shared.registry().await?.map(|(registry, _)| registry);
            Ok((listing, registry.unwrap_or_default()))
        });
        let (found, listed) = match first {
            Ok(found) => (found, true),
            // It answers, and not with adapters.
            Err(error) if lock(&self.shared.outage).failures == 0 => return Err(error),
            Err(error) => {
                tracing::warn!("{error}; what was fetched before is served, and the store asked again");
                lock(&self.shared.outage).failures = FAILURES;
                ((self.shared.here(), registry::read(&self.shared.root)?), false)
            }
        };
        if let Some(runtime) = &self.runtime {
            runtime.spawn(self.shared.clone().watch(listed, most));
        }
        Ok(found)
    }

    /// Names and listing that came beside requests.
    pub fn news(&self) -> Option<(Option<Registry>, Option<Vec<String>>)> {
        if !self.shared.any_news.swap(false, Ordering::Relaxed) {
            return None;
        }
        let mut news = lock(&self.shared.news);
        Some((news.registry.take(), news.listing.take()))
    }

    /// Changes the names in the store: to what stands there, if no other server's change comes between, else once more.
    pub(crate) fn change(
        &self,
        mut decide: impl FnMut(&mut Registry) -> Result<(), StoreError>,
    ) -> Result<(Registry, Written), StoreError> {
        if let Some(folder) = &self.shared.local {
            return registry::change(folder, decide);
        }
        self.wait(LONG, async {
            for attempt in 0..CONFLICTS {
                let (before, version) = match self.shared.registry().await? {
                    Some((registry, version)) => (registry, Some(version)),
                    None => (Registry::default(), None),
                };
                let mut registry = before.clone();
                decide(&mut registry)?;
                let bytes = serde_json::to_vec_pretty(&registry).map_err(|e| failed(e.to_string()))?;
                let mode = version.map_or(PutMode::Create, PutMode::Update);
                let (key, options) = (self.shared.registry_key(), PutOptions::from(mode));
                let put = self.shared.store.put_opts(&key, PutPayload::from(bytes), options);
                let written = tokio::time::timeout(SHORT, put).await;
                match written.map_err(|_| failed(LATE))? {
                    Ok(_) => {
                        self.shared.keep(&registry);
                        return Ok((registry, Written::Kept));
                    }
                    Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => {
                        let pause = 5 * (attempt as u64 + 1) + u64::from(std::process::id() % 7);
                        tokio::time::sleep(Duration::from_millis(pause)).await;
                    }
                    Err(
                        error @ (Error::PermissionDenied { .. }
                        | Error::Unauthenticated { .. }
                        | Error::NotImplemented { .. }
                        | Error::NotSupported { .. }),
                    ) => return Ok((before, Written::NotKept(first_line(&error)))),
                    Err(error) => return Err(self.shared.unanswered(&error)),
                }
            }
            Err(failed("other servers change the names of adapters all the time; ask again"))
        })
    }

    /// The folders of an adapter that was looked at within [`KNOWN`]; beyond [`FRESH`] it is looked at again beside this.
    pub fn current(&self, path: &Path) -> Option<Found> {
        let mut looked = lock(&self.shared.looked);
        let found = looked.get(path)?;
        let age = found.when.elapsed();
        // Whoever looks at it looks at its parts.
        let parts = found.fetched.parts.iter().map(|part| {
            let found = looked.get(part).filter(|found| found.when.elapsed() < KNOWN)?;
            Some(found.fetched.folder.clone())
        });
        let parts = parts.collect::<Option<_>>()?;
        let found = looked.get_mut(path)?;
        if age >= KNOWN {
            return None;
        }
        if age >= FRESH
            && !std::mem::replace(&mut found.again, true)
            && let Some(runtime) = &self.runtime
        {
            let (shared, path) = (self.shared.clone(), path.to_path_buf());
            runtime.spawn(async move {
                // Failures are noted where they are met; what was there stays.
                let _ = shared.look_and_note(&path).await;
            });
        }
        Some(Found { folder: found.fetched.folder.clone(), parts })
    }

    /// The folders below [`Self::root`] with what the store has for an adapter and for those that it is made of, fetched where they are not there; None
    /// if the store has none.
    ///
    /// # Errors
    ///
    /// Fails if the name is not valid, if files are too large to be read, if the store lacks an adapter that it is made of, or if the store does not
    /// answer and nothing was fetched before.
    pub fn fetch(&self, path: &Path) -> Result<Option<Found>, StoreError> {
        if let Some(found) = self.current(path) {
            return Ok(Some(found));
        }
        let name = path.to_string_lossy();
        check_name(&name)?;
        let here = self.shared.kept_whole(path);
        let longest = if here.is_some() { SHORT } else { LONG };
        match (self.wait(longest, self.shared.look_whole(path)), here) {
            (Err(error), Some((found, names))) if error.code == Code::StoreFailed => {
                tracing::warn!("{error}; `{name}` is served as it was fetched before");
                self.shared.note_kept(path, &found, names);
                Ok(Some(found))
            }
            (found, _) => found,
        }
    }

    /// As [`Self::fetch`], of now: fails where the store does not answer.
    ///
    /// # Errors
    ///
    /// Fails if the name is not valid, if files are too large to be read, if the store lacks an adapter that it is made of, or if the store does not
    /// answer.
    pub fn fetch_now(&self, path: &Path) -> Result<Option<Found>, StoreError> {
        check_name(&path.to_string_lossy())?;
        self.wait(LONG, self.shared.look_whole(path))
    }
}

fn first_line(error: &Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_string()
}
