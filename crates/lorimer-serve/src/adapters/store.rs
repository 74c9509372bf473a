//! Adapters by name: folders below one root, and those of them that are in host memory.
//!
//! A name is the folder's path below the root, or one that was given at run time and stands in [`REGISTRY_FILE`] there (in an object store:
//! below its prefix). Content, not name, is
//! what the engine knows: replacing a name changes what new requests get and touches none that run. A name is only given to an adapter that
//! was read whole, fits the base and does something.

use std::collections::{BTreeMap, HashMap};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant, SystemTime};

use lorimer_adapter::file::store::{CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE};
use lorimer_adapter::{Adapter, StoredAdapter};
use lorimer_model::BaseModel;
use lorimer_model::files::check_writable;
use lorimer_model::text::chat::ChatTemplate;
use serde::Serialize;

use crate::adapters::hosted::{Conversion, Hosted};
use crate::adapters::mirror::{FRESH, Mirror};
use crate::adapters::names::refuse;
pub use crate::adapters::names::{Code, MAX_NAME, StoreError, check_name};
pub use crate::adapters::registry::REGISTRY_FILE;
use crate::adapters::registry::{self, Registry, Written};
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

/// How a file is told from another in its place: whatever is written, moved or linked there has another of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileStamp {
    length: u64,
    modified: Option<SystemTime>,
    /// Device and number of the file, and when it was last changed in whatever way, which nobody can set. Seconds and nanoseconds.
    own: (u64, u64, i64, i64),
}

impl FileStamp {
    fn of(path: &Path) -> Option<Self> {
        let metadata = std::fs::metadata(path).ok()?;
        #[cfg(unix)]
        let own = {
            use std::os::unix::fs::MetadataExt;
            (metadata.dev(), metadata.ino(), metadata.ctime(), metadata.ctime_nsec())
        };
        #[cfg(not(unix))]
        let own = (0, 0, 0, 0);
        Some(Self { length: metadata.len(), modified: metadata.modified().ok(), own })
    }

    fn changed(&self) -> Option<SystemTime> {
        if cfg!(unix) {
            let since = Duration::new(self.own.2.try_into().ok()?, self.own.3.try_into().ok()?);
            return std::time::UNIX_EPOCH.checked_add(since);
        }
        self.modified
    }
}

/// The files of an adapter at a time: whether they may have changed since.
#[derive(Clone, Copy, Debug)]
struct Stamp {
    files: [Option<FileStamp>; 3],
    taken: SystemTime,
}

impl Stamp {
    /// Coarsest unit in which file systems tell times.
    const UNIT: Duration = Duration::from_secs(2);

    fn of(folder: &Path) -> Option<Self> {
        let taken = SystemTime::now();
        let files = [WEIGHTS_FILE, CONFIG_FILE, MANIFEST_FILE].map(|name| FileStamp::of(&folder.join(name)));
        (files[0].is_some() && files[1].is_some()).then_some(Self { files, taken })
    }

