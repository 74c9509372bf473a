//! Reading with bounds and writing whole or not at all.

use std::fs::{self, File};
use std::hash::{BuildHasher, RandomState};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::error::{Error, Result};

/// Largest JSON file that is read whole (a tokenizer of a large vocabulary has about 20 MB).
pub const MAX_JSON_BYTES: u64 = 64 << 20;
/// Largest header of a safetensors file that is read.
pub const MAX_HEADER_BYTES: u64 = 16 << 20;

/// Reads a regular file of at most `limit` bytes.
///
/// # Errors
///
/// Fails if the file cannot be read, is no regular file, or has more than `limit` bytes.
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
///
/// # Errors
///
/// Fails as [`read_bounded`] does, and if the content is not JSON of that type.
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
///
/// # Errors
///
/// Fails if the folder cannot be created.
pub fn create_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(Error::io("create", path))
}

/// A name that no other writer has, for the neighbour that a write goes to first. Writers may be threads, processes, or machines that share
/// a folder and number their processes alike, so the name is drawn at random.
fn temporary(path: &Path) -> PathBuf {
    let name: String = path.file_name().unwrap_or_default().to_string_lossy().chars().take(50).collect();
    // Each state has keys of its own.
    let number = RandomState::new().hash_one((std::process::id(), SystemTime::now()));
    parent(path).join(format!(".{name}.{number:016x}.tmp"))
}

/// Makes a temporary neighbour with `make`, and holds a lock on it by which [`remove_leftovers`] sees that somebody writes it.
fn make_temporary(
    path: &Path,
    make: impl Fn(&Path) -> std::io::Result<()>,
) -> Result<(PathBuf, std::io::Result<File>)> {
    create_folder(parent(path))?;
    loop {
        let temporary = temporary(path);
        match make(&temporary) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
            Err(error) => return Err(Error::io("write", &temporary)(error)),
            Ok(()) => {}
        }
        // Where there are no locks, leftovers are not removed either.
        let file = open_to_lock(&temporary);
        if let Ok(file) = &file {
            let _ = file.lock();
        }
        // It may have been taken for a leftover before it was locked.
        if temporary.exists() {
            return Ok((temporary, file));
        }
    }
}

/// Fails where nothing can be written into a folder, which is found by doing it.
///
/// # Errors
///
/// Fails if a file cannot be created in the folder or removed from it.
pub fn check_writable(folder: &Path) -> Result<()> {
    let (temporary, _lock) =
        make_temporary(&folder.join("writable"), |temporary| File::create_new(temporary).map(drop))?;
    fs::remove_file(&temporary).map_err(Error::io("remove", &temporary))
}

/// Opens a file or folder for a lock. Fails for folders on Windows, which cannot open them.
fn open_to_lock(path: &Path) -> std::io::Result<File> {
    File::options().read(true).write(!path.is_dir()).open(path)
}

/// Writes a file so that a reader sees the old content or the new, never a part: temporary file in the same
/// folder, fsync, rename, fsync of the folder. Of several writers the last to end wins.
///
/// # Errors
///
/// Fails if `fill` does, or if the file cannot be written, synced or renamed; the old content then stays, unless only the folder could not
/// be synced.
pub fn write_atomic_with(path: &Path, fill: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    let (temporary, file) = make_temporary(path, |temporary| File::create_new(temporary).map(drop))?;
    let write = || -> Result<()> {
        let mut file = file.map_err(Error::io("write", &temporary))?;
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
///
/// # Errors
///
/// Fails as [`write_atomic_with`] does.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomic_with(path, |file| file.write_all(bytes).map_err(Error::io("write", path)))
}

/// Pretty JSON with a final newline, written atomically.
///
/// # Errors
///
/// Fails if the value cannot be written as JSON, and as [`write_atomic_with`] does.
pub fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let mut bytes = serde_json::to_vec_pretty(value).map_err(|e| Error::invalid(path, e.to_string()))?;
    bytes.push(b'\n');
    write_atomic(path, &bytes)
}

/// Fills a new folder and gives it its name only when it is whole. `path` must not exist.
///
/// # Errors
///
/// Fails if `fill` does, or if the folder cannot be created, synced or renamed, as where `path` exists.
pub fn write_folder_atomic(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    // Held until the folder has its name.
    let (temporary, _lock) = make_temporary(path, |temporary| fs::create_dir(temporary))?;
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

/// Fills a new folder and puts it in the place of one that is there, only when it is whole: a reader sees the old one or the new one.
///
/// # Errors
///
/// Fails if `fill` does, or if the folder cannot be created, synced or renamed; the old one then stays.
pub fn replace_folder_atomic(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let (temporary, _lock) = make_temporary(path, |temporary| fs::create_dir(temporary))?;
    let write = || -> Result<()> {
        fill(&temporary)?;
        sync_folder(&temporary)?;
        exchange(&temporary, path).map_err(Error::io("rename to", path))
    };
    let written = write();
    // The old one, or what there is of the new.
    let removed = fs::remove_dir_all(&temporary).map_err(Error::io("remove", &temporary));
    written.and(removed)?;
    sync_folder(parent(path))
}

/// Two folders get each other's names at once; where the system cannot, one after the other.
fn exchange(one: &Path, other: &Path) -> std::io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        use rustix::io::Errno;
        match renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE) {
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {}
            done => return Ok(done?),
        }
    }
    let away = temporary(other);
    fs::rename(other, &away)?;
    fs::rename(one, other).inspect_err(|_| _ = fs::rename(&away, other))?;
    fs::rename(&away, one)
}

