//! Adapters by name: folders below one root, and those of them that are in host memory.
//!
//! A name is the folder's path below the root, or one that was given at run time and stands in [`REGISTRY_FILE`] there (in an object store:
//! below its prefix). Content, not name, is
//! what the engine knows: replacing a name changes what new requests get and touches none that run. A name is only given to an adapter that
//! was read whole, fits the base and does something.

mod change;
mod load;
mod stamp;

use std::collections::{BTreeMap, HashMap};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use lorimer_adapter::file::store::CONFIG_FILE;
use lorimer_adapter::pruning::BaseRecord;
use lorimer_model::files::check_writable;
use serde::Serialize;

use self::stamp::{FileStamp, Stamp};
use crate::adapters::found::Found;
use crate::adapters::hosted::{Conversion, Hosted};
use crate::adapters::mirror::Mirror;
use crate::adapters::names::refuse;
pub use crate::adapters::names::{Code, MAX_NAME, StoreError, check_name};
pub use crate::adapters::registry::REGISTRY_FILE;
use crate::adapters::registry::{self, Registry};
use crate::engine::adapter_account::AdapterAccount;

/// Folders below folders that are looked into.
const MAX_DEPTH: usize = 6;
/// By how much threads that read adapters stand back.
#[cfg(target_os = "linux")]
const LOADER_NICE: i32 = 10;
/// What the account of host memory counts in.
const UNIT: usize = 1024;

/// Bounds of a store.
#[derive(Clone, Debug)]
pub struct StoreSettings {
    /// The folder of adapters; with [`Self::address`] the one that mirrors them.
    pub root: PathBuf,
    /// The URL of an object store that the adapters come from.
    pub address: Option<String>,
    /// Bytes of adapters in host memory, beside those that requests hold.
    pub host_bytes: usize,
    /// Largest tensor file that is read.
    pub max_file_bytes: u64,
    /// Largest rank that is served.
    pub max_rank: usize,
    /// Most names.
    pub max_names: usize,
    /// Rank of the low-rank form of methods that have none of their own.
    pub conversion_rank: usize,
    /// The base's chat template and the texts of its special tokens, so that adapters may have templates of their own.
    pub chat: Option<ChatDefaults>,
    /// The base's folder with the record of what it is pruned from, which an adapter's own must be; None: only shapes tell.
    pub base: Option<BaseRecord>,
}

/// What the base has for chats.
#[derive(Clone, Debug, Default)]
pub struct ChatDefaults {
    /// Text of the token that begins a sequence.
    pub bos: String,
    /// Text of the token that ends one.
    pub eos: String,
    /// The base's template.
    pub template: Option<String>,
}

impl StoreSettings {
    /// A store in a folder with the usual bounds.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            address: None,
            host_bytes: 1 << 30,
            max_file_bytes: 1 << 30,
            max_rank: 512,
            max_names: 200_000,
            conversion_rank: 64,
            chat: None,
            base: None,
        }
    }
}

/// What a name may be given for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Put {
    /// Only if the name is free.
    Create,
    /// In any case.
    Upsert,
    /// Only if it stands for this content.
    Swap(String),
}

/// What a name stands for.
#[derive(Clone, Debug)]
struct Named {
    /// The folder, below the root.
    path: PathBuf,
    /// What was read last, and when that was.
    read: Option<(Stamp, Arc<str>)>,
}

#[derive(Default)]
struct Inner {
    names: BTreeMap<String, Named>,
    /// What is kept, as it was last read or written.
    registry: Registry,
    /// Changes that cannot be kept, over that; and why they cannot.
    own: Registry,
    not_kept: Option<String>,
    /// In host memory, by content.
    hosted: HashMap<Arc<str>, Arc<Hosted>>,
    account: AdapterAccount,
    /// One load of a name at a time.
    loading: HashMap<String, Arc<Mutex<()>>>,
}

/// An adapter as it is listed.
#[derive(Clone, Debug, Serialize)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// Its content, if it was read.
    pub content_id: Option<String>,
    /// The method, if it is in memory.
    pub method: Option<String>,
    /// Its largest rank, if it is in memory.
    pub rank: Option<usize>,
    /// Bytes in host memory; 0 if it is not there.
    pub host_bytes: usize,
    /// How far what is served is from what the adapter does: ‖approximation − ΔW‖ / ‖ΔW‖.
    pub conversion_error: Option<f64>,
}

