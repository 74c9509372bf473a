//! Adapters by name: folders below one root, and those of them that are in host memory.
//!
//! A name is the folder's path below the root, or one that was given at run time and stands in [`REGISTRY_FILE`] there. Content, not name, is
//! what the engine knows: replacing a name changes what new requests get and touches none that run. A name is only given to an adapter that
//! was read whole, fits the base and does something.

use std::collections::{BTreeMap, HashMap};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use lorimer_adapter::store::{CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE};
use lorimer_adapter::{Adapter, StoredAdapter};
use lorimer_model::BaseModel;
use lorimer_model::chat::ChatTemplate;
use lorimer_model::files::{read_json, write_json};
use serde::{Deserialize, Serialize};

use crate::hosted::{Conversion, Hosted};
use crate::mirror::Mirror;
use crate::residency::Residency;

/// Names given at run time, in the root.
pub const REGISTRY_FILE: &str = ".lorimer-adapters.json";
/// Longest name.
pub const MAX_NAME: usize = 200;
/// Folders below folders that are looked into.
const MAX_DEPTH: usize = 6;
/// By how much threads that read adapters stand back.
#[cfg(target_os = "linux")]
const LOADER_NICE: i32 = 5;
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

/// Why the store refuses. The names are stable codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// There is no adapter of that name.
    AdapterNotFound,
    /// A name that cannot be one.
    InvalidName,
    /// A path that leaves the root.
    PathRefused,
    /// The name is taken.
    AdapterExists,
    /// The name does not stand for the content that was expected.
    ContentChanged,
    /// The files are damaged, do not fit the base, or change nothing.
    AdapterInvalid,
    /// More bytes, ranks or names than allowed.
    LimitExceeded,
    /// The store could not write.
    StoreFailed,
}

/// A refusal of the store.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct StoreError {
    /// What kind.
    pub code: Code,
    /// One sentence.
    pub message: String,
}

