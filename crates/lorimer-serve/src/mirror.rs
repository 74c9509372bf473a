//! Adapters in an object store (S3-compatible, or what else `object_store` knows by URL), mirrored to a folder of this machine on demand.
//!
//! An adapter is what lies below PREFIX/NAME/ with an `adapter_config.json`. Its files are fetched when it is first asked for, into a folder
//! named after their entity tags, and again when those change; what was fetched survives the process. Only the few files that an adapter
//! has are fetched, up to the bound on files. While the store does not answer, what is there is served.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::{StreamExt, TryStreamExt};
use lorimer_adapter::store::{CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE};
use lorimer_model::files::{create_folder, write_atomic};
use object_store::path::Path as Key;
use object_store::{GetOptions, ObjectMeta, ObjectStore, ObjectStoreExt};
use sha2::{Digest, Sha256};
use url::Url;

use crate::store::{Code, StoreError, check_name};

/// For how long an adapter is taken to be what it was when last looked at.
pub const FRESH: Duration = Duration::from_secs(2);
/// How long the store has to answer.
const PATIENCE: Duration = Duration::from_secs(60);
/// Largest configuration and manifest.
const MAX_TEXT: u64 = 16 << 20;

/// An object store and the folder that mirrors it.
pub struct Mirror {
    store: Box<dyn ObjectStore>,
    prefix: Key,
    root: PathBuf,
    max_file_bytes: u64,
    /// There until the end.
    runtime: Option<tokio::runtime::Runtime>,
    /// Where adapters were found, and when.
    looked: Mutex<HashMap<PathBuf, (Instant, PathBuf)>>,
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

impl Mirror {
    /// The store at a URL (`s3://bucket/prefix`), set up from the environment (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`,
    /// `AWS_ENDPOINT`, `AWS_ALLOW_HTTP` …), mirrored below `root`.
    pub fn open(address: &str, root: &Path, max_file_bytes: u64) -> Result<Self, StoreError> {
        let url = Url::parse(address).map_err(|e| failed(format!("`{address}` is no URL: {e}")))?;
        let options = std::env::vars().map(|(name, value)| (name.to_ascii_lowercase(), value));
        let (store, prefix) = object_store::parse_url_opts(&url, options)
            .map_err(|e| failed(format!("`{address}` cannot be opened: {e}")))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("mirror")
            .enable_all()
            .build()
            .map_err(|e| failed(format!("the threads that fetch adapters cannot be started: {e}")))?;
        create_folder(root).map_err(|e| failed(e.to_string()))?;
        let root = root.canonicalize().map_err(|e| failed(format!("`{}`: {e}", root.display())))?;
        Ok(Self { store, prefix, root, max_file_bytes, runtime: Some(runtime), looked: Mutex::default() })
    }

    /// The folder that mirrors.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn patiently<T>(&self, what: impl Future<Output = object_store::Result<T>>) -> Result<T, StoreError> {
        let runtime = self.runtime.as_ref().ok_or_else(|| failed("the object store is closed"))?;
        let timed = runtime.block_on(async { tokio::time::timeout(PATIENCE, what).await });
        let answer = timed.map_err(|_| failed("the object store does not answer"))?;
        answer.map_err(|e| failed(format!("the object store: {e}")))
    }

    /// Names of the adapters below the prefix, `most` at most; none, with a warning, where keys are there that are no paths.
    pub fn list(&self, most: usize) -> Result<Vec<String>, StoreError> {
        let objects = self.store.list(Some(&self.prefix));
        let name = |meta: ObjectMeta| {
            let parts: Vec<String> =
                meta.location.prefix_match(&self.prefix)?.map(|p| p.as_ref().to_string()).collect();
            let (file, folder) = parts.split_last()?;
            Some(folder.join("/")).filter(|name| file == CONFIG_FILE && check_name(name).is_ok())
        };
        let names = objects.try_filter_map(|meta| std::future::ready(Ok(name(meta)))).take(most + 1);
        let names: Vec<String> = self.patiently(async {
            match names.try_collect().await {
                Err(error @ object_store::Error::InvalidPath { .. }) => {
                    tracing::warn!(
                        "adapters are found when they are asked for, since the store cannot be listed: {error}"
                    );
                    Ok(Vec::new())
                }
                other => other,
            }
        })?;
        if names.len() > most {
            let message = format!("more than {most} adapters in the object store");
            return Err(StoreError { code: Code::LimitExceeded, message });
        }
        Ok(names)
    }

