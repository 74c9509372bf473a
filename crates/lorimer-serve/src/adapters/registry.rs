//! Names that were given or taken away at run time, kept where the adapters are, so that all servers of them know the same.
//!
//! Several servers may give names at a time: each change is made to what stands there at that moment, in a folder under a lock, in an object
//! store by a write that is refused if another came before.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lorimer_model::files::{read_bounded, write_json};
use serde::{Deserialize, Serialize};

use crate::adapters::names::{Code, StoreError, check_name};

/// The registry's name in its folder or below its prefix.
pub const REGISTRY_FILE: &str = ".lorimer-adapters.json";
/// Who holds a lock on this file changes the registry of a folder.
pub const LOCK_FILE: &str = ".lorimer-adapters.lock";
/// Largest registry that is read.
pub(crate) const MAX_BYTES: u64 = 64 << 20;
/// How long another server may take to change it.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);

/// What was given and what was taken away.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Registry {
    /// Names with their folders below the root.
    #[serde(default)]
    pub names: BTreeMap<String, PathBuf>,
    /// Folders that are not to be served under their own names.
    #[serde(default)]
    pub removed: BTreeSet<String>,
}

/// What became of a change.
pub(crate) enum Written {
    /// It is kept.
    Kept,
    /// It cannot be kept here: why.
    NotKept(String),
}

impl Registry {
    /// A registry out of a file's bytes. Fails where that is none, or a name is none.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, StoreError> {
        let failed = |problem: String| StoreError {
            code: Code::StoreFailed,
            message: format!("`{REGISTRY_FILE}`, which keeps the names of adapters, cannot be read: {problem}"),
        };
        let registry: Self = serde_json::from_slice(bytes).map_err(|e| failed(e.to_string()))?;
        registry.names.keys().try_for_each(|name| check_name(name)).map_err(|e| failed(e.message))?;
        Ok(registry)
    }

    /// Gives a name to a folder.
    pub fn give(&mut self, name: &str, path: &Path) {
        self.removed.remove(name);
        self.names.insert(name.to_string(), path.to_path_buf());
    }

    /// Takes a name away; `folder` if a folder has it of its own.
    pub fn take(&mut self, name: &str, folder: bool) {
        self.names.remove(name);
        if folder {
            self.removed.insert(name.to_string());
        }
    }

    /// This one's changes over another's.
    pub fn over(&self, below: &Self) -> Self {
        let mut all = below.clone();
        self.removed.iter().for_each(|name| all.take(name, true));
        self.names.iter().for_each(|(name, path)| all.give(name, path));
        all
    }

    /// The changes that make this one of another: what lies [`Self::over`] it.
    pub fn beyond(&self, below: &Self) -> Self {
        let mut own = Self::default();
        own.removed.extend(self.removed.difference(&below.removed).cloned());
        own.removed.extend(below.names.keys().filter(|name| !self.names.contains_key(*name)).cloned());
        let new = self.names.iter().filter(|(name, path)| below.names.get(*name) != Some(path));
        new.for_each(|(name, path)| own.give(name, path));
        own
    }
}

/// Whether an error says that nothing may be written there, now and later.
fn may_not(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem)
}

/// The registry of a folder; empty where there is none.
pub(crate) fn read(folder: &Path) -> Result<Registry, StoreError> {
    let path = folder.join(REGISTRY_FILE);
    match read_bounded(&path, MAX_BYTES) {
        Ok(bytes) => Registry::parse(&bytes),
        Err(lorimer_model::Error::Io { reason, .. }) if reason.kind() == ErrorKind::NotFound => Ok(Registry::default()),
        Err(error) => Err(StoreError { code: Code::StoreFailed, message: error.to_string() }),
    }
}

/// Reads the registry of a folder, changes it, and writes it, while nobody else does.
pub(crate) fn change(
    folder: &Path,
    decide: impl FnOnce(&mut Registry) -> Result<(), StoreError>,
) -> Result<(Registry, Written), StoreError> {
    let failed = |message: String| StoreError { code: Code::StoreFailed, message };
    let lock = File::options().create(true).truncate(false).write(true).open(folder.join(LOCK_FILE));
    let lock = match lock {
        Err(error) if may_not(&error) => return read(folder).map(|now| (now, Written::NotKept(error.to_string()))),
        other => other.map_err(|e| failed(format!("`{LOCK_FILE}` in the folder of adapters cannot be opened: {e}")))?,
    };
    let begun = Instant::now();
    loop {
        match lock.try_lock() {
            Ok(()) => break,
            Err(TryLockError::WouldBlock) if begun.elapsed() < LOCK_PATIENCE => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) => {
                let message = format!("`{LOCK_FILE}`: {error}; another server that changes names holds it");
                return Err(failed(message));
            }
        }
    }
    let mut registry = read(folder)?;
    let before = registry.clone();
    decide(&mut registry)?;
    match write_json(&folder.join(REGISTRY_FILE), &registry) {
        Ok(()) => Ok((registry, Written::Kept)),
        Err(lorimer_model::Error::Io { reason, .. }) if may_not(&reason) => {
            Ok((before, Written::NotKept(reason.to_string())))
        }
        Err(error) => Err(failed(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(registry: &Registry) -> Vec<&str> {
        registry.names.keys().map(String::as_str).collect()
    }

    /// To be seen to fail: [`change`] without the lock, or with what was read before it.
    #[test]
    fn servers_that_change_one_folder_at_a_time_lose_nothing() {
        let folder = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for server in 0..4 {
                let folder = folder.path();
                scope.spawn(move || {
                    for i in 0..10 {
                        let name = format!("s{server}-{i}");
                        let given = change(folder, |registry| {
                            registry.give(&name, Path::new("a"));
                            Ok(())
                        });
                        assert!(matches!(given, Ok((_, Written::Kept))));
                    }
                });
            }
        });
        assert_eq!(read(folder.path()).unwrap().names.len(), 40);
    }

    #[test]
    fn changes_lie_over_what_others_wrote() {
        let (mut below, mut own) = (Registry::default(), Registry::default());
        below.give("a", Path::new("x"));
        below.give("b", Path::new("x"));
        below.take("c", true);
        own.take("a", true);
        own.give("c", Path::new("y"));
        let all = own.over(&below);
        let removed: Vec<&str> = all.removed.iter().map(String::as_str).collect();
        assert_eq!((names(&all), removed), (vec!["b", "c"], vec!["a"]));
        assert_eq!(all.beyond(&below), own);
        assert_eq!(own.beyond(&own), Registry::default());
    }

    #[test]
    fn what_is_no_registry_is_refused() {
        for bad in ["{", "3", r#"{"names": {"../x": "a"}}"#, r#"{"names": 3}"#] {
            assert!(Registry::parse(bad.as_bytes()).unwrap_err().message.contains(REGISTRY_FILE), "{bad}");
        }
    }
}