fn refuse<T>(code: Code, message: impl Into<String>) -> Result<T, StoreError> {
    Err(StoreError { code, message: message.into() })
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

/// Lengths and times of an adapter's files: whether they may have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp([(u64, Option<SystemTime>); 2]);

impl Stamp {
    fn of(folder: &Path) -> Option<Self> {
        let one = |name: &str| {
            let metadata = std::fs::metadata(folder.join(name)).ok()?;
            Some((metadata.len(), metadata.modified().ok()))
        };
        Some(Self([one(WEIGHTS_FILE)?, one(CONFIG_FILE)?]))
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

/// The registry's file.
#[derive(Default, Serialize, Deserialize)]
struct Registry {
    /// Names with their folders below the root.
    #[serde(default)]
    names: BTreeMap<String, PathBuf>,
    /// Folders that are not to be served under their own names.
    #[serde(default)]
    removed: Vec<String>,
}

#[derive(Default)]
struct Inner {
    names: BTreeMap<String, Named>,
    registry: Registry,
    /// In host memory, by content.
    hosted: HashMap<Arc<str>, Arc<Hosted>>,
    account: Residency,
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
    /// Where adapters are read: apart from the threads that compute, whose parallel parts would wait for it.
    loaders: rayon::ThreadPool,
}

impl Store {
    /// Opens a store: the registry, and every folder below the root that holds an adapter (without reading it).
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
        let path = root.join(REGISTRY_FILE);
        let registry: Registry = match path.is_file() {
            true => read_json(&path, 64 << 20)
                .map_err(|e| StoreError { code: Code::StoreFailed, message: e.to_string() })?,
            false => Registry::default(),
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
        let store = Self { settings, root, mirror, inner: Mutex::default(), loaders };
        {
            let mut inner = store.lock();
            for (name, path) in &registry.names {
                check_name(name)?;
                inner.names.insert(name.clone(), Named { path: path.clone(), read: None });
            }
            inner.registry = registry;
        }
        store.scan()?;
        Ok(store)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks for adapters that are new. Links are not followed.
    pub fn scan(&self) -> Result<(), StoreError> {
        let paths = match &self.mirror {
            Some(mirror) => mirror.list(self.settings.max_names)?.into_iter().map(PathBuf::from).collect(),
            None => self.folders()?,
        };
        let mut inner = self.lock();
        for path in paths {
            let name = path.components().map(|c| c.as_os_str().to_string_lossy()).collect::<Vec<_>>().join("/");
            let removed = inner.registry.removed.contains(&name);
            if check_name(&name).is_ok() && !removed && !inner.names.contains_key(&name) {
                inner.names.insert(name, Named { path, read: None });
            }
        }
        Ok(())
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

    /// What `path` stands for below the root or in the object store, and the folder to read it from.
    fn locate(&self, path: &Path) -> Result<(PathBuf, PathBuf), StoreError> {
        let Some(mirror) = &self.mirror else {
            let below = self.confine(path)?;
            let folder = self.root.join(&below);
            return Ok((below, folder));
        };
        let shown = path.to_string_lossy();
        match check_name(&shown) {
            Err(_) => refuse(Code::PathRefused, format!("`{}` is no path in the object store", shown.escape_debug())),
            Ok(()) => match mirror.fetch(path)? {
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
    pub fn get(&self, model: &(dyn BaseModel + Sync), name: &str) -> Result<Arc<Hosted>, StoreError> {
        check_name(name)?;
        let unknown = |shown: &str| format!("there is no adapter `{shown}`; GET /v1/models lists what there is");
        let find = || self.lock().names.get(name).cloned();
        let named = match find() {
            Some(named) => named,
            None => {
                // A folder that came after the last look.
                let own = Path::new(name);
                let removed = self.lock().registry.removed.iter().any(|r| r == name);
                let found = match removed {
                    true => None,
                    false => match self.locate(own) {
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
        let located = self.locate(&named.path);
        if let Err(error) = &located {
            let mut inner = self.lock();
            // Where it is gone, a name that was given stays, and says so.
            if error.code == Code::AdapterNotFound && !inner.registry.names.contains_key(name) {
                inner.names.remove(name);
            }
            inner.loading.remove(name);
        }
        let (_, folder) = located?;
        let stamp = Stamp::of(&folder);
        let read = find().and_then(|n| n.read);
        if let (Some((then, content)), Some(now)) = (read, stamp)
            && then == now
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
        let (path, (then, content)) = {
            let inner = self.lock();
            let named = inner.names.get(name)?;
            let folder = match &self.mirror {
                Some(mirror) => mirror.current(&named.path)?,
                None => self.root.join(&named.path),
            };
            (folder, named.read.clone()?)
        };
        if Stamp::of(&path)? != then {
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
    fn load(&self, model: &(dyn BaseModel + Sync), folder: &Path) -> Result<Hosted, StoreError> {
        let invalid = |e: String| StoreError { code: Code::AdapterInvalid, message: self.without_root(&e) };
        // Links inside the folder may not lead out either.
        for file in [WEIGHTS_FILE, CONFIG_FILE, MANIFEST_FILE].map(|name| folder.join(name)) {
            if file.exists() && !file.canonicalize().is_ok_and(|real| real.starts_with(&self.root)) {
                let name = file.file_name().unwrap_or_default().to_string_lossy();
                return refuse(
                    Code::PathRefused,
                    format!("`{name}` of the adapter is a link out of the folder of adapters"),
                );
            }
        }
        let stored =
            StoredAdapter::read_changing(folder, self.settings.max_file_bytes).map_err(|e| invalid(e.to_string()))?;
        let content = stored.content_id().map_err(|e| invalid(e.to_string()))?;
        let adapter = Adapter::load_whole(model, &stored).map_err(|e| invalid(e.to_string()))?;
        let template = self.template(&stored).map_err(|e| invalid(e.to_string()))?;
        let golden = stored.manifest.map(|m| m.golden).unwrap_or_default();
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
        Ok(hosted)
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
    fn keep(&self, inner: &mut Inner, hosted: Hosted) -> Arc<Hosted> {
        let content: Arc<str> = hosted.content_id.as_str().into();
        if let Some(there) = inner.hosted.get_mut(&content) {
            // Template and golden prompts are no part of the content: what was read last counts.
            let source = |h: &Hosted| h.template.as_ref().map(|t| t.source().to_string());
            if there.golden != hosted.golden || source(there) != source(&hosted) {
                *there = Arc::new(hosted);
            }
            return there.clone();
        }
        let units = hosted.bytes().div_ceil(UNIT);
        while inner.account.pages() + units > self.settings.host_bytes / UNIT {
            let Some((gone, _)) = inner.account.evict() else { break };
            inner.hosted.remove(&gone);
        }
        let hosted = Arc::new(hosted);
        inner.account.insert(content.clone(), units);
        inner.hosted.insert(content, hosted.clone());
        hosted
    }

    /// Gives a name to the adapter in a folder below the root, once that was read and found good. Gives its content.
    pub fn put(
        &self,
        model: &(dyn BaseModel + Sync),
        name: &str,
        path: &Path,
        how: &Put,
    ) -> Result<Arc<Hosted>, StoreError> {
        check_name(name)?;
        self.allowed(&self.lock(), name, how)?;
        let (path, folder) = self.locate(path)?;
        let stamp = Stamp::of(&folder);
        let hosted = self.aside(|| self.load(model, &folder))?;
        let mut inner = self.lock();
        // Again, since others may have come before.
        self.allowed(&inner, name, how)?;
        let mut names = inner.registry.names.clone();
        names.insert(name.to_string(), path.clone());
        let removed = inner.registry.removed.iter().filter(|r| *r != name).cloned().collect();
        self.write(&mut inner, Registry { names, removed })?;
        let hosted = self.keep(&mut inner, hosted);
        let read = stamp.map(|stamp| (stamp, hosted.content_id.as_str().into()));
        inner.names.insert(name.to_string(), Named { path, read });
        Ok(hosted)
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
    pub fn remove(&self, name: &str) -> Result<(), StoreError> {
        check_name(name)?;
        let mut inner = self.lock();
        if !inner.names.contains_key(name) {
            return refuse(Code::AdapterNotFound, format!("there is no adapter `{name}`"));
        }
        let mut names = inner.registry.names.clone();
        names.remove(name);
        let mut removed = inner.registry.removed.clone();
        if (self.mirror.is_some() || self.root.join(name).join(CONFIG_FILE).is_file())
            && !removed.iter().any(|r| r == name)
        {
            removed.push(name.to_string());
        }
        self.write(&mut inner, Registry { names, removed })?;
        inner.names.remove(name);
        Ok(())
    }

    fn write(&self, inner: &mut Inner, registry: Registry) -> Result<(), StoreError> {
        let written = write_json(&self.root.join(REGISTRY_FILE), &registry);
        written.map_err(|e| StoreError { code: Code::StoreFailed, message: self.without_root(&e.to_string()) })?;
        inner.registry = registry;
        Ok(())
    }

    /// What there is, by name.
    pub fn list(&self) -> Vec<Listed> {
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
        self.lock().names.contains_key(name)
    }

    /// Bytes of adapters in host memory, and how many there are.
    pub fn host(&self) -> (usize, usize) {
        let inner = self.lock();
        (inner.account.pages() * UNIT, inner.hosted.len())
    }
}

/// Names are path-like: parts of letters, digits, `.`, `_`, `-` apart by `/`, none of which begins with a dot.
pub fn check_name(name: &str) -> Result<(), StoreError> {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
    };
    if name.len() > MAX_NAME || !name.split('/').all(part) {
        let shown: String = name.chars().take(60).flat_map(char::escape_debug).collect();
        let message = format!(
            "`{shown}` is no name of an adapter: at most {MAX_NAME} letters, digits, `.`, `_`, `-`, with `/` between parts that do not begin with a dot"
        );
        return refuse(Code::InvalidName, message);
    }
    Ok(())
}