    /// Whether the files are those of `now`. Where they were changed just before this stamp was taken, they may have been changed again within
    /// the same unit of time, and only their content tells.
    fn surely(&self, now: &Self) -> bool {
        let settled = |file: &FileStamp| file.changed().is_some_and(|changed| changed + Self::UNIT < self.taken);
        self.files == now.files && self.files.iter().flatten().all(settled)
    }
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
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get().div_ceil(4));
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

    /// Takes up a registry: what it gives and takes away, and what the one before gave and it does not.
    fn adopt(&self, inner: &mut Inner, registry: Registry) {
        let before = inner.own.over(&inner.registry);
        inner.registry = registry;
        self.apply(inner, &before);
    }

    fn apply(&self, inner: &mut Inner, before: &Registry) {
        self.version.fetch_add(1, Ordering::AcqRel);
        let now = inner.own.over(&inner.registry);
        for name in before.names.keys().chain(&now.removed).filter(|name| !now.names.contains_key(*name)) {
            inner.names.remove(name);
        }
        for (name, path) in now.names {
            if inner.names.get(&name).is_none_or(|named| named.path != path) {
                inner.names.insert(name, Named { path, read: None });
            }
        }
    }

    /// Takes up what other servers of the same adapters changed.
    fn catch_up(&self) {
        // A change of this server's own is newer than what is read beside it.
        let _alone = match self.changing.try_lock() {
            Err(TryLockError::WouldBlock) => return,
            Err(TryLockError::Poisoned(alone)) => alone.into_inner(),
            Ok(alone) => alone,
        };
        if let Some(mirror) = &self.mirror {
            let Some((registry, listing)) = mirror.news() else { return };
            let mut inner = self.lock();
            if let Some(registry) = registry {
                self.adopt(&mut inner, registry);
            }
            self.add(&mut inner, listing.into_iter().flatten().map(PathBuf::from).collect());
            return;
        }
        let now = {
            let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
            if looked.0.elapsed() < FRESH {
                return;
            }
            let before =
                std::mem::replace(&mut *looked, (Instant::now(), FileStamp::of(&self.root.join(REGISTRY_FILE))));
            looked.1.filter(|now| Some(*now) != before.1)
        };
        if now.is_some() {
            match registry::read(&self.root) {
                Ok(registry) => self.adopt(&mut self.lock(), registry),
                Err(problem) => tracing::warn!("names that another server gave are not taken up: {problem}"),
            }
        }
    }

    /// Changes names: `decide` on what is kept at that moment and may be called again, `then` once it is kept, or cannot be.
    fn change(
        &self,
        decide: impl Fn(&Inner, &mut Registry) -> Result<(), StoreError>,
        then: impl FnOnce(&mut Inner),
    ) -> Result<(), StoreError> {
        let _alone = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let merged = |registry: &mut Registry| {
            let mut inner = self.lock();
            self.adopt(&mut inner, registry.clone());
            // What could not be kept before is kept now.
            *registry = inner.own.over(registry);
            decide(&inner, registry)
        };
        let (registry, written) = match &self.mirror {
            Some(mirror) => mirror.change(merged)?,
            None => registry::change(&self.root, merged)?,
        };
        self.looked.lock().unwrap_or_else(PoisonError::into_inner).1 = FileStamp::of(&self.root.join(REGISTRY_FILE));
        let mut inner = self.lock();
        let before = inner.own.over(&inner.registry);
        inner.registry = registry;
        match written {
            Written::Kept => (inner.own, inner.not_kept) = (Registry::default(), None),
            Written::NotKept(problem) => {
                let mut all = inner.own.over(&inner.registry);
                decide(&inner, &mut all)?;
                inner.own = all.beyond(&inner.registry);
                let problem = self.without_root(&problem);
                if inner.not_kept.as_ref() != Some(&problem) {
                    tracing::warn!(
                        "names that are given to adapters will be forgotten when the server ends: {problem}"
                    );
                    inner.not_kept = Some(problem);
                }
            }
        }
        self.apply(&mut inner, &before);
        then(&mut inner);
        Ok(())
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
    fn folders(&self) -> Result<Vec<PathBuf>, StoreError> {
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

    /// What `path` stands for below the root or in the object store, and the folder to read it from. `now`: what was found before does not do.
    fn locate(&self, path: &Path, now: bool) -> Result<(PathBuf, PathBuf), StoreError> {
        let Some(mirror) = &self.mirror else {
            let below = self.confine(path)?;
            let folder = self.root.join(&below);
            return Ok((below, folder));
        };
        let shown = path.to_string_lossy();
        match check_name(&shown) {
            Err(_) => refuse(Code::PathRefused, format!("`{}` is no path in the object store", shown.escape_debug())),
            Ok(()) => match if now { mirror.fetch_now(path)? } else { mirror.fetch(path)? } {
                Some(folder) => Ok((path.to_path_buf(), folder)),
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

    /// The adapter of a name, read if it is not in memory or its files have changed.
    ///
    /// # Errors
    ///
    /// Fails if the name is not valid or stands for nothing, if its folder leaves the root, if the adapter is damaged, does not fit the
    /// base or exceeds a bound, or if an object store does not answer.
    pub fn get(&self, model: &(dyn BaseModel + Sync), name: &str) -> Result<Arc<Hosted>, StoreError> {
        check_name(name)?;
        self.catch_up();
        let unknown = |shown: &str| format!("there is no adapter `{shown}`; GET /v1/models lists what there is");
        let find = || self.lock().names.get(name).cloned();
        let named = match find() {
            Some(named) => named,
            None => {
                // A folder that came after the last look.
                let own = Path::new(name);
                let removed = {
                    let inner = self.lock();
                    inner.own.over(&inner.registry).removed.contains(name)
                };
                let found = match removed {
                    true => None,
                    false => match self.locate(own, false) {
                        // That a store does not answer is not that it has nothing.
                        Err(error) if matches!(error.code, Code::StoreFailed | Code::LimitExceeded) => {
                            return Err(error);
                        }
                        found => found.ok(),
                    },
                };
                if !found.is_some_and(|(below, folder)| below == own && folder.join(CONFIG_FILE).is_file()) {
                    return refuse(Code::AdapterNotFound, unknown(name));
                }
                let named = Named { path: own.to_path_buf(), read: None };
                self.lock().names.insert(name.to_string(), named.clone());
                named
            }
        };
        let one_at_a_time = self.lock().loading.entry(name.to_string()).or_default().clone();
        let guard = one_at_a_time.lock().unwrap_or_else(PoisonError::into_inner);
        let located = self.locate(&named.path, false);
        if let Err(error) = &located {
            let mut inner = self.lock();
            // Where it is gone, a name that was given stays, and says so.
            if error.code == Code::AdapterNotFound && !inner.own.over(&inner.registry).names.contains_key(name) {
                inner.names.remove(name);
            }
            inner.loading.remove(name);
        }
        let (_, folder) = located?;
        let stamp = Stamp::of(&folder);
        let read = find().and_then(|n| n.read);
        if let (Some((then, content)), Some(now)) = (read, stamp)
            && then.surely(&now)
        {
            let mut inner = self.lock();
            inner.account.touch(&content);
            if let Some(hosted) = inner.hosted.get(&content).cloned() {
                inner.loading.remove(name);
                return Ok(hosted);
            }
        }
        let loaded = self.aside(|| self.load(model, &folder));
        let mut inner = self.lock();
        drop(guard);
        inner.loading.remove(name);
        let hosted = loaded?;
        let hosted = self.keep(&mut inner, hosted);
        if let (Some(entry), Some(stamp)) = (inner.names.get_mut(name).filter(|e| e.path == named.path), stamp) {
            entry.read = Some((stamp, hosted.content_id.as_str().into()));
        }
        Ok(hosted)
    }

    /// The adapter of a name if it is in memory and its files have not changed.
    pub fn cached(&self, name: &str) -> Option<Arc<Hosted>> {
        self.catch_up();
        let (path, (then, content)) = {
            let inner = self.lock();
            let named = inner.names.get(name)?;
            let folder = match &self.mirror {
                Some(mirror) => mirror.current(&named.path)?,
                None => self.root.join(&named.path),
            };
            (folder, named.read.clone()?)
        };
        if !then.surely(&Stamp::of(&path)?) {
            return None;
        }
        let mut inner = self.lock();
        let hosted = inner.hosted.get(&content).cloned()?;
        inner.account.touch(&content);
        Some(hosted)
    }

    /// The adapter of a name that comes from an object store, if it is in memory, whether or not it is what the store has now.
    pub fn held(&self, name: &str) -> Option<Arc<Hosted>> {
        self.mirror.as_ref()?;
        let mut inner = self.lock();
        let (_, content) = inner.names.get(name)?.read.clone()?;
        let hosted = inner.hosted.get(&content).cloned()?;
        inner.account.touch(&content);
        Some(hosted)
    }

    /// Runs something on the threads that read adapters, apart from those that compute.
    pub fn aside<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        self.loaders.install(f)
    }

    /// Reads an adapter folder into its served form.
    fn load(&self, model: &(dyn BaseModel + Sync), folder: &Path) -> Result<Arc<Hosted>, StoreError> {
        let invalid = |e: String| StoreError { code: Code::AdapterInvalid, message: self.without_root(&e) };
        // Links inside the folder may not lead out either.
        let names = [WEIGHTS_FILE, CONFIG_FILE, MANIFEST_FILE, "xlora_config.json", "xlora_classifier.safetensors"];
        for file in names.map(|name| folder.join(name)) {
            if file.exists() && !file.canonicalize().is_ok_and(|real| real.starts_with(&self.root)) {
                let name = file.file_name().unwrap_or_default().to_string_lossy();
                return refuse(
                    Code::PathRefused,
                    format!("`{name}` of the adapter is a link out of the folder of adapters"),
                );
            }
        }
        let stored = StoredAdapter::read_changing(folder, self.settings.max_file_bytes, &self.root)
            .map_err(|e| invalid(e.to_string()))?;
        let content = stored.content_id().map_err(|e| invalid(e.to_string()))?;
        let template = self.template(&stored).map_err(|e| invalid(e.to_string()))?;
        let golden = stored.manifest.as_ref().map(|m| m.golden.clone()).unwrap_or_default();
        let there = self.lock().hosted.get(content.as_str()).cloned();
        if let Some(there) =
            there.filter(|there| there.golden == golden && source(&there.template) == source(&template))
        {
            return Ok(there);
        }
        let adapter = Adapter::load_whole(model, &stored).map_err(|e| invalid(e.to_string()))?;
        let hosted = Hosted::new(model, &adapter, content, Some(self.settings.conversion_rank));
        let hosted = Hosted { template, golden, ..hosted.map_err(|e| invalid(e.to_string()))? };
        if hosted.rank > self.settings.max_rank {
            let message = format!("the adapter has rank {}, at most {} is served", hosted.rank, self.settings.max_rank);
            return refuse(Code::LimitExceeded, message);
        }
        if hosted.bytes() > self.settings.host_bytes {
            let message = format!(
                "the adapter takes {} bytes, all of them together may take {}",
                hosted.bytes(),
                self.settings.host_bytes
            );
            return refuse(Code::LimitExceeded, message);
        }
        Ok(Arc::new(hosted))
    }

    /// The adapter's own chat template, where it has one that is not the base's.
    fn template(&self, stored: &StoredAdapter) -> lorimer_model::Result<Option<ChatTemplate>> {
        let own = stored.manifest.as_ref().and_then(|m| m.chat_template.as_ref());
        let Some((own, chat)) = own.zip(self.settings.chat.as_ref()) else { return Ok(None) };
        if chat.template.as_ref() == Some(own) {
            return Ok(None);
        }
        ChatTemplate::new(own, &chat.bos, &chat.eos).map(Some)
    }

    /// A message without the paths of this machine.
    fn without_root(&self, message: &str) -> String {
        message.replace(&format!("{}/", self.root.display()), "")
    }

    /// Keeps an adapter in host memory; others give way.
    fn keep(&self, inner: &mut Inner, hosted: Arc<Hosted>) -> Arc<Hosted> {
        let content: Arc<str> = hosted.content_id.as_str().into();
        if let Some(there) = inner.hosted.get_mut(&content) {
            // Template and golden prompts are no part of the content: what was read last counts.
            if there.golden != hosted.golden || source(&there.template) != source(&hosted.template) {
                *there = hosted;
            }
            return there.clone();
        }
        let units = hosted.bytes().div_ceil(UNIT);
        while inner.account.pages() + units > self.settings.host_bytes / UNIT {
            let Some((gone, _)) = inner.account.evict() else { break };
            inner.hosted.remove(&gone);
        }
        inner.account.insert(content.clone(), units);
        inner.hosted.insert(content, hosted.clone());
        hosted
    }

    /// Gives a name to the adapter in a folder below the root, once that was read and found good. Gives its content.
    ///
    /// # Errors
    ///
    /// Fails if the name is not valid or `how` does not allow it, if the path leaves the root, if the adapter is damaged, does not fit the
    /// base or exceeds a bound, or if the registry cannot be written.
    pub fn put(
        &self,
        model: &(dyn BaseModel + Sync),
        name: &str,
        path: &Path,
        how: &Put,
    ) -> Result<Arc<Hosted>, StoreError> {
        check_name(name)?;
        self.catch_up();
        self.allowed(&self.lock(), name, how)?;
        let (path, folder) = self.locate(path, true)?;
        let stamp = Stamp::of(&folder);
        let hosted = self.aside(|| self.load(model, &folder))?;
        let mut given = None;
        let decide = |inner: &Inner, registry: &mut Registry| {
            // Again, since others may have come before.
            self.allowed(inner, name, how)?;
            registry.give(name, &path);
            Ok(())
        };
        self.change(decide, |inner| {
            let hosted = self.keep(inner, hosted);
            let read = stamp.map(|stamp| (stamp, hosted.content_id.as_str().into()));
            inner.names.insert(name.to_string(), Named { path: path.clone(), read });
            given = Some(hosted);
        })?;
        given.ok_or_else(|| StoreError { code: Code::StoreFailed, message: format!("`{name}` was not given") })
    }

    fn allowed(&self, inner: &Inner, name: &str, how: &Put) -> Result<(), StoreError> {
        let there = inner.names.get(name);
        match how {
            Put::Create if there.is_some() => refuse(
                Code::AdapterExists,
                format!("there is an adapter `{name}` already; ask to replace it if that is meant"),
            ),
            Put::Swap(expected) => match there.map(|n| n.read.as_ref().map(|(_, content)| content.as_ref())) {
                None => refuse(Code::AdapterNotFound, format!("there is no adapter `{name}` to be replaced")),
                Some(now) if now != Some(expected.as_str()) => refuse(
                    Code::ContentChanged,
                    format!("`{name}` is {}, not {expected}", now.unwrap_or("an adapter that was not read yet")),
                ),
                Some(_) => Ok(()),
            },
            _ if there.is_none() && inner.names.len() >= self.settings.max_names => {
                refuse(Code::LimitExceeded, format!("there are {} names already", inner.names.len()))
            }
            _ => Ok(()),
        }
    }

    /// Takes a name away. Its files stay, and requests that run go on.
    ///
    /// # Errors
    ///
    /// Fails if the name is not valid or stands for nothing, or if the registry cannot be written.
    pub fn remove(&self, name: &str) -> Result<(), StoreError> {
        check_name(name)?;
        self.catch_up();
        let folder = self.mirror.is_some() || self.root.join(name).join(CONFIG_FILE).is_file();
        let decide = |inner: &Inner, registry: &mut Registry| {
            if !inner.names.contains_key(name) {
                return refuse(Code::AdapterNotFound, format!("there is no adapter `{name}`"));
            }
            registry.take(name, folder);
            Ok(())
        };
        self.change(decide, |inner| _ = inner.names.remove(name))
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

/// The text of a template.
fn source(template: &Option<ChatTemplate>) -> Option<&str> {
    template.as_ref().map(|t| t.source())
}
