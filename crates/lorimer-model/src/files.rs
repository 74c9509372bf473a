//! Reading with bounds and writing whole or not at all.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Largest JSON file that is read whole (a tokenizer of a large vocabulary has about 20 MB).
pub const MAX_JSON_BYTES: u64 = 64 << 20;
/// Largest header of a safetensors file that is read.
pub const MAX_HEADER_BYTES: u64 = 16 << 20;

/// Reads a regular file of at most `limit` bytes.
pub fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(Error::io("read", path))?;
    let metadata = file.metadata().map_err(Error::io("read", path))?;
    if !metadata.is_file() {
        return Err(Error::invalid(path, "a file was expected here, found something else"));
    }
    if metadata.len() > limit {
        return Err(Error::invalid(path, format!("{} bytes, at most {limit} are read", metadata.len())));
    }
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    Ok(bytes)
}

/// Reads a JSON file of at most `limit` bytes (nesting is bounded by the parser).
pub fn read_json<T: serde::de::DeserializeOwned>(path: &Path, limit: u64) -> Result<T> {
    serde_json::from_slice(&read_bounded(path, limit)?)
        .map_err(|e| Error::invalid(path, format!("is not the JSON that was expected: {e}")))
}

fn sync_folder(folder: &Path) -> Result<()> {
    // Windows cannot open a folder as a file; renames are durable there without it.
    if cfg!(unix) {
        File::open(folder).and_then(|f| f.sync_all()).map_err(Error::io("sync", folder))?;
    }
    Ok(())
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

/// Creates a folder and its parents.
pub fn create_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(Error::io("create", path))
}

/// Name of the temporary neighbour that a write goes to first.
fn temporary(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    parent(path).join(format!(".{name}.{}.tmp", std::process::id()))
}

/// Writes a file so that a reader sees the old content or the new, never a part: temporary file in the same
/// folder, fsync, rename, fsync of the folder.
pub fn write_atomic_with(path: &Path, fill: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    create_folder(parent(path))?;
    let temporary = temporary(path);
    let write = || -> Result<()> {
        let mut file = File::create(&temporary).map_err(Error::io("write", &temporary))?;
        fill(&mut file)?;
        file.sync_all().map_err(Error::io("sync", &temporary))?;
        fs::rename(&temporary, path).map_err(Error::io("rename to", path))
    };
    write().inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })?;
    sync_folder(parent(path))
}

/// [`write_atomic_with`] for bytes in memory.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomic_with(path, |file| file.write_all(bytes).map_err(Error::io("write", path)))
}

/// Pretty JSON with a final newline, written atomically.
pub fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let mut bytes = serde_json::to_vec_pretty(value).map_err(|e| Error::invalid(path, e.to_string()))?;
    bytes.push(b'\n');
    write_atomic(path, &bytes)
}

/// Fills a new folder and gives it its name only when it is whole. `path` must not exist.
pub fn write_folder_atomic(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let temporary = temporary(path);
    if temporary.exists() {
        fs::remove_dir_all(&temporary).map_err(Error::io("remove", &temporary))?;
    }
    create_folder(&temporary)?;
    let write = || -> Result<()> {
        fill(&temporary)?;
        sync_folder(&temporary)?;
        fs::rename(&temporary, path).map_err(Error::io("rename to", path))
    };
    write().inspect_err(|_| {
        let _ = fs::remove_dir_all(&temporary);
    })?;
    sync_folder(parent(path))
}

/// Removes what interrupted writes left in a folder (`.<name>.<pid>.tmp`).
pub fn remove_leftovers(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with('.') && name.ends_with(".tmp") {
            let _ = match entry.file_type() {
                Ok(t) if t.is_dir() => fs::remove_dir_all(entry.path()),
                _ => fs::remove_file(entry.path()),
            };
        }
    }
}

/// A file name that stays inside its folder: not empty, no separator, no `..`, no control character.
pub fn is_plain_file_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 255
        && name != "."
        && name != ".."
        && !name.contains(['/', '\\', ':'])
        && !name.chars().any(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_content_and_no_temporary_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        write_atomic(&path, b"old").unwrap();
        let failed = write_atomic_with(&path, |f| {
            f.write_all(b"half").unwrap();
            Err(Error::Unsupported("stop".into()))
        });
        assert!(failed.is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn names_that_leave_their_folder_are_not_plain() {
        for bad in ["", ".", "..", "../a", "a/b", "a\\b", "C:x", "a\nb"] {
            assert!(!is_plain_file_name(bad), "{bad:?}");
        }
        assert!(is_plain_file_name("model-00001-of-00002.safetensors"));
    }
}
