//! Calls to an object store, with deadlines and what is known of outages.

use super::parts::names_of_part;
use super::{
    FAILURES, Fetched, LATE, Looked, MAX_TEXT, MOST_WAIT, NAMES, PATIENCE, Shared, TRIES, failed, first_line,
    is_answer, lock,
};
use crate::adapters::found::Found;
use crate::adapters::names::{Code, StoreError, check_name};
use crate::adapters::registry::{self, REGISTRY_FILE, Registry};
use futures_util::{StreamExt, TryStreamExt};
use lorimer_adapter::file::store::{CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, part_names};
use lorimer_model::files::{create_folder, write_atomic, write_json};
use object_store::path::Path as Key;
use object_store::{Error, GetOptions, ObjectMeta, ObjectStore, ObjectStoreExt, UpdateVersion};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long a store that did not answer so many times is left alone: 1, 2, 4 … seconds.
pub(super) fn wait_after(failures: u32) -> Duration {
    Duration::from_secs(1 << failures.min(6)).min(MOST_WAIT)
}

impl Shared {
    /// Asks the store, several times if it does not answer. An answer, or an error that is one.
    pub(super) async fn ask<T, F>(&self, what: impl Fn() -> F) -> Result<object_store::Result<T>, StoreError>
    where
        F: Future<Output = object_store::Result<T>>,
    {
        let (until, problem) = {
            let outage = lock(&self.outage);
            (outage.until, outage.problem.clone())
        };
        if let Some(rest) = until.and_then(|until| until.checked_duration_since(Instant::now())) {
            return Err(failed(format!("{problem}; it is asked again in {} s", rest.as_secs() + 1)));
        }
        let mut last = failed(LATE);
        for _ in 0..TRIES {
            match tokio::time::timeout(PATIENCE, what()).await {
                Ok(answer) if answer.as_ref().err().is_none_or(is_answer) => {
                    self.answered();
                    return Ok(answer);
                }
                Ok(Err(error)) => last = failed(format!("the object store does not answer: {}", first_line(&error))),
                _ => last = failed(LATE),
            }
        }
        self.failing(&last.message);
        Err(last)
    }

    pub(super) fn answered(&self) {
        let before = std::mem::take(&mut *lock(&self.outage));
        if before.failures >= FAILURES {
            tracing::info!("the object store answers again");
        }
    }

    pub(super) fn failing(&self, problem: &str) {
        let mut outage = lock(&self.outage);
        outage.failures = outage.failures.saturating_add(1);
        outage.problem = problem.to_string();
        if outage.failures >= FAILURES {
            outage.until = Some(Instant::now() + wait_after(outage.failures - FAILURES));
        }
        if outage.failures == FAILURES {
            tracing::warn!("{problem}; what was fetched before is served");
        }
    }

    /// An error of the store that was not to be expected.
    pub(super) fn unanswered(&self, error: &Error) -> StoreError {
        failed(format!("the object store: {}", first_line(error)))
    }

    pub(super) fn registry_key(&self) -> Key {
        self.prefix.clone().join(REGISTRY_FILE)
    }

    /// Names that servers gave, and their version; None where there are none.
    pub(super) async fn registry(&self) -> Result<Option<(Registry, UpdateVersion)>, StoreError> {
        let key = self.registry_key();
        let got = self.ask(|| self.store.get(&key)).await?;
        let got = match got {
            Err(Error::NotFound { .. }) => return Ok(None),
            other => other.map_err(|e| self.unanswered(&e))?,
        };
        let version = UpdateVersion { e_tag: got.meta.e_tag.clone(), version: got.meta.version.clone() };
        let meta = got.meta.clone();
        let bytes = self.body(got, &meta, REGISTRY_FILE, registry::MAX_BYTES).await?;
        let registry = Registry::parse(&bytes)?;
        lock(&self.news).tag = meta.e_tag;
        self.keep(&registry);
        Ok(Some((registry, version)))
    }

    /// Keeps names here for a start without the store.
    pub(super) fn keep(&self, registry: &Registry) {
        if let Err(problem) = write_json(&self.root.join(REGISTRY_FILE), registry) {
            tracing::debug!("names of adapters are not kept here: {problem}");
        }
    }

    /// The bytes of an object, as many as its metadata says and `bound` at most.
    pub(super) async fn body(
        &self,
        got: object_store::GetResult,
        meta: &ObjectMeta,
        shown: &str,
        bound: u64,
    ) -> Result<Vec<u8>, StoreError> {
        if meta.size > bound {
            let message = format!("`{shown}` has {} bytes, at most {bound} are read", meta.size);
            return Err(StoreError { code: Code::LimitExceeded, message });
        }
        let mut parts = got.into_stream();
        let mut bytes = Vec::new();
        while let Some(part) = tokio::time::timeout(PATIENCE, parts.next()).await.transpose() {
            let part = part.map_err(|_| failed(format!("`{shown}` does not come from the object store in time")))?;
            bytes.extend_from_slice(&part.map_err(|e| self.unanswered(&e))?);
            if bytes.len() as u64 > meta.size {
                break;
            }
        }
        match bytes.len() as u64 == meta.size {
            true => Ok(bytes),
            false => Err(failed(format!("`{shown}` changed while it was fetched; ask again"))),
        }
    }

