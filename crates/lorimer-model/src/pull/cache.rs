//! Where models are kept, and a hub id's place there.

use std::fs;
use std::path::PathBuf;

use crate::files::is_plain_file_name;

fn home() -> PathBuf {
    std::env::var_os("HOME")
        .or_else(|| std::env::var_os("USERPROFILE"))
        .map_or_else(|| PathBuf::from("."), PathBuf::from)
}

pub(super) fn cache_root() -> PathBuf {
    std::env::var_os("XDG_CACHE_HOME").map_or_else(|| home().join(".cache"), PathBuf::from)
}

/// The hub cache: `HF_HUB_CACHE`, `$HF_HOME/hub`, `$XDG_CACHE_HOME/huggingface/hub` or `~/.cache/huggingface/hub`.
pub fn hub_cache() -> PathBuf {
    let var = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    var("HF_HUB_CACHE")
        .or_else(|| Some(var("HF_HOME")?.join("hub")))
        .unwrap_or_else(|| cache_root().join("huggingface").join("hub"))
}

/// Lorimer's own cache, for what is not from the hub: `LORIMER_HOME` or `~/.cache/lorimer`.
pub fn own_cache() -> PathBuf {
    std::env::var_os("LORIMER_HOME").map_or_else(|| cache_root().join("lorimer"), PathBuf::from)
}

/// Where the hub's cache has, or would have, the snapshot of a hub id (`owner/name`, with an optional `@revision`). None for other texts.
pub fn snapshot_folder(id: &str) -> Option<PathBuf> {
    HubId::parse(id)?.snapshot()
}

/// `owner/name`, with an optional `@revision`.
pub(super) struct HubId {
    pub(super) owner: String,
    pub(super) name: String,
    pub(super) revision: String,
}

impl HubId {
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (id, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (owner, name) = id.split_once('/')?;
        let plain = |s: &str| {
            is_plain_file_name(s) && s.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        };
        (plain(owner) && plain(name) && plain(revision)).then(|| Self {
            owner: owner.to_string(),
            name: name.to_string(),
            revision: revision.to_string(),
        })
    }

    pub(super) fn folder(&self) -> PathBuf {
        hub_cache().join(format!("models--{}--{}", self.owner, self.name))
    }

    /// Where its snapshot is, if it is cached.
    fn snapshot(&self) -> Option<PathBuf> {
        let folder = self.folder();
        let commit = fs::read_to_string(folder.join("refs").join(&self.revision));
        let commit = commit.map_or_else(|_| self.revision.clone(), |c| c.trim().to_string());
        Some(folder.join("snapshots").join(is_plain_file_name(&commit).then_some(commit)?))
    }

    /// A cached snapshot that has all that is needed.
    pub(super) fn cached(&self) -> Option<PathBuf> {
        let snapshot = self.snapshot()?;
        let has = |name: &str| snapshot.join(name).is_file();
        let whole = match has("model.safetensors.index.json") {
            true => crate::weights::Weights::from_folder(&snapshot, Default::default()).is_ok(),
            false => has("model.safetensors"),
        };
        (has("config.json") && has("tokenizer.json") && whole).then_some(snapshot)
    }
}
