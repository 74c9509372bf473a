//! Whether an adapter's files may have changed since they were read.

use crate::adapters::found::Found;
use lorimer_adapter::file::store::{CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE};
use std::path::Path;
use std::time::{Duration, SystemTime};

/// How a file is told from another in its place: whatever is written, moved or linked there has another of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileStamp {
    length: u64,
    modified: Option<SystemTime>,
    /// Device and number of the file, and when it was last changed in whatever way, which nobody can set. Seconds and nanoseconds.
    own: (u64, u64, i64, i64),
}

impl FileStamp {
    pub(super) fn of(path: &Path) -> Option<Self> {
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

/// The files of an adapter, and of those that it is made of, at a time: whether they may have changed since.
#[derive(Clone, Debug)]
pub(super) struct Stamp {
    found: Found,
    files: Vec<Option<FileStamp>>,
    taken: SystemTime,
}

impl Stamp {
    /// Coarsest unit in which file systems tell times.
    const UNIT: Duration = Duration::from_secs(2);

    pub(super) fn of(found: &Found) -> Option<Self> {
        let taken = SystemTime::now();
        let of =
            |folder: &Path| [WEIGHTS_FILE, CONFIG_FILE, MANIFEST_FILE].map(|name| FileStamp::of(&folder.join(name)));
        let files: Vec<_> = found.folders().flat_map(of).collect();
        let whole = files.chunks(3).all(|own| own[0].is_some() && own[1].is_some());
        whole.then(|| Self { found: found.clone(), files, taken })
    }

    /// Where the files are.
    pub(super) fn found(&self) -> &Found {
        &self.found
    }

    /// Whether the files are those of `now`. Where they were changed just before this stamp was taken, they may have been changed again within
    /// the same unit of time, and only their content tells.
    pub(super) fn surely(&self, now: &Self) -> bool {
        let settled = |file: &FileStamp| file.changed().is_some_and(|changed| changed + Self::UNIT < self.taken);
        self.found == now.found && self.files == now.files && self.files.iter().flatten().all(settled)
    }
}
