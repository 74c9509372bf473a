//! Adapters out of their folders into host memory.

use super::stamp::Stamp;
use super::{Inner, Named, Store, UNIT};
use crate::adapters::found::Found;
use crate::adapters::hosted::Hosted;
use crate::adapters::names::{Code, StoreError, check_name, refuse};
use lorimer_adapter::file::store::{CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE};
use lorimer_adapter::{Adapter, StoredAdapter};
use lorimer_model::BaseModel;
use lorimer_model::text::chat::ChatTemplate;
use std::path::Path;
use std::sync::{Arc, PoisonError};

/// The text of a template.
pub(super) fn source(template: &Option<ChatTemplate>) -> Option<&str> {
    template.as_ref().map(|t| t.source())
}

impl Store {
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
                        // That a store does not answer, or has it in part, is not that it has nothing.
                        Err(error)
                            if matches!(error.code, Code::StoreFailed | Code::LimitExceeded | Code::AdapterInvalid) =>
                        {
                            return Err(error);
                        }
                        found => found.ok(),
                    },
                };
                if !found.is_some_and(|(below, found)| below == own && found.folder.join(CONFIG_FILE).is_file()) {
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
        let (_, files) = located?;
        let stamp = Stamp::of(&files);
        let read = find().and_then(|n| n.read);
        if let (Some((then, content)), Some(now)) = (read, &stamp)
            && then.surely(now)
        {
            let mut inner = self.lock();
            inner.account.touch(&content);
            if let Some(hosted) = inner.hosted.get(&content).cloned() {
                inner.loading.remove(name);
                return Ok(hosted);
            }
        }
        let loaded = self.aside(|| self.load(model, &files));
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
        let (now, (then, content)) = {
            let inner = self.lock();
            let named = inner.names.get(name)?;
            let read = named.read.clone()?;
            // Which parts it has stands in its configuration, which is one of the files that are looked at.
            let now = match &self.mirror {
                Some(mirror) => mirror.current(&named.path)?,
                None => Found { folder: self.root.join(&named.path), parts: read.0.found().parts.clone() },
            };
            (now, read)
        };
        if !then.surely(&Stamp::of(&now)?) {
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

    /// Reads an adapter's folders into its served form.
    pub(super) fn load(&self, model: &(dyn BaseModel + Sync), files: &Found) -> Result<Arc<Hosted>, StoreError> {
        let folder = &files.folder;
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
        // What an object store calls them is no folder here.
        let parts = self.mirror.as_ref().map(|_| files.parts.as_slice());
        let stored = StoredAdapter::read_changing(folder, self.settings.max_file_bytes, &self.root, parts)
            .map_err(|e| invalid(e.to_string()))?;
        if let Some(base) = &self.settings.base {
            base.check(&stored).map_err(|e| invalid(e.to_string()))?;
        }
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
    pub(super) fn template(&self, stored: &StoredAdapter) -> lorimer_model::Result<Option<ChatTemplate>> {
        let own = stored.manifest.as_ref().and_then(|m| m.chat_template.as_ref());
        let Some((own, chat)) = own.zip(self.settings.chat.as_ref()) else { return Ok(None) };
        if chat.template.as_ref() == Some(own) {
            return Ok(None);
        }
        ChatTemplate::new(own, &chat.bos, &chat.eos).map(Some)
    }

    /// Keeps an adapter in host memory; others give way.
    pub(super) fn keep(&self, inner: &mut Inner, hosted: Arc<Hosted>) -> Arc<Hosted> {
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
}