    /// Names of the adapters below the prefix, `most` at most; none, with a warning, where keys are there that are no paths.
    pub(super) async fn list(&self, most: usize) -> Result<Vec<String>, StoreError> {
        let name = |meta: ObjectMeta| {
            let parts: Vec<String> =
                meta.location.prefix_match(&self.prefix)?.map(|p| p.as_ref().to_string()).collect();
            let (file, folder) = parts.split_last()?;
            Some(folder.join("/")).filter(|name| file == CONFIG_FILE && check_name(name).is_ok())
        };
        let mut objects = self.store.list(Some(&self.prefix));
        let mut names = Vec::new();
        loop {
            // A listing is not begun anew: it may have many pages.
            let next = tokio::time::timeout(PATIENCE, objects.try_next()).await;
            match next {
                Ok(Ok(Some(meta))) => names.extend(name(meta)),
                Ok(Ok(None)) => break,
                Ok(Err(error @ Error::InvalidPath { .. })) => {
                    tracing::warn!(
                        "adapters are found when they are asked for, since the store cannot be listed: {error}"
                    );
                    return Ok(Vec::new());
                }
                Ok(Err(error)) if is_answer(&error) => return Err(self.unanswered(&error)),
                Ok(Err(error)) => {
                    let problem = format!("the object store does not answer: {}", first_line(&error));
                    self.failing(&problem);
                    return Err(failed(problem));
                }
                Err(_) => {
                    self.failing(LATE);
                    return Err(failed(LATE));
                }
            }
            if names.len() > most {
                let message = format!("more than {most} adapters in the object store");
                return Err(StoreError { code: Code::LimitExceeded, message });
            }
        }
        self.answered();
        Ok(names)
    }

    /// Asks for names every now and then, and for the listing until it came once.
    pub(super) async fn watch(self: Arc<Self>, mut listed: bool, most: usize) {
        let mut failures = 0;
        loop {
            tokio::time::sleep(if failures == 0 && listed { NAMES } else { wait_after(failures) }).await;
            // Whatever others met: this is who asks again.
            lock(&self.outage).until = None;
            let asked = async {
                if !listed {
                    let names = self.list(most).await?;
                    lock(&self.news).listing = Some(names);
                    listed = true;
                    self.any_news.store(true, Ordering::Relaxed);
                }
                self.look_for_names().await
            };
            match asked.await {
                Ok(()) => failures = 0,
                Err(error) => {
                    failures += 1;
                    tracing::debug!("{error}");
                    let mut outage = lock(&self.outage);
                    if outage.failures >= FAILURES {
                        outage.until = Some(Instant::now() + wait_after(failures));
                    }
                }
            }
        }
    }

    pub(super) async fn look_for_names(&self) -> Result<(), StoreError> {
        let (key, tag) = (self.registry_key(), lock(&self.news).tag.clone());
        let head = self.ask(|| self.store.head(&key)).await?;
        let found = match head {
            Err(Error::NotFound { .. }) => None,
            other => Some(other.map_err(|e| self.unanswered(&e))?),
        };
        if found.as_ref().is_none_or(|meta| meta.e_tag.is_some() && meta.e_tag == tag) {
            return Ok(());
        }
        if let Some((registry, _)) = self.registry().await? {
            lock(&self.news).registry = Some(registry);
            self.any_news.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Names of the adapters that were fetched before.
    pub(super) fn here(&self) -> Vec<String> {
        let (mut names, mut folders) = (Vec::new(), vec![self.root.clone()]);
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if !entry.file_type().is_ok_and(|t| t.is_dir()) {
                    continue;
                }
                if !name.starts_with('@') {
                    folders.push(entry.path());
                } else if let Ok(below) = folder.strip_prefix(&self.root)
                    && entry.path().join(CONFIG_FILE).is_file()
                {
                    names.push(
                        below.components().map(|c| c.as_os_str().to_string_lossy()).collect::<Vec<_>>().join("/"),
                    );
                }
            }
        }
        names.retain(|name| check_name(name).is_ok());
        names
    }

    /// What was fetched of an adapter last, if anything.
    pub(super) fn kept(&self, name: &str) -> Option<PathBuf> {
        let entries = std::fs::read_dir(self.root.join(name)).ok()?.flatten();
        let whole = |e: &std::fs::DirEntry| {
            e.file_name().to_string_lossy().starts_with('@') && e.path().join(CONFIG_FILE).is_file()
        };
        entries.filter(whole).max_by_key(|e| e.metadata().and_then(|m| m.modified()).ok()).map(|e| e.path())
    }

