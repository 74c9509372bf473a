//! Files mapped into memory, read-only.

use std::{fs::File, io, ops::Deref, path::Path};

/// A file's bytes, mapped read-only.
///
/// As with every memory map, a file that another process shortens while it is mapped makes later reads fail
/// with a signal; model files are not edited in place.
pub struct MappedFile(memmap2::Mmap);

impl MappedFile {
    /// Maps the whole file. A folder or an empty file is an error of kind `InvalidInput`.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::of(&File::open(path)?)
    }

    /// Maps the whole of an open file, as [`Self::open`].
    pub fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        if metadata.len() == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the file is empty"));
        }
        // SAFETY: the map is read-only and private to this process; see the type's documentation for the
        // one remaining hazard, which no reader of mapped files can exclude.
        Ok(Self(unsafe { memmap2::Mmap::map(file)? }))
    }
}

impl Deref for MappedFile {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}