/// Adapters by name.
pub struct Store {
    settings: StoreSettings,
    root: PathBuf,
    /// Where the adapters come from, if that is not a folder.
    mirror: Option<Mirror>,
    inner: Mutex<Inner>,
    /// One change of names at a time. Apart from `inner`, which is never held while something is written.
    changing: Mutex<()>,
    /// See [`Self::version`].
    version: AtomicU64,
    /// When the registry of the root was last looked at, and what file it was.
    looked: Mutex<(Instant, Option<FileStamp>)>,
    /// Where adapters are read: apart from the threads that compute, whose parallel parts would wait for it.
    loaders: rayon::ThreadPool,
}

impl Store {
    /// Opens a store: the registry, and every folder below the root that holds an adapter (without reading it).
    ///
    /// # Errors
    ///
    /// Fails if there is no folder at the root, if the object store cannot be opened or may not be read, or if the registry is damaged.
    pub fn open(settings: StoreSettings) -> Result<Self, StoreError> {
        let shown = settings.root.display();
        let mirror = settings.address.as_ref();
        let mirror =
            mirror.map(|address| Mirror::open(address, &settings.root, settings.max_file_bytes)).transpose()?;
        let root = settings.root.canonicalize().ok().filter(|root| root.is_dir());
        let Some(root) = root else {
            return refuse(
                Code::AdapterNotFound,
                format!("there is no folder `{shown}`; `--adapters` wants the folder of adapters"),
            );
        };
        let threads = rayon::current_num_threads().div_ceil(4);
        let loaders = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("loader-{i}"));
        // Threads that compute come first.
        #[cfg(target_os = "linux")]
        let loaders = loaders.start_handler(|_| _ = rustix::process::nice(LOADER_NICE));
        let loaders = loaders.build().map_err(|e| StoreError {
            code: Code::StoreFailed,
            message: format!("the threads that read adapters cannot be started: {e}"),
        })?;
        let looked = Mutex::new((Instant::now(), FileStamp::of(&root.join(REGISTRY_FILE))));
        let (changing, inner, version) = (Mutex::default(), Mutex::default(), AtomicU64::default());
        let store = Self { settings, root, mirror, inner, changing, version, looked, loaders };
        let (paths, registry) = match &store.mirror {
            Some(mirror) => {
                let (names, registry) = mirror.begin(store.settings.max_names)?;
                (names.into_iter().map(PathBuf::from).collect(), registry)
            }
            None => (store.folders()?, registry::read(&store.root)?),
        };
        let mut inner = store.lock();
        if store.mirror.is_none()
            && let Err(problem) = check_writable(&store.root)
        {
            let problem = store.without_root(&problem.to_string());
            tracing::warn!("names that are given to adapters will be forgotten when the server ends, since {problem}");
            inner.not_kept = Some(problem);
        }
        store.adopt(&mut inner, registry);
        store.add(&mut inner, paths);
        drop(inner);
        Ok(store)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes up folders that were found.
    fn add(&self, inner: &mut Inner, paths: Vec<PathBuf>) {
        let removed = inner.own.over(&inner.registry).removed;
        for path in paths {
            let name = path.components().map(|c| c.as_os_str().to_string_lossy()).collect::<Vec<_>>().join("/");
            if check_name(&name).is_ok() && !removed.contains(&name) && !inner.names.contains_key(&name) {
                inner.names.insert(name, Named { path, read: None });
            }
        }
    }

    /// Grows with every change of names: what was found under an older number may no longer be what a name stands for.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Why names that are given or taken away are forgotten when the server ends, if they are.
    pub fn not_kept(&self) -> Option<String> {
        self.lock().not_kept.clone()
    }

    /// What is wrong with the place that the adapters come from, a sentence each.
    pub fn problems(&self) -> Vec<String> {
        let outage = self.mirror.as_ref().and_then(Mirror::problem);
        let kept = self.not_kept().map(|why| format!("names of adapters are not kept: {why}"));
        outage.into_iter().chain(kept).collect()
    }

