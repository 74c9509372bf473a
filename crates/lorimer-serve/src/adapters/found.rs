//! Where an adapter's files are on this machine.

use std::path::{Path, PathBuf};

use lorimer_adapter::file::store::part_folders;

/// An adapter's folder, and those of the adapters that it is made of, in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its own.
    pub folder: PathBuf,
    /// Of its parts; most have none.
    pub parts: Vec<PathBuf>,
}

impl Found {
    /// In a folder, as its configuration names its parts. Where that cannot be read it has none: who reads the adapter says so.
    pub fn in_folder(folder: PathBuf) -> Self {
        let parts = part_folders(&folder).unwrap_or_default();
        Self { folder, parts }
    }

    /// All folders, its own first.
    pub fn folders(&self) -> impl Iterator<Item = &Path> {
        std::iter::once(&self.folder).chain(&self.parts).map(PathBuf::as_path)
    }
}