    /// What was fetched last of an adapter and of those that it is made of, if all of it is here, with the names of the parts.
    pub(super) fn kept_whole(&self, path: &Path) -> Option<(Found, Vec<PathBuf>)> {
        let name = path.to_string_lossy();
        let folder = lock(&self.looked).get(path).map(|l| l.fetched.folder.clone()).or_else(|| self.kept(&name))?;
        let (mut parts, mut names) = (Vec::new(), Vec::new());
        for part in part_names(&folder).ok()? {
            let kept = |name: String| Some((PathBuf::from(&name), self.kept(&name)?));
            let (name, folder) = names_of_part(&name, &part, &self.address).into_iter().find_map(kept)?;
            names.push(name);
            parts.push(folder);
        }
        Some((Found { folder, parts }, names))
    }

    pub(super) fn note(&self, path: &Path, found: Option<Fetched>) {
        let mut looked = lock(&self.looked);
        match found {
            Some(fetched) => {
                looked.insert(path.to_path_buf(), Looked { when: Instant::now(), fetched, again: false });
            }
            None => _ = looked.remove(path),
        }
    }

    /// Notes an adapter that another is made of. One that is made of others itself is left to those who look at it: it can be no part.
    fn note_part(&self, path: &Path, folder: &Path) {
        if part_names(folder).is_ok_and(|parts| parts.is_empty()) {
            self.note(path, Some(Fetched { folder: folder.to_path_buf(), parts: Vec::new() }));
        }
    }

    /// What was fetched before is taken to be what the store has.
    pub(super) fn note_kept(&self, path: &Path, found: &Found, names: Vec<PathBuf>) {
        names.iter().zip(&found.parts).for_each(|(name, folder)| self.note_part(name, folder));
        self.note(path, Some(Fetched { folder: found.folder.clone(), parts: names }));
    }

    /// Looks at an adapter and at those that it is made of: where their files are now.
    pub(super) async fn look_whole(&self, path: &Path) -> Result<Option<Found>, StoreError> {
        let Some((fetched, parts)) = self.look_and_note(path).await? else { return Ok(None) };
        Ok(Some(Found { folder: fetched.folder, parts }))
    }

    /// The same, with the names of the parts and their folders.
    pub(super) async fn look_and_note(&self, path: &Path) -> Result<Option<(Fetched, Vec<PathBuf>)>, StoreError> {
        let found = self.look_with_parts(&path.to_string_lossy()).await;
        match &found {
            Ok(found) => self.note(path, found.as_ref().map(|(fetched, _)| fetched.clone())),
            // What was there is there still, and is looked at again after a while.
            Err(_) => {
                if let Some(looked) = lock(&self.looked).get_mut(path) {
                    (looked.when, looked.again) = (Instant::now(), false);
                }
            }
        }
        found
    }

    async fn look_with_parts(&self, name: &str) -> Result<Option<(Fetched, Vec<PathBuf>)>, StoreError> {
        let Some(folder) = self.look(name).await? else { return Ok(None) };
        let invalid = |message: String| StoreError { code: Code::AdapterInvalid, message };
        let parts = part_names(&folder).map_err(|e| invalid(e.to_string()))?;
        let each = parts.iter().enumerate().map(|(number, part)| async move {
            for tried in names_of_part(name, part, &self.address) {
                if let Some(folder) = self.look(&tried).await? {
                    let tried = PathBuf::from(tried);
                    self.note_part(&tried, &folder);
                    return Ok((tried, folder));
                }
            }
            let shown: String = part.chars().take(120).collect();
            Err(invalid(format!(
                "`{name}`: its expert {number} should be at `{}`, where the object store has no adapter; put it there, or name it by its way from the adapter's own place (`../expert`)",
                shown.escape_debug()
            )))
        });
        let found = futures_util::future::try_join_all(each).await?;
        let (parts, folders) = found.into_iter().unzip();
        Ok(Some((Fetched { folder, parts }, folders)))
    }

    /// The folder of one adapter without its parts.
    pub(super) async fn look(&self, name: &str) -> Result<Option<PathBuf>, StoreError> {
        let files = [CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE];
        let heads = files.map(|file| async move {
            let key = name.split('/').chain([file]).fold(self.prefix.clone(), |key, part| key.join(part));
            match self.ask(|| self.store.head(&key)).await? {
                Err(Error::NotFound { .. }) => Ok(None),
                other => other.map(Some).map_err(|e| self.unanswered(&e)),
            }
        });
        let mut metas = Vec::new();
        for (file, meta) in files.into_iter().zip(futures_util::future::try_join_all(heads).await?) {
            match meta {
                Some(meta) => metas.push((file, meta)),
                None if file == MANIFEST_FILE => {}
                None => return Ok(None),
            }
        }
        let mut hash = Sha256::new();
        for (file, meta) in &metas {
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
            let bound = if *file == WEIGHTS_FILE { self.max_file_bytes } else { MAX_TEXT };
            let shown = format!("{name}/{file}");
            let options = || GetOptions { if_match: meta.e_tag.clone(), ..Default::default() };
            let got = self.ask(|| self.store.get_opts(&meta.location, options())).await?;
            let got = got.map_err(|e| self.unanswered(&e))?;
            let bytes = self.body(got, meta, &shown, bound).await?;
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