    /// Folders below the root that hold an adapter.
    pub(crate) fn folders(&self) -> Result<Vec<PathBuf>, StoreError> {
        let mut folders = vec![(self.root.clone(), 0)];
        let mut found = Vec::new();
        while let Some((folder, depth)) = folders.pop() {
            if depth > 0 && folder.join(CONFIG_FILE).is_file() {
                found.push(folder);
                continue;
            }
            let entries = std::fs::read_dir(&folder).map(|e| e.flatten().collect::<Vec<_>>()).unwrap_or_default();
            let below = entries.into_iter().filter(|e| depth < MAX_DEPTH && e.file_type().is_ok_and(|t| t.is_dir()));
            folders.extend(below.map(|e| (e.path(), depth + 1)));
            if found.len() > self.settings.max_names {
                return refuse(
                    Code::LimitExceeded,
                    format!("more than {} adapters below the root", self.settings.max_names),
                );
            }
        }
        Ok(found.iter().filter_map(|folder| Some(folder.strip_prefix(&self.root).ok()?.to_path_buf())).collect())
    }

    /// What `path` stands for below the root or in the object store, and the folders to read it from. `now`: what was found before does not do.
    fn locate(&self, path: &Path, now: bool) -> Result<(PathBuf, Found), StoreError> {
        let Some(mirror) = &self.mirror else {
            let below = self.confine(path)?;
            let found = Found::in_folder(self.root.join(&below));
            return Ok((below, found));
        };
        let shown = path.to_string_lossy();
        match check_name(&shown) {
            Err(_) => refuse(Code::PathRefused, format!("`{}` is no path in the object store", shown.escape_debug())),
            Ok(()) => match if now { mirror.fetch_now(path)? } else { mirror.fetch(path)? } {
                Some(found) => Ok((path.to_path_buf(), found)),
                None => refuse(Code::AdapterNotFound, format!("there is no adapter `{shown}` in the object store")),
            },
        }
    }

    /// The folder below the root that `path` names, which may be relative to the root or lie inside it. Links that lead out are refused.
    fn confine(&self, path: &Path) -> Result<PathBuf, StoreError> {
        let shown = path.display();
        if path.components().any(|c| matches!(c, Component::ParentDir)) {
            return refuse(Code::PathRefused, format!("`{shown}` leaves the folder of adapters; give a path below it"));
        }
        let Ok(real) = self.root.join(path).canonicalize() else {
            return refuse(
                Code::AdapterNotFound,
                format!("there is no adapter folder `{shown}` below the folder of adapters"),
            );
        };
        match real.strip_prefix(&self.root) {
            Ok(below) if below.components().next().is_some() => Ok(below.to_path_buf()),
            _ => refuse(Code::PathRefused, format!("`{shown}` leaves the folder of adapters; give a path below it")),
        }
    }

    /// The folder of adapters, or that which mirrors an object store.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Most bytes of the tensors of an adapter.
    pub(crate) fn max_file(&self) -> u64 {
        self.settings.max_file_bytes
    }

    /// Most bytes of the files of an adapter that is received.
    pub fn max_upload(&self) -> u64 {
        self.settings.max_file_bytes.saturating_add(64 << 20)
    }

    /// Runs something on the threads that read adapters, apart from those that compute.
    pub fn aside<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        self.loaders.install(f)
    }

    /// A message without the paths of this machine.
    pub(crate) fn without_root(&self, message: &str) -> String {
        let base = self.settings.base.as_ref().and_then(|base| base.folder().parent());
        let folders = [Some(self.root.as_path()), base.filter(|base| base.file_name().is_some())];
        let without = |message: String, folder: &Path| message.replace(&format!("{}/", folder.display()), "");
        folders.into_iter().flatten().fold(message.to_string(), without)
    }

    /// What there is, by name.
    pub fn list(&self) -> Vec<Listed> {
        self.catch_up();
        let inner = self.lock();
        let of = |(name, named): (&String, &Named)| {
            let content = named.read.as_ref().map(|(_, content)| content.clone());
            let hosted = content.as_ref().and_then(|content| inner.hosted.get(content));
            let error = |Conversion { error, .. }: Conversion| error;
            Listed {
                name: name.clone(),
                content_id: content.map(|c| c.to_string()),
                method: hosted.map(|h| h.method.clone()),
                rank: hosted.map(|h| h.rank),
                host_bytes: hosted.map_or(0, |h| h.bytes()),
                conversion_error: hosted.map(|h| error(h.conversion)),
            }
        };
        inner.names.iter().map(of).collect()
    }

    /// Whether a name stands for something.
    pub fn contains(&self, name: &str) -> bool {
        self.catch_up();
        self.lock().names.contains_key(name)
    }

    /// Bytes of adapters in host memory, and how many there are.
    pub fn host(&self) -> (usize, usize) {
        let inner = self.lock();
        (inner.account.pages() * UNIT, inner.hosted.len())
    }
}
