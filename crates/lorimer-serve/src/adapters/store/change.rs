//! Names that change: what this server is asked for, and what others of the same adapters did.

use super::stamp::{FileStamp, Stamp};
use super::{Inner, Named, Put, Store};
use crate::adapters::found::Found;
use crate::adapters::hosted::Hosted;
use crate::adapters::mirror::FRESH;
use crate::adapters::names::{Code, StoreError, check_name, refuse};
use crate::adapters::registry::{self, REGISTRY_FILE, Registry, Written};
use lorimer_adapter::file::store::CONFIG_FILE;
use lorimer_model::BaseModel;
use lorimer_model::files::{replace_folder_atomic, write_folder_atomic};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, TryLockError};
use std::time::Instant;

impl Store {
    /// Takes up a registry: what it gives and takes away, and what the one before gave and it does not.
    pub(super) fn adopt(&self, inner: &mut Inner, registry: Registry) {
        let before = inner.own.over(&inner.registry);
        inner.registry = registry;
        self.apply(inner, &before);
    }

    pub(super) fn apply(&self, inner: &mut Inner, before: &Registry) {
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
    pub(super) fn catch_up(&self) {
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
    pub(super) fn change(
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
        let (path, files) = self.locate(path, true)?;
        let stamp = Stamp::of(&files);
        let hosted = self.aside(|| self.load(model, &files))?;
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

    /// Makes an adapter out of files that `fill` writes into an empty folder, and gives it its name below the root, once it was read and found good.
    ///
    /// # Errors
    ///
    /// Fails as [`Self::put`] does, if the adapters come from an object store, if `fill` fails, or if the files cannot be written.
    pub fn receive(
        &self,
        model: &(dyn BaseModel + Sync),
        name: &str,
        how: &Put,
        fill: impl FnOnce(&Path) -> lorimer_model::Result<()>,
    ) -> Result<Arc<Hosted>, StoreError> {
        check_name(name)?;
        if self.mirror.is_some() {
            return refuse(Code::StoreFailed, "the adapters come from an object store; put the files there");
        }
        self.catch_up();
        self.allowed(&self.lock(), name, how)?;
        let target = self.root.join(name);
        let there = target.symlink_metadata().is_ok();
        if there && *how == Put::Create {
            let message = format!("there is a folder `{name}` already; ask to replace it if that is meant");
            return refuse(Code::AdapterExists, message);
        }
        if there && !target.join(CONFIG_FILE).is_file() {
            return refuse(Code::PathRefused, format!("`{name}` is a folder of something else than an adapter"));
        }
        // The nearest folder that is there says where the others would come to lie.
        let nearest = target.ancestors().skip(1).find_map(|folder| folder.canonicalize().ok());
        if !nearest.is_some_and(|folder| folder.starts_with(&self.root)) {
            return refuse(Code::PathRefused, format!("`{name}` leaves the folder of adapters"));
        }
        let mut unfit = None;
        let fill = |folder: &Path| {
            fill(folder)?;
            let read = self.aside(|| self.load(model, &Found::in_folder(folder.to_path_buf())));
            read.map(drop).map_err(|problem| {
                // The folder has a name for the time being.
                let own = folder.file_name().map(|own| own.to_string_lossy().into_owned()).unwrap_or_default();
                let message = problem.message.replace(&own, name.rsplit('/').next().unwrap_or(name));
                unfit = Some(StoreError { message: message.clone(), ..problem });
                lorimer_model::Error::Unsupported(message)
            })
        };
        let written = if there { replace_folder_atomic(&target, fill) } else { write_folder_atomic(&target, fill) };
        if let Err(problem) = written {
            let message = self.without_root(&problem.to_string());
            return Err(unfit.unwrap_or(StoreError { code: Code::StoreFailed, message }));
        }
        // Somebody may have asked for it already, so that the name is there.
        self.put(model, name, Path::new(name), &Put::Upsert)
    }

    pub(super) fn allowed(&self, inner: &Inner, name: &str, how: &Put) -> Result<(), StoreError> {
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
}