    /// The folder of an adapter that was looked at a moment ago.
    pub fn current(&self, path: &Path) -> Option<PathBuf> {
        let looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        let (when, folder) = looked.get(path)?;
        (when.elapsed() < FRESH).then(|| folder.clone())
    }

    /// The folder below [`Self::root`] with what the store has for an adapter now, fetched where it is not there; None if the store has none.
    pub fn fetch(&self, path: &Path) -> Result<Option<PathBuf>, StoreError> {
        if let Some(folder) = self.current(path) {
            return Ok(Some(folder));
        }
        let name = path.to_string_lossy();
        check_name(&name)?;
        let found = match self.look(&name) {
            Err(error) if error.code == Code::StoreFailed => {
                // What is here still serves.
                let looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
                let before = looked.get(path).map(|(_, folder)| folder.clone());
                let kept = before.or_else(|| self.kept(&name)).ok_or(error)?;
                tracing::warn!("the object store does not answer; `{name}` is served as it was fetched before");
                Some(kept)
            }
            other => other?,
        };
        let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        match &found {
            Some(folder) => _ = looked.insert(path.to_path_buf(), (Instant::now(), folder.clone())),
            None => _ = looked.remove(path),
        }
        Ok(found)
    }

    /// What was fetched of an adapter last, if anything.
    fn kept(&self, name: &str) -> Option<PathBuf> {
        let entries = std::fs::read_dir(self.root.join(name)).ok()?.flatten();
        let versions = entries.filter(|e| e.file_name().to_string_lossy().starts_with('@'));
        versions.max_by_key(|e| e.metadata().and_then(|m| m.modified()).ok()).map(|e| e.path())
    }

    fn look(&self, name: &str) -> Result<Option<PathBuf>, StoreError> {
        let mut metas = Vec::new();
        for file in [CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE] {
            let key = name.split('/').chain([file]).fold(self.prefix.clone(), |key, part| key.join(part));
            let meta = self.patiently(async {
                match self.store.head(&key).await {
                    Err(object_store::Error::NotFound { .. }) => Ok(None),
                    other => other.map(Some),
                }
            })?;
            match meta {
                Some(meta) => metas.push((file, meta)),
                None if file == MANIFEST_FILE => {}
                None => return Ok(None),
            }
        }
        let mut hash = Sha256::new();
        for (file, meta) in &metas {
            let bound = if *file == WEIGHTS_FILE { self.max_file_bytes } else { MAX_TEXT };
            if meta.size > bound {
                let message = format!("`{name}/{file}` has {} bytes, at most {bound} are read", meta.size);
                return Err(StoreError { code: Code::LimitExceeded, message });
            }
            hash.update(format!("{file}|{}|{:?}|{}|", meta.size, meta.e_tag, meta.last_modified));
        }
        let version: String = hash.finalize().iter().take(8).map(|b| format!("{b:02x}")).collect();
        let parent = self.root.join(name);
        let folder = parent.join(format!("@{version}"));
        // The configuration is written last, and so stands for all.
        if folder.join(CONFIG_FILE).is_file() {
            return Ok(Some(folder));
        }
        create_folder(&folder).map_err(|e| failed(e.to_string()))?;
        for (file, meta) in metas.iter().rev() {
            let options = GetOptions { if_match: meta.e_tag.clone(), ..Default::default() };
            let bytes = self.patiently(async {
                let mut parts = self.store.get_opts(&meta.location, options).await?.into_stream();
                let mut bytes = Vec::new();
                while let Some(part) = parts.next().await {
                    bytes.extend_from_slice(&part?);
                    if bytes.len() as u64 > meta.size {
                        break;
                    }
                }
                Ok(bytes)
            })?;
            if bytes.len() as u64 != meta.size {
                return Err(failed(format!("`{name}/{file}` changed while it was fetched; ask again")));
            }
            write_atomic(&folder.join(file), &bytes).map_err(|e| failed(e.to_string()))?;
        }
        // What it was before is no longer needed; who reads it now keeps its open file.
        for old in std::fs::read_dir(&parent).into_iter().flatten().flatten() {
            if old.file_name().to_string_lossy().starts_with('@') && old.path() != folder {
                let _ = std::fs::remove_dir_all(old.path());
            }
        }
        Ok(Some(folder))
    }
}