/// Removes a folder: first it gets a name that nobody looks at, so that a kill in between leaves no half one.
///
/// # Errors
///
/// Fails if the folder cannot be renamed or removed.
pub fn remove_folder(path: &Path) -> Result<()> {
    let away = temporary(path);
    fs::rename(path, &away).map_err(Error::io("remove", path))?;
    fs::remove_dir_all(&away).map_err(Error::io("remove", &away))
}

/// Removes what interrupted writes left in a folder (`.<name>.<number>.tmp`), and nothing that somebody is writing.
pub fn remove_leftovers(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Ok(kind) = entry.file_type() else { continue };
        if !(name.starts_with('.') && name.ends_with(".tmp")) {
            continue;
        }
        let removed = match kind.is_dir() || kind.is_file() {
            // Held until it is gone.
            true => match open_to_lock(&entry.path()) {
                Ok(file) if file.try_lock().is_ok() => match kind.is_dir() {
                    true => fs::remove_dir_all(entry.path()),
                    false => fs::remove_file(entry.path()),
                },
                _ => continue,
            },
            false => fs::remove_file(entry.path()),
        };
        if let Err(error) = removed {
            tracing::debug!("`{}` is left over and was not removed: {error}", entry.path().display());
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

/// How the names of the files begin that say how a model's text is made and read.
const TEXT_FILES: [&str; 12] = [
    "tokenizer.",
    "tokenizer_config.",
    "special_tokens_map.",
    "added_tokens.",
    "vocab.",
    "merges.",
    "chat_template",
    "generation_config.",
    "tekken.",
    "spiece.",
    "sentencepiece.",
    "sentencepiece_",
];
/// Folders of further chat templates, as transformers 4 and 5 name them.
const TEMPLATE_FOLDERS: [&str; 2] = ["additional_chat_templates", "chat_templates"];
/// Most templates that are read out of a folder.
const MAX_TEMPLATES: usize = 1000;

/// Files of a Hugging Face folder that belong to its text and not to its weights, by their paths below it: tokenizers in every form, chat
/// templates, what ends a turn. Weights are never among them.
///
/// # Errors
///
/// Fails if a folder cannot be listed.
pub fn text_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let names = |folder: &Path| -> Result<Vec<String>> {
        let entries = fs::read_dir(folder).map_err(Error::io("read", folder))?;
        let files = entries.flatten().filter(|e| e.path().is_file());
        let mut names: Vec<String> = files.filter_map(|e| e.file_name().into_string().ok()).collect();
        names.sort_unstable();
        Ok(names)
    };
    let weights = |name: &str| [".safetensors", ".bin", ".pt", ".pth", ".gguf"].iter().any(|end| name.ends_with(end));
    let text = |name: &String| {
        (TEXT_FILES.iter().any(|begin| name.starts_with(begin)) || name.ends_with(".tiktoken")) && !weights(name)
    };
    let mut found: Vec<PathBuf> = names(folder)?.into_iter().filter(text).map(PathBuf::from).collect();
    for inner in TEMPLATE_FOLDERS.iter().filter(|inner| folder.join(inner).is_dir()) {
        let templates = names(&folder.join(inner))?.into_iter().filter(|name| name.ends_with(".jinja"));
        found.extend(templates.take(MAX_TEMPLATES).map(|name| Path::new(inner).join(name)));
    }
    Ok(found)
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

    /// Threads stand for processes and machines here. To be seen to fail: a temporary name out of the file's name and the process's number.
    #[test]
    fn two_writers_of_one_file_do_not_meet() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        let both_write = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            let threads = [b'a', b'b'].map(|letter| {
                let (path, both_write) = (&path, &both_write);
                scope.spawn(move || {
                    write_atomic_with(path, |file| {
                        file.write_all(&[letter; 1000]).unwrap();
                        both_write.wait();
                        // What another has begun is no leftover.
                        remove_leftovers(parent(path));
                        both_write.wait();
                        file.write_all(&[letter; 1000]).map_err(Error::io("write", path))
                    })
                })
            });
            threads.into_iter().for_each(|thread| thread.join().unwrap().unwrap());
        });
        let bytes = fs::read(&path).unwrap();
        assert!(bytes.len() == 2000 && bytes.iter().all(|b| *b == bytes[0]));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn leftovers_go_and_what_is_being_written_stays() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at(".a.0123.tmp"), b"half").unwrap();
        fs::create_dir(at(".b.0123.tmp")).unwrap();
        fs::write(at(".b.0123.tmp/file"), b"half").unwrap();
        fs::write(at("kept"), b"whole").unwrap();
        write_folder_atomic(&at("c"), |temporary| {
            remove_leftovers(folder.path());
            assert!(temporary.is_dir());
            write_atomic(&temporary.join("file"), b"whole")
        })
        .unwrap();
        remove_folder(&at("c")).unwrap();
        let mut left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["kept"]);
        // A name of the longest that a folder takes still has room for a temporary one.
        write_atomic(&at(&"x".repeat(255)), b"whole").unwrap();
    }

    #[test]
    fn names_that_leave_their_folder_are_not_plain() {
        for bad in ["", ".", "..", "../a", "a/b", "a\\b", "C:x", "a\nb"] {
            assert!(!is_plain_file_name(bad), "{bad:?}");
        }
        assert!(is_plain_file_name("model-00001-of-00002.safetensors"));
    }
}
